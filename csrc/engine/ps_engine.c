/* ps_engine - see ps_engine.h. */
#include "engine/ps_engine.h"

#include <stdatomic.h>
#include <string.h>

#include "engine/ps_kv_carry.h"

enum {
    MAX_OUT_BYTES = 256 << 20, /* logits of one pass when all are wanted */
};

/* What a plan decides the size of, but for the executor. */
typedef struct desk {
    const ps_plan *plan;             /* borrows */
    ps_kv kv;                        /* owns */
    int32_t *ids, *pos, *seq, *rows; /* own; [pass_tok] what the next pass brings */
} desk;

struct ps_engine {
    ps_model *model;         /* borrows */
    ps_device *device;       /* borrows */
    ps_exec_options options; /* of every executor */
    desk desk;               /* owns */
    ps_exec *exec;           /* owns; NULL once it is lost for good */
    const float *logits;     /* the executor's */
    uint32_t n_logits;
    _Atomic bool busy;
};

static void desk_fini(desk *d)
{
    ps_kv_fini(&d->kv);
    ps_free(d->ids);
    ps_free(d->pos);
    ps_free(d->seq);
    ps_free(d->rows);
    *d = (desk){0};
}

static ps_status desk_init(desk *d, const ps_plan *plan, ps_err *err)
{
    uint32_t n = plan->spec.pass_tok;
    *d = (desk){.plan = plan};
    d->ids = ps_alloc(n, sizeof *d->ids);
    d->pos = ps_alloc(n, sizeof *d->pos);
    d->seq = ps_alloc(n, sizeof *d->seq);
    d->rows = ps_alloc(n, sizeof *d->rows);
    ps_status status = PS_OK;
    if (d->ids == NULL || d->pos == NULL || d->seq == NULL || d->rows == NULL)
        status = ps_fail(err, PS_ENOMEM, "no host memory for passes of %u tokens", n);
    if (status == PS_OK) status = ps_kv_init(&d->kv, plan, err);
    if (status != PS_OK) desk_fini(d);
    return status;
}

ps_status ps_engine_create(ps_model *model, const ps_plan *plan, ps_device *device,
    const ps_exec_options *options, ps_engine **out, ps_err *err)
{
    *out = NULL;
    ps_engine *e = ps_alloc(1, sizeof *e);
    if (e == NULL) return ps_fail(err, PS_ENOMEM, "no host memory for an engine");
    e->model = model;
    e->device = device;
    e->options = *options;
    ps_status status = desk_init(&e->desk, plan, err);
    if (status == PS_OK) status = ps_exec_create(model, plan, device, options, &e->exec, err);
    if (status != PS_OK)
        ps_engine_destroy(e);
    else
        *out = e;
    return status;
}

void ps_engine_destroy(ps_engine *e)
{
    if (e == NULL) return;
    ps_exec_destroy(e->exec);
    desk_fini(&e->desk);
    ps_free(e);
}

/* ---- another plan ---- */

/* An executor of this plan, holding what is carried; none on failure. */
static ps_status move_in(
    ps_engine *e, desk *d, const ps_kv_carry *carry, ps_exec_past *past, bool quiet, ps_err *err)
{
    ps_exec_options options = e->options;
    if (quiet) options.progress = NULL;
    ps_status status = ps_exec_create(e->model, d->plan, e->device, &options, &e->exec, err);
    if (status == PS_OK) status = ps_kv_carry_put(carry, e->exec, &d->kv, err);
    if (status == PS_OK) {
        ps_exec_inherit(e->exec, past);
        for (uint32_t seq = 0; seq < d->kv.n_seq; seq++) ps_kv_empty_windows(&d->kv, seq);
    } else {
        ps_exec_destroy(e->exec);
        e->exec = NULL;
    }
    return status;
}

static ps_status change_desks(ps_engine *e, desk *next, ps_err *err)
{
    ps_kv_carry *carry = NULL;
    e->logits = NULL;
    e->n_logits = 0;
    ps_status status = ps_kv_carry_take(e->exec, &e->desk.kv, &carry, err);
    if (status != PS_OK) return status;
    ps_exec_past past;
    ps_exec_retire(e->exec, &past);
    e->exec = NULL;
    status = move_in(e, next, carry, &past, false, err);
    /* On the way back nobody is asked whether to go on: the answer may have brought us here. */
    if (status != PS_OK && (status == PS_EFATAL || move_in(e, &e->desk, carry, &past, true, NULL)))
        status = PS_EFATAL;
    ps_trace_destroy(past.trace); /* NULL where one of the two has inherited it */
    ps_kv_carry_destroy(carry);
    if (status == PS_EFATAL && err != NULL) err->status = PS_EFATAL;
    return status;
}

/* The same sequences, in the pages that the new plan's cache has for them. */
static void copy_sequences(const ps_kv *from, ps_kv *to)
{
    memcpy(to->tokens, from->tokens, (size_t)from->n_seq * from->n_ctx * sizeof *to->tokens);
    for (uint32_t seq = 0; seq < from->n_seq; seq++) {
        ps_kv_reserve(to, seq, from->length[seq]);
        to->length[seq] = from->length[seq];
    }
}

static ps_status replan(ps_engine *e, const ps_plan *plan, ps_err *err)
{
    const ps_plan_spec *old = &e->desk.plan->spec, *spec = &plan->spec;
    ps_check_bug(old->n_ctx == spec->n_ctx && old->n_seq == spec->n_seq &&
                     old->kv_fmt == spec->kv_fmt && old->accelerator == spec->accelerator,
        err);
    if (ps_exec_is_lost(e->exec))
        return ps_fail(err, PS_EFATAL, "the device was lost; close this engine and open another");
    desk next;
    ps_status status = desk_init(&next, plan, err);
    if (status != PS_OK) return status;
    copy_sequences(&e->desk.kv, &next.kv);
    status = change_desks(e, &next, err);
    desk_fini(status == PS_OK ? &e->desk : &next);
    if (status == PS_OK) e->desk = next;
    return status;
}

static bool enter(ps_engine *e)
{
    return !atomic_exchange(&e->busy, true);
}
static void leave(ps_engine *e)
{
    atomic_store(&e->busy, false);
}

static ps_status fail_busy(ps_err *err)
{
    return ps_fail(err, PS_EBUSY,
        "the engine is working for another thread; use one engine a thread, or wait");
}

ps_status ps_engine_replan(ps_engine *e, const ps_plan *plan, ps_err *err)
{
    if (!enter(e)) return fail_busy(err);
    ps_status status = replan(e, plan, err);
    leave(e);
    return status;
}

static ps_status check_token(const ps_engine *e, uint32_t seq, int32_t token, ps_err *err)
{
    if (seq >= e->desk.kv.n_seq)
        return ps_fail_field(
            err, PS_EREQUEST, "seq", "sequence %u of an engine with %u", seq, e->desk.kv.n_seq);
    if (token < 0 || (uint32_t)token >= e->model->hp.n_vocab)
        return ps_fail_field(err, PS_EREQUEST, "tokens", "token %d is not in the vocabulary of %u",
            token, e->model->hp.n_vocab);
    return PS_OK;
}

static ps_status check_room(const ps_engine *e, uint32_t seq, uint32_t n, ps_err *err)
{
    if (n > e->desk.kv.n_ctx - e->desk.kv.length[seq])
        return ps_fail_field(err, PS_EREQUEST, "tokens",
            "%u tokens do not fit behind %u others in a context of %u; open the engine with a "
            "larger n_ctx",
            n, e->desk.kv.length[seq], e->desk.kv.n_ctx);
    return PS_OK;
}

/* Tells the cache of a pass before and after it: runs of consecutive tokens, one a sequence. */
static uint32_t begin_pass(desk *d, uint32_t n_tok, bool one_sequence)
{
    uint32_t far = 0;
    for (uint32_t i = 0; i < (one_sequence ? 1 : n_tok); i++)
        far |=
            ps_kv_begin(&d->kv, (uint32_t)d->seq[i], (uint32_t)d->pos[i], one_sequence ? n_tok : 1);
    return far;
}

static void end_pass(desk *d, uint32_t n_tok, bool one_sequence, bool failed)
{
    bool staged = one_sequence && ps_pass_is_staged(d->plan, n_tok);
    for (uint32_t i = 0; i < (one_sequence ? 1 : n_tok); i++) {
        uint32_t seq = (uint32_t)d->seq[i];
        if (failed)
            ps_kv_empty_windows(&d->kv, seq);
        else
            ps_kv_end(&d->kv, seq, (uint32_t)d->pos[i] + (one_sequence ? n_tok : 1), staged);
    }
}

/* ids, pos, seq and rows hold the pass; pages are reserved. */
static ps_status run_pass(
    ps_engine *e, uint32_t n_tok, uint32_t n_out, uint32_t max_kv, bool one_sequence, ps_err *err)
{
    ps_batch batch = {.n_tok = n_tok,
        .n_out = n_out,
        .ids = e->desk.ids,
        .pos = e->desk.pos,
        .seq = e->desk.seq,
        .rows = e->desk.rows,
        .table = e->desk.kv.table,
        .near_pages = e->desk.kv.near,
        .far_pages = e->desk.kv.far,
        .far = begin_pass(&e->desk, n_tok, one_sequence),
        .max_kv = ps_pass_kv_bucket(e->desk.plan, n_tok, max_kv),
        .one_sequence = one_sequence};
    const float *logits = NULL;
    ps_status status = ps_exec_pass(e->exec, &batch, &logits, err);
    end_pass(&e->desk, n_tok, one_sequence, status != PS_OK);
    e->logits = status == PS_OK && n_out > 0 ? logits : NULL;
    e->n_logits = status == PS_OK ? n_out : 0;
    return status;
}

static ps_status append(
    ps_engine *e, uint32_t seq, const int32_t *tokens, uint32_t n, float *all_logits, ps_err *err)
{
    uint32_t before = e->desk.kv.length[seq], done = 0, most = e->desk.plan->spec.pass_tok;
    uint64_t row = (uint64_t)e->model->hp.n_vocab * sizeof(float);
    if (all_logits != NULL) {
        most = (uint32_t)ps_min_u64(most, ps_max_u64(1, MAX_OUT_BYTES / row));
        most = ps_exec_logit_rows(e->exec, n < most ? n : most);
        most = (uint32_t)ps_div_up_u64(n, ps_div_up_u64(n, most)); /* so that no pass is small */
    }
    ps_kv_reserve(&e->desk.kv, seq, before + n);
    while (done < n) {
        uint32_t n_tok = n - done < most ? n - done : most, n_out = 0, first = before + done;
        bool last = done + n_tok == n;
        for (uint32_t i = 0; i < n_tok; i++) {
            e->desk.ids[i] = tokens[done + i];
            e->desk.pos[i] = (int32_t)(first + i);
            e->desk.seq[i] = (int32_t)seq;
            if (all_logits != NULL || (last && i + 1 == n_tok)) e->desk.rows[n_out++] = (int32_t)i;
        }
        ps_status status = run_pass(e, n_tok, n_out, first + n_tok, true, err);
        if (status != PS_OK) {
            ps_kv_truncate(&e->desk.kv, seq, before);
            return status;
        }
        if (all_logits != NULL) {
            memcpy(all_logits + (size_t)done * e->model->hp.n_vocab, e->logits, n_out * row);
            e->logits += (size_t)(n_out - 1) * e->model->hp.n_vocab;
            e->n_logits = 1;
        }
        done += n_tok;
    }
    memcpy(e->desk.kv.tokens + (size_t)seq * e->desk.kv.n_ctx + before, tokens, n * sizeof *tokens);
    e->desk.kv.length[seq] = before + n;
    return PS_OK;
}

ps_status ps_engine_append(
    ps_engine *e, uint32_t seq, const int32_t *tokens, uint32_t n, float *all_logits, ps_err *err)
{
    if (!enter(e)) return fail_busy(err);
    ps_status status = n > 0 ? PS_OK : ps_fail_field(err, PS_EREQUEST, "tokens", "no tokens");
    for (uint32_t i = 0; i < n && status == PS_OK; i++)
        status = check_token(e, seq, tokens[i], err);
    if (status == PS_OK) status = check_room(e, seq, n, err);
    if (status == PS_OK) status = append(e, seq, tokens, n, all_logits, err);
    leave(e);
    return status;
}

static ps_status step(
    ps_engine *e, const uint32_t *seqs, const int32_t *tokens, uint32_t n, ps_err *err)
{
    uint32_t max_kv = 0;
    if (n == 0 || n > e->desk.plan->spec.pass_tok)
        return ps_fail_field(err, PS_EREQUEST, "tokens", "%u tokens in one step; expected 1 to %u",
            n, e->desk.plan->spec.pass_tok);
    for (uint32_t i = 0; i < n; i++) {
        ps_status status = check_token(e, seqs[i], tokens[i], err);
        if (status == PS_OK) status = check_room(e, seqs[i], 1, err);
        for (uint32_t j = 0; j < i && status == PS_OK; j++)
            if (seqs[j] == seqs[i])
                status = ps_fail_field(
                    err, PS_EREQUEST, "seqs", "sequence %u is in the step twice", seqs[i]);
        if (status != PS_OK) return status;
    }
    for (uint32_t i = 0; i < n; i++) {
        uint32_t at = e->desk.kv.length[seqs[i]];
        ps_kv_reserve(&e->desk.kv, seqs[i], at + 1);
        e->desk.ids[i] = tokens[i];
        e->desk.pos[i] = (int32_t)at;
        e->desk.seq[i] = (int32_t)seqs[i];
        e->desk.rows[i] = (int32_t)i;
        if (at + 1 > max_kv) max_kv = at + 1;
    }
    ps_status status = run_pass(e, n, n, max_kv, false, err);
    for (uint32_t i = 0; i < n; i++) {
        if (status != PS_OK) {
            ps_kv_truncate(&e->desk.kv, seqs[i], e->desk.kv.length[seqs[i]]);
            continue;
        }
        e->desk.kv.tokens[(size_t)seqs[i] * e->desk.kv.n_ctx + e->desk.kv.length[seqs[i]]] =
            tokens[i];
        e->desk.kv.length[seqs[i]]++;
    }
    return status;
}

ps_status ps_engine_step(
    ps_engine *e, const uint32_t *seqs, const int32_t *tokens, uint32_t n, ps_err *err)
{
    if (!enter(e)) return fail_busy(err);
    ps_status status = step(e, seqs, tokens, n, err);
    leave(e);
    return status;
}

const float *ps_engine_logits(const ps_engine *e)
{
    return e->logits;
}
uint32_t ps_engine_n_logits(const ps_engine *e)
{
    return e->n_logits;
}

uint32_t ps_engine_length(const ps_engine *e, uint32_t seq)
{
    return seq < e->desk.kv.n_seq ? e->desk.kv.length[seq] : 0;
}

uint32_t ps_engine_match(const ps_engine *e, uint32_t seq, const int32_t *tokens, uint32_t n)
{
    return seq < e->desk.kv.n_seq ? ps_kv_match(&e->desk.kv, seq, tokens, n) : 0;
}

ps_status ps_engine_truncate(ps_engine *e, uint32_t seq, uint32_t length, ps_err *err)
{
    if (!enter(e)) return fail_busy(err);
    ps_status status = PS_OK;
    if (seq >= e->desk.kv.n_seq)
        status = ps_fail_field(
            err, PS_EREQUEST, "seq", "sequence %u of an engine with %u", seq, e->desk.kv.n_seq);
    else
        ps_kv_truncate(&e->desk.kv, seq, length);
    leave(e);
    return status;
}

void ps_engine_cancel(ps_engine *e)
{
    ps_exec_cancel(e->exec);
}
ps_exec *ps_engine_exec(ps_engine *e)
{
    return e->exec;
}
