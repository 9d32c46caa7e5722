#include "board.h"

long solutions(struct board *board, int row) {
    if (row == SIDE) return 1;
    long count = 0;
    for (int column = 0; column < SIDE; column++) {
        if (!is_free(board, row, column)) continue;
        board->column[row] = column;
        count += solutions(board, row + 1);
    }
    return count;
}
