// Work items on a pool of threads. The caller works too and waits for the items that were taken, never for a thread: one that
// the operating system lets run late finds nothing left to do. (An OpenMP region ends when every thread of the team has
// been there, which costs a whole time slice whenever another program holds one of the cores.)
#ifndef DOVETAIL_PARALLEL_H
#define DOVETAIL_PARALLEL_H

typedef void (*work_fn)(const void *context, long item);

// Runs fn(context, i) for every i in 0 .. count - 1, in any order, on one thread if max_threads is 1, else on all. Threads
// take items as they become free, so an item's result must not depend on who runs it or when.
void parallel_for(long count, int max_threads, work_fn fn, const void *context);

int parallel_threads(void);

// How many threads work from now on, the caller included. Returns how many there are.
int dovetail_set_threads(int threads);

#endif
