/* Pair i turns by position * scale * inv_freq[i]; with qk_norm_rope after rms_norm of the head. SPDX-License-Identifier: MIT
 *
 * The angle is formed in an arithmetic wider than that of the values (double for float, long double for double) and goes to the C
 * library's cos and sin, which reduce it exactly: at position 1e6 float32's angle would be off by 3e-2. A block of time steps has
 * its cosines and sines made once for all heads, and for the whole batch where its rows share their positions. */
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
        angle_real freq =
            (angle_real)mtl_load_double(angles->freqs.data + i * angles->freqs.stride, angles->freqs.dtype);
        inv_freqs[i] = angles->inverse ? freq : 1 / freq;
    }
}

/* A time step's cosines, then its sines. */
static void make_turns(angle_real *cosines, const mtl_rope_angles *angles, const angle_real *inv_freqs,
                       int64_t position) {
    int64_t pairs = angles->dims / 2;
    angle_real *sines = cosines + pairs, scaled = (angle_real)position * (angle_real)angles->scale;
    for (int64_t i = 0; i < pairs; i++) {
        angle_real angle = scaled * inv_freqs[i];
        cosines[i] = angle_cos(angle);
        sines[i] = angle_sin(angle);
        if (isfinite(angle)) continue;
        double cosine, sine;
        mtl_rope_turn_far(angles, i, position, &cosine, &sine);
        cosines[i] = (angle_real)cosine;
        sines[i] = (angle_real)sine;
    }
}

static void norm_head(real *head, int64_t length, mtl_row weight, double eps) {
    double squares = 0;
    for (int64_t i = 0; i < length; i++) squares += (double)head[i] * (double)head[i];
    double inverse = 1 / sqrt(squares / (double)length + eps);
    for (int64_t i = 0; i < length; i++) {
        head[i] = (real)((double)head[i] * inverse) *
                  (weight.data ? real_load(weight.data + i * weight.stride, weight.dtype) : 1);
    }
}

static void turn_head(real *head, const mtl_rope_angles *angles, const angle_real *cosines) {
    int64_t pairs = angles->dims / 2;
    const angle_real *sines = cosines + pairs;
    for (int64_t i = 0; i < pairs; i++) {
        if (sines[i] == 0) continue; /* an infinite partner has no say in an unrotated pair */
        real *x1 = angles->traditional ? &head[2 * i] : &head[i], *x2 = angles->traditional ? x1 + 1 : x1 + pairs;
        angle_real turned1 = *x1 * cosines[i] - *x2 * sines[i], turned2 = *x1 * sines[i] + *x2 * cosines[i];
        *x1 = (real)turned1;
        *x2 = (real)turned2;
    }
}

static void do_head(const mtl_rope_args *args, const mtl_rope_side *side, const char *x, char *out,
                    const angle_real *turns, real *head) {
    int64_t length = args->head_dim, size = mtl_dtype_size(side->x.dtype);
    if (!args->normed && side->x.dtype == side->out.dtype) {
        length = args->angles.dims; /* what lies past dims keeps its bits, those of a NaN too */
        for (int64_t i = length; x != out && i < args->head_dim; i++) {
            memcpy(out + i * side->out.stride, x + i * side->x.stride, (size_t)size);
        }
    }
    read_row(head, x, side->x, length);
    if (args->normed) norm_head(head, length, side->weight, args->eps);
    turn_head(head, &args->angles, turns);
    write_row(out, side->out, head, length);
}

void REAL(mtl_plain_rope)(const void *arguments, int64_t begin, int64_t end, void *scratch) {
    const mtl_rope_args *args = arguments;
    const mtl_rope_angles *angles = &args->angles;
    angle_real *inv_freqs = scratch, *turns = inv_freqs + angles->dims / 2;
    real *head = (real *)(turns + mtl_rope_most_steps(args) * angles->dims);
    make_inv_freqs(inv_freqs, angles);
    int64_t made = -1; /* the block whose turns are there */
    for (int64_t item = begin; item < end; item++) {
        mtl_rope_block block = mtl_rope_block_at(args, item);
        for (int64_t step = 0; block.first != made && step < block.steps; step++) {
            make_turns(turns + step * angles->dims, angles, inv_freqs,
                       mtl_rope_position(angles, block.batch, block.first + step));
        }
        made = mtl_rope_batch_shares(angles) ? block.first : -1;
        for (const mtl_rope_side *side = args->side; side < args->side + args->sides; side++) {
            if (side->heads.count == 0) continue;
            for (int64_t step = 0; step < block.steps; step++) {
                int64_t time = block.first + step;
                const char *x = side->x.data + block.batch * side->x_batch_stride + time * side->x_time_stride;
                char *out = side->out.data + block.batch * side->out_batch_stride + time * side->out_time_stride;
                mtl_cursor at;
                mtl_cursor_seek(&at, &side->heads, 0);
                for (int64_t i = 0; i < side->heads.count; i++, mtl_cursor_next(&at)) {
                    do_head(args, side, x + at.offset[MTL_ROPE_X], out + at.offset[MTL_ROPE_OUT],
                            turns + step * angles->dims, head);
                }
            }
        }
    }
}
