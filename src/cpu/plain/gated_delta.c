/* The gated delta rule (Yang et al. 2024, arXiv:2412.06464), a step at a time. SPDX-License-Identifier: MIT
 *
 *   S <- S gamma_t;  S <- S + beta_t (v_t - S k_t) k_t^T;  out_t = S q_t
 *
 * A block of rows of S stays in scratch over all steps. A masked step is not read at all. */
#include "cpu/plain/real.h"

static const char *step(mtl_strided operand, int64_t batch, int64_t time, int64_t head) {
    return operand.data + batch * operand.stride[0] + time * operand.stride[1] + head * operand.stride[2];
}

static void read_features(real *to, const char *from, mtl_strided operand, int64_t length) {
    for (int64_t i = 0; i < length; i++) to[i] = real_load(from + i * operand.stride[3], operand.dtype);
}

static const char *state_row(mtl_strided state, int64_t batch, int64_t head, int64_t row) {
    return state.data + batch * state.stride[0] + head * state.stride[1] + row * state.stride[2];
}

void REAL(mtl_plain_gated_delta)(const void *arguments, int64_t begin, int64_t end, void *scratch) {
    const mtl_gated_delta_args *args = arguments;
    int64_t key_dim = args->key_dim, blocks = (args->value_dim + MTL_GATED_DELTA_ROWS - 1) / MTL_GATED_DELTA_ROWS;
    real *q = scratch, *k = q + key_dim, *gamma = k + key_dim, *state = gamma + key_dim;
    for (int64_t item = begin; item < end; item++) {
        int64_t first = item % blocks * MTL_GATED_DELTA_ROWS, head = item / blocks % args->v_heads, batch = item / blocks / args->v_heads;
        int64_t rows = args->value_dim - first < MTL_GATED_DELTA_ROWS ? args->value_dim - first : MTL_GATED_DELTA_ROWS;
        int64_t k_head = head / (args->v_heads / args->k_heads);
        for (int64_t row = 0; row < rows; row++) {
            for (int64_t i = 0; i < key_dim; i++) state[row * key_dim + i] = 0;
            if (!args->initial_state.data) continue;
            read_features(state + row * key_dim, state_row(args->initial_state, batch, head, first + row), args->initial_state, key_dim);
        }
        for (int64_t time = 0; time < args->time; time++) {
            char *out = (char *)step(args->out, batch, time, head) + first * args->out.stride[3];
            if (args->mask.data && mtl_load_integer(args->mask.data + batch * args->mask.stride[0] + time * args->mask.stride[1], args->mask.dtype) == 0) {
                for (int64_t row = 0; row < rows; row++) real_store(out + row * args->out.stride[3], args->out.dtype, 0);
                continue;
            }
            read_features(q, step(args->q, batch, time, k_head), args->q, key_dim);
            read_features(k, step(args->k, batch, time, k_head), args->k, key_dim);
            read_features(gamma, step(args->gamma, batch, time, head), args->gamma, key_dim);
            const char *v = step(args->v, batch, time, head) + first * args->v.stride[3];
            real beta = real_load(step(args->beta, batch, time, head), args->beta.dtype);
            for (int64_t row = 0; row < rows; row++) {
                real *s = state + row * key_dim, predicted = 0, result = 0;
                for (int64_t i = 0; i < key_dim; i++) {
                    s[i] *= gamma[i];
                    predicted += s[i] * k[i];
                }
                real delta = beta * (real_load(v + row * args->v.stride[3], args->v.dtype) - predicted);
                for (int64_t i = 0; i < key_dim; i++) {
                    s[i] += delta * k[i];
                    result += s[i] * q[i];
                }
                real_store(out + row * args->out.stride[3], args->out.dtype, result);
            }
        }
        for (int64_t row = 0; row < rows; row++) {
            char *to = (char *)state_row(args->state, batch, head, first + row);
            for (int64_t i = 0; i < key_dim; i++) real_store(to + i * args->state.stride[3], args->state.dtype, state[row * key_dim + i]);
        }
    }
}
