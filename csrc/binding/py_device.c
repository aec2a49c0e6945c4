/* py_device - _core.Device: an open device with the CPU variant that its CPU streams use. An engine
 * holds a reference; the device closes when the last one goes.
 *
 * Threads: the GIL; opening releases it. One engine at a time drives a device.
 */
#include "binding/py_util.h"

#include <string.h>

#include "kernels/ps_ops.h"

typedef struct device {
    PyObject_HEAD ps_device *core; /* owns */
    const ps_op_table *cpu_ops;    /* constant */
} device;

ps_device *py_device_get(PyObject *self)
{
    return ((device *)self)->core;
}

const ps_op_table *py_device_cpu_ops(PyObject *self)
{
    return ((device *)self)->cpu_ops;
}

/* ---- options ---- */

/* Names as in pipeshard.emu; the order is ps_fault_kind's. */
static const char *const FAULT_NAMES[PS_FAULT_COUNT] = {
    "alloc", "locked_alloc", "copy", "launch", "flag", "sync"};

static int to_fault(PyObject *item, ps_fault *out)
{
    const char *name = NULL;
    long long after = 0;
    int sticky = 0;
    if (!PyTuple_Check(item)) {
        PyErr_SetString(PyExc_TypeError, "a fault is a tuple (kind, after, sticky)");
        return -1;
    }
    if (!PyArg_ParseTuple(item, "sLp;a fault is (kind, after, sticky)", &name, &after, &sticky))
        return -1;
    for (int kind = 0; kind < PS_FAULT_COUNT; kind++)
        if (strcmp(name, FAULT_NAMES[kind]) == 0) {
            *out = (ps_fault){.kind = (ps_fault_kind)kind, .after = after, .sticky = sticky != 0};
            return 0;
        }
    PyErr_Format(PyExc_ValueError, "there is no fault of kind '%s'", name);
    return -1;
}

static int to_faults(PyObject *sequence, ps_device_options *o)
{
    PyObject *items = PySequence_Fast(sequence, "faults must be a sequence");
    if (items == NULL) return -1;
    Py_ssize_t n = PySequence_Fast_GET_SIZE(items);
    int status = 0;
    if (n > PS_MAX_FAULTS) {
        PyErr_Format(PyExc_ValueError, "at most %d faults, not %zd", PS_MAX_FAULTS, n);
        status = -1;
    }
    for (Py_ssize_t i = 0; i < n && status == 0; i++)
        status = to_fault(PySequence_Fast_GET_ITEM(items, i), &o->faults[o->n_faults++]);
    Py_DECREF(items);
    return status;
}

static int to_profile(PyObject *tuple, ps_emu_profile *p)
{
    if (tuple == Py_None) return 0;
    if (!PyTuple_Check(tuple)) {
        PyErr_SetString(PyExc_TypeError, "profile must be a tuple of ten numbers");
        return -1;
    }
    unsigned long long launch_ns = 0, copy_ns = 0, flag_ns = 0;
    if (!PyArg_ParseTuple(tuple, "ddddddKKKd;profile is a tuple of ten numbers",
            &p->h2d_bytes_per_s, &p->d2h_bytes_per_s, &p->vram_bytes_per_s, &p->gpu_flops,
            &p->dram_bytes_per_s, &p->cpu_flops, &launch_ns, &copy_ns, &flag_ns,
            &p->disk_bytes_per_s))
        return -1;
    p->launch_ns = launch_ns;
    p->copy_ns = copy_ns;
    p->flag_ns = flag_ns;
    return 0;
}

PyDoc_STRVAR(emu_profile_doc,
    "emu_profile() -> tuple\n\nThe rates of an emulated device that is given none, as Device takes "
    "them.");

static PyObject *emu_profile(PyObject *module, PyObject *unused)
{
    const ps_emu_profile *p = &ps_emu_profile_default;
    (void)module, (void)unused;
    return Py_BuildValue("(ddddddKKKd)", p->h2d_bytes_per_s, p->d2h_bytes_per_s,
        p->vram_bytes_per_s, p->gpu_flops, p->dram_bytes_per_s, p->cpu_flops, p->launch_ns,
        p->copy_ns, p->flag_ns, p->disk_bytes_per_s);
}

/* ---- opening ---- */

typedef struct open_args {
    const char *kind, *cpu_variant;
    PyObject *model, *profile, *faults;
    uint32_t n_ctx, chunk_tok;
    ps_device_options options;
} open_args;

static int parse(PyObject *args, PyObject *kwargs, const py_state *state, open_args *a)
{
    static const char *const names[] = {"kind", "model", "n_ctx", "chunk_tok", "threads",
        "cpu_variant", "profile", "vram_capacity", "locked_limit", "map_bytes_per_gib", "seed",
        "delays", "faults", NULL};
    int delays = 0;
    ps_device_options *o = &a->options;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "sO!O&O&|$izOO&O&O&O&pO", (char **)names,
            &a->kind, state->model_type, &a->model, py_to_u32, &a->n_ctx, py_to_u32, &a->chunk_tok,
            &o->threads, &a->cpu_variant, &a->profile, py_to_u64, &o->emu_vram_bytes, py_to_u64,
            &o->emu_locked_bytes, py_to_u64, &o->emu_map_bytes_per_gib, py_to_u64, &o->emu_seed,
            &delays, &a->faults))
        return -1;
    o->emu_delays = delays != 0;
    if (a->profile != NULL && to_profile(a->profile, &o->emu_profile) < 0) return -1;
    return a->faults != NULL ? to_faults(a->faults, o) : 0;
}

static PyObject *device_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    py_state *state = py_state_of_type(type);
    open_args a = {0};
    if (state == NULL || parse(args, kwargs, state, &a) < 0) return NULL;
    device *self = (device *)type->tp_alloc(type, 0);
    if (self == NULL) return NULL;
    ps_err err = {0};
    ps_status status = PS_OK;
    self->cpu_ops = ps_cpu_ops(a.cpu_variant);
    if (self->cpu_ops == NULL)
        status = ps_fail_field(&err, PS_EREQUEST, "cpu_variant",
            "there is no CPU variant \"%.40s\" that this CPU runs", a.cpu_variant);
    if (status == PS_OK) {
        if (a.options.threads == 0) a.options.threads = ps_device_default_threads(a.kind);
        a.options.cpu_ops = self->cpu_ops;
        a.options.cpu_scratch_bytes = ps_plan_cpu_scratch_bytes(
            py_model_get(a.model), a.n_ctx, a.chunk_tok, a.options.threads);
        Py_BEGIN_ALLOW_THREADS;
        status = ps_device_open(a.kind, &a.options, &self->core, &err);
        Py_END_ALLOW_THREADS;
    }
    if (status != PS_OK) {
        Py_CLEAR(self);
        py_raise(state, &err);
    }
    return (PyObject *)self;
}

/* ---- what it says ---- */

static const ps_device_info *info_of(PyObject *self)
{
    return &py_device_get(self)->info;
}

static PyObject *device_kind(PyObject *self, void *unused)
{
    static const char *const names[] = {"host", "emu", "cuda"};
    (void)unused;
    return PyUnicode_FromString(names[info_of(self)->kind]);
}

static PyObject *device_name(PyObject *self, void *unused)
{
    (void)unused;
    return py_text(info_of(self)->name, strlen(info_of(self)->name));
}

static PyObject *device_sm(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromLong(info_of(self)->sm);
}

static PyObject *device_vram_total(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(info_of(self)->vram_total_bytes);
}

static PyObject *device_baseline(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(info_of(self)->baseline_bytes);
}

static PyObject *device_virtual_clock(PyObject *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(info_of(self)->virtual_clock);
}

static PyObject *device_cpu_variant(PyObject *self, void *unused)
{
    (void)unused;
    return PyUnicode_FromString(py_device_cpu_ops(self)->name);
}

PyDoc_STRVAR(mem_info_doc, "mem_info() -> (free, total)\n\nBytes of the device's memory, now.");

static PyObject *device_mem_info(PyObject *self, PyObject *unused)
{
    (void)unused;
    py_state *state = py_state_of(self);
    if (state == NULL) return NULL;
    uint64_t free_bytes = 0, total_bytes = 0;
    ps_err err = {0};
    if (ps_device_mem_info(py_device_get(self), &free_bytes, &total_bytes, &err) != PS_OK)
        return py_raise(state, &err);
    return Py_BuildValue("(KK)", free_bytes, total_bytes);
}

/* ---- the type ---- */

static int device_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    return 0;
}

static void device_dealloc(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    ps_device_close(py_device_get(self));
    py_free_object(self);
}

static PyMethodDef METHODS[] = {
    {"mem_info", device_mem_info, METH_NOARGS, mem_info_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef GETTERS[] = {
    {"kind", device_kind, NULL, "\"host\", \"emu\" or \"cuda\"", NULL},
    {"name", device_name, NULL, "as its maker calls it", NULL},
    {"sm", device_sm, NULL, "compute capability, 90 for 9.0; 0 where there is none", NULL},
    {"vram_total", device_vram_total, NULL, "capacity in bytes; 0 on host", NULL},
    {"baseline", device_baseline, NULL, "bytes taken before the model", NULL},
    {"virtual_clock", device_virtual_clock, NULL, "whether its time is simulated", NULL},
    {"cpu_variant", device_cpu_variant, NULL, "the CPU kernels in force", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(device_doc,
    "Device(kind, model, n_ctx, chunk_tok, *, threads=0, cpu_variant=None, profile=None,\n"
    "       vram_capacity=0, locked_limit=0, map_bytes_per_gib=0, seed=0, delays=False,\n"
    "       faults=())\n\n"
    "kind: \"host\", \"emu\", \"cuda\" or \"cuda:N\". Model, context and chunk size the scratch "
    "of\n"
    "CPU kernels. What follows cpu_variant is for emu alone.");

static PyType_Slot SLOTS[] = {
    {Py_tp_doc, (void *)device_doc},
    {Py_tp_new, (void *)device_new},
    {Py_tp_dealloc, (void *)device_dealloc},
    {Py_tp_traverse, (void *)device_traverse},
    {Py_tp_methods, METHODS},
    {Py_tp_getset, GETTERS},
    {0, NULL},
};

static PyType_Spec SPEC = {
    .name = "pipeshard._core.Device",
    .basicsize = sizeof(device),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = SLOTS,
};

static PyMethodDef FUNCTIONS[] = {
    {"emu_profile", emu_profile, METH_NOARGS, emu_profile_doc},
    {NULL, NULL, 0, NULL},
};

int py_device_register(PyObject *module, py_state *state)
{
    if (PyModule_AddFunctions(module, FUNCTIONS) < 0) return -1;
    return py_add_type(module, &SPEC, &state->device_type);
}
