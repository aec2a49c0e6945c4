/* ps_cpu_attn - attention over the paged cache, written once over ps_cpu_vec.h and compiled by
 * ps_cpu_avx2_attn.c and ps_cpu_avx512_attn.c. Two ways, chosen by the number of tokens alone:
 * - few tokens (PS_CPU_GEMV_MAX_TOK): each thread takes whole pieces of PS_CPU_ATTN_CHUNK keys of
 * one token and KV head, with all query heads that share it, so that the cache is read and widened
 * once and long contexts keep every thread busy; the pieces' partial softmaxes are merged in order
 * of position.
 * - many: tiles of queries of one sequence against blocks of BLOCK keys, as matrix products.
 * Softmax runs online: keys come in blocks at fixed positions, sums are rescaled when the maximum
 * grows. A row's result depends on its own keys only: blocks that it does not see add exact zeros.
 *
 * Not here: the cache's layout beyond reading rows of it.
 * Threads: pieces, or tiles in turn, are shared out by index.
 */
#include "kernels/ps_cpu_kernels.h"
#include "kernels/ps_cpu_vec.h"

#include <math.h>
#include <string.h>

enum {
    BLOCK = 64,      /* keys of a block */
    ROWS = 16,       /* of them, those that a piece has as floats at a time: they stay in L1 */
    TILE_ROWS = 64,  /* queries of a tile: tokens times heads of one KV head */
    GROUP_ROWS = 16, /* query heads of a piece */
};

typedef struct job {
    const ps_launch *launch;
    const ps_attn_args *a;
    const float *q, *sinks;
    const int32_t *pos, *seq, *table;
    const char *k, *v;
    float *out, *ml;
    uint64_t row_bytes;
    uint32_t group; /* query heads of a KV head */
    uint32_t dp;    /* head_dim rounded up to whole vectors */
    float *parts;   /* few: partial results, shared */
    float *work;    /* [n_threads][work_floats] */
    uint64_t work_floats;
} job;

/* ---- reading the cache ---- */

/* Byte offset of the row of position p, or -1 where its page is on the other side. */
static int64_t row_at(const job *j, int32_t seq, uint32_t h, uint64_t p)
{
    const ps_kv_view *kv = &j->a->kv;
    const int32_t page = j->table[(uint64_t)seq * kv->max_pages + p / kv->page_tok];
    if (page < 0) return -1;
    const uint64_t row = ((uint64_t)page * kv->n_kv_head + h) * kv->page_tok + p % kv->page_tok;
    return (int64_t)(row * j->row_bytes);
}

/* The last n of a row's elements as a vector, zeros behind them. */
static void read_edge(const char *row, uint32_t n, float *out)
{
    uint16_t edge[VF_N] = {0};
    memcpy(edge, row, n * sizeof *edge);
    vf_store(out, vf_load_f16(edge));
}

/* n floats (a multiple of VF_N) of a cache row of head_dim elements, zeros behind them. */
static inline __attribute__((always_inline)) void read_row(
    const job *j, const char *row, float *out)
{
    const uint32_t d = j->a->kv.head_dim;
    if (j->a->kv.fmt == PS_FMT_F16) {
        uint32_t i = 0;
        for (; i + VF_N <= d; i += VF_N) vf_store(out + i, vf_load_f16(row + 2 * i));
        if (i < d) read_edge(row + 2 * i, d - i, out + i);
        return;
    }
    for (uint32_t b = 0; b < d / 32; b++) { /* Q8_0: a scale and 32 bytes */
        uint16_t h;
        memcpy(&h, row + 34 * (uint64_t)b, 2);
        const vf scale = vf_set(_cvtsh_ss(h));
        for (uint32_t i = 0; i < 32; i += VF_N)
            vf_store(out + 32 * b + i, vf_mul(scale, vf_load_i8(row + 34 * (uint64_t)b + 2 + i)));
    }
}

static uint64_t first_key(const job *j, uint64_t pos)
{
    const uint64_t window = j->a->window;
    return window > 0 && pos >= window ? pos - window + 1 : 0;
}

/* ---- softmax ---- */

/* One row of n (a multiple of VF_N) raw products becomes weights e^(s - *max); returns what sums so
 * far must be multiplied with. Masked entries are -inf already. */
static float soften(const job *j, float *s, uint32_t n, float *max, float *sum)
{
    const vf scale = vf_set(j->a->scale);
    vf top = vf_set(-INFINITY);
    for (uint32_t i = 0; i < n; i += VF_N) {
        vf v = vf_mul(vf_load(s + i), scale);
        if (j->a->softcap > 0) {
            const vf cap = vf_set(j->a->softcap);
            const vf capped = vf_mul(cap, vf_tanh(vf_div(v, cap)));
            v = vf_less(vf_set(-INFINITY), v, capped, v); /* what is masked stays so */
        }
        vf_store(s + i, v);
        top = vf_max(top, v);
    }
    const float new_max = fmaxf(*max, vf_max_of(top));
    if (new_max == -INFINITY) { /* nothing seen yet */
        memset(s, 0, n * sizeof *s);
        return 1.0f;
    }
    vf total = vf_zero();
    for (uint32_t i = 0; i < n; i += VF_N) {
        const vf e = vf_exp(vf_sub(vf_load(s + i), vf_set(new_max)));
        vf_store(s + i, e);
        total = vf_add(total, e);
    }
    float shrink[VF_N];
    vf_store(shrink, vf_exp(vf_set(*max - new_max))); /* 0 where *max is -inf */
    *sum = *sum * shrink[0] + vf_sum(total);
    *max = new_max;
    return shrink[0];
}

/* out[4][n vectors from column c] = out * shrink + s[4][BLOCK] . values[n_keys][...] */
static inline __attribute__((always_inline)) void weigh_values(const float *s, const float *shrink,
    const float *values, uint32_t n_keys, uint32_t dp, int n, float *out)
{
    vf acc[4][4];
    for (int r = 0; r < 4; r++)
        for (int i = 0; i < n; i++)
            acc[r][i] = vf_mul(vf_load(out + (uint32_t)r * dp + i * VF_N), vf_set(shrink[r]));
    for (uint32_t k = 0; k < n_keys; k++) {
        vf v[4];
        for (int i = 0; i < n; i++) v[i] = vf_load(values + k * dp + i * VF_N);
        for (int r = 0; r < 4; r++) {
            const vf x = vf_set(s[(uint32_t)r * BLOCK + k]);
            for (int i = 0; i < n; i++) acc[r][i] = vf_fma(x, v[i], acc[r][i]);
        }
    }
    for (int r = 0; r < 4; r++)
        for (int i = 0; i < n; i++) vf_store(out + (uint32_t)r * dp + i * VF_N, acc[r][i]);
}

/* out = acc / sum, and the row's (maximum, sum); the sink joins here. */
static void finish_row(
    const job *j, uint64_t t, uint32_t head, const float *acc, float max, float sum)
{
    const ps_attn_args *a = j->a;
    float *out = j->out + t * a->ldo + (uint64_t)head * a->kv.head_dim;
    float scale = 1.0f;
    if (j->sinks != NULL) {
        const float new_max = fmaxf(max, j->sinks[head]);
        float e[VF_N];
        vf_store(e, vf_exp(vf_set(max - new_max)));
        scale = e[0];
        vf_store(e, vf_exp(vf_set(j->sinks[head] - new_max)));
        sum = sum * scale + e[0];
        max = new_max;
    }
    scale = sum > 0 ? scale / sum : 0.0f;
    for (uint32_t i = 0; i < a->kv.head_dim; i++) out[i] = acc[i] * scale;
    if (j->ml == NULL) return;
    j->ml[(t * a->n_head + head) * 2] = max;
    j->ml[(t * a->n_head + head) * 2 + 1] = sum;
}

/* ---- few tokens: pieces ---- */

/* Products of 4 queries with VF_N / 4 keys: s[4][BLOCK]. */
static void dots(const float *q, const float *k, uint32_t dp, float *s)
{
    enum { KEYS = VF_N / 4 };
    vf acc[VF_N];
    float sums[VF_N];
    for (int i = 0; i < VF_N; i++) acc[i] = vf_zero();
    for (uint32_t i = 0; i < dp; i += VF_N) {
        vf x[4];
        for (uint32_t h = 0; h < 4; h++) x[h] = vf_load(q + h * dp + i);
        for (uint32_t r = 0; r < KEYS; r++) {
            const vf y = vf_load(k + r * dp + i);
            for (uint32_t h = 0; h < 4; h++) acc[h * KEYS + r] = vf_fma(x[h], y, acc[h * KEYS + r]);
        }
    }
    vf_store(sums, vf_sums(acc));
    for (uint32_t h = 0; h < 4; h++) memcpy(s + h * BLOCK, sums + h * KEYS, KEYS * sizeof *s);
}

/* Which piece: token, KV head, query heads [head, head + n), keys [from, to). */
typedef struct piece {
    uint64_t t, from, to;
    uint32_t kv_head, head, n;
} piece;

/* Where the rows of a block of keys are, -1 for those beyond the piece and on the other side;
 * whether any is here. */
static bool find_rows(const job *j, const piece *p, uint64_t b, int64_t at[BLOCK])
{
    const uint64_t page_tok = j->a->kv.page_tok;
    bool any = false;
    for (uint64_t r = 0, n; r < BLOCK; r += n) { /* page by page */
        n = ps_min_u64(page_tok - (b + r) % page_tok, BLOCK - r);
        const bool inside = b + r < p->to && b + r + n > p->from;
        const int64_t first = inside ? row_at(j, j->seq[p->t], p->kv_head, b + r) : -1;
        for (uint64_t i = 0; i < n; i++) {
            const bool seen = first >= 0 && b + r + i >= p->from && b + r + i < p->to;
            at[r + i] = seen ? first + (int64_t)(i * j->row_bytes) : -1;
            any |= seen;
        }
    }
    return any;
}

/* ROWS rows of the cache as floats, zeros for those that are not here; false if none is. */
static bool read_rows(const job *j, const char *cache, const int64_t *at, float *out)
{
    bool any = false;
    for (uint32_t r = 0; r < ROWS; r++) any |= at[r] >= 0;
    for (uint32_t r = 0; r < ROWS && any; r++) {
        if (at[r] >= 0)
            read_row(j, cache + at[r], out + r * j->dp);
        else
            memset(out + r * j->dp, 0, j->dp * sizeof *out);
    }
    return any;
}

/* Asks for rows that are wanted half a block later: rows of a head are together for a page only,
 * too short for a prefetcher to find its pace. */
static void expect_rows(const job *j, const char *cache, const int64_t *at, uint32_t n)
{
    for (uint32_t r = 0; r < n; r++)
        for (uint64_t i = 0; at[r] >= 0 && i < j->row_bytes; i += 64)
            __builtin_prefetch(cache + at[r] + i, 0, 2);
}

/* What a thread has of the piece in hand: heads in fours, the last of them zeros. */
typedef struct group {
    float *rows, *q, *acc, *s; /* [ROWS][dp], [heads][dp] twice, [heads][BLOCK] */
    float max[GROUP_ROWS], sum[GROUP_ROWS], shrink[GROUP_ROWS];
} group;

enum { GROUP_FLOATS = ROWS + 2 * GROUP_ROWS }; /* times dp, and GROUP_ROWS * BLOCK */

static void open_group(const job *j, const piece *p, group *g, float *work)
{
    const uint32_t dp = j->dp, d = j->a->kv.head_dim, n = (p->n + 3) / 4 * 4;
    g->rows = work;
    g->q = g->rows + ROWS * dp;
    g->acc = g->q + GROUP_ROWS * dp;
    g->s = g->acc + GROUP_ROWS * dp;
    memset(g->q, 0, n * dp * sizeof *g->q);
    memset(g->acc, 0, n * dp * sizeof *g->acc);
    for (uint32_t h = 0; h < p->n; h++) {
        const float *q = j->q + p->t * j->a->ldq + (uint64_t)(p->head + h) * d;
        memcpy(g->q + h * dp, q, d * sizeof *q);
    }
    for (uint32_t h = 0; h < n; h++) {
        g->max[h] = -INFINITY;
        g->sum[h] = g->shrink[h] = 0;
    }
}

/* Weights of a block of keys, and how far what was summed before them shrinks. Values come next. */
static void weigh_keys(const job *j, const piece *p, group *g, const int64_t *at)
{
    const uint32_t dp = j->dp;
    for (uint32_t k = 0; k < BLOCK; k += ROWS) {
        if (!read_rows(j, j->k, at + k, g->rows)) continue; /* masked below */
        for (uint32_t r = 0; r < ROWS; r += VF_N / 4) {
            expect_rows(j, j->v, at + k + r, VF_N / 4);
            for (uint32_t h = 0; h < p->n; h += 4)
                dots(g->q + h * dp, g->rows + r * dp, dp, g->s + h * BLOCK + k + r);
        }
    }
    for (uint32_t h = 0; h < p->n; h++) {
        float *s = g->s + h * BLOCK;
        for (uint32_t k = 0; k < BLOCK; k++)
            if (at[k] < 0) s[k] = -INFINITY;
        g->shrink[h] = soften(j, s, BLOCK, &g->max[h], &g->sum[h]);
    }
}

/* next: of the block behind, NULL: there is none. */
static void add_values(
    const job *j, const piece *p, group *g, const int64_t *at, const int64_t *next)
{
    enum { COLS = VF_N / 4 }; /* vectors at a time: so many sums of 4 heads stay in registers */
    const uint32_t dp = j->dp;
    for (uint32_t k = 0; k < BLOCK; k += ROWS) {
        if (!read_rows(j, j->v, at + k, g->rows)) continue;
        uint32_t r = k, r_step = 4 * ROWS / ((p->n + 3) / 4 * 4);
        for (uint32_t h = 0; h < p->n; h += 4, r += r_step) {
            if (next != NULL) expect_rows(j, j->k, next + r, r_step);
            for (uint32_t c = 0; c < dp; c += COLS * VF_N) {
                const float *w = g->s + h * BLOCK + k, *v = g->rows + c;
                float *out = g->acc + h * dp + c;
                switch (ps_min_u64((dp - c) / VF_N, COLS)) {
                case 1: weigh_values(w, g->shrink + h, v, ROWS, dp, 1, out); break;
                case 2: weigh_values(w, g->shrink + h, v, ROWS, dp, 2, out); break;
                case 3: weigh_values(w, g->shrink + h, v, ROWS, dp, 3, out); break;
                default: weigh_values(w, g->shrink + h, v, ROWS, dp, 4, out); break;
                }
            }
        }
        for (uint32_t h = 0; h < p->n; h++) g->shrink[h] = 1.0f; /* once a block */
    }
}

/* A piece's partial result: for each head dp sums, the maximum and the sum. Blocks lie at multiples
 * of BLOCK, so that a key's block does not depend on the window's start. */
static void run_piece(const job *j, const piece *p, float *part, float *work)
{
    const uint32_t dp = j->dp;
    group g;
    int64_t at[2][BLOCK];
    open_group(j, p, &g, work);
    uint64_t b = p->from / BLOCK * BLOCK;
    bool here = find_rows(j, p, b, at[0]);
    for (uint32_t i = 0; b < p->to; b += BLOCK, i ^= 1) {
        const bool more = b + BLOCK < p->to && find_rows(j, p, b + BLOCK, at[i ^ 1]);
        if (here) {
            weigh_keys(j, p, &g, at[i]);
            add_values(j, p, &g, at[i], more ? at[i ^ 1] : NULL);
        }
        here = more;
    }
    for (uint32_t h = 0; h < p->n; h++) {
        float *out = part + h * (dp + 2);
        memcpy(out, g.acc + h * dp, dp * sizeof *out);
        out[dp] = g.max[h];
        out[dp + 1] = g.sum[h];
    }
}

/* Walks the pieces of the call in a fixed order: token, chunk, KV head, heads of it. `index` counts
 * them; the partial results lie in this order. False past the end. */
typedef struct walk {
    piece p;
    uint64_t index, at; /* `at`: heads' partial results before this piece */
    bool started;
} walk;

static void set_chunk(const job *j, walk *w, uint64_t chunk)
{
    const uint64_t pos = (uint64_t)j->pos[w->p.t], first = first_key(j, pos);
    w->p.from = ps_max_u64(chunk * PS_CPU_ATTN_CHUNK, first);
    w->p.to = ps_min_u64((chunk + 1) * PS_CPU_ATTN_CHUNK, pos + 1);
}

static bool next_piece(const job *j, walk *w)
{
    const uint32_t n_kv = j->a->kv.n_kv_head;
    if (!w->started) {
        w->started = true;
        set_chunk(j, w, first_key(j, (uint64_t)j->pos[0]) / PS_CPU_ATTN_CHUNK);
    } else {
        w->index++;
        w->at += w->p.n;
        w->p.head += w->p.n;
        if (w->p.head == (w->p.kv_head + 1) * j->group && ++w->p.kv_head == n_kv) {
            w->p.kv_head = w->p.head = 0;
            if (w->p.to <= (uint64_t)j->pos[w->p.t]) {
                set_chunk(j, w, w->p.to / PS_CPU_ATTN_CHUNK);
            } else {
                if (++w->p.t == j->a->n_tok) return false;
                set_chunk(j, w, first_key(j, (uint64_t)j->pos[w->p.t]) / PS_CPU_ATTN_CHUNK);
            }
        }
    }
    const uint32_t left = (w->p.kv_head + 1) * j->group - w->p.head;
    w->p.n = left < GROUP_ROWS ? left : GROUP_ROWS;
    return true;
}

/* Joins the pieces of one token and head, in order of position. */
static void merge_head(
    const job *j, uint64_t t, uint32_t head, uint64_t first_part, uint64_t n_chunks, float *acc)
{
    const uint32_t dp = j->dp;
    float max = -INFINITY, sum = 0;
    memset(acc, 0, dp * sizeof *acc);
    for (uint64_t c = 0; c < n_chunks; c++) {
        const float *part = j->parts + (first_part + c * j->a->n_head + head) * (dp + 2);
        const float m = part[dp], l = part[dp + 1], new_max = fmaxf(max, m);
        if (l == 0) continue; /* no key of this piece is on this side */
        float e[VF_N], f[VF_N];
        vf_store(e, vf_exp(vf_set(max - new_max)));
        vf_store(f, vf_exp(vf_set(m - new_max)));
        for (uint32_t i = 0; i < dp; i += VF_N) {
            const vf old = vf_mul(vf_load(acc + i), vf_set(e[0]));
            vf_store(acc + i, vf_fma(vf_load(part + i), vf_set(f[0]), old));
        }
        sum = sum * e[0] + l * f[0];
        max = new_max;
    }
    finish_row(j, t, head, acc, max, sum);
}

static uint64_t chunks_of(const job *j, uint64_t t)
{
    const uint64_t pos = (uint64_t)j->pos[t];
    return pos / PS_CPU_ATTN_CHUNK - first_key(j, pos) / PS_CPU_ATTN_CHUNK + 1;
}

/* Pieces in turn: of a cache in two parts those without a key here are neighbours. */
static void few_part(void *ctx, int i_thread, int n_threads)
{
    const job *j = ctx;
    float *work = j->work + (uint64_t)i_thread * j->work_floats;
    uint64_t begin, end;
    walk w = {0};
    while (next_piece(j, &w) && !ps_cpu_aborted(j->launch))
        if (w.index % (uint64_t)n_threads == (uint64_t)i_thread)
            run_piece(j, &w.p, j->parts + w.at * (j->dp + 2), work);
    if (j->launch->pool != NULL) ps_pool_barrier(j->launch->pool);
    uint64_t first_part = 0, row = 0;
    ps_cpu_share((uint64_t)j->a->n_tok * j->a->n_head, 1, i_thread, n_threads, &begin, &end);
    for (uint64_t t = 0; t < j->a->n_tok; t++) {
        const uint64_t n_chunks = chunks_of(j, t);
        for (uint32_t h = 0; h < j->a->n_head; h++, row++)
            if (row >= begin && row < end) merge_head(j, t, h, first_part, n_chunks, work);
        first_part += n_chunks * j->a->n_head;
    }
}

/* ---- many tokens: tiles ---- */

typedef struct tile {
    uint64_t tok, tok_end; /* of one sequence */
    uint32_t kv_head, head, n_heads, n_rows;
    float *q, *out, *keys, *values,
        *s; /* [rows][dp] twice, [dp][BLOCK], [BLOCK][dp], [rows][BLOCK] */
    float max[TILE_ROWS], sum[TILE_ROWS], shrink[TILE_ROWS];
    uint64_t first[TILE_ROWS], last[TILE_ROWS]; /* keys that a row sees */
} tile;

static void open_tile(const job *j, tile *t, float *work)
{
    const ps_attn_args *a = j->a;
    const uint32_t dp = j->dp, d = a->kv.head_dim;
    t->q = work;
    t->out = t->q + TILE_ROWS * dp;
    t->keys = t->out + TILE_ROWS * dp;
    t->values = t->keys + BLOCK * dp;
    t->s = t->values + BLOCK * dp;
    t->n_rows = 0;
    for (uint64_t tok = t->tok; tok < t->tok_end; tok++)
        for (uint32_t h = 0; h < t->n_heads; h++, t->n_rows++) {
            float *q = t->q + t->n_rows * dp;
            memset(q, 0, dp * sizeof *q);
            memcpy(q, j->q + tok * a->ldq + (uint64_t)(t->head + h) * d, d * sizeof *q);
            t->max[t->n_rows] = -INFINITY;
            t->sum[t->n_rows] = 0;
            t->last[t->n_rows] = (uint64_t)j->pos[tok];
            t->first[t->n_rows] = first_key(j, (uint64_t)j->pos[tok]);
        }
    /* Rows of products come four at a time. */
    memset(t->q + t->n_rows * dp, 0, (4 - t->n_rows % 4) % 4 * dp * sizeof *t->q);
    memset(t->out, 0, (t->n_rows + 3) / 4 * 4 * dp * sizeof *t->out);
}

/* Keys as columns and values as rows, zeros for keys beyond [from, to] and those on the other side;
 * false if none is here. */
static bool load_block(
    const job *j, const tile *t, uint64_t b, uint64_t from, uint64_t to, bool *here)
{
    const uint32_t dp = j->dp;
    bool any = false;
    int64_t at[BLOCK];
    for (uint64_t r = 0; r < BLOCK; r++) {
        const bool seen = b + r >= from && b + r <= to;
        at[r] = seen ? row_at(j, j->seq[t->tok], t->kv_head, b + r) : -1;
        here[r] = at[r] >= 0;
        any |= here[r];
    }
    if (!any) return false;
    for (uint32_t r = 0; r < BLOCK; r++) { /* the values' memory holds the keys meanwhile */
        if (here[r])
            read_row(j, j->k + at[r], t->values + r * dp);
        else
            memset(t->values + r * dp, 0, dp * sizeof(float));
    }
    for (uint32_t r = 0; r < BLOCK; r += VF_N)
        for (uint32_t i = 0; i < dp; i += VF_N)
            vf_transpose(t->values + r * dp + i, dp, t->keys + i * BLOCK + r, BLOCK);
    for (uint32_t r = 0; r < BLOCK; r++)
        if (here[r]) read_row(j, j->v + at[r], t->values + r * dp);
    return true;
}

/* s[4][BLOCK] = q[4][dp] . keys[dp][BLOCK] */
static void tile_scores(const float *q, const float *keys, uint32_t dp, float *s)
{
    enum { W = 4 }; /* vectors of keys at a time */
    for (uint32_t c = 0; c < BLOCK; c += W * VF_N) {
        vf acc[4][W];
        for (int r = 0; r < 4; r++)
            for (int i = 0; i < W; i++) acc[r][i] = vf_zero();
        for (uint32_t k = 0; k < dp; k++) {
            const float *row = keys + k * BLOCK + c;
            vf v[W];
            for (int i = 0; i < W; i++) v[i] = vf_load(row + i * VF_N);
            for (int r = 0; r < 4; r++) {
                const vf x = vf_set(q[(uint32_t)r * dp + k]);
                for (int i = 0; i < W; i++) acc[r][i] = vf_fma(x, v[i], acc[r][i]);
            }
        }
        for (int r = 0; r < 4; r++)
            for (int i = 0; i < W; i++)
                vf_store(s + (uint32_t)r * BLOCK + c + (uint32_t)i * VF_N, acc[r][i]);
    }
}

static void add_block(const job *j, tile *t, uint64_t b, const bool *here)
{
    const uint32_t dp = j->dp, n = (t->n_rows + 3) / 4 * 4;
    for (uint32_t r = 0; r < n; r += 4) tile_scores(t->q + r * dp, t->keys, dp, t->s + r * BLOCK);
    for (uint32_t r = 0; r < n; r++) {
        float *s = t->s + r * BLOCK;
        if (r >= t->n_rows) { /* no row at all: it must not become infinite */
            memset(s, 0, BLOCK * sizeof *s);
            t->shrink[r] = 0;
            continue;
        }
        for (uint64_t k = 0; k < BLOCK; k++)
            if (!here[k] || b + k < t->first[r] || b + k > t->last[r]) s[k] = -INFINITY;
        t->shrink[r] = soften(j, s, BLOCK, &t->max[r], &t->sum[r]);
    }
    for (uint32_t r = 0; r < n; r += 4)
        for (uint32_t c = 0; c < dp; c += 4 * VF_N) {
            const float *s = t->s + r * BLOCK, *v = t->values + c;
            float *out = t->out + r * dp + c;
            switch (dp - c >= 4 * VF_N ? 4 : (dp - c) / VF_N) {
            case 1: weigh_values(s, t->shrink + r, v, BLOCK, dp, 1, out); break;
            case 2: weigh_values(s, t->shrink + r, v, BLOCK, dp, 2, out); break;
            case 3: weigh_values(s, t->shrink + r, v, BLOCK, dp, 3, out); break;
            default: weigh_values(s, t->shrink + r, v, BLOCK, dp, 4, out); break;
            }
        }
}

static void run_tile(const job *j, tile *t, float *work)
{
    open_tile(j, t, work);
    uint64_t from = UINT64_MAX, to = 0;
    for (uint32_t r = 0; r < t->n_rows; r++) {
        from = ps_min_u64(from, t->first[r]);
        to = ps_max_u64(to, t->last[r]);
    }
    for (uint64_t b = from / BLOCK * BLOCK; b <= to; b += BLOCK) {
        bool here[BLOCK];
        if (load_block(j, t, b, from, to, here)) add_block(j, t, b, here);
    }
    for (uint32_t r = 0; r < t->n_rows; r++)
        finish_row(j, t->tok + r / t->n_heads, t->head + r % t->n_heads, t->out + r * j->dp,
            t->max[r], t->sum[r]);
}

/* Tiles in turn, so that the long ones at a prompt's end are spread. */
static void many_part(void *ctx, int i_thread, int n_threads)
{
    const job *j = ctx;
    const ps_attn_args *a = j->a;
    const uint32_t heads = j->group < TILE_ROWS ? j->group : TILE_ROWS; /* of a tile */
    float *work = j->work + (uint64_t)i_thread * j->work_floats;
    uint64_t index = 0;
    for (uint64_t tok = 0, end; tok < a->n_tok; tok = end) {
        for (end = tok + 1; end < a->n_tok && end - tok < TILE_ROWS / heads; end++)
            if (j->seq[end] != j->seq[tok]) break;
        for (uint32_t h = 0; h < a->n_head; index++) {
            const uint32_t kv_head = h / j->group, left = (kv_head + 1) * j->group - h;
            tile t = {.tok = tok, .tok_end = end, .kv_head = kv_head, .head = h};
            t.n_heads = left < heads ? left : heads;
            h += t.n_heads;
            if (index % (uint64_t)n_threads != (uint64_t)i_thread) continue;
            if (ps_cpu_aborted(j->launch)) return;
            run_tile(j, &t, work);
        }
    }
}

/* ---- a call ---- */

ps_status PS_CPU_NAME(attn)(const ps_launch *launch, const void *args)
{
    const ps_attn_args *a = args;
    ps_status status = ps_op_check(PS_OP_ATTN, a, NULL);
    if (status != PS_OK) return status;
    job j = {.launch = launch,
        .a = a,
        .q = ps_cpu_ptr(launch, a->q),
        .sinks = ps_cpu_ptr(launch, a->sinks),
        .pos = ps_cpu_ptr(launch, a->pos),
        .seq = ps_cpu_ptr(launch, a->seq),
        .table = ps_cpu_ptr(launch, a->kv.table),
        .k = ps_cpu_ptr(launch, a->kv.k),
        .v = ps_cpu_ptr(launch, a->kv.v),
        .out = ps_cpu_ptr(launch, a->out),
        .ml = ps_cpu_ptr(launch, a->ml),
        .group = a->n_head / a->kv.n_kv_head,
        .dp = (a->kv.head_dim + VF_N - 1) / VF_N * VF_N};
    if (!ps_fmt_row_bytes(a->kv.fmt, a->kv.head_dim, &j.row_bytes)) return PS_EINTERNAL;
    const bool few = a->n_tok <= PS_CPU_GEMV_MAX_TOK;
    const uint64_t n_threads = (uint64_t)ps_cpu_threads(launch);
    ps_cpu_scratch s = ps_cpu_scratch_of(launch);
    if (few) {
        const uint64_t chunks =
            a->max_kv / PS_CPU_ATTN_CHUNK + 2; /* a window may straddle one more */
        j.parts = ps_cpu_take(&s, a->n_tok * chunks * a->n_head * (j.dp + 2) * sizeof(float));
        j.work_floats = GROUP_FLOATS * (uint64_t)j.dp + GROUP_ROWS * BLOCK;
    } else {
        j.work_floats = (2 * TILE_ROWS + 2 * BLOCK) * (uint64_t)j.dp + TILE_ROWS * BLOCK;
    }
    j.work = ps_cpu_take(&s, n_threads * j.work_floats * sizeof(float));
    if (s.short_of) return PS_EINTERNAL;
    ps_cpu_run(launch, few ? few_part : many_part, &j);
    return PS_OK;
}
