/* loss = logsumexp(logits) - logits[target]. SPDX-License-Identifier: MIT
 *
 * One read of the logits from memory, a chunk at a time, in terms of the largest logit so far (Milakov & Gimelshein 2018,
 * arXiv:1805.02867). Most chunks have none larger: one pass sums their exponentials and makes sure of that. A chunk that has is looked
 * at again, in the first-level cache. A chunk is summed in reals, LANES at a time, and the chunks' sums in double. Rows with
 * infinities, where x - largest would be NaN, go to the plain kernel. */
#include "cpu/simd/math.h"

enum { CHUNK = 2048 };

INLINE vec load_logits(const char *logits, mtl_dtype dtype, int64_t count) {
    if (count >= LANES) return vec_load_as(logits, dtype);
    return vec_select(vec_first(count), vec_load_part(logits, dtype, count), vec_set(-(real)INFINITY));
}

/* The largest of `count` logits; NaN is passed over (and comes back in the sum). */
INLINE real chunk_largest(const char *logits, mtl_dtype dtype, int64_t count) {
    int64_t size = mtl_dtype_size(dtype);
    vec largest = vec_set(-(real)INFINITY);
    for (int64_t i = 0; i < count; i += LANES)
        largest = vec_max(load_logits(logits + i * size, dtype, count - i), largest);
    return vec_largest(largest);
}

/* The sum of exp(x - shift), and the largest logit, or NaN's company where that is passed over. */
INLINE double chunk_sum(const char *logits, mtl_dtype dtype, int64_t count, real shift, real *largest) {
    int64_t size = mtl_dtype_size(dtype), i = 0;
    vec sum[4], most[4], minus = vec_set(shift);
    for (int j = 0; j < 4; j++) sum[j] = vec_zero(), most[j] = vec_set(-(real)INFINITY);
    for (; i + 4 * LANES <= count; i += 4 * LANES) {
        for (int j = 0; j < 4; j++) {
            const char *from = logits + (i + j * LANES) * size;
            prefetch(from + AHEAD);
            vec x = vec_load_as(from, dtype);
            most[j] = vec_max(x, most[j]);
            sum[j] += vec_exp_of_softmax(x - minus);
        }
    }
    for (; i < count; i += LANES) {
        vec x = load_logits(logits + i * size, dtype, count - i);
        most[0] = vec_max(x, most[0]);
        sum[0] += vec_exp_of_softmax(x - minus);
    }
    *largest = vec_largest(vec_max(vec_max(most[0], most[1]), vec_max(most[2], most[3])));
    return (double)vec_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

/* The sum of exp(x - largest) but for logits that equal `largest`: their terms are 1, beside which the small ones, the loss of a confident
 * row, would be lost. They are counted. */
INLINE double chunk_rest(const char *logits, mtl_dtype dtype, int64_t count, real largest, double *equal) {
    int64_t size = mtl_dtype_size(dtype);
    vec sum = vec_zero(), ones = vec_zero(), shift = vec_set(largest);
    for (int64_t i = 0; i < count; i += LANES) {
        vec x = load_logits(logits + i * size, dtype, count - i);
        sum += vec_select(x == shift, vec_zero(), vec_exp_of_softmax(x - shift));
        ones += vec_select(x == shift, vec_set(1), vec_zero());
    }
    *equal = (double)vec_sum(ones);
    return (double)vec_sum(sum);
}

/* False where the row has to be done the plain way. */
INLINE bool row_loss(const char *logits, mtl_dtype dtype, int64_t classes, int64_t target, double *loss) {
    int64_t size = mtl_dtype_size(dtype), count = classes < CHUNK ? classes : CHUNK;
    real largest = chunk_largest(logits, dtype, count), here = largest;
    double rest = 0; /* the terms but one of the largest logit, which is 1 */
    for (int64_t i = 0; i < classes; i += count) {
        const char *chunk = logits + i * size;
        count = classes - i < CHUNK ? classes - i : CHUNK;
        double sum = i ? chunk_sum(chunk, dtype, count, largest, &here) : 0, equal;
        if (isinf(here)) return false;
        if (i == 0 || here > largest) { /* one that is as large does no harm: then the loss is not small */
            rest = i ? (rest + 1) * exp((double)largest - (double)here) : 0;
            largest = here;
            sum = chunk_rest(chunk, dtype, count, largest, &equal);
            sum += equal - 1;
        }
        rest += sum;
    }
    *loss = ((double)largest - mtl_load_double(logits + target * size, dtype)) + log1p(rest);
    return true;
}

void PLAIN(cross_entropy)(const void *, int64_t, int64_t, void *);

void SIMD(cross_entropy)(const void *arguments, int64_t begin, int64_t end, void *scratch) {
    const mtl_cross_entropy_args *args = arguments;
    mtl_dtype dtype = args->logits.dtype;
    if (!in_place_row(args->logits, dtype)) {
        PLAIN(cross_entropy)(arguments, begin, end, scratch);
        return;
    }
    mtl_cursor at;
    mtl_cursor_seek(&at, &args->rows, begin);
    for (int64_t item = begin; item < end; item++, mtl_cursor_next(&at)) {
        const char *logits = args->logits.data + at.offset[MTL_CROSS_ENTROPY_LOGITS];
        int64_t target =
            mtl_load_integer(args->targets.data + at.offset[MTL_CROSS_ENTROPY_TARGETS], args->targets.dtype);
        bool done = false;
        double loss = 0;
        if (args->has_ignore_index && target == args->ignore_index) done = true;
        else if (dtype == REAL_DTYPE) done = row_loss(logits, REAL_DTYPE, args->classes, target, &loss);
#ifndef MTL_IN_DOUBLE
        else if (dtype == MTL_F16) done = row_loss(logits, MTL_F16, args->classes, target, &loss);
        else if (dtype == MTL_BF16) done = row_loss(logits, MTL_BF16, args->classes, target, &loss);
#endif
        if (done) real_store(args->loss.data + at.offset[MTL_CROSS_ENTROPY_LOSS], args->loss.dtype, (real)loss);
        else PLAIN(cross_entropy)(arguments, item, item + 1, scratch);
    }
}
