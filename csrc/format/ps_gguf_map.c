/* ps_gguf_map - see ps_gguf_map.h. */
#include "format/ps_gguf_map.h"

#include <string.h>
#include <sys/random.h>

static uint64_t rotl(uint64_t x, int n)
{
    return x << n | x >> (64 - n);
}

static void sip_round(uint64_t v[4])
{
    v[0] += v[1], v[2] += v[3];
    v[1] = rotl(v[1], 13) ^ v[0], v[3] = rotl(v[3], 16) ^ v[2];
    v[0] = rotl(v[0], 32);
    v[2] += v[1], v[0] += v[3];
    v[1] = rotl(v[1], 17) ^ v[2], v[3] = rotl(v[3], 21) ^ v[0];
    v[2] = rotl(v[2], 32);
}

static uint64_t sip_hash(const uint64_t key[2], const char *s, uint64_t n)
{
    /* The constants spell the algorithm's start value; only the key matters. */
    uint64_t v[4] = {key[0] ^ 0x736f6d6570736575u, key[1] ^ 0x646f72616e646f6du,
        key[0] ^ 0x6c7967656e657261u, key[1] ^ 0x7465646279746573u};
    uint64_t word;
    for (uint64_t i = 0; i + 8 <= n; i += 8) {
        memcpy(&word, s + i, 8);
        v[3] ^= word;
        sip_round(v), sip_round(v);
        v[0] ^= word;
    }
    word = 0;
    memcpy(&word, s + n / 8 * 8, n % 8);
    word |= n << 56;
    v[3] ^= word;
    sip_round(v), sip_round(v);
    v[0] ^= word;
    v[2] ^= 0xff;
    for (int i = 0; i < 4; i++) sip_round(v);
    return v[0] ^ v[1] ^ v[2] ^ v[3];
}

static const char *name_of(const ps_gguf_map *m, uint64_t i)
{
    const char *name;
    memcpy(&name, m->base + i * m->stride, sizeof name);
    return name;
}

/* The slot that holds `name`, or the empty one where it belongs. */
static uint64_t slot_of(const ps_gguf_map *m, const char *name)
{
    uint64_t i = sip_hash(m->key, name, strlen(name)) & (m->n_slots - 1);
    while (m->slots[i] != 0 && strcmp(name_of(m, m->slots[i] - 1), name) != 0)
        i = (i + 1) & (m->n_slots - 1);
    return i;
}

ps_status ps_gguf_map_init(
    ps_gguf_map *m, const void *records, uint64_t stride, uint64_t n, uint64_t *i_twice)
{
    *m = (ps_gguf_map){.base = records, .stride = stride};
    *i_twice = n;
    if (n == 0) return PS_OK;
    if (getrandom(m->key, sizeof m->key, GRND_NONBLOCK) != (ssize_t)sizeof m->key) {
        /* Early in boot: still nothing that a file's author could know. */
        m->key[0] = ps_clock_ns();
        m->key[1] = (uint64_t)(uintptr_t)records;
    }
    uint64_t n_slots = 2;
    while (n_slots < 2 * n) n_slots *= 2;
    m->slots = ps_alloc(n_slots, sizeof *m->slots);
    if (m->slots == NULL) return PS_ENOMEM;
    m->n_slots = n_slots;
    for (uint64_t i = 0; i < n; i++) {
        const uint64_t at = slot_of(m, name_of(m, i));
        if (m->slots[at] != 0) {
            *i_twice = i;
            return PS_OK;
        }
        m->slots[at] = (uint32_t)i + 1;
    }
    return PS_OK;
}

void ps_gguf_map_fini(ps_gguf_map *m)
{
    ps_free(m->slots);
    *m = (ps_gguf_map){0};
}

const void *ps_gguf_map_find(const ps_gguf_map *m, const char *name)
{
    if (m->n_slots == 0) return NULL;
    const uint32_t found = m->slots[slot_of(m, name)];
    return found == 0 ? NULL : m->base + (uint64_t)(found - 1) * m->stride;
}
