#include <string.h>

#include "table.h"

int *entry(struct table *table, const char *key)
{
	unsigned place = hash(key, strlen(key)) % TABLE_SIZE;

	while (table->key[place] && strcmp(table->key[place], key))
		place = (place + 1) % TABLE_SIZE;
	table->key[place] = key;
	return &table->value[place];
}
