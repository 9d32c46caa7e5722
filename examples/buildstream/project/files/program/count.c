#include "sieve.h"

int count(void) {
    int primes = 0;
    for (int n = 2; n < LIMIT; n++) primes += !composite[n];
    return primes;
}
