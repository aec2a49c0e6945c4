/* py_metadata - _core.Metadata: the key-value pairs of a GGUF file and its directory of tensors.
 * Values are made when asked for: str, int, float, bool, list[str], or a NumPy array (a copy,
 * because nothing in a file is aligned).
 *
 * Opened by path it needs no tensors; over a model it holds a reference to the model instead.
 * Threads: the GIL; the reader behind it is read-only.
 */
#include "binding/py_util.h"

#include "format/ps_gguf.h"

typedef struct metadata {
    PyObject_HEAD const ps_gguf *gguf;
    ps_gguf *own;    /* owns; NULL where `owner` keeps the reader open */
    PyObject *owner; /* owns the reference; NULL where opened by path */
} metadata;

/* ---- values ---- */

static PyObject *string_of(ps_gguf_str s)
{
    return PyUnicode_DecodeUTF8(s.s, (Py_ssize_t)s.n_bytes, "strict");
}

static PyObject *strings_of(const ps_gguf_kv *kv)
{
    PyObject *list = PyList_New((Py_ssize_t)kv->n);
    for (uint64_t i = 0; list != NULL && i < kv->n; i++) {
        ps_gguf_str s = {0};
        ps_gguf_elem_str(kv, i, &s);
        PyObject *item = string_of(s);
        if (item == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, (Py_ssize_t)i, item);
    }
    return list;
}

/* NumPy's type for the elements of an array; -1 for strings. */
static int numpy_type(ps_gguf_type type)
{
    static const int types[PS_GGUF_TYPE_COUNT] = {[PS_GGUF_U8] = NPY_UINT8,
        [PS_GGUF_I8] = NPY_INT8,
        [PS_GGUF_U16] = NPY_UINT16,
        [PS_GGUF_I16] = NPY_INT16,
        [PS_GGUF_U32] = NPY_UINT32,
        [PS_GGUF_I32] = NPY_INT32,
        [PS_GGUF_F32] = NPY_FLOAT32,
        [PS_GGUF_BOOL] = NPY_BOOL,
        [PS_GGUF_STR] = -1,
        [PS_GGUF_ARR] = -1,
        [PS_GGUF_U64] = NPY_UINT64,
        [PS_GGUF_I64] = NPY_INT64,
        [PS_GGUF_F64] = NPY_FLOAT64};
    return types[type];
}

static PyObject *numbers_of(const ps_gguf_kv *kv)
{
    npy_intp n = (npy_intp)kv->n;
    PyObject *array = PyArray_SimpleNew(1, &n, numpy_type(kv->elem_type));
    if (array == NULL) return NULL;
    if (kv->n_bytes > 0) memcpy(PyArray_DATA((PyArrayObject *)array), kv->data, kv->n_bytes);
    PyArray_CLEARFLAGS((PyArrayObject *)array, NPY_ARRAY_WRITEABLE);
    return array;
}

static PyObject *value_of(const ps_gguf_kv *kv)
{
    uint64_t u = 0;
    int64_t i = 0;
    double f = 0.0;
    bool b = false;
    ps_gguf_str s = {0};
    switch (kv->type) {
    case PS_GGUF_ARR: return kv->elem_type == PS_GGUF_STR ? strings_of(kv) : numbers_of(kv);
    case PS_GGUF_STR: ps_gguf_get_str(kv, &s); return string_of(s);
    case PS_GGUF_BOOL: ps_gguf_get_bool(kv, &b); return PyBool_FromLong(b);
    case PS_GGUF_F32:
    case PS_GGUF_F64: ps_gguf_get_f64(kv, &f); return PyFloat_FromDouble(f);
    default: break;
    }
    if (ps_gguf_get_u64(kv, &u)) return PyLong_FromUnsignedLongLong(u);
    ps_gguf_get_i64(kv, &i);
    return PyLong_FromLongLong(i);
}

/* ---- the mapping ---- */

static Py_ssize_t metadata_length(PyObject *self)
{
    return (Py_ssize_t)ps_gguf_kv_count(((metadata *)self)->gguf);
}

/* NULL with no exception where there is no such key. */
static const ps_gguf_kv *find(PyObject *self, PyObject *key)
{
    Py_ssize_t n = 0;
    const char *name = PyUnicode_Check(key) ? PyUnicode_AsUTF8AndSize(key, &n) : NULL;
    if (name == NULL || strlen(name) != (size_t)n) {
        PyErr_Clear(); /* a lone surrogate or a NUL: in no file */
        return NULL;
    }
    return ps_gguf_find(((metadata *)self)->gguf, name);
}

static PyObject *metadata_subscript(PyObject *self, PyObject *key)
{
    const ps_gguf_kv *kv = find(self, key);
    if (kv != NULL) return value_of(kv);
    PyErr_SetObject(PyExc_KeyError, key);
    return NULL;
}

static int metadata_contains(PyObject *self, PyObject *key)
{
    return find(self, key) != NULL;
}

PyDoc_STRVAR(keys_doc, "keys() -> list[str]\n\nIn file order.");

static PyObject *metadata_keys(PyObject *self, PyObject *unused)
{
    (void)unused;
    const ps_gguf *g = ((metadata *)self)->gguf;
    Py_ssize_t n = metadata_length(self);
    PyObject *list = PyList_New(n);
    for (Py_ssize_t i = 0; list != NULL && i < n; i++) {
        PyObject *key = PyUnicode_FromString(ps_gguf_kv_at(g, (uint64_t)i)->key);
        if (key == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, key);
    }
    return list;
}

PyDoc_STRVAR(tensors_doc,
    "tensors() -> list[tuple]\n\n(name, type, dims, n_bytes, offset, i_file) of each tensor; "
    "dims[0] is the length of a row.");

static PyObject *tensor_of(const ps_gguf_tensor *t)
{
    PyObject *dims = PyTuple_New(t->n_dims);
    for (uint32_t i = 0; dims != NULL && i < t->n_dims; i++) {
        PyObject *dim = PyLong_FromUnsignedLongLong(t->dims[i]);
        if (dim == NULL)
            Py_CLEAR(dims);
        else
            PyTuple_SET_ITEM(dims, i, dim);
    }
    if (dims == NULL) return NULL;
    return Py_BuildValue("(ssNKKI)", t->name, ps_gguf_tensor_type_name(t->fmt), dims, t->n_bytes,
        t->offset, t->i_file);
}

static PyObject *metadata_tensors(PyObject *self, PyObject *unused)
{
    (void)unused;
    const ps_gguf *g = ((metadata *)self)->gguf;
    uint64_t n = ps_gguf_tensor_count(g);
    PyObject *list = PyList_New((Py_ssize_t)n);
    for (uint64_t i = 0; list != NULL && i < n; i++) {
        PyObject *tensor = tensor_of(ps_gguf_tensor_at(g, i));
        if (tensor == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, (Py_ssize_t)i, tensor);
    }
    return list;
}

static PyObject *metadata_version(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLong(ps_gguf_version(((metadata *)self)->gguf));
}

static PyObject *metadata_files(PyObject *self, void *unused)
{
    (void)unused;
    const ps_gguf *g = ((metadata *)self)->gguf;
    uint32_t n = ps_gguf_file_count(g);
    PyObject *files = PyTuple_New(n);
    for (uint32_t i = 0; files != NULL && i < n; i++) {
        PyObject *path = PyUnicode_DecodeFSDefault(ps_gguf_file_path(g, i));
        PyObject *file =
            path != NULL ? Py_BuildValue("(NK)", path, ps_gguf_file_bytes(g, i)) : NULL;
        if (file == NULL)
            Py_CLEAR(files);
        else
            PyTuple_SET_ITEM(files, i, file);
    }
    return files;
}

/* ---- the type ---- */

PyObject *py_metadata_over(py_state *state, const ps_gguf *gguf, PyObject *owner)
{
    metadata *self = (metadata *)state->metadata_type->tp_alloc(state->metadata_type, 0);
    if (self == NULL) return NULL;
    self->gguf = gguf;
    self->owner = Py_NewRef(owner);
    return (PyObject *)self;
}

static PyObject *metadata_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static const char *const names[] = {"path", NULL};
    PyObject *path = NULL;
    if (!PyArg_ParseTupleAndKeywords(
            args, kwargs, "O&", (char **)names, PyUnicode_FSConverter, &path))
        return NULL;
    ps_err err = {0};
    metadata *self = (metadata *)type->tp_alloc(type, 0);
    if (self != NULL) {
        ps_status status;
        Py_BEGIN_ALLOW_THREADS;
        status = ps_gguf_open(PyBytes_AS_STRING(path), &self->own, &err);
        Py_END_ALLOW_THREADS;
        self->gguf = self->own;
        if (status != PS_OK) {
            Py_CLEAR(self);
            py_raise(py_state_of_type(type), &err);
        }
    }
    Py_DECREF(path);
    return (PyObject *)self;
}

static int metadata_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(((metadata *)self)->owner);
    return 0;
}

/* No tp_clear: without its owner the reader would dangle, and the owner cannot refer back. */
static void metadata_dealloc(PyObject *self)
{
    metadata *m = (metadata *)self;
    PyObject_GC_UnTrack(self);
    ps_gguf_close(m->own);
    Py_XDECREF(m->owner);
    py_free_object(self);
}

static PyMethodDef METHODS[] = {
    {"keys", metadata_keys, METH_NOARGS, keys_doc},
    {"tensors", metadata_tensors, METH_NOARGS, tensors_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef GETTERS[] = {
    {"version", metadata_version, NULL, "of the format: 2 or 3", NULL},
    {"files", metadata_files, NULL, "(path, bytes) of each part", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(metadata_doc, "Metadata(path)\n\nThe metadata and tensor directory of a GGUF file.");

static PyType_Slot SLOTS[] = {
    {Py_tp_doc, (void *)metadata_doc},
    {Py_tp_new, (void *)metadata_new},
    {Py_tp_dealloc, (void *)metadata_dealloc},
    {Py_tp_traverse, (void *)metadata_traverse},
    {Py_tp_methods, METHODS},
    {Py_tp_getset, GETTERS},
    {Py_mp_length, (void *)metadata_length},
    {Py_mp_subscript, (void *)metadata_subscript},
    {Py_sq_contains, (void *)metadata_contains},
    {0, NULL},
};

static PyType_Spec SPEC = {
    .name = "pipeshard._core.Metadata",
    .basicsize = sizeof(metadata),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = SLOTS,
};

int py_metadata_register(PyObject *module, py_state *state)
{
    return py_add_type(module, &SPEC, &state->metadata_type);
}
