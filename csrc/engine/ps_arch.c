/* ps_arch - see ps_arch.h. */
#include "engine/ps_arch.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static const ps_arch archs[] = {
    /* llama: also Mistral, Minitron-8B, SmolLM; with experts it is Mixtral */
    {.name = "llama",
        .rope = PS_ROPE_INTERLEAVED,
        .norm = PS_NORM_RMS,
        .act = PS_ACT_SILU,
        .ffn_norm = "ffn_norm"},
    {.name = "nemotron",
        .rope = PS_ROPE_NEOX,
        .norm = PS_NORM_LAYER,
        .act = PS_ACT_RELU2,
        .ffn_norm = "ffn_norm"},
    {.name = "qwen2",
        .rope = PS_ROPE_NEOX,
        .norm = PS_NORM_RMS,
        .act = PS_ACT_SILU,
        .ffn_norm = "ffn_norm"},
    {.name = "qwen2vl",
        .rope = PS_ROPE_MROPE,
        .norm = PS_NORM_RMS,
        .act = PS_ACT_SILU,
        .ffn_norm = "ffn_norm"},
    {.name = "qwen3",
        .rope = PS_ROPE_NEOX,
        .norm = PS_NORM_RMS,
        .act = PS_ACT_SILU,
        .ffn_norm = "ffn_norm"},
    {.name = "qwen3moe",
        .rope = PS_ROPE_NEOX,
        .norm = PS_NORM_RMS,
        .act = PS_ACT_SILU,
        .always_experts = true,
        .ffn_norm = "ffn_norm"},
    {.name = "gemma3",
        .rope = PS_ROPE_NEOX,
        .norm = PS_NORM_RMS,
        .act = PS_ACT_GELU,
        .scaled_embed = true,
        .window_period = 6,
        .window_global = 5,
        .window_rope_base = 10000.0f,
        .ffn_norm = "ffn_norm"},
    {.name = "phi3",
        .rope = PS_ROPE_NEOX,
        .norm = PS_NORM_RMS,
        .act = PS_ACT_SILU,
        .fused = true,
        .window_period = 1,
        .ffn_norm = "ffn_norm"},
    {.name = "gpt-oss",
        .rope = PS_ROPE_NEOX,
        .norm = PS_NORM_RMS,
        .act = PS_ACT_SWIGLU_OAI,
        .always_experts = true,
        .window_period = 2,
        .window_global = 1,
        .ffn_norm = "post_attention_norm"},
};
enum { N_ARCHS = sizeof archs / sizeof *archs };

const ps_arch *ps_arch_find(const char *name)
{
    for (int i = 0; i < N_ARCHS; i++)
        if (strcmp(archs[i].name, name) == 0) return &archs[i];
    return NULL;
}

const char *ps_arch_names(void)
{
    return "llama, nemotron, qwen2, qwen2vl, qwen3, qwen3moe, gemma3, phi3, gpt-oss";
}

/* ---- reading metadata: "ARCH.key" ---- */

typedef struct reader {
    const ps_gguf *gguf;
    const char *arch;
    ps_err *err;
    char key[160];
} reader;

static const ps_gguf_kv *find(reader *r, const char *key)
{
    snprintf(r->key, sizeof r->key, "%s.%s", r->arch, key);
    return ps_gguf_find(r->gguf, r->key);
}

/* An integer in [lo, hi]; absent: *out keeps its default if `optional`. Some files store one number
 * a layer: accepted where all are equal. */
static ps_status read_u32(
    reader *r, const char *key, bool optional, uint32_t lo, uint32_t hi, uint32_t *out)
{
    const ps_gguf_kv *kv = find(r, key);
    uint64_t v = 0;
    if (kv == NULL) {
        if (optional) return PS_OK;
        return ps_gguf_fail_key(r->gguf, r->key, r->err,
            "the file lacks the key %s, which its architecture needs", r->key);
    }
    if (kv->type != PS_GGUF_ARR) {
        if (!ps_gguf_get_u64(kv, &v))
            return ps_gguf_fail_key(r->gguf, r->key, r->err, "%s is not a whole number", r->key);
    } else {
        for (uint64_t i = 0; i < kv->n; i++) {
            uint64_t w = 0;
            if (!ps_gguf_elem_u64(kv, i, &w))
                return ps_gguf_fail_key(r->gguf, r->key, r->err, "%s[%llu] is not a whole number",
                    r->key, (unsigned long long)i);
            if (i > 0 && w != v)
                return ps_fail_unsupported(r->err, r->key, "one value for all layers",
                    "%s differs from layer to layer", r->key);
            v = w;
        }
    }
    if (v < lo || v > hi)
        return ps_gguf_fail_key(r->gguf, r->key, r->err, "%s is %llu; expected %u to %u", r->key,
            (unsigned long long)v, lo, hi);
    *out = (uint32_t)v;
    return PS_OK;
}

static ps_status read_f32(reader *r, const char *key, bool optional, float lo, float hi, float *out)
{
    const ps_gguf_kv *kv = find(r, key);
    double v = 0;
    if (kv == NULL) {
        if (optional) return PS_OK;
        return ps_gguf_fail_key(r->gguf, r->key, r->err,
            "the file lacks the key %s, which its architecture needs", r->key);
    }
    if (!ps_gguf_get_f64(kv, &v) || !(v >= (double)lo && v <= (double)hi))
        return ps_gguf_fail_key(r->gguf, r->key, r->err, "%s is not a number from %g to %g", r->key,
            (double)lo, (double)hi);
    *out = (float)v;
    return PS_OK;
}

enum {
    MAX_LAYERS = 4096,
    MAX_WIDTH = 1 << 20, /* hidden sizes, heads, neurons: products of three fit 64 bits with room */
    MAX_VOCAB = 1 << 24,
    MAX_CTX = 1 << 27,
    MAX_EXPERTS = 4096,
};

static ps_status read_sections(reader *r, ps_hparams *hp)
{
    const ps_gguf_kv *kv = find(r, "rope.dimension_sections");
    uint64_t sum = 0;
    if (kv == NULL || kv->type != PS_GGUF_ARR || kv->n < 3 || kv->n > 4)
        return ps_gguf_fail_key(
            r->gguf, r->key, r->err, "%s must be a list of 3 or 4 numbers", r->key);
    for (uint64_t i = 0; i < kv->n; i++) {
        uint64_t v = 0;
        if (!ps_gguf_elem_u64(kv, i, &v) || v > hp->n_rot / 2)
            return ps_gguf_fail_key(r->gguf, r->key, r->err, "%s[%llu] is not a number up to %u",
                r->key, (unsigned long long)i, hp->n_rot / 2);
        hp->rope_sections[i] = (uint32_t)v;
        sum += v;
    }
    if (sum != hp->n_rot / 2)
        return ps_gguf_fail_key(r->gguf, r->key, r->err, "%s adds up to %llu pairs; expected %u",
            r->key, (unsigned long long)sum, hp->n_rot / 2);
    return PS_OK;
}

static ps_status read_heads(reader *r, ps_hparams *hp)
{
    PS_TRY(read_u32(r, "attention.head_count", false, 1, 4096, &hp->n_head));
    hp->n_kv_head = hp->n_head;
    PS_TRY(read_u32(r, "attention.head_count_kv", true, 1, 4096, &hp->n_kv_head));
    if (hp->n_head % hp->n_kv_head != 0)
        return ps_gguf_fail_key(r->gguf, r->key, r->err,
            "%u query heads are not a multiple of %u KV heads", hp->n_head, hp->n_kv_head);
    hp->head_dim = hp->n_embd / hp->n_head;
    uint32_t value_dim = 0;
    PS_TRY(read_u32(r, "attention.key_length", true, 1, PS_MAX_HEAD_DIM, &hp->head_dim));
    PS_TRY(read_u32(r, "attention.value_length", true, 1, PS_MAX_HEAD_DIM, &value_dim));
    if (value_dim != 0 && value_dim != hp->head_dim)
        return ps_fail_unsupported(r->err, r->key, "keys and values of the same size",
            "keys of %u and values of %u dimensions", hp->head_dim, value_dim);
    if (hp->head_dim == 0 || hp->head_dim > PS_MAX_HEAD_DIM || hp->head_dim % 16 != 0)
        return ps_fail_unsupported(r->err, "head size", "multiples of 16 up to 256",
            "heads of %u dimensions", hp->head_dim);
    hp->n_rot = hp->head_dim;
    PS_TRY(read_u32(r, "rope.dimension_count", true, 2, hp->head_dim, &hp->n_rot));
    if (hp->n_rot % 2 != 0) return ps_gguf_fail_key(r->gguf, r->key, r->err, "%s is odd", r->key);
    if (hp->rope == PS_ROPE_MROPE) PS_TRY(read_sections(r, hp));
    return PS_OK;
}

static ps_status read_experts(reader *r, const ps_arch *arch, ps_hparams *hp)
{
    PS_TRY(read_u32(r, "expert_count", !arch->always_experts, 0, MAX_EXPERTS, &hp->n_expert));
    if (hp->n_expert == 0) {
        if (arch->always_experts)
            return ps_gguf_fail_key(r->gguf, r->key, r->err,
                "%s is 0, but this architecture has experts in every layer", r->key);
        return PS_OK;
    }
    uint32_t most = hp->n_expert < PS_MAX_EXPERTS_USED ? hp->n_expert : PS_MAX_EXPERTS_USED;
    PS_TRY(read_u32(r, "expert_used_count", false, 1, most, &hp->n_expert_used));
    hp->n_ff_expert = hp->n_ff;
    PS_TRY(read_u32(r, "expert_feed_forward_length", true, 1, MAX_WIDTH, &hp->n_ff_expert));
    hp->renorm_experts = 1;
    return PS_OK;
}

ps_status ps_arch_hparams(const ps_gguf *gguf, const ps_arch *arch, ps_hparams *hp, ps_err *err)
{
    reader r = {.gguf = gguf, .arch = arch->name, .err = err};
    *hp = (ps_hparams){
        .rope = arch->rope, .norm = arch->norm, .act = arch->act, .n_rope = 1, .embed_scale = 1.0f};
    PS_TRY(read_u32(&r, "block_count", false, 1, MAX_LAYERS, &hp->n_layer));
    PS_TRY(read_u32(&r, "embedding_length", false, 1, MAX_WIDTH, &hp->n_embd));
    PS_TRY(read_u32(&r, "context_length", false, 1, MAX_CTX, &hp->n_ctx_train));
    PS_TRY(read_u32(&r, "feed_forward_length", arch->always_experts, 0, MAX_WIDTH, &hp->n_ff));
    PS_TRY(read_heads(&r, hp));
    PS_TRY(read_experts(&r, arch, hp));
    PS_TRY(read_f32(&r,
        arch->norm == PS_NORM_RMS ? "attention.layer_norm_rms_epsilon"
                                  : "attention.layer_norm_epsilon",
        false, 0.0f, 1.0f, &hp->eps));
    if (hp->n_expert == 0 && hp->n_ff == 0)
        return ps_gguf_fail_key(
            gguf, "feed_forward_length", err, "%s.feed_forward_length is 0", arch->name);
    hp->ffn_gated = arch->act != PS_ACT_RELU2;
    hp->fused_gate_up = arch->fused;
    if (arch->scaled_embed) hp->embed_scale = sqrtf((float)hp->n_embd);
    hp->attn_scale = 1.0f / sqrtf((float)hp->head_dim);
    PS_TRY(read_f32(&r, "attention.scale", true, 0.0f, 1e6f, &hp->attn_scale));
    if (hp->attn_scale == 0.0f)
        hp->attn_scale = 1.0f / sqrtf((float)hp->head_dim); /* 0 means "not set" in some files */
    PS_TRY(read_f32(&r, "attn_logit_softcapping", true, 0.0f, 1e6f, &hp->attn_softcap));
    PS_TRY(read_f32(&r, "final_logit_softcapping", true, 0.0f, 1e6f, &hp->logit_softcap));
    return PS_OK;
}

ps_status ps_arch_layers(
    const ps_gguf *gguf, const ps_arch *arch, ps_hparams *hp, ps_layer *layers, ps_err *err)
{
    reader r = {.gguf = gguf, .arch = arch->name, .err = err};
    uint32_t window = 0;
    if (arch->window_period > 0)
        PS_TRY(read_u32(&r, "attention.sliding_window", true, 0, MAX_CTX, &window));
    uint32_t period = arch->window_period;
    if (period > 1)
        PS_TRY(read_u32(&r, "attention.sliding_window_pattern", true, 1, MAX_LAYERS, &period));
    bool two_tables = arch->window_rope_base > 0.0f && window > 0;
    if (two_tables) hp->n_rope = 2;
    for (uint32_t i = 0; i < hp->n_layer; i++) {
        bool windowed = window > 0 && (period == 1 || i % period != arch->window_global % period);
        if (period == 0) windowed = false;
        layers[i] = (ps_layer){.attn = -1,
            .ffn = -1,
            .router = -1,
            .first_expert = -1,
            .window = windowed ? window : 0,
            .i_rope = windowed && two_tables ? 1 : 0};
    }
    return PS_OK;
}

/* YaRN: slow rotations are interpolated by `factor`, fast ones kept, with a ramp between the
 * dimensions that turn beta_fast and beta_slow times over the original context. */
static void yarn(float base, uint32_t n_rot, float factor, float n_orig, float beta_fast,
    float beta_slow, float *freq)
{
    const double pi = 3.14159265358979323846;
    double log_base = log((double)base);
    double dim_fast = n_rot * log((double)n_orig / ((double)beta_fast * 2 * pi)) / (2 * log_base);
    double dim_slow = n_rot * log((double)n_orig / ((double)beta_slow * 2 * pi)) / (2 * log_base);
    double lo = fmax(0.0, floor(dim_fast)), hi = fmin(n_rot - 1.0, ceil(dim_slow));
    for (uint32_t i = 0; i < n_rot / 2; i++) {
        double f = pow((double)base, -2.0 * i / n_rot);
        double ramp = fmin(1.0, fmax(0.0, (i - lo) / fmax(0.001, hi - lo)));
        freq[i] = (float)(f / (double)factor * ramp + f * (1.0 - ramp));
    }
}

/* Divides freq by the file's factors tensor, if it is there. */
static ps_status apply_factors(
    const ps_gguf *gguf, const char *name, uint32_t n, float *freq, bool *found, ps_err *err)
{
    const ps_gguf_tensor *t = ps_gguf_tensor_find(gguf, name);
    *found = t != NULL;
    if (t == NULL) return PS_OK;
    if (t->fmt != PS_FMT_F32 || t->n_dims != 1 || t->dims[0] != n)
        return ps_fail_field(err, PS_EFORMAT, name, "%s must hold %u float32 factors", name, n);
    float factors[PS_MAX_HEAD_DIM / 2];
    ps_status status = ps_gguf_pread(gguf, t->i_file, t->offset, factors, n * sizeof *factors, err);
    if (status != PS_OK) return status;
    for (uint32_t i = 0; i < n; i++) {
        if (!(factors[i] > 0.0f) || !isfinite(factors[i]))
            return ps_fail_field(err, PS_EFORMAT, name, "%s[%u] is not a positive number", name, i);
        freq[i] /= factors[i];
    }
    return PS_OK;
}

static bool is_string(const ps_gguf_kv *kv, const char *s)
{
    ps_gguf_str text = {0};
    return ps_gguf_get_str(kv, &text) && ps_gguf_str_eq(text, s);
}

ps_status ps_arch_rope(const ps_gguf *gguf, const ps_arch *arch, const ps_hparams *hp,
    uint32_t i_rope, uint32_t n_ctx, float *freq, float *mag, ps_err *err)
{
    reader r = {.gguf = gguf, .arch = arch->name, .err = err};
    float base = 10000.0f, factor = 1.0f, attn_factor = 1.0f;
    uint32_t n_orig = hp->n_ctx_train;
    PS_TRY(read_f32(&r, "rope.freq_base", true, 1.0f, 1e15f, &base));
    PS_TRY(read_f32(&r, "rope.scaling.factor", true, 0.0f, 1e6f, &factor));
    PS_TRY(read_f32(&r, "rope.scaling.attn_factor", true, 0.0f, 1e6f, &attn_factor));
    PS_TRY(read_u32(&r, "rope.scaling.original_context_length", true, 1, MAX_CTX, &n_orig));
    *mag = 1.0f;
    if (factor == 0.0f) factor = 1.0f;

    if (i_rope == 1) { /* windowed layers: their own base, never scaled */
        base = arch->window_rope_base;
        PS_TRY(read_f32(&r, "rope.freq_base_swa", true, 1.0f, 1e15f, &base));
        for (uint32_t i = 0; i < hp->n_rot / 2; i++)
            freq[i] = (float)pow((double)base, -2.0 * i / hp->n_rot);
        return PS_OK;
    }
    const ps_gguf_kv *kind = find(&r, "rope.scaling.type");
    if (is_string(kind, "yarn")) {
        float beta_fast = 32.0f, beta_slow = 1.0f;
        PS_TRY(read_f32(&r, "rope.scaling.yarn_beta_fast", true, 0.001f, 1e6f, &beta_fast));
        PS_TRY(read_f32(&r, "rope.scaling.yarn_beta_slow", true, 0.001f, 1e6f, &beta_slow));
        yarn(base, hp->n_rot, factor, (float)n_orig, beta_fast, beta_slow, freq);
        *mag = attn_factor * (1.0f + 0.1f * logf(factor));
    } else {
        bool linear = is_string(kind, "linear");
        if (kind != NULL && !linear && !is_string(kind, "none") && !is_string(kind, "longrope"))
            return ps_fail_unsupported(err, "rope.scaling.type", "none, linear, yarn, longrope",
                "the file asks for a kind of rope scaling that we don't have");
        for (uint32_t i = 0; i < hp->n_rot / 2; i++)
            freq[i] = (float)pow((double)base, -2.0 * i / hp->n_rot) / (linear ? factor : 1.0f);
    }
    bool found = false;
    PS_TRY(apply_factors(gguf, "rope_freqs.weight", hp->n_rot / 2, freq, &found, err));
    /* Phi-3: one set of factors for contexts it was first trained on, one for longer ones. */
    PS_TRY(apply_factors(gguf,
        n_ctx > n_orig ? "rope_factors_long.weight" : "rope_factors_short.weight", hp->n_rot / 2,
        freq, &found, err));
    if (found) *mag = attn_factor;
    return PS_OK;
}
