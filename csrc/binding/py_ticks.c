/* py_ticks - _core.Plan's methods about single passes: what their ticks are, and how long they
 * would take.
 *
 * Not here: the type (py_plan.c); how long ticks take (cost models, in Python).
 * Threads: the GIL; lowering and simulating release it.
 */
#include "binding/py_ticks.h"

#include <string.h>

#include "engine/ps_simulate.h"

static const char *const kind_names[] = {
    "copy_in", "copy_out", "run", "record", "wait", "flag_set", "flag_wait"};
enum { N_KINDS = sizeof kind_names / sizeof *kind_names };

/* A row of the array that ticks() returns; the dtype below says the same. */
typedef struct row {
    uint8_t kind, stream, op, weights; /* 1: a copy of weights */
    int32_t unit, fmt;
    uint32_t n_tok;
    uint64_t flops, bytes, bus_bytes, n_bytes;
    double bus_odds;
} row;

static PyArray_Descr *row_type(void)
{
    PyArray_Descr *descr = NULL;
    PyObject *spec = Py_BuildValue("[(ss)(ss)(ss)(ss)(ss)(ss)(ss)(ss)(ss)(ss)(ss)(ss)]", "kind",
        "u1", "stream", "u1", "op", "u1", "weights", "u1", "unit", "i4", "fmt", "i4", "n_tok", "u4",
        "flops", "u8", "bytes", "u8", "bus_bytes", "u8", "n_bytes", "u8", "bus_odds", "f8");
    if (spec != NULL && !PyArray_DescrConverter(spec, &descr)) descr = NULL;
    Py_XDECREF(spec);
    return descr;
}

/* ---- which pass ---- */

typedef struct pass_args {
    uint32_t n_tok, n_out, max_kv, first;
    int held;
} pass_args;

int py_plan_find(const ps_plan *core, int held, ps_pass_shape *shape)
{
    if (held == PY_HELD_ALL) return 0;
    if (held < 0 || (uint32_t)held > core->n_residencies) {
        PyErr_Format(PyExc_ValueError, "held is %d; this plan has %u residencies", held,
            core->n_residencies);
        return -1;
    }
    shape->found = ps_plan_found(core, (ps_residency)held, shape->tier);
    return 0;
}

/* As the executor would run it: prompts of plans that keep KV in host memory are staged. */
static int find_shape(const ps_plan *core, const pass_args *a, ps_pass_shape *shape)
{
    uint32_t most = core->max_pages * PS_KV_PAGE_TOK;
    uint32_t max_kv = a->max_kv == 0 ? most : a->max_kv;
    if (a->n_tok == 0 || a->n_tok > core->spec.pass_tok || a->n_out > a->n_tok || max_kv > most ||
        a->first > most || a->n_tok > most - a->first) {
        PyErr_SetString(PyExc_ValueError, "this plan has no such pass");
        return -1;
    }
    *shape = (ps_pass_shape){.tier = ps_plan_tier(core, a->n_tok),
        .n_tok = a->n_tok,
        .n_out = a->n_out,
        .max_kv = ps_pass_kv_bucket(core, a->n_tok, max_kv)};
    if (ps_pass_is_staged(core, a->n_tok)) {
        shape->staged = true;
        shape->first = a->first;
    } else {
        shape->far = ps_pass_far(core, a->n_tok, max_kv);
    }
    return py_plan_find(core, a->held, shape);
}

static ps_status lower(const ps_plan *core, const ps_pass_shape *shape, ps_ticks **out, ps_err *err)
{
    ps_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = ps_simulate_lower(core, shape, out, err);
    Py_END_ALLOW_THREADS;
    return status;
}

/* ---- ticks ---- */

static PyObject *array_of(const ps_ticks *t)
{
    npy_intp n = (npy_intp)t->n_ticks;
    PyArray_Descr *descr = row_type();
    if (descr == NULL) return NULL;
    if ((size_t)PyDataType_ELSIZE(descr) != sizeof(row)) {
        Py_DECREF(descr);
        PyErr_SetString(PyExc_SystemError, "the rows of ticks() and their dtype differ");
        return NULL;
    }
    PyObject *array =
        PyArray_NewFromDescr(&PyArray_Type, descr, 1, &n, NULL, NULL, 0, NULL); /* takes descr */
    if (array == NULL) return NULL;
    row *rows = PyArray_DATA((PyArrayObject *)array);
    for (uint32_t i = 0; i < t->n_ticks; i++) {
        const ps_tick *k = &t->tick[i];
        ps_work w = ps_simulate_work(t, i);
        rows[i] = (row){.kind = k->kind,
            .stream = k->stream,
            .op = k->op,
            .weights = k->kind == PS_TICK_COPY_IN && ps_ref_space(k->src) == PS_SPACE_HOST_WEIGHTS,
            .unit = ps_plan_whole(t->plan, k->unit),
            .fmt = w.fmt,
            .n_tok = w.n_tok,
            .flops = w.flops,
            .bytes = w.bytes,
            .bus_bytes = w.bus_bytes,
            .n_bytes = w.n_bytes,
            .bus_odds = w.bus_odds};
    }
    return array;
}

PyObject *py_plan_ticks(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static const char *const names[] = {"n_tok", "n_out", "max_kv", "first", "held", NULL};
    const ps_plan *core = py_plan_get(self);
    py_state *state = py_state_of(self);
    pass_args a = {.n_out = 1, .held = PY_HELD_ALL};
    ps_pass_shape shape;
    ps_ticks *ticks = NULL;
    ps_err err = {0};
    if (state == NULL ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, "O&|O&O&O&i", (char **)names, py_to_u32,
            &a.n_tok, py_to_u32, &a.n_out, py_to_u32, &a.max_kv, py_to_u32, &a.first, &a.held) ||
        find_shape(core, &a, &shape) < 0)
        return NULL;
    if (lower(core, &shape, &ticks, &err) != PS_OK) return py_raise(state, &err);
    PyObject *array = array_of(ticks);
    ps_ticks_destroy(ticks);
    return array;
}

/* ---- makespan ---- */

static PyObject *by_stream(const uint64_t *ns)
{
    PyObject *dict = PyDict_New();
    for (int s = 0; dict != NULL && s < PS_STREAM_COUNT; s++)
        if (py_dict_take(dict, ps_stream_role_name((ps_stream_role)s),
                PyLong_FromUnsignedLongLong(ns[s])) < 0)
            Py_CLEAR(dict);
    return dict;
}

static PyObject *makespan_dict(const ps_makespan *m, PyObject *end_ns)
{
    PyObject *busy = by_stream(m->busy_ns), *critical = by_stream(m->critical_ns), *dict = NULL;
    if (busy != NULL && critical != NULL &&
        py_dict_take(critical, "sync", PyLong_FromUnsignedLongLong(m->critical_sync_ns)) == 0)
        dict = Py_BuildValue("{s:K,s:O,s:O,s:O}", "total_ns", (unsigned long long)m->total_ns,
            "busy_ns", busy, "critical_ns", critical, "end_ns", end_ns);
    Py_XDECREF(busy);
    Py_XDECREF(critical);
    return dict;
}

static int check_ns(PyObject *ns, uint32_t n_ticks)
{
    if (!PyArray_Check(ns) || PyArray_TYPE((PyArrayObject *)ns) != NPY_UINT64 ||
        !PyArray_IS_C_CONTIGUOUS((PyArrayObject *)ns)) {
        PyErr_SetString(PyExc_TypeError, "ns must be a C-contiguous array of uint64");
        return -1;
    }
    if ((uint64_t)PyArray_SIZE((PyArrayObject *)ns) != n_ticks) {
        PyErr_Format(PyExc_ValueError, "ns has %zd elements, and the pass %u ticks",
            (Py_ssize_t)PyArray_SIZE((PyArrayObject *)ns), n_ticks);
        return -1;
    }
    return 0;
}

/* One walk through the list with these durations, or NULL with an exception. */
static PyObject *walk_once(py_state *state, const ps_ticks *ticks, PyObject *ns)
{
    npy_intp n = (npy_intp)ticks->n_ticks;
    ps_makespan span;
    ps_err err = {0};
    ps_status status;
    if (check_ns(ns, ticks->n_ticks) < 0) return NULL;
    PyObject *end_ns = PyArray_SimpleNew(1, &n, NPY_UINT64);
    if (end_ns == NULL) return NULL;
    const uint64_t *each = PyArray_DATA((PyArrayObject *)ns);
    uint64_t *end = PyArray_DATA((PyArrayObject *)end_ns);
    Py_BEGIN_ALLOW_THREADS;
    status = ps_simulate_run(ticks, each, end, &span, &err);
    Py_END_ALLOW_THREADS;
    PyObject *dict = status == PS_OK ? makespan_dict(&span, end_ns) : py_raise(state, &err);
    Py_DECREF(end_ns);
    return dict;
}

/* Lowered once, walked as often as `price` has durations for it. */
static PyObject *walk_all(py_state *state, const ps_ticks *ticks, PyObject *price)
{
    PyObject *rows = array_of(ticks), *span = rows != NULL ? Py_NewRef(Py_None) : NULL;
    while (span != NULL) {
        PyObject *ns = PyObject_CallFunctionObjArgs(price, rows, span, NULL);
        if (ns == Py_None && span != Py_None) {
            Py_DECREF(ns);
            break;
        }
        Py_SETREF(span, ns != NULL ? walk_once(state, ticks, ns) : NULL);
        Py_XDECREF(ns);
    }
    Py_XDECREF(rows);
    return span;
}

/* Which units lie in page-locked memory, by an engine's sources(); NULL with an exception. */
static bool *find_mapped(const ps_plan *core, PyObject *sources)
{
    Py_ssize_t n = (Py_ssize_t)core->model->n_units;
    if (PyBytes_GET_SIZE(sources) != n) {
        PyErr_Format(PyExc_ValueError, "sources of %zd units, and the plan has %zd",
            PyBytes_GET_SIZE(sources), n);
        return NULL;
    }
    bool *mapped = PyMem_Calloc((size_t)n + 1, sizeof *mapped);
    if (mapped == NULL) PyErr_NoMemory();
    for (Py_ssize_t i = 0; mapped != NULL && i < n; i++)
        mapped[i] = PyBytes_AS_STRING(sources)[i] == 0;
    return mapped;
}

PyObject *py_plan_walk(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static const char *const names[] = {
        "n_tok", "n_out", "max_kv", "first", "price", "held", "sources", NULL};
    const ps_plan *core = py_plan_get(self);
    py_state *state = py_state_of(self);
    pass_args a = {.held = PY_HELD_ALL};
    PyObject *price = NULL, *sources = NULL;
    bool *mapped = NULL;
    ps_pass_shape shape;
    ps_ticks *ticks = NULL;
    ps_err err = {0};
    if (state == NULL ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, "O&O&O&O&O|iS", (char **)names, py_to_u32,
            &a.n_tok, py_to_u32, &a.n_out, py_to_u32, &a.max_kv, py_to_u32, &a.first, &price,
            &a.held, &sources) ||
        find_shape(core, &a, &shape) < 0)
        return NULL;
    if (sources != NULL && (mapped = find_mapped(core, sources)) == NULL) return NULL;
    shape.mapped = mapped;
    PyObject *result = lower(core, &shape, &ticks, &err) == PS_OK ? walk_all(state, ticks, price)
                                                                  : py_raise(state, &err);
    ps_ticks_destroy(ticks);
    PyMem_Free(mapped);
    return result;
}

/* ---- names ---- */

static PyObject *names_of(const char *(*name)(uint32_t i), uint32_t n)
{
    PyObject *tuple = PyTuple_New((Py_ssize_t)n);
    for (uint32_t i = 0; tuple != NULL && i < n; i++) {
        const char *s = name(i);
        PyObject *text = s != NULL ? PyUnicode_FromString(s) : Py_NewRef(Py_None);
        if (text == NULL)
            Py_CLEAR(tuple);
        else
            PyTuple_SET_ITEM(tuple, (Py_ssize_t)i, text);
    }
    return tuple;
}

static const char *kind_name(uint32_t i)
{
    return kind_names[i];
}
static const char *stream_name(uint32_t i)
{
    return ps_stream_role_name((ps_stream_role)i);
}
static const char *op_name(uint32_t i)
{
    return ps_op_name((ps_op_kind)i);
}
static const char *fmt_name(uint32_t i)
{
    const ps_fmt_info *info = ps_fmt_get(i);
    return info != NULL ? info->name : NULL;
}

PyObject *py_plan_tick_names(PyObject *self, PyObject *unused)
{
    (void)self;
    (void)unused;
    return Py_BuildValue("(NNNN)", names_of(kind_name, N_KINDS),
        names_of(stream_name, PS_STREAM_COUNT), names_of(op_name, PS_OP_COUNT),
        names_of(fmt_name, PS_FMT_COUNT));
}
