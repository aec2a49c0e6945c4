/* ps_base - see ps_base.h. Blocks carry a 64-byte header that remembers their size, so that free
 * and the counters need no table and every payload is 64-byte aligned. */
#include "base/ps_base.h"

#include <errno.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* Under AddressSanitizer the bytes behind a block are poisoned: rounding and page ends would hide
 * an overrun. */
#if defined(__SANITIZE_ADDRESS__)
#define WITH_GUARD 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define WITH_GUARD 1
#endif
#endif
#ifdef WITH_GUARD
#include <sanitizer/asan_interface.h>
enum { GUARD_BYTES = 64 };
static void guard_set(void *from, uint64_t n)
{
    __asan_poison_memory_region(from, n);
}
static void guard_clear(void *from, uint64_t n)
{
    __asan_unpoison_memory_region(from, n);
}
#else
enum { GUARD_BYTES = 0 };
static void guard_set(void *from, uint64_t n)
{
    (void)from, (void)n;
}
static void guard_clear(void *from, uint64_t n)
{
    (void)from, (void)n;
}
#endif

enum {
    HEADER_BYTES = 64,
    MAP_FROM_BYTES = 2 << 20, /* one huge page: below it a mapping wastes more than it gains */
};
/* "ps_alloc": a wrong pointer to ps_free is caught here, not in libc. */
#define HEADER_MAGIC 0x70735f616c6c6f63ull

typedef struct header {
    uint64_t magic;
    uint64_t n_bytes; /* payload */
    uint64_t mapped;  /* bytes of the mapping, 0 for a malloc'ed block */
    uint64_t n_guard; /* bytes behind the payload */
    uint64_t unused[4];
} header;
_Static_assert(sizeof(header) == HEADER_BYTES, "the payload must stay 64-byte aligned");

static _Atomic uint64_t heap_live_bytes, heap_live_blocks, heap_n_allocs;
static _Atomic int64_t heap_fail_after = -1;
static _Atomic bool heap_fault_fired;

const char *ps_status_name(ps_status status)
{
    static const char *const names[] = {"PS_OK", "PS_ENOMEM", "PS_EFILE", "PS_EFORMAT",
        "PS_EUNSUPPORTED", "PS_EREQUEST", "PS_EBUDGET", "PS_EPLAN", "PS_EDEVICE", "PS_EFATAL",
        "PS_EBUSY", "PS_ECLOSED", "PS_ECANCELLED", "PS_EINTERNAL"};
    int i = -(int)status;
    return i >= 0 && i < (int)(sizeof names / sizeof *names) ? names[i] : "PS_UNKNOWN";
}

static ps_status fail_v(
    ps_err *err, ps_status status, const char *field, const char *fmt, va_list ap)
{
    if (err == NULL || err->status != PS_OK) return status;
    err->status = status;
    vsnprintf(err->message, sizeof err->message, fmt, ap);
    if (field != NULL) snprintf(err->field, sizeof err->field, "%s", field);
    return status;
}

ps_status ps_fail(ps_err *err, ps_status status, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    fail_v(err, status, NULL, fmt, ap);
    va_end(ap);
    return status;
}

ps_status ps_fail_field(ps_err *err, ps_status status, const char *field, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    fail_v(err, status, field, fmt, ap);
    va_end(ap);
    return status;
}

ps_status ps_fail_unsupported(
    ps_err *err, const char *what, const char *supported, const char *fmt, ...)
{
    if (err == NULL || err->status != PS_OK) return PS_EUNSUPPORTED;
    va_list ap;
    va_start(ap, fmt);
    fail_v(err, PS_EUNSUPPORTED, what, fmt, ap);
    va_end(ap);
    snprintf(err->extra, sizeof err->extra, "%s", supported);
    size_t n = strlen(err->message);
    snprintf(err->message + n, sizeof err->message - n, "; supported: %s", supported);
    return PS_EUNSUPPORTED;
}

static bool fault_due(void)
{
    /* The common case must not write: every allocation of every thread passes here. */
    if (atomic_load_explicit(&heap_fail_after, memory_order_relaxed) < 0) return false;
    if (atomic_fetch_sub(&heap_fail_after, 1) != 0) return false;
    atomic_store(&heap_fault_fired, true);
    return true;
}

void *ps_alloc(uint64_t n, uint64_t size)
{
    uint64_t n_bytes = 0, total = 0;
    if (!ps_mul_u64(n, size, &n_bytes) ||
        !ps_add_u64(n_bytes, HEADER_BYTES + GUARD_BYTES + 63, &total))
        return NULL;
    if (total > (uint64_t)PTRDIFF_MAX || fault_due()) return NULL;
    total = total / 64 * 64;

    header *h = NULL;
    uint64_t mapped = 0;
    if (total >= MAP_FROM_BYTES) {
        void *p = mmap(NULL, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED) return NULL;
        /* Advice: a kernel without huge pages is slower, not wrong. */
        madvise(p, total, MADV_HUGEPAGE);
        h = p;
        mapped = total;
    } else {
        h = aligned_alloc(64, total);
        if (h == NULL) return NULL;
        memset(h, 0, total);
    }
    *h = (header){.magic = HEADER_MAGIC,
        .n_bytes = n_bytes,
        .mapped = mapped,
        .n_guard = total - HEADER_BYTES - n_bytes};
    guard_set((char *)(h + 1) + n_bytes, h->n_guard);
    atomic_fetch_add(&heap_live_bytes, n_bytes);
    atomic_fetch_add(&heap_live_blocks, 1);
    atomic_fetch_add(&heap_n_allocs, 1);
    return h + 1;
}

void ps_free(void *p)
{
    if (p == NULL) return;
    header *h = (header *)p - 1;
    /* Not ours or freed twice: leaking is safer than corrupting libc's heap. */
    if (h->magic != HEADER_MAGIC) return;
    h->magic = 0;
    guard_clear((char *)p + h->n_bytes, h->n_guard);
    atomic_fetch_sub(&heap_live_bytes, h->n_bytes);
    atomic_fetch_sub(&heap_live_blocks, 1);
    if (h->mapped != 0)
        munmap(h, h->mapped);
    else
        free(h);
}

void *ps_realloc(void *p, uint64_t n, uint64_t size)
{
    void *q = ps_alloc(n, size);
    if (q == NULL || p == NULL) return q;
    memcpy(q, p, ps_min_u64(((header *)p - 1)->n_bytes, n * size));
    ps_free(p);
    return q;
}

void ps_forget(void *p, uint64_t n_bytes)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t from = ((uintptr_t)p + page - 1) / page * page,
              to = ((uintptr_t)p + n_bytes) / page * page;
    if (to > from) madvise((void *)from, to - from, MADV_DONTNEED); /* advice, too */
}

char *ps_strdup(const char *s)
{
    size_t n = strlen(s) + 1;
    char *copy = ps_alloc(n, 1);
    if (copy != NULL) memcpy(copy, s, n);
    return copy;
}

ps_heap_stats ps_heap_get_stats(void)
{
    return (ps_heap_stats){.live_bytes = atomic_load(&heap_live_bytes),
        .live_blocks = atomic_load(&heap_live_blocks),
        .n_allocs = atomic_load(&heap_n_allocs)};
}

bool ps_heap_fail_after(int64_t after)
{
    bool fired = atomic_exchange(&heap_fault_fired, false);
    atomic_store(&heap_fail_after, after < 0 ? -1 : after);
    return fired;
}

uint64_t ps_clock_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

uint64_t ps_hash64(const void *data, size_t n)
{
    const unsigned char *p = data;
    uint64_t h = 0xcbf29ce484222325ull;
    for (size_t i = 0; i < n; i++) h = (h ^ p[i]) * 0x100000001b3ull;
    return h;
}
