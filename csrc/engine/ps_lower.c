/* ps_lower - one pass of the model under a plan, as steps in program order. This is the only
 * forward path: layer by layer, and within a layer chunk by chunk, so that a streamed weight
 * crosses the bus once however long the prompt is.
 *
 * The code reads like the model. Which stream a step runs on follows from where its unit computes;
 * what it must wait for is the emitter's business (ps_emit.c).
 *
 * Hidden states (PS_BUF_X) live on both sides; a bit a chunk and side says where they are current,
 * and ps_lower_move_x() takes them where the next block needs them.
 *
 * Threads: pure but for what it allocates.
 */
#include <string.h>

#include "engine/ps_lower_priv.h"

/* ---- hidden states ---- */

ps_dptr ps_lower_mapped(ps_dptr ref)
{
    return ps_ref_space(ref) == PS_SPACE_HOST_ACT
               ? ps_ref(PS_SPACE_HOST_ACT_DEV, ps_ref_offset(ref))
               : ref;
}

void ps_lower_hand_over(lowering *l, int32_t unit, ps_dptr dst, ps_dptr src, uint64_t n)
{
    ps_move_args a = {.x = ps_lower_mapped(src), .out = ps_lower_mapped(dst), .n = n};
    ps_emit_run(l->e, PS_SIDE_DEV, unit, PS_OP_MOVE, &a, NULL, 0);
}

void ps_lower_move_x(lowering *l, chunk c)
{
    if (l->x_on[c.side][c.i]) return;
    chunk from = c;
    from.side = other(c.side);
    uint64_t n = (uint64_t)c.n * l->hp->n_embd;
    /* Looking tokens up is done long before a prompt's later chunks are wanted: copies of these
     * hold no weights up, and leave the GPU to its work. */
    if (l->embedded && c.side == PS_SIDE_DEV && c.n > PS_SMALL_PASS_TOK)
        ps_emit_copy(l->e, true, -1, chunk_x(l, c), chunk_x(l, from), n * sizeof(float));
    else
        ps_lower_hand_over(l, -1, chunk_x(l, c), chunk_x(l, from), n);
    l->x_on[c.side][c.i] = 1;
}

void ps_lower_wrote_x(lowering *l, chunk c)
{
    l->x_on[c.side][c.i] = 1;
    l->x_on[other(c.side)][c.i] = 0;
}

/* ---- pieces of a block ---- */

void ps_lower_emit_norm(lowering *l, chunk c, uint32_t unit, ps_role role, ps_dptr x,
    ps_dptr residual, ps_dptr out, uint32_t n_tok)
{
    uint32_t n = l->hp->n_embd;
    ps_norm_args a = {.x = x,
        .w = ps_lower_vector(l, c.side, unit, role),
        .residual = residual,
        .out = out,
        .n_tok = n_tok,
        .n = n,
        .ldx = n,
        .ldo = n,
        .kind = l->hp->norm,
        .eps = l->hp->eps};
    if (role == PS_W_NORM) a.b = ps_lower_vector(l, c.side, unit, PS_W_NORM_B);
    ps_emit_run(l->e, c.side, (int32_t)unit, PS_OP_NORM, &a, NULL, 0);
}

/* One matrix of a unit that is larger than the ring: half a ring of rows at a time, so that the
 * next rows travel while these are used. */
static void emit_matmul_by_rows(
    lowering *l, uint32_t unit, const ps_matmul_args *whole, const linear *part, const ps_weight *w)
{
    uint64_t half = ps_max_u64(l->plan->spec.n_slots / 2, 1) * l->plan->spec.slot_bytes,
             fit = half / w->row_bytes;
    for (uint64_t row = 0; row < w->n_rows;) {
        uint64_t n = ps_min_u64(fit, w->n_rows - row),
                 at = ps_lower_take_slots(l, PS_RING_NOBODY, n * w->row_bytes);
        ps_lower_copy_pieces(l, unit, at, w->offset + row * w->row_bytes, n * w->row_bytes);
        ps_dptr bias = ps_lower_vector(
            l, PS_SIDE_DEV, unit, part->bias); /* asked now: the rows may have taken its slot */
        ps_matmul_args a = *whole;
        a.n_parts = 1;
        a.part[0] = (ps_matmul_part){.w = ps_ref(PS_SPACE_DEV_RING, at),
            .y = ps_dptr_add(part->y, row * sizeof(float)),
            .bias = ps_dptr_is_null(bias) ? bias : ps_dptr_add(bias, row * sizeof(float)),
            .fmt = w->fmt,
            .n_rows = (uint32_t)n,
            .ldy = part->ldy};
        ps_emit_run(l->e, PS_SIDE_DEV, (int32_t)unit, PS_OP_MATMUL, &a, NULL, 0);
        row += n;
    }
}

void ps_lower_emit_matmul(lowering *l, chunk c, uint32_t unit, ps_dptr x, uint32_t n_tok,
    uint32_t n_cols, const linear *parts, uint32_t n_parts, bool add)
{
    ps_matmul_args a = {
        .x = x, .n_tok = n_tok, .n_cols = n_cols, .ldx = n_cols, .n_parts = n_parts, .add = add};
    bool by_rows =
        c.side == PS_SIDE_DEV && ps_lower_is_streamed(l, unit) && !ps_lower_fits_ring(l, unit);
    for (uint32_t i = 0; i < n_parts; i++) {
        const ps_weight *w = ps_model_find(l->model, unit, parts[i].role);
        if (by_rows)
            emit_matmul_by_rows(l, unit, &a, &parts[i], w);
        else
            a.part[i] = (ps_matmul_part){.w = ps_lower_at_weight(l, c.side, unit, w),
                .y = parts[i].y,
                .bias = ps_lower_vector(l, c.side, unit, parts[i].bias),
                .fmt = w->fmt,
                .n_rows = w->n_rows,
                .ldy = parts[i].ldy};
    }
    if (!by_rows) ps_emit_run(l->e, c.side, (int32_t)unit, PS_OP_MATMUL, &a, NULL, 0);
}

void ps_lower_emit_output(lowering *l, chunk c, uint32_t unit, ps_role role, ps_role bias,
    ps_dptr in, uint32_t n_cols, ps_dptr y, bool add)
{
    ps_lower_emit_matmul(
        l, c, unit, in, c.n, n_cols, &(linear){role, bias, y, l->hp->n_embd}, 1, add);
}

static void lower_ffn(lowering *l, uint32_t layer, chunk c, uint32_t unit, ps_dptr y, bool add)
{
    const ps_hparams *hp = l->hp;
    uint32_t f = l->model->units[unit].n_rows;
    ps_dptr norm = in_buf(l, c.side, PS_BUF_NORM, 0), gate = in_buf(l, c.side, PS_BUF_GATE, 0),
            up = in_buf(l, c.side, PS_BUF_UP, 0);
    ps_act_args act = {.gate = gate,
        .up = up,
        .out = gate,
        .n_tok = c.n,
        .n = f,
        .ldg = f,
        .ldu = f,
        .ldo = f,
        .kind = hp->act};
    (void)layer;
    if (ps_model_find(l->model, unit, PS_W_GATE) != NULL) {
        linear parts[2] = {{PS_W_GATE, PS_W_GATE_B, gate, f}, {PS_W_UP, PS_W_UP_B, up, f}};
        ps_lower_emit_matmul(l, c, unit, norm, c.n, hp->n_embd, parts, 2, false);
    } else if (hp->fused_gate_up) { /* one matrix, gate rows first; the gated result goes to the
                                       other buffer */
        ps_lower_emit_matmul(
            l, c, unit, norm, c.n, hp->n_embd, &(linear){PS_W_UP, PS_W_UP_B, up, 2 * f}, 1, false);
        act.gate = up;
        act.up = ps_dptr_add(up, (uint64_t)f * sizeof(float));
        act.ldg = act.ldu = 2 * f;
    } else {
        ps_lower_emit_matmul(
            l, c, unit, norm, c.n, hp->n_embd, &(linear){PS_W_UP, PS_W_UP_B, up, f}, 1, false);
        act.gate = (ps_dptr){0};
        act.ldg = 0;
        act.out = up;
    }
    ps_emit_run(l->e, c.side, (int32_t)unit, PS_OP_ACT, &act, NULL, 0);
    ps_lower_emit_output(l, c, unit, PS_W_DOWN, PS_W_DOWN_B, act.out, f, y, add);
}

/* ---- both ends ---- */

static void lower_embed(lowering *l)
{
    uint32_t unit = (uint32_t)l->model->embed;
    const ps_weight *w = ps_model_find(l->model, unit, l->hp->tied ? PS_W_HEAD : PS_W_TABLE);
    /* Single rows are read where the table lies; a streamed table is in host memory. */
    bool resident = ps_plan_place(l->plan, l->shape.tier, unit).kind == PS_PLACE_VRAM;
    ps_side side = resident ? PS_SIDE_DEV : PS_SIDE_HOST;
    for (uint32_t i = 0; i < l->n_chunks; i++) {
        chunk c = get_chunk(l, i, side);
        ps_embed_args a = {.table = ps_lower_at_weight(l, side, unit, w),
            .ids = chunk_batch(c, l->batch->ids),
            .out = chunk_x(l, c),
            .fmt = w->fmt,
            .n_tok = c.n,
            .n_cols = l->hp->n_embd,
            .n_vocab = l->hp->n_vocab,
            .scale = l->hp->embed_scale};
        ps_emit_run(l->e, side, (int32_t)unit, PS_OP_EMBED, &a, NULL, 0);
        ps_lower_wrote_x(l, c);
    }
}

static void lower_layer(lowering *l, uint32_t layer)
{
    const ps_layer *y = &l->model->layers[layer];
    ps_lower_load_stages(l, (uint32_t)y->attn);
    ps_lower_bring_layer(l, layer);
    ps_lower_block(l, layer, (uint32_t)y->attn, ps_lower_attn);
    l->embedded = false;
    if (y->ffn >= 0)
        ps_lower_block(l, layer, (uint32_t)y->ffn, lower_ffn);
    else
        ps_lower_moe(l, layer);
}

/* n layers that are alike: they share workspaces, and each has tables of its own. */
static void measure_layers(lowering *l, uint32_t layer, uint32_t n)
{
    const ps_ticks *t = ps_emitter_ticks(l->e);
    uint32_t before = t->n_table;
    lower_layer(l, layer);
    ps_emit_table(l->e, (n - 1) * (t->n_table - before));
}

static void lower_pass(lowering *l)
{
    const ps_model *m = l->model;
    if (l->plan->uses[PS_SIDE_DEV])
        ps_emit_copy(
            l->e, true, -1, in_batch(PS_SIDE_DEV, 0), in_batch(PS_SIDE_HOST, 0), l->batch->n_bytes);
    ps_lower_bring(l, (uint32_t)m->embed);
    lower_embed(l);
    l->embedded = true;
    for (uint32_t layer = 0; layer < l->hp->n_layer; layer++) {
        if (l->stands_for == NULL)
            lower_layer(l, layer);
        else if (l->stands_for[layer] > 0)
            measure_layers(l, layer, l->stands_for[layer]);
    }
    /* Also where no logits are wanted: from then on all residents count as there. */
    if (m->head != m->embed) ps_lower_bring(l, (uint32_t)m->head);
    if (l->shape.n_out > 0) ps_lower_head(l);
}

/* ---- entry points ---- */

void ps_batch_lay_out(const ps_plan *plan, const ps_pass_shape *shape, ps_batch_layout *b)
{
    uint64_t at = 0, tok = (uint64_t)shape->n_tok * sizeof(int32_t);
    uint64_t table = (uint64_t)plan->spec.n_seq * plan->max_pages * sizeof(int32_t);
    uint64_t windows = shape->staged ? 0 : plan->n_windows * table;
    bool mrope = plan->model->hp.rope == PS_ROPE_MROPE;
    struct {
        uint64_t *offset, n_bytes;
    } parts[] = {{&b->ids, tok}, {&b->pos, tok}, {&b->seq, tok},
        {&b->rope_pos, mrope ? 4 * tok : 0}, {&b->rows, (uint64_t)shape->n_out * sizeof(int32_t)},
        {&b->table, table}, {&b->stage_table, shape->staged ? table : 0}, {&b->near, windows},
        {&b->far, windows}};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        *parts[i].offset = at;
        at = (at + parts[i].n_bytes + 63) / 64 * 64;
    }
    b->n_bytes = at;
}

static ps_status lower(const ps_plan *plan, const ps_pass_shape *shape, bool measures,
    const uint32_t *stands_for, ps_emitter *e, ps_err *err)
{
    ps_ticks *t = ps_emitter_ticks(e);
    ps_batch_lay_out(plan, shape, &t->batch);
    lowering l = {.plan = plan,
        .model = plan->model,
        .hp = &plan->model->hp,
        .e = e,
        .maps_experts = ps_pass_maps_experts(plan, shape),
        .measures = measures,
        .stands_for = stands_for,
        .shape = *shape,
        .batch = &t->batch,
        .n_chunks = (shape->n_tok + plan->spec.chunk_tok - 1) / plan->spec.chunk_tok};
    uint32_t n_units = plan->model->n_units, n_slots = plan->spec.n_slots;
    uint8_t *bits = ps_alloc(l.n_chunks, 2);
    l.ring_at = ps_alloc(n_units, sizeof *l.ring_at);
    l.slot_owner = ps_alloc((uint64_t)n_slots + 1, sizeof *l.slot_owner);
    l.groups = ps_alloc((uint64_t)plan->model->hp.n_expert + 1, sizeof *l.groups);
    bool ok = bits != NULL && l.ring_at != NULL && l.slot_owner != NULL && l.groups != NULL;
    if (ok) {
        l.x_on[0] = bits;
        l.x_on[1] = bits + l.n_chunks;
        for (uint32_t i = 0; i < n_units; i++) l.ring_at[i] = UINT64_MAX;
        for (uint32_t i = 0; i < n_slots; i++) l.slot_owner[i] = PS_RING_NOBODY;
        ps_emit_expect_tables(e, /* where no expert rides in the ring, a group a layer is all */
            ps_lower_maps_all(&l) ? 3ull * l.hp->n_expert * l.hp->n_layer : plan->n_table);
        lower_pass(&l);
    }
    ps_free(bits);
    ps_free(l.ring_at);
    ps_free(l.slot_owner);
    ps_free(l.groups);
    return ok ? PS_OK : ps_fail(err, PS_ENOMEM, "no host memory to lower a pass");
}

ps_status ps_lower(const ps_plan *plan, const ps_pass_shape *shape, ps_ticks **out, ps_err *err)
{
    *out = NULL;
    ps_check_bug(
        shape->n_tok > 0 && shape->n_tok <= plan->spec.pass_tok && shape->n_out <= shape->n_tok,
        err);
    ps_emitter *e = NULL;
    ps_status status = ps_emitter_create(plan, shape, false, &e, err);
    if (status == PS_OK) status = lower(plan, shape, false, NULL, e, err);
    if (status == PS_OK) status = ps_emitter_finish(e, out, err);
    ps_emitter_destroy(e);
    return status;
}

ps_status ps_lower_measure(const ps_plan *plan, const ps_pass_shape *shape,
    const uint32_t *stands_for, uint64_t *ws_bytes, uint32_t *n_table, ps_err *err)
{
    ps_emitter *e = NULL;
    ps_status status = ps_emitter_create(plan, shape, true, &e, err);
    if (status == PS_OK) status = lower(plan, shape, true, stands_for, e, err);
    if (status == PS_OK) {
        *ws_bytes = ps_emitter_ticks(e)->max_ws_bytes;
        *n_table = ps_emitter_ticks(e)->n_table;
    }
    ps_emitter_destroy(e);
    return status;
}
