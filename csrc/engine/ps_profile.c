/* ps_profile - see ps_profile.h: the order in which things are measured, and the list of samples.
 */
#include "engine/ps_profile.h"

#include <string.h>

#include "engine/ps_profile_priv.h"

#define DEFAULT_LIMIT_NS (11ull * 1000 * 1000 * 1000)

const char *ps_sample_side_name(ps_sample_side side)
{
    static const char *const names[PS_SAMPLE_SIDE_COUNT] = {"gpu", "cpu", "h2d", "d2h", "fixed"};
    return (unsigned)side < PS_SAMPLE_SIDE_COUNT ? names[side] : "unknown";
}

const char *ps_sample_load_name(ps_sample_load kind)
{
    static const char *const names[PS_LOAD_COUNT] = {"idle", "h2d", "d2h", "cpu", "gather"};
    return (unsigned)kind < PS_LOAD_COUNT ? names[kind] : "unknown";
}

ps_status ps_profile_step(profiler *p, ps_err *err)
{
    bool go_on = p->spec->progress == NULL ||
                 p->spec->progress(p->spec->ctx, ps_min_u64(p->n_done, p->n_steps), p->n_steps);
    p->n_done++;
    return go_on ? PS_OK : ps_fail(err, PS_ECANCELLED, "the measurement was interrupted");
}

ps_status ps_profile_add(profiler *p, ps_sample s, ps_err *err)
{
    ps_profile *out = p->out;
    if (out->n_samples == out->cap_samples) {
        uint32_t cap = out->cap_samples == 0 ? 256 : 2 * out->cap_samples;
        ps_sample *samples = ps_realloc(out->samples, cap, sizeof *samples);
        if (samples == NULL) return ps_fail(err, PS_ENOMEM, "no host memory for %u samples", cap);
        out->samples = samples;
        out->cap_samples = cap;
    }
    out->samples[out->n_samples++] = s;
    return PS_OK;
}

/* What decode spends its time on serves as load later, if all of it fits. */
static void consider_main(run_lane *l, const op_call *call, const ps_sample *s)
{
    if ((call->op != PS_OP_MATMUL && call->op != PS_OP_MOE_UP) || call->work.n_tok != 1) return;
    if (s->extrapolated || !(s->seconds > 0)) return;
    if (l->main_call != NULL && l->main_call->work.bytes >= call->work.bytes) return;
    l->main_call = call;
    l->main_ns = (uint64_t)(s->seconds * 1e9);
}

/* Call by call, and each on every lane, since what a call needs in memory is the same on all. */
static ps_status time_ops(
    profiler *p, const op_calls *calls, run_lane *lanes, uint32_t n, ps_err *err)
{
    static const load nothing = {PS_LOAD_IDLE, NULL};
    for (uint32_t i = 0; i < calls->n; i++)
        for (uint32_t k = 0; k < n; k++) {
            ps_sample sample;
            bool fits = false;
            PS_TRY(ps_profile_step(p, err));
            PS_TRY(
                ps_profile_time_call(p, &lanes[k], &calls->items[i], nothing, &sample, &fits, err));
            if (!fits) continue;
            PS_TRY(ps_profile_add(p, sample, err));
            consider_main(&lanes[k], &calls->items[i], &sample);
        }
    return PS_OK;
}

static ps_status measure(profiler *p, ps_err *err)
{
    op_calls *dev = &p->calls[PS_SIDE_DEV], *host = &p->calls[PS_SIDE_HOST];
    PS_TRY(ps_profile_lanes_open(p, err));
    int sm = p->device->info.sm;
    if (p->has_gpu)
        PS_TRY(ps_profile_collect(p->model, PS_SIDE_DEV, sm, p->max_tok, p->max_kv, dev, err));
    PS_TRY(ps_profile_collect(p->model, PS_SIDE_HOST, sm, p->max_tok, p->max_kv, host, err));
    p->n_steps = dev->n + host->n * p->n_cpu_lanes + ps_profile_bus_steps(p);
    if (p->has_gpu) PS_TRY(ps_profile_time_copies(p, err));
    PS_TRY(ps_profile_time_fixed(p, err));
    PS_TRY(time_ops(p, dev, p->lanes, 1, err));
    PS_TRY(time_ops(p, host, &p->lanes[p->n_lanes - p->n_cpu_lanes], p->n_cpu_lanes, err));
    return ps_profile_time_contention(p, err);
}

ps_status ps_profile_measure(const ps_model *model, ps_device *device, const ps_profile_spec *spec,
    ps_profile *out, ps_err *err)
{
    *out = (ps_profile){0};
    profiler *p = ps_alloc(1, sizeof *p);
    if (p == NULL) return ps_fail(err, PS_ENOMEM, "no host memory to measure with");
    p->model = model;
    p->device = device;
    p->spec = spec;
    p->out = out;
    p->max_tok = spec->max_tok > 0 ? spec->max_tok : PS_PROFILE_MAX_TOK;
    p->max_kv = spec->max_kv > 0 ? spec->max_kv : PS_PROFILE_MAX_KV;
    p->deadline_ns = ps_clock_ns() + (spec->limit_ns > 0 ? spec->limit_ns : DEFAULT_LIMIT_NS);
    ps_status status = measure(p, err);
    if (status != PS_OK) {
        ps_profile_drain(p);
        ps_profile_fini(out);
    }
    ps_profile_lanes_close(p);
    for (int s = 0; s < PS_SIDE_COUNT; s++) ps_free(p->calls[s].items);
    ps_free(p);
    return status;
}

void ps_profile_fini(ps_profile *profile)
{
    ps_free(profile->samples);
    *profile = (ps_profile){0};
}
