/* The library's thread pool: one call that runs the parts of a job, and the number of threads a context starts with. */
#ifndef MTL_CORE_THREADS_H
#define MTL_CORE_THREADS_H

/* One part of a parallel job. Each of the parts 0..parts-1 is run exactly once. `worker` is in 0..threads-1 and unique
 * among the threads that run this job at one moment, so that it can index per-thread scratch; the caller is worker 0.
 * A part may call mtl_parallel_run. It must return: no longjmp, no pthread_exit. */
typedef void (*mtl_job_fn)(void *job, int part, int worker);

/* Runs all parts and returns when they are done; at most `threads` threads, the caller included, take part. Never
 * fails: where threads cannot be had, or are busy with another caller's job, the caller runs the parts itself. What a
 * part computes must therefore not depend on who runs it. */
void mtl_parallel_run(int threads, int parts, mtl_job_fn fn, void *argument);

enum { MTL_MOST_THREADS = 1024 }; /* that may be asked for, by a call or by the environment */

int mtl_environment_threads(void); /* METALLOID_NUM_THREADS if it is an integer in 1..1024, else 0, of which it warns */

/* mtl_environment_threads (read once a process) if that is not 0, else the number of CPUs that the calling thread may run
 * on now. */
int mtl_default_threads(void);

#endif
