/* py_plan - _core.Plan: places that the core has checked, laid out and found to fit. Immutable; it
 * holds a reference to its model.
 *
 * Places arrive as arrays, because a model of 94 layers with 128 experts has 12,000 units and a
 * planner asks often.
 * Threads: the GIL; planning and lowering release it.
 */
#include "binding/py_ticks.h"

#include <limits.h>
#include <stdio.h>
#include <string.h>

#include "engine/ps_ticks.h"

typedef struct plan {
    PyObject_HEAD ps_plan *core; /* owns */
    PyObject *model;             /* owns the reference */
} plan;

const ps_plan *py_plan_get(PyObject *self)
{
    return ((plan *)self)->core;
}

PyObject *py_plan_model(PyObject *self)
{
    return ((plan *)self)->model;
}

/* ---- arguments ---- */

typedef struct plan_args {
    PyObject *model, *tiers, *kinds, *shares, *kv_vram_tok;
    const char *kv;
    ps_plan_spec spec;
    ps_tier tier[PS_MAX_TIERS];
    ps_place *places; /* owns; [n_tiers][n_units] */
} plan_args;

static int parse_tiers(plan_args *a)
{
    PyObject *items = PySequence_Fast(a->tiers, "tiers must be a sequence of (name, max_tok)");
    if (items == NULL) return -1;
    Py_ssize_t n = PySequence_Fast_GET_SIZE(items);
    int status = 0;
    if (n > PS_MAX_TIERS) {
        PyErr_Format(PyExc_ValueError, "at most %d tiers, not %zd", PS_MAX_TIERS, n);
        status = -1;
    }
    for (Py_ssize_t i = 0; i < n && status == 0; i++) {
        const char *name = NULL;
        PyObject *item = PySequence_Fast_GET_ITEM(items, i), *max_tok = NULL;
        ps_tier *tier = &a->tier[i];
        tier->max_tok = UINT32_MAX;
        if (!PyTuple_Check(item)) {
            PyErr_SetString(PyExc_TypeError, "a tier is a tuple (name, max_tok)");
            status = -1;
        } else if (!PyArg_ParseTuple(item, "sO;a tier is (name, max_tok)", &name, &max_tok) ||
                   (max_tok != Py_None && !py_to_u32(max_tok, &tier->max_tok))) {
            status = -1;
        } else {
            snprintf(tier->name, sizeof tier->name, "%s", name);
        }
    }
    a->spec.tiers = a->tier;
    a->spec.n_tiers = (uint32_t)n;
    Py_DECREF(items);
    return status;
}

/* A C-contiguous array of exactly this type and number of elements. */
static const void *array_data(PyObject *array, const char *name, int type, uint64_t n)
{
    if (!PyArray_Check(array) || PyArray_TYPE((PyArrayObject *)array) != type ||
        !PyArray_IS_C_CONTIGUOUS((PyArrayObject *)array)) {
        PyErr_Format(PyExc_TypeError, "%s must be a C-contiguous array of the exact type", name);
        return NULL;
    }
    if ((uint64_t)PyArray_SIZE((PyArrayObject *)array) != n) {
        PyErr_Format(PyExc_ValueError, "%s has %zd elements, not %llu", name,
            (Py_ssize_t)PyArray_SIZE((PyArrayObject *)array), (unsigned long long)n);
        return NULL;
    }
    return PyArray_DATA((PyArrayObject *)array);
}

static int parse_places(plan_args *a, const py_state *state)
{
    const ps_model *m = py_model_get(a->model);
    uint64_t n = (uint64_t)a->spec.n_tiers * m->n_units;
    const uint8_t *kinds = array_data(a->kinds, "kinds", NPY_UINT8, n);
    if (kinds == NULL) return -1;
    const float *shares = NULL;
    if (a->shares != Py_None &&
        (shares = array_data(a->shares, "shares", NPY_FLOAT32, 2 * n)) == NULL)
        return -1;
    if (a->kv_vram_tok != Py_None && (a->spec.kv_vram_tok = array_data(a->kv_vram_tok,
                                          "kv_vram_tok", NPY_UINT32, m->hp.n_layer)) == NULL)
        return -1;
    a->places = ps_alloc(n, sizeof *a->places);
    if (a->places == NULL) {
        ps_err err = {0};
        ps_fail(&err, PS_ENOMEM, "no host memory for the places of %u units", m->n_units);
        py_raise(state, &err);
        return -1;
    }
    for (uint64_t i = 0; i < n; i++)
        a->places[i] = (ps_place){.kind = (ps_place_kind)kinds[i],
            .vram = shares != NULL ? shares[2 * i] : 0.0f,
            .stream = shares != NULL ? shares[2 * i + 1] : 0.0f};
    a->spec.places = a->places;
    return 0;
}

static int parse_kv(plan_args *a, const py_state *state)
{
    if (strcmp(a->kv, "f16") == 0)
        a->spec.kv_fmt = PS_FMT_F16;
    else if (strcmp(a->kv, "q8_0") == 0)
        a->spec.kv_fmt = PS_FMT_Q8_0;
    else {
        ps_err err = {0};
        ps_fail_field(
            &err, PS_EREQUEST, "kv", "the KV cache can be f16 or q8_0, not \"%.20s\"", a->kv);
        py_raise(state, &err);
        return -1;
    }
    return 0;
}

static int parse(PyObject *args, PyObject *kwargs, const py_state *state, plan_args *a)
{
    static const char *const names[] = {"model", "tiers", "kinds", "shares", "kv_vram_tok",
        "accelerator", "sm", "budget_bytes", "n_ctx", "n_seq", "kv", "n_slots", "slot_bytes",
        "chunk_tok", "pass_tok", "logit_rows", "graph_reserve_bytes", "map_bytes_per_gib",
        "per_tier_residency", "kv_far_on_cpu", NULL};
    int accelerator = 0, per_tier_residency = 0, far_on_cpu = 0;
    ps_plan_spec *s = &a->spec;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!OO$OOpiO&O&O&sO&O&O&O&O&O&O&pp",
            (char **)names, state->model_type, &a->model, &a->tiers, &a->kinds, &a->shares,
            &a->kv_vram_tok, &accelerator, &s->sm, py_to_u64, &s->budget_bytes, py_to_u32,
            &s->n_ctx, py_to_u32, &s->n_seq, &a->kv, py_to_u32, &s->n_slots, py_to_u64,
            &s->slot_bytes, py_to_u32, &s->chunk_tok, py_to_u32, &s->pass_tok, py_to_u32,
            &s->logit_rows, py_to_u64, &s->graph_reserve_bytes, py_to_u64, &s->map_bytes_per_gib,
            &per_tier_residency, &far_on_cpu))
        return -1;
    s->per_tier_residency = per_tier_residency != 0;
    s->kv_far_side = far_on_cpu ? PS_SIDE_HOST : PS_SIDE_DEV;
    s->accelerator = accelerator != 0;
    if (parse_kv(a, state) < 0 || parse_tiers(a) < 0) return -1;
    return parse_places(a, state);
}

static PyObject *plan_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    py_state *state = py_state_of_type(type);
    plan_args a = {0};
    plan *self = NULL;
    ps_err err = {0};
    ps_status status = PS_OK;
    if (state == NULL || parse(args, kwargs, state, &a) < 0) goto done;
    self = (plan *)type->tp_alloc(type, 0);
    if (self == NULL) goto done;
    Py_BEGIN_ALLOW_THREADS;
    status = ps_plan_create(py_model_get(a.model), &a.spec, &self->core, &err);
    Py_END_ALLOW_THREADS;
    if (status == PS_OK) {
        self->model = Py_NewRef(a.model);
    } else {
        Py_CLEAR(self);
        py_raise(state, &err);
    }
done:
    ps_free(a.places);
    return (PyObject *)self;
}

/* ---- lowering ---- */

typedef struct lowered {
    ps_ticks *ticks; /* owns */
    char *text;      /* owns */
} lowered;

/* Without the GIL. `text` NULL: checked instead of printed. */
static ps_status lower(
    const ps_plan *core, const ps_pass_shape *shape, bool want_text, lowered *out, ps_err *err)
{
    ps_status status = ps_lower(core, shape, &out->ticks, err);
    if (status != PS_OK) return status;
    if (!want_text) return ps_ticks_check(out->ticks, err);
    uint64_t n = ps_ticks_print(out->ticks, NULL, 0);
    out->text = ps_alloc(n + 1, 1);
    if (out->text == NULL) return ps_fail(err, PS_ENOMEM, "no host memory for a plan's text");
    ps_ticks_print(out->ticks, out->text, n + 1);
    return PS_OK;
}

static PyObject *lower_call(PyObject *self, PyObject *args, PyObject *kwargs, bool want_text)
{
    static const char *const names[] = {"n_tok", "n_out", "max_kv", "held", NULL};
    const ps_plan *core = py_plan_get(self);
    py_state *state = py_state_of(self);
    ps_pass_shape shape = {.n_out = 1};
    int held = PY_HELD_ALL;
    if (state == NULL ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, "O&|O&O&i", (char **)names, py_to_u32,
            &shape.n_tok, py_to_u32, &shape.n_out, py_to_u32, &shape.max_kv, &held))
        return NULL;
    if (shape.max_kv == 0) shape.max_kv = core->max_pages * PS_KV_PAGE_TOK;
    if (shape.n_tok == 0 || shape.n_tok > core->spec.pass_tok || shape.n_out > shape.n_tok ||
        shape.max_kv > core->max_pages * PS_KV_PAGE_TOK) {
        PyErr_SetString(PyExc_ValueError, "this plan has no such pass");
        return NULL;
    }
    shape.tier = ps_plan_tier(core, shape.n_tok);
    if (py_plan_find(core, held, &shape) < 0) return NULL;
    ps_err err = {0};
    ps_status status;
    lowered out = {0};
    Py_BEGIN_ALLOW_THREADS;
    status = lower(core, &shape, want_text, &out, &err);
    Py_END_ALLOW_THREADS;
    PyObject *result = NULL;
    if (status != PS_OK)
        py_raise(state, &err);
    else if (want_text)
        result = py_text(out.text, strlen(out.text));
    else
        result = PyLong_FromUnsignedLong(out.ticks->n_ticks);
    ps_free(out.text);
    ps_ticks_destroy(out.ticks);
    return result;
}

PyDoc_STRVAR(lower_doc,
    "lower(n_tok, n_out=1, max_kv=n_ctx, held=-1) -> str\n\nThe ticks of such a pass, one a "
    "line; where VRAM holds that residency before it (-1: what the pass wants).");

static PyObject *plan_lower(PyObject *self, PyObject *args, PyObject *kwargs)
{
    return lower_call(self, args, kwargs, true);
}

PyDoc_STRVAR(check_doc, "check(n_tok, n_out=1, max_kv=n_ctx, held=-1) -> int\n\nLower such a pass, "
                        "prove it free of races and "
                        "return its number of ticks.");

static PyObject *plan_check(PyObject *self, PyObject *args, PyObject *kwargs)
{
    return lower_call(self, args, kwargs, false);
}

PyDoc_STRVAR(ticks_doc,
    "ticks(n_tok, n_out=1, max_kv=n_ctx, first=0, held=-1) -> array\n\nThe ticks of such a pass "
    "behind "
    "`first` others, as the executor runs them: kind, stream, op and fmt (see tick_names), unit, "
    "and what there is to do.");

PyDoc_STRVAR(walk_doc,
    "walk(n_tok, n_out, max_kv, first, price, held=-1, sources=...) -> dict\n\nHow long the pass "
    "of ticks() "
    "takes if each "
    "tick takes as many nanoseconds (an array of uint64) as price(ticks, None) says. It is then "
    "asked price(ticks, span), by what that walk found, until it returns None. sources: an "
    "engine's;\nelse as where all host memory is page-locked.");

PyDoc_STRVAR(held_after_doc,
    "held_after(held, n_tok) -> int\n\nThe residency that VRAM holds behind a pass of so many "
    "tokens, where it held this one before; 0 from open on, n_residencies behind a pass that "
    "failed while it brought residents in.");

static PyObject *plan_held_after(PyObject *self, PyObject *args)
{
    const ps_plan *core = py_plan_get(self);
    ps_pass_shape shape = {0};
    ps_residency held = 0;
    if (!PyArg_ParseTuple(args, "O&O&", py_to_u32, &held, py_to_u32, &shape.n_tok)) return NULL;
    shape.tier = ps_plan_tier(core, shape.n_tok);
    if (py_plan_find(core, (int)ps_min_u64(held, INT_MAX), &shape) < 0) return NULL;
    return PyLong_FromUnsignedLong(ps_plan_held_after(core, held, shape.tier));
}

PyDoc_STRVAR(kv_bucket_doc, "kv_bucket(n_tok, max_kv) -> int\n\nThe number of keys that a pass of "
                            "so many tokens is lowered "
                            "for when there are max_kv of them: so that it serves others too.");

static PyObject *plan_kv_bucket(PyObject *self, PyObject *args)
{
    uint32_t n_tok = 0, max_kv = 0;
    if (!PyArg_ParseTuple(args, "O&O&", py_to_u32, &n_tok, py_to_u32, &max_kv)) return NULL;
    return PyLong_FromUnsignedLong(ps_pass_kv_bucket(py_plan_get(self), n_tok, max_kv));
}

/* The number of an object in a list of few, the last one asked for first; it is appended if it is
 * not there. -1 with an exception set. */
static Py_ssize_t number_in(PyObject *found, PyObject *object, Py_ssize_t last)
{
    Py_ssize_t n = PyList_GET_SIZE(found);
    if (last < n && PyList_GET_ITEM(found, last) == object) return last;
    for (Py_ssize_t i = 0; i < n; i++)
        if (PyList_GET_ITEM(found, i) == object) return i;
    return PyList_Append(found, object) < 0 ? -1 : n;
}

static PyObject *plan_distinct(PyObject *unused, PyObject *args)
{
    (void)unused;
    PyObject *mapping = NULL, *names = NULL;
    if (!PyArg_ParseTuple(args, "OO!", &mapping, &PyTuple_Type, &names)) return NULL;
    npy_intp n = PyTuple_GET_SIZE(names);
    PyObject *found = PyList_New(0), *numbers = PyArray_SimpleNew(1, &n, NPY_INTP);
    Py_ssize_t number = found != NULL && numbers != NULL ? 0 : -1;
    for (npy_intp i = 0; i < n && number >= 0; i++) {
        PyObject *value = PyObject_GetItem(mapping, PyTuple_GET_ITEM(names, i));
        number = value != NULL ? number_in(found, value, number) : -1;
        Py_XDECREF(value);
        if (number >= 0) *(npy_intp *)PyArray_GETPTR1((PyArrayObject *)numbers, i) = number;
    }
    if (number >= 0) return Py_BuildValue("(NN)", found, numbers);
    Py_XDECREF(found);
    Py_XDECREF(numbers);
    return NULL;
}

PyDoc_STRVAR(distinct_doc,
    "distinct(mapping, names) -> (list, array)\n\nThe objects that a mapping holds under these "
    "names, each once, and for each name the number of\nits own there.");

PyDoc_STRVAR(tick_names_doc,
    "tick_names() -> tuple\n\nNames by number of a tick's kinds, streams, ops and formats.");

/* ---- what it says ---- */

static PyObject *plan_model(PyObject *self, void *unused)
{
    (void)unused;
    return Py_NewRef(py_plan_model(self));
}

static PyObject *plan_needed_bytes(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(py_plan_get(self)->needed_bytes);
}

static PyObject *plan_locked_bytes(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(py_plan_get(self)->locked_bytes);
}

static PyObject *plan_budget_bytes(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(py_plan_get(self)->spec.budget_bytes);
}

static PyObject *plan_bytes_by_kind(PyObject *self, void *unused)
{
    (void)unused;
    const ps_plan *p = py_plan_get(self);
    PyObject *dict = PyDict_New();
    for (int k = 0; dict != NULL && k < PS_MEM_KIND_COUNT; k++)
        if (py_dict_take(dict, ps_mem_kind_name((ps_mem_kind)k),
                PyLong_FromUnsignedLongLong(p->bytes_by_kind[k])) < 0)
            Py_CLEAR(dict);
    return dict;
}

static PyObject *plan_space_bytes(PyObject *self, void *unused)
{
    (void)unused;
    const ps_plan *p = py_plan_get(self);
    PyObject *dict = PyDict_New();
    for (int k = PS_SPACE_NONE + 1; dict != NULL && k < PS_SPACE_COUNT; k++)
        if (py_dict_take(dict, ps_space_name((ps_space)k),
                PyLong_FromUnsignedLongLong(p->space_bytes[k])) < 0)
            Py_CLEAR(dict);
    return dict;
}

static PyObject *plan_homes(PyObject *self, void *unused)
{
    (void)unused;
    const ps_plan *p = py_plan_get(self);
    uint32_t n_units = py_model_get(py_plan_model(self))->n_units;
    PyObject *list = PyList_New(n_units);
    for (uint32_t i = 0; list != NULL && i < n_units; i++) {
        const ps_unit *u = &p->model->units[i];
        uint64_t at = ps_plan_resident_at(p, 0, i);
        bool host = p->homes[i].host;
        for (uint32_t j = u->first_part + 1; j < u->first_part + u->n_parts; j++) {
            at = ps_min_u64(at, ps_plan_resident_at(p, 0, j));
            host = host || p->homes[j].host;
        }
        PyObject *home = Py_BuildValue("(NN)",
            at != UINT64_MAX ? PyLong_FromUnsignedLongLong(at) : Py_NewRef(Py_None),
            PyBool_FromLong(host));
        if (home == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, home);
    }
    return list;
}

static PyObject *plan_n_residencies(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLong(py_plan_get(self)->n_residencies);
}

static PyObject *plan_sizes(PyObject *self, void *unused)
{
    (void)unused;
    const ps_plan_spec *s = &py_plan_get(self)->spec;
    return Py_BuildValue("(III)", s->chunk_tok, s->pass_tok, s->logit_rows);
}

static PyObject *plan_uses(PyObject *self, void *unused)
{
    (void)unused;
    const bool *uses = py_plan_get(self)->uses;
    return Py_BuildValue(
        "(NN)", PyBool_FromLong(uses[PS_SIDE_DEV]), PyBool_FromLong(uses[PS_SIDE_HOST]));
}

/* ---- the type ---- */

static int plan_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(py_plan_model(self));
    return 0;
}

/* No tp_clear: the plan must not outlive its model, and the model cannot refer back. */
static void plan_dealloc(PyObject *self)
{
    plan *p = (plan *)self;
    PyObject_GC_UnTrack(self);
    ps_plan_destroy(p->core);
    Py_XDECREF(p->model);
    py_free_object(self);
}

static PyMethodDef METHODS[] = {
    {"lower", (PyCFunction)(void (*)(void))plan_lower, METH_VARARGS | METH_KEYWORDS, lower_doc},
    {"check", (PyCFunction)(void (*)(void))plan_check, METH_VARARGS | METH_KEYWORDS, check_doc},
    {"ticks", (PyCFunction)(void (*)(void))py_plan_ticks, METH_VARARGS | METH_KEYWORDS, ticks_doc},
    {"walk", (PyCFunction)(void (*)(void))py_plan_walk, METH_VARARGS | METH_KEYWORDS, walk_doc},
    {"held_after", plan_held_after, METH_VARARGS, held_after_doc},
    {"kv_bucket", plan_kv_bucket, METH_VARARGS, kv_bucket_doc},
    {"distinct", plan_distinct, METH_VARARGS | METH_STATIC, distinct_doc},
    {"tick_names", py_plan_tick_names, METH_NOARGS | METH_STATIC, tick_names_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef GETTERS[] = {
    {"model", plan_model, NULL, "_core.Model", NULL},
    {"needed_bytes", plan_needed_bytes, NULL, "of VRAM, everything counted", NULL},
    {"budget_bytes", plan_budget_bytes, NULL, "of VRAM", NULL},
    {"bytes_by_kind", plan_bytes_by_kind, NULL, "of VRAM; sums to needed_bytes", NULL},
    {"locked_bytes", plan_locked_bytes, NULL,
        "of host memory: what an engine without limits page-locks at most", NULL},
    {"space_bytes", plan_space_bytes, NULL, "of each memory space, host ones too", NULL},
    {"homes", plan_homes, NULL,
        "(offset in VRAM or None, needs host memory) of each unit, of what a split one has there; "
        "in "
        "the first tier",
        NULL},
    {"n_residencies", plan_n_residencies, NULL, "sets of residents that tiers have", NULL},
    {"sizes", plan_sizes, NULL, "(chunk_tok, pass_tok, logit_rows)", NULL},
    {"uses", plan_uses, NULL, "whether anything computes on (device, CPU)", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(plan_doc,
    "Plan(model, tiers, kinds, *, shares, kv_vram_tok, accelerator, sm, budget_bytes, n_ctx, "
    "n_seq,\n     kv, n_slots, slot_bytes, chunk_tok, pass_tok, logit_rows, graph_reserve_bytes, "
    "map_bytes_per_gib,\n     per_tier_residency, kv_far_on_cpu)\n"
    "\nkinds: uint8 [tiers][units], 0 cpu, 1 vram, 2 stream, 3 split; shares: float32 "
    "[tiers][units][2]\nor None. PlanError where a rule is broken, BudgetError where it does not "
    "fit.");

static PyType_Slot SLOTS[] = {
    {Py_tp_doc, (void *)plan_doc},
    {Py_tp_new, (void *)plan_new},
    {Py_tp_dealloc, (void *)plan_dealloc},
    {Py_tp_traverse, (void *)plan_traverse},
    {Py_tp_methods, METHODS},
    {Py_tp_getset, GETTERS},
    {0, NULL},
};

static PyType_Spec SPEC = {
    .name = "pipeshard._core.Plan",
    .basicsize = sizeof(plan),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = SLOTS,
};

int py_plan_register(PyObject *module, py_state *state)
{
    return py_add_type(module, &SPEC, &state->plan_type);
}
