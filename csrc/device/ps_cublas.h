/* ps_cublas - the few cuBLAS functions that kernels call, found at run time: one build runs with
 * and without cuBLAS, and without any NVIDIA driver. What `ps_launch.cublas` points to on a CUDA
 * device, or NULL where no cuBLAS was found.
 *
 * Not here: when to use it (kernels/).
 * Threads: one engine thread a handle.
 *
 * The types are those of cuBLAS 12 and 13 with enums as int and handle and stream as void *, so
 * that no header of theirs is needed. Each function returns a cublasStatus_t, 0 being success.
 *
 * The handle has no workspace of its own that may be used in a pass: call set_stream, then
 * set_workspace with memory of the arena (set_stream takes the workspace away again), before each
 * matrix product.
 */
#ifndef PS_CUBLAS_H
#define PS_CUBLAS_H

#include "base/ps_base.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ps_cublas {
    void *library; /* borrows: stays loaded */
    void *handle;  /* owns; of the device that was current at open */
    int version;   /* 130000 for 13.0 */
    int (*create)(void **handle);
    int (*destroy)(void *handle);
    int (*get_version)(void *handle, int *version);
    int (*set_stream)(void *handle, void *stream);
    int (*set_workspace)(void *handle, void *workspace, size_t n_bytes);
    int (*set_math_mode)(void *handle, int mode);
    int (*gemm_ex)(void *handle, int trans_a, int trans_b, int m, int n, int k, const void *alpha,
        const void *a, int type_a, int lda, const void *b, int type_b, int ldb, const void *beta,
        void *c, int type_c, int ldc, int compute_type, int algo);
    int (*gemm_strided_batched_ex)(void *handle, int trans_a, int trans_b, int m, int n, int k,
        const void *alpha, const void *a, int type_a, int lda, long long stride_a, const void *b,
        int type_b, int ldb, long long stride_b, const void *beta, void *c, int type_c, int ldc,
        long long stride_c, int n_batch, int compute_type, int algo);
    /* NULL before cuBLAS 12.5. Arrays of group sizes and scalars in host memory, of pointers in
     * device memory. */
    int (*gemm_grouped_batched_ex)(void *handle, const int *trans_a, const int *trans_b,
        const int *m, const int *n, const int *k, const void *alpha, const void *const *a,
        int type_a, const int *lda, const void *const *b, int type_b, const int *ldb,
        const void *beta, void *const *c, int type_c, const int *ldc, int n_groups,
        const int *group_size, int compute_type);
} ps_cublas;

/* Looks for libcublas.so.13, then .12: where the loader looks; beside this package, where NVIDIA's
 * pip packages put it; in /usr/local/cuda/lib64. Creates the handle in the current CUDA context.
 * Where there is none, or none that works, *out is NULL and that is no error: kernels then do
 * without. PS_ENOMEM is the only failure. */
ps_status ps_cublas_open(ps_cublas **out, ps_err *err);
void ps_cublas_close(ps_cublas *cublas); /* NULL allowed */

#ifdef __cplusplus
}
#endif
#endif
