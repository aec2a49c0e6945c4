/* py_module - the extension pipeshard._core: its state, its functions and the list of its types.
 *
 * Not here: what the types do (py_<noun>.c), how errors become exceptions (py_util.c).
 * Threads: module init and all functions hold the GIL.
 */
#define PY_UTIL_DEFINES_NUMPY
#include "binding/py_util.h"
#include "device/ps_device.h"
#include "kernels/ps_cpu.h"

#include <stdio.h>
#include <string.h>

/* ---- what was compiled in ---- */

static const char *const DEVICES[] = {
    "host",
    "emu",
#ifdef PS_HAVE_CUDA
    "cuda",
#endif
};

static PyObject *tuple_of_names(const char *const *names, size_t n)
{
    PyObject *tuple = PyTuple_New((Py_ssize_t)n);
    for (size_t i = 0; tuple != NULL && i < n; i++) {
        PyObject *name = PyUnicode_FromString(names[i]);
        if (name == NULL)
            Py_CLEAR(tuple);
        else
            PyTuple_SET_ITEM(tuple, (Py_ssize_t)i, name);
    }
    return tuple;
}

/* Names of the CPU variants, slowest first: all of them, or those that this CPU runs. */
static PyObject *cpu_variants(bool only_supported)
{
    const char *names[8] = {NULL};
    size_t n = 0;
    bool supported = false;
    const ps_op_table *table = NULL;
    for (uint32_t i = 0;
         n < Py_ARRAY_LENGTH(names) && (table = ps_cpu_ops_at(i, &supported)) != NULL; i++)
        if (supported || !only_supported) names[n++] = table->name;
    return tuple_of_names(names, n);
}

PyDoc_STRVAR(build_info_doc,
    "build_info() -> dict\n\nWhat was compiled in, and which of the CPU variants this CPU runs. "
    "Asks no GPU.");

static PyObject *build_info(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return Py_BuildValue("{s:s, s:N, s:N, s:N, s:s, s:s}", "version", PS_VERSION, "devices",
        tuple_of_names(DEVICES, Py_ARRAY_LENGTH(DEVICES)), "cpu_variants", cpu_variants(false),
        "cpu_variants_here", cpu_variants(true), "cuda_archs", PS_CUDA_ARCHS, "compiler",
        __VERSION__);
}

PyDoc_STRVAR(raise_error_doc,
    "_raise_error(status, message='', ...)\n\nRaise what a core function that fails with "
    "this status and these fields would: the tests' way to every row of the table.");

static PyObject *raise_error(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static const char *const names[] = {"status", "message", "field", "extra", "offset", "needed",
        "budget", "smallest", "errno", NULL};
    int status = 0, os_errno = 0;
    const char *message = "", *field = "", *extra = "";
    unsigned long long offset = 0, needed = 0, budget = 0, smallest = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "i|sssKKKKi", (char **)names, &status, &message,
            &field, &extra, &offset, &needed, &budget, &smallest, &os_errno))
        return NULL;
    ps_err err = {.status = (ps_status)status,
        .offset = offset,
        .needed = needed,
        .budget = budget,
        .smallest = smallest,
        .os_errno = os_errno};
    snprintf(err.message, sizeof err.message, "%s", message);
    snprintf(err.field, sizeof err.field, "%s", field);
    snprintf(err.extra, sizeof err.extra, "%s", extra);
    return py_raise(PyModule_GetState(module), &err);
}

/* ---- for tests: the allocator's counters and its fault knob ---- */

PyDoc_STRVAR(heap_stats_doc,
    "_heap_stats() -> (live_bytes, live_blocks, n_allocs)\n\nOf everything the core allocated.");

static PyObject *heap_stats(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    const ps_heap_stats s = ps_heap_get_stats();
    return Py_BuildValue("(KKK)", s.live_bytes, s.live_blocks, s.n_allocs);
}

PyDoc_STRVAR(heap_fail_after_doc,
    "_heap_fail_after(n) -> bool\n\nRefuse the allocation behind the next n, once; n < 0: never. "
    "Returns whether the last such order was carried out.");

static PyObject *heap_fail_after(PyObject *module, PyObject *arg)
{
    (void)module;
    long long after = PyLong_AsLongLong(arg);
    if (after == -1 && PyErr_Occurred()) return NULL;
    return PyBool_FromLong(ps_heap_fail_after(after));
}

/* ---- asking ---- */

PyDoc_STRVAR(cuda_status_doc,
    "cuda_status() -> (bool, str)\n\nWhether a CUDA device can be opened here, else why not.");

static PyObject *cuda_status(PyObject *module, PyObject *unused)
{
    char why[512] = "";
    bool available = false;
    (void)module, (void)unused;
    Py_BEGIN_ALLOW_THREADS;
    available = ps_device_cuda_available(why, sizeof why);
    Py_END_ALLOW_THREADS;
    return Py_BuildValue("(NN)", PyBool_FromLong(available), py_text(why, strlen(why)));
}

PyDoc_STRVAR(cpu_count_doc, "cpu_count() -> int\n\nCPUs that this process may use.");

static PyObject *cpu_count(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return PyLong_FromLong(ps_cpu_count());
}

PyDoc_STRVAR(default_threads_doc, "default_threads(kind) -> int\n\nCPU threads of a device of this "
                                  "kind that is not told how many.");

static PyObject *default_threads(PyObject *module, PyObject *kind)
{
    (void)module;
    const char *text = PyUnicode_AsUTF8(kind);
    return text != NULL ? PyLong_FromLong(ps_device_default_threads(text)) : NULL;
}

PyDoc_STRVAR(architectures_doc, "architectures() -> tuple[str]\n\nThose that Model opens.");

static PyObject *architectures(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    PyObject *text = PyUnicode_FromString(ps_model_architectures());
    PyObject *comma = PyUnicode_FromString(", "), *list = NULL, *tuple = NULL;
    if (text != NULL && comma != NULL) list = PyUnicode_Split(text, comma, -1);
    if (list != NULL) tuple = PyList_AsTuple(list);
    Py_XDECREF(text);
    Py_XDECREF(comma);
    Py_XDECREF(list);
    return tuple;
}

static PyMethodDef METHODS[] = {
    {"build_info", build_info, METH_NOARGS, build_info_doc},
    {"_raise_error", (PyCFunction)(void (*)(void))raise_error, METH_VARARGS | METH_KEYWORDS,
        raise_error_doc},
    {"cuda_status", cuda_status, METH_NOARGS, cuda_status_doc},
    {"cpu_count", cpu_count, METH_NOARGS, cpu_count_doc},
    {"default_threads", default_threads, METH_O, default_threads_doc},
    {"architectures", architectures, METH_NOARGS, architectures_doc},
    {"_heap_stats", heap_stats, METH_NOARGS, heap_stats_doc},
    {"_heap_fail_after", heap_fail_after, METH_O, heap_fail_after_doc},
    {NULL, NULL, 0, NULL},
};

/* ---- the module ---- */

static int (*const REGISTER[])(PyObject *module, py_state *state) = {
    py_metadata_register,
    py_model_register,
    py_plan_register,
    py_device_register,
    py_engine_register,
    py_profile_register,
    py_rows_register,
    py_sampler_register,
};

static int module_exec(PyObject *module)
{
    py_state *state = PyModule_GetState(module);
    import_array1(-1);
    state->errors = PyImport_ImportModule("pipeshard.errors");
    if (state->errors == NULL) return -1;
    for (size_t i = 0; i < Py_ARRAY_LENGTH(REGISTER); i++)
        if (REGISTER[i](module, state) < 0) return -1;
    return 0;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    py_state *state = PyModule_GetState(module);
    Py_VISIT(state->errors);
    Py_VISIT(state->metadata_type);
    Py_VISIT(state->model_type);
    Py_VISIT(state->plan_type);
    Py_VISIT(state->device_type);
    Py_VISIT(state->engine_type);
    Py_VISIT(state->rows_type);
    Py_VISIT(state->sampler_type);
    return 0;
}

static int module_clear(PyObject *module)
{
    py_state *state = PyModule_GetState(module);
    Py_CLEAR(state->errors);
    Py_CLEAR(state->metadata_type);
    Py_CLEAR(state->model_type);
    Py_CLEAR(state->plan_type);
    Py_CLEAR(state->device_type);
    Py_CLEAR(state->engine_type);
    Py_CLEAR(state->rows_type);
    Py_CLEAR(state->sampler_type);
    return 0;
}

static void module_free(void *module)
{
    module_clear(module);
}

static PyModuleDef_Slot SLOTS[] = {
    {Py_mod_exec, (void *)module_exec},
#if PY_VERSION_HEX >= 0x030c0000
    /* NumPy, whose arrays we hand out, is not ready for interpreters with a GIL of their own. */
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
    {0, NULL},
};

PyModuleDef py_module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_core",
    .m_doc = "The C core of pipeshard. Private: use the names of the package.",
    .m_size = sizeof(py_state),
    .m_methods = METHODS,
    .m_slots = SLOTS,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC PyInit__core(void);
PyMODINIT_FUNC PyInit__core(void)
{
    return PyModuleDef_Init(&py_module_def);
}
