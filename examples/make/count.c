#include "greet.h"

int greeted(void) {
    static int count;
    return ++count;
}
