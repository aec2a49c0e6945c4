/* ps_plan - a placement turned into a checked, immutable plan: does it cover every unit, does it
 * fit the budget, where does each thing lie. All from sizes: no device, no weights. ps_lower turns
 * a plan into ticks.
 *
 * Not here: deciding places (Python policies), running (ps_exec).
 * Threads: a plan is immutable after create and shareable.
 */
#ifndef PS_PLAN_H
#define PS_PLAN_H

#include "base/ps_base.h"
#include "device/ps_arena.h"
#include "engine/ps_model.h"

typedef enum ps_place_kind {
    PS_PLACE_CPU,    /* host memory, CPU computes */
    PS_PLACE_VRAM,   /* resident */
    PS_PLACE_STREAM, /* host memory, copied into slots, GPU computes */
    PS_PLACE_SPLIT,  /* shares of vram and stream, the rest on the CPU, at once (ps_cut) */
} ps_place_kind;

typedef struct ps_place {
    ps_place_kind kind;
    float vram, stream; /* shares: of a Split; in a plan, see ps_plan_share, of an expert too */
} ps_place;

enum { PS_MAX_TIERS = 16, PS_KV_PAGE_TOK = 64 };

typedef struct ps_tier {
    char name[16];
    uint32_t max_tok; /* largest pass of this tier; UINT32_MAX: unbounded */
} ps_tier;

/* The two sides that can compute. */
typedef enum ps_side { PS_SIDE_DEV, PS_SIDE_HOST, PS_SIDE_COUNT } ps_side;

/* What a plan is made from. Borrowed during create only. */
typedef struct ps_plan_spec {
    bool accelerator;      /* false: device `host`, every unit must be cpu */
    int sm;                /* compute capability that workspaces are sized for (emu: 90) */
    uint64_t budget_bytes; /* of VRAM above the baseline */
    uint32_t n_ctx, n_seq;
    uint32_t kv_fmt; /* PS_FMT_F16 or PS_FMT_Q8_0 */
    uint32_t n_tiers;
    const ps_tier *tiers;   /* ascending max_tok, the last unbounded */
    const ps_place *places; /* [n_tiers][n_units] */
    const uint32_t
        *kv_vram_tok; /* [n_layer] newest tokens of a sequence kept in VRAM, in whole pages and one
                         more; NULL: all where attn is on the GPU in every tier */
    ps_side kv_far_side; /* who attends to keys that no window holds, wherever the pass is not
                            staged: the GPU, which reads them over the bus, or the CPU */
    uint32_t n_slots;
    uint64_t slot_bytes; /* 0: no ring */
    uint32_t chunk_tok;  /* most tokens of one op call */
    uint32_t pass_tok;   /* most tokens of one pass; >= chunk_tok */
    uint32_t logit_rows; /* most logits rows computed at once */
    uint64_t graph_reserve_bytes;
    uint64_t map_bytes_per_gib; /* of the device's memory, for each GiB of locked host memory that
                                   it reaches; see ps_locked_map_bytes */
    bool per_tier_residency; /* tiers may have residents of their own; else they must be the same */
} ps_plan_spec;

/* Memory that ticks refer to. A reference is a space and an offset; the executor binds each space
 * to an address. */
typedef enum ps_space {
    PS_SPACE_NONE,
    PS_SPACE_DEV_WEIGHTS, /* resident units, read only */
    PS_SPACE_DEV_RING,
    PS_SPACE_DEV_KV,
    PS_SPACE_DEV_ACT,          /* hidden states, activations, workspaces */
    PS_SPACE_DEV_BATCH,        /* what a pass brings: tokens, positions, page tables */
    PS_SPACE_DEV_CONST,        /* rope tables, expert addresses */
    PS_SPACE_HOST_WEIGHTS,     /* unit images; the offset is unit << 40 | offset in the image */
    PS_SPACE_HOST_WEIGHTS_DEV, /* the same bytes under the address by which GPU kernels reach them
                                */
    PS_SPACE_HOST_KV,          /* locked where the GPU reads it too */
    PS_SPACE_HOST_KV_DEV,  /* the same bytes under the address by which GPU kernels reach them */
    PS_SPACE_HOST_ACT,     /* locked */
    PS_SPACE_HOST_ACT_DEV, /* the same bytes, likewise */
    PS_SPACE_HOST_BATCH,   /* locked */
    PS_SPACE_HOST_CONST,
    PS_SPACE_OUT, /* the caller's logits, host memory */
    PS_SPACE_COUNT
} ps_space;
const char *ps_space_name(ps_space space);

/* The spaces of the arena in its order, and as what they are counted. */
enum { PS_DEV_SPACE_COUNT = 6 };
typedef struct ps_dev_space {
    ps_space space;
    ps_mem_kind kind;
} ps_dev_space;
extern const ps_dev_space ps_dev_spaces[PS_DEV_SPACE_COUNT];

/* Packed into the ps_dptr fields of op arguments until they are bound: space in the top byte. */
static inline ps_dptr ps_ref(ps_space space, uint64_t offset)
{
    return (ps_dptr){(uint64_t)space << 56 | offset};
}
static inline ps_space ps_ref_space(ps_dptr r)
{
    return (ps_space)(r.a >> 56);
}
static inline uint64_t ps_ref_offset(ps_dptr r)
{
    return r.a & 0x00ffffffffffffffull;
}
enum { PS_IMAGE_SHIFT = 40 }; /* a unit's image is below 1 TiB */

/* Activation buffers; each has one place on each side that computes. */
typedef enum ps_buf {
    PS_BUF_X, /* f32 [pass_tok][n_embd] hidden states; where they are stale, a split block's share
               */
    PS_BUF_NORM, /* f32 [chunk][n_embd] */
    PS_BUF_Q,    /* f32 [chunk][q + k + v side by side where fused, else q] */
    PS_BUF_K,
    PS_BUF_V,
    PS_BUF_ATT, /* f32 [chunk][n_head * head_dim] */
    PS_BUF_FAR, /* f32 [PS_FAR_ROWS][n_head * head_dim], and (max, sum) of [near, far][row][head] */
    PS_BUF_OUT, /* f32 [chunk][n_embd] a block's output before post norm */
    PS_BUF_GATE,
    PS_BUF_UP,      /* f32 [chunk][n_ff] */
    PS_BUF_ROUTER,  /* f32 [chunk][n_expert] */
    PS_BUF_ROUTE,   /* ids, weights, order, starts of ROUTE, one after another */
    PS_BUF_PTRS,    /* ps_dptr [3][n_expert]: gate, up, down, as GATHER_EXPERTS leaves them */
    PS_BUF_H,       /* f32 [chunk * k][n_ff_expert] */
    PS_BUF_Y,       /* f32 [chunk * k][n_embd] */
    PS_BUF_Y_OTHER, /* the same, computed by the GPU for a router on the CPU */
    PS_BUF_ROWS,    /* f32 [logit_rows][n_embd] */
    PS_BUF_LOGITS,  /* f32 [logit_rows][n_vocab] */
    PS_BUF_WS,      /* workspaces of ops */
    PS_BUF_COUNT
} ps_buf;

typedef struct ps_unit_home {
    bool host;   /* needs its host image in some tier */
    bool always; /* resident in every tier, wherever its place is */
} ps_unit_home;

/* The units that are resident in some tiers, and where. Tiers with the same residents share one.
 * All residencies lie in the same memory, and what all of them have lies at the same address in
 * each; a pass first brings in what it wants and does not find there. */
typedef uint32_t ps_residency; /* number of one; n_residencies: only what all of them have */

/* Where the KV of an attention unit (or of a part of one: of its heads) lives.
 * DEV: in VRAM. HOST: in host memory, attention on the CPU. BACKED: in host memory, attention
 * (also) on the GPU: a prompt's pass works on a stage in VRAM that holds the one layer in hand,
 * loaded before and saved behind the compute; single tokens are attended where they lie, over the
 * bus. WINDOW: as BACKED, and each sequence's newest pages are in VRAM too, so that only older ones
 * are read over the bus, or by the CPU (kv_far_side); the two partial attentions are merged. */
typedef enum ps_kv_home { PS_KV_DEV, PS_KV_HOST, PS_KV_BACKED, PS_KV_WINDOW } ps_kv_home;
enum {
    PS_KV_STAGES = 2, /* one layer loads while another computes */
    PS_FAR_ROWS = 64, /* tokens whose two partial attentions are held at a time */
};

/* Layers whose newest pages come and go alike. Page i of sequence s is page s * n_pages + i %
 * n_pages of a unit's window, from when its first token is written until page i + n_pages is. */
typedef struct ps_kv_window {
    uint32_t n_pages; /* of one sequence in VRAM */
    uint32_t reach;   /* tokens that attention looks back; 0: all */
} ps_kv_window;

/* First page that can be in VRAM once a sequence has `length` tokens, at least one. */
static inline uint32_t ps_kv_window_first(const ps_kv_window *w, uint32_t length)
{
    uint32_t end = (length - 1) / PS_KV_PAGE_TOK + 1;
    return end > w->n_pages ? end - w->n_pages : 0;
}
/* Page of the oldest token that a token at `position` attends to. */
static inline uint32_t ps_kv_window_oldest(const ps_kv_window *w, uint32_t position)
{
    return w->reach > 0 && position >= w->reach ? (position - w->reach + 1) / PS_KV_PAGE_TOK : 0;
}

typedef struct ps_unit_kv { /* zeros unless attention */
    ps_kv_home home;
    uint64_t offset;      /* of K in DEV_KV or HOST_KV */
    uint64_t page_bytes;  /* K (or V) of one page */
    uint64_t v_skip;      /* from K to V */
    uint32_t window;      /* WINDOW only, as the next two: which of the plan's */
    uint64_t near_offset; /* of K in DEV_KV */
    uint64_t near_v_skip;
} ps_unit_kv;

typedef struct ps_plan {
    /* The model as this plan cuts it: `cut` where some unit is split, else the caller's (borrowed).
     * n_units below is its number of units. */
    const ps_model *model;
    ps_model *cut;          /* owns, but for what it shares with the caller's model; NULL: none */
    ps_plan_spec spec;      /* its pointers are those below */
    ps_tier *tiers;         /* owns; [n_tiers] */
    ps_place *places;       /* owns; [n_tiers][n_units] */
    uint32_t *kv_vram_tok;  /* owns; [n_layer] */
    bool has_kv_vram_tok;   /* false: the spec left it to the places */
    ps_unit_home *homes;    /* owns; [n_units] */
    uint32_t n_residencies; /* 1 unless spec.per_tier_residency */
    ps_residency residency_of[PS_MAX_TIERS]; /* of each tier, the first one's is 0 */
    uint64_t *resident_at; /* owns; [n_residencies + 1][n_units] offset in DEV_WEIGHTS; UINT64_MAX:
                              not resident; the last row: what all residencies have */
    bool holds[PS_MAX_TIERS + 1][PS_MAX_TIERS]; /* does the first have all that the second has */
    ps_unit_kv *kv;                             /* owns; [n_units] */
    ps_kv_window *windows;                      /* owns; [n_layer], n_windows in use */
    uint32_t n_windows;
    uint64_t kv_stage_offset; /* in DEV_KV: stages, K and V of one layer and sequence each */
    bool kv_backed;           /* is any unit's BACKED or WINDOW */
    bool uses[PS_SIDE_COUNT]; /* does anything compute there in any tier */
    uint64_t buf_offset[PS_BUF_COUNT]; /* in DEV_ACT and HOST_ACT alike */
    uint64_t buf_bytes[PS_BUF_COUNT];
    uint64_t space_bytes[PS_SPACE_COUNT];
    uint64_t dev_base[PS_SPACE_COUNT]; /* of each DEV space in the arena */
    uint64_t bytes_by_kind[PS_MEM_KIND_COUNT];
    uint64_t needed_bytes;                /* their sum */
    uint64_t locked_bytes;                /* page-locked at most; see ps_locked */
    uint64_t locked_image_bytes;          /* of these, for images */
    uint32_t max_pages;                   /* KV pages of one sequence */
    uint64_t kv_page_bytes;               /* K (or V) of one page of one layer, all heads */
    uint64_t rope_offset[PS_ROPE_TABLES]; /* f32 [n_rot / 2] in DEV_CONST and HOST_CONST */
    float rope_mag[PS_ROPE_TABLES];
    uint64_t tables_offset; /* expert addresses of the pass, in both CONST spaces */
    uint32_t n_table;       /* of these, the most that a pass has */
} ps_plan;

/* PS_EPLAN (field = unit, extra = tier) where a rule is broken, PS_EBUDGET with needed and budget
 * where it does not fit; then err->smallest is 0 and the caller asks ps_plan_smallest. */
ps_status ps_plan_create(
    const ps_model *model, const ps_plan_spec *spec, ps_plan **out, ps_err *err);
void ps_plan_destroy(ps_plan *plan); /* NULL allowed */

uint32_t ps_plan_tier(const ps_plan *plan, uint32_t n_tok); /* the first tier that holds it */
static inline ps_place ps_plan_place(const ps_plan *plan, uint32_t tier, uint32_t unit)
{
    return plan->places[(size_t)tier * plan->model->n_units + unit];
}
/* Of an expert that is divided with others of its layer: the share of those that are routed which
 * comes over the bus, in PS_SHARE_ONE, wherever a pass gathers experts; in other passes its place
 * is what it says. 0: the place is all there is to know. */
static inline uint32_t ps_plan_share(const ps_plan *plan, uint32_t tier, uint32_t unit)
{
    ps_place place = ps_plan_place(plan, tier, unit);
    return place.kind == PS_PLACE_STREAM || place.kind == PS_PLACE_CPU
               ? (uint32_t)((double)place.stream * PS_SHARE_ONE + 0.5)
               : 0;
}
/* Where a residency has a unit, as an offset in DEV_WEIGHTS; UINT64_MAX: nowhere. */
static inline uint64_t ps_plan_resident_at(const ps_plan *plan, ps_residency r, uint32_t unit)
{
    return plan->resident_at[(size_t)r * plan->model->n_units + unit];
}
/* `found` of a pass of this tier (see ps_pass_shape), where VRAM holds residency `held` before it;
 * and what it holds afterwards. */
uint32_t ps_plan_found(const ps_plan *plan, ps_residency held, uint32_t tier);
ps_residency ps_plan_held_after(const ps_plan *plan, ps_residency held, uint32_t tier);
/* Whether a pass of this tier that finds `found` must bring the unit in. */
bool ps_plan_must_bring(const ps_plan *plan, uint32_t found, uint32_t tier, uint32_t unit);
/* Whether the unit is resident in some tiers only, so that passes may bring it in. */
bool ps_plan_comes_and_goes(const ps_plan *plan, uint32_t unit);
/* Where a unit computes in a tier; where it is split, where its shares are joined: on the GPU if
 * any of it computes there. */
static inline ps_side ps_plan_side(const ps_plan *plan, uint32_t tier, uint32_t unit)
{
    return ps_plan_place(plan, tier, unit).kind == PS_PLACE_CPU ? PS_SIDE_HOST : PS_SIDE_DEV;
}
/* The unit of the caller's model that this one is, or is a part of. */
static inline int32_t ps_plan_whole(const ps_plan *plan, int32_t unit)
{
    return unit >= 0 && plan->model->units[unit].of >= 0 ? plan->model->units[unit].of : unit;
}
/* PS_EPLAN about a unit in a tier, for all that check places. */
ps_status ps_plan_refuse(
    const ps_plan *plan, uint32_t tier, uint32_t unit, ps_err *err, const char *what);

/* Scratch that a CPU stream needs so that no op of passes over this model, of at most chunk_tok
 * tokens a call, outgrows it on any CPU variant. */
uint64_t ps_plan_cpu_scratch_bytes(
    const ps_model *model, uint32_t n_ctx, uint32_t chunk_tok, int threads);

/* References that name the same bytes, made equal. */
static inline ps_dptr ps_ref_canonical(ps_dptr r)
{
    switch (ps_ref_space(r)) {
    case PS_SPACE_HOST_KV_DEV: return ps_ref(PS_SPACE_HOST_KV, ps_ref_offset(r));
    case PS_SPACE_HOST_ACT_DEV: return ps_ref(PS_SPACE_HOST_ACT, ps_ref_offset(r));
    case PS_SPACE_HOST_WEIGHTS_DEV: return ps_ref(PS_SPACE_HOST_WEIGHTS, ps_ref_offset(r));
    default: return r;
    }
}

#endif
