/* ps_sample - see the header.
 *
 * A candidate is one 64-bit key: the logit's bits, made so that they order as integers, above the
 * inverted id. Comparing keys therefore orders by logit, and equal logits by lower id first, so
 * every selection has exactly one right answer whatever the algorithm. Candidates are selected,
 * never sorted: quickselect by count (top_k) and by probability mass (top_p).
 *
 * Threads: see the header.
 */
#include "engine/ps_sample.h"

#include <float.h>
#include <math.h>
#include <string.h>

enum {
    BLOCK = 64,     /* logits looked at together: one vector test mostly says that none qualifies */
    MIN_SPARE = 256 /* room behind the k best, so that compacting is rare */
};

struct ps_sample {
    ps_sample_params params; /* bias pointers are ours */
    uint32_t n_vocab;
    uint64_t rng;
    float *logits;  /* owns [n_vocab]: with bias and penalties; NULL where there are neither */
    uint64_t *keys; /* owns [cap_keys]: candidates */
    uint64_t cap_keys;
    int32_t *window; /* owns [penalty_last_n]: accepted tokens, a ring */
    uint32_t n_window, i_window;
    uint32_t *count; /* owns [n_vocab]: how often a token is in the window */
    uint32_t *mark;  /* owns [n_vocab]: penalised already in this call, if it equals `epoch` */
    uint32_t epoch;
    int32_t *bias_ids;  /* owns [n_bias] */
    float *bias_values; /* owns [n_bias] */
    ps_sample_top top[PS_SAMPLE_MAX_TOP];
};

/* ---- keys ---- */

static uint64_t key_of(float logit, uint32_t id)
{
    uint32_t bits;
    logit += 0.0f; /* zeros are equal, whatever their sign */
    memcpy(&bits, &logit, sizeof bits);
    bits ^= (bits >> 31) ? 0xffffffffu : 0x80000000u; /* negative floats order backwards */
    return (uint64_t)bits << 32 | (uint32_t)~id;
}

static uint32_t key_id(uint64_t key)
{
    return ~(uint32_t)key;
}

/* Plus infinity comes back as the largest float, so that differences are never NaN. */
static double key_logit(uint64_t key)
{
    uint32_t bits = (uint32_t)(key >> 32);
    bits ^= (bits >> 31) ? 0x80000000u : 0xffffffffu;
    float logit;
    memcpy(&logit, &bits, sizeof logit);
    return logit > FLT_MAX ? (double)FLT_MAX : (double)logit;
}

static void swap_keys(uint64_t *a, uint64_t *b)
{
    uint64_t t = *a;
    *a = *b;
    *b = t;
}

/* Moves the keys above one of them to the front; returns where that one now stands. n > 0. The
 * pivot is the median of three places that change with n: keys differ, so no input is bad for long.
 */
static uint64_t partition(uint64_t *keys, uint64_t n)
{
    uint64_t seed = n;
    uint64_t *a = &keys[ps_rng_next(&seed) % n];
    uint64_t *b = &keys[ps_rng_next(&seed) % n];
    uint64_t *c = &keys[ps_rng_next(&seed) % n];
    uint64_t *m = *a < *b ? (*b < *c ? b : *a < *c ? c : a) : (*a < *c ? a : *b < *c ? c : b);
    swap_keys(m, &keys[n - 1]);
    uint64_t pivot = keys[n - 1], at = 0;
    for (uint64_t i = 0; i + 1 < n; i++) {
        /* Without a branch: whether a key is above the pivot cannot be predicted. */
        uint64_t key = keys[i];
        keys[i] = keys[at];
        keys[at] = key;
        at += key > pivot;
    }
    swap_keys(&keys[at], &keys[n - 1]);
    return at;
}

/* The k largest of n come to the front, in no order. */
static void select_count(uint64_t *keys, uint64_t n, uint64_t k)
{
    while (k > 0 && k < n) {
        uint64_t at = partition(keys, n);
        if (at >= k) {
            n = at;
        } else {
            keys += at + 1;
            n -= at + 1;
            k -= at + 1;
        }
    }
}

static uint64_t largest_key(const uint64_t *keys, uint64_t n)
{
    uint64_t best = 0;
    for (uint64_t i = 0; i < n; i++)
        if (keys[i] > best) best = keys[i];
    return best;
}

static uint64_t smallest_key(const uint64_t *keys, uint64_t n)
{
    uint64_t least = UINT64_MAX;
    for (uint64_t i = 0; i < n; i++)
        if (keys[i] < least) least = keys[i];
    return least;
}

static double mass(const uint64_t *keys, uint64_t n, double best)
{
    double sum = 0;
    for (uint64_t i = 0; i < n; i++) sum += (double)expf((float)(key_logit(keys[i]) - best));
    return sum;
}

/* The fewest largest with a share `p` of all probability come to the front; how many those are. */
static uint64_t select_mass(uint64_t *keys, uint64_t n, double p, double best)
{
    double need = p * mass(keys, n, best), have = 0;
    uint64_t base = 0;
    while (n > 0) {
        uint64_t at = partition(keys + base, n);
        double above = mass(keys + base, at, best);
        if (at > 0 && have + above >= need) {
            n = at;
            continue;
        }
        have += above + mass(keys + base + at, 1, best);
        base += at + 1;
        n -= at + 1;
        if (have >= need) break;
    }
    return base; /* >= 1 */
}

/* ---- choosing from n_vocab logits ---- */

/* Whether any of BLOCK logits is above `least`. Comparisons with NaN are false. */
static bool any_above(const float *x, float least)
{
    int hit = 0;
    for (int i = 0; i < BLOCK; i++) hit |= x[i] > least;
    return hit != 0;
}

/* The k largest usable logits as keys in no order, k <= n; how many there are. */
static uint64_t collect(const float *x, uint32_t n, uint64_t k, uint64_t *keys, uint64_t cap)
{
    uint64_t have = 0;
    float least = -INFINITY; /* ids ascend, so an equal logit that comes later is not wanted */
    for (uint32_t i = 0; i < n; i += BLOCK) {
        uint32_t end = n - i < BLOCK ? n : i + BLOCK;
        if (end == i + BLOCK && !any_above(x + i, least)) continue;
        for (uint32_t j = i; j < end; j++) {
            if (!(x[j] > least)) continue;
            if (have == cap) {
                select_count(keys, have, k);
                have = k;
                least = (float)key_logit(smallest_key(keys, k));
                if (!(x[j] > least)) continue;
            }
            keys[have++] = key_of(x[j], j);
        }
    }
    if (have <= k) return have;
    select_count(keys, have, k);
    return k;
}

/* The key of the largest logit, the lowest id of equals; 0 where none is usable. */
static uint64_t greedy(const float *x, uint32_t n)
{
    float best = -INFINITY;
    uint32_t id = UINT32_MAX;
    for (uint32_t i = 0; i < n; i += BLOCK) {
        uint32_t end = n - i < BLOCK ? n : i + BLOCK;
        if (end == i + BLOCK && !any_above(x + i, best)) continue;
        for (uint32_t j = i; j < end; j++) {
            if (!(x[j] > best)) continue;
            best = x[j];
            id = j;
        }
    }
    return id == UINT32_MAX ? 0 : key_of(best, id);
}

static uint64_t keep_min_p(uint64_t *keys, uint64_t n, double min_p, double best)
{
    double least = best + log(min_p);
    uint64_t kept = 0;
    for (uint64_t i = 0; i < n; i++)
        if (key_logit(keys[i]) >= least) keys[kept++] = keys[i];
    return kept;
}

static uint64_t draw(ps_sample *s, const uint64_t *keys, uint64_t n, double best)
{
    double t = (double)s->params.temperature, total = 0;
    for (uint64_t i = 0; i < n; i++) total += exp((key_logit(keys[i]) - best) / t);
    double left = ps_rng_uniform(&s->rng) * total;
    uint64_t last = 0;
    for (uint64_t i = 0; i < n; i++) {
        double p = exp((key_logit(keys[i]) - best) / t);
        if (p > 0)
            last = i; /* rounding may leave a little at the end: the last that could be drawn */
        left -= p;
        if (left < 0) return keys[i];
    }
    return keys[last];
}

/* ---- bias and penalties ---- */

static bool has_penalties(const ps_sample_params *p)
{
    return p->penalty_last_n > 0 && (p->repeat_penalty != 1.0f || p->presence_penalty != 0.0f ||
                                        p->frequency_penalty != 0.0f);
}

static float penalised(const ps_sample_params *p, float logit, uint32_t count)
{
    logit = logit <= 0 ? logit * p->repeat_penalty : logit / p->repeat_penalty;
    return logit - p->presence_penalty - p->frequency_penalty * (float)count;
}

/* The logits to choose from: the caller's where nothing changes them. */
static const float *adjust(ps_sample *s, const float *logits)
{
    if (s->params.n_bias == 0 && s->n_window == 0) return logits;
    memcpy(s->logits, logits, s->n_vocab * sizeof *logits);
    for (uint32_t i = 0; i < s->params.n_bias; i++) s->logits[s->bias_ids[i]] += s->bias_values[i];
    if (++s->epoch == 0) { /* wrapped: no old mark may look new */
        memset(s->mark, 0, s->n_vocab * sizeof *s->mark);
        s->epoch = 1;
    }
    for (uint32_t i = 0; i < s->n_window; i++) {
        int32_t id = s->window[i];
        if (s->mark[id] == s->epoch) continue;
        s->mark[id] = s->epoch;
        s->logits[id] = penalised(&s->params, s->logits[id], s->count[id]);
    }
    return s->logits;
}

void ps_sample_accept(ps_sample *s, int32_t id)
{
    if (s->window == NULL || id < 0 || (uint32_t)id >= s->n_vocab) return;
    if (s->n_window == s->params.penalty_last_n)
        s->count[s->window[s->i_window]]--;
    else
        s->n_window++;
    s->window[s->i_window] = id;
    s->count[id]++;
    s->i_window = (s->i_window + 1) % s->params.penalty_last_n;
}

/* ---- log-probabilities ---- */

static double log_sum_exp(const float *x, uint32_t n, double best)
{
    double sum = 0;
    for (uint32_t i = 0; i < n; i++) {
        /* Below e^-40 of the best even a million of them are nothing; NaN fails the test too. */
        double d = (double)x[i] - best;
        if (d > -40) sum += (double)expf((float)(d > 0 ? 0 : d));
    }
    return best + log(sum);
}

/* Fills the log-probabilities of *out, from the model's own logits. They have a usable one. */
static void report(ps_sample *s, const float *x, ps_sample_token *out)
{
    double best = key_logit(greedy(x, s->n_vocab));
    double all = log_sum_exp(x, s->n_vocab, best);
    out->logprob = (float)(key_logit(key_of(x[out->id], 0)) - all);
    uint64_t n = s->params.n_top < s->n_vocab ? s->params.n_top : s->n_vocab;
    if (n > 0) n = collect(x, s->n_vocab, n, s->keys, s->cap_keys);
    for (uint64_t i = 0; i < n; i++) { /* at most 64: picked out one by one, the best first */
        uint64_t key = largest_key(s->keys + i, n - i);
        uint64_t j = i;
        while (s->keys[j] != key) j++;
        swap_keys(&s->keys[i], &s->keys[j]);
        s->top[i] = (ps_sample_top){(int32_t)key_id(key), (float)(key_logit(key) - all)};
    }
    out->n_top = (uint32_t)n;
    out->top = s->top;
}

/* ---- the sampler ---- */

static ps_status no_candidate(const ps_sample *s, const float *logits, ps_err *err)
{
    if (greedy(logits, s->n_vocab) != 0)
        return ps_fail_field(err, PS_EREQUEST, "logit_bias",
            "logit_bias and the penalties leave no token that may be generated");
    return ps_fail_field(err, PS_EFORMAT, "logits",
        "the model gave no usable logit (all are NaN or minus infinity); its file may be damaged");
}

ps_status ps_sample_next(ps_sample *s, const float *logits, ps_sample_token *out, ps_err *err)
{
    const ps_sample_params *p = &s->params;
    const float *x = adjust(s, logits);
    uint64_t key;
    if (p->temperature == 0.0f) {
        key = greedy(x, s->n_vocab);
        if (key == 0) return no_candidate(s, logits, err);
    } else {
        uint64_t k =
            p->top_k > 0 && (uint32_t)p->top_k < s->n_vocab ? (uint64_t)p->top_k : s->n_vocab;
        uint64_t n = collect(x, s->n_vocab, k, s->keys, s->cap_keys);
        if (n == 0) return no_candidate(s, logits, err);
        double best = key_logit(largest_key(s->keys, n));
        if (p->top_p < 1.0f) n = select_mass(s->keys, n, (double)p->top_p, best);
        if (p->min_p > 0.0f) n = keep_min_p(s->keys, n, (double)p->min_p, best);
        key = draw(s, s->keys, n, best);
    }
    *out = (ps_sample_token){.id = (int32_t)key_id(key)};
    if (p->logprobs) report(s, logits, out);
    return PS_OK;
}

void ps_sample_reset(ps_sample *s)
{
    s->rng = s->params.seed;
    for (uint32_t i = 0; i < s->n_window; i++) s->count[s->window[i]] = 0;
    s->n_window = s->i_window = 0;
}

static ps_status refuse(ps_err *err, const char *name, const char *what, double value)
{
    return ps_fail_field(err, PS_EREQUEST, name, "%s must be %s, not %g", name, what, value);
}

static ps_status check_params(uint32_t n_vocab, const ps_sample_params *p, ps_err *err)
{
    if (n_vocab == 0 || n_vocab > INT32_MAX)
        return ps_fail_field(err, PS_EREQUEST, "n_vocab", "a vocabulary of %u tokens", n_vocab);
    if (!isfinite(p->temperature) || p->temperature < 0)
        return refuse(err, "temperature", "0 or more", (double)p->temperature);
    if (!(p->top_p >= 0 && p->top_p <= 1))
        return refuse(err, "top_p", "between 0 and 1", (double)p->top_p);
    if (!(p->min_p >= 0 && p->min_p <= 1))
        return refuse(err, "min_p", "between 0 and 1", (double)p->min_p);
    if (!isfinite(p->repeat_penalty) || p->repeat_penalty <= 0)
        return refuse(err, "repeat_penalty", "above 0", (double)p->repeat_penalty);
    if (!isfinite(p->presence_penalty))
        return refuse(err, "presence_penalty", "finite", (double)p->presence_penalty);
    if (!isfinite(p->frequency_penalty))
        return refuse(err, "frequency_penalty", "finite", (double)p->frequency_penalty);
    if (p->penalty_last_n > PS_SAMPLE_MAX_LAST_N)
        return refuse(err, "penalty_last_n", "2^20 or less", (double)p->penalty_last_n);
    if (p->n_top > PS_SAMPLE_MAX_TOP || (p->n_top > 0 && !p->logprobs))
        return refuse(err, "logprobs", "64 alternatives or fewer", (double)p->n_top);
    for (uint32_t i = 0; i < p->n_bias; i++) {
        if (p->bias_ids[i] < 0 || (uint32_t)p->bias_ids[i] >= n_vocab)
            return ps_fail_field(err, PS_EREQUEST, "logit_bias",
                "logit_bias names token %d, but the vocabulary has %u", p->bias_ids[i], n_vocab);
        if (isnan(p->bias_values[i]) || p->bias_values[i] > FLT_MAX)
            return refuse(
                err, "logit_bias", "a number or minus infinity", (double)p->bias_values[i]);
    }
    return PS_OK;
}

/* *out = zeroed memory for n items, unless there was a refusal before. */
static bool take(bool ok, void *out, uint64_t n, uint64_t size)
{
    void *p = ok ? ps_alloc(n, size) : NULL;
    memcpy(out, &p, sizeof p);
    return p != NULL;
}

ps_status ps_sample_create(
    uint32_t n_vocab, const ps_sample_params *params, ps_sample **out, ps_err *err)
{
    ps_status status = check_params(n_vocab, params, err);
    if (status != PS_OK) return status;
    ps_sample *s = ps_alloc(1, sizeof *s);
    if (s == NULL) return ps_fail(err, PS_ENOMEM, "no memory for a sampler");
    s->params = *params;
    s->n_vocab = n_vocab;

    bool all = params->top_k <= 0 || (uint32_t)params->top_k >= n_vocab;
    uint64_t k = all ? n_vocab : (uint64_t)params->top_k;
    k = ps_max_u64(k, params->n_top);
    s->cap_keys = ps_max_u64(ps_min_u64(2 * k, n_vocab), ps_min_u64(k + MIN_SPARE, n_vocab));
    bool penalties = has_penalties(params), ok = take(true, &s->keys, s->cap_keys, sizeof *s->keys);
    if (penalties || params->n_bias > 0) {
        ok = take(ok, &s->logits, n_vocab, sizeof *s->logits);
        ok = take(ok, &s->mark, n_vocab, sizeof *s->mark);
    }
    if (penalties) {
        ok = take(ok, &s->window, params->penalty_last_n, sizeof *s->window);
        ok = take(ok, &s->count, n_vocab, sizeof *s->count);
    }
    if (params->n_bias > 0) {
        ok = take(ok, &s->bias_ids, params->n_bias, sizeof *s->bias_ids);
        ok = take(ok, &s->bias_values, params->n_bias, sizeof *s->bias_values);
    }
    if (!ok) {
        ps_sample_destroy(s);
        return ps_fail(err, PS_ENOMEM, "no memory for a sampler over %u tokens", n_vocab);
    }
    if (params->n_bias > 0) {
        memcpy(s->bias_ids, params->bias_ids, params->n_bias * sizeof *s->bias_ids);
        memcpy(s->bias_values, params->bias_values, params->n_bias * sizeof *s->bias_values);
    }
    s->params.bias_ids = s->bias_ids;
    s->params.bias_values = s->bias_values;
    ps_sample_reset(s);
    *out = s;
    return PS_OK;
}

void ps_sample_destroy(ps_sample *s)
{
    if (s == NULL) return;
    ps_free(s->logits);
    ps_free(s->keys);
    ps_free(s->window);
    ps_free(s->count);
    ps_free(s->mark);
    ps_free(s->bias_ids);
    ps_free(s->bias_values);
    ps_free(s);
}
