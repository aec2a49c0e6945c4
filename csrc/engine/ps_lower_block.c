/* ps_lower_block - blocks and the head, whole or split: a block's norms and residual around its
 * body, and what happens where shares of a unit compute on both sides at once. See
 * ps_lower_priv.h.
 *
 * A split unit's input is made where its shares are joined, on the GPU, and handed to the CPU,
 * which starts first. Each side adds up its parts in the order of their rows; then the GPU adds the
 * CPU's sum to its own, whatever took longer. The CPU leaves its sum where its hidden states are,
 * which are stale from here on.
 */
#include "engine/ps_lower_priv.h"

/* Whether rows are computed on a side in this pass. */
static bool computes_on(const lowering *l, const ps_unit *u, ps_side side)
{
    for (uint32_t i = u->first_part; i < u->first_part + u->n_parts; i++)
        if (l->model->units[i].n_rows > 0 && ps_plan_side(l->plan, l->shape.tier, i) == side)
            return true;
    return false;
}

/* ---- blocks ---- */

/* The parts on the chunk's side, one after the other. */
static void emit_parts(
    lowering *l, uint32_t layer, chunk c, const ps_unit *u, ps_lower_body body, ps_dptr y, bool add)
{
    for (uint32_t i = u->first_part; i < u->first_part + u->n_parts; i++) {
        if (l->model->units[i].n_rows == 0 || ps_plan_side(l->plan, l->shape.tier, i) != c.side)
            continue;
        body(l, layer, c, i, y, add);
        add = true;
    }
}

static void emit_both_sides(
    lowering *l, uint32_t layer, chunk c, uint32_t unit, ps_lower_body body, ps_dptr y, bool add)
{
    const ps_unit *u = &l->model->units[unit];
    uint64_t n = (uint64_t)c.n * l->hp->n_embd;
    chunk far = c;
    far.side = other(c.side);
    bool both = computes_on(l, u, far.side);
    if (both) { /* the far side starts first, so that both work at once */
        ps_lower_hand_over(l, (int32_t)unit, in_buf(l, far.side, PS_BUF_NORM, 0),
            in_buf(l, c.side, PS_BUF_NORM, 0), n);
        emit_parts(l, layer, far, u, body, chunk_x(l, far), false);
    }
    emit_parts(l, layer, c, u, body, y, add);
    if (!both) return;
    ps_add_args join = {.a = y, .b = ps_lower_mapped(chunk_x(l, far)), .out = y, .n = n};
    ps_emit_run(l->e, c.side, (int32_t)unit, PS_OP_ADD, &join, NULL, 0);
}

void ps_lower_block(lowering *l, uint32_t layer, uint32_t unit, ps_lower_body body)
{
    const ps_unit *u = &l->model->units[unit];
    bool cut = ps_unit_is_cut(u);
    uint32_t norms = cut ? u->first_part : unit;
    bool post = ps_model_find(l->model, norms, PS_W_POST_NORM) != NULL;
    for (uint32_t i = 0; i < l->n_chunks; i++) {
        chunk c = get_chunk(l, i, ps_plan_side(l->plan, l->shape.tier, unit));
        ps_dptr x = chunk_x(l, c), y = post ? in_buf(l, c.side, PS_BUF_OUT, 0) : x;
        ps_lower_move_x(l, c);
        ps_lower_emit_norm(
            l, c, norms, PS_W_NORM, x, (ps_dptr){0}, in_buf(l, c.side, PS_BUF_NORM, 0), c.n);
        if (cut)
            emit_both_sides(l, layer, c, unit, body, y, !post);
        else
            body(l, layer, c, unit, y, !post);
        if (post) ps_lower_emit_norm(l, c, norms, PS_W_POST_NORM, y, x, x, c.n);
        ps_lower_wrote_x(l, c);
    }
}

/* ---- the head ---- */

/* The side where the hidden states of all chunks are current, fetched there if they are spread over
 * both. */
static ps_side gather_side(lowering *l, ps_side wanted)
{
    bool all[PS_SIDE_COUNT] = {true, true};
    for (int s = 0; s < PS_SIDE_COUNT; s++)
        for (uint32_t i = 0; i < l->n_chunks; i++) all[s] = all[s] && l->x_on[s][i];
    return all[wanted] || !all[other(wanted)] ? wanted : other(wanted);
}

/* Rows of the head that are computed on one side: n_vocab of them, or those of its parts there,
 * which are neighbours. */
typedef struct head_rows {
    uint32_t first, n;
} head_rows;

static head_rows rows_on(const lowering *l, const ps_unit *u, ps_side side)
{
    head_rows r = {0, u->n_rows};
    if (!ps_unit_is_cut(u)) return r;
    r = (head_rows){u->n_rows, 0};
    for (uint32_t i = u->first_part; i < u->first_part + u->n_parts; i++) {
        const ps_unit *part = &l->model->units[i];
        if (part->n_rows == 0 || ps_plan_side(l->plan, l->shape.tier, i) != side) continue;
        if (part->first_row < r.first) r.first = part->first_row;
        r.n += part->n_rows;
    }
    return r;
}

/* Logits of n tokens by the rows on one side. On the GPU they lie close together in its buffer and
 * are then copied to `out`; the CPU writes there itself. */
static void emit_logits(lowering *l, ps_side side, uint32_t unit, uint32_t n, ps_dptr out)
{
    const ps_hparams *hp = l->hp;
    const ps_unit *u = &l->model->units[unit];
    head_rows mine = rows_on(l, u, side);
    bool dev = side == PS_SIDE_DEV;
    uint32_t ld = dev ? mine.n : hp->n_vocab, first_part = unit, n_parts = 1;
    ps_dptr x = in_buf(l, side, PS_BUF_ROWS, 0);
    out = ps_dptr_add(out, (uint64_t)mine.first * sizeof(float));
    ps_dptr logits = dev ? in_buf(l, side, PS_BUF_LOGITS, 0) : out;
    if (ps_unit_is_cut(u)) {
        first_part = u->first_part + 1;
        n_parts = u->n_parts - 1;
    }
    for (uint32_t i = first_part; i < first_part + n_parts; i++) {
        const ps_unit *part = &l->model->units[i];
        if (ps_plan_side(l->plan, l->shape.tier, i) != side) continue;
        uint64_t skip = part->of >= 0 ? part->first_row - mine.first : 0;
        ps_lower_emit_matmul(l, (chunk){.side = side}, i, x, n, hp->n_embd,
            &(linear){PS_W_HEAD, PS_W_COUNT, ps_dptr_add(logits, skip * sizeof(float)), ld}, 1,
            false);
    }
    /* Where the two sides share a row of logits, each handles its own stretch of every row. */
    uint32_t n_stretches = mine.n == hp->n_vocab ? 1 : n;
    uint64_t length = (uint64_t)mine.n * (n / n_stretches);
    for (uint32_t i = 0; i < n_stretches; i++) {
        ps_softcap_args cap = {.x = ps_dptr_add(logits, (uint64_t)i * ld * sizeof(float)),
            .n = length,
            .cap = hp->logit_softcap};
        if (cap.cap > 0.0f) ps_emit_run(l->e, side, (int32_t)unit, PS_OP_SOFTCAP, &cap, NULL, 0);
        if (dev)
            ps_emit_copy(l->e, false, (int32_t)unit,
                ps_dptr_add(out, (uint64_t)i * hp->n_vocab * sizeof(float)), cap.x,
                length * sizeof(float));
    }
}

void ps_lower_head(lowering *l)
{
    const ps_hparams *hp = l->hp;
    uint32_t unit = (uint32_t)l->model->head;
    const ps_unit *u = &l->model->units[unit];
    ps_side side = ps_plan_side(l->plan, l->shape.tier, unit), from = gather_side(l, side);
    bool cut = ps_unit_is_cut(u), both = cut && computes_on(l, u, other(side));
    for (uint32_t i = 0; i < l->n_chunks; i++) ps_lower_move_x(l, get_chunk(l, i, from));
    for (uint32_t first = 0; first < l->shape.n_out; first += l->plan->spec.logit_rows) {
        uint32_t left = l->shape.n_out - first,
                 n = left < l->plan->spec.logit_rows ? left : l->plan->spec.logit_rows;
        uint64_t n_words = (uint64_t)n * hp->n_embd;
        ps_dptr rows = in_buf(l, side, PS_BUF_ROWS, 0), picked = in_buf(l, from, PS_BUF_ROWS, 0);
        ps_dptr out = ps_ref(PS_SPACE_OUT, (uint64_t)first * hp->n_vocab * sizeof(float));
        ps_gather_rows_args gather = {.x = in_buf(l, from, PS_BUF_X, 0),
            .rows = in_batch(from, l->batch->rows + first * sizeof(int32_t)),
            .out = picked,
            .n_rows = n,
            .n = hp->n_embd,
            .n_x = l->shape.n_tok};
        ps_emit_run(l->e, from, (int32_t)unit, PS_OP_GATHER_ROWS, &gather, NULL, 0);
        if (from != side) ps_lower_hand_over(l, (int32_t)unit, rows, picked, n_words);
        ps_lower_emit_norm(l, (chunk){.side = side}, cut ? u->first_part : unit, PS_W_NORM, rows,
            (ps_dptr){0}, rows, n);
        if (both) {
            ps_lower_hand_over(
                l, (int32_t)unit, in_buf(l, other(side), PS_BUF_ROWS, 0), rows, n_words);
            emit_logits(l, other(side), unit, n, out);
        }
        emit_logits(l, side, unit, n, out);
    }
}
