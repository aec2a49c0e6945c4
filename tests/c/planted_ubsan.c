/* A deliberate bug: a signed sum that overflows. tools/ctest.py --planted expects
 * UndefinedBehaviorSanitizer to end this program. */
#include <limits.h>

int main(int n_args, char **args)
{
    (void)args;
    volatile int sum = INT_MAX;
    sum += n_args;
    return 0;
}
