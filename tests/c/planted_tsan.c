/* A deliberate bug: two threads count in one variable without order between them. tools/ctest.py
 * --planted expects ThreadSanitizer to end this program. */
#include <pthread.h>
#include <stddef.h>

static void *count(void *counter)
{
    for (int i = 0; i < 1000; i++) ++*(int *)counter;
    return NULL;
}

int main(void)
{
    int counter = 0;
    pthread_t other;
    if (pthread_create(&other, NULL, count, &counter) != 0) return 0;
    count(&counter);
    pthread_join(other, NULL);
    return 0;
}
