#include <stdio.h>

#include "sieve.h"

int main(void) {
    sieve();
    printf("%d primes below %d\n", count(), LIMIT);
    return 0;
}
