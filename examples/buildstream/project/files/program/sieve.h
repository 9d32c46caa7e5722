#include <program-limits.h>

extern char composite[LIMIT];

void sieve(void);
int count(void);
