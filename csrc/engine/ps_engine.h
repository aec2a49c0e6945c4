/* ps_engine - sequences over an executor: appends tokens, cuts long prompts into passes, keeps what
 * is cached.
 *
 * Not here: text, sampling, which plan.
 * Threads: one at a time; a second thread gets PS_EBUSY at once. Only ps_engine_cancel is for any
 * thread.
 *
 * A call that fails or is cancelled leaves every sequence as it was before the call.
 */
#ifndef PS_ENGINE_H
#define PS_ENGINE_H

#include "engine/ps_exec.h"
#include "engine/ps_kv.h"

typedef struct ps_engine ps_engine;

/* model, plan and device are borrowed until destroy. */
ps_status ps_engine_create(ps_model *model, const ps_plan *plan, ps_device *device,
    const ps_exec_options *options, ps_engine **out, ps_err *err);
void ps_engine_destroy(ps_engine *e); /* NULL allowed */

/* Goes over to another plan of the same model, n_ctx, n_seq and cache format, with what the
 * sequences hold. The logits of the last call are gone. The memory of the old plan is given back
 * before that of the new one is taken. Where the new one cannot be had, the engine goes back to the
 * old plan, and with it to where it was; PS_EFATAL: not even that was possible, only destroy it. */
ps_status ps_engine_replan(ps_engine *e, const ps_plan *plan, ps_err *err);

/* Appends n tokens to a sequence. Afterwards ps_engine_logits() is the last token's; with
 * all_logits given, those of every appended token are copied there ([n][n_vocab]). PS_EREQUEST: a
 * token that is not in the vocabulary, a sequence that is not there, more tokens than n_ctx has
 * room for. */
ps_status ps_engine_append(
    ps_engine *e, uint32_t seq, const int32_t *tokens, uint32_t n, float *all_logits, ps_err *err);
/* One token for each of n different sequences, in one pass; ps_engine_logits() has n rows, in this
 * order. */
ps_status ps_engine_step(
    ps_engine *e, const uint32_t *seqs, const int32_t *tokens, uint32_t n, ps_err *err);

/* [n_vocab] of the last append, [n][n_vocab] of the last step; NULL before the first. Valid until
 * the next call. */
const float *ps_engine_logits(const ps_engine *e);
uint32_t ps_engine_n_logits(const ps_engine *e); /* rows of it */

uint32_t ps_engine_length(const ps_engine *e, uint32_t seq);
uint32_t ps_engine_match(
    const ps_engine *e, uint32_t seq, const int32_t *tokens, uint32_t n); /* see ps_kv_match */
ps_status ps_engine_truncate(ps_engine *e, uint32_t seq, uint32_t length, ps_err *err);

void ps_engine_cancel(ps_engine *e);
ps_exec *ps_engine_exec(ps_engine *e);

#endif
