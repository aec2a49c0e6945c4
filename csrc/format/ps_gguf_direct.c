/* ps_gguf_direct - see ps_gguf_direct.h. */
#include "format/ps_gguf_direct.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <sys/stat.h>
#include <unistd.h>

#include "format/ps_gguf_part.h"

typedef struct file {
    const ps_gguf_part *part; /* borrows */
    int fd;                   /* owns; -1: read through the page cache */
    uint64_t align;
    _Atomic bool refused; /* a read: the others are not tried */
} file;

struct ps_gguf_direct {
    const ps_gguf *gguf; /* borrows */
    uint32_t n_files;
    file *files; /* owns */
};

/* ---- opening ---- */

/* 0: the file system has no such reads, or wants more than a page. */
static uint64_t find_align(int fd)
{
#ifdef STATX_DIOALIGN
    struct statx st;
    if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &st) == 0 &&
        (st.stx_mask & STATX_DIOALIGN) != 0) {
        uint64_t offsets = st.stx_dio_offset_align, memory = st.stx_dio_mem_align;
        bool fits = offsets > 0 && memory > 0 && PS_DIRECT_PAGE_BYTES % offsets == 0 &&
                    PS_DIRECT_PAGE_BYTES % memory == 0;
        return fits ? offsets : 0;
    }
#else
    (void)fd;
#endif
    return PS_DIRECT_PAGE_BYTES;
}

/* The path may lead to another file by now. */
static bool same_file(int a, int b)
{
    struct stat x, y;
    return fstat(a, &x) == 0 && fstat(b, &y) == 0 && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

/* Some file systems open such a file and then refuse to read it. */
static bool can_read(const file *f, void *page)
{
    const ps_gguf_io *io = &f->part->io;
    if (f->part->file_bytes < f->align) return true; /* all of it is its end */
    int64_t got;
    do got = io->pread(io->ctx, f->fd, page, f->align, 0);
    while (got == -EINTR);
    return got > 0;
}

static void open_file(file *f, void *page)
{
    const ps_gguf_part *p = f->part;
    if (p->fd < 0) return;
    int fd = open(p->path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK | O_DIRECT);
    if (fd < 0) return;
    f->fd = fd;
    f->align = same_file(fd, p->fd) ? find_align(fd) : 0;
    if (f->align > 0 && can_read(f, page)) return;
    close(fd);
    f->fd = -1;
    f->align = 1;
}

ps_status ps_gguf_direct_open(const ps_gguf *g, ps_gguf_direct **out, ps_err *err)
{
    uint32_t n = ps_gguf_file_count(g);
    ps_gguf_direct *d = ps_alloc(1, sizeof *d);
    file *files = ps_alloc(n, sizeof *files);
    char *memory = ps_alloc(2, PS_DIRECT_PAGE_BYTES); /* a page begins somewhere in it */
    *out = NULL;
    if (d == NULL || files == NULL || memory == NULL) {
        ps_free(d);
        ps_free(files);
        ps_free(memory);
        return ps_fail(err, PS_ENOMEM, "no host memory to read %u files", n);
    }
    char *page = memory + (-(uintptr_t)memory & (PS_DIRECT_PAGE_BYTES - 1));
    for (uint32_t i = 0; i < n; i++) {
        files[i].part = ps_gguf_part_at(g, i);
        files[i].fd = -1;
        files[i].align = 1;
        open_file(&files[i], page);
    }
    ps_free(memory);
    *d = (ps_gguf_direct){.gguf = g, .n_files = n, .files = files};
    *out = d;
    return PS_OK;
}

void ps_gguf_direct_close(ps_gguf_direct *d)
{
    if (d == NULL) return;
    for (uint32_t i = 0; i < d->n_files; i++)
        if (d->files[i].fd >= 0) close(d->files[i].fd);
    ps_free(d->files);
    ps_free(d);
}

/* ---- reading ---- */

bool ps_gguf_direct_works(const ps_gguf_direct *d)
{
    for (uint32_t i = 0; i < d->n_files; i++)
        if (d->files[i].fd < 0 || atomic_load(&d->files[i].refused)) return false;
    return true;
}

uint64_t ps_gguf_direct_align(const ps_gguf_direct *d, uint32_t i_file)
{
    return d->files[i_file].align;
}

/* As far as it goes: a refusal, or a read that ends off the grid, leaves the rest. */
static ps_status read_past_cache(
    file *f, uint64_t offset, unsigned char *dst, uint64_t n, uint64_t *done, ps_err *err)
{
    const ps_gguf_part *p = f->part;
    while (*done < n) {
        int64_t got = p->io.pread(p->io.ctx, f->fd, dst + *done, n - *done, offset + *done);
        if (got == -EINTR) continue;
        if (got == -EINVAL || got == -EOPNOTSUPP) {
            atomic_store(&f->refused, true);
            return PS_OK;
        }
        if (got < 0) return ps_gguf_part_fail_file(p, err, (int)-got, "cannot be read");
        ps_check_bug((uint64_t)got <= n - *done, err);
        *done += (uint64_t)got;
        if (got == 0 || (uint64_t)got % f->align != 0) return PS_OK;
    }
    return PS_OK;
}

ps_status ps_gguf_direct_read(
    const ps_gguf_direct *d, uint32_t i_file, uint64_t offset, void *dst, uint64_t n, ps_err *err)
{
    file *f = &d->files[i_file];
    uint64_t done = 0;
    if (f->fd >= 0 && !atomic_load(&f->refused))
        PS_TRY(read_past_cache(f, offset, dst, n / f->align * f->align, &done, err));
    if (done == n) return PS_OK;
    return ps_gguf_pread(
        d->gguf, i_file, offset + done, (unsigned char *)dst + done, n - done, err);
}
