/* ps_cpu - which CPU variants there are, which of them this CPU and operating system run, and the
 * scratch that any of them wants.
 *
 * Not here: kernels, the variants' tables (ps_cpu_variants.c).
 * Threads: pure functions, but that asking about "amx" asks the kernel for the process's permission
 * to use the tiles (idempotent, and valid for threads that exist already).
 */
#include "kernels/ps_cpu_kernels.h"

#include <cpuid.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* ---- what the CPU has and the operating system saves ---- */

static uint32_t bit(uint32_t word, int i)
{
    return word >> i & 1u;
}

/* XCR0: which registers the operating system saves. */
static uint64_t saved_state(void)
{
    uint32_t a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid(1, &a, &b, &c, &d) == 0 || !bit(c, 27)) return 0; /* OSXSAVE */
    uint32_t low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low | (uint64_t)high << 32;
}

static bool supported_always(void)
{
    return true;
}

static bool supported_avx2(void)
{
    uint32_t a = 0, b = 0, c1 = 0, d = 0, b7 = 0, c7 = 0;
    if ((saved_state() & 0x6) != 0x6) return false; /* SSE and AVX registers */
    if (__get_cpuid(1, &a, &b, &c1, &d) == 0) return false;
    if (__get_cpuid_count(7, 0, &a, &b7, &c7, &d) == 0) return false;
    return bit(c1, 12) && bit(c1, 29) && bit(b7, 5) && bit(b7, 8); /* FMA, F16C, AVX2, BMI2 */
}

static bool supported_avx512(void)
{
    uint32_t a = 0, b = 0, c = 0, d = 0;
    if (!supported_avx2() || (saved_state() & 0xe6) != 0xe6) return false; /* masks, upper halves */
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
    /* F, DQ, BW, VL; VNNI */
    return bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31) && bit(c, 11);
}

static bool supported_amx(void)
{
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    uint32_t a = 0, b = 0, c = 0, d = 0, a1 = 0;
    if (!supported_avx512() || (saved_state() & 0x60000) != 0x60000) return false; /* tiles */
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
    if (!bit(d, 22) || !bit(d, 24)) return false; /* AMX-BF16, AMX-TILE */
    if (__get_cpuid_count(7, 1, &a1, &b, &c, &d) == 0 || !bit(a1, 5))
        return false; /* AVX512-BF16 */
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

/* ---- the registry ---- */

typedef struct variant {
    const ps_op_table *(*table)(void); /* NULL where the compiler could not build it */
    bool (*supported)(void);
} variant;

static const variant variants[] = {
    {ps_cpu_ref_table, supported_always},
    {ps_cpu_avx2_table, supported_avx2},
    {ps_cpu_avx512_table, supported_avx512},
    {ps_cpu_amx_table, supported_amx},
};
enum { N_VARIANTS = sizeof variants / sizeof *variants };

const ps_op_table *ps_cpu_ops_at(uint32_t i, bool *supported)
{
    for (uint32_t v = 0, built = 0; v < N_VARIANTS; v++) {
        const ps_op_table *table = variants[v].table();
        if (table == NULL || built++ < i) continue;
        *supported = variants[v].supported();
        return table;
    }
    return NULL;
}

const ps_op_table *ps_cpu_ops(const char *name)
{
    for (uint32_t i = N_VARIANTS; i-- > 0;) {
        const ps_op_table *table = variants[i].table();
        if (table == NULL || (name != NULL && strcmp(name, table->name) != 0)) continue;
        if (variants[i].supported()) return table;
    }
    return NULL;
}

/* ---- scratch ---- */

uint64_t ps_cpu_scratch_bytes(const ps_cpu_bounds *b)
{
    const uint64_t threads = b->threads > 0 ? b->threads : 1;
    const uint64_t cols = ((uint64_t)b->max_cols + 255) / 256 * 256;
    /* Reference: two dequantised rows a thread; scores and two head rows in double a thread; a byte
     * an expert and thread. */
    const uint64_t ref_rows = threads * 2 * cols * sizeof(float);
    const uint64_t ref_attn =
        threads * ((uint64_t)b->max_ctx + 2 * b->max_head_dim) * sizeof(double);
    const uint64_t route = threads << 16;
    /* Products: packed inputs of one block, at most 4 bytes each (floats, or two halves), and
     * whatever a thread's kernels and the experts' gate and up want beside. */
    const uint64_t packed = (PS_GEMM_BLOCK_TOK + PS_GEMM_GROUP) * cols * 4;
    const uint64_t products = packed + threads * (2ull << 20);
    /* Attention of few tokens: partial results of pieces (ps_cpu_attn.h). */
    const uint64_t dim = ((uint64_t)b->max_head_dim + 15) / 16 * 16;
    const uint64_t pieces =
        PS_CPU_GEMV_MAX_TOK * ((uint64_t)b->max_ctx / PS_CPU_ATTN_CHUNK + 2) * b->n_head;
    const uint64_t attn = pieces * (dim + 2) * sizeof(float) + threads * 512 * dim * sizeof(float);
    const uint64_t ref = ps_max_u64(ps_max_u64(ref_rows, ref_attn), route);
    const uint64_t most = ps_max_u64(ref, ps_max_u64(products, attn));
    return most + 4096;
}
