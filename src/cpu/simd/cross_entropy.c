/* loss = logsumexp(logits) - logits[target]. SPDX-License-Identifier: MIT
 *
 * One read of the logits: the target is left out of the sum, so that loss = log1p(sum of exp(x - target)) keeps its
 * digits however small it is, and any shift near the largest logit does; the largest of the first few is taken. A
 * chunk in which a term is too large for that, by far the exception, is summed again. A chunk is summed in reals,
 * LANES at a time, and the chunks' sums in double. Powers are of 2; the rounding of log2(e), the same for all
 * logits, is as a difference in scale of 1e-8. Rows with infinity, where x - shift would be NaN, and those of
 * nothing but -infinity go to the plain kernel. */
#include "cpu/simd/math.h"

#include <stdatomic.h>

enum { CHUNK = 2048, FIRST = 4 * LANES };

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

/* The sum of 2^(x log2(e) - shift). */
INLINE double chunk_sum(const char *logits, mtl_dtype dtype, int64_t count, real shift) {
    int64_t size = mtl_dtype_size(dtype), i = 0;
    bool narrow = size == 2;
    vec sum[4], minus = vec_set(-shift), scale = vec_set(LOG2_E);
    for (int j = 0; j < 4; j++) sum[j] = vec_zero();
    for (; i + 4 * LANES <= count; i += 4 * LANES) {
        for (int j = 0; j < 4; j += 2) {
            const char *from = logits + (i + j * LANES) * size;
            for (int64_t line = 0; line < 2 * LANES * size; line += 64) prefetch(from + line + AHEAD);
            vec_two x = vec_load_two(from, dtype);
            sum[j] += vec_exp2_of_logits(vec_fma(x.low, scale, minus), narrow);
            sum[j + 1] += vec_exp2_of_logits(vec_fma(x.high, scale, minus), narrow);
        }
    }
    for (; i < count; i += LANES)
        sum[0] += vec_exp2_of_logits(vec_fma(load_logits(logits + i * size, dtype, count - i), scale, minus), narrow);
    return (double)vec_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

/* The same but for the logit at `target`, which need not be there. */
INLINE double chunk_sum_but(const char *logits, mtl_dtype dtype, int64_t count, real shift, int64_t target) {
    if (target < 0 || target >= count) return chunk_sum(logits, dtype, count, shift);
    int64_t size = mtl_dtype_size(dtype), at = target - target % LANES, left = count - at;
    vec x = load_logits(logits + at * size, dtype, left);
    x = vec_select(vec_first(target - at + 1) & ~vec_first(target - at), vec_set(-(real)INFINITY), x);
    double sum =
        (double)vec_sum(vec_exp2_of_logits(vec_fma(x, vec_set(LOG2_E), vec_set(-shift)), mtl_dtype_size(dtype) == 2));
    sum += chunk_sum(logits, dtype, at, shift);
    if (left > LANES) sum += chunk_sum(logits + (at + LANES) * size, dtype, left - LANES, shift);
    return sum;
}

/* What stands for a piece that the fast way cannot do, and for one that has no number above -infinity. */
static const mtl_logits_piece not_done = {INFINITY, 0}, nothing = {-INFINITY, 0};

/* A chunk's sum below this has lost nothing; a term too large for vec_exp2_of_logits is above. */
static const double MOST = 0x1p52;

INLINE mtl_logits_piece do_piece(const char *logits, mtl_dtype dtype, int64_t classes, int64_t target) {
    int64_t size = mtl_dtype_size(dtype), count;
    mtl_logits_piece so_far = nothing;
    for (int64_t i = 0; i < classes; i += count) {
        const char *chunk = logits + i * size;
        count = classes - i < CHUNK ? classes - i : CHUNK;
        double sum = MOST;
        if (so_far.shift == -INFINITY)
            so_far.shift = (double)(chunk_largest(chunk, dtype, count < FIRST ? count : FIRST) * LOG2_E);
        if (so_far.shift == INFINITY) return not_done;
        if (so_far.shift > -INFINITY) sum = chunk_sum_but(chunk, dtype, count, (real)so_far.shift, target - i);
        if (!(sum < MOST)) {
            double shift = (double)(chunk_largest(chunk, dtype, count) * LOG2_E);
            if (shift == INFINITY) return not_done;
            if (shift > so_far.shift) {
                so_far.sum *= exp2(so_far.shift - shift); /* 0 times 0 where there was nothing */
                so_far.shift = shift;
            }
            /* Without a number above -infinity it is 0, or NaN. */
            sum = chunk_sum_but(chunk, dtype, count, shift > -INFINITY ? (real)so_far.shift : 0, target - i);
        }
        so_far.sum += sum;
    }
    return so_far;
}

/* Of two pieces that are next to each other. */
static mtl_logits_piece merged(mtl_logits_piece a, mtl_logits_piece b) {
    if (a.shift < b.shift) {
        mtl_logits_piece other = a;
        a = b;
        b = other;
    }
    if (isinf(a.shift)) return a; /* not done, or nothing in either */
    return (mtl_logits_piece){a.shift, a.sum + b.sum * exp2(b.shift - a.shift)};
}

/* `sum` may lie beyond any number once it is relative to the target. */
static double loss_of(mtl_logits_piece all, double target) {
    double power = all.shift - target * (double)LOG2_E;
    return power < 900 ? log1p(all.sum * exp2(power)) : log(all.sum) + power / (double)LOG2_E;
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
        else if (dtype == REAL_DTYPE) all = do_piece(from, REAL_DTYPE, count, target - first);
#ifndef MTL_IN_DOUBLE
        else if (dtype == MTL_F16) all = do_piece(from, MTL_F16, count, target - first);
        else if (dtype == MTL_BF16) all = do_piece(from, MTL_BF16, count, target - first);
#endif
        if (pieces > 1) {
            args->cut.done[item] = all;
            if (atomic_fetch_sub(&args->cut.left[row], 1) > 1) continue;
            all = args->cut.done[row * pieces];
            for (int64_t i = 1; i < pieces; i++) all = merged(all, args->cut.done[row * pieces + i]);
        }
        double loss = 0;
        if (!ignored) {
            double logit = mtl_load_double(logits + target * args->logits.stride, dtype);
            if (isinf(all.shift) || isinf(logit)) {
                PLAIN(cross_entropy)(arguments, row * pieces, row * pieces + 1, scratch);
                continue;
            }
            loss = loss_of(all, logit);
        }
        real_store(args->loss.data + at.offset[MTL_CROSS_ENTROPY_LOSS], args->loss.dtype, (real)loss);
    }
}
