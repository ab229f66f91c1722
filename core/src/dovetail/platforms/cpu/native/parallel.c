#define _GNU_SOURCE
#include "parallel.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

#define MAX_THREADS 256
#define STACK_BYTES (1 << 20)
#define AWAKE_NANOSECONDS 100000  // how long an idle thread looks for work before it sleeps
#define CLOSED UINT32_MAX

// The job in progress. The ticket holds the job's number (upper half) and the next free item (lower half). A thread reads
// the fields and then takes an item by exchanging the ticket that it saw before: if the job has ended meanwhile, the
// ticket has changed, and what it read is dropped.
static _Atomic(uint64_t) ticket = CLOSED;
static _Atomic(work_fn) job_fn;
static _Atomic(const void *) job_context;
static atomic_long job_count, job_done;

static pthread_mutex_t posting = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t sleep_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake_up = PTHREAD_COND_INITIALIZER;
static atomic_int sleepers, wanted_threads = 1;
static int workers;

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

// Takes and runs items until none is free. Returns the ticket that it saw last.
static uint64_t drain(void) {
    uint64_t seen = atomic_load(&ticket);
    for (;;) {
        work_fn fn = atomic_load_explicit(&job_fn, memory_order_relaxed);
        const void *context = atomic_load_explicit(&job_context, memory_order_relaxed);
        long count = atomic_load_explicit(&job_count, memory_order_relaxed);
        uint32_t item = (uint32_t)seen;
        if (item == CLOSED || item >= count) {
            uint64_t current = atomic_load(&ticket);
            if (current == seen) return seen;
            seen = current;
        } else if (atomic_compare_exchange_weak(&ticket, &seen, seen + 1)) {
            fn(context, item);
            atomic_fetch_add_explicit(&job_done, 1, memory_order_release);
            seen = atomic_load(&ticket);
        }
    }
}

static int may_work(long id) { return id < atomic_load_explicit(&wanted_threads, memory_order_relaxed); }

static void wait_for_change(uint64_t seen, long id) {
    int64_t end = now() + AWAKE_NANOSECONDS;
    while (may_work(id) && now() < end)
        for (int i = 0; i < 16; i++) {
            if (atomic_load_explicit(&ticket, memory_order_acquire) != seen) return;
            relax();
        }
    pthread_mutex_lock(&sleep_lock);
    atomic_fetch_add(&sleepers, 1);
    while (!may_work(id) || atomic_load(&ticket) == seen) pthread_cond_wait(&wake_up, &sleep_lock);
    atomic_fetch_sub(&sleepers, 1);
    pthread_mutex_unlock(&sleep_lock);
}

static void *worker(void *id) {
    for (;;) wait_for_change(drain(), (long)(intptr_t)id);
    return NULL;
}

static void wake(void) {
    pthread_mutex_lock(&sleep_lock);
    pthread_cond_broadcast(&wake_up);
    pthread_mutex_unlock(&sleep_lock);
}

int dovetail_set_threads(int threads) {
    pthread_mutex_lock(&posting);
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    while (workers + 1 < threads) {
        pthread_t thread;
        if (pthread_create(&thread, &attributes, worker, (void *)(intptr_t)(workers + 1))) break;
        workers++;
    }
    pthread_attr_destroy(&attributes);
    if (threads > workers + 1) threads = workers + 1;
    atomic_store(&wanted_threads, threads < 1 ? 1 : threads);
    wake();
    pthread_mutex_unlock(&posting);
    return atomic_load(&wanted_threads);
}

int parallel_threads(void) { return atomic_load_explicit(&wanted_threads, memory_order_relaxed); }

static void run_alone(long count, work_fn fn, const void *context) {
    for (long i = 0; i < count; i++) fn(context, i);
}

static void publish(long count, work_fn fn, const void *context) {
    uint64_t job = (atomic_load(&ticket) >> 32) + 1;
    atomic_store(&ticket, job << 32 | CLOSED);  // nobody takes items while the fields change
    atomic_store_explicit(&job_fn, fn, memory_order_relaxed);
    atomic_store_explicit(&job_context, context, memory_order_relaxed);
    atomic_store_explicit(&job_count, count, memory_order_relaxed);
    atomic_store_explicit(&job_done, 0, memory_order_relaxed);
    atomic_store(&ticket, job << 32);
    if (atomic_load(&sleepers)) wake();
}

void parallel_for(long count, int max_threads, work_fn fn, const void *context) {
    // Another thread of the process may be in here: then this one does its own work.
    if (count < 2 || max_threads < 2 || parallel_threads() < 2 || pthread_mutex_trylock(&posting)) {
        run_alone(count, fn, context);
        return;
    }
    publish(count, fn, context);
    drain();
    for (int spins = 0; atomic_load_explicit(&job_done, memory_order_acquire) < count; spins++) {
        if (spins < 4096) relax();
        else sched_yield();
    }
    pthread_mutex_unlock(&posting);
}
