/* fuzz_main - a driver for fuzz targets where there is no libFuzzer: runs the target on every file
 * of a folder, and on mutations of them that follow from a fixed seed, so that a run can be
 * repeated.
 *
 *     fuzz_NAME CORPUS_FOLDER MUTATIONS_A_FILE CRASH_FILE
 *
 * The input in hand stands in CRASH_FILE while the target runs, so that one which ends the process
 * is left there. Threads: one.
 */
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/ps_base.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

enum { MAX_INPUT_BYTES = 1 << 20 };

typedef struct run {
    int crash_fd;
    uint8_t *input; /* mapping of the crash file: it outlives the process */
    long n_mutations, n_runs;
} run;

static bool run_begin(run *r, const char *crash_path, long n_mutations)
{
    *r = (run){
        .crash_fd = open(crash_path, O_RDWR | O_CREAT | O_TRUNC, 0644), .n_mutations = n_mutations};
    if (r->crash_fd < 0) return false;
    void *p = mmap(NULL, MAX_INPUT_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, r->crash_fd, 0);
    if (p == MAP_FAILED) return false;
    r->input = p;
    return true;
}

/* The target gets a copy of exactly n bytes, so that AddressSanitizer sees a read behind the end.
 */
static void run_one(run *r, size_t n)
{
    uint8_t *copy = malloc(n > 0 ? n : 1);
    if (copy == NULL || ftruncate(r->crash_fd, (off_t)n) != 0) abort();
    memcpy(copy, r->input, n);
    LLVMFuzzerTestOneInput(copy, n);
    free(copy);
    r->n_runs++;
}

/* A few random edits: bytes, 32- and 64-bit extremes where a length or an offset may stand, a cut
 * end. */
static size_t mutate(uint8_t *data, size_t n, uint64_t *rng)
{
    static const uint64_t extremes[] = {
        0, 1, 0x7fffffff, 0xffffffff, UINT64_MAX, (uint64_t)1 << 63, UINT64_MAX - 31};
    for (uint64_t left = 1 + ps_rng_next(rng) % 4; left > 0 && n > 0; left--) {
        size_t at = (size_t)(ps_rng_next(rng) % n);
        uint64_t value = extremes[ps_rng_next(rng) % (sizeof extremes / sizeof *extremes)];
        size_t width = (size_t)1 << (ps_rng_next(rng) % 4);
        switch (ps_rng_next(rng) % 8) {
        case 0: n = at; break;
        case 1: data[at] = (uint8_t)ps_rng_next(rng); break;
        case 2: data[at] ^= (uint8_t)(1u << (ps_rng_next(rng) % 8)); break;
        default: memcpy(data + at, &value, width < n - at ? width : n - at); break;
        }
    }
    return n;
}

static bool run_file(run *r, const char *folder, const char *name)
{
    static uint8_t original[MAX_INPUT_BYTES];
    char path[4096];
    struct stat status;
    snprintf(path, sizeof path, "%s/%s", folder, name);
    if (stat(path, &status) != 0 || !S_ISREG(status.st_mode)) return false;
    FILE *f = fopen(path, "rb");
    if (f == NULL) return false;
    size_t n = fread(original, 1, MAX_INPUT_BYTES, f);
    fclose(f);
    printf("%s\n", path);
    fflush(stdout);
    uint64_t rng = ps_hash64(name, strlen(name));
    for (long i = 0; i <= r->n_mutations; i++) {
        if (ftruncate(r->crash_fd, MAX_INPUT_BYTES) != 0) abort();
        memcpy(r->input, original, n);
        run_one(r, i == 0 ? n : mutate(r->input, n, &rng));
    }
    return true;
}

int main(int n_args, char **args)
{
    run r;
    if (n_args != 4 || !run_begin(&r, args[3], atol(args[2]))) {
        perror(
            n_args == 4 ? args[3] : "usage: fuzz_NAME CORPUS_FOLDER MUTATIONS_A_FILE CRASH_FILE");
        return 2;
    }
    long n_files = 0;
    DIR *folder = opendir(args[1]);
    for (const struct dirent *entry; folder != NULL && (entry = readdir(folder)) != NULL;)
        n_files += run_file(&r, args[1], entry->d_name);
    if (folder != NULL) closedir(folder);
    unlink(args[3]);
    printf("%ld files, %ld runs\n", n_files, r.n_runs);
    return n_files == 0; /* an empty corpus proves nothing */
}
