/* py_ticks - methods of _core.Plan that py_plan.c lists and py_ticks.c has. */
#ifndef PY_TICKS_H
#define PY_TICKS_H

#include "binding/py_util.h"

PyObject *py_plan_ticks(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *py_plan_walk(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *py_plan_tick_names(PyObject *self, PyObject *unused);

#endif
