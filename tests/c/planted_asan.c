/* A deliberate bug: one byte is written behind a block of ps_alloc. tools/ctest.py --planted
 * expects AddressSanitizer to end this program; were it to live, the sanitizer run would prove
 * nothing about our own allocator's blocks. */
#include "base/ps_base.h"

int main(int n_args, char **args)
{
    (void)args;
    volatile char *block = ps_alloc(10, 1);
    if (block == NULL) return 0;
    block[9 + n_args] = 1;
    ps_free((void *)(uintptr_t)block);
    return 0;
}
