/* py_memory - _core.Engine's methods about memory and traffic.
 *
 * Not here: the type (py_engine.c).
 * Threads: the GIL, between passes.
 */
#include "binding/py_memory.h"

static int add_u64(PyObject *dict, const char *key, uint64_t value)
{
    return py_dict_take(dict, key, PyLong_FromUnsignedLongLong(value));
}

/* None: nothing is on disk. */
static int add_direct(PyObject *dict, ps_disk_direct direct)
{
    PyObject *const values[] = {Py_None, Py_False, Py_True};
    return PyDict_SetItemString(dict, "disk_direct", values[direct]);
}

const char py_stats_doc[] =
    PyDoc_STR("stats() -> dict\n\nMemory now and at its peak, bytes moved, passes run.");

PyObject *py_engine_stats(PyObject *self, PyObject *unused)
{
    const ps_exec *x = py_engine_exec(self);
    (void)unused;
    if (x == NULL) return NULL;
    const ps_exec_stats s = ps_exec_get_stats(x);
    const ps_arena *arena = ps_exec_arena(x);
    PyObject *dict = PyDict_New(), *kinds = PyDict_New();
    uint64_t held = 0;
    bool failed = dict == NULL || kinds == NULL;
    for (int k = 0; k < PS_MEM_KIND_COUNT && !failed; k++)
        failed = add_u64(kinds, ps_mem_kind_name((ps_mem_kind)k), arena->peak[k]) < 0;
    for (int k = 0; k < PS_MEM_KIND_COUNT; k++) held += arena->used[k];
    failed = failed || add_u64(dict, "vram_bytes", held) < 0 ||
             add_u64(dict, "peak_bytes", arena->peak_total) < 0 ||
             add_u64(dict, "h2d_bytes", s.h2d_bytes) < 0 ||
             add_u64(dict, "d2h_bytes", s.d2h_bytes) < 0 ||
             add_u64(dict, "locked_bytes", s.locked_bytes) < 0 ||
             add_u64(dict, "ram_bytes", s.ram_bytes) < 0 ||
             add_u64(dict, "bounce_bytes", s.bounce_bytes) < 0 ||
             add_u64(dict, "disk_bytes", s.disk_bytes) < 0 || add_direct(dict, s.disk_direct) < 0 ||
             add_u64(dict, "n_passes", s.n_passes) < 0 ||
             add_u64(dict, "n_graph_launches", s.n_graph_launches) < 0 ||
             add_u64(dict, "busy_ns", s.busy_ns) < 0 ||
             PyDict_SetItemString(dict, "peak_bytes_by_kind", kinds) < 0;
    Py_XDECREF(kinds);
    if (failed) Py_CLEAR(dict);
    return dict;
}

const char py_sources_doc[] =
    PyDoc_STR("sources() -> (bytes, int)\n\nWhere copies of each unit come from: 0 page-locked "
              "memory, or no copies; 1 other memory, 2 disk, both through\nthe bounce ring, in "
              "copies of at most so many bytes.");

PyObject *py_engine_sources(PyObject *self, PyObject *unused)
{
    const ps_exec *x = py_engine_exec(self);
    (void)unused;
    if (x == NULL) return NULL;
    const ps_model *m = ps_exec_plan(x)->model;
    PyObject *sources = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)m->n_units);
    if (sources == NULL) return NULL;
    uint64_t piece_bytes = ps_exec_sources(x, (uint8_t *)PyBytes_AS_STRING(sources));
    return Py_BuildValue("(NK)", sources, (unsigned long long)piece_bytes);
}
