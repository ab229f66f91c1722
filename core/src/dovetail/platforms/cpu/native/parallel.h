// Work items on the OpenMP team of the host process. The library links no OpenMP runtime of its own: a second one would
// bring a second thread pool. The host passes the entry point of the runtime that it has loaded already.
#ifndef DOVETAIL_PARALLEL_H
#define DOVETAIL_PARALLEL_H

typedef void (*work_fn)(const void *context, long item);

// Runs fn(context, i) for every i in 0 .. count - 1, in any order, on at most max_threads threads. Threads take items as they
// become free, so an item's result must not depend on who runs it or when.
void parallel_for(long count, int max_threads, work_fn fn, const void *context);
int parallel_threads(void);

#endif
