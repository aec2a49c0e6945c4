/* ps_measure - see ps_measure.h.
 *
 * A planner asks for many plans, and a pass of 94 layers with 128 experts is long. But layers that
 * are alike want the same, wherever the ring stands when their turn comes; so of each kind one is
 * lowered and stands for the others.
 */
#include "engine/ps_measure.h"

#include <string.h>

#include "engine/ps_ticks.h"

/* ---- which layers are alike ---- */

static bool same_weights(const ps_model *m, const ps_unit *a, const ps_unit *b)
{
    if (a->n_weights != b->n_weights || a->n_bytes != b->n_bytes) return false;
    for (uint32_t i = 0; i < a->n_weights; i++) {
        const ps_weight *x = &m->weights[a->first_weight + i],
                        *y = &m->weights[b->first_weight + i];
        if (x->role != y->role || x->fmt != y->fmt || x->n_rows != y->n_rows ||
            x->n_cols != y->n_cols)
            return false;
    }
    return true;
}

/* Parts and all: a part is a unit, too. */
static bool same_unit(const ps_plan *p, uint32_t tier, int32_t a, int32_t b)
{
    if (a < 0 || b < 0) return a == b;
    const ps_unit *x = &p->model->units[a], *y = &p->model->units[b];
    const ps_unit_kv *kx = &p->kv[a], *ky = &p->kv[b];
    if (ps_plan_place(p, tier, (uint32_t)a).kind != ps_plan_place(p, tier, (uint32_t)b).kind ||
        x->n_rows != y->n_rows || x->n_parts != y->n_parts || kx->home != ky->home ||
        kx->window != ky->window || !same_weights(p->model, x, y))
        return false;
    for (uint32_t i = 0; i < x->n_parts; i++)
        if (!same_unit(p, tier, (int32_t)(x->first_part + i), (int32_t)(y->first_part + i)))
            return false;
    return true;
}

/* A layer's experts, which have all the same weights: how many are where, and whether bus and CPU
 * divide any. */
typedef struct expert_counts {
    uint32_t n_in[PS_PLACE_SPLIT + 1], n_divided;
} expert_counts;

static expert_counts count_experts(const ps_plan *p, uint32_t tier, uint32_t layer)
{
    expert_counts c = {0};
    int32_t first = p->model->layers[layer].first_expert;
    for (uint32_t e = 0; first >= 0 && e < p->model->hp.n_expert; e++) {
        uint32_t unit = (uint32_t)first + e;
        c.n_in[ps_plan_place(p, tier, unit).kind]++;
        c.n_divided += ps_plan_share(p, tier, unit) > 0;
    }
    return c;
}

static bool same_layer(
    const ps_plan *p, uint32_t tier, const expert_counts *counts, uint32_t a, uint32_t b)
{
    const ps_layer *x = &p->model->layers[a], *y = &p->model->layers[b];
    if (x->window != y->window || memcmp(&counts[a], &counts[b], sizeof *counts) != 0 ||
        !same_unit(p, tier, x->attn, y->attn) || !same_unit(p, tier, x->ffn, y->ffn) ||
        !same_unit(p, tier, x->router, y->router))
        return false;
    return x->first_expert < 0 || same_weights(p->model, &p->model->units[x->first_expert],
                                      &p->model->units[y->first_expert]);
}

ps_status ps_plan_find_alike(const ps_plan *p, uint32_t tier, uint32_t *stands_for, ps_err *err)
{
    uint32_t n_layer = p->model->hp.n_layer;
    expert_counts *counts = ps_alloc(n_layer, sizeof *counts);
    if (counts == NULL) return ps_fail(err, PS_ENOMEM, "no host memory to measure a plan");
    for (uint32_t layer = 0; layer < n_layer; layer++) {
        counts[layer] = count_experts(p, tier, layer);
        uint32_t i = 0;
        while (i < layer && (stands_for[i] == 0 || !same_layer(p, tier, counts, i, layer))) i++;
        stands_for[layer] = 0;
        stands_for[i]++;
    }
    ps_free(counts);
    return PS_OK;
}

/* ---- passes ---- */

typedef struct measuring {
    const ps_plan *plan;
    uint32_t *stands_for; /* owns; [n_layer], in the tier in hand */
    bool *none;           /* owns; [n_units] all false: experts that can't be read where they lie */
    uint64_t ws_bytes;
    uint32_t n_table;
} measuring;

static ps_status measure_shape(measuring *m, const ps_pass_shape *shape, ps_err *err)
{
    const ps_plan *p = m->plan;
    uint64_t ws = 0;
    uint32_t table = 0;
    PS_TRY(ps_lower_measure(p, shape, m->stands_for, &ws, &table, err));
    m->ws_bytes = ps_max_u64(m->ws_bytes, ws);
    if (p->n_windows > 0) { /* attention in two parts and in one want different amounts */
        ps_pass_shape far = *shape;
        far.far = UINT32_MAX;
        PS_TRY(ps_lower_measure(p, &far, m->stands_for, &ws, &table, err));
        m->ws_bytes = ps_max_u64(m->ws_bytes, ws);
    }
    if (table > m->n_table) m->n_table = table;
    return PS_OK;
}

/* Whether streamed experts can be read where they lie shows only when their memory gets locked, so
 * there must be room for loading them as well. */
static ps_status measure_at(measuring *m, uint32_t tier, uint32_t n, ps_err *err)
{
    ps_pass_shape shape = {
        .tier = tier, .n_tok = n, .n_out = n, .max_kv = m->plan->max_pages * PS_KV_PAGE_TOK};
    PS_TRY(measure_shape(m, &shape, err));
    if (!ps_pass_maps_experts(m->plan, &shape)) return PS_OK;
    shape.mapped = m->none;
    return measure_shape(m, &shape, err);
}

static bool same_places(const ps_plan *p, uint32_t a, uint32_t b)
{
    size_t n = p->model->n_units;
    return memcmp(p->places + a * n, p->places + b * n, n * sizeof *p->places) == 0;
}

/* In every tier: what workspaces and tables there are depends on the places. Workspaces grow with
 * tokens but change algorithm at small counts, so ask at every power of two, up to where one op
 * gets no more (a chunk, or rows of logits) and all experts travel. */
static ps_status measure(measuring *m, ps_err *err)
{
    const ps_plan *p = m->plan;
    const ps_plan_spec *s = &p->spec;
    uint32_t most = s->logit_rows > s->chunk_tok ? s->logit_rows : s->chunk_tok;
    if (most < p->model->hp.n_expert) most = p->model->hp.n_expert;
    for (uint32_t t = 0, low = 1; t < s->n_tiers && low <= s->pass_tok; t++) {
        while (t + 1 < s->n_tiers && same_places(p, t, t + 1)) t++; /* as one tier */
        uint32_t high = p->tiers[t].max_tok < s->pass_tok ? p->tiers[t].max_tok : s->pass_tok,
                 end = high < most ? high : most;
        PS_TRY(ps_plan_find_alike(p, t, m->stands_for, err));
        for (uint32_t n = 1; n <= end; n = n < end && n > end / 2 ? end : n * 2)
            /* Behind whole chunks comes one of any size. */
            if (n >= low || high > s->chunk_tok) PS_TRY(measure_at(m, t, n, err));
        /* The longest pass of one chunk: longer ones may need fewer groups of experts. */
        if (s->chunk_tok < end) PS_TRY(measure_at(m, t, s->chunk_tok, err));
        low = high + 1;
    }
    return PS_OK;
}

ps_status ps_plan_measure(const ps_plan *p, uint64_t *ws_bytes, uint32_t *n_table, ps_err *err)
{
    uint32_t n_layer = p->model->hp.n_layer;
    measuring m = {.plan = p,
        .stands_for = ps_alloc(n_layer, sizeof *m.stands_for),
        .none = ps_alloc(p->model->n_units, sizeof *m.none)};
    ps_status status = m.stands_for != NULL && m.none != NULL
                           ? measure(&m, err)
                           : ps_fail(err, PS_ENOMEM, "no host memory to measure a plan");
    ps_free(m.stands_for);
    ps_free(m.none);
    *ws_bytes = m.ws_bytes;
    *n_table = m.n_table;
    return status;
}
