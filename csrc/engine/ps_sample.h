/* ps_sample - logits to a token: bias, penalties, filters, temperature, and a random draw that a
 * seed repeats; with log-probabilities where wanted.
 *
 * Not here: stop strings and text (Python), where logits come from.
 * Threads: a sampler belongs to one thread at a time and keeps its random state; nothing is shared.
 *
 * The order is llama.cpp's: bias, penalties, top_k, top_p, min_p, temperature, draw. top_p and
 * min_p look at the probabilities before temperature. A logit that is NaN counts as minus infinity
 * (never drawn), plus infinity as the largest float. Work per token is O(n_vocab), nothing is
 * sorted whole and nothing allocated.
 */
#ifndef PS_SAMPLE_H
#define PS_SAMPLE_H

#include "base/ps_base.h"

enum {
    PS_SAMPLE_MAX_TOP = 64,        /* most alternatives reported beside a token */
    PS_SAMPLE_MAX_LAST_N = 1 << 20 /* longest window of the penalties */
};

typedef struct ps_sample_params {
    float temperature; /* >= 0; 0 takes the largest logit, of equals the lowest id */
    int32_t top_k;     /* keep the k largest; <= 0: all */
    float top_p; /* keep the fewest largest with this much probability, at least one; 1: all */
    float min_p; /* keep what has at least this share of the best's probability; 0: all */
    float
        repeat_penalty; /* > 0: divides positive logits of seen tokens, multiplies others; 1: off */
    float presence_penalty;  /* taken off the logit of each seen token */
    float frequency_penalty; /* taken off once for each time that it was seen */
    uint32_t penalty_last_n; /* "seen": among the last so many accepted tokens; 0: penalties off */
    uint32_t n_bias;
    const int32_t *bias_ids;  /* [n_bias], copied by create; of ids given twice both count */
    const float *bias_values; /* [n_bias], added to the logits; minus infinity forbids a token */
    uint64_t seed;
    bool logprobs;  /* whether log-probabilities are computed at all */
    uint32_t n_top; /* alternatives reported, <= PS_SAMPLE_MAX_TOP; needs logprobs */
} ps_sample_params;

/* The defaults of Engine.generate, with llama.cpp's window of 64. */
static inline ps_sample_params ps_sample_defaults(void)
{
    return (ps_sample_params){.temperature = 0.8f,
        .top_k = 40,
        .top_p = 0.95f,
        .min_p = 0.05f,
        .repeat_penalty = 1.0f,
        .penalty_last_n = 64};
}

typedef struct ps_sample_top {
    int32_t id;
    float logprob;
} ps_sample_top;

typedef struct ps_sample_token {
    int32_t id;
    float logprob; /* natural logarithm of the model's own probability: before bias, penalties,
                      filters and temperature; 0 without params.logprobs */
    uint32_t n_top;
    const ps_sample_top *top; /* [n_top], the most probable first; borrowed until the next call */
} ps_sample_token;

typedef struct ps_sample ps_sample;

/* PS_EREQUEST names the parameter at fault in err->field, as Python spells it. */
ps_status ps_sample_create(
    uint32_t n_vocab, const ps_sample_params *params, ps_sample **out, ps_err *err);
void ps_sample_destroy(ps_sample *s); /* NULL allowed */

/* Picks a token for float32 logits[n_vocab], which stay as they are. Does not accept it.
 * PS_EREQUEST (logit_bias) where the bias forbids every token, PS_EFORMAT where the model itself
 * gave no usable logit; the random state is then as before. */
ps_status ps_sample_next(ps_sample *s, const float *logits, ps_sample_token *out, ps_err *err);

/* Tells the penalties that `id` is now part of the text: the prompt's tokens too, as llama.cpp
 * does. Ids outside the vocabulary are ignored. */
void ps_sample_accept(ps_sample *s, int32_t id);

/* As just created: an empty window, the random state of the seed. */
void ps_sample_reset(ps_sample *s);

#endif
