/* py_profile - _core.profile(): measures a device for a model, as rows that profiling.py makes
 * Samples of.
 *
 * Not here: keeping them (profiling.py).
 * Threads: the GIL is released while it measures, and re-taken before each step to let signal
 * handlers run and to show progress. The device must be in nobody else's use.
 */
#include "binding/py_util.h"

#include "engine/ps_profile.h"

typedef struct caller {
    PyObject *progress; /* borrows; NULL: none */
    PyThreadState *released;
} caller;

static bool progress(void *ctx, uint64_t done, uint64_t total)
{
    caller *c = ctx;
    PyEval_RestoreThread(c->released);
    bool go_on = PyErr_CheckSignals() == 0;
    if (go_on && c->progress != NULL) {
        PyObject *result = PyObject_CallFunction(
            c->progress, "KK", (unsigned long long)done, (unsigned long long)total);
        go_on = result != NULL;
        Py_XDECREF(result);
    }
    c->released = PyEval_SaveThread();
    return go_on;
}

static PyObject *row_of(const ps_sample *s)
{
    const ps_fmt_info *fmt = s->fmt >= 0 ? ps_fmt_get((uint32_t)s->fmt) : NULL;
    return Py_BuildValue("(sszIKKdIsN)", ps_sample_side_name(s->side), s->op,
        fmt != NULL ? fmt->name : NULL, s->n_tok, (unsigned long long)s->flops,
        (unsigned long long)s->bytes, s->seconds, s->threads, ps_sample_load_name(s->load),
        PyBool_FromLong(s->extrapolated));
}

static PyObject *rows_of(const ps_profile *p)
{
    PyObject *list = PyList_New((Py_ssize_t)p->n_samples);
    for (uint32_t i = 0; list != NULL && i < p->n_samples; i++) {
        PyObject *row = row_of(&p->samples[i]);
        if (row == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, (Py_ssize_t)i, row);
    }
    return list;
}

PyDoc_STRVAR(profile_doc,
    "profile(model, device, *, threads=0, max_tok=0, max_kv=0, device_bytes=0, host_bytes=0,\n"
    "        limit_ns=0, progress=None) -> list of (side, op, fmt, n_tok, flops, bytes, seconds,\n"
    "        threads, load, extrapolated)\n\nTimes the model's ops on a device that nothing else "
    "uses. 0: the usual. max_tok, max_kv: no more\nthan the device was opened for. "
    "progress(done, total) is called now and then.");

static PyObject *profile(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static const char *const names[] = {"model", "device", "threads", "max_tok", "max_kv",
        "device_bytes", "host_bytes", "limit_ns", "progress", NULL};
    py_state *state = PyModule_GetState(module);
    PyObject *model = NULL, *device = NULL, *callback = Py_None;
    ps_profile_spec spec = {.progress = progress};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!O!|$O&O&O&O&O&O&O", (char **)names,
            state->model_type, &model, state->device_type, &device, py_to_u32, &spec.threads,
            py_to_u32, &spec.max_tok, py_to_u32, &spec.max_kv, py_to_u64, &spec.device_bytes,
            py_to_u64, &spec.host_bytes, py_to_u64, &spec.limit_ns, &callback))
        return NULL;
    ps_device *d = py_device_get(device);
    caller c = {.progress = callback != Py_None ? callback : NULL};
    ps_profile result = {0};
    ps_err err = {0};
    spec.cpu_ops = py_device_cpu_ops(device);
    spec.dev_ops = d->info.kind == PS_DEVICE_CUDA ? ps_cuda_ops() : spec.cpu_ops;
    spec.ctx = &c;
    c.released = PyEval_SaveThread();
    ps_status status = ps_profile_measure(py_model_get(model), d, &spec, &result, &err);
    PyEval_RestoreThread(c.released);
    PyObject *rows = status == PS_OK ? rows_of(&result) : py_raise(state, &err);
    ps_profile_fini(&result);
    return rows;
}

static PyMethodDef FUNCTIONS[] = {
    {"profile", (PyCFunction)(void (*)(void))profile, METH_VARARGS | METH_KEYWORDS, profile_doc},
    {NULL, NULL, 0, NULL},
};

int py_profile_register(PyObject *module, py_state *state)
{
    (void)state;
    return PyModule_AddFunctions(module, FUNCTIONS);
}
