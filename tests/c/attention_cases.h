/* What the tests of attention and kv_cache_sdpa_update share: softmax(scale Q K^T + mask) V in long double, with every score stored.
 * SPDX-License-Identifier: MIT */
#ifndef METALLOID_TESTS_ATTENTION_CASES_H
#define METALLOID_TESTS_ATTENTION_CASES_H

#include "every_operation.h"

#include <math.h>
#include <string.h>

typedef struct attention_case {
    int64_t batch, q_heads, kv_heads, q_len, kv_len, head_dim, value_dim;
    double scale, softcap;
    bool causal;
    int64_t causal_offset, window;
    const double *q, *k, *v; /* {B, N, T, D}, row-major */
    const double *added;     /* {B, N_q, T_q, T_kv}, -inf hides; NULL: none */
    const double *key_mask;  /* {B, T_kv}; NULL: none */
    const double *sinks;     /* {N_q}; NULL: none */
    double *out, *logsumexp; /* results */
    double *v_size;          /* {B, N_q, T_q}: the largest |v| that the query sees */
    double *score_size;      /* {B, N_q, T_q}: the largest |score| that it sees, sink included */
    double *term_size;       /* {B, N_q, T_q}: likewise of the sums of |terms| that the scores are */
} attention_case;

static inline bool sees(const attention_case *c, int64_t b, int64_t h, int64_t i, int64_t j) {
    if (c->key_mask && c->key_mask[b * c->kv_len + j] == 0) return false;
    if (c->added && c->added[((b * c->q_heads + h) * c->q_len + i) * c->kv_len + j] == -(double)INFINITY) return false;
    long double offset =
        (long double)(c->causal_offset == METALLOID_CAUSAL_OFFSET_DEFAULT ? c->kv_len - c->q_len : c->causal_offset);
    if ((c->causal || c->window) && j > i + offset) return false;
    return !c->window || j > i + offset - c->window;
}

static inline void reference_attention(attention_case *c) {
    int64_t rows = c->batch * c->q_heads * c->q_len;
    c->out = new_doubles(rows * c->value_dim);
    c->logsumexp = new_doubles(rows);
    c->v_size = new_doubles(rows);
    c->score_size = new_doubles(rows);
    c->term_size = new_doubles(rows);
    double *score = new_doubles(c->kv_len);
    long double sum[1024];
    assert_true(c->value_dim <= 1024);
    for (int64_t row = 0; row < rows; row++) {
        int64_t b = row / c->q_len / c->q_heads, h = row / c->q_len % c->q_heads, i = row % c->q_len;
        int64_t kv = b * c->kv_heads + h / (c->q_heads / c->kv_heads);
        const double *q = c->q + row * c->head_dim, *added = c->added ? c->added + row * c->kv_len : NULL;
        long double most = c->sinks ? c->sinks[h] : -(long double)INFINITY, total = 0;
        c->score_size[row] = c->term_size[row] = c->sinks ? fabs(c->sinks[h]) : 0;
        for (int64_t j = 0; j < c->kv_len; j++) {
            if (!sees(c, b, h, i, j)) continue;
            const double *k = c->k + (kv * c->kv_len + j) * c->head_dim;
            long double dot = 0;
            double terms = added ? fabs(added[j]) : 0;
            for (int64_t d = 0; d < c->head_dim; d++) {
                dot += (long double)q[d] * k[d];
                terms += fabs(c->scale * q[d] * k[d]);
            }
            dot *= c->scale;
            if (c->softcap > 0) dot = c->softcap * tanhl(dot / c->softcap);
            if (added) dot += added[j];
            score[j] = (double)dot;
            most = dot > most || isnan(dot) ? dot : most;
            c->score_size[row] = fmax(c->score_size[row], fabs((double)dot));
            c->term_size[row] = fmax(c->term_size[row], terms);
        }
        for (int64_t d = 0; d < c->value_dim; d++) sum[d] = 0;
        bool any = false;
        for (int64_t j = 0; j < c->kv_len; j++) {
            if (!sees(c, b, h, i, j)) continue;
            any = true;
            const double *v = c->v + (kv * c->kv_len + j) * c->value_dim;
            long double p = expl(score[j] - most);
            total += p;
            for (int64_t d = 0; d < c->value_dim; d++) sum[d] += p * v[d];
            c->v_size[row] = fmax(c->v_size[row], largest(v, c->value_dim));
        }
        if (c->sinks) total += expl(c->sinks[h] - most);
        for (int64_t d = 0; d < c->value_dim; d++) c->out[row * c->value_dim + d] = any ? (double)(sum[d] / total) : 0;
        c->logsumexp[row] = any || c->sinks ? (double)(most + logl(total)) : -(double)INFINITY;
    }
}

/* Scores that a large finite mask lifts to thousands are known to a rounding of that, and so are the probabilities. */
static inline double *attention_slack(const attention_case *c, bool in_double) {
    int64_t rows = c->batch * c->q_heads * c->q_len;
    double *slack = new_doubles(rows * c->value_dim);
    if (!c->added || largest(c->added, rows * c->kv_len) < 1000) return slack;
    for (int64_t i = 0; i < rows * c->value_dim; i++) {
        int64_t row = i / c->value_dim;
        slack[i] = 2 * c->score_size[row] * (in_double ? 0x1p-53 : 0x1p-24) * c->v_size[row];
    }
    return slack;
}

/* A length at or around the edges of blocks, or any. */
static inline int64_t random_attention_length(int64_t least, int64_t most) {
    static const int64_t edges[] = {1, 2, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257};
    int64_t length = one_in(2) ? edges[random_int(0, 15)] : random_int(least, most);
    return length > most ? most : length < least ? least : length;
}

static inline int64_t random_head_dim(void) {
    static const int64_t usual[] = {64, 80, 96, 128, 192};
    return one_in(4) ? usual[random_int(0, 4)] : random_int(1, 40);
}

#endif
