#include <stdio.h>

#include "table.h"

int main(void)
{
	static struct table table;

	++*entry(&table, "one");
	*entry(&table, "two") += 2;
	++*entry(&table, "one");
	printf("%d of %d\n", *entry(&table, "one"), total(&table));
	return 0;
}
