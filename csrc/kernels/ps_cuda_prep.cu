/* ps_cuda_prep - between the q, k, v products and attention: head norms, rope, and the store into
 * the paged cache.
 *
 * Not here: attention.
 * Threads: the launcher on the engine's thread.
 *
 * A warp takes one head of one token: q heads, then k heads, then v heads. Reads and writes each
 * value once; bound by launch latency in decode.
 */
#include "kernels/ps_cuda.cuh"
#include "kernels/ps_cuda_ops.h"

enum { PREP_WARPS = 4, PREP_MAX_DIM = 512 };

/* Sine and cosine of pos * freq as if the product were exact: its rounding error turns the angle by
 * `rest`, which would matter from a few thousand positions on. */
PS_DEVICE void exact_sincos(float pos, float freq, float *s, float *c)
{
    const float angle = __fmul_rn(pos, freq), rest = fmaf(pos, freq, -angle);
    float s0, c0;
    sincosf(angle, &s0, &c0);
    *s = fmaf(c0, rest, s0);
    *c = fmaf(-s0, rest, c0);
}

PS_DEVICE float rope_position(const ps_qkv_prep_args &a, uint64_t t, uint32_t i)
{
    if (a.rope != PS_ROPE_MROPE) return (float)((const int32_t *)a.pos.a)[t];
    uint32_t section = 0, first = 0;
    while (section < 3 && i >= first + a.sections[section]) first += a.sections[section++];
    return (float)((const int32_t *)a.rope_pos.a)[(uint64_t)section * a.n_tok + t];
}

/* head: head_dim floats in shared memory, this warp's own. */
PS_DEVICE void norm_head(float *head, const float *w, uint32_t n, float eps, uint32_t lane)
{
    float square = 0.0f;
    for (uint32_t i = lane; i < n; i += 32) square += head[i] * head[i];
    const float scale = 1.0f / sqrtf(ps_warp_sum(square) / (float)n + eps);
    for (uint32_t i = lane; i < n; i += 32) head[i] = head[i] * scale * w[i];
    __syncwarp();
}

PS_DEVICE void rope_head(const ps_qkv_prep_args &a, float *head, uint64_t t, uint32_t lane)
{
    const uint32_t half = a.n_rot / 2;
    const bool neox = a.rope != PS_ROPE_INTERLEAVED;
    for (uint32_t i = lane; i < half; i += 32) {
        float s, c;
        exact_sincos(rope_position(a, t, i), ((const float *)a.freq.a)[i], &s, &c);
        s *= a.mag, c *= a.mag;
        float *p = neox ? head + i : head + 2 * i, *q = neox ? head + half + i : head + 2 * i + 1;
        const float x = *p, y = *q;
        *p = x * c - y * s;
        *q = x * s + y * c;
    }
    __syncwarp();
}

/* One cache row; Q8_0 as ps_quant_row makes it, a block of 32 values across the lanes. */
PS_DEVICE void store_row(const ps_kv_view &kv, uint8_t *row, const float *head, uint32_t lane)
{
    if (kv.fmt == PS_FMT_F16) {
        for (uint32_t i = lane; i < kv.head_dim; i += 32) ((uint16_t *)row)[i] = ps_to_f16(head[i]);
        return;
    }
    for (uint32_t b = 0; b < kv.head_dim / 32; b++, row += 34) {
        const float v = head[b * 32 + lane], d = ps_warp_max(fabsf(v)) / 127.0f;
        const float scaled = v * (d != 0.0f ? 1.0f / d : 0.0f);
        if (lane == 0) *(uint16_t *)row = ps_to_f16(d);
        row[2 + lane] = (uint8_t)(int8_t)fminf(fmaxf(roundf(scaled), -127.0f), 127.0f);
    }
}

PS_DEVICE void store_head(const ps_qkv_prep_args &a, ps_dptr side, uint64_t t, uint32_t h,
    const float *head, uint32_t lane)
{
    const ps_kv_view &kv = a.kv;
    if (side.a == 0) return;
    const uint32_t pos = (uint32_t)((const int32_t *)a.pos.a)[t];
    const uint64_t seq = (uint64_t)((const int32_t *)a.seq.a)[t];
    const int32_t page = ((const int32_t *)kv.table.a)[seq * kv.max_pages + pos / kv.page_tok];
    if (page < 0) return; /* on the other side */
    const uint64_t row = ((uint64_t)page * kv.n_kv_head + h) * kv.page_tok + pos % kv.page_tok;
    const uint64_t row_bytes = kv.fmt == PS_FMT_F16 ? kv.head_dim * 2ull : kv.head_dim / 32 * 34ull;
    store_row(kv, (uint8_t *)side.a + row * row_bytes, head, lane);
}

static __global__ void __launch_bounds__(PREP_WARPS * 32)
    k_qkv_prep(const __grid_constant__ ps_qkv_prep_args a)
{
    __shared__ float heads[PREP_WARPS][PREP_MAX_DIM];
    ps_dep_wait();
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, d = a.kv.head_dim;
    const uint32_t n_q = a.q.a != 0 ? a.n_head : 0, n_kv = a.kv.n_kv_head, per_tok = n_q + 2 * n_kv;
    const uint64_t i = (uint64_t)blockIdx.x * PREP_WARPS + warp, t = i / per_tok;
    const uint32_t h = (uint32_t)(i % per_tok);
    if (t >= a.n_tok) return;
    const bool is_q = h < n_q, is_v = h >= n_q + n_kv;
    const uint32_t kv_h = is_v ? h - n_q - n_kv : h - n_q;
    if (is_v && a.kv.v.a == 0) return;
    float *head = heads[warp];
    float *row = is_q   ? (float *)a.q.a + t * a.ldq + (uint64_t)h * d
                 : is_v ? (float *)a.v.a + t * a.ldv + (uint64_t)kv_h * d
                        : (float *)a.k.a + t * a.ldk + (uint64_t)kv_h * d;
    for (uint32_t c = lane; c < d; c += 32) head[c] = row[c];
    __syncwarp();
    if (!is_v) {
        const float *w = is_q ? (const float *)a.q_norm.a : (const float *)a.k_norm.a;
        if (w != NULL) norm_head(head, w, d, a.eps, lane);
        if (a.rope != PS_ROPE_NONE) rope_head(a, head, t, lane);
        for (uint32_t c = lane; c < d; c += 32) row[c] = head[c];
    }
    if (!is_q) store_head(a, is_v ? a.kv.v : a.kv.k, t, kv_h, head, lane);
}

ps_status ps_cuda_qkv_prep(const ps_launch *launch, const void *args)
{
    ps_qkv_prep_args a = *(const ps_qkv_prep_args *)args;
    const ps_status status = ps_op_check(PS_OP_QKV_PREP, &a, NULL);
    if (status != PS_OK) return status;
    const uint64_t per_tok = (ps_dptr_is_null(a.q) ? 0 : a.n_head) + 2ull * a.kv.n_kv_head;
    const dim3 grid(ps_div_up(a.n_tok * per_tok, PREP_WARPS));
    return ps_cuda_launch(launch, (const void *)k_qkv_prep, grid, PREP_WARPS * 32, 0, &a);
}
