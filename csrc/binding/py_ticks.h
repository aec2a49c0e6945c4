/* py_ticks - methods of _core.Plan that py_plan.c lists and py_ticks.c has. */
#ifndef PY_TICKS_H
#define PY_TICKS_H

#include "binding/py_util.h"
#include "engine/ps_ticks.h"

enum { PY_HELD_ALL = -1 }; /* `held` of a pass that finds all that it wants */
/* Sets what the pass finds where VRAM holds that residency; -1 with an exception where the plan has
 * none of that number. */
int py_plan_find(const ps_plan *core, int held, ps_pass_shape *shape);

PyObject *py_plan_ticks(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *py_plan_walk(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *py_plan_tick_names(PyObject *self, PyObject *unused);

#endif
