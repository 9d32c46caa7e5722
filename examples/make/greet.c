#include <stdio.h>

#include "greet.h"

void greet(const char *whom) { printf("%s, %s (number %d)\n", GREETING, whom, greeted()); }
