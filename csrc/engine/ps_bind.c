/* ps_bind - see ps_bind.h. */
#include "engine/ps_bind.h"

#include <string.h>

ps_dptr ps_bind_ref(const ps_bases *bases, ps_dptr ref)
{
    if (ref.a == 0) return ref;
    ps_space space = ps_ref_space(ref);
    if (space == PS_SPACE_HOST_WEIGHTS_DEV)
        return ps_dptr_add(bases->image_dev[ps_ref_unit(ref)], ps_ref_in_image(ref));
    if (space != PS_SPACE_HOST_WEIGHTS) return ps_dptr_add(bases->space[space], ps_ref_offset(ref));
    const void *image = ps_host_weights_image(bases->weights, ps_ref_unit(ref));
    if (image == NULL) return (ps_dptr){0};
    return (ps_dptr){(uint64_t)(uintptr_t)image + ps_ref_in_image(ref)};
}

static ps_status bind_args(const ps_bases *bases, ps_op_kind op, unsigned char *args, ps_err *err)
{
    ps_operand operands[PS_MAX_OPERANDS];
    uint32_t n = ps_op_operands(op, args, operands);
    for (uint32_t i = 0; i < n; i++) {
        ps_dptr ref, bound;
        memcpy(&ref, args + operands[i].offset, sizeof ref);
        bound = ps_bind_ref(bases, ref);
        ps_check_bug(bound.a != 0 || ref.a == 0, err); /* what ops read is never left on disk */
        memcpy(args + operands[i].offset, &bound, sizeof bound);
    }
    return PS_OK;
}

/* A copy out of an image that is not locked stays a reference. `index` tells the locked pieces
 * apart, for merge_copies. */
static void bind_copy(const ps_bases *bases, ps_bound *b, ps_tick *k)
{
    k->dst = ps_bind_ref(bases, k->dst);
    k->index = 0;
    if (ps_ref_space(k->src) == PS_SPACE_HOST_WEIGHTS) {
        uint32_t unit = ps_ref_unit(k->src);
        k->index = bases->weights->piece[unit];
        if (k->index == 0) {
            b->bounce_bytes += k->n_bytes;
            if (!bases->weights->in_memory[unit]) b->disk_bytes += k->n_bytes;
            return;
        }
    }
    k->src = ps_bind_ref(bases, k->src);
}

/* Neighbours that copy neighbouring bytes become one copy: the bus likes large ones. None crosses
 * from one piece of locked memory to another. */
static void merge_copies(ps_ticks *t, ps_cost *cost)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < t->n_ticks; i++) {
        const ps_tick *k = &t->tick[i];
        ps_tick *last = n > 0 ? &t->tick[n - 1] : NULL;
        if (last != NULL && k->kind == PS_TICK_COPY_IN && last->kind == PS_TICK_COPY_IN &&
            last->index == k->index && last->dst.a + last->n_bytes == k->dst.a &&
            last->src.a + last->n_bytes == k->src.a)
            last->n_bytes += k->n_bytes;
        else {
            cost[n] = cost[i];
            t->tick[n++] = *k;
        }
    }
    t->n_ticks = n;
}

static void count(ps_bound *b)
{
    for (uint32_t i = 0; i < b->ticks->n_ticks; i++) {
        const ps_tick *k = &b->ticks->tick[i];
        b->n_ticks_on[k->stream]++;
        if (k->kind == PS_TICK_RUN) {
            b->cost[i].op = k->op;
            b->cost[i].tick = i;
        } else if (k->kind == PS_TICK_COPY_IN) {
            b->h2d_bytes += k->n_bytes;
        } else if (k->kind == PS_TICK_COPY_OUT) {
            b->d2h_bytes += k->n_bytes;
        }
    }
}

ps_status ps_bind(const ps_bases *bases, ps_ticks *ticks, ps_bound **out, ps_err *err)
{
    *out = NULL;
    ps_bound *b = ps_alloc(1, sizeof *b);
    ps_cost *cost = ps_alloc((uint64_t)ticks->n_ticks + 1, sizeof *cost);
    ps_status status = PS_OK;
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
    for (uint32_t i = 0; i < ticks->n_ticks && status == PS_OK; i++) {
        ps_tick *k = &ticks->tick[i];
        if (k->kind == PS_TICK_RUN)
            status = bind_args(bases, (ps_op_kind)k->op, ticks->args + k->index, err);
        else if (k->kind == PS_TICK_COPY_IN || k->kind == PS_TICK_COPY_OUT)
            bind_copy(bases, b, k);
    }
    if (status != PS_OK) {
        ps_bound_destroy(b);
        return status;
    }
    merge_copies(ticks, cost);
    count(b);
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
