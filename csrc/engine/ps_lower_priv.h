/* ps_lower_priv - what the files of lowering share: the state of one lowering, references
 * into memory, the ring and the pieces that every block is made of.
 *
 * Not here: anything that other modules may call (ps_ticks.h).
 */
#ifndef PS_LOWER_PRIV_H
#define PS_LOWER_PRIV_H

#include "engine/ps_ticks.h"

/* Streamed experts of a layer that are in the ring together. */
typedef struct expert_group {
    uint32_t gate, up, down; /* first entries in the pass's tables */
    uint32_t first, n; /* streamed experts first .. first + n - 1, some of which may not stream */
    uint32_t n_here;   /* experts in its tables on the accelerator */
    uint64_t n_bytes;  /* in the ring; 0: nothing streams */
} expert_group;

typedef struct lowering {
    const ps_plan *plan;
    const ps_model *model;
    const ps_hparams *hp;
    ps_emitter *e;
    bool maps_experts;          /* ps_pass_maps_experts() of this pass */
    bool measures;              /* only sizes are wanted: neither ticks nor tables are kept */
    const uint32_t *stands_for; /* [n_layer] see ps_plan_find_alike(); NULL: each for itself */
    ps_pass_shape shape;
    const ps_batch_layout *batch;
    uint32_t n_chunks;
    uint8_t *x_on[PS_SIDE_COUNT]; /* [n_chunks] is the chunk's hidden state current there */
    bool embedded; /* hidden states are still those that the tokens were looked up as */
    /* The ring: slots side by side, so that what spans several is contiguous; used round and round.
     */
    uint32_t next_slot;
    int32_t
        *slot_owner;   /* [n_slots] unit (of a group of experts: the first) whose bytes lie there */
    uint64_t *ring_at; /* [n_units] where a streamed unit was put last; UINT64_MAX: nowhere yet */
    expert_group *groups; /* [n_expert] of the layer in hand */
} lowering;

typedef struct chunk { /* the tokens an op call works on */
    uint32_t i, first, n;
    ps_side side;
} chunk;

static inline ps_side other(ps_side side)
{
    return side == PS_SIDE_DEV ? PS_SIDE_HOST : PS_SIDE_DEV;
}

static inline ps_dptr in_buf(const lowering *l, ps_side side, ps_buf buf, uint64_t skip)
{
    return ps_ref(side == PS_SIDE_DEV ? PS_SPACE_DEV_ACT : PS_SPACE_HOST_ACT,
        l->plan->buf_offset[buf] + skip);
}

static inline ps_dptr in_batch(ps_side side, uint64_t offset)
{
    return ps_ref(side == PS_SIDE_DEV ? PS_SPACE_DEV_BATCH : PS_SPACE_HOST_BATCH, offset);
}

static inline ps_dptr in_const(ps_side side, uint64_t offset)
{
    return ps_ref(side == PS_SIDE_DEV ? PS_SPACE_DEV_CONST : PS_SPACE_HOST_CONST, offset);
}

static inline ps_dptr chunk_x(const lowering *l, chunk c)
{
    return in_buf(l, c.side, PS_BUF_X, (uint64_t)c.first * l->hp->n_embd * sizeof(float));
}

static inline ps_dptr chunk_batch(chunk c, uint64_t array)
{
    return in_batch(c.side, array + (uint64_t)c.first * sizeof(int32_t));
}

static inline chunk get_chunk(const lowering *l, uint32_t i, ps_side side)
{
    uint32_t size = l->plan->spec.chunk_tok, first = i * size, left = l->shape.n_tok - first;
    return (chunk){.i = i, .first = first, .n = left < size ? left : size, .side = side};
}

/* ---- the ring (ps_lower_ring.c) ---- */

enum { PS_RING_NOBODY = -1 }; /* owner of slots whose bytes nobody comes back for */

/* Inline, both: asked of every expert, of which there may be thousands. */
static inline bool ps_lower_is_streamed(const lowering *l, uint32_t unit)
{
    return ps_plan_place(l->plan, l->shape.tier, unit).kind == PS_PLACE_STREAM;
}

/* Is this expert, if streamed, read where it lies and not loaded? */
static inline bool ps_lower_is_mapped(const lowering *l, uint32_t unit)
{
    return l->maps_experts && (l->shape.mapped == NULL || l->shape.mapped[unit]);
}

/* Are all experts of the pass, if streamed, read where they lie? */
static inline bool ps_lower_maps_all(const lowering *l)
{
    return l->maps_experts && l->shape.mapped == NULL;
}

uint64_t ps_lower_ring_bytes(const lowering *l);
bool ps_lower_fits_ring(const lowering *l, uint32_t unit);
/* Room for n_bytes in consecutive slots. What lies there may still be in use: the emitter makes the
 * copies wait. */
uint64_t ps_lower_take_slots(lowering *l, int32_t owner, uint64_t n_bytes);
bool ps_lower_is_live(const lowering *l, int32_t owner, uint64_t at, uint64_t n_bytes);
/* Bytes of a unit's image from `offset` on, in host memory. */
ps_dptr ps_lower_at_host(const lowering *l, uint32_t unit, uint64_t offset);
/* Copies part of a unit's image, at most a slot at a time: what needs only the first bytes must not
 * wait for the last. */
void ps_lower_copy_pieces(
    lowering *l, uint32_t unit, uint64_t ring_at, uint64_t image_at, uint64_t n_bytes);
/* The address of a weight on a side; brings a streamed unit into the ring if it is not there. */
ps_dptr ps_lower_at_weight(lowering *l, ps_side side, uint32_t unit, const ps_weight *w);
/* Where a unit is resident in this tier, in DEV_WEIGHTS; UINT64_MAX: nowhere. */
uint64_t ps_lower_home(const lowering *l, uint32_t unit);
/* Copies what of a unit, or of all units of a layer, should be resident and is not there yet. */
void ps_lower_bring(lowering *l, uint32_t unit);
void ps_lower_bring_layer(lowering *l, uint32_t layer);
/* The layer's resident experts, as ranges that ops read through tables: in passes that bring any
 * units in. At most PS_MAX_TIERS, because those that as many residencies have are neighbours. */
uint32_t ps_lower_resident_experts(const lowering *l, uint32_t layer, ps_range *out);
/* A 1-D weight, or null where the unit has none. */
ps_dptr ps_lower_vector(lowering *l, ps_side side, uint32_t unit, ps_role role);

/* ---- pieces of blocks (ps_lower.c) ---- */

typedef struct linear { /* one matrix of a matmul: y = W x + bias */
    ps_role role, bias;
    ps_dptr y;
    uint32_t ldy;
} linear;

/* Activations under the address by which the GPU reaches them, wherever they are. */
ps_dptr ps_lower_mapped(ps_dptr ref);
/* 32-bit words of activations to the other side. A kernel of the GPU moves them in both directions:
 * a copy would queue behind weights on their way, and weights behind it while the CPU computes. */
void ps_lower_hand_over(lowering *l, int32_t unit, ps_dptr dst, ps_dptr src, uint64_t n);
/* Fetches the chunk's hidden states to its side; and after a block has written them there, makes
 * the other side stale. */
void ps_lower_move_x(lowering *l, chunk c);
void ps_lower_wrote_x(lowering *l, chunk c);
void ps_lower_emit_norm(lowering *l, chunk c, uint32_t unit, ps_role role, ps_dptr x,
    ps_dptr residual, ps_dptr out, uint32_t n_tok);
void ps_lower_emit_matmul(lowering *l, chunk c, uint32_t unit, ps_dptr x, uint32_t n_tok,
    uint32_t n_cols, const linear *parts, uint32_t n_parts, bool add);

/* y (+)= W in + bias: the last matrix of a block. */
void ps_lower_emit_output(lowering *l, chunk c, uint32_t unit, ps_role role, ps_role bias,
    ps_dptr in, uint32_t n_cols, ps_dptr y, bool add);

/* A block behind its norm: y (+)= block(norm), for the tokens of a chunk on its side. `unit` is the
 * whole unit or a part of it, with what it has of rows or heads. */
typedef void (*ps_lower_body)(
    lowering *l, uint32_t layer, chunk c, uint32_t unit, ps_dptr y, bool add);
/* Norm, body, norm behind it and residual, over every chunk; where the unit is split, on both sides
 * at once. */
void ps_lower_block(lowering *l, uint32_t layer, uint32_t unit, ps_lower_body body);
/* Gathers the rows that logits are wanted of and multiplies them. */
void ps_lower_head(lowering *l);

/* ---- attention (ps_lower_attn.c) ---- */

/* What the stages of a layer need of earlier tokens; sent ahead of all else that its attention
 * wants. */
void ps_lower_load_stages(lowering *l, uint32_t unit);
/* A ps_lower_body. */
void ps_lower_attn(lowering *l, uint32_t layer, chunk c, uint32_t unit, ps_dptr y, bool add);

/* A layer's router and experts, over every chunk (ps_lower_moe.c). */
void ps_lower_moe(lowering *l, uint32_t layer);

#endif
