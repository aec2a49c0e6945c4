/* ps_cublas - see ps_cublas.h.
 *
 * Not here: anything that calls cuBLAS beyond making the handle.
 * Threads: the engine's thread.
 */
#include "device/ps_cublas.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

/* Never unloaded: CUDA code that disappears from a running process takes others down with it, and
 * the next engine would load it again. */
enum { MAX_PATH = 1024, LOAD_FLAGS = RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE };

/* The folder of the file that this code was loaded from, without the last slash; "" where it cannot
 * be told. */
static void own_folder(char *out, size_t cap)
{
    Dl_info info;
    out[0] = '\0';
    if (dladdr((const void *)(uintptr_t)ps_cublas_open, &info) == 0 || info.dli_fname == NULL)
        return;
    const char *slash = strrchr(info.dli_fname, '/');
    if (slash != NULL) snprintf(out, cap, "%.*s", (int)(slash - info.dli_fname), info.dli_fname);
}

static void *load_from(const char *folder, int major)
{
    char path[MAX_PATH];
    if (folder == NULL) {
        snprintf(path, sizeof path, "libcublas.so.%d", major);
        return dlopen(path, LOAD_FLAGS);
    }
    /* cuBLAS needs its sibling, and outside of the loader's folders it may not find that itself.
     * Loaded by us, it is found by name. */
    snprintf(path, sizeof path, "%s/libcublasLt.so.%d", folder, major);
    if (dlopen(path, LOAD_FLAGS) == NULL) return NULL;
    snprintf(path, sizeof path, "%s/libcublas.so.%d", folder, major);
    return dlopen(path, LOAD_FLAGS);
}

static void *load_library(void)
{
    char own[MAX_PATH], pip13[MAX_PATH + 32], pip12[MAX_PATH + 32];
    own_folder(own, sizeof own);
    snprintf(pip13, sizeof pip13, "%s/../nvidia/cu13/lib", own);
    snprintf(pip12, sizeof pip12, "%s/../nvidia/cublas/lib", own);
    const struct {
        const char *folder;
        int major;
    } places[] = {{NULL, 13}, {pip13, 13}, {"/usr/local/cuda/lib64", 13}, {NULL, 12}, {pip12, 12},
        {"/usr/local/cuda/lib64", 12}};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        if (own[0] == '\0' && (places[i].folder == pip13 || places[i].folder == pip12)) continue;
        void *library = load_from(places[i].folder, places[i].major);
        if (library != NULL) return library;
    }
    return NULL;
}

/* Through memcpy, because C has no cast from an object pointer to a function pointer. */
static bool find(void *library, const char *name, void *out_fn)
{
    void *symbol = dlsym(library, name);
    memcpy(out_fn, &symbol, sizeof symbol);
    return symbol != NULL;
}

static bool find_all(ps_cublas *c)
{
    find(c->library, "cublasGemmGroupedBatchedEx", &c->gemm_grouped_batched_ex);
    return find(c->library, "cublasCreate_v2", &c->create) &&
           find(c->library, "cublasDestroy_v2", &c->destroy) &&
           find(c->library, "cublasGetVersion_v2", &c->get_version) &&
           find(c->library, "cublasSetStream_v2", &c->set_stream) &&
           find(c->library, "cublasSetWorkspace_v2", &c->set_workspace) &&
           find(c->library, "cublasSetMathMode", &c->set_math_mode) &&
           find(c->library, "cublasGemmEx", &c->gemm_ex) &&
           find(c->library, "cublasGemmStridedBatchedEx", &c->gemm_strided_batched_ex);
}

ps_status ps_cublas_open(ps_cublas **out, ps_err *err)
{
    *out = NULL;
    ps_cublas *c = ps_alloc(1, sizeof *c);
    if (c == NULL) return ps_fail(err, PS_ENOMEM, "no memory for the functions of cuBLAS");
    c->library = load_library();
    if (c->library == NULL || !find_all(c) || c->create(&c->handle) != 0) {
        ps_free(c);
        return PS_OK;
    }
    c->get_version(c->handle, &c->version);
    *out = c;
    return PS_OK;
}

void ps_cublas_close(ps_cublas *c)
{
    if (c == NULL) return;
    c->destroy(c->handle);
    ps_free(c);
}
