/* ps_kv - which tokens each sequence holds and in which KV pages they lie. The pages' bytes belong
 * to the executor.
 *
 * Pages are handed out as sequences grow and come back when they shrink, so that many short
 * sequences can share what one long one would take.
 *
 * Threads: the engine's thread.
 */
#ifndef PS_KV_H
#define PS_KV_H

#include "engine/ps_plan.h"

typedef struct ps_kv {
    uint32_t n_seq, max_pages, n_ctx;
    bool fixed;          /* page i of sequence s is s * max_pages + i */
    int32_t *table;      /* owns; [n_seq][max_pages]; pages that a sequence does not have are -1 */
    int32_t *tokens;     /* owns; [n_seq][n_ctx] what the cache was computed from */
    uint32_t *length;    /* owns; [n_seq] */
    int32_t *free_pages; /* owns; stack */
    uint32_t n_free;
    /* Plans with windows (all else empty): which pages a pass finds in VRAM. */
    const ps_plan *plan; /* borrows */
    uint32_t *near_from; /* owns; [n_windows][n_seq] pages from here on to the last are there */
    int32_t *near, *far; /* own; [n_windows][n_seq][max_pages] tables of the next pass */
} ps_kv;

ps_status ps_kv_init(ps_kv *kv, const ps_plan *plan, ps_err *err);
void ps_kv_fini(ps_kv *kv);
/* Pages for tokens up to `length`; never fails within n_ctx, because there is a page for every
 * token of every sequence. */
void ps_kv_reserve(ps_kv *kv, uint32_t seq, uint32_t length);
/* Before a pass of tokens first .. first + n - 1 of a sequence that attends in windows: its rows of
 * `near` and `far`. Every page before the last is in exactly one of the two, by what the passes so
 * far have left in VRAM; returns ps_pass_shape's `far`. */
uint32_t ps_kv_begin(ps_kv *kv, uint32_t seq, uint32_t first, uint32_t n);
/* After it. Staged passes refill the windows. */
void ps_kv_end(ps_kv *kv, uint32_t seq, uint32_t length, bool staged);
/* Whatever windows hold of a sequence counts no more: after a pass that failed, or where VRAM is
 * not what it was. Host memory has it all. */
void ps_kv_empty_windows(ps_kv *kv, uint32_t seq);
/* Forgets tokens from `length` on and gives their pages back. */
void ps_kv_truncate(ps_kv *kv, uint32_t seq, uint32_t length);
/* How many of these tokens the sequence already begins with. */
uint32_t ps_kv_match(const ps_kv *kv, uint32_t seq, const int32_t *tokens, uint32_t n);

#endif
