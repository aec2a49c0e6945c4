/* py_model - _core.Model: a file's hyper-parameters and units. Immutable, shared by any number of
 * plans and engines, which hold references to it.
 *
 * Threads: the GIL; opening releases it.
 */
#include "binding/py_util.h"

#include "engine/ps_model.h"

typedef struct model {
    PyObject_HEAD ps_model *core; /* owns */
} model;

ps_model *py_model_get(PyObject *self)
{
    return ((model *)self)->core;
}

/* ---- what it says ---- */

static PyObject *model_arch(PyObject *self, void *unused)
{
    (void)unused;
    return PyUnicode_FromString(py_model_get(self)->arch);
}

static PyObject *model_digest(PyObject *self, void *unused)
{
    (void)unused;
    static const char digits[] = "0123456789abcdef";
    const uint8_t *digest = py_model_get(self)->digest;
    char text[2 * sizeof py_model_get(self)->digest];
    for (size_t i = 0; i < sizeof text / 2; i++) {
        text[2 * i] = digits[digest[i] >> 4];
        text[2 * i + 1] = digits[digest[i] & 15];
    }
    return PyUnicode_FromStringAndSize(text, sizeof text);
}

/* A field of ps_hparams; the table below is the one list of them. */
typedef struct hparam {
    const char *name;
    size_t offset;
    enum { HP_INT, HP_FLOAT, HP_BOOL } kind;
} hparam;

#define HPARAM(name, kind)                                                                         \
    {                                                                                              \
#name, offsetof(ps_hparams, name), kind                                                    \
    }

static const hparam HPARAMS[] = {
    HPARAM(n_vocab, HP_INT),
    HPARAM(n_ctx_train, HP_INT),
    HPARAM(n_layer, HP_INT),
    HPARAM(n_embd, HP_INT),
    HPARAM(n_head, HP_INT),
    HPARAM(n_kv_head, HP_INT),
    HPARAM(head_dim, HP_INT),
    HPARAM(n_ff, HP_INT),
    HPARAM(n_expert, HP_INT),
    HPARAM(n_expert_used, HP_INT),
    HPARAM(n_ff_expert, HP_INT),
    HPARAM(n_rot, HP_INT),
    HPARAM(tied, HP_BOOL),
    HPARAM(eps, HP_FLOAT),
    HPARAM(embed_scale, HP_FLOAT),
    HPARAM(attn_scale, HP_FLOAT),
    HPARAM(attn_softcap, HP_FLOAT),
    HPARAM(logit_softcap, HP_FLOAT),
};

static PyObject *model_hparams(PyObject *self, void *unused)
{
    (void)unused;
    const char *hp = (const char *)&py_model_get(self)->hp;
    PyObject *dict = PyDict_New();
    for (size_t i = 0; dict != NULL && i < Py_ARRAY_LENGTH(HPARAMS); i++) {
        const hparam *h = &HPARAMS[i];
        uint32_t n = 0;
        float f = 0.0f;
        memcpy(&n, hp + h->offset, sizeof n);
        memcpy(&f, hp + h->offset, sizeof f);
        PyObject *value = h->kind == HP_FLOAT ? PyFloat_FromDouble((double)f)
                          : h->kind == HP_INT ? PyLong_FromUnsignedLong(n)
                                              : PyBool_FromLong(n != 0);
        if (py_dict_take(dict, h->name, value) < 0) Py_CLEAR(dict);
    }
    return dict;
}

static PyObject *unit_of(const ps_unit *u)
{
    return Py_BuildValue("(ssNNKIIId)", u->name, ps_unit_kind_name(u->kind),
        u->layer >= 0 ? PyLong_FromLong(u->layer) : Py_NewRef(Py_None),
        u->expert >= 0 ? PyLong_FromLong(u->expert) : Py_NewRef(Py_None), u->n_bytes, u->n_rows,
        u->row_step, u->kv_bytes_per_tok, u->use);
}

static PyObject *model_units(PyObject *self, void *unused)
{
    (void)unused;
    const ps_model *m = py_model_get(self);
    PyObject *list = PyList_New(m->n_units);
    for (uint32_t i = 0; list != NULL && i < m->n_units; i++) {
        PyObject *unit = unit_of(&m->units[i]);
        if (unit == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, unit);
    }
    return list;
}

static PyObject *model_n_bytes(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(py_model_get(self)->n_bytes);
}

static PyObject *model_image_bytes(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(ps_model_image_bytes(py_model_get(self)));
}

static PyObject *model_n_vocab(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLong(py_model_get(self)->hp.n_vocab);
}

static PyObject *model_n_ctx_train(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLong(py_model_get(self)->hp.n_ctx_train);
}

static PyObject *model_metadata(PyObject *self, void *unused)
{
    (void)unused;
    py_state *state = py_state_of(self);
    return state != NULL ? py_metadata_over(state, py_model_get(self)->gguf, self) : NULL;
}

/* ---- the type ---- */

static PyObject *model_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static const char *const names[] = {"path", NULL};
    PyObject *path = NULL;
    if (!PyArg_ParseTupleAndKeywords(
            args, kwargs, "O&", (char **)names, PyUnicode_FSConverter, &path))
        return NULL;
    ps_err err = {0};
    model *self = (model *)type->tp_alloc(type, 0);
    if (self != NULL) {
        ps_status status;
        Py_BEGIN_ALLOW_THREADS;
        status = ps_model_open(PyBytes_AS_STRING(path), &self->core, &err);
        Py_END_ALLOW_THREADS;
        if (status != PS_OK) {
            Py_CLEAR(self);
            py_raise(py_state_of_type(type), &err);
        }
    }
    Py_DECREF(path);
    return (PyObject *)self;
}

static int model_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    return 0;
}

static void model_dealloc(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    ps_model_close(py_model_get(self));
    py_free_object(self);
}

static PyGetSetDef GETTERS[] = {
    {"arch", model_arch, NULL, "architecture, as the file names it", NULL},
    {"digest", model_digest, NULL, "SHA-256 of metadata and tensor directory, in hex", NULL},
    {"hparams", model_hparams, NULL, "hyper-parameters by name", NULL},
    {"units", model_units, NULL,
        "(name, kind, layer, expert, n_bytes, n_rows, row_step, kv_bytes_per_tok, use) of each",
        NULL},
    {"n_bytes", model_n_bytes, NULL, "of all units", NULL},
    {"image_bytes", model_image_bytes, NULL, "host memory that holds units now", NULL},
    {"n_vocab", model_n_vocab, NULL, "rows of the head", NULL},
    {"n_ctx_train", model_n_ctx_train, NULL, "the context that the model was made for", NULL},
    {"metadata", model_metadata, NULL, "_core.Metadata of the file", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(model_doc, "Model(path)\n\nA GGUF model; weights are read when an engine needs them.");

static PyType_Slot SLOTS[] = {
    {Py_tp_doc, (void *)model_doc},
    {Py_tp_new, (void *)model_new},
    {Py_tp_dealloc, (void *)model_dealloc},
    {Py_tp_traverse, (void *)model_traverse},
    {Py_tp_getset, GETTERS},
    {0, NULL},
};

static PyType_Spec SPEC = {
    .name = "pipeshard._core.Model",
    .basicsize = sizeof(model),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = SLOTS,
};

int py_model_register(PyObject *module, py_state *state)
{
    return py_add_type(module, &SPEC, &state->model_type);
}
