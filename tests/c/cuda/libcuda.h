/* A stand-in for libcuda.so.1 that launches nothing: it refuses what a driver refuses, and some of what one lets pass,
 * counts what is taken and given back, and fails when told to. SPDX-License-Identifier: MIT
 *
 * There are no locks but around memory, as they would hide races in the library from ThreadSanitizer. */
#ifndef METALLOID_TESTS_LIBCUDA_H
#define METALLOID_TESTS_LIBCUDA_H

#include <stdbool.h>
#include <stddef.h>

/* A kernel whose name begins so has that much shared memory of its own. */
#define LIBCUDA_OWN_MEMORY "own_memory"
enum { LIBCUDA_OWN_BYTES = 20 << 10 };

typedef struct libcuda_device {
    const char *name;
    int major, minor, multiprocessors;
    int shared_memory; /* that a block can have, in bytes */
    int cluster;       /* the largest that has a place; 0: there are none */
} libcuda_device;

enum { LIBCUDA_H100, LIBCUDA_SLICE, LIBCUDA_A100, LIBCUDA_RTX_4090, LIBCUDA_ORIN, LIBCUDA_B200, LIBCUDA_RTX_5090 };
enum { LIBCUDA_SERVED = 7, LIBCUDA_T4 = LIBCUDA_SERVED, LIBCUDA_DEVICES };
extern const libcuda_device libcuda_devices[LIBCUDA_DEVICES];

/* What is left behind by calls must be nothing, from one libcuda_begin to the next. */
typedef struct libcuda_left {
    int memory;   /* blocks allocated and not released */
    int contexts; /* pushed and not popped */
    bool capture; /* the thread's capture mode is another than it was */
} libcuda_left;

void libcuda_begin(void *stream);    /* on which all that follows has to be */
const char *libcuda_complaint(void); /* the first thing that was refused, "" if none */
int libcuda_launches(void);          /* since then, of this thread */
libcuda_left libcuda_left_behind(void);
int libcuda_idle_kernels(char *name, size_t size); /* kernels of the library that no thread has launched, one's name */
void libcuda_make_current(int device);             /* as a framework does; -1: none */

/* From libcuda_fail_each(true) on, every call fails once: one between a libcuda_begin and the next, whose function
 * libcuda_failed names (NULL: there is none left). To give back does not fail. One thread alone may do this. */
void libcuda_fail_each(bool on);
const char *libcuda_failed(void);
void libcuda_have_devices(int count); /* fewer than there are, or -1: to count them fails */
int libcuda_modules(void);            /* loaded and not unloaded */

#endif
