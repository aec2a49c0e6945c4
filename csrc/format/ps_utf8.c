/* ps_utf8 - see ps_utf8.h. */
#include "format/ps_utf8.h"

#include <string.h>

/* Bytes of the character at p, of which n are there; 0 where it is invalid. Table 3-7 of the
 * Unicode standard. */
static uint32_t char_bytes(const uint8_t *p, uint64_t n, bool printable)
{
    const uint8_t a = p[0];
    if (a < 0x80) return printable && (a < 0x20 || a == 0x7f) ? 0 : 1;
    const uint32_t n_bytes = a < 0xc2 ? 0 : a < 0xe0 ? 2 : a < 0xf0 ? 3 : a < 0xf5 ? 4 : 0;
    if (n_bytes == 0 || n_bytes > n) return 0;
    /* The second byte's range is what excludes overlong forms, surrogates and too large values. */
    const uint8_t least = a == 0xe0 ? 0xa0 : a == 0xf0 ? 0x90 : 0x80;
    const uint8_t most = a == 0xed ? 0x9f : a == 0xf4 ? 0x8f : 0xbf;
    if (p[1] < least || p[1] > most) return 0;
    if (printable && a == 0xc2 && p[1] < 0xa0) return 0;
    for (uint32_t i = 2; i < n_bytes; i++)
        if (p[i] < 0x80 || p[i] > 0xbf) return 0;
    return n_bytes;
}

uint64_t ps_utf8_valid(const void *text, uint64_t n, bool printable)
{
    const uint8_t *p = text;
    uint64_t i = 0;
    while (i < n) {
        uint64_t word;
        if (!printable && n - i >= 8) { /* eight ASCII bytes at once: nearly all of a vocabulary */
            memcpy(&word, p + i, 8);
            if ((word & 0x8080808080808080u) == 0) {
                i += 8;
                continue;
            }
        }
        const uint32_t n_bytes = char_bytes(p + i, n - i, printable);
        if (n_bytes == 0) break;
        i += n_bytes;
    }
    return i;
}

size_t ps_utf8_cut(const char *text, size_t most)
{
    size_t n = strnlen(text, most + 1);
    if (n <= most) return n;
    n = most;
    while (n > 0 && ((uint8_t)text[n] & 0xc0) == 0x80) n--;
    return n;
}
