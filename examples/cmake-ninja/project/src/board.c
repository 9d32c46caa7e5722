#include "board.h"

#include <stdlib.h>

bool is_free(const struct board *board, int row, int column) {
    for (int above = 0; above < row; above++) {
        int distance = abs(board->column[above] - column);
        if (distance == 0 || distance == row - above) return false;
    }
    return true;
}
