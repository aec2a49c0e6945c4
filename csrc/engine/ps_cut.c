/* ps_cut - see ps_cut.h. */
#include "engine/ps_cut.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* ---- boundaries ---- */

/* Rows [0, vram) are resident, [vram, gpu) streamed, the others the CPU's. */
typedef struct bounds {
    uint32_t vram, gpu;
} bounds;

enum { MAX_CUTS = 2 * PS_MAX_TIERS + 2 };

/* Sums of shares that were decimal fractions may miss 1 by a little. */
static const double SHARE_SLACK = 1e-6;

static uint32_t rows_of_share(const ps_unit *u, double share)
{
    if (share >= 1.0 - SHARE_SLACK) return u->n_rows;
    double steps = floor(share * u->n_rows / u->row_step + 0.5);
    return (uint32_t)fmin(steps * u->row_step, u->n_rows);
}

static bounds bounds_in(const ps_plan *p, uint32_t tier, uint32_t unit)
{
    const ps_unit *u = &p->model->units[unit];
    ps_place place = ps_plan_place(p, tier, unit);
    switch (place.kind) {
    case PS_PLACE_VRAM: return (bounds){u->n_rows, u->n_rows};
    case PS_PLACE_STREAM: return (bounds){0, u->n_rows};
    case PS_PLACE_SPLIT: {
        uint32_t vram = rows_of_share(u, place.vram);
        uint32_t gpu = rows_of_share(u, (double)place.vram + place.stream);
        return (bounds){vram, gpu > vram ? gpu : vram};
    }
    default: return (bounds){0, 0};
    }
}

static bool is_end(const ps_unit *u, uint32_t row)
{
    return row == 0 || row == u->n_rows;
}

static ps_status check_split(const ps_plan *p, uint32_t tier, uint32_t unit, ps_err *err)
{
    ps_place place = ps_plan_place(p, tier, unit);
    if (place.kind != PS_PLACE_SPLIT) return PS_OK;
    switch (p->model->units[unit].kind) {
    case PS_UNIT_ATTN:
    case PS_UNIT_FFN:
    case PS_UNIT_HEAD: break;
    case PS_UNIT_EXPERT:
        if (place.vram == 0.0f) break;
        return ps_plan_refuse(p, tier, unit, err,
            "an expert is not cut: its share of VRAM must be 0; place it in vram, or divide it "
            "between bus and CPU");
    case PS_UNIT_EMBED:
        return ps_plan_refuse(
            p, tier, unit, err, "tokens are only looked up in it; a token table is not split");
    default: return ps_plan_refuse(p, tier, unit, err, "this unit is too small to be split");
    }
    if (!(place.vram >= 0 && place.stream >= 0 &&
            (double)place.vram + place.stream <= 1.0 + SHARE_SLACK))
        return ps_plan_refuse(
            p, tier, unit, err, "shares of a split lie between 0 and 1 and sum to 1 at most");
    return PS_OK;
}

/* Whether a unit must be cut. One that need not gets plain places. */
static ps_status settle_unit(ps_plan *p, uint32_t unit, bool *cut, ps_err *err)
{
    const ps_unit *u = &p->model->units[unit];
    bool split = false;
    *cut = false;
    for (uint32_t t = 0; t < p->spec.n_tiers; t++) {
        PS_TRY(check_split(p, t, unit, err));
        split = split || ps_plan_place(p, t, unit).kind == PS_PLACE_SPLIT;
    }
    if (!split) return PS_OK;
    for (uint32_t t = 0; t < p->spec.n_tiers; t++) {
        bounds b = bounds_in(p, t, unit);
        if (!p->spec.per_tier_residency && b.vram != bounds_in(p, 0, unit).vram)
            return ps_plan_refuse(
                p, t, unit, err, "a unit's share of VRAM must be the same in all tiers");
        *cut = *cut || !is_end(u, b.vram) || !is_end(u, b.gpu);
    }
    for (uint32_t t = 0; t < p->spec.n_tiers && !*cut; t++) {
        bounds b = bounds_in(p, t, unit);
        p->places[(size_t)t * p->model->n_units + unit] =
            (ps_place){.kind = b.vram > 0  ? PS_PLACE_VRAM
                               : b.gpu > 0 ? PS_PLACE_STREAM
                                           : PS_PLACE_CPU};
    }
    return PS_OK;
}

/* All boundaries of all tiers, ascending, 0 and n_rows among them. */
static uint32_t find_cuts(const ps_plan *p, uint32_t unit, uint32_t cuts[MAX_CUTS])
{
    uint32_t n = 2;
    cuts[0] = 0;
    cuts[1] = p->model->units[unit].n_rows;
    for (uint32_t i = 0; i < 2 * p->spec.n_tiers; i++) {
        bounds b = bounds_in(p, i / 2, unit);
        uint32_t row = i % 2 == 0 ? b.vram : b.gpu, at = n;
        while (at > 0 && cuts[at - 1] > row) at--;
        if (cuts[at - 1] == row) continue; /* at > 0: nothing is below 0 */
        memmove(&cuts[at + 1], &cuts[at], (n - at) * sizeof *cuts);
        cuts[at] = row;
        n++;
    }
    return n;
}

/* ---- parts ---- */

/* What a part takes of a weight: `n` rows, columns (of each row) or elements (of a vector) from
 * `first` on. */
typedef struct slice {
    ps_role from, as;
    uint32_t first, n;
    bool columns;
} slice;

enum { MAX_SLICES = 20 };

typedef struct slices {
    slice at[MAX_SLICES];
    uint32_t n;
} slices;

static void take(slices *s, ps_role from, ps_role as, uint32_t first, uint32_t n)
{
    s->at[s->n++] = (slice){from, as, first, n, false};
}

/* Rows [a, a + n) of each kind of unit; vectors before matrices, as in any image. What belongs to
 * the whole sum, as the bias of its output, goes with the first part. */
static void slice_ffn(slices *s, const ps_hparams *hp, uint32_t a, uint32_t n)
{
    bool fused = hp->fused_gate_up; /* rows of gate, then those of up: two weights of a part */
    if (fused) take(s, PS_W_UP_B, PS_W_GATE_B, a, n);
    take(s, PS_W_GATE_B, PS_W_GATE_B, a, n);
    take(s, PS_W_UP_B, PS_W_UP_B, fused ? hp->n_ff + a : a, n);
    if (a == 0) take(s, PS_W_DOWN_B, PS_W_DOWN_B, 0, hp->n_embd);
    if (fused) take(s, PS_W_UP, PS_W_GATE, a, n);
    take(s, PS_W_GATE, PS_W_GATE, a, n);
    take(s, PS_W_UP, PS_W_UP, fused ? hp->n_ff + a : a, n);
    s->at[s->n++] = (slice){PS_W_DOWN, PS_W_DOWN, a, n, true};
}

static void slice_attn(slices *s, const ps_hparams *hp, uint32_t a, uint32_t n)
{
    uint32_t group = hp->n_head / hp->n_kv_head, d = hp->head_dim, nq = hp->n_head * d,
             nk = hp->n_kv_head * d;
    take(s, PS_W_Q_NORM, PS_W_Q_NORM, 0, d);
    take(s, PS_W_K_NORM, PS_W_K_NORM, 0, d);
    take(s, PS_W_SINKS, PS_W_SINKS, a * group, n * group);
    for (int matrix = 0; matrix < 2; matrix++) {
        ps_role qkv = matrix ? PS_W_QKV : PS_W_QKV_B, q = matrix ? PS_W_Q : PS_W_Q_B,
                k = matrix ? PS_W_K : PS_W_K_B, v = matrix ? PS_W_V : PS_W_V_B;
        take(s, qkv, q, a * group * d, n * group * d);
        take(s, qkv, k, nq + a * d, n * d);
        take(s, qkv, v, nq + nk + a * d, n * d);
        take(s, q, q, a * group * d, n * group * d);
        take(s, k, k, a * d, n * d);
        take(s, v, v, a * d, n * d);
        if (a == 0 && !matrix) take(s, PS_W_O_B, PS_W_O_B, 0, hp->n_embd);
    }
    s->at[s->n++] = (slice){PS_W_O, PS_W_O, a * group * d, n * group * d, true};
}

/* The cut model under construction: units and weights have room for all. */
typedef struct cutter {
    const ps_plan *plan;
    ps_model *cut;
    ps_err *err;
} cutter;

static ps_unit *begin_part(cutter *c, uint32_t unit, uint32_t first_row, uint32_t n_rows)
{
    const ps_unit *whole = &c->plan->model->units[unit];
    ps_unit *named = &c->cut->units[unit], *part = &c->cut->units[c->cut->n_units];
    if (named->n_parts++ == 0) named->first_part = c->cut->n_units;
    *part = *whole;
    part->of = (int32_t)unit;
    part->first_row = first_row;
    part->n_rows = n_rows;
    part->first_weight = c->cut->n_weights;
    part->n_weights = 0;
    part->n_bytes = 0;
    part->kv_bytes_per_tok = whole->kv_bytes_per_tok / whole->n_rows * n_rows;
    if (n_rows == 0)
        snprintf(part->name, sizeof part->name, "%.30s[norms]", whole->name);
    else
        snprintf(part->name, sizeof part->name, "%.24s[%u:%u]", whole->name, first_row,
            first_row + n_rows);
    c->cut->n_units++;
    return part;
}

/* Adds a slice of a weight to the part begun last; nothing where the unit has no such weight. */
static ps_status add_slice(cutter *c, const slice *s)
{
    ps_unit *part = &c->cut->units[c->cut->n_units - 1];
    const ps_weight *whole = ps_model_find(c->cut, (uint32_t)part->of, s->from);
    if (whole == NULL) return PS_OK;
    ps_weight *w = &c->cut->weights[c->cut->n_weights];
    uint64_t skip = s->first * whole->file_row_bytes;
    bool ok = true;
    *w = *whole;
    w->role = s->as;
    if (whole->n_rows == 1 || s->columns) {
        w->n_cols = s->n;
        ok = ps_fmt_row_bytes(w->file_fmt, s->first, &skip) &&
             ps_fmt_row_bytes(w->fmt, s->n, &w->row_bytes);
    } else {
        w->n_rows = s->n;
    }
    w->tensor_skip += skip;
    if (!ok || !ps_round_up_u64(part->n_bytes, PS_WEIGHT_ALIGN, &w->offset))
        return ps_plan_refuse(c->plan, 0, (uint32_t)part->of, c->err,
            "its weights' format has no boundary there; this unit cannot be split");
    part->n_bytes = w->offset + w->n_rows * w->row_bytes;
    part->n_weights++;
    c->cut->n_weights++;
    return PS_OK;
}

static ps_status add_part(cutter *c, uint32_t unit, uint32_t first_row, uint32_t n_rows)
{
    slices s = {0};
    const ps_hparams *hp = &c->cut->hp;
    ps_unit_kind kind = begin_part(c, unit, first_row, n_rows)->kind;
    if (n_rows == 0) {
        take(&s, PS_W_NORM, PS_W_NORM, 0, hp->n_embd);
        take(&s, PS_W_NORM_B, PS_W_NORM_B, 0, hp->n_embd);
        take(&s, PS_W_POST_NORM, PS_W_POST_NORM, 0, hp->n_embd);
    } else if (kind == PS_UNIT_FFN) {
        slice_ffn(&s, hp, first_row, n_rows);
    } else if (kind == PS_UNIT_ATTN) {
        slice_attn(&s, hp, first_row, n_rows);
    } else {
        take(&s, PS_W_HEAD, PS_W_HEAD, first_row, n_rows);
    }
    for (uint32_t i = 0; i < s.n; i++) PS_TRY(add_slice(c, &s.at[i]));
    return PS_OK;
}

/* ---- the cut model ---- */

void ps_cut_destroy(ps_model *cut)
{
    if (cut == NULL) return;
    ps_free(cut->units);
    ps_free(cut->weights);
    ps_free(cut);
}

/* All that the model has; what it owns is borrowed, but for the two lists, which have room for the
 * parts too. */
static ps_model *copy_model(const ps_model *m, uint32_t cap_units, uint64_t cap_weights)
{
    ps_model *cut = ps_alloc(1, sizeof *cut);
    if (cut == NULL) return NULL;
    *cut = *m;
    cut->units = ps_alloc(cap_units, sizeof *cut->units);
    cut->weights = ps_alloc(cap_weights, sizeof *cut->weights);
    if (cut->units == NULL || cut->weights == NULL) {
        ps_cut_destroy(cut);
        return NULL;
    }
    memcpy(cut->units, m->units, m->n_units * sizeof *m->units);
    memcpy(cut->weights, m->weights, m->n_weights * sizeof *m->weights);
    return cut;
}

static ps_status cut_units(cutter *c, const bool *cut)
{
    const ps_plan *p = c->plan;
    for (uint32_t u = 0; u < p->model->n_units; u++) {
        if (!cut[u]) continue;
        uint32_t cuts[MAX_CUTS], n = find_cuts(p, u, cuts);
        PS_TRY(add_part(c, u, 0, 0));
        for (uint32_t i = 0; i + 1 < n; i++) PS_TRY(add_part(c, u, cuts[i], cuts[i + 1] - cuts[i]));
    }
    return PS_OK;
}

/* Norms are small and needed at once: they stay in VRAM wherever the GPU has a share. */
static void place_part(const ps_plan *p, const ps_unit *part, uint32_t tier, ps_place *place)
{
    bounds b = bounds_in(p, tier, (uint32_t)part->of);
    uint32_t end = part->first_row + part->n_rows;
    *place = (ps_place){.kind = end <= b.vram  ? PS_PLACE_VRAM
                                : end <= b.gpu ? PS_PLACE_STREAM
                                               : PS_PLACE_CPU};
}

static ps_place *place_all(const ps_plan *p, const ps_model *cut)
{
    uint32_t before = p->model->n_units;
    ps_place *places = ps_alloc((uint64_t)p->spec.n_tiers * cut->n_units, sizeof *places);
    if (places == NULL) return NULL;
    for (uint32_t t = 0; t < p->spec.n_tiers; t++) {
        ps_place *row = places + (size_t)t * cut->n_units;
        memcpy(row, p->places + (size_t)t * before, before * sizeof *row);
        for (uint32_t u = 0; u < before; u++)
            if (ps_unit_is_cut(&cut->units[u]))
                row[u].kind = bounds_in(p, t, u).gpu > 0 ? PS_PLACE_SPLIT : PS_PLACE_CPU;
        for (uint32_t u = before; u < cut->n_units; u++) place_part(p, &cut->units[u], t, &row[u]);
    }
    return places;
}

static ps_status cut_model(ps_plan *p, const bool *cut, uint32_t n_parts, ps_err *err)
{
    const ps_model *m = p->model;
    cutter c = {.plan = p, .err = err};
    c.cut = copy_model(m, m->n_units + n_parts, m->n_weights + (uint64_t)n_parts * MAX_SLICES);
    ps_place *places = NULL;
    ps_status status = c.cut != NULL ? cut_units(&c, cut) : PS_ENOMEM;
    if (status == PS_OK && (places = place_all(p, c.cut)) == NULL) status = PS_ENOMEM;
    if (status != PS_OK) {
        ps_cut_destroy(c.cut);
        return status == PS_ENOMEM ? ps_fail(err, PS_ENOMEM, "no host memory to split units")
                                   : status;
    }
    ps_free(p->places);
    p->spec.places = p->places = places;
    p->model = p->cut = c.cut;
    return PS_OK;
}

/* ---- experts ---- */

/* The share of a layer's split experts in a tier, and how many there are. */
static ps_status find_share(
    const ps_plan *p, uint32_t tier, uint32_t first, uint32_t *n, float *share, ps_err *err)
{
    *n = 0;
    for (uint32_t u = first; u < first + p->model->hp.n_expert; u++) {
        ps_place place = ps_plan_place(p, tier, u);
        if (place.kind != PS_PLACE_SPLIT) continue;
        PS_TRY(check_split(p, tier, u, err));
        if ((*n)++ == 0) *share = fminf(place.stream, 1.0f);
        if (fminf(place.stream, 1.0f) != *share)
            return ps_plan_refuse(p, tier, u, err,
                "bus and CPU divide a layer's experts at one ratio; its split experts must have "
                "the same share in a tier");
    }
    return PS_OK;
}

/* Of n experts PS_SHARE_OF(n) stream, evenly among the others. If that is none or all of them, so
 * it is with fewer: then nothing is left to divide when they are routed. */
static void divide(ps_plan *p, uint32_t tier, uint32_t first, uint32_t n, float share)
{
    ps_place *row = p->places + (size_t)tier * p->model->n_units;
    uint32_t of_one = (uint32_t)((double)share * PS_SHARE_ONE + 0.5);
    uint64_t done = 0, all = PS_SHARE_OF(n, of_one);
    for (uint32_t u = first, i = 0; i < n; u++) {
        if (row[u].kind != PS_PLACE_SPLIT) continue;
        uint64_t next = PS_SHARE_OF(++i, of_one);
        row[u] = (ps_place){.kind = next > done ? PS_PLACE_STREAM : PS_PLACE_CPU,
            .stream = all > 0 && all < n ? share : 0.0f};
        done = next;
    }
}

static ps_status divide_experts(ps_plan *p, ps_err *err)
{
    const ps_model *m = p->model;
    for (uint64_t i = 0; i < (uint64_t)p->spec.n_tiers * m->n_units; i++)
        if (p->places[i].kind != PS_PLACE_SPLIT)
            p->places[i] = (ps_place){.kind = p->places[i].kind}; /* shares of no meaning */
    for (uint32_t t = 0; t < p->spec.n_tiers; t++)
        for (uint32_t i = 0; i < m->hp.n_layer; i++) {
            uint32_t n = 0, first = (uint32_t)m->layers[i].first_expert;
            float share = 0.0f;
            if (m->layers[i].router < 0) continue;
            PS_TRY(find_share(p, t, first, &n, &share, err));
            divide(p, t, first, n, share);
        }
    return PS_OK;
}

ps_status ps_cut_places(ps_plan *p, ps_err *err)
{
    PS_TRY(divide_experts(p, err));
    uint32_t n_units = p->model->n_units, n_parts = 0, cuts[MAX_CUTS];
    bool *cut = ps_alloc(n_units, sizeof *cut);
    if (cut == NULL) return ps_fail(err, PS_ENOMEM, "no host memory to split units");
    ps_status status = PS_OK;
    for (uint32_t u = 0; u < n_units && status == PS_OK; u++) {
        status = settle_unit(p, u, &cut[u], err);
        if (cut[u]) n_parts += find_cuts(p, u, cuts); /* one fewer, and the norms */
    }
    if (status == PS_OK && n_parts > 0) status = cut_model(p, cut, n_parts, err);
    ps_free(cut);
    return status;
}
