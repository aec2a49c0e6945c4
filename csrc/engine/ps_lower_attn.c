/* ps_lower_attn - the attention block: its products, its keys and values into the cache, attention
 * over wherever the cache lies.
 *
 * Three ways to the cache, by where a unit's KV lives and what pass it is:
 * - at home, in VRAM or in host memory: one view of it;
 * - staged (a prompt, KV in host memory): one layer's KV of the sequence in VRAM, loaded ahead,
 * saved behind; what belongs in the unit's window is copied there from the stage;
 * - in two parts (few tokens, KV in windows): new keys go to both homes, the newest pages are
 *   attended in VRAM and the others over the bus, or by the CPU at the same time, and the two are
 *   merged, VRAM's first. Which page is where, the batch's tables say; where nothing is far, VRAM
 *   alone is attended.
 *
 * Not here: the block around it (ps_lower.c), which pages windows hold (ps_kv).
 * Threads: pure but for what it allocates.
 */
#include <string.h>

#include "engine/ps_lower_priv.h"

static uint32_t page_of(uint32_t position)
{
    return position / PS_KV_PAGE_TOK;
}
static uint32_t pages_for(uint32_t n_tok)
{
    return (n_tok + PS_KV_PAGE_TOK - 1) / PS_KV_PAGE_TOK;
}

static bool is_staged(const lowering *l, uint32_t unit, ps_side side)
{
    ps_kv_home home = l->plan->kv[unit].home;
    return side == PS_SIDE_DEV && l->shape.staged && (home == PS_KV_BACKED || home == PS_KV_WINDOW);
}

static bool has_window(const lowering *l, uint32_t unit, ps_side side)
{
    return side == PS_SIDE_DEV && l->plan->kv[unit].home == PS_KV_WINDOW;
}

/* ---- views of the cache ---- */

/* Of a stage, which holds a layer, the heads of one unit. */
static ps_dptr stage_ref(const lowering *l, uint32_t unit, bool v)
{
    const ps_unit *u = &l->model->units[unit];
    uint64_t bytes = l->plan->kv_page_bytes * l->plan->max_pages,
             head_bytes = bytes / l->hp->n_kv_head, i = (uint64_t)u->layer % PS_KV_STAGES;
    return ps_ref(PS_SPACE_DEV_KV,
        l->plan->kv_stage_offset + (2 * i + v) * bytes + u->first_row * head_bytes);
}

static ps_kv_view view_of(const lowering *l, uint32_t unit)
{
    const ps_plan *p = l->plan;
    return (ps_kv_view){.fmt = p->spec.kv_fmt,
        .n_kv_head = l->model->units[unit].n_rows,
        .head_dim = l->hp->head_dim,
        .page_tok = PS_KV_PAGE_TOK,
        .max_pages = p->max_pages,
        .n_pages = p->max_pages * p->spec.n_seq,
        .n_seq = p->spec.n_seq};
}

static ps_kv_view view_home(const lowering *l, uint32_t unit, ps_side side)
{
    const ps_unit_kv *kv = &l->plan->kv[unit];
    ps_space space = side == PS_SIDE_HOST    ? PS_SPACE_HOST_KV
                     : kv->home == PS_KV_DEV ? PS_SPACE_DEV_KV
                                             : PS_SPACE_HOST_KV_DEV;
    ps_kv_view view = view_of(l, unit);
    view.k = ps_ref(space, kv->offset);
    view.v = ps_ref(space, kv->offset + kv->v_skip);
    view.table = in_batch(side, l->batch->table);
    return view;
}

static ps_kv_view view_stage(const lowering *l, uint32_t unit)
{
    ps_kv_view view = view_of(l, unit);
    view.k = stage_ref(l, unit, false);
    view.v = stage_ref(l, unit, true);
    view.table = in_batch(PS_SIDE_DEV, l->batch->stage_table);
    view.n_pages = l->plan->max_pages;
    return view;
}

/* The tables of a window, one behind the other. */
static ps_dptr window_table(const lowering *l, uint32_t unit, ps_side side, uint64_t first)
{
    uint64_t n = (uint64_t)l->plan->spec.n_seq * l->plan->max_pages * sizeof(int32_t);
    return in_batch(side, first + l->plan->kv[unit].window * n);
}

/* What a unit's window holds. */
static ps_kv_view view_near(const lowering *l, uint32_t unit)
{
    const ps_unit_kv *kv = &l->plan->kv[unit];
    ps_kv_view view = view_of(l, unit);
    view.k = ps_ref(PS_SPACE_DEV_KV, kv->near_offset);
    view.v = ps_ref(PS_SPACE_DEV_KV, kv->near_offset + kv->near_v_skip);
    view.table = window_table(l, unit, PS_SIDE_DEV, l->batch->near);
    view.n_pages = l->plan->windows[kv->window].n_pages * l->plan->spec.n_seq;
    return view;
}

/* What is in host memory only, for the side that attends to it. */
static ps_kv_view view_far(const lowering *l, uint32_t unit, ps_side side)
{
    ps_kv_view view = view_home(l, unit, side);
    view.table = window_table(l, unit, side, l->batch->far);
    return view;
}

/* ---- stages ---- */

/* Pages [from, to) of the pass's sequence between a unit's stage and host memory, K and V. */
static void copy_pages(lowering *l, uint32_t unit, bool in, uint32_t from, uint32_t to)
{
    const ps_unit_kv *kv = &l->plan->kv[unit];
    uint64_t n_bytes = (to - from) * kv->page_bytes, skip = from * kv->page_bytes;
    uint64_t host =
        kv->offset + (uint64_t)l->shape.seq * l->plan->max_pages * kv->page_bytes + skip;
    for (int v = 0; v < 2; v++) {
        ps_dptr stage = ps_dptr_add(stage_ref(l, unit, v), skip);
        ps_dptr home = ps_ref(PS_SPACE_HOST_KV, host + (v ? kv->v_skip : 0));
        ps_emit_copy(l->e, in, (int32_t)unit, in ? stage : home, in ? home : stage, n_bytes);
    }
}

void ps_lower_load_stages(lowering *l, uint32_t unit)
{
    const ps_unit *u = &l->model->units[unit];
    for (uint32_t i = u->first_part; i < u->first_part + u->n_parts; i++)
        ps_lower_load_stages(l, i);
    if (is_staged(l, unit, ps_plan_side(l->plan, l->shape.tier, unit)) && !ps_unit_is_cut(u))
        copy_pages(l, unit, true, 0, pages_for(l->shape.first));
}

/* The newest pages of a stage that is complete into the unit's window: runs of pages that are
 * neighbours in both, at most two. */
static void fill_window(lowering *l, uint32_t unit)
{
    const ps_unit_kv *kv = &l->plan->kv[unit];
    const ps_kv_window *w = &l->plan->windows[kv->window];
    uint32_t length = l->shape.first + l->shape.n_tok, end = pages_for(length);
    for (uint32_t page = ps_kv_window_first(w, length), n; page < end; page += n) {
        uint32_t slot = page % w->n_pages;
        n = w->n_pages - slot < end - page ? w->n_pages - slot : end - page;
        uint64_t to =
            kv->near_offset + ((uint64_t)l->shape.seq * w->n_pages + slot) * kv->page_bytes;
        for (int v = 0; v < 2; v++) {
            ps_move_args move = {.x = ps_dptr_add(stage_ref(l, unit, v), page * kv->page_bytes),
                .out = ps_ref(PS_SPACE_DEV_KV, to + (v ? kv->near_v_skip : 0)),
                .n = n * kv->page_bytes / sizeof(uint32_t)};
            ps_emit_run(l->e, PS_SIDE_DEV, (int32_t)unit, PS_OP_MOVE, &move, NULL, 0);
        }
    }
}

/* ---- the block ---- */

/* Where q, k and v of a chunk are, and how they lie there. */
typedef struct qkv {
    ps_dptr q, k, v;
    uint32_t n_q, ldq, ldk; /* columns of q; ldk of v too */
} qkv;

static qkv emit_qkv(lowering *l, chunk c, uint32_t unit)
{
    const ps_hparams *hp = l->hp;
    uint32_t n_k = l->model->units[unit].n_rows * hp->head_dim,
             n_q = n_k * (hp->n_head / hp->n_kv_head);
    ps_dptr norm = in_buf(l, c.side, PS_BUF_NORM, 0);
    qkv x = {.q = in_buf(l, c.side, PS_BUF_Q, 0),
        .k = in_buf(l, c.side, PS_BUF_K, 0),
        .v = in_buf(l, c.side, PS_BUF_V, 0),
        .n_q = n_q,
        .ldq = n_q,
        .ldk = n_k};
    if (ps_model_find(l->model, unit, PS_W_QKV) != NULL) {
        x.k = ps_dptr_add(x.q, (uint64_t)n_q * sizeof(float));
        x.v = ps_dptr_add(x.k, (uint64_t)n_k * sizeof(float));
        x.ldq = x.ldk = n_q + 2 * n_k;
        ps_lower_emit_matmul(l, c, unit, norm, c.n, hp->n_embd,
            &(linear){PS_W_QKV, PS_W_QKV_B, x.q, x.ldq}, 1, false);
        return x;
    }
    linear parts[3] = {{PS_W_Q, PS_W_Q_B, x.q, x.ldq}, {PS_W_K, PS_W_K_B, x.k, x.ldk},
        {PS_W_V, PS_W_V_B, x.v, x.ldk}};
    ps_lower_emit_matmul(l, c, unit, norm, c.n, hp->n_embd, parts, 3, false);
    return x;
}

/* Head norms and rope, and the chunk's keys and values into every home that they have. */
static void emit_prep(
    lowering *l, uint32_t layer, chunk c, uint32_t unit, const qkv *x, const ps_kv_view *view)
{
    const ps_hparams *hp = l->hp;
    uint32_t i_rope = l->model->layers[layer].i_rope;
    ps_qkv_prep_args prep = {.q = x->q,
        .k = x->k,
        .v = x->v,
        .q_norm = ps_lower_vector(l, c.side, unit, PS_W_Q_NORM),
        .k_norm = ps_lower_vector(l, c.side, unit, PS_W_K_NORM),
        .freq = in_const(c.side, l->plan->rope_offset[i_rope]),
        .pos = chunk_batch(c, l->batch->pos),
        .seq = chunk_batch(c, l->batch->seq),
        .kv = *view,
        .n_tok = c.n,
        .n_head = x->n_q / hp->head_dim,
        .ldq = x->ldq,
        .ldk = x->ldk,
        .ldv = x->ldk,
        .n_rot = hp->n_rot,
        .rope = hp->rope,
        .mag = l->plan->rope_mag[i_rope],
        .eps = hp->eps};
    memcpy(prep.sections, hp->rope_sections, sizeof prep.sections);
    if (hp->rope == PS_ROPE_MROPE) /* [chunk][4][n]: each chunk has its own block */
        prep.rope_pos =
            in_batch(c.side, l->batch->rope_pos + (uint64_t)c.first * 4 * sizeof(int32_t));
    ps_emit_run(l->e, c.side, (int32_t)unit, PS_OP_QKV_PREP, &prep, NULL, 0);
    if (is_staged(l, unit, c.side)) { /* saved while the attention goes on */
        copy_pages(l, unit, false, page_of(l->shape.first + c.first),
            pages_for(l->shape.first + c.first + c.n));
        if (has_window(l, unit, c.side) && c.first + c.n == l->shape.n_tok) fill_window(l, unit);
    } else if (has_window(l, unit, c.side)) { /* as they are now, they are only stored */
        prep.q = prep.q_norm = prep.k_norm = prep.rope_pos = (ps_dptr){0};
        prep.rope = PS_ROPE_NONE;
        prep.kv = view_home(l, unit, c.side);
        ps_emit_run(l->e, c.side, (int32_t)unit, PS_OP_QKV_PREP, &prep, NULL, 0);
    }
}

/* The far part of a call over the near pages. Sinks count once: there. */
static ps_attn_args far_part(const lowering *l, uint32_t unit, const ps_attn_args *near)
{
    ps_side side = l->plan->spec.kv_far_side;
    uint64_t most = ps_min_u64(l->plan->spec.chunk_tok, PS_FAR_ROWS), n_ml = 2ull * near->n_head,
             ml = most * (near->ldo + n_ml) * sizeof(float);
    ps_attn_args far = *near;
    far.out = in_buf(l, side, PS_BUF_FAR, 0);
    far.ml = in_buf(l, side, PS_BUF_FAR, ml);
    far.sinks = (ps_dptr){0};
    far.kv = view_far(l, unit, side);
    far.window = l->plan->windows[l->plan->kv[unit].window].reach;
    if (side == PS_SIDE_DEV) return far;
    far.q = in_buf(l, side, PS_BUF_Q, 0);
    far.pos = in_batch(side, ps_ref_offset(near->pos));
    far.seq = in_batch(side, ps_ref_offset(near->seq));
    return far;
}

/* Attention over what is in VRAM and over what is in host memory, for some of the chunk's tokens at
 * a time. `whole` is the call over the near pages of all tokens.
 *
 * What is far was mostly written by earlier passes, which waited for it. But after a truncation the
 * last page may be far, and a window of one page leaves the pass's others: then the CPU reads keys
 * that the GPU has stored just before. So q is handed over behind that store. */
static void emit_in_parts(lowering *l, chunk c, uint32_t unit, const ps_attn_args *whole)
{
    ps_side far_side = l->plan->spec.kv_far_side;
    for (uint32_t i = 0; i < c.n; i += PS_FAR_ROWS) {
        uint64_t most = ps_min_u64(l->plan->spec.chunk_tok, PS_FAR_ROWS);
        ps_attn_args near = *whole;
        near.n_tok = c.n - i < PS_FAR_ROWS ? c.n - i : PS_FAR_ROWS;
        near.n_after += c.n - i - near.n_tok;
        near.q = ps_dptr_add(near.q, (uint64_t)i * near.ldq * sizeof(float));
        near.out = ps_dptr_add(near.out, (uint64_t)i * near.ldo * sizeof(float));
        near.pos = ps_dptr_add(near.pos, (uint64_t)i * sizeof(int32_t));
        near.seq = ps_dptr_add(near.seq, (uint64_t)i * sizeof(int32_t));
        near.ml = in_buf(l, c.side, PS_BUF_FAR, most * near.ldo * sizeof(float));
        ps_attn_args far = far_part(l, unit, &near);
        ps_attn_merge_args merge = {.a = near.out,
            .b = ps_lower_mapped(far.out),
            .out = near.out,
            .ml_a = near.ml,
            .ml_b = ps_lower_mapped(far.ml),
            .n_tok = near.n_tok,
            .n_head = near.n_head,
            .head_dim = near.kv.head_dim};
        if (far_side == PS_SIDE_HOST) { /* it starts first, so that both work at once */
            uint64_t n = (uint64_t)(near.n_tok - 1) * near.ldq + near.ldo;
            ps_lower_hand_over(l, (int32_t)unit, far.q, near.q, n);
            ps_emit_run(l->e, far_side, (int32_t)unit, PS_OP_ATTN, &far, NULL, 0);
        }
        ps_emit_run(l->e, c.side, (int32_t)unit, PS_OP_ATTN, &near, NULL, 0);
        if (far_side == PS_SIDE_DEV)
            ps_emit_run(l->e, far_side, (int32_t)unit, PS_OP_ATTN, &far, NULL, 0);
        ps_emit_run(l->e, c.side, (int32_t)unit, PS_OP_ATTN_MERGE, &merge, NULL, 0);
    }
}

void ps_lower_attn(lowering *l, uint32_t layer, chunk c, uint32_t unit, ps_dptr y, bool add)
{
    bool staged = is_staged(l, unit, c.side), near = has_window(l, unit, c.side) && !staged;
    qkv x = emit_qkv(l, c, unit);
    ps_kv_view view = staged ? view_stage(l, unit)
                      : near ? view_near(l, unit)
                             : view_home(l, unit, c.side);
    emit_prep(l, layer, c, unit, &x, &view);
    ps_attn_args attn = {.q = x.q,
        .out = in_buf(l, c.side, PS_BUF_ATT, 0),
        .sinks = ps_lower_vector(l, c.side, unit, PS_W_SINKS),
        .pos = chunk_batch(c, l->batch->pos),
        .seq = chunk_batch(c, l->batch->seq),
        .kv = view,
        .n_tok = c.n,
        .n_head = x.n_q / l->hp->head_dim,
        .ldq = x.ldq,
        .ldo = x.n_q,
        .max_kv = l->shape.max_kv,
        .n_after = l->shape.n_tok - c.first - c.n,
        .window = l->model->layers[layer].window,
        .scale = l->hp->attn_scale,
        .softcap = l->hp->attn_softcap};
    uint32_t i_window = l->plan->kv[unit].window;
    /* No key of the window is further back: shorter for kernels that look at them all. Workspaces
     * are measured without that: the last chunk of a staged prompt may be as short as any other
     * pass, and it sees every key. */
    if (near && !l->measures) {
        uint32_t most = l->plan->windows[i_window].n_pages * PS_KV_PAGE_TOK;
        if (attn.window == 0 || attn.window > most) attn.window = most;
    }
    if (near && (l->shape.far & ps_pass_far_bit(i_window)) != 0)
        emit_in_parts(l, c, unit, &attn);
    else
        ps_emit_run(l->e, c.side, (int32_t)unit, PS_OP_ATTN, &attn, NULL, 0);
    ps_lower_emit_output(l, c, unit, PS_W_O, PS_W_O_B, attn.out, x.n_q, y, add);
}
