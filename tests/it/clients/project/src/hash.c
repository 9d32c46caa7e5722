#include "table.h"

unsigned hash(const char *text, size_t length)
{
	unsigned sum = 5381;

	while (length--)
		sum = sum * 33 + (unsigned char)*text++;
	return sum;
}
