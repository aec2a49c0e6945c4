/* py_rows - _core.Rows: float32 rows that NumPy arrays share, so that an array of logits can never
 * outlive its memory, whatever happens to the engine. Not constructible from Python.
 *
 * Threads: the GIL.
 */
#include "binding/py_util.h"

typedef struct rows {
    PyObject_HEAD float *data; /* owns; [n_rows][n_cols] */
    uint64_t n_rows, n_cols;
} rows;

PyObject *py_rows_new(py_state *state, uint64_t n_rows, uint64_t n_cols)
{
    rows *self = (rows *)state->rows_type->tp_alloc(state->rows_type, 0);
    if (self == NULL) return NULL;
    uint64_t n = 0;
    self->n_rows = n_rows;
    self->n_cols = n_cols;
    if (ps_mul_u64(n_rows, n_cols, &n)) self->data = ps_alloc(n > 0 ? n : 1, sizeof(float));
    if (self->data == NULL) {
        ps_err err = {0};
        ps_fail(&err, PS_ENOMEM, "no host memory for %llu rows of %llu logits",
            (unsigned long long)n_rows, (unsigned long long)n_cols);
        py_raise(state, &err);
        Py_CLEAR(self);
    }
    return (PyObject *)self;
}

uint64_t py_rows_count(PyObject *self)
{
    return ((rows *)self)->n_rows;
}

float *py_rows_data(PyObject *self)
{
    return ((rows *)self)->data;
}

PyObject *py_rows_array(PyObject *self, bool flat)
{
    rows *r = (rows *)self;
    npy_intp dims[2] = {(npy_intp)r->n_rows, (npy_intp)r->n_cols};
    PyObject *array =
        PyArray_SimpleNewFromData(flat ? 1 : 2, flat ? dims + 1 : dims, NPY_FLOAT32, r->data);
    if (array == NULL) return NULL;
    PyArray_CLEARFLAGS((PyArrayObject *)array, NPY_ARRAY_WRITEABLE);
    if (PyArray_SetBaseObject((PyArrayObject *)array, Py_NewRef(self)) < 0) Py_CLEAR(array);
    return array;
}

static int rows_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    return 0;
}

static void rows_dealloc(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    ps_free(((rows *)self)->data);
    py_free_object(self);
}

static PyType_Slot SLOTS[] = {
    {Py_tp_dealloc, (void *)rows_dealloc},
    {Py_tp_traverse, (void *)rows_traverse},
    {0, NULL},
};

static PyType_Spec SPEC = {
    .name = "pipeshard._core.Rows",
    .basicsize = sizeof(rows),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE |
             Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = SLOTS,
};

int py_rows_register(PyObject *module, py_state *state)
{
    return py_add_type(module, &SPEC, &state->rows_type);
}
