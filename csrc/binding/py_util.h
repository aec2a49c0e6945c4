/* py_util - what every binding file shares: the module's state, the one way from a ps_err to a
 * Python exception, conversions, and whatever differs between the Python and NumPy versions that we
 * support (3.11-3.13, 1.26-2.x).
 *
 * Not here: types (one file each, py_<noun>.c) and the list of them (py_module.c).
 * Threads: every function needs the GIL.
 *
 * A new type: py_<noun>.c defines a PyType_Spec and `int py_<noun>_register(PyObject *module,
 * py_state *state)`, which creates the type into a new field of py_state and adds it to the module;
 * declare it here, add it to the tables of py_module.c (exec, traverse, clear) and list the file in
 * csrc/sources.txt.
 *
 * Objects are made whole by tp_new and have no __init__, so no method ever meets half of one. Each
 * holds a reference to the objects that its core object borrows.
 */
#ifndef PY_UTIL_H
#define PY_UTIL_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* NumPy's function table is one pointer for the whole extension: py_module.c defines and fills it,
 * every other file refers to it. 1.25 is the C API of NumPy 1.26. */
#define NPY_TARGET_VERSION     NPY_1_25_API_VERSION
#define NPY_NO_DEPRECATED_API  NPY_1_25_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL ps_numpy_api
#ifndef PY_UTIL_DEFINES_NUMPY
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include "base/ps_base.h"
#include "device/ps_device.h"
#include "engine/ps_exec.h"

#if PY_VERSION_HEX < 0x030b0000
#error "pipeshard needs Python 3.11 or newer"
#endif

/* Per module, so per interpreter: filled by the exec slot, constant afterwards. Every field is
 * owned. */
typedef struct py_state {
    PyObject
        *errors; /* the module pipeshard.errors: its classes are looked up when something fails */
    PyTypeObject *metadata_type, *model_type, *plan_type, *device_type, *engine_type, *rows_type,
        *sampler_type;
} py_state;

extern PyModuleDef py_module_def;

/* State of the module that defined the type of `self` (or of its base); NULL with an exception set
 * on misuse. */
py_state *py_state_of(PyObject *self);
/* The same for tp_new, where there is only the type. */
py_state *py_state_of_type(PyTypeObject *type);

/* Raise what `err` says, as the class that its status maps to, with that class's attributes.
 * Returns NULL. A cancelled call raises what the signal handler raised, KeyboardInterrupt unless it
 * chose otherwise. */
PyObject *py_raise(const py_state *state, const ps_err *err);

/* A str of text that need not be valid UTF-8. */
PyObject *py_text(const char *s, size_t n);

/* A heap type from its spec, into *out and the module. */
int py_add_type(PyObject *module, PyType_Spec *spec, PyTypeObject **out);
/* The last step of every dealloc: the memory and the reference to the heap type. */
void py_free_object(PyObject *self);

/* Converters for "O&": TypeError for what is no integer, OverflowError for what does not fit. */
int py_to_u32(PyObject *object, void *out);
int py_to_u64(PyObject *object, void *out);

/* Adds `value` (stolen; NULL means that making it failed) to a dict. */
int py_dict_take(PyObject *dict, const char *key, PyObject *value);

/* ---- the types ---- */

int py_metadata_register(PyObject *module, py_state *state);
int py_model_register(PyObject *module, py_state *state);
int py_plan_register(PyObject *module, py_state *state);
int py_device_register(PyObject *module, py_state *state);
int py_engine_register(PyObject *module, py_state *state);
int py_profile_register(PyObject *module, py_state *state);
int py_rows_register(PyObject *module, py_state *state);
int py_sampler_register(PyObject *module, py_state *state);

/* A mapping over the metadata of `gguf`, which `owner` keeps open. */
PyObject *py_metadata_over(py_state *state, const ps_gguf *gguf, PyObject *owner);

/* What is inside: borrowed from the object, which must be of the type that the name says. */
ps_model *py_model_get(PyObject *model);
const ps_plan *py_plan_get(PyObject *plan);
PyObject *py_plan_model(PyObject *plan); /* borrowed */
ps_device *py_device_get(PyObject *device);
const ps_op_table *py_device_cpu_ops(PyObject *device);

/* Row `row` of the last pass's logits, inside the engine until its next call; NULL with an
 * exception set where there is none. */
const float *py_engine_row(PyObject *engine, uint32_t row, uint32_t *n_vocab);

/* The executor inside an open and idle engine; NULL with an exception set. */
ps_exec *py_engine_exec(PyObject *engine);

/* Rows of float32 that arrays share: they outlive whatever they were copied from. */
PyObject *py_rows_new(py_state *state, uint64_t n_rows, uint64_t n_cols);
uint64_t py_rows_count(PyObject *rows);
float *py_rows_data(PyObject *rows);
/* A read-only array [n_rows][n_cols], or [n_cols] where `flat`, whose base is `rows`. */
PyObject *py_rows_array(PyObject *rows, bool flat);

#endif
