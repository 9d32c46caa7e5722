#include <stdio.h>

#include "words.h"

void print_count(int count) { printf("%d words have %d letters or more\n", count, SHORTEST); }
