/* loss = logsumexp(logits) - logits[target]. SPDX-License-Identifier: MIT
 *
 * One read of the logits from memory: a chunk is looked at for its largest logit, and summed while it lies in the first-level cache;
 * the sum so far is rescaled when a chunk brings a larger one (Milakov & Gimelshein 2018, arXiv:1805.02867). Chunks are summed in reals,
 * LANES at a time, and the chunks' sums in double. Rows with infinities, where x - largest would be NaN, go to the plain kernel. */
#include "cpu/simd/math.h"

enum { CHUNK = 512, AHEAD = 2 * CHUNK };

/* The largest of `count` logits; NaN is passed over (and comes back in the sum). */
INLINE real chunk_largest(const char *logits, mtl_dtype dtype, int64_t count) {
    int64_t size = mtl_dtype_size(dtype), i = 0;
    vec largest[4];
    for (int j = 0; j < 4; j++) largest[j] = vec_set(-(real)INFINITY);
    for (; i + 4 * LANES <= count; i += 4 * LANES) {
        for (int j = 0; j < 4; j++) {
            prefetch(logits + (AHEAD + i + j * LANES) * size);
            largest[j] = vec_max(vec_load_as(logits + (i + j * LANES) * size, dtype), largest[j]);
        }
    }
    for (; i < count; i += LANES) {
        vec x = vec_load_upto(logits + i * size, dtype, count - i);
        if (count - i < LANES) x = vec_select(vec_first(count - i), x, vec_set(-(real)INFINITY));
        largest[0] = vec_max(x, largest[0]);
    }
    return vec_largest(vec_max(vec_max(largest[0], largest[1]), vec_max(largest[2], largest[3])));
}

/* The sum of exp(x - largest). Logits that equal `largest` are counted instead: their terms are 1, beside which the small ones, the loss of
 * a confident row, would be lost. Where `equal` is NULL there are none. */
INLINE double chunk_sum(const char *logits, mtl_dtype dtype, int64_t count, real largest, double *equal) {
    int64_t size = mtl_dtype_size(dtype), i = 0;
    vec sum[4], ones = vec_zero(), shift = vec_set(largest);
    for (int j = 0; j < 4; j++) sum[j] = vec_zero();
    for (; i + 4 * LANES <= count; i += 4 * LANES) {
        for (int j = 0; j < 4; j++) {
            vec x = vec_load_as(logits + (i + j * LANES) * size, dtype), e = vec_exp_of_nonpositive(x - shift);
            sum[j] += equal ? vec_select(x == shift, vec_zero(), e) : e;
            if (equal) ones += vec_select(x == shift, vec_set(1), vec_zero());
        }
    }
    for (; i < count; i += LANES) {
        vec x = vec_load_upto(logits + i * size, dtype, count - i), e = vec_exp_of_nonpositive(x - shift);
        vec_int there = vec_first(count - i < LANES ? count - i : LANES);
        sum[0] += vec_select(there & ~(x == shift), e, vec_zero());
        ones += vec_select(there & (x == shift), vec_set(1), vec_zero());
    }
    if (equal) *equal = (double)vec_sum(ones);
    return (double)vec_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

/* False where the row has to be done the plain way. */
INLINE bool row_loss(const char *logits, mtl_dtype dtype, int64_t classes, int64_t target, double *loss) {
    int64_t size = mtl_dtype_size(dtype);
    real largest = -(real)INFINITY;
    double rest = 0; /* the terms but one of the largest logit, which is 1 */
    for (int64_t i = 0; i < classes; i += CHUNK) {
        int64_t count = classes - i < CHUNK ? classes - i : CHUNK;
        real here = chunk_largest(logits + i * size, dtype, count);
        bool larger = here > largest;
        if (larger) {
            rest = (rest + 1) * exp((double)largest - (double)here);
            largest = here;
        }
        if (isinf(largest)) return false;
        double equal = 0;
        if (here == largest) rest += chunk_sum(logits + i * size, dtype, count, largest, &equal) + (equal - larger);
        else rest += chunk_sum(logits + i * size, dtype, count, largest, NULL);
    }
    *loss = ((double)largest - mtl_load_double(logits + target * size, dtype)) + log1p(rest);
    return true;
}

#ifdef MTL_IN_DOUBLE
#define PLAIN mtl_plain_cross_entropy_f64
#else
#define PLAIN mtl_plain_cross_entropy_f32
#endif
void PLAIN(const void *, int64_t, int64_t, void *);

void SIMD(cross_entropy)(const void *arguments, int64_t begin, int64_t end, void *scratch) {
    const mtl_cross_entropy_args *args = arguments;
    mtl_dtype dtype = args->logits.dtype;
    if (!in_place_row(args->logits, dtype)) {
        PLAIN(arguments, begin, end, scratch);
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
        else PLAIN(arguments, item, item + 1, scratch);
    }
}
