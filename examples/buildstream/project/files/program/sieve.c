#include "sieve.h"

char composite[LIMIT];

void sieve(void) {
    for (int n = 2; n < LIMIT; n++)
        for (int multiple = 2 * n; multiple < LIMIT; multiple += n) composite[multiple] = 1;
}
