/* ps_kv - see ps_kv.h. */
#include "engine/ps_kv.h"

ps_status ps_kv_init(ps_kv *kv, const ps_plan *plan, ps_err *err)
{
    uint32_t n_seq = plan->spec.n_seq, n_ctx = plan->spec.n_ctx, n_pages = n_seq * plan->max_pages;
    *kv = (ps_kv){
        .n_seq = n_seq, .max_pages = plan->max_pages, .n_ctx = n_ctx, .fixed = plan->kv_backed};
    kv->table = ps_alloc(n_pages, sizeof *kv->table);
    kv->tokens = ps_alloc((uint64_t)n_seq * n_ctx, sizeof *kv->tokens);
    kv->length = ps_alloc(n_seq, sizeof *kv->length);
    kv->free_pages = ps_alloc(n_pages, sizeof *kv->free_pages);
    if (kv->table == NULL || kv->tokens == NULL || kv->length == NULL || kv->free_pages == NULL) {
        ps_kv_fini(kv);
        return ps_fail(
            err, PS_ENOMEM, "no host memory for %u sequences of %u tokens", n_seq, n_ctx);
    }
    for (uint32_t i = 0; i < n_pages; i++) {
        kv->table[i] = -1;
        kv->free_pages[i] = (int32_t)(n_pages - 1 - i); /* page 0 is handed out first */
    }
    kv->n_free = n_pages;
    return PS_OK;
}

void ps_kv_fini(ps_kv *kv)
{
    ps_free(kv->table);
    ps_free(kv->tokens);
    ps_free(kv->length);
    ps_free(kv->free_pages);
    *kv = (ps_kv){0};
}

void ps_kv_reserve(ps_kv *kv, uint32_t seq, uint32_t length)
{
    int32_t *row = kv->table + (size_t)seq * kv->max_pages;
    for (uint32_t i = 0; i < (length + PS_KV_PAGE_TOK - 1) / PS_KV_PAGE_TOK; i++)
        if (row[i] < 0)
            row[i] = kv->fixed ? (int32_t)(seq * kv->max_pages + i) : kv->free_pages[--kv->n_free];
}

void ps_kv_truncate(ps_kv *kv, uint32_t seq, uint32_t length)
{
    int32_t *row = kv->table + (size_t)seq * kv->max_pages;
    for (uint32_t i = kv->max_pages; i-- > (length + PS_KV_PAGE_TOK - 1) / PS_KV_PAGE_TOK;)
        if (row[i] >= 0) {
            if (!kv->fixed) kv->free_pages[kv->n_free++] = row[i];
            row[i] = -1;
        }
    if (kv->length[seq] > length) kv->length[seq] = length;
}

uint32_t ps_kv_match(const ps_kv *kv, uint32_t seq, const int32_t *tokens, uint32_t n)
{
    const int32_t *have = kv->tokens + (size_t)seq * kv->n_ctx;
    uint32_t i = 0, most = n < kv->length[seq] ? n : kv->length[seq];
    while (i < most && have[i] == tokens[i]) i++;
    return i;
}
