/* test_quant - the block formats against vectors of the format's own Python implementation, and the
 * 16-bit floats against their definition. NaNs are compared as NaNs: which payload survives is the
 * processor's choice. */
#include "ps_test.h"

#include "format/ps_quant.h"

static const char vectors_path[] = "tests/data/quant_vectors.bin";

typedef struct vector_record {
    uint32_t direction, fmt, n_blocks, block_bytes, block_elems;
} vector_record;

static uint8_t *read_vectors(size_t *n)
{
    FILE *f = fopen(vectors_path, "rb");
    if (f == NULL) return NULL;
    fseek(f, 0, SEEK_END);
    *n = (size_t)ftell(f);
    rewind(f);
    uint8_t *bytes = ps_alloc(*n, 1);
    if (bytes != NULL && fread(bytes, 1, *n, f) != *n) {
        ps_free(bytes);
        bytes = NULL;
    }
    fclose(f);
    return bytes;
}

static bool same_bits(float a, float b)
{
    if (isnan(a) || isnan(b)) return isnan(a) && isnan(b);
    return memcmp(&a, &b, 4) == 0;
}

static void check_dequant(const vector_record *r, const uint8_t *blocks, const uint8_t *want)
{
    const uint64_t n = (uint64_t)r->n_blocks * r->block_elems;
    float *got = ps_alloc(n + 1, sizeof *got);
    PS_REQUIRE(got != NULL);
    got[n] = 123.0f;
    ps_dequant_row((ps_fmt)r->fmt, blocks, got, n);
    for (uint64_t i = 0; i < n; i++) {
        float expected;
        memcpy(&expected, want + 4 * i, 4);
        if (!same_bits(got[i], expected))
            ps_test_fail(__FILE__, __LINE__, "block %u weight %u is %a, expected %a",
                (unsigned)(i / r->block_elems), (unsigned)(i % r->block_elems), (double)got[i],
                (double)expected);
    }
    PS_CHECK(same_bits(got[n], 123.0f)); /* nothing behind the row is touched */
    ps_free(got);
}

static void check_quant(const vector_record *r, const uint8_t *rows, const uint8_t *want)
{
    const uint64_t n = (uint64_t)r->n_blocks * r->block_elems,
                   n_bytes = r->n_blocks * r->block_bytes;
    float *x = ps_alloc(n, sizeof *x);
    uint8_t *got = ps_alloc(n_bytes + 1, 1);
    PS_REQUIRE(x != NULL && got != NULL);
    memcpy(x, rows, n * sizeof *x);
    got[n_bytes] = 77;
    PS_CHECK(ps_quant_row((ps_fmt)r->fmt, x, got, n));
    for (uint64_t i = 0; i < n_bytes; i++)
        if (got[i] != want[i])
            ps_test_fail(__FILE__, __LINE__, "block %u byte %u is %u, expected %u",
                (unsigned)(i / r->block_bytes), (unsigned)(i % r->block_bytes), got[i], want[i]);
    PS_CHECK_EQ(got[n_bytes], 77);
    ps_free(x);
    ps_free(got);
}

PS_TEST(vectors_of_every_block_format)
{
    size_t n = 0, pos = 4;
    uint8_t *bytes = read_vectors(&n);
    PS_REQUIRE(bytes != NULL && n > 4 && memcmp(bytes, "PSQV", 4) == 0);
    int n_dequant = 0, n_quant = 0;
    while (pos < n) {
        vector_record r;
        PS_REQUIRE(n - pos >= sizeof r);
        memcpy(&r, bytes + pos, sizeof r);
        pos += sizeof r;
        const ps_fmt_info *info = ps_fmt_get(r.fmt);
        PS_REQUIRE(info != NULL);
        ps_test_case("%s, direction %u", info->name, r.direction);
        PS_CHECK_EQ(info->block_bytes, r.block_bytes);
        PS_CHECK_EQ(info->block_elems, r.block_elems);
        const size_t n_floats = 4ull * r.n_blocks * r.block_elems;
        const size_t n_blocks = (size_t)r.n_blocks * r.block_bytes;
        PS_REQUIRE(n - pos >= n_floats + n_blocks);
        if (r.direction == 0) {
            check_dequant(&r, bytes + pos, bytes + pos + n_blocks);
            n_dequant++;
        } else {
            check_quant(&r, bytes + pos, bytes + pos + n_floats);
            n_quant++;
        }
        pos += n_floats + n_blocks;
    }
    ps_free(bytes);
    PS_CHECK_EQ(n_dequant, 13); /* all but f32, f16, bf16 */
    PS_CHECK_EQ(n_quant, 5);
}

PS_TEST(mxfp4_is_a_power_of_two_times_e2m1)
{
    static const double values[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    for (int e = 0; e < 256; e++) {
        uint8_t block[17] = {(uint8_t)e};
        for (int i = 0; i < 16; i++) block[1 + i] = (uint8_t)(i | (15 - i) << 4);
        float y[32];
        ps_dequant_row(PS_FMT_MXFP4, block, y, 32);
        for (int i = 0; i < 32; i++) {
            const int q = i < 16 ? i : 15 - (i - 16);
            const double exact = ldexp(values[q & 7], e - 127);
            ps_test_case("exponent %d, value %d", e, q);
            PS_CHECK((double)fabsf(y[i]) == (double)(float)exact);
            PS_CHECK((signbit(y[i]) != 0) == (q > 8)); /* -0 is stored as 0 twice */
        }
    }
}

PS_TEST(every_f16_by_its_definition)
{
    for (uint32_t h = 0; h < 65536; h++) {
        const int exp = (int)(h >> 10 & 31), man = (int)(h & 1023);
        double want = exp == 31  ? (man == 0 ? INFINITY : NAN)
                      : exp == 0 ? ldexp(man, -24)
                                 : ldexp(1024 + man, exp - 25);
        if ((h & 0x8000u) != 0) want = -want;
        ps_test_case("f16 %04x", h);
        const float got = ps_f16_to_f32((uint16_t)h);
        PS_CHECK(same_bits(got, (float)want));
        if (man == 0 || exp != 31) PS_CHECK_EQ(ps_f32_to_f16(got), h);
    }
}

PS_TEST(f32_to_f16_rounds_to_even)
{
    /* Between each two neighbours: just below the middle, the middle, just above. */
    for (uint32_t h = 0; h < 0x7c00; h++) {
        const float a = ps_f16_to_f32((uint16_t)h);
        const float b = h == 0x7bff ? 65536.0f : ps_f16_to_f32((uint16_t)(h + 1));
        const float middle = a + (b - a) / 2; /* exact: floats have 13 bits more */
        ps_test_case("between f16 %04x and the next", h);
        PS_CHECK_EQ(ps_f32_to_f16(nextafterf(middle, 0.0f)), h);
        PS_CHECK_EQ(ps_f32_to_f16(middle), (h & 1) == 0 ? h : h + 1);
        PS_CHECK_EQ(ps_f32_to_f16(nextafterf(middle, 1e9f)), h + 1);
        PS_CHECK_EQ(ps_f32_to_f16(-middle), 0x8000u | ((h & 1) == 0 ? h : h + 1));
    }
    ps_test_case("odd values");
    PS_CHECK_EQ(ps_f32_to_f16(INFINITY), 0x7c00);
    PS_CHECK_EQ(ps_f32_to_f16(-3e38f), 0xfc00);
    PS_CHECK_EQ(ps_f32_to_f16(1e-45f), 0);
    PS_CHECK(isnan(ps_f16_to_f32(ps_f32_to_f16(NAN))));
    /* A NaN whose payload lies wholly in the bits that f16 does not have must not become infinity.
     */
    const uint32_t low_payload = 0x7f800001u;
    float nan_value;
    memcpy(&nan_value, &low_payload, 4);
    PS_CHECK(isnan(ps_f16_to_f32(ps_f32_to_f16(nan_value))));
    PS_CHECK(isnan(ps_bf16_to_f32(ps_f32_to_bf16(nan_value))));
}

PS_TEST(bf16_rounds_to_even)
{
    for (uint32_t h = 0; h < 65536; h++) {
        ps_test_case("bf16 %04x", h);
        const float f = ps_bf16_to_f32((uint16_t)h);
        if (isnan(f)) {
            PS_CHECK(isnan(ps_bf16_to_f32(ps_f32_to_bf16(f))));
            continue;
        }
        PS_CHECK_EQ(ps_f32_to_bf16(f), h);
        if (isinf(f)) continue;
        for (uint32_t low = 0x7fff; low <= 0x8001; low++) {
            const uint32_t bits = h << 16 | low;
            float between;
            memcpy(&between, &bits, 4);
            const bool up = low > 0x8000 || (low == 0x8000 && (h & 1) != 0);
            PS_CHECK_EQ(ps_f32_to_bf16(between), h + up);
        }
    }
}

PS_TEST(quant_takes_any_float)
{
    /* What no file asks for must still be defined: the sanitizers judge, and a zero block stays
     * zero. */
    static const float odd[] = {NAN, INFINITY, -INFINITY, 3e38f, -3e38f, 1e-45f, -0.0f};
    static const ps_fmt fmts[] = {PS_FMT_Q4_0, PS_FMT_Q4_1, PS_FMT_Q5_0, PS_FMT_Q5_1, PS_FMT_Q8_0};
    for (size_t f = 0; f < sizeof fmts / sizeof *fmts; f++) {
        uint8_t block[64];
        float x[32] = {0}, y[32];
        PS_CHECK(ps_quant_row(fmts[f], x, block, 32));
        ps_dequant_row(fmts[f], block, y, 32);
        for (int i = 0; i < 32; i++) PS_CHECK(y[i] == 0.0f);
        for (size_t i = 0; i < sizeof odd / sizeof *odd; i++)
            for (size_t k = 0; k < sizeof odd / sizeof *odd; k++) {
                x[3] = odd[i];
                x[30] = odd[k];
                PS_CHECK(ps_quant_row(fmts[f], x, block, 32));
            }
    }
}

PS_TEST(table_and_row_sizes)
{
    int n_formats = 0;
    for (uint32_t i = 0; i < 1000; i++) {
        const ps_fmt_info *info = ps_fmt_get(i);
        if (info == NULL) continue;
        ps_fmt found = PS_FMT_COUNT;
        n_formats++;
        PS_CHECK(ps_fmt_find(info->name, &found));
        PS_CHECK_EQ(found, i);
    }
    PS_CHECK_EQ(n_formats, 16);
    ps_fmt fmt = PS_FMT_COUNT;
    PS_CHECK(ps_fmt_find("Q4_K", &fmt) && fmt == PS_FMT_Q4_K);
    PS_CHECK(!ps_fmt_find("q4", &fmt) && !ps_fmt_find("q4_k_m", &fmt) && !ps_fmt_find("", &fmt));
    PS_CHECK(ps_fmt_get(UINT32_MAX) == NULL);

    uint64_t n_bytes = 7;
    PS_CHECK(ps_fmt_row_bytes(PS_FMT_Q6_K, 512, &n_bytes));
    PS_CHECK_EQ_U64(n_bytes, 420);
    PS_CHECK(!ps_fmt_row_bytes(PS_FMT_Q6_K, 511, &n_bytes)); /* part of a block */
    PS_CHECK(!ps_fmt_row_bytes(PS_FMT_F32, UINT64_MAX / 2, &n_bytes));
    PS_CHECK(!ps_fmt_row_bytes(4, 256, &n_bytes));
    PS_CHECK_EQ_U64(n_bytes, 420);
    float x[32] = {0};
    uint8_t block[64];
    PS_CHECK(!ps_quant_row(PS_FMT_Q4_K, x, block, 256));
    PS_CHECK(!ps_quant_row(PS_FMT_Q8_0, x, block, 31));
}

PS_TEST_MAIN
