/* py_util - see py_util.h. The table below is the only place that knows which exception a status
 * becomes. */
#include "binding/py_util.h"

#include <string.h>

/* How a keyword of the exception's constructor is made from a ps_err. */
typedef enum keyword_kind {
    KW_NONE, /* ends the list */
    KW_TEXT, /* char[]: "" becomes None */
    KW_LIST, /* char[] with items separated by ", ": a tuple of strings */
    KW_U64,
    KW_ERRNO, /* int: 0 becomes None */
    KW_TRUE,  /* the constant */
} keyword_kind;

typedef struct keyword {
    const char *name;
    keyword_kind kind;
    size_t offset; /* of the ps_err field */
} keyword;

typedef struct error_class {
    ps_status status;
    const char *name; /* in pipeshard.errors */
    keyword keywords[4];
} error_class;

#define KEYWORD(name, kind, field)                                                                 \
    {                                                                                              \
        name, kind, offsetof(ps_err, field)                                                        \
    }

static const error_class ERROR_CLASSES[] = {
    {PS_ENOMEM, "HostMemoryError", {{0}}},
    {PS_EFILE, "FileError",
        {KEYWORD("path", KW_TEXT, extra), KEYWORD("errno", KW_ERRNO, os_errno)}},
    {PS_EFORMAT, "FormatError",
        {KEYWORD("path", KW_TEXT, extra), KEYWORD("field", KW_TEXT, field),
            KEYWORD("offset", KW_U64, offset)}},
    {PS_EUNSUPPORTED, "UnsupportedError",
        {KEYWORD("what", KW_TEXT, field), KEYWORD("supported", KW_LIST, extra)}},
    {PS_EREQUEST, "RequestError", {KEYWORD("argument", KW_TEXT, field)}},
    {PS_EBUDGET, "BudgetError",
        {KEYWORD("needed", KW_U64, needed), KEYWORD("budget", KW_U64, budget),
            KEYWORD("smallest", KW_U64, smallest)}},
    {PS_EPLAN, "PlanError", {KEYWORD("unit", KW_TEXT, field), KEYWORD("tier", KW_TEXT, extra)}},
    {PS_EDEVICE, "DeviceError", {{0}}},
    {PS_EFATAL, "DeviceError", {{"fatal", KW_TRUE, 0}}},
    {PS_EBUSY, "BusyError", {{0}}},
    {PS_ECLOSED, "ClosedError", {{0}}},
    {PS_EINTERNAL, "PipeshardError", {{0}}},
};

py_state *py_state_of(PyObject *self)
{
    PyObject *module = PyType_GetModuleByDef(Py_TYPE(self), &py_module_def);
    return module != NULL ? PyModule_GetState(module) : NULL;
}

py_state *py_state_of_type(PyTypeObject *type)
{
    PyObject *module = PyType_GetModuleByDef(type, &py_module_def);
    return module != NULL ? PyModule_GetState(module) : NULL;
}

/* ---- conversions ---- */

/* Names inside a message may come from a hostile file, so they need not be UTF-8. */
PyObject *py_text(const char *s, size_t n)
{
    return PyUnicode_DecodeUTF8(s, (Py_ssize_t)n, "replace");
}

int py_to_u64(PyObject *object, void *out)
{
    PyObject *number = PyNumber_Index(object);
    if (number == NULL) return 0;
    uint64_t value = PyLong_AsUnsignedLongLong(number);
    Py_DECREF(number);
    if (value == UINT64_MAX && PyErr_Occurred()) return 0;
    *(uint64_t *)out = value;
    return 1;
}

int py_to_u32(PyObject *object, void *out)
{
    uint64_t value = 0;
    if (!py_to_u64(object, &value)) return 0;
    if (value > UINT32_MAX) {
        PyErr_SetString(PyExc_OverflowError, "the number does not fit into 32 bits");
        return 0;
    }
    *(uint32_t *)out = (uint32_t)value;
    return 1;
}

int py_dict_take(PyObject *dict, const char *key, PyObject *value)
{
    int status = value != NULL ? PyDict_SetItemString(dict, key, value) : -1;
    Py_XDECREF(value);
    return status;
}

/* ---- types ---- */

int py_add_type(PyObject *module, PyType_Spec *spec, PyTypeObject **out)
{
    *out = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    return *out != NULL ? PyModule_AddType(module, *out) : -1;
}

void py_free_object(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    type->tp_free(self);
    Py_DECREF(type);
}

/* ---- errors ---- */

static PyObject *tuple_of(const char *items)
{
    PyObject *list = PyList_New(0);
    while (list != NULL && *items != '\0') {
        const char *end = strstr(items, ", ");
        size_t n = end != NULL ? (size_t)(end - items) : strlen(items);
        PyObject *item = py_text(items, n);
        if (item == NULL || PyList_Append(list, item) < 0) Py_CLEAR(list);
        Py_XDECREF(item);
        items += n + (end != NULL ? 2 : 0);
    }
    PyObject *tuple = list != NULL ? PyList_AsTuple(list) : NULL;
    Py_XDECREF(list);
    return tuple;
}

static PyObject *keyword_value(const keyword *kw, const ps_err *err)
{
    const void *field = (const char *)err + kw->offset;
    const char *text = field;
    uint64_t number = 0;
    int code = 0;
    switch (kw->kind) {
    case KW_TEXT: return *text != '\0' ? py_text(text, strlen(text)) : Py_NewRef(Py_None);
    case KW_LIST: return tuple_of(text);
    case KW_U64: memcpy(&number, field, sizeof number); return PyLong_FromUnsignedLongLong(number);
    case KW_ERRNO:
        memcpy(&code, field, sizeof code);
        return code != 0 ? PyLong_FromLong(code) : Py_NewRef(Py_None);
    case KW_TRUE: return Py_NewRef(Py_True);
    case KW_NONE: break;
    }
    return Py_NewRef(Py_None);
}

static PyObject *keywords_of(const error_class *class, const ps_err *err)
{
    PyObject *kwargs = PyDict_New();
    for (size_t i = 0; kwargs != NULL && i < Py_ARRAY_LENGTH(class->keywords); i++) {
        const keyword *kw = &class->keywords[i];
        if (kw->kind == KW_NONE) break;
        PyObject *value = keyword_value(kw, err);
        if (value == NULL || PyDict_SetItemString(kwargs, kw->name, value) < 0) Py_CLEAR(kwargs);
        Py_XDECREF(value);
    }
    return kwargs;
}

PyObject *py_raise(const py_state *state, const ps_err *err)
{
    if (PyErr_Occurred()) return NULL; /* raised by a signal handler or callback: the first cause */
    if (err->status == PS_ECANCELLED) {
        if (PyErr_CheckSignals() == 0) PyErr_SetNone(PyExc_KeyboardInterrupt);
        return NULL;
    }
    const error_class *class = &ERROR_CLASSES[Py_ARRAY_LENGTH(ERROR_CLASSES) - 1];
    for (size_t i = 0; i < Py_ARRAY_LENGTH(ERROR_CLASSES); i++)
        if (ERROR_CLASSES[i].status == err->status) class = &ERROR_CLASSES[i];

    const char *message = err->message[0] != '\0' ? err->message : ps_status_name(err->status);
    PyObject *args = NULL, *kwargs = NULL, *exception = NULL;
    PyObject *type = PyObject_GetAttrString(state->errors, class->name);
    if (type == NULL) goto done;
    args = Py_BuildValue("(N)", py_text(message, strlen(message)));
    if (args == NULL) goto done;
    kwargs = keywords_of(class, err);
    if (kwargs == NULL) goto done;
    exception = PyObject_Call(type, args, kwargs);
    if (exception != NULL) PyErr_SetObject(type, exception);
done:
    Py_XDECREF(type);
    Py_XDECREF(args);
    Py_XDECREF(kwargs);
    Py_XDECREF(exception);
    return NULL;
}
