#include "parallel.h"

#include <stdatomic.h>
#include <stddef.h>

typedef void (*team_fn)(void (*region)(void *), void *data, unsigned threads, unsigned flags);

static team_fn run_team;
static int num_threads = 1;

// run_team: GOMP_parallel of the loaded runtime, or NULL for one thread.
void dovetail_set_threads(void *team, int threads) {
    run_team = (team_fn)team;
    num_threads = team == NULL || threads < 1 ? 1 : threads;
}

int parallel_threads(void) { return num_threads; }

struct work {
    atomic_long next;
    long count;
    work_fn fn;
    const void *context;
};

static void drain(void *data) {
    struct work *work = data;
    for (;;) {
        long item = atomic_fetch_add_explicit(&work->next, 1, memory_order_relaxed);
        if (item >= work->count) return;
        work->fn(work->context, item);
    }
}

void parallel_for(long count, int max_threads, work_fn fn, const void *context) {
    struct work work = {.count = count, .fn = fn, .context = context};
    atomic_init(&work.next, 0);
    long threads = num_threads < max_threads ? num_threads : max_threads;
    // A smaller team would make the runtime dismiss its idle threads, so it is all of them or none.
    if (count < 2 || threads < 2) drain(&work);
    else run_team(drain, &work, (unsigned)num_threads, 0);
}
