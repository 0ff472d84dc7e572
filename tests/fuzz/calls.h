/* Bytes of the fuzzer become a call of any operation. SPDX-License-Identifier: MIT */
#ifndef METALLOID_TESTS_FUZZ_CALLS_H
#define METALLOID_TESTS_FUZZ_CALLS_H

#include <metalloid/metalloid.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* ---- the fuzzer's bytes; zeros when they are used up ------------------------------------------------------------------ */

typedef struct source {
    const uint8_t *bytes;
    size_t left;
} source;

uint8_t take(source *from);
uint64_t take_bits(source *from);
int take_below(source *from, int limit);
double take_double(source *from); /* an ordinary, extreme or special one */
bool rarely(source *from);        /* one in 32 */

/* ---- a call ----------------------------------------------------------------------------------------------------------- */

enum { MAX_ARGUMENTS = 10, MAX_AXES = 6 };

typedef struct argument {
    DLTensor tensor;
    int64_t shape[MAX_AXES], strides[MAX_AXES];
    bool present, is_output;
    int64_t elements;
    unsigned char *block, *before; /* exactly the bytes that the tensor reaches, and what stood there */
    size_t bytes;
    bool shared, owned; /* the block with another argument; the one who frees it */
} argument;

typedef struct call {
    int operation;
    const char *name;
    int count;
    argument argument[MAX_ARGUMENTS];
    double eps, scale;
    int64_t dims, offset;
    metalloid_gelu gelu;
    metalloid_rope_options rope;
    metalloid_attention_options attention;
    metalloid_cross_entropy_options cross_entropy;
    const void *options; /* instead of the struct above, when not NULL */
} call;

typedef enum hostility {
    SOUND,   /* every call is one that should succeed */
    HOSTILE, /* shapes, dtypes, layouts, aliases and scalars may be wrong; the memory always fits the metadata */
} hostility;

void call_make(call *c, source *from, hostility how);
metalloid_status call_run(const call *c);
void call_free(call *c);

/* Aborts unless the status is a known one, a failed call has a message of its operation and has written nothing, and a successful
 * call has written to blocks of outputs alone. */
void call_expect_sane(const call *c, metalloid_status status);

#endif
