/* ps_utf8 - is this UTF-8, and where may it be cut.
 *
 * Not here: case, normalisation, width: text is the tokeniser's business, in Python.
 * Threads: pure functions.
 */
#ifndef PS_UTF8_H
#define PS_UTF8_H

#include "base/ps_base.h"

/* Bytes of the valid beginning: n where all of it is valid. No overlong forms, surrogates or code
 * points above U+10FFFF. With `printable` control characters (below U+0020, U+007F to U+009F) are
 * invalid too. */
uint64_t ps_utf8_valid(const void *text, uint64_t n, bool printable);

/* The most bytes, at most `most`, that end at a character's border of valid, terminated text. */
size_t ps_utf8_cut(const char *text, size_t most);

#endif
