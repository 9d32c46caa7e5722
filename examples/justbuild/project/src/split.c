#include "words.h"

#include <string.h>

const char *next_word(const char *text, size_t *length) {
    text += strspn(text, " ");
    *length = strcspn(text, " ");
    return *length ? text : NULL;
}
