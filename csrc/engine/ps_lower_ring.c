/* ps_lower_ring - where streamed units lie while a pass is lowered: slots used round and round,
 * copies into them, and the addresses of weights. See ps_lower_priv.h.
 */
#include "engine/ps_lower_priv.h"

enum { BRING_BYTES = 32 << 20 }; /* copied at once where there are no slots to go by */

uint64_t ps_lower_ring_bytes(const lowering *l)
{
    return l->plan->spec.n_slots * l->plan->spec.slot_bytes;
}
bool ps_lower_fits_ring(const lowering *l, uint32_t unit)
{
    return l->model->units[unit].n_bytes <= ps_lower_ring_bytes(l);
}

/* Room for n_bytes in consecutive slots. What lies there may still be in use: the emitter makes the
 * copies wait. */
uint64_t ps_lower_take_slots(lowering *l, int32_t owner, uint64_t n_bytes)
{
    const ps_plan_spec *s = &l->plan->spec;
    uint32_t n = (uint32_t)ps_div_up_u64(n_bytes, s->slot_bytes);
    if (l->next_slot + n > s->n_slots) l->next_slot = 0;
    uint64_t at = (uint64_t)l->next_slot * s->slot_bytes;
    for (uint32_t i = 0; i < n; i++) l->slot_owner[l->next_slot++] = owner;
    return at;
}

bool ps_lower_is_live(const lowering *l, int32_t owner, uint64_t at, uint64_t n_bytes)
{
    uint64_t slot = l->plan->spec.slot_bytes;
    for (uint64_t i = at / slot; i < ps_div_up_u64(at + n_bytes, slot); i++)
        if (l->slot_owner[i] != owner) return false;
    return true;
}

ps_dptr ps_lower_at_host(const lowering *l, uint32_t unit, uint64_t offset)
{
    const ps_unit *u = &l->model->units[unit];
    if (u->of >= 0 && u->n_rows > 0 && l->plan->homes[u->of].host) {
        /* Rows of a tied head: they lie in the image of the whole. */
        const ps_weight *w = ps_model_find(l->model, (uint32_t)u->of, PS_W_HEAD);
        offset += w->offset + u->first_row * w->row_bytes;
        unit = (uint32_t)u->of;
    }
    return ps_ref(PS_SPACE_HOST_WEIGHTS, (uint64_t)unit << PS_IMAGE_SHIFT | offset);
}

/* A copy is never larger than a slot: what needs only the first bytes must not wait for the last.
 */
void ps_lower_copy_pieces(
    lowering *l, uint32_t unit, uint64_t ring_at, uint64_t image_at, uint64_t n_bytes)
{
    for (uint64_t done = 0; done < n_bytes;) {
        uint64_t n = ps_min_u64(l->plan->spec.slot_bytes, n_bytes - done);
        ps_dptr src = ps_lower_at_host(l, unit, image_at + done);
        ps_emit_copy(l->e, true, (int32_t)unit, ps_ref(PS_SPACE_DEV_RING, ring_at + done), src, n);
        done += n;
    }
}

/* ---- residents ---- */

uint64_t ps_lower_home(const lowering *l, uint32_t unit)
{
    return ps_plan_resident_at(l->plan, l->plan->residency_of[l->shape.tier], unit);
}

static void bring(lowering *l, uint32_t unit)
{
    uint64_t most = l->plan->spec.slot_bytes, n_bytes = l->model->units[unit].n_bytes, n;
    if (!ps_plan_must_bring(l->plan, l->shape.found, l->shape.tier, unit)) return;
    if (most == 0) most = BRING_BYTES;
    for (uint64_t done = 0; done < n_bytes; done += n) {
        n = ps_min_u64(most, n_bytes - done);
        ps_emit_copy(l->e, true, (int32_t)unit,
            ps_ref(PS_SPACE_DEV_WEIGHTS, ps_lower_home(l, unit) + done),
            ps_lower_at_host(l, unit, done), n);
    }
}

void ps_lower_bring(lowering *l, uint32_t unit)
{
    const ps_unit *u = &l->model->units[unit];
    if (l->shape.found == 0 || l->measures) return;
    bring(l, unit);
    for (uint32_t i = u->first_part; i < u->first_part + u->n_parts; i++) bring(l, i);
}

void ps_lower_bring_layer(lowering *l, uint32_t layer)
{
    const ps_layer *y = &l->model->layers[layer];
    ps_lower_bring(l, (uint32_t)y->attn);
    if (y->ffn >= 0) ps_lower_bring(l, (uint32_t)y->ffn);
    if (y->router < 0) return;
    ps_lower_bring(l, (uint32_t)y->router);
    for (uint32_t e = 0; e < l->hp->n_expert; e++) ps_lower_bring(l, (uint32_t)y->first_expert + e);
}

uint32_t ps_lower_resident_experts(const lowering *l, uint32_t layer, ps_range *out)
{
    uint32_t n = 0, first = (uint32_t)l->model->layers[layer].first_expert;
    if (l->shape.found == 0 || l->measures) return 0;
    for (uint32_t u = first; u < first + l->hp->n_expert; u++) {
        uint64_t at = ps_lower_home(l, u), n_bytes = l->model->units[u].n_bytes;
        if (at == UINT64_MAX) continue;
        uint64_t end = n > 0 ? ps_ref_offset(out[n - 1].ref) + out[n - 1].n_bytes : 0;
        if (n > 0 && at >= end && at - end < PS_ARENA_ALIGN) /* nothing fits between */
            out[n - 1].n_bytes = at + n_bytes - ps_ref_offset(out[n - 1].ref);
        else
            out[n++] = (ps_range){ps_ref(PS_SPACE_DEV_WEIGHTS, at), n_bytes, PS_READ};
    }
    return n;
}

/* ---- streamed units ---- */

/* What of a unit is loaded at once: all of it, or where the ring is smaller, the vectors before its
 * first matrix; the matrices then come by rows (emit_matmul_by_rows). */
static uint64_t load_bytes(const lowering *l, uint32_t unit)
{
    const ps_unit *u = &l->model->units[unit];
    if (ps_lower_fits_ring(l, unit)) return u->n_bytes;
    uint64_t n_bytes = 0;
    for (uint32_t i = 0; i < u->n_weights && l->model->weights[u->first_weight + i].n_rows == 1;
         i++)
        n_bytes = l->model->weights[u->first_weight + i].offset +
                  l->model->weights[u->first_weight + i].row_bytes;
    return n_bytes;
}

/* Sees to it that a streamed unit lies in the ring: brings it in at first use, and again if later
 * loads took its slots. So a unit crosses the bus once for all chunks of a prompt whenever the ring
 * can hold it. */
static void stream_in(lowering *l, uint32_t unit)
{
    uint64_t n_bytes = load_bytes(l, unit);
    if (l->ring_at[unit] != UINT64_MAX &&
        ps_lower_is_live(l, (int32_t)unit, l->ring_at[unit], n_bytes))
        return;
    l->ring_at[unit] = ps_lower_take_slots(l, (int32_t)unit, n_bytes);
    ps_lower_copy_pieces(l, unit, l->ring_at[unit], 0, n_bytes);
}

ps_dptr ps_lower_at_weight(lowering *l, ps_side side, uint32_t unit, const ps_weight *w)
{
    if (side == PS_SIDE_HOST) return ps_lower_at_host(l, unit, w->offset);
    /* Asked first: biases of experts are resident even where their router streams. */
    uint64_t home = ps_lower_home(l, unit);
    if (home != UINT64_MAX) return ps_ref(PS_SPACE_DEV_WEIGHTS, home + w->offset);
    if (l->model->units[unit].kind == PS_UNIT_EXPERT) { /* in groups, or not at all */
        if (ps_lower_is_mapped(l, unit))
            return ps_ref(PS_SPACE_HOST_WEIGHTS_DEV, (uint64_t)unit << PS_IMAGE_SHIFT | w->offset);
    } else {
        stream_in(l, unit);
    }
    return ps_ref(PS_SPACE_DEV_RING, l->ring_at[unit] + w->offset);
}

/* A 1-D weight, or null where the unit has none. */
ps_dptr ps_lower_vector(lowering *l, ps_side side, uint32_t unit, ps_role role)
{
    const ps_weight *w = ps_model_find(l->model, unit, role);
    return w != NULL ? ps_lower_at_weight(l, side, unit, w) : (ps_dptr){0};
}
