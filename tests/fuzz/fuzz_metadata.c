/* A call that would succeed, with one piece of metadata made impossible: it must be refused, whatever else it is, and write nothing.
 * SPDX-License-Identifier: MIT */
#include "calls.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Makes the tensor one that no call may accept. False where the kind of damage does not fit it. */
static bool damage(argument *a, source *from) {
    DLTensor *t = &a->tensor;
    uint64_t bits = take_bits(from);
    int axis = t->ndim > 0 ? take_below(from, t->ndim) : 0;
    switch (take_below(from, 9)) {
    case 0:
        t->data = NULL;
        t->byte_offset = 0;
        return true;
    case 1: t->ndim = (int32_t)(bits | 1u << 31); return true;        /* below 0 */
    case 2: t->ndim = (int32_t)(65 + bits % 0x7fff0000); return true; /* above what is allowed */
    case 3: t->shape = NULL; return t->ndim > 0;
    case 4: a->shape[axis] = (int64_t)(bits | (uint64_t)1 << 63); return t->ndim > 0;
    case 5: /* more elements than memory has bytes */
        for (int i = 0; i < t->ndim; i++) a->shape[i] = (int64_t)((bits | (uint64_t)1 << 40) & INT64_MAX);
        t->strides = NULL;
        return t->ndim > 1;
    case 6: /* a place that no address reaches */
        a->strides[axis] = (int64_t)(bits >> 2 | (uint64_t)1 << 62) * (take(from) & 1 ? 1 : -1);
        return t->strides && t->ndim > 0 && a->shape[axis] > 1;
    case 7: t->byte_offset = UINT64_MAX - bits % 4096 * 8 - 7; return true;
    default:
        switch (take_below(from, 4)) {
        case 0: t->dtype.lanes = (uint16_t)(bits % 2 ? 0 : 2 + bits % 1000); return true;
        case 1: t->dtype.code = (uint8_t)(7 + bits % 249); return true;
        case 2: t->dtype.bits = (uint8_t)(bits % 2 ? 1 + bits % 7 : 9 + bits % 7); return true;
        default: t->dtype.code = kDLOpaqueHandle; return true;
        }
    }
}

/* Options of another size, every byte of which is there. `*refused`: a size that none can have, or a field that only a later version
 * knows and that is not zero. cross_entropy's stand for all: they hold no tensors. */
static bool resize_options(call *c, source *from, unsigned char *options, bool *refused) {
    const size_t known = sizeof c->cross_entropy;
    size_t extra = 8 * (size_t)(1 + take(from) % 32), size = known + extra; /* every version's is a multiple of 8 */
    if (strcmp(c->name, "cross_entropy") != 0) return false;
    memset(options, 0, known + extra);
    memcpy(options, &c->cross_entropy, known);
    switch (take_below(from, 5)) {
    case 0: *refused = false; break;
    case 1: options[known + take(from) % extra] = 1; break;
    case 2: size -= 1 + (size_t)take_below(from, 7); break;
    case 3: size = take(from) % sizeof size; break;
    default: size = (size_t)(take_bits(from) | 1u << 20); break;
    }
    memcpy(options, &size, sizeof size);
    c->options = options;
    return true;
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t count);

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t count) {
    source from = {bytes, count};
    bool of_options = rarely(&from), refused = true, damaged;
    call c;
    call_make(&c, &from, SOUND);
    metalloid_status status = call_run(&c);
    call_expect_sane(&c, status);
    if (status != METALLOID_OK) {
        fprintf(stderr, "a sound call failed: %s\n", metalloid_last_error());
        abort();
    }
    for (int i = 0; i < c.count; i++) memcpy(c.argument[i].before, c.argument[i].block, c.argument[i].bytes);

    unsigned char *options = malloc(sizeof c.cross_entropy + 256);
    if (of_options) {
        damaged = resize_options(&c, &from, options, &refused);
    } else {
        argument *a = &c.argument[take_below(&from, c.count)];
        damaged = a->present && damage(a, &from);
    }
    if (damaged) {
        status = call_run(&c);
        call_expect_sane(&c, status);
        if (refused != (status != METALLOID_OK)) {
            fprintf(stderr, "%s: status %d of a call that is %s: %s\n", c.name, (int)status,
                    refused ? "impossible" : "fine", metalloid_last_error());
            abort();
        }
    }
    free(options);
    call_free(&c);
    return 0;
}
