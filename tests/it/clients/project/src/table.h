#ifndef TABLE_H
#define TABLE_H

#include <stddef.h>

#define TABLE_SIZE 64

struct table {
	const char *key[TABLE_SIZE];
	int value[TABLE_SIZE];
};

unsigned hash(const char *text, size_t length);
int *entry(struct table *table, const char *key);
int total(const struct table *table);

#endif
