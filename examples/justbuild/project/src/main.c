#include "words.h"

int main(int arguments, char **argument) {
    if (arguments != 2) return 2;
    print_count(count_words(argument[1]));
    return 0;
}
