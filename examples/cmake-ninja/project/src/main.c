#include "board.h"

int main(void) {
    struct board board;
    print_count(solutions(&board, 0));
    return 0;
}
