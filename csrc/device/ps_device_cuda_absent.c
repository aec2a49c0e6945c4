/* ps_device_cuda_absent - what a build without CUDA says when somebody asks for a CUDA device.
 *
 * Not here: the device itself (ps_device_cuda.cu); builds with CUDA compile this file to nothing.
 * Threads: pure.
 */
#include "device/ps_device_priv.h"

#if !PS_HAVE_CUDA

#include <stdio.h>

#define WHY                                                                                        \
    "this pipeshard was built without CUDA; install the CUDA 13 toolkit (nvcc) and build it "      \
    "again, or use a wheel "                                                                       \
    "with CUDA"

bool ps_device_cuda_available(char *why, size_t cap_why)
{
    if (cap_why > 0) snprintf(why, cap_why, "%s", WHY);
    return false;
}

ps_status ps_device_cuda_open(
    int i_device, const ps_device_options *options, ps_device **out, ps_err *err)
{
    (void)i_device;
    (void)options;
    *out = NULL;
    return ps_fail(err, PS_EDEVICE, "there is no CUDA device: " WHY);
}

#endif
