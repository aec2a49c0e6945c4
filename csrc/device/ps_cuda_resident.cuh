/* ps_cuda_resident - makes sure that every kernel is on the GPU before the first pass. The runtime
 * loads a kernel when it is first used; loading takes device memory, which the budget would not
 * know of, and may wait for everything that runs, which never ends if a kernel is waiting for a
 * flag that only later work sets.
 *
 * Included by each .cu file that has kernels (kernels/ps_cuda.cuh does it for its folder): the
 * file's kernels are then loaded when a CUDA device is opened. No list has to be kept.
 *
 * How: a kernel that does nothing stands for its file. Its address goes into a section of the
 * program, whose bounds the linker knows; from the address the driver finds the module, and in it
 * all kernels. Threads: the engine's thread.
 */
#ifndef PS_CUDA_RESIDENT_CUH
#define PS_CUDA_RESIDENT_CUH

#include "base/ps_base.h"

#include <cuda_runtime.h>

static __global__ void k_stands_for_its_file(void) {}

__attribute__((section("ps_cuda_files"), used)) static const void *const ps_cuda_this_file =
    (const void *)k_stands_for_its_file;

/* Loads the kernels of every such file into the current context. PS_EDEVICE where one has no code
 * for this GPU. */
ps_status ps_cuda_load_all(ps_err *err);

#endif
