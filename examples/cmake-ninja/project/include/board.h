#ifndef BOARD_H
#define BOARD_H

#include <stdbool.h>

#define SIDE 8

/* The column of the queen in each row. */
struct board {
    int column[SIDE];
};

bool is_free(const struct board *board, int row, int column);
long solutions(struct board *board, int row);
void print_count(long count);

#endif
