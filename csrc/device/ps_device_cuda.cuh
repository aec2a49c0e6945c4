/* ps_device_cuda - what the two files of the CUDA device share: its state, how CUDA's errors become
 * ours, and how its context is made current for the duration of a call.
 *
 * Not here: anything for other folders.
 * Threads: the engine's thread.
 */
#ifndef PS_DEVICE_CUDA_CUH
#define PS_DEVICE_CUDA_CUH

#include "device/ps_device_priv.h"

#include "device/ps_cublas.h"

#include <cuda_runtime.h>

typedef struct ps_cuda_driver {
    int (*device_get)(int *device, int i_device);
    int (*primary_state)(int device, unsigned *flags, int *active);
    int (*ctx_get)(void **context);
    int (*ctx_set)(void *context);
    int (*ctx_push)(void *context);
    int (*ctx_pop)(void **context);
} ps_cuda_driver;

typedef struct ps_cuda_device {
    ps_device_base base; /* first */
    ps_cuda_driver driver;
    void *context;           /* borrows: the primary context of this process */
    ps_cublas *cublas;       /* owns; NULL: not found */
    uint32_t *h_abort;       /* owns: page-locked */
    const uint32_t *d_abort; /* the same word as kernels see it */
    cudaStream_t service;    /* owns: for what belongs to none of the user's streams */
    cudaEvent_t epoch;       /* owns: zero of stream times */
    cudaEvent_t tie[2];      /* own: tie[0] is the event that times of marks are measured from */
    uint64_t tie_ns;         /* when tie[0] happened, on the clock of the CPU streams */
    bool same_address;       /* kernels see registered host memory at its host address */
} ps_cuda_device;

static inline ps_cuda_device *ps_cuda_of(ps_device *d)
{
    return (ps_cuda_device *)d;
}

/* ---- errors ---- */

/* Errors after which nothing works in this context any more. */
static inline bool ps_cuda_is_sticky(cudaError_t rc)
{
    switch (rc) {
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
    case cudaErrorContained:
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorContextIsDestroyed:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
    case cudaErrorTensorMemoryLeak:
    case cudaErrorMpsClientTerminated:
    case cudaErrorExternalDevice:
    case cudaErrorUnknown: return true;
    default: return false;
    }
}

static inline ps_status ps_cuda_status(cudaError_t rc)
{
    if (rc == cudaSuccess) return PS_OK;
    if (ps_cuda_is_sticky(rc)) return PS_EFATAL;
    /* Rules of capture that we broke. */
    if (rc >= cudaErrorStreamCaptureUnsupported && rc <= cudaErrorStreamCaptureWrongThread)
        return PS_EINTERNAL;
    return PS_EDEVICE;
}

/* Also takes the error out of the runtime, or it would be found again behind the next launch. */
static inline ps_status ps_cuda_check(cudaError_t rc, const char *what, ps_err *err)
{
    if (rc == cudaSuccess) return PS_OK;
    cudaGetLastError();
    return ps_fail(err, ps_cuda_status(rc), "%s failed: %s (%s)", what, cudaGetErrorString(rc),
        cudaGetErrorName(rc));
}

/* Makes our context current; false if it was, or cannot be. */
static inline bool ps_cuda_enter(const ps_cuda_device *c)
{
    void *current = NULL;
    if (c->driver.ctx_get(&current) == 0 && current == c->context) return false;
    return c->driver.ctx_push(c->context) == 0;
}

static inline void ps_cuda_leave(const ps_cuda_device *c, bool entered)
{
    void *popped = NULL;
    if (entered) c->driver.ctx_pop(&popped);
}

extern "C" const ps_device_vtable ps_device_cuda_vtable; /* ps_device_cuda.cu */
/* ps_device_cuda_open.cu */
extern "C" void ps_device_cuda_close(ps_device *d);
/* A function of the driver by its name, for *out_fn to hold; false where it has none. */
bool ps_cuda_find_driver_call(const char *name, void *out_fn);

#endif
