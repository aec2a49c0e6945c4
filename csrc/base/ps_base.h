/* ps_base - what every other file stands on: status codes, explained errors, overflow-checked
 * sizes, the host allocator with its fault injection, and the clock.
 *
 * Not here: threads (ps_thread), device memory (device/), any knowledge of models.
 * Threads: every function may be called from any thread at any time.
 */
#ifndef PS_BASE_H
#define PS_BASE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Fallible functions return 0 or one of these. The binding maps each to the Python exception named
 * behind it. */
typedef enum ps_status {
    PS_OK = 0,
    PS_ENOMEM = -1,       /* host memory: HostMemoryError */
    PS_EFILE = -2,        /* missing, directory, permission, read error: FileError */
    PS_EFORMAT = -3,      /* the file's content is wrong: FormatError */
    PS_EUNSUPPORTED = -4, /* well-formed, but not something we run: UnsupportedError */
    PS_EREQUEST = -5,     /* an argument of the caller: RequestError */
    PS_EBUDGET = -6,      /* does not fit the VRAM budget: BudgetError */
    PS_EPLAN = -7,        /* a placement or plan breaks a rule: PlanError */
    PS_EDEVICE = -8,      /* refused alloc, copy or launch; engine lives: DeviceError */
    PS_EFATAL = -9,       /* sticky; the engine must close: DeviceError(fatal=True) */
    PS_EBUSY = -10,       /* a second thread entered the engine: BusyError */
    PS_ECLOSED = -11,     /* used after close: ClosedError */
    PS_ECANCELLED = -12,  /* Ctrl-C, abort; state as before the call: KeyboardInterrupt */
    PS_EINTERNAL = -13,   /* our own bug, caught by a check: PipeshardError */
} ps_status;

const char *ps_status_name(ps_status status); /* "PS_EFORMAT"; never NULL */

/* What went wrong, in words and in the fields that the Python exceptions carry. A caller passes one
 * zeroed struct down the call chain; the first failure fills it. Plain data, no ownership. */
typedef struct ps_err {
    ps_status status;
    char message[512]; /* a sentence that a user can act on; never empty once status is set */
    char field[128];   /* FormatError.field, RequestError.argument, UnsupportedError.what,
                          PlanError.unit */
    char extra[256];   /* UnsupportedError.supported, FormatError.path, PlanError.tier */
    uint64_t offset;   /* FormatError.offset: byte offset in the file */
    uint64_t needed;   /* BudgetError.needed   (bytes) */
    uint64_t budget;   /* BudgetError.budget   (bytes) */
    uint64_t smallest; /* BudgetError.smallest (bytes) */
    int os_errno;      /* FileError: errno of the failed call, else 0 */
} ps_err;

/* Fill *err (may be NULL; an error already there is kept: the first cause wins) and return
 * `status`. */
ps_status ps_fail(ps_err *err, ps_status status, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
/* The same, also setting err->field. */
ps_status ps_fail_field(ps_err *err, ps_status status, const char *field, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));

/* PS_EUNSUPPORTED: err->field = what, err->extra = what we do support, also put behind the message.
 */
ps_status ps_fail_unsupported(ps_err *err, const char *what, const char *supported, const char *fmt,
    ...) __attribute__((format(printf, 4, 5)));

/* Hands a failure on to the caller, where nothing is left to undo. */
#define PS_TRY(call)                                                                               \
    do {                                                                                           \
        ps_status try_status = (call);                                                             \
        if (try_status != PS_OK) return try_status;                                                \
    } while (0)

/* Our own bugs only: never file content, user input, memory or device failures. Evaluates to a
 * PS_EINTERNAL return; it does not abort, because the core lives inside somebody's Python process.
 */
#define ps_check_bug(cond, err)                                                                    \
    do {                                                                                           \
        if (!(cond))                                                                               \
            return ps_fail(                                                                        \
                (err), PS_EINTERNAL, "internal error at %s:%d: %s", __FILE__, __LINE__, #cond);    \
    } while (0)

/* Overflow-checked size arithmetic. True on success; *out is untouched on overflow. */
static inline bool ps_add_u64(uint64_t a, uint64_t b, uint64_t *out)
{
    uint64_t r;
    if (__builtin_add_overflow(a, b, &r)) return false;
    *out = r;
    return true;
}
static inline bool ps_mul_u64(uint64_t a, uint64_t b, uint64_t *out)
{
    uint64_t r;
    if (__builtin_mul_overflow(a, b, &r)) return false;
    *out = r;
    return true;
}
/* Round up to a multiple of `step` (> 0). */
static inline bool ps_round_up_u64(uint64_t a, uint64_t step, uint64_t *out)
{
    uint64_t r;
    if (step == 0 || __builtin_add_overflow(a, step - 1, &r)) return false;
    *out = r / step * step;
    return true;
}
static inline uint64_t ps_min_u64(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}
static inline uint64_t ps_max_u64(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}
static inline uint64_t ps_div_up_u64(uint64_t a, uint64_t b)
{
    return a / b + (a % b != 0);
}

/* Host memory: the only way to it. Zeroed, 64-byte aligned; NULL when refused or `n * size`
 * overflows. ps_free(NULL) is allowed. Blocks of at least 2 MiB come from anonymous mappings that
 * ask for huge pages. */
void *ps_alloc(uint64_t n, uint64_t size);
void *ps_realloc(void *p, uint64_t n,
    uint64_t size); /* keeps min(old, new) bytes; new bytes are zero; on failure p stays valid */
void ps_free(void *p);
/* The content of this part of a block is needed no more: whole pages of it go back to the system.
 */
void ps_forget(void *p, uint64_t n_bytes);
char *ps_strdup(const char *s);

/* The allocator's counters and its fault knob are the one mutable process-wide state of the core
 * (STYLE.md rule 12 says why): what is live must be countable across every object, or a leak could
 * hide between two of them. */
typedef struct ps_heap_stats {
    uint64_t live_bytes, live_blocks; /* now */
    uint64_t n_allocs;                /* since process start */
} ps_heap_stats;
ps_heap_stats ps_heap_get_stats(void);
/* Tests: let the next `after` allocations succeed and refuse the one behind them (once). after < 0:
 * off. Returns whether the previously set fault has fired. */
bool ps_heap_fail_after(int64_t after);

uint64_t ps_clock_ns(void); /* monotonic */
uint64_t ps_hash64(
    const void *data, size_t n); /* FNV-1a, for map keys and fingerprints, not for security */

/* SplitMix64: seeds, random delays, sampling. State is the caller's. */
static inline uint64_t ps_rng_next(uint64_t *state)
{
    uint64_t z = (*state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}
static inline double ps_rng_uniform(uint64_t *state)
{
    return (double)(ps_rng_next(state) >> 11) * 0x1.0p-53;
}

#ifdef __cplusplus
}
#endif
#endif
