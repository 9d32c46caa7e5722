#include "words.h"

int count_words(const char *text) {
    int count = 0;
    size_t length;
    while ((text = next_word(text, &length))) {
        if (length >= SHORTEST) count++;
        text += length;
    }
    return count;
}
