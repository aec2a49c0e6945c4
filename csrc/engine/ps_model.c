/* ps_model - see ps_model.h. Opening walks the layers once, finds each tensor that the architecture
 * wants, checks its shape, and lays the unit's image out. Tensors nobody asked for are left alone.
 */
#include "engine/ps_model.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "engine/ps_arch.h"
#include "engine/ps_images.h"

const char *ps_unit_kind_name(ps_unit_kind kind)
{
    static const char *const names[PS_UNIT_KIND_COUNT] = {
        "embed", "attn", "ffn", "router", "expert", "head"};
    return (unsigned)kind < PS_UNIT_KIND_COUNT ? names[kind] : "unknown";
}

const char *ps_model_architectures(void)
{
    return ps_arch_names();
}

/* ---- building the unit list ---- */

typedef struct builder {
    ps_model *model;
    const ps_arch *arch;
    uint32_t cap_units, cap_weights;
    ps_err *err;
} builder;

static ps_status begin_unit(
    builder *b, ps_unit_kind kind, int32_t layer, int32_t expert, int32_t *index)
{
    ps_model *m = b->model;
    if (m->n_units == b->cap_units) {
        uint32_t cap = b->cap_units == 0 ? 64 : b->cap_units * 2;
        ps_unit *units = ps_realloc(m->units, cap, sizeof *units);
        if (units == NULL)
            return ps_fail(b->err, PS_ENOMEM, "no host memory for the list of units");
        m->units = units;
        b->cap_units = cap;
    }
    ps_unit *u = &m->units[m->n_units];
    *u = (ps_unit){.kind = kind,
        .layer = layer,
        .expert = expert,
        .first_weight = m->n_weights,
        .n_rows = 1,
        .row_step = 1,
        .use = 1.0,
        .of = -1};
    if (layer < 0)
        snprintf(u->name, sizeof u->name, "%s", ps_unit_kind_name(kind));
    else if (expert < 0)
        snprintf(u->name, sizeof u->name, "blk.%d.%s", layer, ps_unit_kind_name(kind));
    else
        snprintf(u->name, sizeof u->name, "blk.%d.expert.%d", layer, expert);
    *index = (int32_t)m->n_units++;
    return PS_OK;
}

/* Where in the file a weight is, and what shape the architecture wants it to have. */
typedef struct want {
    ps_role role;
    bool optional;
    uint32_t n_rows, n_cols; /* n_cols alone and n_rows == 1: a 1-D tensor */
    uint32_t n_stack,
        i_stack; /* experts: n_stack matrices in one tensor, this is number i_stack; else 0 */
} want;

static bool shape_matches(const ps_gguf_tensor *t, const want *w)
{
    uint32_t n_dims = w->n_stack > 0 ? 3 : w->n_rows > 1 ? 2 : 1;
    uint64_t dims[3] = {w->n_cols, w->n_rows, w->n_stack};
    if (t->n_dims < n_dims) return false;
    for (uint32_t i = 0; i < PS_GGUF_MAX_DIMS; i++)
        if (t->dims[i] != (i < n_dims ? dims[i] : 1)) return false;
    return true;
}

static ps_status check_tensor(builder *b, const ps_gguf_tensor *t, const want *w)
{
    if (!shape_matches(t, w)) {
        ps_fail_field(b->err, PS_EFORMAT, t->name,
            "tensor %s has the shape [%llu, %llu, %llu]; expected [%u, %u, %u]", t->name,
            (unsigned long long)t->dims[0], (unsigned long long)t->dims[1],
            (unsigned long long)t->dims[2], w->n_cols, w->n_rows, w->n_stack > 0 ? w->n_stack : 1);
        if (b->err != NULL) b->err->offset = t->offset;
        return PS_EFORMAT;
    }
    if (ps_fmt_get(t->fmt) == NULL) {
        const char *name = ps_gguf_tensor_type_name(t->fmt);
        return ps_fail_unsupported(b->err, name != NULL ? name : "tensor type",
            "f32, f16, bf16, q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k, q6_k, iq4_nl, "
            "iq4_xs, mxfp4",
            "tensor %s has the type %s", t->name, name != NULL ? name : "unknown");
    }
    return PS_OK;
}

static ps_status push_weight(builder *b, const ps_gguf_tensor *t, const want *w)
{
    ps_model *m = b->model;
    ps_unit *u = &m->units[m->n_units - 1];
    if (m->n_weights == b->cap_weights) {
        uint32_t cap = b->cap_weights == 0 ? 512 : b->cap_weights * 2;
        ps_weight *weights = ps_realloc(m->weights, cap, sizeof *weights);
        if (weights == NULL)
            return ps_fail(b->err, PS_ENOMEM, "no host memory for the list of weights");
        m->weights = weights;
        b->cap_weights = cap;
    }
    /* Small tensors (norms, biases, sinks) become float32: kernels then need no format for them.
     * Stacked biases are two-dimensional in the file but are such tensors too. */
    bool vector =
        w->n_rows == 1 || w->role == PS_W_GATE_B || w->role == PS_W_UP_B || w->role == PS_W_DOWN_B;
    ps_weight *x = &m->weights[m->n_weights];
    *x = (ps_weight){.role = w->role,
        .fmt = vector ? (uint32_t)PS_FMT_F32 : t->fmt,
        .file_fmt = t->fmt,
        .n_rows = w->n_rows,
        .n_cols = w->n_cols};
    uint64_t n_bytes = 0, end = 0;
    if (!ps_fmt_row_bytes(x->fmt, x->n_cols, &x->row_bytes) ||
        !ps_fmt_row_bytes(t->fmt, x->n_cols, &x->file_row_bytes) ||
        !ps_mul_u64(x->row_bytes, x->n_rows, &n_bytes) ||
        !ps_mul_u64(x->file_row_bytes, x->n_rows, &x->tensor_skip) ||
        !ps_mul_u64(x->tensor_skip, w->i_stack, &x->tensor_skip) ||
        !ps_round_up_u64(u->n_bytes, PS_WEIGHT_ALIGN, &x->offset) ||
        !ps_add_u64(x->offset, n_bytes, &end) || end >> 40 != 0)
        return ps_fail_field(
            b->err, PS_EFORMAT, t->name, "tensor %s has a size that cannot be", t->name);
    x->i_tensor = (uint32_t)(t - ps_gguf_tensor_at(m->gguf, 0));
    u->n_bytes = end;
    u->n_weights++;
    m->n_weights++;
    return PS_OK;
}

/* Adds the named tensor to the unit begun last. *found may be NULL. */
static ps_status add(builder *b, want w, bool *found, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));
static ps_status add(builder *b, want w, bool *found, const char *fmt, ...)
{
    char name[128];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(name, sizeof name, fmt, ap);
    va_end(ap);
    const ps_gguf_tensor *t = ps_gguf_tensor_find(b->model->gguf, name);
    if (found != NULL) *found = t != NULL;
    if (t == NULL) {
        if (w.optional) return PS_OK;
        return ps_fail_field(b->err, PS_EFORMAT, name,
            "the file lacks the tensor %s, which its architecture needs", name);
    }
    PS_TRY(check_tensor(b, t, &w));
    return push_weight(b, t, &w);
}

static bool has_tensor(const builder *b, const char *fmt, uint32_t layer)
{
    char name[128];
    snprintf(name, sizeof name, "blk.%u.%s", layer, fmt);
    return ps_gguf_tensor_find(b->model->gguf, name) != NULL;
}

static ps_status add_norm(builder *b, uint32_t layer, const char *name)
{
    uint32_t n = b->model->hp.n_embd;
    PS_TRY(add(b, (want){.role = PS_W_NORM, .n_rows = 1, .n_cols = n}, NULL, "blk.%u.%s.weight",
        layer, name));
    bool optional = b->model->hp.norm != PS_NORM_LAYER;
    if (optional) return PS_OK;
    return add(b, (want){.role = PS_W_NORM_B, .n_rows = 1, .n_cols = n}, NULL, "blk.%u.%s.bias",
        layer, name);
}

static uint32_t block_elems(const ps_model *m, uint32_t unit, ps_role role)
{
    const ps_weight *w = ps_model_find(m, unit, role);
    const ps_fmt_info *info = w != NULL ? ps_fmt_get(w->fmt) : NULL;
    return info != NULL ? info->block_elems : 1;
}

static ps_status build_attn(builder *b, uint32_t layer)
{
    ps_model *m = b->model;
    const ps_hparams *hp = &m->hp;
    uint32_t nq = hp->n_head * hp->head_dim, nk = hp->n_kv_head * hp->head_dim, n = hp->n_embd;
    int32_t unit = -1;
    PS_TRY(begin_unit(b, PS_UNIT_ATTN, (int32_t)layer, -1, &unit));
    m->layers[layer].attn = unit;
    PS_TRY(add_norm(b, layer, "attn_norm"));
    PS_TRY(add(b, (want){PS_W_Q_NORM, true, 1, hp->head_dim, 0, 0}, NULL,
        "blk.%u.attn_q_norm.weight", layer));
    PS_TRY(add(b, (want){PS_W_K_NORM, true, 1, hp->head_dim, 0, 0}, NULL,
        "blk.%u.attn_k_norm.weight", layer));
    PS_TRY(add(
        b, (want){PS_W_SINKS, true, 1, hp->n_head, 0, 0}, NULL, "blk.%u.attn_sinks.weight", layer));
    /* gpt-oss calls its feed-forward norm post_attention_norm; there it belongs to the router unit.
     */
    if (strcmp(b->arch->ffn_norm, "post_attention_norm") != 0)
        PS_TRY(add(b, (want){PS_W_POST_NORM, true, 1, n, 0, 0}, NULL,
            "blk.%u.post_attention_norm.weight", layer));
    if (has_tensor(b, "attn_qkv.weight", layer)) {
        PS_TRY(add(b, (want){PS_W_QKV_B, true, 1, nq + 2 * nk, 0, 0}, NULL, "blk.%u.attn_qkv.bias",
            layer));
        PS_TRY(add(b, (want){PS_W_QKV, false, nq + 2 * nk, n, 0, 0}, NULL, "blk.%u.attn_qkv.weight",
            layer));
    } else {
        PS_TRY(add(b, (want){PS_W_Q_B, true, 1, nq, 0, 0}, NULL, "blk.%u.attn_q.bias", layer));
        PS_TRY(add(b, (want){PS_W_K_B, true, 1, nk, 0, 0}, NULL, "blk.%u.attn_k.bias", layer));
        PS_TRY(add(b, (want){PS_W_V_B, true, 1, nk, 0, 0}, NULL, "blk.%u.attn_v.bias", layer));
        PS_TRY(add(b, (want){PS_W_Q, false, nq, n, 0, 0}, NULL, "blk.%u.attn_q.weight", layer));
        PS_TRY(add(b, (want){PS_W_K, false, nk, n, 0, 0}, NULL, "blk.%u.attn_k.weight", layer));
        PS_TRY(add(b, (want){PS_W_V, false, nk, n, 0, 0}, NULL, "blk.%u.attn_v.weight", layer));
    }
    PS_TRY(add(b, (want){PS_W_O_B, true, 1, n, 0, 0}, NULL, "blk.%u.attn_output.bias", layer));
    PS_TRY(add(b, (want){PS_W_O, false, n, nq, 0, 0}, NULL, "blk.%u.attn_output.weight", layer));
    ps_unit *u = &m->units[unit];
    u->kv_bytes_per_tok = 2 * nk * 2;
    u->n_rows = hp->n_kv_head;
    uint32_t group = nq / hp->n_kv_head, block = block_elems(m, (uint32_t)unit, PS_W_O);
    u->row_step = 1;
    while ((uint64_t)u->row_step * group % block != 0)
        u->row_step++; /* ends at `block` at the latest */
    return PS_OK;
}

/* Parts are whole blocks of DOWN's rows, and where the block is short (16-bit weights: 1) enough of
 * them that rows of a part begin where vectors can be loaded. */
static uint32_t ffn_step(uint32_t n_ff, uint32_t block)
{
    uint32_t step = block;
    while (step < 64 && n_ff % (2 * step) == 0) step *= 2;
    return step;
}

static ps_status build_ffn(builder *b, uint32_t layer)
{
    ps_model *m = b->model;
    const ps_hparams *hp = &m->hp;
    uint32_t n = hp->n_embd, f = hp->n_ff;
    int32_t unit = -1;
    PS_TRY(begin_unit(b, PS_UNIT_FFN, (int32_t)layer, -1, &unit));
    m->layers[layer].ffn = unit;
    PS_TRY(add_norm(b, layer, b->arch->ffn_norm));
    PS_TRY(add(
        b, (want){PS_W_POST_NORM, true, 1, n, 0, 0}, NULL, "blk.%u.post_ffw_norm.weight", layer));
    PS_TRY(add(b, (want){PS_W_GATE_B, true, 1, f, 0, 0}, NULL, "blk.%u.ffn_gate.bias", layer));
    PS_TRY(add(b, (want){PS_W_UP_B, true, 1, hp->fused_gate_up ? 2 * f : f, 0, 0}, NULL,
        "blk.%u.ffn_up.bias", layer));
    PS_TRY(add(b, (want){PS_W_DOWN_B, true, 1, n, 0, 0}, NULL, "blk.%u.ffn_down.bias", layer));
    if (hp->ffn_gated && !hp->fused_gate_up)
        PS_TRY(add(b, (want){PS_W_GATE, false, f, n, 0, 0}, NULL, "blk.%u.ffn_gate.weight", layer));
    PS_TRY(add(b, (want){PS_W_UP, false, hp->fused_gate_up ? 2 * f : f, n, 0, 0}, NULL,
        "blk.%u.ffn_up.weight", layer));
    PS_TRY(add(b, (want){PS_W_DOWN, false, n, f, 0, 0}, NULL, "blk.%u.ffn_down.weight", layer));
    m->units[unit].n_rows = f;
    m->units[unit].row_step = ffn_step(f, block_elems(m, (uint32_t)unit, PS_W_DOWN));
    return PS_OK;
}

static ps_status build_expert(builder *b, uint32_t layer, uint32_t e)
{
    const ps_hparams *hp = &b->model->hp;
    static const struct {
        ps_role role;
        const char *name;
    } parts[] = {{PS_W_GATE, "ffn_gate"}, {PS_W_UP, "ffn_up"}, {PS_W_DOWN, "ffn_down"}};
    int32_t unit = -1;
    PS_TRY(begin_unit(b, PS_UNIT_EXPERT, (int32_t)layer, (int32_t)e, &unit));
    b->model->units[unit].use = (double)hp->n_expert_used / hp->n_expert;
    if (e == 0) b->model->layers[layer].first_expert = unit;
    for (int i = 0; i < 3; i++) {
        bool down = parts[i].role == PS_W_DOWN, stacked = false;
        uint32_t rows = down ? hp->n_embd : hp->n_ff_expert,
                 cols = down ? hp->n_ff_expert : hp->n_embd;
        PS_TRY(add(b, (want){parts[i].role, true, rows, cols, hp->n_expert, e}, &stacked,
            "blk.%u.%s_exps.weight", layer, parts[i].name));
        if (!stacked) /* files from before experts were stacked have one tensor for each */
            PS_TRY(add(b, (want){parts[i].role, false, rows, cols, 0, 0}, NULL,
                "blk.%u.%s.%u.weight", layer, parts[i].name, e));
    }
    return PS_OK;
}

static ps_status build_router(builder *b, uint32_t layer)
{
    ps_model *m = b->model;
    const ps_hparams *hp = &m->hp;
    uint32_t ne = hp->n_expert, f = hp->n_ff_expert;
    int32_t unit = -1;
    PS_TRY(begin_unit(b, PS_UNIT_ROUTER, (int32_t)layer, -1, &unit));
    m->layers[layer].router = unit;
    PS_TRY(add_norm(b, layer, b->arch->ffn_norm));
    PS_TRY(
        add(b, (want){PS_W_ROUTER_B, true, 1, ne, 0, 0}, NULL, "blk.%u.ffn_gate_inp.bias", layer));
    PS_TRY(
        add(b, (want){PS_W_GATE_B, true, ne, f, 0, 0}, NULL, "blk.%u.ffn_gate_exps.bias", layer));
    PS_TRY(add(b, (want){PS_W_UP_B, true, ne, f, 0, 0}, NULL, "blk.%u.ffn_up_exps.bias", layer));
    PS_TRY(add(b, (want){PS_W_DOWN_B, true, ne, hp->n_embd, 0, 0}, NULL,
        "blk.%u.ffn_down_exps.bias", layer));
    PS_TRY(add(b, (want){PS_W_ROUTER, false, ne, hp->n_embd, 0, 0}, NULL,
        "blk.%u.ffn_gate_inp.weight", layer));
    for (uint32_t e = 0; e < ne; e++) PS_TRY(build_expert(b, layer, e));
    return PS_OK;
}

static ps_status build_embed(builder *b)
{
    ps_model *m = b->model;
    const ps_gguf_tensor *t = ps_gguf_tensor_find(m->gguf, "token_embd.weight");
    if (t == NULL)
        return ps_fail_field(b->err, PS_EFORMAT, "token_embd.weight",
            "the file has no tensor token_embd.weight; is it a vocabulary without weights?");
    if (t->dims[1] == 0 || t->dims[1] > (1u << 24))
        return ps_fail_field(b->err, PS_EFORMAT, "token_embd.weight", "a vocabulary of %llu tokens",
            (unsigned long long)t->dims[1]);
    m->hp.n_vocab = (uint32_t)t->dims[1];
    m->hp.tied = ps_gguf_tensor_find(m->gguf, "output.weight") == NULL;
    if (m->hp.tied) return PS_OK;
    PS_TRY(begin_unit(b, PS_UNIT_EMBED, -1, -1, &m->embed));
    return add(
        b, (want){PS_W_TABLE, false, m->hp.n_vocab, m->hp.n_embd, 0, 0}, NULL, "token_embd.weight");
}

static ps_status build_head(builder *b)
{
    ps_model *m = b->model;
    uint32_t n = m->hp.n_embd;
    PS_TRY(begin_unit(b, PS_UNIT_HEAD, -1, -1, &m->head));
    PS_TRY(add(b, (want){PS_W_NORM, false, 1, n, 0, 0}, NULL, "output_norm.weight"));
    if (m->hp.norm == PS_NORM_LAYER)
        PS_TRY(add(b, (want){PS_W_NORM_B, false, 1, n, 0, 0}, NULL, "output_norm.bias"));
    PS_TRY(add(b, (want){PS_W_HEAD, false, m->hp.n_vocab, n, 0, 0}, NULL, "%s",
        m->hp.tied ? "token_embd.weight" : "output.weight"));
    if (m->hp.tied) m->embed = m->head;
    m->units[m->head].n_rows = m->hp.n_vocab;
    m->units[m->head].row_step = m->hp.n_vocab % 64 == 0 ? 64 : 1;
    return PS_OK;
}

static ps_status build_units(builder *b)
{
    ps_model *m = b->model;
    PS_TRY(build_embed(b));
    for (uint32_t i = 0; i < m->hp.n_layer; i++) {
        PS_TRY(build_attn(b, i));
        if (m->hp.n_expert > 0 && has_tensor(b, "ffn_gate_inp.weight", i))
            PS_TRY(build_router(b, i));
        else if (b->arch->always_experts || m->hp.n_ff == 0)
            return ps_fail_field(b->err, PS_EFORMAT, "ffn_gate_inp", "layer %u has no router", i);
        else
            PS_TRY(build_ffn(b, i));
    }
    PS_TRY(build_head(b));
    for (uint32_t i = 0; i < m->n_units; i++)
        if (!ps_add_u64(m->n_bytes, m->units[i].n_bytes, &m->n_bytes))
            return ps_fail(b->err, PS_EFORMAT, "the model's size overflows");
    return PS_OK;
}

static ps_status open_model(const char *path, ps_model *m, ps_err *err)
{
    PS_TRY(ps_gguf_open(path, &m->gguf, err));
    ps_gguf_str name = {0};
    if (!ps_gguf_get_str(ps_gguf_find(m->gguf, "general.architecture"), &name))
        return ps_gguf_fail_key(
            m->gguf, "general.architecture", err, "the file does not say its architecture");
    char arch_name[sizeof m->arch] = {0};
    if (name.n_bytes < sizeof arch_name) memcpy(arch_name, name.s, name.n_bytes);
    const ps_arch *arch = ps_arch_find(arch_name);
    if (arch == NULL)
        return ps_fail_unsupported(err, arch_name[0] != 0 ? arch_name : "architecture",
            ps_arch_names(), "the architecture \"%.*s\" is not one that we run",
            (int)ps_min_u64(name.n_bytes, 64), name.s);
    memcpy(m->arch, arch_name, sizeof m->arch);
    PS_TRY(ps_arch_hparams(m->gguf, arch, &m->hp, err));
    m->layers = ps_alloc(m->hp.n_layer, sizeof *m->layers);
    if (m->layers == NULL)
        return ps_fail(err, PS_ENOMEM, "no host memory for %u layers", m->hp.n_layer);
    PS_TRY(ps_arch_layers(m->gguf, arch, &m->hp, m->layers, err));
    builder b = {.model = m, .arch = arch, .err = err};
    PS_TRY(build_units(&b));
    ps_gguf_digest(m->gguf, m->digest);
    return ps_images_create(m->n_units, &m->images, err);
}

ps_status ps_model_open(const char *path, ps_model **out, ps_err *err)
{
    *out = NULL;
    ps_model *m = ps_alloc(1, sizeof *m);
    if (m == NULL) return ps_fail(err, PS_ENOMEM, "no host memory to open a model");
    m->embed = m->head = -1;
    ps_status status = open_model(path, m, err);
    if (status != PS_OK)
        ps_model_close(m);
    else
        *out = m;
    return status;
}

void ps_model_close(ps_model *model)
{
    if (model == NULL) return;
    ps_images_destroy(model->images);
    ps_free(model->units);
    ps_free(model->weights);
    ps_free(model->layers);
    ps_gguf_close(model->gguf);
    ps_free(model);
}

const ps_weight *ps_model_find(const ps_model *model, uint32_t unit, ps_role role)
{
    const ps_unit *u = &model->units[unit];
    for (uint32_t i = 0; i < u->n_weights; i++)
        if (model->weights[u->first_weight + i].role == role)
            return &model->weights[u->first_weight + i];
    return NULL;
}

int32_t ps_model_find_unit(const ps_model *model, const char *name)
{
    for (uint32_t i = 0; i < model->n_units; i++)
        if (strcmp(model->units[i].name, name) == 0) return (int32_t)i;
    return -1;
}

ps_status ps_model_rope(
    const ps_model *model, uint32_t i_rope, uint32_t n_ctx, float *freq, float *mag, ps_err *err)
{
    return ps_arch_rope(
        model->gguf, ps_arch_find(model->arch), &model->hp, i_rope, n_ctx, freq, mag, err);
}
