/* py_memory - methods of _core.Engine that py_engine.c lists and py_memory.c has. */
#ifndef PY_MEMORY_H
#define PY_MEMORY_H

#include "binding/py_util.h"

extern const char py_stats_doc[];
PyObject *py_engine_stats(PyObject *self, PyObject *unused);

extern const char py_sources_doc[];
PyObject *py_engine_sources(PyObject *self, PyObject *unused);

#endif
