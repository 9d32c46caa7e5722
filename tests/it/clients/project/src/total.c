#include "table.h"

int total(const struct table *table)
{
	int sum = 0;

	for (size_t place = 0; place < TABLE_SIZE; place++)
		sum += table->value[place];
	return sum;
}
