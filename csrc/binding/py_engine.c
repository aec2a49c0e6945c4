/* py_engine - _core.Engine: sequences over a plan on a device. Holds references to the three until
 * it closes.
 *
 * Not here: text, sampling, which plan.
 * Threads: one call at a time, kept by a flag that the GIL guards: a second thread gets BusyError
 * at once. Every call that computes releases the GIL; about every 20 ms the core asks whether to go
 * on, and the GIL is re-taken to let signal handlers run.
 */
#include "binding/py_memory.h"
#include "binding/py_trace.h"

#include <string.h>

#include "engine/ps_engine.h"

typedef struct engine {
    PyObject_HEAD ps_engine *core; /* owns; NULL after close */
    PyObject *plan;                /* owns the reference, as the next */
    PyObject *device;
    PyObject *progress; /* owns the reference; NULL but while opening */
    PyObject *rows;     /* owns the reference: a copy of the last logits, made when asked for */
    bool rows_are_current;
    bool busy;               /* a call is under way; guarded by the GIL */
    PyThreadState *released; /* of the call under way, while it runs without the GIL */
} engine;

/* ---- entering and leaving ---- */

static void raise_status(py_state *state, ps_status status, const char *message)
{
    ps_err err = {0};
    ps_fail(&err, status, "%s", message);
    py_raise(state, &err);
}

/* The module's state where the engine is open and idle, else NULL with an exception set. */
static py_state *usable(engine *self)
{
    py_state *state = py_state_of((PyObject *)self);
    if (state == NULL) return NULL;
    if (self->busy) {
        raise_status(state, PS_EBUSY,
            "the engine is working for another thread; use one engine a thread, or wait");
        return NULL;
    }
    if (self->core == NULL) {
        raise_status(state, PS_ECLOSED, "the engine is closed");
        return NULL;
    }
    return state;
}

static void enter(engine *self)
{
    self->busy = true;
    self->released = PyEval_SaveThread();
}

static void leave(engine *self)
{
    PyEval_RestoreThread(self->released);
    self->released = NULL;
    self->busy = false;
}

/* ---- what the core calls back, without the GIL, on the thread that entered ---- */

static bool poll(void *ctx)
{
    engine *self = ctx;
    PyEval_RestoreThread(self->released);
    bool go_on = PyErr_CheckSignals() == 0;
    self->released = PyEval_SaveThread();
    return go_on;
}

static bool progress(void *ctx, uint64_t done_bytes, uint64_t total_bytes)
{
    engine *self = ctx;
    PyEval_RestoreThread(self->released);
    bool go_on = PyErr_CheckSignals() == 0;
    if (go_on && self->progress != NULL) {
        PyObject *result = PyObject_CallFunction(self->progress, "KK", done_bytes, total_bytes);
        go_on = result != NULL;
        Py_XDECREF(result);
    }
    self->released = PyEval_SaveThread();
    return go_on;
}

/* ---- open and close ---- */

typedef struct opening {
    int graphs, check;
    unsigned long long locked_limit, ram_limit;
} opening;

static ps_status open_core(
    engine *self, PyObject *plan, PyObject *device, const opening *how, ps_err *err)
{
    const ps_op_table *cpu_ops = py_device_cpu_ops(device);
    ps_device *d = py_device_get(device);
    ps_exec_options options = {.cpu_ops = cpu_ops,
        .dev_ops = d->info.kind == PS_DEVICE_CUDA ? ps_cuda_ops() : cpu_ops,
        .graphs = how->graphs != 0,
        .check = how->check != 0,
        .locked_limit = how->locked_limit,
        .ram_limit = how->ram_limit,
        .progress = progress,
        .poll = poll,
        .ctx = self};
    ps_status status;
    enter(self);
    status = ps_engine_create(
        py_model_get(py_plan_model(plan)), py_plan_get(plan), d, &options, &self->core, err);
    leave(self);
    return status;
}

static PyObject *engine_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static const char *const names[] = {
        "plan", "device", "graphs", "check", "locked_limit", "ram_limit", "progress", NULL};
    py_state *state = py_state_of_type(type);
    PyObject *plan = NULL, *device = NULL, *callback = Py_None;
    opening how = {.graphs = 1};
    if (state == NULL || !PyArg_ParseTupleAndKeywords(args, kwargs, "O!O!|$ppKKO", (char **)names,
                             state->plan_type, &plan, state->device_type, &device, &how.graphs,
                             &how.check, &how.locked_limit, &how.ram_limit, &callback))
        return NULL;
    engine *self = (engine *)type->tp_alloc(type, 0);
    if (self == NULL) return NULL;
    ps_err err = {0};
    self->plan = Py_NewRef(plan);
    self->device = Py_NewRef(device);
    if (callback != Py_None) self->progress = Py_NewRef(callback);
    ps_status status = open_core(self, plan, device, &how, &err);
    Py_CLEAR(self->progress);
    if (status != PS_OK) {
        Py_CLEAR(self);
        py_raise(state, &err);
    }
    return (PyObject *)self;
}

PyDoc_STRVAR(close_doc, "close()\n\nFrees everything. Closing twice is allowed.");

static PyObject *engine_close(PyObject *object, PyObject *unused)
{
    engine *self = (engine *)object;
    (void)unused;
    if (!self->busy && self->core == NULL) Py_RETURN_NONE;
    if (usable(self) == NULL) return NULL;
    ps_engine *core = self->core;
    self->core = NULL;
    enter(self);
    ps_engine_destroy(core);
    leave(self);
    Py_CLEAR(self->rows);
    Py_CLEAR(self->device);
    Py_CLEAR(self->plan);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(replan_doc,
    "replan(plan, progress=None) -> None\n\nGo over to another plan, between passes, with what the "
    "sequences hold.");

static PyObject *engine_replan(PyObject *object, PyObject *args)
{
    engine *self = (engine *)object;
    py_state *state = usable(self);
    PyObject *plan = NULL, *callback = Py_None;
    if (state == NULL || !PyArg_ParseTuple(args, "O!|O", state->plan_type, &plan, &callback))
        return NULL;
    if (py_plan_model(plan) != py_plan_model(self->plan)) {
        PyErr_SetString(PyExc_ValueError, "the plan must be of the engine's own model");
        return NULL;
    }
    ps_err err = {0};
    Py_INCREF(plan);
    self->progress = callback != Py_None ? Py_NewRef(callback) : NULL;
    enter(self);
    ps_status status = ps_engine_replan(self->core, py_plan_get(plan), &err);
    if (status == PS_EFATAL) ps_engine_destroy(self->core);
    leave(self);
    Py_CLEAR(self->progress);
    self->rows_are_current = false;
    if (status == PS_OK) {
        Py_SETREF(self->plan, plan);
        if (!PyErr_Occurred()) Py_RETURN_NONE;
        return NULL;
    }
    if (status == PS_EFATAL) self->core = NULL;
    Py_DECREF(plan);
    return py_raise(state, &err);
}

/* ---- passes ---- */

/* The data of a one-dimensional C-contiguous int32 array; NULL with an exception set. */
static const int32_t *tokens_of(PyObject *object, uint32_t *n)
{
    PyArrayObject *array = (PyArrayObject *)object;
    if (!PyArray_Check(object) || PyArray_TYPE(array) != NPY_INT32 || PyArray_NDIM(array) != 1 ||
        !PyArray_IS_C_CONTIGUOUS(array) || PyArray_SIZE(array) > INT32_MAX) {
        PyErr_SetString(PyExc_TypeError, "expected a one-dimensional C-contiguous int32 array");
        return NULL;
    }
    *n = (uint32_t)PyArray_SIZE(array);
    return PyArray_DATA(array);
}

static PyObject *finish(
    engine *self, py_state *state, ps_status status, const ps_err *err, PyObject *result)
{
    self->rows_are_current = false;
    if (status == PS_OK && !PyErr_Occurred()) return result;
    Py_XDECREF(result);
    return py_raise(state, err);
}

PyDoc_STRVAR(append_doc,
    "append(seq, tokens) -> None\n\nAppend to a sequence; afterwards `logits` is of the last "
    "token.");

static PyObject *engine_append(PyObject *object, PyObject *args)
{
    engine *self = (engine *)object;
    py_state *state = usable(self);
    uint32_t seq = 0, n = 0;
    PyObject *array = NULL;
    const int32_t *tokens = NULL;
    if (state == NULL || !PyArg_ParseTuple(args, "O&O", py_to_u32, &seq, &array) ||
        (tokens = tokens_of(array, &n)) == NULL)
        return NULL;
    ps_err err = {0};
    enter(self);
    ps_status status = ps_engine_append(self->core, seq, tokens, n, NULL, &err);
    leave(self);
    return finish(self, state, status, &err, Py_NewRef(Py_None));
}

PyDoc_STRVAR(append_all_doc,
    "append_all(seq, tokens) -> array\n\nThe same, with the logits of every token: float32 "
    "[n][n_vocab], the caller's own.");

static PyObject *engine_append_all(PyObject *object, PyObject *args)
{
    engine *self = (engine *)object;
    py_state *state = usable(self);
    uint32_t seq = 0, n = 0;
    PyObject *array = NULL;
    const int32_t *tokens = NULL;
    if (state == NULL || !PyArg_ParseTuple(args, "O&O", py_to_u32, &seq, &array) ||
        (tokens = tokens_of(array, &n)) == NULL)
        return NULL;
    npy_intp dims[2] = {n, py_model_get(py_plan_model(self->plan))->hp.n_vocab};
    PyObject *out = PyArray_SimpleNew(2, dims, NPY_FLOAT32);
    if (out == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_MemoryError)) return NULL;
        PyErr_Clear();
        raise_status(state, PS_ENOMEM, "no host memory for the logits of so many tokens");
        return NULL;
    }
    ps_err err = {0};
    enter(self);
    ps_status status =
        ps_engine_append(self->core, seq, tokens, n, PyArray_DATA((PyArrayObject *)out), &err);
    leave(self);
    return finish(self, state, status, &err, out);
}

PyDoc_STRVAR(step_doc,
    "step(seqs, tokens) -> None\n\nOne token for each of several sequences, in one pass; `logits` "
    "has as many rows.");

static PyObject *engine_step(PyObject *object, PyObject *args)
{
    engine *self = (engine *)object;
    py_state *state = usable(self);
    uint32_t n_seqs = 0, n = 0;
    PyObject *seq_array = NULL, *array = NULL;
    const int32_t *seqs = NULL, *tokens = NULL;
    if (state == NULL || !PyArg_ParseTuple(args, "OO", &seq_array, &array) ||
        (seqs = tokens_of(seq_array, &n_seqs)) == NULL || (tokens = tokens_of(array, &n)) == NULL)
        return NULL;
    if (n_seqs != n) {
        PyErr_SetString(PyExc_ValueError, "seqs and tokens must be of one length");
        return NULL;
    }
    ps_err err = {0};
    enter(self);
    /* A negative number becomes one that no engine has. */
    ps_status status = ps_engine_step(self->core, (const uint32_t *)seqs, tokens, n, &err);
    leave(self);
    return finish(self, state, status, &err, Py_NewRef(Py_None));
}

ps_exec *py_engine_exec(PyObject *object)
{
    engine *self = (engine *)object;
    return usable(self) != NULL ? ps_engine_exec(self->core) : NULL;
}

const float *py_engine_row(PyObject *object, uint32_t row, uint32_t *n_vocab)
{
    engine *self = (engine *)object;
    py_state *state = usable(self);
    if (state == NULL) return NULL;
    const float *logits = ps_engine_logits(self->core);
    if (logits == NULL || row >= ps_engine_n_logits(self->core)) {
        raise_status(state, PS_EREQUEST, "the engine has no such row of logits");
        return NULL;
    }
    *n_vocab = py_model_get(py_plan_model(self->plan))->hp.n_vocab;
    return logits + (size_t)row * *n_vocab;
}

static PyObject *engine_logits(PyObject *object, void *unused)
{
    engine *self = (engine *)object;
    py_state *state = usable(self);
    (void)unused;
    if (state == NULL) return NULL;
    const float *logits = ps_engine_logits(self->core);
    uint64_t n_rows = ps_engine_n_logits(self->core),
             n_cols = py_model_get(py_plan_model(self->plan))->hp.n_vocab;
    if (logits == NULL || n_rows == 0) Py_RETURN_NONE;
    if (!self->rows_are_current) {
        if (self->rows == NULL || py_rows_count(self->rows) != n_rows)
            Py_XSETREF(self->rows, py_rows_new(state, n_rows, n_cols));
        if (self->rows == NULL) return NULL;
        memcpy(py_rows_data(self->rows), logits, n_rows * n_cols * sizeof *logits);
        self->rows_are_current = true;
    }
    return py_rows_array(self->rows, n_rows == 1);
}

/* ---- sequences ---- */

PyDoc_STRVAR(length_doc, "length(seq) -> int\n\nTokens that the sequence holds.");

static PyObject *engine_length(PyObject *object, PyObject *arg)
{
    engine *self = (engine *)object;
    uint32_t seq = 0;
    if (usable(self) == NULL || !py_to_u32(arg, &seq)) return NULL;
    return PyLong_FromUnsignedLong(ps_engine_length(self->core, seq));
}

PyDoc_STRVAR(match_doc, "match(seq, tokens) -> int\n\nHow many of them it already begins with.");

static PyObject *engine_match(PyObject *object, PyObject *args)
{
    engine *self = (engine *)object;
    uint32_t seq = 0, n = 0;
    PyObject *array = NULL;
    const int32_t *tokens = NULL;
    if (usable(self) == NULL || !PyArg_ParseTuple(args, "O&O", py_to_u32, &seq, &array) ||
        (tokens = tokens_of(array, &n)) == NULL)
        return NULL;
    return PyLong_FromUnsignedLong(ps_engine_match(self->core, seq, tokens, n));
}

PyDoc_STRVAR(truncate_doc, "truncate(seq, length) -> None\n\nForget what is behind.");

static PyObject *engine_truncate(PyObject *object, PyObject *args)
{
    engine *self = (engine *)object;
    py_state *state = usable(self);
    uint32_t seq = 0, length = 0;
    if (state == NULL || !PyArg_ParseTuple(args, "O&O&", py_to_u32, &seq, py_to_u32, &length))
        return NULL;
    ps_err err = {0};
    if (ps_engine_truncate(self->core, seq, length, &err) != PS_OK) return py_raise(state, &err);
    Py_RETURN_NONE;
}

/* ---- looking ---- */

PyDoc_STRVAR(clock_ns_doc, "clock_ns() -> int\n\nThe device's clock: virtual on emu.");

static PyObject *engine_clock_ns(PyObject *object, PyObject *unused)
{
    engine *self = (engine *)object;
    (void)unused;
    if (usable(self) == NULL) return NULL;
    return PyLong_FromUnsignedLongLong(ps_exec_clock_ns(ps_engine_exec(self->core)));
}

PyDoc_STRVAR(cancel_doc,
    "cancel()\n\nEnd the pass that another thread is running: it raises KeyboardInterrupt. "
    "Nothing happens where none runs.");

static PyObject *engine_cancel(PyObject *object, PyObject *unused)
{
    engine *self = (engine *)object;
    (void)unused;
    if (self->busy && self->core != NULL) ps_engine_cancel(self->core);
    Py_RETURN_NONE;
}

static PyObject *engine_closed(PyObject *object, void *unused)
{
    (void)unused;
    return PyBool_FromLong(((engine *)object)->core == NULL);
}

static PyObject *engine_busy(PyObject *object, void *unused)
{
    (void)unused;
    return PyBool_FromLong(((engine *)object)->busy);
}

static PyObject *engine_is_lost(PyObject *object, void *unused)
{
    engine *self = (engine *)object;
    (void)unused;
    if (usable(self) == NULL) return NULL;
    return PyBool_FromLong(ps_exec_is_lost(ps_engine_exec(self->core)));
}

/* ---- the type ---- */

static int engine_traverse(PyObject *object, visitproc visit, void *arg)
{
    engine *self = (engine *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->plan);
    Py_VISIT(self->device);
    Py_VISIT(self->progress);
    Py_VISIT(self->rows);
    return 0;
}

/* No tp_clear: the core object borrows from plan and device, and neither can refer back. */
static void engine_dealloc(PyObject *object)
{
    engine *self = (engine *)object;
    PyObject_GC_UnTrack(object);
    ps_engine_destroy(self->core);
    Py_XDECREF(self->progress);
    Py_XDECREF(self->rows);
    Py_XDECREF(self->device);
    Py_XDECREF(self->plan);
    py_free_object(object);
}

static PyMethodDef METHODS[] = {
    {"close", engine_close, METH_NOARGS, close_doc},
    {"append", engine_append, METH_VARARGS, append_doc},
    {"append_all", engine_append_all, METH_VARARGS, append_all_doc},
    {"step", engine_step, METH_VARARGS, step_doc},
    {"length", engine_length, METH_O, length_doc},
    {"match", engine_match, METH_VARARGS, match_doc},
    {"truncate", engine_truncate, METH_VARARGS, truncate_doc},
    {"replan", engine_replan, METH_VARARGS, replan_doc},
    {"stats", py_engine_stats, METH_NOARGS, py_stats_doc},
    {"sources", py_engine_sources, METH_NOARGS, py_sources_doc},
    {"clock_ns", engine_clock_ns, METH_NOARGS, clock_ns_doc},
    {"cancel", engine_cancel, METH_NOARGS, cancel_doc},
    {"trace_start", py_engine_trace_start, METH_O, py_trace_start_doc},
    {"trace_stop", py_engine_trace_stop, METH_NOARGS, py_trace_stop_doc},
    {"trace_read", py_engine_trace_read, METH_O, py_trace_read_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef GETTERS[] = {
    {"logits", engine_logits, NULL,
        "read-only float32 of the last pass, [n_vocab] or [n][n_vocab]; None before the first. "
        "Holds until the next pass.",
        NULL},
    {"closed", engine_closed, NULL, "whether it is closed", NULL},
    {"busy", engine_busy, NULL, "whether a call is under way", NULL},
    {"is_lost", engine_is_lost, NULL, "whether its device failed for good", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(engine_doc,
    "Engine(plan, device, *, graphs=True, check=False, locked_limit=0, ram_limit=0, "
    "progress=None)\n\nLoads what the plan "
    "asks for. progress(done_bytes, total_bytes) is called now and then.");

static PyType_Slot SLOTS[] = {
    {Py_tp_doc, (void *)engine_doc},
    {Py_tp_new, (void *)engine_new},
    {Py_tp_dealloc, (void *)engine_dealloc},
    {Py_tp_traverse, (void *)engine_traverse},
    {Py_tp_methods, METHODS},
    {Py_tp_getset, GETTERS},
    {0, NULL},
};

static PyType_Spec SPEC = {
    .name = "pipeshard._core.Engine",
    .basicsize = sizeof(engine),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = SLOTS,
};

int py_engine_register(PyObject *module, py_state *state)
{
    return py_add_type(module, &SPEC, &state->engine_type);
}
