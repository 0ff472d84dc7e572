/* The gated delta rule (Yang et al. 2024, arXiv:2412.06464), a step at a time. SPDX-License-Identifier: MIT
 *
 *   S <- S gamma_t;  S <- S + beta_t (v_t - S k_t) k_t^T;  out_t = S q_t
 *
 * One pass reads a row s of S, decays it and forms s.k and s.q together; with delta = beta (v - s.k), out = s.q + delta (k.q), and
 * a second pass over the row, now in the cache, adds delta k. Four rows go together, so that k, q and gamma are loaded once for
 * them. A block of rows stays in scratch over all steps: from memory S is read once and written once. */
#include "cpu/simd/vec.h"

static const char *step(mtl_strided operand, int64_t batch, int64_t time, int64_t head) {
    return operand.data + batch * operand.stride[0] + time * operand.stride[1] + head * operand.stride[2];
}

static mtl_row features(mtl_strided operand) { return (mtl_row){operand.data, operand.stride[3], operand.dtype}; }

static const char *state_row(mtl_strided state, int64_t batch, int64_t head, int64_t row) {
    return state.data + batch * state.stride[0] + head * state.stride[1] + row * state.stride[2];
}

/* `rows` rows of `padded` reals; what lies between the key dimension and the padding is 0 in q and k, and so stays out of all sums. */
INLINE void step_rows(real *state, int64_t padded, int rows, const real *q, const real *k, const real *gamma, real kq,
                      real beta, const real *v, real *out) {
    vec with_k[4], with_q[4];
    for (int r = 0; r < rows; r++) with_k[r] = with_q[r] = vec_zero();
    for (int64_t i = 0; i < padded; i += LANES) {
        vec k_lanes = vec_load(k + i), q_lanes = vec_load(q + i), decay = vec_load(gamma + i);
        for (int r = 0; r < rows; r++) {
            vec s = vec_load(state + r * padded + i) * decay;
            with_k[r] = vec_fma(s, k_lanes, with_k[r]);
            with_q[r] = vec_fma(s, q_lanes, with_q[r]);
        }
    }
    vec delta[4];
    for (int r = 0; r < rows; r++) {
        real d = beta * (v[r] - vec_sum(with_k[r]));
        out[r] = vec_sum(with_q[r]) + d * kq;
        delta[r] = vec_set(d);
    }
    for (int64_t i = 0; i < padded; i += LANES) {
        vec k_lanes = vec_load(k + i), decay = vec_load(gamma + i);
        for (int r = 0; r < rows; r++) {
            real *s = state + r * padded + i;
            vec_store(s, vec_fma(delta[r], k_lanes, vec_load(s) * decay));
        }
    }
}

void SIMD(gated_delta)(const void *arguments, int64_t begin, int64_t end, void *scratch) {
    const mtl_gated_delta_args *args = arguments;
    int64_t key_dim = args->key_dim, padded = (key_dim + LANES - 1) / LANES * LANES;
    int64_t blocks = (args->value_dim + MTL_GATED_DELTA_ROWS - 1) / MTL_GATED_DELTA_ROWS;
    real *q = scratch, *k = q + padded, *gamma = k + padded, *state = gamma + padded;
    real v[MTL_GATED_DELTA_ROWS], out[MTL_GATED_DELTA_ROWS];
    for (int64_t i = key_dim; i < padded; i++) q[i] = k[i] = gamma[i] = 0;
    for (int64_t item = begin; item < end; item++) {
        int64_t first = item % blocks * MTL_GATED_DELTA_ROWS, head = item / blocks % args->v_heads,
                batch = item / blocks / args->v_heads;
        int64_t rows = args->value_dim - first < MTL_GATED_DELTA_ROWS ? args->value_dim - first : MTL_GATED_DELTA_ROWS;
        int64_t k_head = head / (args->v_heads / args->k_heads);
        for (int64_t row = 0; row < rows; row++) {
            real *s = state + row * padded;
            for (int64_t i = args->initial_state.data ? key_dim : 0; i < padded; i++) s[i] = 0;
            if (args->initial_state.data) {
                read_row(s, state_row(args->initial_state, batch, head, first + row), features(args->initial_state),
                         key_dim);
            }
        }
        for (int64_t time = 0; time < args->time; time++) {
            bool masked = args->mask.data && mtl_load_integer(step(args->mask, batch, time, 0), args->mask.dtype) == 0;
            if (masked) {
                memset(out, 0, sizeof out);
            } else {
                read_row(q, step(args->q, batch, time, k_head), features(args->q), key_dim);
                read_row(k, step(args->k, batch, time, k_head), features(args->k), key_dim);
                read_row(gamma, step(args->gamma, batch, time, head), features(args->gamma), key_dim);
                read_row(v, step(args->v, batch, time, head) + first * args->v.stride[3], features(args->v), rows);
                real beta = real_load(step(args->beta, batch, time, head), args->beta.dtype);
                vec products = vec_zero();
                for (int64_t i = 0; i < padded; i += LANES)
                    products = vec_fma(vec_load(k + i), vec_load(q + i), products);
                real kq = vec_sum(products);
                int64_t row = 0;
                for (; row + 4 <= rows; row += 4)
                    step_rows(state + row * padded, padded, 4, q, k, gamma, kq, beta, v + row, out + row);
                for (; row < rows; row++)
                    step_rows(state + row * padded, padded, 1, q, k, gamma, kq, beta, v + row, out + row);
            }
            write_row((char *)step(args->out, batch, time, head) + first * args->out.stride[3], features(args->out),
                      out, rows);
        }
        for (int64_t row = 0; row < rows; row++) {
            write_row((char *)state_row(args->state, batch, head, first + row), features(args->state),
                      state + row * padded, key_dim);
        }
    }
}
