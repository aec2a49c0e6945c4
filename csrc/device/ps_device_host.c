/* ps_device_host - the device of machines without a GPU, and of everything that is placed on the
 * CPU alone: plain memory, copies are memcpy, streams are lanes, time is the real clock.
 *
 * Not here: streams, events, flags and graphs (ps_soft).
 * Threads: the engine's thread.
 */
#include "device/ps_device_priv.h"

#include <cpuid.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { ALIGN_BYTES = 256 };

static void host_close(ps_device *d)
{
    ps_device_base *b = ps_base_of(d);
    ps_device_release_all(b);
    ps_hub_fini(&b->hub);
    ps_free(b);
}

static ps_status host_mem_info(
    ps_device *d, uint64_t *free_bytes, uint64_t *total_bytes, ps_err *err)
{
    (void)d;
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    *total_bytes = (uint64_t)sysconf(_SC_PHYS_PAGES) * page;
    *free_bytes = (uint64_t)sysconf(_SC_AVPHYS_PAGES) * page;
    /* What the kernel would give back counts as free; without /proc the number above has to do. */
    FILE *file = fopen("/proc/meminfo", "re");
    if (file == NULL) return PS_OK;
    char line[128];
    unsigned long long kib = 0;
    while (fgets(line, sizeof line, file) != NULL)
        if (sscanf(line, "MemAvailable: %llu kB", &kib) == 1) *free_bytes = kib * 1024;
    fclose(file);
    (void)err;
    return PS_OK;
}

/* Aligned as device memory is everywhere, so that offsets in an arena mean the same. The note keeps
 * the block. */
static ps_status host_alloc(ps_device *d, uint64_t n_bytes, ps_dptr *out, ps_err *err)
{
    uint64_t n_block = 0;
    char *block = ps_add_u64(n_bytes, ALIGN_BYTES - 1, &n_block) ? ps_alloc(n_block, 1) : NULL;
    if (block == NULL)
        return ps_fail(
            err, PS_ENOMEM, "no host memory for %llu bytes", (unsigned long long)n_bytes);
    out->a = ((uintptr_t)block + ALIGN_BYTES - 1) / ALIGN_BYTES * ALIGN_BYTES;
    ps_ranges_add(&ps_base_of(d)->memory, out->a, n_bytes, (uintptr_t)block);
    return PS_OK;
}

static void host_free(ps_device *d, ps_dptr p)
{
    ps_range range;
    if (ps_ranges_remove(&ps_base_of(d)->memory, p.a, &range))
        ps_free((void *)(uintptr_t)range.note);
}

static ps_status host_locked_alloc(ps_device *d, uint64_t n_bytes, void **out, ps_err *err)
{
    void *p = ps_alloc(n_bytes, 1);
    if (p == NULL)
        return ps_fail(
            err, PS_ENOMEM, "no host memory for %llu bytes", (unsigned long long)n_bytes);
    ps_ranges_add(&ps_base_of(d)->locked, (uintptr_t)p, n_bytes, PS_LOCKED_ALLOC);
    *out = p;
    return PS_OK;
}

static void host_locked_free(ps_device *d, void *p)
{
    if (ps_ranges_remove(&ps_base_of(d)->locked, (uintptr_t)p, NULL)) ps_free(p);
}

static ps_status host_lock(ps_device *d, void *p, uint64_t n_bytes, ps_err *err)
{
    if (ps_ranges_add(&ps_base_of(d)->locked, (uintptr_t)p, n_bytes, PS_LOCKED_REGISTERED))
        return PS_OK;
    return ps_fail(err, PS_EINTERNAL, "%p cannot be registered as page-locked", p);
}

static void host_unlock(ps_device *d, void *p)
{
    ps_ranges_remove(&ps_base_of(d)->locked, (uintptr_t)p, NULL);
}

static ps_status host_locked_dptr(ps_device *d, const void *locked, ps_dptr *out, ps_err *err)
{
    (void)d;
    (void)err;
    out->a = (uintptr_t)locked;
    return PS_OK;
}

/* "Intel(R) Xeon(R) ..." as the CPU spells it, without the blanks around. */
static void cpu_name(char *out, size_t cap)
{
    unsigned regs[12] = {0};
    bool known = true;
    for (unsigned i = 0; i < 3; i++)
        known = known && __get_cpuid(0x80000002u + i, &regs[4 * i], &regs[4 * i + 1],
                             &regs[4 * i + 2], &regs[4 * i + 3]);
    char text[sizeof regs + 1] = "";
    memcpy(text, regs, sizeof regs);
    const char *begin = text + strspn(text, " ");
    size_t n = strlen(begin);
    while (n > 0 && begin[n - 1] == ' ') n--;
    snprintf(out, cap, "%.*s", known && n > 0 ? (int)n : 3, known && n > 0 ? begin : "CPU");
}

static const ps_device_vtable host_vtable = {
    .close = host_close,
    .mem_info = host_mem_info,
    .alloc = host_alloc,
    .free = host_free,
    .locked_alloc = host_locked_alloc,
    .locked_free = host_locked_free,
    .lock = host_lock,
    .unlock = host_unlock,
    .locked_dptr = host_locked_dptr,
    PS_SOFT_VTABLE_ENTRIES,
};

ps_status ps_device_host_open(const ps_device_options *options, ps_device **out, ps_err *err)
{
    ps_device_base *b = ps_alloc(1, sizeof *b);
    if (b == NULL) return ps_fail(err, PS_ENOMEM, "no memory for a device");
    b->device.v = &host_vtable;
    b->device.info.kind = PS_DEVICE_HOST;
    cpu_name(b->device.info.name, sizeof b->device.info.name);
    ps_device_configure(b, options);
    ps_status status = ps_hub_init(&b->hub, err);
    if (status != PS_OK) {
        ps_free(b);
        return status;
    }
    *out = &b->device;
    return PS_OK;
}
