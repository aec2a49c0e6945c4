/* ps_device_cuda_open - finding, opening and closing CUDA devices: what is missing and what to
 * install, the primary context, the baseline, the library handle.
 *
 * Not here: what an open device does (ps_device_cuda.cu).
 * Threads: the engine's thread.
 */
#include "device/ps_device_cuda.cuh"

#include "device/ps_cuda_resident.cuh"

#include <stdio.h>
#include <string.h>

enum {
    MIN_SM = 75,
    ABORT_BYTES = 4096, /* a page of its own: the abort word is polled from both sides */
    DRIVER_API = 13000, /* whose entry points are asked for */
};

extern "C" void ps_device_cuda_close(ps_device *d)
{
    ps_cuda_device *c = ps_cuda_of(d);
    ps_device_release_all(&c->base);
    if (c->context != NULL) {
        bool entered = ps_cuda_enter(c);
        ps_cublas_close(c->cublas);
        if (c->epoch != NULL) cudaEventDestroy(c->epoch);
        for (int i = 0; i < 2; i++)
            if (c->tie[i] != NULL) cudaEventDestroy(c->tie[i]);
        if (c->service != NULL) cudaStreamDestroy(c->service);
        if (c->h_abort != NULL) cudaFreeHost(c->h_abort);
        cudaGetLastError();
        ps_cuda_leave(c, entered);
    }
    ps_hub_fini(&c->base.hub);
    ps_free(c);
}

/* How many devices there are; 0 with a sentence that says what to do. Creates no context. */
static int count_devices(char *why, size_t cap_why)
{
    int n = 0, driver = 0, runtime = 0;
    cudaError_t rc = cudaGetDeviceCount(&n);
    if (rc == cudaSuccess && n > 0) return n;
    cudaGetLastError();
    if (cap_why == 0) return 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
    cudaRuntimeGetVersion(&runtime);
    cudaGetLastError();
    if (driver == 0)
        snprintf(why, cap_why, "no NVIDIA driver was found; install driver 580 or newer");
    else if (rc == cudaErrorInsufficientDriver)
        snprintf(why, cap_why,
            "the NVIDIA driver serves CUDA %d.%d but %d.%d is needed; install driver 580 or newer",
            driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    else if (rc == cudaSuccess || rc == cudaErrorNoDevice)
        snprintf(why, cap_why,
            "there is an NVIDIA driver but no GPU that this process may use "
            "(CUDA_VISIBLE_DEVICES?)");
    else
        snprintf(why, cap_why, "the NVIDIA driver reports: %s (%s)", cudaGetErrorString(rc),
            cudaGetErrorName(rc));
    return 0;
}

extern "C" bool ps_device_cuda_available(char *why, size_t cap_why)
{
    return count_devices(why, cap_why) > 0;
}

bool ps_cuda_find_driver_call(const char *name, void *out_fn)
{
    void *fn = NULL;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    cudaError_t rc =
        cudaGetDriverEntryPointByVersion(name, &fn, DRIVER_API, cudaEnableDefault, &found);
    memcpy(out_fn, &fn, sizeof fn);
    return rc == cudaSuccess && found == cudaDriverEntryPointSuccess && fn != NULL;
}

static ps_status find_driver_calls(ps_cuda_driver *calls, ps_err *err)
{
    if (ps_cuda_find_driver_call("cuDeviceGet", &calls->device_get) &&
        ps_cuda_find_driver_call("cuDevicePrimaryCtxGetState", &calls->primary_state) &&
        ps_cuda_find_driver_call("cuCtxGetCurrent", &calls->ctx_get) &&
        ps_cuda_find_driver_call("cuCtxSetCurrent", &calls->ctx_set) &&
        ps_cuda_find_driver_call("cuCtxPushCurrent", &calls->ctx_push) &&
        ps_cuda_find_driver_call("cuCtxPopCurrent", &calls->ctx_pop))
        return PS_OK;
    cudaGetLastError();
    return ps_fail(err, PS_EDEVICE,
        "the NVIDIA driver lacks a function that every driver since 580 has; reinstall it");
}

static ps_status read_info(int i_device, ps_device_info *info, bool *same_address, ps_err *err)
{
    cudaDeviceProp prop;
    ps_status status = ps_cuda_check(
        cudaGetDeviceProperties(&prop, i_device), "asking for the GPU's properties", err);
    if (status != PS_OK) return status;
    info->kind = PS_DEVICE_CUDA;
    snprintf(info->name, sizeof info->name, "%.127s", prop.name);
    info->sm = prop.major * 10 + prop.minor;
    info->n_sm = prop.multiProcessorCount;
    info->vram_total_bytes = prop.totalGlobalMem;
    *same_address = prop.unifiedAddressing != 0 && prop.canUseHostPointerForRegisteredMem != 0;
    if (info->sm < MIN_SM)
        return ps_fail(err, PS_EDEVICE,
            "%s has compute capability %d.%d; 7.5 (Turing) or newer is needed", info->name,
            prop.major, prop.minor);
    if (!prop.canMapHostMemory || !prop.unifiedAddressing)
        return ps_fail(err, PS_EDEVICE, "%s cannot read page-locked host memory", info->name);
    return PS_OK;
}

/* Finds the primary context and leaves the thread's current one as it was. */
static ps_status open_context(ps_cuda_device *c, int i_device, bool *was_active, ps_err *err)
{
    int device = 0, active = 0;
    unsigned flags = 0;
    void *before = NULL;
    *was_active = c->driver.device_get(&device, i_device) == 0 &&
                  c->driver.primary_state(device, &flags, &active) == 0 && active != 0;
    if (c->driver.ctx_get(&before) != 0) before = NULL;
    cudaError_t rc = cudaSetDevice(i_device);
    if (rc == cudaSuccess) rc = cudaFree(NULL); /* makes the runtime finish what it puts off */
    if (rc == cudaSuccess && c->driver.ctx_get(&c->context) != 0) c->context = NULL;
    c->driver.ctx_set(before);
    ps_status status = ps_cuda_check(rc, "opening a context on the GPU", err);
    if (status == PS_OK && c->context == NULL)
        status = ps_fail(err, PS_EDEVICE, "the GPU gave no context");
    return status;
}

static ps_status make_abort_word(ps_cuda_device *c, ps_err *err)
{
    void *device_side = NULL;
    cudaError_t rc = cudaHostAlloc(
        (void **)&c->h_abort, ABORT_BYTES, cudaHostAllocPortable | cudaHostAllocMapped);
    if (rc == cudaSuccess) rc = cudaHostGetDevicePointer(&device_side, c->h_abort, 0);
    ps_status status = ps_cuda_check(rc, "allocating the abort word", err);
    if (status != PS_OK) return status;
    memset(c->h_abort, 0, ABORT_BYTES);
    c->d_abort = (const uint32_t *)device_side;
    c->base.hub.abort_word = c->h_abort;
    return PS_OK;
}

static ps_status make_epoch(ps_cuda_device *c, ps_err *err)
{
    cudaError_t rc = cudaEventCreateWithFlags(&c->epoch, cudaEventDefault);
    if (rc == cudaSuccess) rc = cudaStreamCreateWithFlags(&c->service, cudaStreamNonBlocking);
    for (int i = 0; i < 2 && rc == cudaSuccess; i++)
        rc = cudaEventCreateWithFlags(&c->tie[i], cudaEventDefault);
    if (rc == cudaSuccess) rc = cudaEventRecord(c->epoch, c->service);
    if (rc == cudaSuccess) rc = cudaEventRecord(c->tie[0], c->service);
    if (rc == cudaSuccess) rc = cudaStreamSynchronize(c->service);
    return ps_cuda_check(rc, "starting the device's clock", err);
}

/* With the context current. The baseline is what this opening took: everything in use on the card
 * afterwards, less what was in use before. Before its first context a process cannot ask, so then
 * it is everything in use: exact on a card that nobody else uses, too large by what others hold
 * where somebody does. */
static ps_status fill(ps_cuda_device *c, bool was_active, ps_err *err)
{
    ps_device_info *info = &c->base.device.info;
    size_t n_free = 0, n_total = 0, n_used_before = 0;
    ps_status status = PS_OK;
    if (was_active) {
        status =
            ps_cuda_check(cudaMemGetInfo(&n_free, &n_total), "asking for free device memory", err);
        n_used_before = n_total - n_free;
    }
    if (status == PS_OK) status = ps_cuda_load_all(err);
    if (status == PS_OK) status = make_abort_word(c, err);
    if (status == PS_OK) status = make_epoch(c, err);
    if (status == PS_OK) status = ps_hub_init(&c->base.hub, err);
    if (status == PS_OK) status = ps_cublas_open(&c->cublas, err);
    if (status == PS_OK)
        status =
            ps_cuda_check(cudaMemGetInfo(&n_free, &n_total), "asking for free device memory", err);
    size_t n_used = n_total - n_free;
    info->baseline_bytes = n_used > n_used_before ? n_used - n_used_before : 0;
    return status;
}

extern "C" ps_status ps_device_cuda_open(
    int i_device, const ps_device_options *options, ps_device **out, ps_err *err)
{
    char why[256] = "";
    *out = NULL;
    int n = count_devices(why, sizeof why);
    if (n == 0) return ps_fail(err, PS_EDEVICE, "there is no CUDA device: %s", why);
    if (i_device >= n)
        return ps_fail(err, PS_EDEVICE, "there is no cuda:%d: this process sees %d GPU%s", i_device,
            n, n > 1 ? "s" : "");
    ps_cuda_device *c = (ps_cuda_device *)ps_alloc(1, sizeof *c);
    if (c == NULL) return ps_fail(err, PS_ENOMEM, "no memory for a device");
    c->base.device.v = &ps_device_cuda_vtable;
    ps_device_configure(&c->base, options);
    c->base.hub.poll_flags = true;
    bool was_active = false;
    ps_status status = read_info(i_device, &c->base.device.info, &c->same_address, err);
    if (status == PS_OK) status = find_driver_calls(&c->driver, err);
    if (status == PS_OK) status = open_context(c, i_device, &was_active, err);
    if (status == PS_OK) {
        bool entered = ps_cuda_enter(c);
        status = fill(c, was_active, err);
        ps_cuda_leave(c, entered);
    }
    if (status != PS_OK) {
        ps_device_cuda_close(&c->base.device);
        return status;
    }
    *out = &c->base.device;
    return PS_OK;
}
