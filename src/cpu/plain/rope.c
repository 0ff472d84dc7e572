/* Pair i turns by position * scale * inv_freq[i]; with qk_norm_rope after rms_norm of the head. SPDX-License-Identifier: MIT
 *
 * The angle is formed in an arithmetic wider than that of the values (double for float, long double for double) and goes to the
 * library's own cos and sin, which reduce it exactly: at position 1e6 float32's angle would be off by 3e-2. The cosines and sines
 * of a time step are made once for all heads. */
#include "cpu/plain/real.h"

#ifdef MTL_IN_DOUBLE
typedef long double angle_real;
#define angle_pow powl
#define angle_cos cosl
#define angle_sin sinl
#else
typedef double angle_real;
#define angle_pow pow
#define angle_cos cos
#define angle_sin sin
#endif

static void make_inv_freqs(angle_real *inv_freqs, const mtl_rope_angles *angles) {
    for (int64_t i = 0; i < angles->dims / 2; i++) {
        if (!angles->freqs.data) {
            inv_freqs[i] = angle_pow((angle_real)angles->base, -(angle_real)(2 * i) / (angle_real)angles->dims);
            continue;
        }
        angle_real freq = (angle_real)mtl_load_double(angles->freqs.data + i * angles->freqs.stride, angles->freqs.dtype);
        inv_freqs[i] = angles->inverse ? freq : 1 / freq;
    }
}

static void norm_head(real *head, int64_t length, mtl_row weight, double eps) {
    double squares = 0;
    for (int64_t i = 0; i < length; i++) squares += (double)head[i] * (double)head[i];
    double inverse = 1 / sqrt(squares / (double)length + eps);
    for (int64_t i = 0; i < length; i++) {
        head[i] = (real)((double)head[i] * inverse) * (weight.data ? real_load(weight.data + i * weight.stride, weight.dtype) : 1);
    }
}

static void turn_head(real *head, const mtl_rope_angles *angles, const angle_real *cosines, const angle_real *sines) {
    int64_t pairs = angles->dims / 2;
    for (int64_t i = 0; i < pairs; i++) {
        real *x1 = angles->traditional ? &head[2 * i] : &head[i], *x2 = angles->traditional ? x1 + 1 : x1 + pairs;
        if (sines[i] == 0 && cosines[i] == 1) continue; /* an infinite partner has no say in an unrotated pair */
        angle_real turned1 = *x1 * cosines[i] - *x2 * sines[i], turned2 = *x1 * sines[i] + *x2 * cosines[i];
        *x1 = (real)turned1;
        *x2 = (real)turned2;
    }
}

/* What lies past dims is copied as it is where it need not change its dtype: a NaN keeps its bits. */
static void copy_rest(char *out, const char *x, const mtl_rope_side *side, int64_t dims, int64_t head_dim) {
    for (int64_t i = dims; i < head_dim; i++) {
        memmove(out + i * side->out.stride, x + i * side->x.stride, (size_t)mtl_dtype_size(side->x.dtype));
    }
}

void REAL(mtl_plain_rope)(const void *arguments, int64_t begin, int64_t end, void *scratch) {
    const mtl_rope_args *args = arguments;
    const mtl_rope_angles *angles = &args->angles;
    int64_t pairs = angles->dims / 2, blocks = (args->time + MTL_ROPE_BLOCK - 1) / MTL_ROPE_BLOCK;
    angle_real *inv_freqs = scratch, *cosines = inv_freqs + pairs, *sines = cosines + pairs;
    real *head = (real *)(sines + pairs);
    make_inv_freqs(inv_freqs, angles);
    for (int64_t item = begin; item < end; item++) {
        int64_t batch = item / blocks, first = item % blocks * MTL_ROPE_BLOCK;
        for (int64_t time = first; time < first + MTL_ROPE_BLOCK && time < args->time; time++) {
            angle_real position = (angle_real)mtl_rope_position(angles, batch, time) * (angle_real)angles->scale;
            for (int64_t i = 0; i < pairs; i++) {
                cosines[i] = angle_cos(position * inv_freqs[i]);
                sines[i] = angle_sin(position * inv_freqs[i]);
            }
            for (const mtl_rope_side *side = args->side; side < args->side + args->sides; side++) {
                const char *x = side->x.data + batch * side->x_batch_stride + time * side->x_time_stride;
                char *out = side->out.data + batch * side->out_batch_stride + time * side->out_time_stride;
                mtl_cursor at;
                mtl_cursor_seek(&at, &side->heads, 0);
                for (int64_t i = 0; i < side->heads.count; i++, mtl_cursor_next(&at)) {
                    bool as_it_is = !args->normed && side->x.dtype == side->out.dtype;
                    read_row(head, x + at.offset[MTL_ROPE_X], side->x, as_it_is ? angles->dims : args->head_dim);
                    if (args->normed) norm_head(head, args->head_dim, side->weight, args->eps);
                    turn_head(head, angles, cosines, sines);
                    if (as_it_is) copy_rest(out + at.offset[MTL_ROPE_OUT], x + at.offset[MTL_ROPE_X], side, angles->dims, args->head_dim);
                    write_row(out + at.offset[MTL_ROPE_OUT], side->out, head, as_it_is ? angles->dims : args->head_dim);
                }
            }
        }
    }
}
