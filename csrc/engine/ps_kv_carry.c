/* ps_kv_carry - see ps_kv_carry.h. The order is [layer][K, V][sequence's pages][head]: a page of a
 * unit that is cut differently in two plans is some heads of it in each. */
#include "engine/ps_kv_carry.h"

struct ps_kv_carry {
    unsigned char *bytes; /* owns; [n_layer][2][n_pages][page_bytes] */
    uint64_t page_bytes;  /* of all heads */
    uint32_t n_pages;     /* in use, of all sequences one after another */
};

static uint32_t pages_of(const ps_kv *kv, uint32_t seq)
{
    return (kv->length[seq] + PS_KV_PAGE_TOK - 1) / PS_KV_PAGE_TOK;
}

/* The pages [from, to) of the carry, of one unit's K or V: a whole unit's in one go where they lie
 * behind each other in its memory, too, which is the rule. */
static ps_status carry_run(const ps_kv_carry *c, bool in, ps_exec *x, uint32_t unit, bool v,
    uint32_t from, uint32_t to, int32_t page, ps_err *err)
{
    const ps_plan *p = ps_exec_plan(x);
    const ps_unit *u = &p->model->units[unit];
    const ps_unit_kv *home = &p->kv[unit];
    uint64_t head_bytes = home->page_bytes / u->n_rows;
    ps_space space = home->home == PS_KV_DEV ? PS_SPACE_DEV_KV : PS_SPACE_HOST_KV;
    uint64_t row = ((uint64_t)u->layer * 2 + v) * c->n_pages + from;
    return ps_exec_move_kv(x, in,
        ps_ref(space, home->offset + (v ? home->v_skip : 0) + (uint64_t)page * home->page_bytes),
        c->bytes + row * c->page_bytes + u->first_row * head_bytes,
        (uint64_t)(to - from) * home->page_bytes, err);
}

static ps_status carry_unit(
    const ps_kv_carry *c, bool in, ps_exec *x, const ps_kv *kv, uint32_t unit, bool v, ps_err *err)
{
    bool whole = ps_exec_plan(x)->kv[unit].page_bytes == c->page_bytes;
    uint32_t at = 0; /* in the carry */
    for (uint32_t seq = 0; seq < kv->n_seq; seq++) {
        const int32_t *table = kv->table + (size_t)seq * kv->max_pages;
        for (uint32_t i = 0, n = pages_of(kv, seq), next; i < n; i = next) {
            next = i + 1;
            while (whole && next < n && table[next] == table[next - 1] + 1) next++;
            ps_status status = carry_run(c, in, x, unit, v, at, at + (next - i), table[i], err);
            if (status != PS_OK) return status;
            at += next - i;
        }
    }
    return PS_OK;
}

static ps_status carry_all(const ps_kv_carry *c, bool in, ps_exec *x, const ps_kv *kv, ps_err *err)
{
    const ps_plan *p = ps_exec_plan(x);
    for (uint32_t u = 0; u < p->model->n_units; u++)
        for (int v = 0; v < 2 && p->kv[u].page_bytes > 0; v++) {
            ps_status status = carry_unit(c, in, x, kv, u, v != 0, err);
            if (status != PS_OK) return status;
        }
    return PS_OK;
}

ps_status ps_kv_carry_take(ps_exec *x, const ps_kv *kv, ps_kv_carry **out, ps_err *err)
{
    *out = NULL;
    const ps_plan *p = ps_exec_plan(x);
    ps_kv_carry *c = ps_alloc(1, sizeof *c);
    if (c == NULL) return ps_fail(err, PS_ENOMEM, "no host memory to keep sequences");
    c->page_bytes = p->kv_page_bytes;
    for (uint32_t seq = 0; seq < kv->n_seq; seq++) c->n_pages += pages_of(kv, seq);
    uint64_t n_bytes = c->page_bytes * c->n_pages * 2 * p->model->hp.n_layer;
    ps_status status = PS_OK;
    c->bytes = ps_alloc(n_bytes + 1, 1);
    if (c->bytes == NULL)
        status = ps_fail(err, PS_ENOMEM,
            "no host memory for the %.1f MiB that sequences hold, while their cache moves",
            (double)n_bytes / (1 << 20));
    if (status == PS_OK) status = carry_all(c, false, x, kv, err);
    if (status != PS_OK)
        ps_kv_carry_destroy(c);
    else
        *out = c;
    return status;
}

ps_status ps_kv_carry_put(const ps_kv_carry *c, ps_exec *x, const ps_kv *kv, ps_err *err)
{
    ps_check_bug(c->page_bytes == ps_exec_plan(x)->kv_page_bytes, err);
    return carry_all(c, true, x, kv, err);
}

void ps_kv_carry_destroy(ps_kv_carry *c)
{
    if (c == NULL) return;
    ps_free(c->bytes);
    ps_free(c);
}
