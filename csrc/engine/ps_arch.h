/* ps_arch - the architectures we run, one row of a table each: how their metadata spells
 * hyper-parameters and which variations of the transformer block they use. Adding one touches
 * ps_arch.c and its test.
 *
 * Not here: units and images (ps_model), ops (ps_lower).
 * Threads: pure functions.
 */
#ifndef PS_ARCH_H
#define PS_ARCH_H

#include "engine/ps_model.h"

typedef struct ps_arch {
    const char *name;       /* general.architecture */
    uint32_t rope;          /* ps_rope_kind */
    uint32_t norm;          /* ps_norm_kind */
    uint32_t act;           /* ps_act_kind */
    bool scaled_embed;      /* embeddings times sqrt(n_embd) */
    bool fused;             /* qkv in one matrix, gate and up in one matrix */
    bool always_experts;    /* no dense layers */
    uint32_t window_period; /* 0: no windows; p > 1: layer i is global where i % p == window_global,
                               else windowed; 1: all are windowed */
    uint32_t window_global;
    float window_rope_base; /* rope base of windowed layers; 0: the same as global ones */
    const char *ffn_norm;   /* tensor name of the norm before the feed-forward block */
} ps_arch;

/* NULL where we don't have it. */
const ps_arch *ps_arch_find(const char *name);
const char *ps_arch_names(void); /* "llama, nemotron, ..." */

/* Reads and checks the hyper-parameters; every number is bounded here so that later products cannot
 * overflow. */
ps_status ps_arch_hparams(const ps_gguf *gguf, const ps_arch *arch, ps_hparams *hp, ps_err *err);
/* Window and rope table of each layer. `layers` has hp->n_layer entries. */
ps_status ps_arch_layers(
    const ps_gguf *gguf, const ps_arch *arch, ps_hparams *hp, ps_layer *layers, ps_err *err);
/* See ps_model_rope. */
ps_status ps_arch_rope(const ps_gguf *gguf, const ps_arch *arch, const ps_hparams *hp,
    uint32_t i_rope, uint32_t n_ctx, float *freq, float *mag, ps_err *err);

#endif
