#include <stdio.h>

#include "board.h"

void print_count(long count) { printf("%d queens stand in %ld ways\n", SIDE, count); }
