/* ps_cuda_resident - see ps_cuda_resident.cuh.
 *
 * Not here: any kernel but the one that stands for this file.
 * Threads: the engine's thread.
 */
#include "device/ps_cuda_resident.cuh"

#include "device/ps_device_cuda.cuh"

/* The section's bounds, made by the linker. It is never empty: this file is in it. */
extern "C" const void *const __start_ps_cuda_files[] __attribute__((visibility("hidden")));
extern "C" const void *const __stop_ps_cuda_files[] __attribute__((visibility("hidden")));

typedef struct module_calls {
    int (*module_of)(void **module, void *function);
    int (*count)(unsigned *n, void *module);
    int (*enumerate)(void **functions, unsigned n, void *module);
    int (*load)(void *function);
} module_calls;

static ps_status load_module(const module_calls *calls, void *module, ps_err *err)
{
    unsigned n = 0;
    int rc = calls->count(&n, module);
    if (rc != 0 || n == 0)
        return ps_fail(
            err, PS_EDEVICE, "the NVIDIA driver does not list our kernels (status %d)", rc);
    void **functions = (void **)ps_alloc(n, sizeof *functions);
    if (functions == NULL) return ps_fail(err, PS_ENOMEM, "no memory for a list of %u kernels", n);
    rc = calls->enumerate(functions, n, module);
    for (unsigned i = 0; i < n && rc == 0; i++) rc = calls->load(functions[i]);
    ps_free(functions);
    if (rc == 0) return PS_OK;
    return ps_fail(
        err, PS_EDEVICE, "the GPU did not take our kernels (status %d); is its memory full?", rc);
}

static ps_status load_file(const module_calls *calls, const void *kernel, ps_err *err)
{
    cudaFunction_t function = NULL;
    void *module = NULL;
    cudaError_t rc = cudaGetFuncBySymbol(&function, kernel);
    if (rc == cudaErrorNoKernelImageForDevice || rc == cudaErrorInvalidDeviceFunction ||
        rc == cudaErrorUnsupportedPtxVersion || rc == cudaErrorInvalidKernelImage) {
        cudaGetLastError();
        return ps_fail(err, PS_EDEVICE,
            "this pipeshard has no code for this GPU; build it again on this machine, or with its "
            "architecture in PIPESHARD_CUDA_ARCHS");
    }
    ps_status status = ps_cuda_check(rc, "finding our kernels", err);
    if (status != PS_OK) return status;
    if (calls->module_of(&module, (void *)function) != 0)
        return ps_fail(err, PS_EDEVICE, "the NVIDIA driver does not know our kernels");
    return load_module(calls, module, err);
}

ps_status ps_cuda_load_all(ps_err *err)
{
    module_calls calls = {};
    if (!ps_cuda_find_driver_call("cuFuncGetModule", &calls.module_of) ||
        !ps_cuda_find_driver_call("cuModuleGetFunctionCount", &calls.count) ||
        !ps_cuda_find_driver_call("cuModuleEnumerateFunctions", &calls.enumerate) ||
        !ps_cuda_find_driver_call("cuFuncLoad", &calls.load)) {
        cudaGetLastError();
        return ps_fail(
            err, PS_EDEVICE, "the NVIDIA driver is too old; install driver 580 or newer");
    }
    ps_status status = PS_OK;
    for (const void *const *p = __start_ps_cuda_files; p < __stop_ps_cuda_files && status == PS_OK;
         p++)
        status = load_file(&calls, *p, err);
    return status;
}
