/* py_sampler - _core.Sampler: one text's way from logits to tokens. Reads an engine's logits where
 * they lie, without a copy.
 *
 * Threads: the GIL; a token costs too little to release it.
 */
#include "binding/py_util.h"

#include "engine/ps_sample.h"

typedef struct sampler {
    PyObject_HEAD ps_sample *core; /* owns */
    uint32_t n_vocab;
    bool logprobs;
} sampler;

/* ---- arguments ---- */

typedef struct sampler_args {
    uint32_t n_vocab;
    PyObject *bias_ids, *bias_values;
    ps_sample_params params;
} sampler_args;

/* A one-dimensional C-contiguous array of this type, or None for none. */
static int parse_array(PyObject *object, const char *name, int type, const void **data, uint32_t *n)
{
    PyArrayObject *array = (PyArrayObject *)object;
    *data = NULL;
    *n = 0;
    if (object == NULL || object == Py_None) return 0;
    if (!PyArray_Check(object) || PyArray_TYPE(array) != type || PyArray_NDIM(array) != 1 ||
        !PyArray_IS_C_CONTIGUOUS(array) || PyArray_SIZE(array) > INT32_MAX) {
        PyErr_Format(PyExc_TypeError, "%s must be a one-dimensional C-contiguous array", name);
        return -1;
    }
    *data = PyArray_DATA(array);
    *n = (uint32_t)PyArray_SIZE(array);
    return 0;
}

static int parse(PyObject *args, PyObject *kwargs, sampler_args *a)
{
    static const char *const names[] = {"n_vocab", "temperature", "top_k", "top_p", "min_p",
        "repeat_penalty", "presence_penalty", "frequency_penalty", "penalty_last_n", "bias_ids",
        "bias_values", "seed", "logprobs", "n_top", NULL};
    ps_sample_params *p = &a->params;
    const void *ids = NULL, *values = NULL;
    int logprobs = 0;
    uint32_t n_values = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&|$fifffffO&OOO&pO&", (char **)names,
            py_to_u32, &a->n_vocab, &p->temperature, &p->top_k, &p->top_p, &p->min_p,
            &p->repeat_penalty, &p->presence_penalty, &p->frequency_penalty, py_to_u32,
            &p->penalty_last_n, &a->bias_ids, &a->bias_values, py_to_u64, &p->seed, &logprobs,
            py_to_u32, &p->n_top) ||
        parse_array(a->bias_ids, "bias_ids", NPY_INT32, &ids, &p->n_bias) < 0 ||
        parse_array(a->bias_values, "bias_values", NPY_FLOAT32, &values, &n_values) < 0)
        return -1;
    if (n_values != p->n_bias) {
        PyErr_SetString(PyExc_ValueError, "bias_ids and bias_values must be of one length");
        return -1;
    }
    p->bias_ids = ids;
    p->bias_values = values;
    p->logprobs = logprobs != 0;
    return 0;
}

static PyObject *sampler_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    py_state *state = py_state_of_type(type);
    sampler_args a = {.params = ps_sample_defaults()};
    if (state == NULL || parse(args, kwargs, &a) < 0) return NULL;
    sampler *self = (sampler *)type->tp_alloc(type, 0);
    if (self == NULL) return NULL;
    ps_err err = {0};
    self->n_vocab = a.n_vocab;
    self->logprobs = a.params.logprobs;
    if (ps_sample_create(a.n_vocab, &a.params, &self->core, &err) != PS_OK) {
        Py_CLEAR(self);
        py_raise(state, &err);
    }
    return (PyObject *)self;
}

/* ---- tokens ---- */

/* Logits of an engine's last pass, or of an array. */
static const float *logits_of(
    const sampler *self, const py_state *state, PyObject *source, uint32_t row)
{
    uint32_t n = 0;
    const void *data = NULL;
    if (PyObject_TypeCheck(source, state->engine_type))
        data = py_engine_row(source, row, &n);
    else if (source == Py_None || parse_array(source, "logits", NPY_FLOAT32, &data, &n) < 0)
        data = NULL;
    if (data == NULL && !PyErr_Occurred())
        PyErr_SetString(PyExc_TypeError, "logits must be an engine or a float32 array");
    /* Heads are often padded: what is behind the vocabulary names no token. */
    if (data != NULL && n < self->n_vocab) {
        PyErr_Format(PyExc_ValueError, "%u logits for a vocabulary of %u", (unsigned)n,
            (unsigned)self->n_vocab);
        data = NULL;
    }
    return data;
}

static PyObject *top_of(const ps_sample_token *token)
{
    PyObject *list = PyList_New(token->n_top);
    for (uint32_t i = 0; list != NULL && i < token->n_top; i++) {
        PyObject *item =
            Py_BuildValue("(id)", (int)token->top[i].id, (double)token->top[i].logprob);
        if (item == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, item);
    }
    return list;
}

PyDoc_STRVAR(next_doc,
    "next(logits, row=0) -> int, or (id, logprob, [(id, logprob), ...])\n\nlogits: an Engine, of "
    "whose last pass this row is read, or a float32 array. The tuple where logprobs are wanted.");

static PyObject *sampler_next(PyObject *object, PyObject *args)
{
    sampler *self = (sampler *)object;
    py_state *state = py_state_of(object);
    PyObject *source = NULL;
    uint32_t row = 0;
    const float *logits = NULL;
    if (state == NULL || !PyArg_ParseTuple(args, "O|O&", &source, py_to_u32, &row) ||
        (logits = logits_of(self, state, source, row)) == NULL)
        return NULL;
    ps_sample_token token = {0};
    ps_err err = {0};
    if (ps_sample_next(self->core, logits, &token, &err) != PS_OK) return py_raise(state, &err);
    if (!self->logprobs) return PyLong_FromLong(token.id);
    return Py_BuildValue("(idN)", (int)token.id, (double)token.logprob, top_of(&token));
}

PyDoc_STRVAR(accept_doc,
    "accept(tokens)\n\nTells the penalties what is part of the text: an id, or an int32 array.");

static PyObject *sampler_accept(PyObject *object, PyObject *arg)
{
    sampler *self = (sampler *)object;
    const void *data = NULL;
    uint32_t n = 0;
    if (PyLong_Check(arg)) {
        long id = PyLong_AsLong(arg);
        if (id == -1 && PyErr_Occurred()) return NULL;
        if (id >= 0 && id <= INT32_MAX) ps_sample_accept(self->core, (int32_t)id);
        Py_RETURN_NONE;
    }
    if (parse_array(arg, "tokens", NPY_INT32, &data, &n) < 0) return NULL;
    const int32_t *tokens = data;
    for (uint32_t i = 0; i < n; i++) ps_sample_accept(self->core, tokens[i]);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(reset_doc, "reset()\n\nAs just created.");

static PyObject *sampler_reset(PyObject *object, PyObject *unused)
{
    (void)unused;
    ps_sample_reset(((sampler *)object)->core);
    Py_RETURN_NONE;
}

/* ---- the type ---- */

static int sampler_traverse(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(object));
    return 0;
}

static void sampler_dealloc(PyObject *object)
{
    PyObject_GC_UnTrack(object);
    ps_sample_destroy(((sampler *)object)->core);
    py_free_object(object);
}

static PyMethodDef METHODS[] = {
    {"next", sampler_next, METH_VARARGS, next_doc},
    {"accept", sampler_accept, METH_O, accept_doc},
    {"reset", sampler_reset, METH_NOARGS, reset_doc},
    {NULL, NULL, 0, NULL},
};

PyDoc_STRVAR(sampler_doc,
    "Sampler(n_vocab, *, temperature, top_k, top_p, min_p, repeat_penalty, presence_penalty,\n"
    "        frequency_penalty, penalty_last_n, bias_ids, bias_values, seed, logprobs, n_top)");

static PyType_Slot SLOTS[] = {
    {Py_tp_doc, (void *)sampler_doc},
    {Py_tp_new, (void *)sampler_new},
    {Py_tp_dealloc, (void *)sampler_dealloc},
    {Py_tp_traverse, (void *)sampler_traverse},
    {Py_tp_methods, METHODS},
    {0, NULL},
};

static PyType_Spec SPEC = {
    .name = "pipeshard._core.Sampler",
    .basicsize = sizeof(sampler),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = SLOTS,
};

int py_sampler_register(PyObject *module, py_state *state)
{
    return py_add_type(module, &SPEC, &state->sampler_type);
}
