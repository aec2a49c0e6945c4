/* test_workspace - the sizes that plans rely on: none for decode, enough for what the prefill
 * launchers put there, never less for more tokens, and no wrapping of large products.
 */
#include "ps_test.h"

#include "kernels/ps_cuda_paths.h"

static ps_matmul_args matmul(uint32_t fmt, uint32_t n_tok, uint32_t n_cols, uint32_t n_rows)
{
    ps_matmul_args a = {.n_tok = n_tok, .n_cols = n_cols, .ldx = n_cols, .n_parts = 1};
    a.part[0] = (ps_matmul_part){.fmt = fmt, .n_rows = n_rows, .ldy = n_rows};
    return a;
}

static uint64_t matmul_bytes(uint32_t fmt, uint32_t n_tok, uint32_t n_cols, uint32_t n_rows, int sm)
{
    const ps_matmul_args a = matmul(fmt, n_tok, n_cols, n_rows);
    return ps_op_workspace_bytes(PS_OP_MATMUL, &a, sm);
}

static const int sms[] = {75, 80, 86, 89, 90, 100, 120};
enum { N_SMS = sizeof sms / sizeof *sms };

PS_TEST(decode_needs_none)
{
    for (int s = 0; s < N_SMS; s++)
        for (uint32_t n_tok = 1; n_tok <= PS_CUDA_DECODE_TOK; n_tok++) {
            ps_test_case("sm_%d, %u tokens", sms[s], n_tok);
            PS_CHECK_EQ_U64(matmul_bytes(PS_FMT_Q4_0, n_tok, 4096, 4096, sms[s]), 0);
            PS_CHECK_EQ_U64(matmul_bytes(PS_FMT_F16, n_tok, 28672, 8192, sms[s]), 0);
            const ps_moe_up_args up = {
                .n_tok = n_tok, .k = 8, .n_expert = 128, .n_cols = 2048, .n_ff = 768};
            PS_CHECK_EQ_U64(ps_op_workspace_bytes(PS_OP_MOE_UP, &up, sms[s]), 0);
        }
}

/* What does not fit into shared memory takes the other path, with its workspace. */
PS_TEST(inputs_too_wide_for_decode)
{
    PS_CHECK_EQ(ps_cuda_matvec_tok(PS_FMT_Q4_0, 4096, 8, 90), 8);
    PS_CHECK_EQ(ps_cuda_matvec_tok(PS_FMT_Q8_0, 28672, 8, 90), 4);
    PS_CHECK_EQ(ps_cuda_matvec_tok(PS_FMT_Q8_0, 28672, 8, 86), 1);
    PS_CHECK_EQ(ps_cuda_matvec_tok(PS_FMT_Q8_0, 28672, 1, 75), 0);
    PS_CHECK(matmul_bytes(PS_FMT_Q8_0, 1, 28672, 64, 75) > 28672 * 2);
    PS_CHECK_EQ_U64(matmul_bytes(PS_FMT_F32, 1, 1 << 24, 64, 75), 0);
}

PS_TEST(prefill_holds_its_inputs)
{
    for (int s = 0; s < N_SMS; s++)
        for (uint32_t fmt = 0; fmt < PS_FMT_COUNT; fmt++) {
            if (ps_fmt_get(fmt) == NULL || fmt == PS_FMT_F32) continue;
            ps_test_case("sm_%d, %s", sms[s], ps_fmt_get(fmt)->name);
            uint64_t last = 0;
            for (uint32_t n_tok = 9; n_tok <= 4096; n_tok = n_tok * 3 / 2) {
                const uint64_t n_bytes = matmul_bytes(fmt, n_tok, 2816, 777, sms[s]);
                PS_CHECK(n_bytes >= (uint64_t)n_tok * (2816 * 2 + 4) && n_bytes >= last);
                last = n_bytes;
            }
            const ps_moe_down_args down = {
                .n_tok = 512, .k = 8, .n_expert = 128, .n_ff = 768, .n_rows = 2048, .fmt = fmt};
            const uint64_t n_bytes = ps_op_workspace_bytes(PS_OP_MOE_DOWN, &down, sms[s]);
            PS_CHECK(sms[s] < 80 ? n_bytes == 0 : n_bytes >= 512ull * 8 * (768 * 2 + 4));
        }
}

/* Rows are dequantised in strips, so a head of 150,000 rows costs no more than a strip. */
PS_TEST(dequantised_rows_are_bounded)
{
    const ps_matmul_args a = matmul(PS_FMT_Q4_K, 1024, 4096, 151936);
    const ps_cuda_layout l = ps_cuda_matmul_layout(&a, 90);
    PS_CHECK_EQ_U64(l.dequant_rows, PS_CUDA_DEQUANT_BYTES / (4096 * 2));
    PS_CHECK(l.dequant >= l.scale + 1024 * 4 && l.scale >= 1024ull * 4096 * 2);
    PS_CHECK_EQ_U64(l.total, l.dequant + PS_CUDA_DEQUANT_BYTES + PS_CUDA_LIB_BYTES);
    PS_CHECK(l.lib % 256 == 0 && l.total >= l.lib + PS_CUDA_LIB_BYTES);
    const ps_matmul_args small = matmul(PS_FMT_Q4_K, 1024, 4096, 100);
    PS_CHECK_EQ_U64(ps_cuda_matmul_layout(&small, 90).dequant_rows, 100);
}

PS_TEST(experts_of_two_formats)
{
    ps_moe_up_args up = {.n_tok = 3, .k = 2, .n_expert = 8, .n_cols = 256, .n_ff = 100};
    up.fmt_gate = PS_FMT_Q4_0, up.fmt_up = PS_FMT_Q8_0;
    PS_CHECK(ps_op_workspace_bytes(PS_OP_MOE_UP, &up, 90) >= 2 * 3 * 2 * 100 * 4);
    up.n_tok = 40;
    const ps_cuda_moe_up_layout l = ps_cuda_moe_up_plan(&up, 90);
    PS_CHECK(l.gate >= 40 * 256 * 2 + 40 * 4 && l.up >= l.gate + 40 * 2 * 100 * 4);
    PS_CHECK(l.total >= l.up + 40 * 2 * 100 * 4);
}

PS_TEST(attention_shares)
{
    ps_attn_args a = {.n_tok = 1, .n_head = 32, .max_kv = 4096};
    a.kv = (ps_kv_view){.n_kv_head = 4, .head_dim = 128, .n_seq = 1};
    PS_CHECK_EQ(ps_cuda_attn_splits(&a), 32);
    PS_CHECK(ps_op_workspace_bytes(PS_OP_ATTN, &a, 90) >= 32ull * 32 * (128 + 2) * 4);
    a.n_tok = 8; /* the same shares, so a token's bits do not depend on its neighbours */
    PS_CHECK_EQ(ps_cuda_attn_splits(&a), 32);
    a.window = 128;
    PS_CHECK_EQ(ps_cuda_attn_splits(&a), 1);
    PS_CHECK_EQ_U64(ps_op_workspace_bytes(PS_OP_ATTN, &a, 90), 0);
    a.window = 0, a.n_tok = 512;
    PS_CHECK_EQ_U64(ps_op_workspace_bytes(PS_OP_ATTN, &a, 90), 0);
    a.n_tok = 1, a.kv.n_kv_head = 1, a.n_head = 71;
    PS_CHECK(ps_cuda_attn_splits(&a) >= 1);
}

PS_TEST(large_products_do_not_wrap)
{
    const uint64_t n_bytes = matmul_bytes(PS_FMT_F16, 1 << 20, 1 << 14, 64, 90);
    PS_CHECK(n_bytes >= (1ull << 34) * 2);
    const ps_moe_down_args down = {
        .n_tok = 1 << 20, .k = 8, .n_expert = 128, .n_ff = 4096, .n_rows = 64, .fmt = PS_FMT_Q4_0};
    PS_CHECK(ps_op_workspace_bytes(PS_OP_MOE_DOWN, &down, 90) >= (8ull << 20) * 4096 * 2);
}

PS_TEST(other_ops_need_none)
{
    const ps_op_args zero = {0};
    for (int kind = 0; kind < PS_OP_COUNT; kind++) {
        if (kind == PS_OP_MATMUL || kind == PS_OP_ATTN || kind == PS_OP_MOE_UP ||
            kind == PS_OP_MOE_DOWN)
            continue;
        PS_CHECK_EQ_U64(ps_op_workspace_bytes((ps_op_kind)kind, &zero, 90), 0);
    }
}

PS_TEST_MAIN
