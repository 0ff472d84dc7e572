/* The gated delta rule (Yang et al. 2024, arXiv:2412.06464), a step at a time. SPDX-License-Identifier: MIT
 *
 *   S <- S gamma_t;  S <- S + beta_t (v_t - S k_t) k_t^T;  out_t = S q_t
 *
 * A block of rows of S stays in scratch over all steps. A masked step is not read at all. */
#include "cpu/plain/real.h"

static char *place(mtl_strided operand, int64_t i, int64_t j, int64_t k) {
    return operand.data + i * operand.stride[0] + j * operand.stride[1] + k * operand.stride[2];
}

static mtl_row features(mtl_strided operand) { return (mtl_row){operand.data, operand.stride[3], operand.dtype}; }

/* s: a row of S; returns that of out. */
static real step_row(real *s, const real *q, const real *k, const real *gamma, real beta, real v, int64_t key_dim) {
    double predicted = 0, out = 0;
    for (int64_t i = 0; i < key_dim; i++) {
        s[i] *= gamma[i];
        predicted += (double)s[i] * (double)k[i];
    }
    real delta = beta * (real)((double)v - predicted);
    for (int64_t i = 0; i < key_dim; i++) {
        s[i] += delta * k[i];
        out += (double)s[i] * (double)q[i];
    }
    return (real)out;
}

void REAL(mtl_plain_gated_delta)(const void *arguments, int64_t begin, int64_t end, void *scratch) {
    const mtl_gated_delta_args *args = arguments;
    int64_t key_dim = args->key_dim, blocks = mtl_gated_delta_blocks(args), all = args->batch * args->v_heads * blocks;
    int64_t last = end * args->blocks < all ? end * args->blocks : all;
    real *q = scratch, *k = q + key_dim, *gamma = k + key_dim, *state = gamma + key_dim;
    real v[MTL_GATED_DELTA_ROWS], out[MTL_GATED_DELTA_ROWS];
    for (int64_t block = begin * args->blocks; block < last; block++) {
        int64_t first = block % blocks * MTL_GATED_DELTA_ROWS, head = block / blocks % args->v_heads,
                batch = block / blocks / args->v_heads;
        int64_t rows = args->value_dim - first < MTL_GATED_DELTA_ROWS ? args->value_dim - first : MTL_GATED_DELTA_ROWS;
        int64_t k_head = head / (args->v_heads / args->k_heads);
        for (int64_t row = 0; row < rows; row++) {
            real *s = state + row * key_dim;
            if (args->initial_state.data) {
                read_row(s, place(args->initial_state, batch, head, first + row), features(args->initial_state),
                         key_dim);
            } else {
                for (int64_t i = 0; i < key_dim; i++) s[i] = 0;
            }
        }
        for (int64_t time = 0; time < args->time; time++) {
            if (args->mask.data && mtl_load_integer(place(args->mask, batch, time, 0), args->mask.dtype) == 0) {
                for (int64_t row = 0; row < rows; row++) out[row] = 0;
            } else {
                read_row(q, place(args->q, batch, time, k_head), features(args->q), key_dim);
                read_row(k, place(args->k, batch, time, k_head), features(args->k), key_dim);
                read_row(gamma, place(args->gamma, batch, time, head), features(args->gamma), key_dim);
                read_row(v, place(args->v, batch, time, head) + first * args->v.stride[3], features(args->v), rows);
                real beta = real_load(place(args->beta, batch, time, head), args->beta.dtype);
                for (int64_t row = 0; row < rows; row++)
                    out[row] = step_row(state + row * key_dim, q, k, gamma, beta, v[row], key_dim);
            }
            write_row(place(args->out, batch, time, head) + first * args->out.stride[3], features(args->out), out,
                      rows);
        }
        for (int64_t row = 0; row < rows; row++) {
            write_row(place(args->state, batch, head, first + row), features(args->state), state + row * key_dim,
                      key_dim);
        }
    }
}
