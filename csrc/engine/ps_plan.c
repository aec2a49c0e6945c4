/* ps_plan - see ps_plan.h. Creation goes: copy the spec, cut split units into parts (ps_cut), check
 * the rules, find each unit's homes, size the buffers (asking lowering how much workspace its ops
 * want), lay everything out, compare with the budget. */
#include "engine/ps_plan.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "engine/ps_cut.h"
#include "engine/ps_locked.h"
#include "engine/ps_measure.h"
#include "engine/ps_ticks.h"

const char *ps_space_name(ps_space space)
{
    static const char *const names[PS_SPACE_COUNT] = {"none", "weights", "ring", "kv", "act",
        "batch", "const", "host.weights", "host.weights@dev", "host.kv", "host.kv@dev", "host.act",
        "host.act@dev", "host.batch", "host.const", "out"};
    return (unsigned)space < PS_SPACE_COUNT ? names[space] : "unknown";
}

uint32_t ps_plan_tier(const ps_plan *plan, uint32_t n_tok)
{
    uint32_t i = 0;
    while (i + 1 < plan->spec.n_tiers && n_tok > plan->tiers[i].max_tok) i++;
    return i;
}

/* ---- rules ---- */

ps_status ps_plan_refuse(
    const ps_plan *p, uint32_t tier, uint32_t unit, ps_err *err, const char *what)
{
    if (err == NULL || err->status != PS_OK) return PS_EPLAN;
    const ps_unit *units = p->model->units;
    ps_fail_field(err, PS_EPLAN, units[ps_plan_whole(p, (int32_t)unit)].name,
        "unit %s, tier %s: %s", units[unit].name, p->tiers[tier].name, what);
    snprintf(err->extra, sizeof err->extra, "%s", p->tiers[tier].name);
    return PS_EPLAN;
}

static ps_status check_numbers(const ps_plan *p, ps_err *err)
{
    const ps_plan_spec *s = &p->spec;
    const ps_hparams *hp = &p->model->hp;
    if (s->n_ctx == 0 || s->n_ctx > 1u << 27)
        return ps_fail_field(
            err, PS_EREQUEST, "n_ctx", "n_ctx is %u; expected 1 to %u", s->n_ctx, 1u << 27);
    if (s->n_seq == 0 || s->n_seq > 4096)
        return ps_fail_field(
            err, PS_EREQUEST, "n_seq", "n_seq is %u; expected 1 to 4096", s->n_seq);
    if (s->kv_fmt != PS_FMT_F16 && s->kv_fmt != PS_FMT_Q8_0)
        return ps_fail_field(err, PS_EREQUEST, "kv", "the KV cache can be f16 or q8_0");
    if (s->kv_fmt == PS_FMT_Q8_0 && hp->head_dim % 32 != 0)
        return ps_fail_field(err, PS_EREQUEST, "kv",
            "a q8_0 KV cache needs heads of a multiple of 32; this model's have %u", hp->head_dim);
    if (s->n_tiers == 0 || s->n_tiers > PS_MAX_TIERS)
        return ps_fail(err, PS_EPLAN, "a plan has 1 to %d tiers, not %u", PS_MAX_TIERS, s->n_tiers);
    for (uint32_t t = 0; t < s->n_tiers; t++)
        if ((t > 0 && p->tiers[t].max_tok <= p->tiers[t - 1].max_tok) ||
            (t + 1 == s->n_tiers && p->tiers[t].max_tok != UINT32_MAX))
            return ps_fail(
                err, PS_EPLAN, "tiers must ascend by max_tok and the last must be unbounded");
    if (s->slot_bytes % PS_ARENA_ALIGN != 0 || s->n_slots > 1u << 20 || s->slot_bytes > 1ull << 40)
        return ps_fail(err, PS_EPLAN,
            "%u slots of %llu bytes: slots must be a multiple of %d bytes", s->n_slots,
            (unsigned long long)s->slot_bytes, PS_ARENA_ALIGN);
    if ((unsigned)s->kv_far_side >= PS_SIDE_COUNT)
        return ps_fail(err, PS_EPLAN, "far keys are attended by the GPU or by the CPU");
    if (s->chunk_tok == 0 || s->pass_tok < s->chunk_tok || s->logit_rows == 0 ||
        s->pass_tok > 1u << 27)
        return ps_fail(err, PS_EPLAN,
            "chunk_tok %u, pass_tok %u, logit_rows %u: each must be at least 1, and pass_tok at "
            "least chunk_tok",
            s->chunk_tok, s->pass_tok, s->logit_rows);
    if (s->map_bytes_per_gib > PS_LOCKED_MAX_RATE)
        return ps_fail(err, PS_EPLAN,
            "map_bytes_per_gib is %llu: page tables larger than the memory they are of",
            (unsigned long long)s->map_bytes_per_gib);
    return PS_OK;
}

/* The ring must hold an expert whole, the vectors of any unit, and a row of any matrix in half of
 * it. */
static ps_status check_streamed(const ps_plan *p, uint32_t tier, uint32_t unit, ps_err *err)
{
    const ps_unit *u = &p->model->units[unit];
    uint64_t ring = p->spec.n_slots * p->spec.slot_bytes,
             half = ps_max_u64(p->spec.n_slots / 2, 1) * p->spec.slot_bytes;
    if (ring == 0)
        return ps_plan_refuse(
            p, tier, unit, err, "a streamed unit needs a ring; give n_slots and slot_bytes");
    if (u->n_bytes <= ring && u->kind != PS_UNIT_EXPERT) return PS_OK;
    if (u->kind == PS_UNIT_EXPERT && u->n_bytes > half)
        return ps_plan_refuse(p, tier, unit, err,
            "half the ring is smaller than one expert; give more or larger slots");
    for (uint32_t i = 0; i < u->n_weights; i++) {
        const ps_weight *w = &p->model->weights[u->first_weight + i];
        if (w->row_bytes > half)
            return ps_plan_refuse(p, tier, unit, err,
                "half the ring is smaller than one row; give more or larger slots");
        if (u->n_bytes > ring && i > 0 && w->n_rows == 1 && w[-1].n_rows > 1)
            return ps_plan_refuse(
                p, tier, unit, err, "the unit is larger than the ring; give more or larger slots");
    }
    return PS_OK;
}

static ps_status check_places(const ps_plan *p, ps_err *err)
{
    const ps_model *m = p->model;
    for (uint32_t t = 0; t < p->spec.n_tiers; t++)
        for (uint32_t u = 0; u < m->n_units; u++) {
            ps_place place = ps_plan_place(p, t, u), first = ps_plan_place(p, 0, u);
            if (place.kind > PS_PLACE_SPLIT) return ps_plan_refuse(p, t, u, err, "no such place");
            if (place.kind != PS_PLACE_CPU && !p->spec.accelerator)
                return ps_plan_refuse(
                    p, t, u, err, "this device has no memory of its own; every unit must be cpu");
            if (place.kind == PS_PLACE_STREAM) PS_TRY(check_streamed(p, t, u, err));
            if (!p->spec.per_tier_residency &&
                (place.kind == PS_PLACE_VRAM) != (first.kind == PS_PLACE_VRAM))
                return ps_plan_refuse(
                    p, t, u, err, "a unit's share of VRAM must be the same in all tiers");
        }
    return PS_OK;
}

/* ---- homes ---- */

static uint64_t align_up(uint64_t n)
{
    return (n + PS_ARENA_ALIGN - 1) / PS_ARENA_ALIGN * PS_ARENA_ALIGN;
}

static bool has_role(const ps_model *m, uint32_t unit, ps_role role)
{
    return ps_model_find(m, unit, role) != NULL;
}

static bool has_kv(const ps_unit *u)
{
    return u->kind == PS_UNIT_ATTN && u->n_rows > 0 && !ps_unit_is_cut(u);
}

/* The window of so many pages over layers of this reach; one more if there is none yet. */
static uint32_t find_window(ps_plan *p, uint32_t n_pages, uint32_t reach)
{
    for (uint32_t i = 0; i < p->n_windows; i++)
        if (p->windows[i].n_pages == n_pages && p->windows[i].reach == reach) return i;
    p->windows[p->n_windows] = (ps_kv_window){.n_pages = n_pages, .reach = reach};
    return p->n_windows++;
}

/* Where some tier attends on the CPU and another on the GPU, host memory alone serves both. A
 * window of whole pages holds the newest tokens only with one page more, because the newest is
 * filling; a window of as many pages as there are is all of it. Where the CPU attends to what is
 * far, it does so of a layer without a window too: its window is that one page. */
static void find_kv_home(ps_plan *p, uint32_t unit)
{
    uint32_t n_on[PS_SIDE_COUNT] = {0}, layer = (uint32_t)p->model->units[unit].layer;
    for (uint32_t t = 0; t < p->spec.n_tiers; t++) n_on[ps_plan_side(p, t, unit)]++;
    uint32_t vram_tok = p->has_kv_vram_tok ? p->kv_vram_tok[layer] : p->spec.n_ctx;
    uint64_t n_pages = ps_div_up_u64(vram_tok, PS_KV_PAGE_TOK) + 1;
    ps_unit_kv *kv = &p->kv[unit];
    if (n_on[PS_SIDE_DEV] == 0) {
        kv->home = PS_KV_HOST;
    } else if (n_on[PS_SIDE_HOST] > 0 || (vram_tok == 0 && p->spec.kv_far_side == PS_SIDE_DEV)) {
        kv->home = PS_KV_BACKED;
    } else if (n_pages >= p->max_pages) {
        kv->home = PS_KV_DEV;
    } else {
        kv->home = PS_KV_WINDOW;
        kv->window = find_window(p, (uint32_t)n_pages, p->model->layers[layer].window);
    }
    p->kv_backed = p->kv_backed || kv->home == PS_KV_BACKED || kv->home == PS_KV_WINDOW;
}

static void find_kv_homes(ps_plan *p)
{
    p->max_pages = (uint32_t)ps_div_up_u64(p->spec.n_ctx, PS_KV_PAGE_TOK);
    for (uint32_t u = 0; u < p->model->n_units; u++)
        if (has_kv(&p->model->units[u])) find_kv_home(p, u);
}

static bool has_far_on_cpu(const ps_plan *p)
{
    return p->n_windows > 0 && p->spec.kv_far_side == PS_SIDE_HOST;
}

/* A unit that is cut has no home but those of its parts; only single rows of a tied head are looked
 * up wherever they belong, so that one stays in host memory as it is in the file. */
static void find_homes_of_cut(ps_plan *p, uint32_t unit)
{
    const ps_unit *u = &p->model->units[unit];
    ps_unit_home *homes = p->homes;
    homes[unit] = (ps_unit_home){.host = (int32_t)unit == p->model->embed};
    for (uint32_t i = u->first_part; i < u->first_part + u->n_parts; i++)
        homes[i].host = homes[i].host && !homes[unit].host;
    for (uint32_t t = 0; t < p->spec.n_tiers; t++) /* where the CPU alone computes, its norms too */
        if (ps_plan_side(p, t, unit) == PS_SIDE_HOST) homes[u->first_part].host = true;
}

static void find_homes(ps_plan *p)
{
    const ps_model *m = p->model;
    p->uses[PS_SIDE_HOST] = has_far_on_cpu(p);
    for (uint32_t u = 0; u < m->n_units; u++)
        for (uint32_t t = 0; t < p->spec.n_tiers; t++) {
            ps_side side = ps_plan_side(p, t, u);
            p->uses[side] = true;
            if (ps_plan_place(p, t, u).kind != PS_PLACE_VRAM) p->homes[u].host = true;
        }
    for (uint32_t u = 0; u < m->n_units; u++)
        if (ps_unit_is_cut(&m->units[u])) find_homes_of_cut(p, u);
    /* Biases of experts belong to the router but are needed wherever an expert computes; on the GPU
     * they are resident, so that bringing them in can never push a group of experts out of the
     * ring. */
    for (uint32_t i = 0; i < m->hp.n_layer; i++) {
        int32_t r = m->layers[i].router;
        if (r < 0 || !has_role(m, (uint32_t)r, PS_W_GATE_B)) continue;
        for (uint32_t e = 0; e < m->hp.n_expert; e++)
            for (uint32_t t = 0; t < p->spec.n_tiers; t++) {
                if (ps_plan_side(p, t, (uint32_t)m->layers[i].first_expert + e) == PS_SIDE_HOST)
                    p->homes[r].host = true;
                else
                    p->homes[r].always = true;
            }
    }
}

/* ---- residents ---- */

static bool is_resident(const ps_plan *p, uint32_t tier, uint32_t unit)
{
    return p->homes[unit].always || ps_plan_place(p, tier, unit).kind == PS_PLACE_VRAM;
}

static bool same_residents(const ps_plan *p, uint32_t a, uint32_t b)
{
    for (uint32_t u = 0; u < p->model->n_units; u++)
        if (is_resident(p, a, u) != is_resident(p, b, u)) return false;
    return true;
}

/* Of the first tier of each residency, its number in `first`. */
static void find_residencies(ps_plan *p, uint32_t first[PS_MAX_TIERS])
{
    for (uint32_t t = 0; t < p->spec.n_tiers; t++) {
        uint32_t r = 0;
        while (r < p->n_residencies && !same_residents(p, t, first[r])) r++;
        if (r == p->n_residencies) first[p->n_residencies++] = t;
        p->residency_of[t] = r;
        if (!p->spec.per_tier_residency) return; /* the others are 0, too */
    }
}

/* The more residencies have a unit, the lower it lies: so what all have is at the same address in
 * each, and of two residencies of which one is part of the other, the smaller one. */
static void lay_out_residents(ps_plan *p, const uint32_t first[PS_MAX_TIERS])
{
    uint32_t n_units = p->model->n_units, n = p->n_residencies;
    uint64_t at[PS_MAX_TIERS + 1] = {0};
    for (uint64_t i = 0; i < (uint64_t)(n + 1) * n_units; i++) p->resident_at[i] = UINT64_MAX;
    for (uint32_t count = n; count > 0; count--)
        for (uint32_t u = 0; u < n_units; u++) {
            bool has[PS_MAX_TIERS + 1] = {false};
            uint32_t n_has = 0;
            for (uint32_t r = 0; r < n; r++) n_has += has[r] = is_resident(p, first[r], u);
            if (n_has != count) continue;
            has[n] = count == n;
            for (uint32_t r = 0; r <= n; r++) {
                if (!has[r]) continue;
                p->resident_at[(size_t)r * n_units + u] = at[r];
                at[r] += align_up(p->model->units[u].n_bytes);
            }
        }
    for (uint32_t r = 0; r < n; r++)
        p->space_bytes[PS_SPACE_DEV_WEIGHTS] =
            ps_max_u64(p->space_bytes[PS_SPACE_DEV_WEIGHTS], at[r]);
}

static bool has_all_of(const ps_plan *p, ps_residency held, ps_residency wanted)
{
    for (uint32_t u = 0; u < p->model->n_units; u++) {
        uint64_t at = ps_plan_resident_at(p, wanted, u);
        if (at != UINT64_MAX && ps_plan_resident_at(p, held, u) != at) return false;
    }
    return true;
}

static ps_status place_residents(ps_plan *p, ps_err *err)
{
    uint32_t first[PS_MAX_TIERS] = {0};
    find_residencies(p, first);
    uint32_t n = p->n_residencies;
    p->resident_at = ps_alloc((uint64_t)(n + 1) * p->model->n_units, sizeof *p->resident_at);
    if (p->resident_at == NULL)
        return ps_fail(err, PS_ENOMEM, "no host memory for a plan of %u units", p->model->n_units);
    lay_out_residents(p, first);
    for (uint32_t held = 0; held <= n; held++)
        for (uint32_t r = 0; r < n; r++) p->holds[held][r] = has_all_of(p, held, r);
    return PS_OK;
}

uint32_t ps_plan_found(const ps_plan *p, ps_residency held, uint32_t tier)
{
    return p->holds[held][p->residency_of[tier]] ? 0 : held + 1;
}

ps_residency ps_plan_held_after(const ps_plan *p, ps_residency held, uint32_t tier)
{
    return ps_plan_found(p, held, tier) == 0 ? held : p->residency_of[tier];
}

bool ps_plan_must_bring(const ps_plan *p, uint32_t found, uint32_t tier, uint32_t unit)
{
    uint64_t at = ps_plan_resident_at(p, p->residency_of[tier], unit);
    return found > 0 && at != UINT64_MAX && ps_plan_resident_at(p, found - 1, unit) != at;
}

bool ps_plan_comes_and_goes(const ps_plan *p, uint32_t unit)
{
    if (ps_plan_resident_at(p, p->n_residencies, unit) != UINT64_MAX) return false;
    for (uint32_t r = 0; r < p->n_residencies; r++)
        if (ps_plan_resident_at(p, r, unit) != UINT64_MAX) return true;
    return false;
}

/* ---- buffers ---- */

/* Whether the GPU computes experts for a router on the CPU in some tier. The other way round it
 * reads the CPU's rows where they are. */
static bool has_far_experts(const ps_plan *p)
{
    const ps_model *m = p->model;
    for (uint32_t t = 0; t < p->spec.n_tiers; t++)
        for (uint32_t u = 0; u < m->n_units; u++) {
            const ps_unit *x = &m->units[u];
            if (x->kind == PS_UNIT_EXPERT && ps_plan_side(p, t, u) == PS_SIDE_DEV &&
                ps_plan_side(p, t, (uint32_t)m->layers[x->layer].router) == PS_SIDE_HOST)
                return true;
        }
    return false;
}

/* Whether passes may gather experts: some are streamed, and one token uses half of them at most. */
static bool gathers_experts(const ps_plan *p)
{
    const ps_model *m = p->model;
    if (m->hp.n_expert_used * 2ull > m->hp.n_expert) return false;
    for (uint32_t t = 0; t < p->spec.n_tiers; t++)
        for (uint32_t u = 0; u < m->n_units; u++)
            if (m->units[u].kind == PS_UNIT_EXPERT &&
                ps_plan_place(p, t, u).kind == PS_PLACE_STREAM)
                return true;
    return false;
}

/* What the host side needs: nothing where it never computes, hidden states where it only looks
 * tokens up, all else. */
static uint64_t host_act_bytes(const ps_plan *p, uint64_t all)
{
    bool embeds = false;
    if (has_far_on_cpu(p)) return all;
    for (uint32_t t = 0; t < p->spec.n_tiers; t++)
        for (uint32_t u = 0; u < p->model->n_units; u++) {
            bool embed = (int32_t)u == p->model->embed;
            if (ps_plan_side(p, t, u) == PS_SIDE_HOST && !(embed && u != (uint32_t)p->model->head))
                return all;
            embeds = embeds || (embed && ps_plan_place(p, t, u).kind != PS_PLACE_VRAM);
        }
    return embeds ? p->buf_offset[PS_BUF_X] + p->buf_bytes[PS_BUF_X] : 0;
}

static void size_buffers(ps_plan *p)
{
    const ps_hparams *hp = &p->model->hp;
    const ps_plan_spec *s = &p->spec;
    uint64_t c = s->chunk_tok, f = sizeof(float), nq = (uint64_t)hp->n_head * hp->head_dim,
             nk = (uint64_t)hp->n_kv_head * hp->head_dim;
    uint64_t assigned = c * hp->n_expert_used;
    bool fused = false, split_qkv = false, post = false, dense = false, experts = false;
    for (uint32_t i = 0; i < hp->n_layer; i++) {
        const ps_layer *y = &p->model->layers[i];
        bool is_cut = ps_unit_is_cut(&p->model->units[y->attn]), /* then parts have three weights */
            is_fused = has_role(p->model, (uint32_t)y->attn, PS_W_QKV) && !is_cut;
        fused = fused || is_fused;
        split_qkv = split_qkv || !is_fused;
        post = post || has_role(p->model, (uint32_t)y->attn, PS_W_POST_NORM) ||
               (y->ffn >= 0 && has_role(p->model, (uint32_t)y->ffn, PS_W_POST_NORM));
        dense = dense || y->ffn >= 0;
        experts = experts || y->router >= 0;
    }
    uint64_t *b = p->buf_bytes;
    b[PS_BUF_X] = (uint64_t)s->pass_tok * hp->n_embd * f;
    b[PS_BUF_NORM] = c * hp->n_embd * f;
    b[PS_BUF_OUT] = post ? c * hp->n_embd * f : 0;
    b[PS_BUF_Q] = c * (fused ? nq + 2 * nk : nq) * f;
    b[PS_BUF_K] = b[PS_BUF_V] = split_qkv ? c * nk * f : 0;
    b[PS_BUF_ATT] = c * nq * f;
    if (p->n_windows > 0) b[PS_BUF_FAR] = ps_min_u64(c, PS_FAR_ROWS) * (nq + 4ull * hp->n_head) * f;
    b[PS_BUF_GATE] = dense && hp->ffn_gated ? c * hp->n_ff * f : 0;
    b[PS_BUF_UP] = dense ? c * hp->n_ff * (hp->fused_gate_up ? 2 : 1) * f : 0;
    b[PS_BUF_ROUTER] = experts ? c * hp->n_expert * f : 0;
    b[PS_BUF_ROUTE] = experts ? (3 * assigned + hp->n_expert + 1) * sizeof(int32_t) : 0;
    b[PS_BUF_PTRS] = experts && gathers_experts(p) ? 3ull * hp->n_expert * sizeof(ps_dptr) : 0;
    b[PS_BUF_H] = experts ? assigned * hp->n_ff_expert * f : 0;
    b[PS_BUF_Y] = experts ? assigned * hp->n_embd * f : 0;
    b[PS_BUF_Y_OTHER] = experts && has_far_experts(p) ? b[PS_BUF_Y] : 0;
    b[PS_BUF_ROWS] = (uint64_t)s->logit_rows * hp->n_embd * f;
    b[PS_BUF_LOGITS] = (uint64_t)s->logit_rows * hp->n_vocab * f;
}

/* Attention, feed-forward and head never hold values at the same time, so their buffers share one
 * region. */
static uint64_t lay_out_buffers(ps_plan *p)
{
    static const ps_buf always[] = {PS_BUF_X, PS_BUF_NORM, PS_BUF_OUT, PS_BUF_WS};
    static const ps_buf phases[][7] = {
        {PS_BUF_Q, PS_BUF_K, PS_BUF_V, PS_BUF_ATT, PS_BUF_FAR, PS_BUF_COUNT},
        {PS_BUF_GATE, PS_BUF_UP, PS_BUF_COUNT},
        {PS_BUF_ROUTER, PS_BUF_ROUTE, PS_BUF_PTRS, PS_BUF_H, PS_BUF_Y, PS_BUF_Y_OTHER,
            PS_BUF_COUNT},
        {PS_BUF_ROWS, PS_BUF_LOGITS, PS_BUF_COUNT},
    };
    uint64_t at = 0, end = 0;
    for (size_t i = 0; i < sizeof always / sizeof *always; i++) {
        p->buf_offset[always[i]] = at;
        at += align_up(p->buf_bytes[always[i]]);
    }
    end = at;
    for (size_t i = 0; i < sizeof phases / sizeof *phases; i++) {
        uint64_t next = at;
        for (int j = 0; j < 7 && phases[i][j] != PS_BUF_COUNT; j++) {
            p->buf_offset[phases[i][j]] = next;
            next += align_up(p->buf_bytes[phases[i][j]]);
        }
        end = ps_max_u64(end, next);
    }
    return end;
}

static bool streams(const ps_plan *p)
{
    for (uint64_t i = 0; i < (uint64_t)p->spec.n_tiers * p->model->n_units; i++)
        if (p->places[i].kind == PS_PLACE_STREAM) return true;
    return false;
}

/* The cache of each attention unit, or of each part's heads, on its side. */
static ps_status lay_out_kv(ps_plan *p, ps_err *err)
{
    const ps_hparams *hp = &p->model->hp;
    uint64_t *bytes = p->space_bytes, row = 0, layer_kv = 0, n_pages = 0;
    n_pages = (uint64_t)p->max_pages * p->spec.n_seq;
    if (!ps_fmt_row_bytes(p->spec.kv_fmt, hp->head_dim, &row) ||
        !ps_mul_u64(row * PS_KV_PAGE_TOK, hp->n_kv_head, &p->kv_page_bytes) ||
        !ps_mul_u64(p->kv_page_bytes, 2 * n_pages, &layer_kv) ||
        layer_kv > UINT64_MAX / 2 / hp->n_layer)
        return ps_fail_field(err, PS_EREQUEST, "n_ctx",
            "a KV cache of %u sequences of %u tokens overflows", p->spec.n_seq, p->spec.n_ctx);
    for (uint32_t u = 0; u < p->model->n_units; u++) {
        if (!has_kv(&p->model->units[u])) continue;
        ps_unit_kv *kv = &p->kv[u];
        ps_space space = kv->home == PS_KV_DEV ? PS_SPACE_DEV_KV : PS_SPACE_HOST_KV;
        kv->offset = bytes[space];
        kv->page_bytes = row * PS_KV_PAGE_TOK * p->model->units[u].n_rows;
        kv->v_skip = kv->page_bytes * n_pages;
        bytes[space] += 2 * kv->v_skip;
        if (kv->home != PS_KV_WINDOW) continue;
        kv->near_offset = bytes[PS_SPACE_DEV_KV];
        kv->near_v_skip = kv->page_bytes * p->windows[kv->window].n_pages * p->spec.n_seq;
        bytes[PS_SPACE_DEV_KV] += 2 * kv->near_v_skip;
    }
    p->kv_stage_offset = bytes[PS_SPACE_DEV_KV];
    if (p->kv_backed) {
        bytes[PS_SPACE_DEV_KV] += PS_KV_STAGES * 2 * p->kv_page_bytes * p->max_pages;
        bytes[PS_SPACE_HOST_KV_DEV] = bytes[PS_SPACE_HOST_KV];
    }
    return PS_OK;
}

static ps_status lay_out(ps_plan *p, ps_err *err)
{
    const ps_hparams *hp = &p->model->hp;
    uint64_t *bytes = p->space_bytes;

    PS_TRY(place_residents(p, err));
    if (streams(p)) bytes[PS_SPACE_DEV_RING] = p->spec.n_slots * p->spec.slot_bytes;
    PS_TRY(lay_out_kv(p, err));
    size_buffers(p);
    PS_TRY(ps_plan_measure(p, &p->buf_bytes[PS_BUF_WS], &p->n_table, err));
    uint64_t act = lay_out_buffers(p);
    if (p->uses[PS_SIDE_DEV]) bytes[PS_SPACE_DEV_ACT] = act;
    bytes[PS_SPACE_HOST_ACT] = host_act_bytes(p, act);
    if (p->spec.accelerator) bytes[PS_SPACE_HOST_ACT_DEV] = bytes[PS_SPACE_HOST_ACT];

    uint64_t at = 0;
    for (uint32_t i = 0; i < hp->n_rope; i++) {
        p->rope_offset[i] = at;
        at += align_up((uint64_t)hp->n_rot / 2 * sizeof(float));
    }
    p->tables_offset = at;
    at += align_up((uint64_t)p->n_table * sizeof(ps_dptr));
    bytes[PS_SPACE_HOST_CONST] = at;
    if (p->uses[PS_SIDE_DEV]) bytes[PS_SPACE_DEV_CONST] = at;
    for (int staged = 0; staged <= p->kv_backed; staged++) {
        ps_batch_layout batch = {0};
        ps_pass_shape largest = {
            .n_tok = p->spec.pass_tok, .n_out = p->spec.pass_tok, .staged = staged != 0};
        ps_batch_lay_out(p, &largest, &batch);
        bytes[PS_SPACE_HOST_BATCH] = ps_max_u64(bytes[PS_SPACE_HOST_BATCH], batch.n_bytes);
    }
    /* Even a plan that leaves everything on the CPU keeps this much, so that "needs" is never zero.
     */
    if (p->spec.accelerator) bytes[PS_SPACE_DEV_BATCH] = bytes[PS_SPACE_HOST_BATCH];
    return PS_OK;
}

const ps_dev_space ps_dev_spaces[PS_DEV_SPACE_COUNT] = {{PS_SPACE_DEV_WEIGHTS, PS_MEM_WEIGHTS},
    {PS_SPACE_DEV_RING, PS_MEM_RING}, {PS_SPACE_DEV_KV, PS_MEM_KV}, {PS_SPACE_DEV_ACT, PS_MEM_ACT},
    {PS_SPACE_DEV_BATCH, PS_MEM_BATCH}, {PS_SPACE_DEV_CONST, PS_MEM_BATCH}};

static ps_status sum_up(ps_plan *p, ps_err *err)
{
    uint64_t at = 0;
    for (size_t i = 0; i < PS_DEV_SPACE_COUNT; i++) {
        ps_dev_space row = ps_dev_spaces[i];
        p->dev_base[row.space] = at;
        uint64_t n = align_up(p->space_bytes[row.space]);
        p->bytes_by_kind[row.kind] += n;
        at += n;
    }
    if (p->uses[PS_SIDE_DEV]) p->bytes_by_kind[PS_MEM_GRAPH] = p->spec.graph_reserve_bytes;
    PS_TRY(ps_locked_most(p, &p->locked_image_bytes, &p->locked_bytes, err));
    p->bytes_by_kind[PS_MEM_MAP] = ps_locked_map_bytes(&p->spec, p->locked_bytes);
    for (int k = 0; k < PS_MEM_KIND_COUNT; k++) /* a reserve can be any number */
        if (!ps_add_u64(p->needed_bytes, p->bytes_by_kind[k], &p->needed_bytes))
            p->needed_bytes = UINT64_MAX;
    return PS_OK;
}

/* ---- creation ---- */

static void *copy_of(const void *src, uint64_t n, uint64_t size)
{
    void *dst = ps_alloc(n, size);
    if (dst != NULL && src != NULL) memcpy(dst, src, n * size);
    return dst;
}

static ps_status fill(ps_plan *p, const ps_plan_spec *spec, ps_err *err)
{
    const ps_model *m = p->model;
    if (spec->n_tiers == 0 || spec->n_tiers > PS_MAX_TIERS)
        return ps_fail(
            err, PS_EPLAN, "a plan has 1 to %d tiers, not %u", PS_MAX_TIERS, spec->n_tiers);
    p->spec = *spec;
    p->spec.tiers = p->tiers = copy_of(spec->tiers, spec->n_tiers, sizeof *p->tiers);
    p->spec.places = p->places =
        copy_of(spec->places, (uint64_t)spec->n_tiers * m->n_units, sizeof *p->places);
    p->spec.kv_vram_tok = p->kv_vram_tok =
        copy_of(spec->kv_vram_tok, m->hp.n_layer, sizeof *p->kv_vram_tok);
    p->has_kv_vram_tok = spec->kv_vram_tok != NULL;
    if (p->tiers == NULL || p->places == NULL || p->kv_vram_tok == NULL)
        return ps_fail(err, PS_ENOMEM, "no host memory for a plan of %u units", m->n_units);
    PS_TRY(check_numbers(p, err));
    PS_TRY(ps_cut_places(p, err));
    m = p->model;
    p->homes = ps_alloc(m->n_units, sizeof *p->homes);
    p->kv = ps_alloc(m->n_units, sizeof *p->kv);
    p->windows = ps_alloc(m->hp.n_layer, sizeof *p->windows);
    if (p->homes == NULL || p->kv == NULL || p->windows == NULL)
        return ps_fail(err, PS_ENOMEM, "no host memory for a plan of %u units", m->n_units);
    PS_TRY(check_places(p, err));
    find_kv_homes(p);
    find_homes(p);
    for (uint32_t i = 0; i < m->hp.n_rope; i++) {
        float freq[PS_MAX_HEAD_DIM / 2];
        PS_TRY(ps_model_rope(m, i, spec->n_ctx, freq, &p->rope_mag[i], err));
    }
    PS_TRY(lay_out(p, err));
    PS_TRY(sum_up(p, err));
    if (spec->accelerator && p->needed_bytes > spec->budget_bytes) {
        ps_fail(err, PS_EBUDGET,
            "this placement needs %.1f MiB of VRAM, and the budget is %.1f MiB",
            (double)p->needed_bytes / (1 << 20), (double)spec->budget_bytes / (1 << 20));
        if (err != NULL) {
            err->needed = p->needed_bytes;
            err->budget = spec->budget_bytes;
        }
        return PS_EBUDGET;
    }
    return PS_OK;
}

ps_status ps_plan_create(
    const ps_model *model, const ps_plan_spec *spec, ps_plan **out, ps_err *err)
{
    *out = NULL;
    ps_plan *p = ps_alloc(1, sizeof *p);
    if (p == NULL) return ps_fail(err, PS_ENOMEM, "no host memory for a plan");
    p->model = model;
    ps_status status = fill(p, spec, err);
    if (status != PS_OK)
        ps_plan_destroy(p);
    else
        *out = p;
    return status;
}

void ps_plan_destroy(ps_plan *plan)
{
    if (plan == NULL) return;
    ps_free(plan->tiers);
    ps_free(plan->places);
    ps_free(plan->kv_vram_tok);
    ps_free(plan->homes);
    ps_free(plan->resident_at);
    ps_free(plan->kv);
    ps_free(plan->windows);
    ps_cut_destroy(plan->cut);
    ps_free(plan);
}

uint64_t ps_plan_cpu_scratch_bytes(
    const ps_model *model, uint32_t n_ctx, uint32_t chunk_tok, int threads)
{
    const ps_hparams *hp = &model->hp;
    uint32_t cols = hp->n_embd, k = hp->n_expert_used > 0 ? hp->n_expert_used : 1;
    if (hp->n_ff > cols) cols = hp->n_ff;
    if (hp->n_ff_expert > cols) cols = hp->n_ff_expert;
    if (hp->n_head * hp->head_dim > cols) cols = hp->n_head * hp->head_dim;
    return ps_cpu_scratch_bytes(&(ps_cpu_bounds){.max_cols = cols,
        .max_tok = chunk_tok,
        .max_rows = chunk_tok * k,
        .max_ctx = (n_ctx + PS_KV_PAGE_TOK - 1) / PS_KV_PAGE_TOK * PS_KV_PAGE_TOK,
        .max_head_dim = hp->head_dim,
        .n_head = hp->n_head,
        .threads = (uint32_t)(threads > 0 ? threads : 1)});
}
