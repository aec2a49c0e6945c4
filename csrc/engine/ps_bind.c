/* ps_bind - see ps_bind.h. */
#include "engine/ps_bind.h"

#include <string.h>

#include "engine/ps_images.h"

ps_dptr ps_bind_ref(const ps_model *model, const ps_bases *bases, ps_dptr ref)
{
    if (ref.a == 0) return ref;
    ps_space space = ps_ref_space(ref);
    uint64_t offset = ps_ref_offset(ref);
    uint32_t unit = (uint32_t)(offset >> PS_IMAGE_SHIFT);
    uint64_t in_image = offset & ((1ull << PS_IMAGE_SHIFT) - 1);
    if (space == PS_SPACE_HOST_WEIGHTS_DEV) return ps_dptr_add(bases->image_dev[unit], in_image);
    if (space != PS_SPACE_HOST_WEIGHTS) return ps_dptr_add(bases->space[space], offset);
    const unsigned char *image =
        unit < model->n_units ? ps_model_image(model, unit) : ps_images_get(bases->parts, unit);
    return (ps_dptr){(uint64_t)(uintptr_t)image + in_image};
}

static void bind_args(
    const ps_model *model, const ps_bases *bases, ps_op_kind op, unsigned char *args)
{
    ps_operand operands[PS_MAX_OPERANDS];
    uint32_t n = ps_op_operands(op, args, operands);
    for (uint32_t i = 0; i < n; i++) {
        ps_dptr ref;
        memcpy(&ref, args + operands[i].offset, sizeof ref);
        ref = ps_bind_ref(model, bases, ref);
        memcpy(args + operands[i].offset, &ref, sizeof ref);
    }
}

/* Neighbours that copy neighbouring bytes become one copy: the bus likes large ones. */
static void merge_copies(ps_ticks *t, ps_cost *cost)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < t->n_ticks; i++) {
        const ps_tick *k = &t->tick[i];
        ps_tick *last = n > 0 ? &t->tick[n - 1] : NULL;
        if (last != NULL && k->kind == PS_TICK_COPY_IN && last->kind == PS_TICK_COPY_IN &&
            last->dst.a + last->n_bytes == k->dst.a && last->src.a + last->n_bytes == k->src.a)
            last->n_bytes += k->n_bytes;
        else {
            cost[n] = cost[i];
            t->tick[n++] = *k;
        }
    }
    t->n_ticks = n;
}

ps_status ps_bind(
    const ps_model *model, const ps_bases *bases, ps_ticks *ticks, ps_bound **out, ps_err *err)
{
    *out = NULL;
    ps_bound *b = ps_alloc(1, sizeof *b);
    ps_cost *cost = ps_alloc((uint64_t)ticks->n_ticks + 1, sizeof *cost);
    if (b == NULL || cost == NULL) {
        ps_free(b);
        ps_free(cost);
        ps_fail(err, PS_ENOMEM, "no host memory to bind %u ticks", ticks->n_ticks);
        ps_ticks_destroy(ticks);
        return PS_ENOMEM;
    }
    b->ticks = ticks;
    b->cost = cost;
    /* While tables can be found by their references. */
    for (uint32_t i = 0; i < ticks->n_ticks; i++) cost[i] = ps_tick_cost(ticks, i);
    for (uint32_t i = 0; i < ticks->n_ticks; i++) {
        ps_tick *k = &ticks->tick[i];
        if (k->kind == PS_TICK_RUN) {
            bind_args(model, bases, (ps_op_kind)k->op, ticks->args + k->index);
        } else if (k->kind == PS_TICK_COPY_IN || k->kind == PS_TICK_COPY_OUT) {
            k->dst = ps_bind_ref(model, bases, k->dst);
            k->src = ps_bind_ref(model, bases, k->src);
        }
    }
    merge_copies(ticks, cost);
    for (uint32_t i = 0; i < ticks->n_ticks; i++) {
        const ps_tick *k = &ticks->tick[i];
        b->n_ticks_on[k->stream]++;
        if (k->kind == PS_TICK_RUN) {
            cost[i].op = k->op;
            cost[i].tick = i;
        } else if (k->kind == PS_TICK_COPY_IN) {
            b->h2d_bytes += k->n_bytes;
        } else if (k->kind == PS_TICK_COPY_OUT) {
            b->d2h_bytes += k->n_bytes;
        }
    }
    *out = b;
    return PS_OK;
}

void ps_bound_destroy(ps_bound *b)
{
    if (b == NULL) return;
    ps_ticks_destroy(b->ticks);
    ps_free(b->cost);
    ps_free(b);
}
