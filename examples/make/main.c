#include "greet.h"

int main(void) {
    greet("world");
    greet(GREETING);
    return 0;
}
