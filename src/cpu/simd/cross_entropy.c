/* loss = logsumexp(logits) - logits[target]. SPDX-License-Identifier: MIT
 *
 * One read of the logits from memory, a chunk at a time, in terms of the largest logit so far (Milakov & Gimelshein 2018,
 * arXiv:1805.02867). Most chunks have none larger: one pass sums their exponentials and makes sure of that. A chunk that has is looked
 * at again, in the first-level cache. A chunk is summed in reals, LANES at a time, and the chunks' sums in double. Rows with
 * infinity, where x - largest would be NaN, and those of nothing but -infinity go to the plain kernel. */
#include "cpu/simd/math.h"

#include <stdatomic.h>

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

INLINE vec exp_of(vec x, mtl_dtype dtype) {
    return mtl_dtype_size(dtype) == 2 ? vec_exp_of_logits(x) : vec_exp_of_softmax(x);
}

/* The sum of exp(x - shift), and the largest logit, or NaN's company where that is passed over. */
INLINE double chunk_sum(const char *logits, mtl_dtype dtype, int64_t count, real shift, real *largest) {
    int64_t size = mtl_dtype_size(dtype), i = 0;
    vec sum[4], most[4], minus = vec_set(shift);
    for (int j = 0; j < 4; j++) sum[j] = vec_zero(), most[j] = vec_set(-(real)INFINITY);
    for (; i + 4 * LANES <= count; i += 4 * LANES) {
        for (int j = 0; j < 4; j += 2) {
            const char *from = logits + (i + j * LANES) * size;
            for (int64_t line = 0; line < 2 * LANES * size; line += 64) prefetch(from + line + AHEAD);
            vec_two x = vec_load_two(from, dtype);
            most[j] = vec_max(x.low, most[j]);
            most[j + 1] = vec_max(x.high, most[j + 1]);
            sum[j] += exp_of(x.low - minus, dtype);
            sum[j + 1] += exp_of(x.high - minus, dtype);
        }
    }
    for (; i < count; i += LANES) {
        vec x = load_logits(logits + i * size, dtype, count - i);
        most[0] = vec_max(x, most[0]);
        sum[0] += exp_of(x - minus, dtype);
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
        sum += vec_select(x == shift, vec_zero(), exp_of(x - shift, dtype));
        ones += vec_select(x == shift, vec_set(1), vec_zero());
    }
    *equal = (double)vec_sum(ones);
    return (double)vec_sum(sum);
}

/* What stands for a piece that the fast way cannot do, and for one that has no number above -infinity. */
static const mtl_logits_piece not_done = {INFINITY, 0}, nothing = {-INFINITY, -1};

INLINE mtl_logits_piece do_piece(const char *logits, mtl_dtype dtype, int64_t classes) {
    int64_t size = mtl_dtype_size(dtype), count;
    mtl_logits_piece so_far = nothing;
    for (int64_t i = 0; i < classes; i += count) {
        const char *chunk = logits + i * size;
        count = classes - i < CHUNK ? classes - i : CHUNK;
        real here;
        double sum = 0, equal;
        if (so_far.largest == -INFINITY) here = chunk_largest(chunk, dtype, count);
        else sum = chunk_sum(chunk, dtype, count, (real)so_far.largest, &here);
        if (here == (real)INFINITY) return not_done;
        if ((double)here > so_far.largest) { /* one that is as large does no harm: then the loss is not small */
            so_far.rest = (so_far.rest + 1) * exp(so_far.largest - (double)here);
            so_far.largest = (double)here;
            sum = chunk_rest(chunk, dtype, count, here, &equal);
            sum += equal - 1;
        } else if (so_far.largest == -INFINITY) { /* adds nothing, or NaN */
            sum = chunk_sum(chunk, dtype, count, 0, &here);
        }
        so_far.rest += sum;
    }
    return so_far;
}

/* Of two pieces that are next to each other. */
static mtl_logits_piece merged(mtl_logits_piece a, mtl_logits_piece b) {
    if (a.largest < b.largest) {
        mtl_logits_piece other = a;
        a = b;
        b = other;
    }
    if (isinf(a.largest)) return a; /* not done, or nothing in either */
    if (b.largest != -INFINITY) b.rest = (b.rest + 1) * exp(b.largest - a.largest);
    else b.rest += 1; /* 0 or NaN */
    return (mtl_logits_piece){a.largest, a.rest + b.rest};
}

void PLAIN(cross_entropy)(const void *, int64_t, int64_t, void *);

void SIMD(cross_entropy)(const void *arguments, int64_t begin, int64_t end, void *scratch) {
    const mtl_cross_entropy_args *args = arguments;
    mtl_dtype dtype = args->logits.dtype;
    int64_t pieces = args->cut.pieces;
    if (!in_place_row(args->logits, dtype)) {
        PLAIN(cross_entropy)(arguments, begin, end, scratch);
        return;
    }
    for (int64_t item = begin; item < end; item++) {
        int64_t row = item / pieces, first = item % pieces * args->cut.length;
        int64_t count = args->classes - first < args->cut.length ? args->classes - first : args->cut.length;
        mtl_cursor at;
        mtl_cursor_seek(&at, &args->rows, row);
        const char *logits = args->logits.data + at.offset[MTL_CROSS_ENTROPY_LOGITS],
                   *from = logits + first * args->logits.stride;
        int64_t target =
            mtl_load_integer(args->targets.data + at.offset[MTL_CROSS_ENTROPY_TARGETS], args->targets.dtype);
        bool ignored = args->has_ignore_index && target == args->ignore_index;
        mtl_logits_piece all = not_done;
        if (ignored) all = nothing;
        else if (dtype == REAL_DTYPE) all = do_piece(from, REAL_DTYPE, count);
#ifndef MTL_IN_DOUBLE
        else if (dtype == MTL_F16) all = do_piece(from, MTL_F16, count);
        else if (dtype == MTL_BF16) all = do_piece(from, MTL_BF16, count);
#endif
        if (pieces > 1) {
            args->cut.done[item] = all;
            if (atomic_fetch_sub(&args->cut.left[row], 1) > 1) continue;
            all = args->cut.done[row * pieces];
            for (int64_t i = 1; i < pieces; i++) all = merged(all, args->cut.done[row * pieces + i]);
        }
        if (!ignored && isinf(all.largest)) {
            PLAIN(cross_entropy)(arguments, row * pieces, row * pieces + 1, scratch);
            continue;
        }
        double loss = 0;
        if (!ignored)
            loss = (all.largest - mtl_load_double(logits + target * args->logits.stride, dtype)) + log1p(all.rest);
        real_store(args->loss.data + at.offset[MTL_CROSS_ENTROPY_LOSS], args->loss.dtype, (real)loss);
    }
}
