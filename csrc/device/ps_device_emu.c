/* ps_device_emu - an emulated GPU: real threads, a virtual clock, and private memory of hard
 * capacity that shows mistakes. Memory reads as NaN (or index -1) until it is written; its
 * addresses carry a tag, so that the host, or an op on the CPU stream, traps when it follows one;
 * each allocation stands between inaccessible pages, and freed memory becomes one of them.
 *
 * Not here: streams, events, flags and graphs (ps_soft), delays and virtual time (ps_lane), faults
 * (ps_device).
 * Threads: the engine's thread.
 */
#include "device/ps_device_priv.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum {
    PAGE_BYTES = 4096,
    GRAIN_BYTES = 256, /* what an allocation is rounded up to before it counts */
    /* Mapped again and again: the smaller, the more mappings, and the kernel allows 65530. */
    POISON_FILE_BYTES = 4 << 20,
    POISON = 0xff,
    FREED_KEPT = 16,
};
#define DEFAULT_VRAM_BYTES (64ull << 30)
#define MAX_VRAM_BYTES     (128ull << 30) /* half of the mappings that there may be */

typedef struct emu {
    ps_device_base base; /* first */
    int poison_fd;       /* owns: a file of poison, which every page shares until it is written */
    uint64_t used_bytes; /* of device memory, in whole grains */
    uint64_t cap_locked_bytes;
    uint64_t map_bytes_per_gib, locked_pages; /* see map_bytes_of() */
    ps_range freed[FREED_KEPT]; /* owns the address space of memory freed lately; a ring */
    uint32_t n_freed;
} emu;

static emu *emu_of(ps_device *d)
{
    return (emu *)d;
}

static uint64_t mapped_bytes(uint64_t n_bytes)
{
    return (n_bytes + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
}

static void unmap(uint64_t memory, uint64_t n_bytes)
{
    if (n_bytes > 0)
        munmap((char *)(uintptr_t)memory - PAGE_BYTES, mapped_bytes(n_bytes) + 2 * PAGE_BYTES);
}

static void emu_close(ps_device *d)
{
    emu *e = emu_of(d);
    ps_device_release_all(&e->base);
    for (int i = 0; i < FREED_KEPT; i++) unmap(e->freed[i].base, e->freed[i].n_bytes);
    ps_hub_fini(&e->base.hub);
    if (e->poison_fd >= 0) close(e->poison_fd);
    ps_free(e);
}

static uint64_t pages_of(uint64_t base, uint64_t n_bytes)
{
    return (base % PAGE_BYTES + n_bytes + PAGE_BYTES - 1) / PAGE_BYTES;
}

/* Of device memory, for page tables of so much locked memory, as a GPU's driver takes them. */
static uint64_t map_bytes_of(const emu *e, uint64_t n_pages)
{
    const uint64_t gib_pages = (1 << 30) / PAGE_BYTES;
    return n_pages / gib_pages * e->map_bytes_per_gib +
           ps_div_up_u64(n_pages % gib_pages * e->map_bytes_per_gib, gib_pages);
}

static uint64_t free_bytes_of(const emu *e)
{
    return e->base.device.info.vram_total_bytes - e->used_bytes - map_bytes_of(e, e->locked_pages);
}

static ps_status emu_mem_info(
    ps_device *d, uint64_t *free_bytes, uint64_t *total_bytes, ps_err *err)
{
    (void)err;
    *total_bytes = d->info.vram_total_bytes;
    *free_bytes = free_bytes_of(emu_of(d));
    return PS_OK;
}

/* ---- device memory ---- */

/* [guard page][memory][guard page]; returns the memory. */
static void *map_poisoned(int poison_fd, uint64_t n_bytes)
{
    uint64_t n_mapped = mapped_bytes(n_bytes), n_total = n_mapped + 2 * PAGE_BYTES;
    char *outer =
        mmap(NULL, n_total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (outer == MAP_FAILED) return NULL;
    char *memory = outer + PAGE_BYTES;
    for (uint64_t at = 0; at < n_mapped; at += POISON_FILE_BYTES) {
        uint64_t n = ps_min_u64(n_mapped - at, POISON_FILE_BYTES);
        void *p = mmap(memory + at, n, PROT_READ | PROT_WRITE,
            MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, poison_fd, 0);
        if (p == MAP_FAILED) {
            munmap(outer, n_total);
            return NULL;
        }
    }
    return memory;
}

static ps_status emu_alloc(ps_device *d, uint64_t n_bytes, ps_dptr *out, ps_err *err)
{
    emu *e = emu_of(d);
    uint64_t n = 0, free_bytes = free_bytes_of(e);
    if (!ps_round_up_u64(n_bytes, GRAIN_BYTES, &n) || n > free_bytes)
        return ps_fail(err, PS_EDEVICE, "the emulated GPU has %llu of %llu bytes free, not %llu",
            (unsigned long long)free_bytes, (unsigned long long)d->info.vram_total_bytes,
            (unsigned long long)n_bytes);
    void *p = map_poisoned(e->poison_fd, n);
    if (p == NULL)
        return ps_fail(err, PS_ENOMEM,
            "no address space for %llu bytes of emulated device memory: %s", (unsigned long long)n,
            strerror(errno));
    out->a = (uintptr_t)p ^ PS_EMU_TAG;
    ps_ranges_add(&e->base.memory, out->a, n_bytes, n);
    e->used_bytes += n;
    return PS_OK;
}

/* The addresses stay reserved for a while, or the next mapping of anybody could move in and a late
 * access would go unnoticed. */
static void emu_free(ps_device *d, ps_dptr p)
{
    emu *e = emu_of(d);
    ps_range range;
    if (!ps_ranges_remove(&e->base.memory, p.a, &range)) return;
    e->used_bytes -= range.note;
    ps_range *oldest = &e->freed[e->n_freed++ % FREED_KEPT];
    unmap(oldest->base, oldest->n_bytes);
    *oldest = (ps_range){.base = p.a ^ PS_EMU_TAG, .n_bytes = range.note};
    mmap((void *)(uintptr_t)oldest->base, mapped_bytes(oldest->n_bytes), PROT_NONE,
        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

/* ---- page-locked memory: ordinary memory with a limit ---- */

static ps_status check_locked_room(const emu *e, uint64_t n_bytes, ps_err *err)
{
    uint64_t total = 0;
    if (e->cap_locked_bytes == 0) return PS_OK;
    if (ps_add_u64(e->base.locked.total_bytes, n_bytes, &total) && total <= e->cap_locked_bytes)
        return PS_OK;
    return ps_fail(err, PS_EDEVICE,
        "%llu more bytes of page-locked memory exceed the limit of %llu: %llu are in use",
        (unsigned long long)n_bytes, (unsigned long long)e->cap_locked_bytes,
        (unsigned long long)e->base.locked.total_bytes);
}

/* Page tables for a range, if device memory has room for them. */
static ps_status map_locked(emu *e, const void *p, uint64_t n_bytes, ps_err *err)
{
    uint64_t n_pages = e->locked_pages + pages_of((uintptr_t)p, n_bytes);
    uint64_t more = map_bytes_of(e, n_pages) - map_bytes_of(e, e->locked_pages);
    if (more > free_bytes_of(e))
        return ps_fail(err, PS_EDEVICE,
            "the emulated GPU has %llu bytes free, not %llu for page tables of locked memory",
            (unsigned long long)free_bytes_of(e), (unsigned long long)more);
    e->locked_pages = n_pages;
    return PS_OK;
}

static ps_status emu_locked_alloc(ps_device *d, uint64_t n_bytes, void **out, ps_err *err)
{
    emu *e = emu_of(d);
    ps_status status = check_locked_room(e, n_bytes, err);
    if (status != PS_OK) return status;
    void *p = ps_alloc(n_bytes, 1);
    if (p == NULL)
        return ps_fail(
            err, PS_ENOMEM, "no host memory for %llu bytes", (unsigned long long)n_bytes);
    status = map_locked(e, p, n_bytes, err);
    if (status != PS_OK) {
        ps_free(p);
        return status;
    }
    ps_ranges_add(&e->base.locked, (uintptr_t)p, n_bytes, PS_LOCKED_ALLOC);
    *out = p;
    return PS_OK;
}

static bool forget_locked(emu *e, const void *p)
{
    ps_range range;
    if (!ps_ranges_remove(&e->base.locked, (uintptr_t)p, &range)) return false;
    e->locked_pages -= pages_of(range.base, range.n_bytes);
    return true;
}

static void emu_locked_free(ps_device *d, void *p)
{
    if (forget_locked(emu_of(d), p)) ps_free(p);
}

static ps_status emu_lock(ps_device *d, void *p, uint64_t n_bytes, ps_err *err)
{
    emu *e = emu_of(d);
    ps_status status = check_locked_room(e, n_bytes, err);
    if (status != PS_OK) return status;
    status = map_locked(e, p, n_bytes, err);
    if (status != PS_OK) return status;
    if (ps_ranges_add(&e->base.locked, (uintptr_t)p, n_bytes, PS_LOCKED_REGISTERED)) return PS_OK;
    e->locked_pages -= pages_of((uintptr_t)p, n_bytes);
    return ps_fail(err, PS_EINTERNAL, "%p cannot be registered as page-locked", p);
}

static void emu_unlock(ps_device *d, void *p)
{
    forget_locked(emu_of(d), p);
}

/* An alias that only ops of the emulated GPU can follow. */
static ps_status emu_locked_dptr(ps_device *d, const void *locked, ps_dptr *out, ps_err *err)
{
    (void)d;
    (void)err;
    out->a = (uintptr_t)locked ^ PS_EMU_TAG;
    return PS_OK;
}

/* ---- open ---- */

static const ps_device_vtable emu_vtable = {
    .close = emu_close,
    .mem_info = emu_mem_info,
    .alloc = emu_alloc,
    .free = emu_free,
    .locked_alloc = emu_locked_alloc,
    .locked_free = emu_locked_free,
    .lock = emu_lock,
    .unlock = emu_unlock,
    .locked_dptr = emu_locked_dptr,
    PS_SOFT_VTABLE_ENTRIES,
};

/* -1 with errno on failure. */
static int make_poison_file(void)
{
    int fd = memfd_create("pipeshard-emu", MFD_CLOEXEC);
    if (fd < 0) return -1;
    void *p = MAP_FAILED;
    if (ftruncate(fd, POISON_FILE_BYTES) == 0)
        p = mmap(NULL, POISON_FILE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED) {
        int cause = errno;
        close(fd);
        errno = cause;
        return -1;
    }
    memset(p, POISON, POISON_FILE_BYTES);
    munmap(p, POISON_FILE_BYTES);
    return fd;
}

ps_status ps_device_emu_open(const ps_device_options *options, ps_device **out, ps_err *err)
{
    uint64_t vram_bytes =
        options->emu_vram_bytes != 0 ? options->emu_vram_bytes : DEFAULT_VRAM_BYTES;
    if (vram_bytes > MAX_VRAM_BYTES)
        return ps_fail_field(err, PS_EREQUEST, "vram_capacity",
            "an emulated GPU has at most %llu bytes, not %llu", (unsigned long long)MAX_VRAM_BYTES,
            (unsigned long long)vram_bytes);
    emu *e = ps_alloc(1, sizeof *e);
    if (e == NULL) return ps_fail(err, PS_ENOMEM, "no memory for a device");
    ps_device_base *b = &e->base;
    b->device.v = &emu_vtable;
    b->device.info = (ps_device_info){.kind = PS_DEVICE_EMU,
        .name = "emulated GPU",
        .vram_total_bytes = vram_bytes,
        .virtual_clock = true};
    b->n_faults = options->n_faults;
    memcpy(b->faults, options->faults, sizeof b->faults);
    e->cap_locked_bytes = options->emu_locked_bytes;
    e->map_bytes_per_gib = options->emu_map_bytes_per_gib;
    ps_device_configure(b, options);
    b->hub.compute_threads = options->threads;
    b->hub.accel_tag = PS_EMU_TAG;
    b->hub.virtual_clock = true;
    b->hub.delays = options->emu_delays;
    b->hub.seed = options->emu_seed;
    e->poison_fd = make_poison_file();
    ps_status status = PS_OK;
    if (e->poison_fd < 0)
        status =
            ps_fail(err, PS_EDEVICE, "cannot make the emulated GPU's memory: %s", strerror(errno));
    if (status == PS_OK) status = ps_hub_init(&b->hub, err);
    if (status != PS_OK) {
        if (e->poison_fd >= 0) close(e->poison_fd);
        ps_free(e);
        return status;
    }
    *out = &b->device;
    return PS_OK;
}
