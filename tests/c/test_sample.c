/* Tests of engine/ps_sample: every filter against a plain reference that sorts, frequencies of the
 * draws against its probabilities, and the odd inputs. */
#include "ps_test.h"

#include <float.h>

#include "engine/ps_sample.h"

enum { MAX_VOCAB = 512 };

static float uniform(uint64_t *rng, float low, float high)
{
    return low + (high - low) * (float)ps_rng_uniform(rng);
}

/* ---- the reference: probabilities of all tokens, by the definitions ---- */

typedef struct ranked {
    double logit;
    uint32_t id;
} ranked;

static int by_rank(const void *a, const void *b)
{
    const ranked *x = a, *y = b;
    if (x->logit != y->logit) return x->logit < y->logit ? 1 : -1;
    return x->id < y->id ? -1 : x->id > y->id;
}

/* p[n] = what each token should be drawn with. False if a filter's edge is too close to tell. */
static bool reference(const float *logits, uint32_t n, const ps_sample_params *q,
    const int32_t *seen, uint32_t n_seen, double *p)
{
    static ranked e[MAX_VOCAB];
    uint32_t n_left = 0;
    for (uint32_t i = 0; i < n; i++) {
        float x = logits[i];
        for (uint32_t j = 0; j < q->n_bias; j++)
            if (q->bias_ids[j] == (int32_t)i) x += q->bias_values[j];
        uint32_t count = 0, first = n_seen > q->penalty_last_n ? n_seen - q->penalty_last_n : 0;
        for (uint32_t j = first; j < n_seen; j++) count += seen[j] == (int32_t)i;
        if (count > 0) {
            x = x <= 0 ? x * q->repeat_penalty : x / q->repeat_penalty;
            x = x - q->presence_penalty - q->frequency_penalty * (float)count;
        }
        p[i] = 0;
        if (x > -INFINITY) e[n_left++] = (ranked){(double)fminf(x, FLT_MAX), i};
    }
    qsort(e, n_left, sizeof *e, by_rank);
    if (q->temperature == 0.0f) {
        p[e[0].id] = 1;
        return true;
    }
    if (q->top_k > 0 && (uint32_t)q->top_k < n_left) n_left = (uint32_t)q->top_k;
    double sum = 0, have = 0, best = e[0].logit;
    for (uint32_t i = 0; i < n_left; i++) sum += exp(e[i].logit - best);
    if (q->top_p < 1) {
        for (uint32_t i = 0; i < n_left; i++) {
            have += exp(e[i].logit - best);
            if (fabs(have / sum - (double)q->top_p) < 1e-6) return false;
            if (have / sum >= (double)q->top_p) n_left = i + 1;
        }
    }
    if (q->min_p > 0) {
        uint32_t kept = 0;
        for (uint32_t i = 0; i < n_left; i++) {
            double share = exp(e[i].logit - best) / (double)q->min_p;
            if (fabs(share - 1) < 1e-6 && q->min_p < 1) return false;
            if (share >= 1) kept = i + 1;
        }
        n_left = kept;
    }
    sum = 0;
    for (uint32_t i = 0; i < n_left; i++) sum += exp((e[i].logit - best) / (double)q->temperature);
    for (uint32_t i = 0; i < n_left; i++)
        p[e[i].id] = exp((e[i].logit - best) / (double)q->temperature) / sum;
    return true;
}

static void fill(uint64_t *rng, float *logits, uint32_t n)
{
    uint64_t kind = ps_rng_next(rng) % 4;
    for (uint32_t i = 0; i < n; i++) {
        logits[i] = uniform(rng, -6, 6);
        if (kind == 1) logits[i] = roundf(logits[i]); /* ties */
        if (kind == 2 && ps_rng_next(rng) % 3 == 0)
            logits[i] = ps_rng_next(rng) % 2 ? NAN : -INFINITY;
    }
    if (kind == 2) logits[n - 1] = 1;
    if (kind == 3) logits[ps_rng_next(rng) % n] += 8;
}

/* Frequencies of n_draws draws against p: nothing that can't be, the rest within five sigma. */
static void check_draws(
    ps_sample *s, const float *logits, uint32_t n, const double *p, uint32_t n_draws)
{
    static uint32_t drawn[MAX_VOCAB];
    memset(drawn, 0, sizeof drawn);
    for (uint32_t i = 0; i < n_draws; i++) {
        ps_err err = {0};
        ps_sample_token token;
        PS_REQUIRE_OK(ps_sample_next(s, logits, &token, &err), &err);
        PS_REQUIRE(token.id >= 0 && (uint32_t)token.id < n);
        drawn[token.id]++;
    }
    for (uint32_t i = 0; i < n; i++) {
        if (p[i] == 0) {
            PS_CHECK_EQ(drawn[i], 0);
            continue;
        }
        double sigma = sqrt((double)n_draws * p[i] * (1 - p[i]));
        PS_CHECK_NEAR(drawn[i], (double)n_draws * p[i], 5 * sigma + 1);
    }
}

PS_TEST(distribution_is_the_references)
{
    static float logits[MAX_VOCAB];
    static double p[MAX_VOCAB];
    uint64_t rng = 42;
    int n_checked = 0, n_cases = ps_test_long() ? 4000 : 400;
    for (int i_case = 0; i_case < n_cases; i_case++) {
        static const uint32_t sizes[] = {1, 2, 7, 63, 64, 65, 130, 500};
        uint32_t n = sizes[ps_rng_next(&rng) % 8];
        fill(&rng, logits, n);
        int32_t bias_ids[3], seen[20];
        float bias_values[3];
        ps_sample_params q = ps_sample_defaults();
        q.temperature = ps_rng_next(&rng) % 8 == 0 ? 0 : uniform(&rng, 0.1f, 2);
        q.top_k = (int32_t)(ps_rng_next(&rng) % 50) - 5;
        q.top_p = ps_rng_next(&rng) % 3 == 0 ? 1 : uniform(&rng, 0, 1);
        q.min_p = ps_rng_next(&rng) % 3 == 0 ? 0 : uniform(&rng, 0, 0.3f);
        if (i_case % 16 == 0) q.min_p = 1;
        if (i_case % 16 == 1) q.top_p = 0;
        q.seed = ps_rng_next(&rng);
        if (ps_rng_next(&rng) % 2) {
            q.repeat_penalty = uniform(&rng, 0.7f, 1.6f);
            q.presence_penalty = uniform(&rng, -1, 1);
            q.frequency_penalty = uniform(&rng, -1, 1);
            q.penalty_last_n = (uint32_t)(ps_rng_next(&rng) % 12);
        }
        q.n_bias = (uint32_t)(ps_rng_next(&rng) % 4);
        for (uint32_t i = 0; i < q.n_bias; i++) {
            bias_ids[i] = (int32_t)(ps_rng_next(&rng) % n);
            bias_values[i] = uniform(&rng, -5, 5);
        }
        q.bias_ids = bias_ids;
        q.bias_values = bias_values;
        uint32_t n_seen = (uint32_t)(ps_rng_next(&rng) % 20);
        for (uint32_t i = 0; i < n_seen; i++) seen[i] = (int32_t)(ps_rng_next(&rng) % n);
        if (!reference(logits, n, &q, seen, n_seen, p)) continue;
        ps_test_case("case %d: n %u, k %d, top_p %g, min_p %g, t %g", i_case, n, q.top_k,
            (double)q.top_p, (double)q.min_p, (double)q.temperature);
        ps_err err = {0};
        ps_sample *s = NULL;
        PS_REQUIRE_OK(ps_sample_create(n, &q, &s, &err), &err);
        for (uint32_t i = 0; i < n_seen; i++) ps_sample_accept(s, seen[i]);
        check_draws(s, logits, n, p, 2000);
        ps_sample_destroy(s);
        n_checked++;
    }
    ps_test_case("%s", "");
    PS_CHECK(n_checked > n_cases * 9 / 10);
}

PS_TEST(zeros_of_either_sign_are_equal)
{
    static const float logits[] = {-1, -0.0f, 0.0f, -0.0f};
    ps_sample_params q = ps_sample_defaults();
    q.temperature = 1;
    q.top_k = 1; /* the lowest id of equals */
    ps_err err = {0};
    ps_sample *s = NULL;
    ps_sample_token token;
    PS_REQUIRE_OK(ps_sample_create(4, &q, &s, &err), &err);
    PS_REQUIRE_OK(ps_sample_next(s, logits, &token, &err), &err);
    PS_CHECK_EQ(token.id, 1);
    ps_sample_destroy(s);
}

PS_TEST(a_large_vocabulary_is_selected_right)
{
    /* top_k with a buffer that is compacted many times, against an exact count of what is larger.
     */
    enum { N = 150000 };
    float *logits = ps_alloc(N, sizeof *logits);
    PS_REQUIRE(logits != NULL);
    for (int shape = 0; shape < 3; shape++) {
        uint64_t rng = 5;
        for (uint32_t i = 0; i < N; i++)
            logits[i] = shape == 0   ? uniform(&rng, -10, 10)
                        : shape == 1 ? (float)i * 1e-4f              /* every one is a new best */
                                     : roundf(uniform(&rng, 0, 30)); /* thousands of equals */
        static const int32_t ks[] = {1, 40, 1000, 149999, 0};
        for (size_t i_k = 0; i_k < sizeof ks / sizeof *ks; i_k++) {
            ps_test_case("shape %d, k %d", shape, ks[i_k]);
            ps_sample_params q = {
                .temperature = 1e6f, .top_k = ks[i_k], .top_p = 1, .repeat_penalty = 1};
            ps_sample *s = NULL;
            ps_err err = {0};
            PS_REQUIRE_OK(ps_sample_create(N, &q, &s, &err), &err);
            for (int draws = 0; draws < 20; draws++) {
                ps_sample_token t;
                PS_REQUIRE_OK(ps_sample_next(s, logits, &t, &err), &err);
                int32_t better = 0;
                for (int32_t i = 0; i < N; i++)
                    better += logits[i] > logits[t.id] || (logits[i] == logits[t.id] && i < t.id);
                PS_CHECK(ks[i_k] == 0 || better < ks[i_k]);
            }
            ps_sample_destroy(s);
        }
    }
    ps_free(logits);
}

PS_TEST(greedy_takes_the_lowest_of_equals)
{
    float logits[200];
    ps_sample_params q = ps_sample_defaults();
    q.temperature = 0;
    ps_err err = {0};
    ps_sample *s = NULL;
    PS_REQUIRE_OK(ps_sample_create(200, &q, &s, &err), &err);
    ps_sample_token t;
    for (int first = 0; first < 200; first += 33) {
        for (int i = 0; i < 200; i++) logits[i] = i < first ? -1.0f : i % 2 ? 3.0f : NAN;
        PS_REQUIRE_OK(ps_sample_next(s, logits, &t, &err), &err);
        PS_CHECK_EQ(t.id, first % 2 ? first : first + 1);
    }
    ps_sample_destroy(s);
}

PS_TEST(seeds_repeat_and_differ)
{
    float logits[100];
    int32_t run[4][50];
    for (int i = 0; i < 100; i++) logits[i] = (float)(i % 7);
    for (int i_run = 0; i_run < 4; i_run++) {
        ps_sample_params q = ps_sample_defaults();
        q.seed = i_run == 2 ? 8 : 7;
        ps_err err = {0};
        ps_sample *s = NULL;
        PS_REQUIRE_OK(ps_sample_create(100, &q, &s, &err), &err);
        ps_sample_token t = {0};
        for (int i = 0; i_run == 3 && i < 5; i++) {
            PS_REQUIRE_OK(ps_sample_next(s, logits, &t, &err), &err);
            ps_sample_accept(s, t.id);
        }
        if (i_run == 3) ps_sample_reset(s);
        for (int i = 0; i < 50; i++) {
            PS_REQUIRE_OK(ps_sample_next(s, logits, &t, &err), &err);
            ps_sample_accept(s, t.id);
            run[i_run][i] = t.id;
        }
        ps_sample_destroy(s);
    }
    PS_CHECK(memcmp(run[0], run[1], sizeof run[0]) == 0);
    PS_CHECK(memcmp(run[0], run[2], sizeof run[0]) != 0);
    PS_CHECK(memcmp(run[0], run[3], sizeof run[0]) == 0);
}

PS_TEST(logits_stay_as_they_are)
{
    float logits[3] = {1, 2, 3}, before[3] = {1, 2, 3};
    int32_t id = 2;
    float value = -100;
    ps_sample_params q = ps_sample_defaults();
    q.n_bias = 1;
    q.bias_ids = &id;
    q.bias_values = &value;
    q.presence_penalty = 5;
    q.temperature = 0;
    ps_err err = {0};
    ps_sample *s = NULL;
    PS_REQUIRE_OK(ps_sample_create(3, &q, &s, &err), &err);
    id = 0; /* the sampler has a copy */
    ps_sample_token t;
    PS_REQUIRE_OK(ps_sample_next(s, logits, &t, &err), &err);
    PS_CHECK_EQ(t.id, 1);
    ps_sample_accept(s, 1);
    ps_sample_accept(s, -1);
    ps_sample_accept(s, 3);
    PS_REQUIRE_OK(ps_sample_next(s, logits, &t, &err), &err);
    PS_CHECK_EQ(t.id, 0);
    PS_CHECK(memcmp(logits, before, sizeof logits) == 0);
    PS_CHECK(t.logprob == 0 && t.n_top == 0);
    ps_sample_destroy(s);
}

PS_TEST(odd_logits_have_a_result_or_an_error)
{
    ps_err err = {0};
    ps_sample_token t = {.id = -7};
    for (int i_temperature = 0; i_temperature < 2; i_temperature++) {
        ps_sample_params q = ps_sample_defaults();
        q.temperature = (float)i_temperature;
        q.logprobs = true;
        q.n_top = 3;
        ps_sample *s = NULL;
        PS_REQUIRE_OK(ps_sample_create(4, &q, &s, &err), &err);
        float dead[4] = {NAN, -INFINITY, NAN, -INFINITY};
        ps_err why = {0};
        PS_CHECK_STATUS(ps_sample_next(s, dead, &t, &why), PS_EFORMAT);
        PS_CHECK(why.message[0] != '\0');
        PS_CHECK_EQ(t.id, -7);
        float one[4] = {NAN, -INFINITY, -3e38f, -INFINITY};
        PS_REQUIRE_OK(ps_sample_next(s, one, &t, &err), &err);
        PS_CHECK_EQ(t.id, 2);
        PS_CHECK_EQ(t.n_top, 1);
        PS_CHECK_NEAR(t.logprob, 0, 1e-6);
        float endless[4] = {1, INFINITY, NAN, -INFINITY};
        PS_REQUIRE_OK(ps_sample_next(s, endless, &t, &err), &err);
        PS_CHECK_EQ(t.id, 1);
        PS_CHECK_NEAR(t.logprob, 0, 1e-6);
        float wide[4] = {-FLT_MAX, FLT_MAX, 0, 0};
        PS_REQUIRE_OK(ps_sample_next(s, wide, &t, &err), &err);
        PS_CHECK_EQ(t.id, 1);
        ps_sample_destroy(s);
        t.id = -7;
    }
    ps_sample_params q = ps_sample_defaults();
    int32_t ids[2] = {0, 1};
    float values[2] = {-INFINITY, -INFINITY}, fine[2] = {1, 2};
    q.n_bias = 2;
    q.bias_ids = ids;
    q.bias_values = values;
    ps_sample *s = NULL;
    PS_REQUIRE_OK(ps_sample_create(2, &q, &s, &err), &err);
    ps_err why = {0};
    PS_CHECK_STATUS(ps_sample_next(s, fine, &t, &why), PS_EREQUEST);
    PS_CHECK_EQ_STR(why.field, "logit_bias");
    ps_sample_destroy(s);
}

PS_TEST(draws_at_the_edges_of_temperature)
{
    float logits[3] = {1, 1.5f, 1.25f};
    static const float ts[] = {1e-30f, 1e-6f, 1e30f, FLT_MAX};
    for (int i_t = 0; i_t < 4; i_t++) {
        ps_sample_params q = {.temperature = ts[i_t], .top_p = 1, .repeat_penalty = 1, .seed = 3};
        ps_err err = {0};
        ps_sample *s = NULL;
        PS_REQUIRE_OK(ps_sample_create(3, &q, &s, &err), &err);
        int drawn[3] = {0};
        for (int i = 0; i < 300; i++) {
            ps_sample_token t;
            PS_REQUIRE_OK(ps_sample_next(s, logits, &t, &err), &err);
            drawn[t.id]++;
        }
        if (i_t < 2) PS_CHECK_EQ(drawn[1], 300);
        if (i_t >= 2) PS_CHECK(drawn[0] > 60 && drawn[1] > 60 && drawn[2] > 60);
        ps_sample_destroy(s);
    }
}

PS_TEST(logprobs_are_the_models)
{
    enum { N = 1000 };
    static float logits[N];
    uint64_t rng = 9;
    for (int i = 0; i < N; i++) logits[i] = uniform(&rng, -8, 8);
    logits[17] = logits[900] = 9;
    double sum = 0;
    for (int i = 0; i < N; i++) sum += exp((double)logits[i]);
    ps_sample_params q = ps_sample_defaults();
    int32_t id = 17;
    float value = -INFINITY; /* neither bias nor temperature shows in what is reported */
    q.n_bias = 1;
    q.bias_ids = &id;
    q.bias_values = &value;
    q.logprobs = true;
    q.n_top = 20;
    ps_err err = {0};
    ps_sample *s = NULL;
    PS_REQUIRE_OK(ps_sample_create(N, &q, &s, &err), &err);
    for (int draws = 0; draws < 10; draws++) {
        ps_sample_token t;
        PS_REQUIRE_OK(ps_sample_next(s, logits, &t, &err), &err);
        PS_CHECK(t.id != 17);
        PS_CHECK_NEAR(t.logprob, (double)logits[t.id] - log(sum), 1e-5);
        PS_CHECK_EQ(t.n_top, 20);
        PS_CHECK_EQ(t.top[0].id, 17);
        PS_CHECK_EQ(t.top[1].id, 900);
        for (uint32_t i = 0; i < t.n_top; i++) {
            PS_CHECK_NEAR(t.top[i].logprob, (double)logits[t.top[i].id] - log(sum), 1e-5);
            int better = 0;
            for (int j = 0; j < N; j++) better += logits[j] > logits[t.top[i].id];
            PS_CHECK(better == (int)i || (i == 1 && better == 0));
        }
    }
    ps_sample_destroy(s);
    q.n_top = 64;
    PS_REQUIRE_OK(ps_sample_create(20, &q, &s, &err), &err); /* more than the vocabulary has */
    ps_sample_token t;
    PS_REQUIRE_OK(ps_sample_next(s, logits, &t, &err), &err);
    PS_CHECK_EQ(t.n_top, 20);
    ps_sample_destroy(s);
}

PS_TEST(window_forgets)
{
    float logits[2] = {1, 0};
    ps_sample_params q = ps_sample_defaults();
    q.temperature = 0;
    q.presence_penalty = 2;
    q.penalty_last_n = 3;
    ps_err err = {0};
    ps_sample *s = NULL;
    PS_REQUIRE_OK(ps_sample_create(2, &q, &s, &err), &err);
    static const int32_t accepted[] = {-1, 0, 1, 1, 1, 0};
    static const int32_t expected[] = {0, 1, 0, 0, 0, 0};
    for (int i = 0; i < 6; i++) {
        ps_sample_token t;
        ps_sample_accept(s, accepted[i]);
        PS_REQUIRE_OK(ps_sample_next(s, logits, &t, &err), &err);
        ps_test_case("step %d", i);
        PS_CHECK_EQ(t.id, expected[i]);
    }
    ps_sample_destroy(s);
}

PS_TEST(bad_parameters_are_named)
{
    ps_sample_params ok = ps_sample_defaults();
    int32_t id = 10;
    float value = NAN;
    struct {
        const char *field;
        ps_sample_params p;
    } cases[] = {{"temperature", ok}, {"temperature", ok}, {"top_p", ok}, {"top_p", ok},
        {"min_p", ok}, {"min_p", ok}, {"repeat_penalty", ok}, {"presence_penalty", ok},
        {"frequency_penalty", ok}, {"penalty_last_n", ok}, {"logprobs", ok}, {"logprobs", ok},
        {"logit_bias", ok}, {"logit_bias", ok}};
    cases[0].p.temperature = -1;
    cases[1].p.temperature = NAN;
    cases[2].p.top_p = 1.5f;
    cases[3].p.top_p = NAN;
    cases[4].p.min_p = -0.1f;
    cases[5].p.min_p = NAN;
    cases[6].p.repeat_penalty = 0;
    cases[7].p.presence_penalty = INFINITY;
    cases[8].p.frequency_penalty = NAN;
    cases[9].p.penalty_last_n = PS_SAMPLE_MAX_LAST_N + 1;
    cases[10].p.n_top = 5;
    cases[11].p.logprobs = true;
    cases[11].p.n_top = 65;
    cases[12].p.n_bias = cases[13].p.n_bias = 1;
    cases[12].p.bias_ids = &id; /* outside the vocabulary */
    cases[12].p.bias_values = &ok.temperature;
    int32_t inside = 3;
    cases[13].p.bias_ids = &inside;
    cases[13].p.bias_values = &value;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        ps_test_case("%s, case %zu", cases[i].field, i);
        ps_sample *s = NULL;
        ps_err err = {0};
        PS_CHECK_STATUS(ps_sample_create(10, &cases[i].p, &s, &err), PS_EREQUEST);
        PS_CHECK_EQ_STR(err.field, cases[i].field);
        PS_CHECK(s == NULL);
    }
    ps_sample *s = NULL;
    ps_err err = {0};
    PS_CHECK_STATUS(ps_sample_create(0, &ok, &s, &err), PS_EREQUEST);
}

static ps_status create_and_use(void *ctx, ps_err *err)
{
    (void)ctx;
    float logits[100] = {0};
    int32_t id = 1;
    float value = 1;
    ps_sample_params q = ps_sample_defaults();
    q.n_bias = 1;
    q.bias_ids = &id;
    q.bias_values = &value;
    q.repeat_penalty = 1.1f;
    q.logprobs = true;
    q.n_top = 5;
    ps_sample *s = NULL;
    ps_status status = ps_sample_create(100, &q, &s, err);
    if (status != PS_OK) return status;
    uint64_t n_allocs = ps_heap_get_stats().n_allocs;
    for (int i = 0; i < 5 && status == PS_OK; i++) {
        ps_sample_token t;
        status = ps_sample_next(s, logits, &t, err);
        ps_sample_accept(s, t.id);
    }
    PS_CHECK_EQ_U64(ps_heap_get_stats().n_allocs, n_allocs); /* nothing per token */
    ps_sample_destroy(s);
    return status;
}

PS_TEST(oom_sampler)
{
    ps_test_oom_sweep(create_and_use, NULL);
}

PS_TEST_MAIN
