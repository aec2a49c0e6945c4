/* py_trace - methods of _core.Engine that py_engine.c lists and py_trace.c has. */
#ifndef PY_TRACE_H
#define PY_TRACE_H

#include "binding/py_util.h"

extern const char py_trace_start_doc[], py_trace_stop_doc[], py_trace_read_doc[];
PyObject *py_engine_trace_start(PyObject *self, PyObject *arg);
PyObject *py_engine_trace_stop(PyObject *self, PyObject *unused);
PyObject *py_engine_trace_read(PyObject *self, PyObject *arg);

#endif
