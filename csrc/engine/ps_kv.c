/* ps_kv - see ps_kv.h. */
#include "engine/ps_kv.h"

#include "engine/ps_ticks.h"

static uint32_t pages_of(uint32_t n_tok)
{
    return (n_tok + PS_KV_PAGE_TOK - 1) / PS_KV_PAGE_TOK;
}

ps_status ps_kv_init(ps_kv *kv, const ps_plan *plan, ps_err *err)
{
    uint32_t n_seq = plan->spec.n_seq, n_ctx = plan->spec.n_ctx, n_pages = n_seq * plan->max_pages;
    *kv = (ps_kv){
        .n_seq = n_seq, .max_pages = plan->max_pages, .n_ctx = n_ctx, .fixed = plan->kv_backed};
    kv->table = ps_alloc(n_pages, sizeof *kv->table);
    kv->tokens = ps_alloc((uint64_t)n_seq * n_ctx, sizeof *kv->tokens);
    kv->length = ps_alloc(n_seq, sizeof *kv->length);
    kv->free_pages = ps_alloc(n_pages, sizeof *kv->free_pages);
    uint64_t n_windows = plan->n_windows;
    kv->plan = plan;
    kv->near_from = ps_alloc(n_windows * n_seq + 1, sizeof *kv->near_from);
    kv->near = ps_alloc(n_windows * n_pages + 1, sizeof *kv->near);
    kv->far = ps_alloc(n_windows * n_pages + 1, sizeof *kv->far);
    if (kv->table == NULL || kv->tokens == NULL || kv->length == NULL || kv->free_pages == NULL ||
        kv->near_from == NULL || kv->near == NULL || kv->far == NULL) {
        ps_kv_fini(kv);
        return ps_fail(
            err, PS_ENOMEM, "no host memory for %u sequences of %u tokens", n_seq, n_ctx);
    }
    for (uint32_t i = 0; i < n_pages; i++) {
        kv->table[i] = -1;
        kv->free_pages[i] = (int32_t)(n_pages - 1 - i); /* page 0 is handed out first */
    }
    for (uint64_t i = 0; i < n_windows * n_pages; i++) kv->near[i] = kv->far[i] = -1;
    kv->n_free = n_pages;
    return PS_OK;
}

void ps_kv_fini(ps_kv *kv)
{
    ps_free(kv->table);
    ps_free(kv->tokens);
    ps_free(kv->length);
    ps_free(kv->free_pages);
    ps_free(kv->near_from);
    ps_free(kv->near);
    ps_free(kv->far);
    *kv = (ps_kv){0};
}

void ps_kv_reserve(ps_kv *kv, uint32_t seq, uint32_t length)
{
    int32_t *row = kv->table + (size_t)seq * kv->max_pages;
    for (uint32_t i = 0; i < pages_of(length); i++)
        if (row[i] < 0)
            row[i] = kv->fixed ? (int32_t)(seq * kv->max_pages + i) : kv->free_pages[--kv->n_free];
}

void ps_kv_truncate(ps_kv *kv, uint32_t seq, uint32_t length)
{
    int32_t *row = kv->table + (size_t)seq * kv->max_pages;
    for (uint32_t i = kv->max_pages; i-- > pages_of(length);)
        if (row[i] >= 0) {
            if (!kv->fixed) kv->free_pages[kv->n_free++] = row[i];
            row[i] = -1;
        }
    if (kv->length[seq] > length) kv->length[seq] = length;
    /* Where the last page that is left is not in VRAM, the next token does not bring it there:
     * windows begin anew with the next whole page. */
    for (uint32_t i = 0; i < kv->plan->n_windows; i++) {
        uint32_t *from = &kv->near_from[(size_t)i * kv->n_seq + seq];
        if (*from > pages_of(length)) *from = pages_of(length);
    }
}

/* ---- windows ---- */

uint32_t ps_kv_begin(ps_kv *kv, uint32_t seq, uint32_t first, uint32_t n)
{
    uint32_t far_bits = 0, end = pages_of(first + n);
    for (uint32_t i = 0; i < kv->plan->n_windows; i++) {
        const ps_kv_window *w = &kv->plan->windows[i];
        size_t row = (size_t)i * kv->n_seq + seq;
        int32_t *near = kv->near + row * kv->max_pages, *far = kv->far + row * kv->max_pages;
        uint32_t from = ps_kv_window_first(w, first + n);
        if (from < kv->near_from[row]) from = kv->near_from[row];
        for (uint32_t page = 0; page < end; page++) {
            near[page] = page >= from ? (int32_t)(seq * w->n_pages + page % w->n_pages) : -1;
            far[page] = page < from ? kv->table[(size_t)seq * kv->max_pages + page] : -1;
        }
        if (from > ps_kv_window_oldest(w, first)) far_bits |= ps_pass_far_bit(i);
    }
    return far_bits;
}

void ps_kv_end(ps_kv *kv, uint32_t seq, uint32_t length, bool staged)
{
    for (uint32_t i = 0; i < kv->plan->n_windows; i++) {
        uint32_t *from = &kv->near_from[(size_t)i * kv->n_seq + seq],
                 first = ps_kv_window_first(&kv->plan->windows[i], length);
        if (staged || *from < first) *from = first;
    }
}

void ps_kv_empty_windows(ps_kv *kv, uint32_t seq)
{
    for (uint32_t i = 0; i < kv->plan->n_windows; i++)
        kv->near_from[(size_t)i * kv->n_seq + seq] = pages_of(kv->length[seq]);
}

uint32_t ps_kv_match(const ps_kv *kv, uint32_t seq, const int32_t *tokens, uint32_t n)
{
    const int32_t *have = kv->tokens + (size_t)seq * kv->n_ctx;
    uint32_t i = 0, most = n < kv->length[seq] ? n : kv->length[seq];
    while (i < most && have[i] == tokens[i]) i++;
    return i;
}
