#ifndef WORDS_H
#define WORDS_H

#include <stddef.h>

/* Shorter words do not count. */
#define SHORTEST 4

const char *next_word(const char *text, size_t *length);
int count_words(const char *text);
void print_count(int count);

#endif
