/* py_trace - _core.Engine's methods about traces: recording on and off, and what was recorded as
 * two structured arrays.
 *
 * Not here: the type (py_engine.c); files and what follows from a trace (pipeshard/trace.py).
 * Threads: the GIL, between passes.
 */
#include "binding/py_trace.h"

#include <stddef.h>
#include <string.h>

/* ---- rows: ps_trace_tick and ps_trace_pass as they are ---- */

typedef struct column {
    const char *name, *type;
    size_t offset;
    int n; /* 0: a single value */
} column;

#define COLUMN(of, name, type)                                                                     \
    {                                                                                              \
#name, type, offsetof(of, name), 0                                                         \
    }

static const column tick_columns[] = {
    COLUMN(ps_trace_tick, begin_ns, "u8"),
    COLUMN(ps_trace_tick, end_ns, "u8"),
    COLUMN(ps_trace_tick, flops, "u8"),
    COLUMN(ps_trace_tick, bytes, "u8"),
    COLUMN(ps_trace_tick, bus_bytes, "u8"),
    COLUMN(ps_trace_tick, tick, "u4"),
    COLUMN(ps_trace_tick, cause, "i4"),
    COLUMN(ps_trace_tick, unit, "i4"),
    COLUMN(ps_trace_tick, kind, "u1"),
    COLUMN(ps_trace_tick, stream, "u1"),
    COLUMN(ps_trace_tick, op, "u1"),
};

static const column pass_columns[] = {
    COLUMN(ps_trace_pass, number, "u8"),
    COLUMN(ps_trace_pass, begin_ns, "u8"),
    COLUMN(ps_trace_pass, end_ns, "u8"),
    COLUMN(ps_trace_pass, wall_ns, "u8"),
    COLUMN(ps_trace_pass, read_ns, "u8"),
    COLUMN(ps_trace_pass, clock_error_ns, "u8"),
    COLUMN(ps_trace_pass, first_tick, "u8"),
    {"vram_bytes", "u8", offsetof(ps_trace_pass, vram_bytes), PS_MEM_KIND_COUNT},
    COLUMN(ps_trace_pass, n_ticks, "u4"),
    COLUMN(ps_trace_pass, tier, "u4"),
    COLUMN(ps_trace_pass, n_tok, "u4"),
    COLUMN(ps_trace_pass, n_out, "u4"),
    COLUMN(ps_trace_pass, seq, "u4"),
    COLUMN(ps_trace_pass, pos, "u4"),
    COLUMN(ps_trace_pass, one_sequence, "?"),
    COLUMN(ps_trace_pass, graph, "?"),
    COLUMN(ps_trace_pass, marked, "?"),
};

static PyObject *type_of(const column *c)
{
    return c->n == 0 ? PyUnicode_FromString(c->type) : Py_BuildValue("(s(i))", c->type, c->n);
}

static int append(PyObject *list, PyObject *item)
{
    int status = item != NULL ? PyList_Append(list, item) : -1;
    Py_XDECREF(item);
    return status;
}

static PyArray_Descr *descr_of(const column *columns, size_t n, size_t row_bytes)
{
    PyObject *names = PyList_New(0), *formats = PyList_New(0), *offsets = PyList_New(0),
             *spec = NULL;
    PyArray_Descr *descr = NULL;
    bool ok = names != NULL && formats != NULL && offsets != NULL;
    for (size_t i = 0; i < n && ok; i++)
        ok = append(names, PyUnicode_FromString(columns[i].name)) == 0 &&
             append(formats, type_of(&columns[i])) == 0 &&
             append(offsets, PyLong_FromSize_t(columns[i].offset)) == 0;
    if (ok)
        spec = Py_BuildValue("{s:O,s:O,s:O,s:n}", "names", names, "formats", formats, "offsets",
            offsets, "itemsize", (Py_ssize_t)row_bytes);
    if (spec != NULL && !PyArray_DescrConverter(spec, &descr)) descr = NULL;
    Py_XDECREF(names);
    Py_XDECREF(formats);
    Py_XDECREF(offsets);
    Py_XDECREF(spec);
    return descr;
}

static PyObject *array_of(const column *columns, size_t n_columns, size_t row_bytes, uint64_t n)
{
    npy_intp n_rows = (npy_intp)n;
    PyArray_Descr *descr = descr_of(columns, n_columns, row_bytes);
    if (descr == NULL) return NULL;
    return PyArray_NewFromDescr(
        &PyArray_Type, descr, 1, &n_rows, NULL, NULL, 0, NULL); /* takes descr */
}

/* ---- methods ---- */

const char py_trace_start_doc[] =
    "trace_start(cap_bytes) -> None\n\nRecord passes from now on, in a ring of so many bytes that "
    "keeps the latest; 0: of the usual size.";
const char py_trace_stop_doc[] = "trace_stop() -> None\n\nWhat was recorded stays.";
const char py_trace_read_doc[] =
    "trace_read(clear) -> (passes, ticks)\n\nWhat was recorded, oldest first: two structured "
    "arrays; ticks first_tick to first_tick + n_ticks are those of a pass.";

PyObject *py_engine_trace_start(PyObject *self, PyObject *arg)
{
    uint64_t cap_bytes = 0;
    py_state *state = py_state_of(self);
    ps_exec *x = py_engine_exec(self);
    ps_err err = {0};
    if (state == NULL || x == NULL || !py_to_u64(arg, &cap_bytes)) return NULL;
    if (ps_exec_trace_start(x, cap_bytes, &err) != PS_OK) return py_raise(state, &err);
    Py_RETURN_NONE;
}

PyObject *py_engine_trace_stop(PyObject *self, PyObject *unused)
{
    ps_exec *x = py_engine_exec(self);
    (void)unused;
    if (x == NULL) return NULL;
    ps_exec_trace_stop(x);
    Py_RETURN_NONE;
}

PyObject *py_engine_trace_read(PyObject *self, PyObject *arg)
{
    ps_exec *x = py_engine_exec(self);
    int clear = PyObject_IsTrue(arg);
    if (x == NULL || clear < 0) return NULL;
    ps_trace *t = ps_exec_trace(x);
    uint64_t n_passes = 0, n_ticks = 0;
    if (t != NULL) ps_trace_count(t, &n_passes, &n_ticks);
    PyObject *passes = array_of(pass_columns, sizeof pass_columns / sizeof *pass_columns,
                 sizeof(ps_trace_pass), n_passes),
             *ticks = array_of(tick_columns, sizeof tick_columns / sizeof *tick_columns,
                 sizeof(ps_trace_tick), n_ticks);
    if (passes == NULL || ticks == NULL) {
        Py_XDECREF(passes);
        Py_XDECREF(ticks);
        return NULL;
    }
    if (t != NULL) {
        ps_trace_copy(
            t, PyArray_DATA((PyArrayObject *)passes), PyArray_DATA((PyArrayObject *)ticks));
        if (clear) ps_trace_clear(t);
    }
    return Py_BuildValue("(NN)", passes, ticks);
}
