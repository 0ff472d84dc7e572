/* Loops over one float32 row without checks, threads or a call's arguments: what a call's overhead is measured against.
 * SPDX-License-Identifier: MIT */
#ifndef METALLOID_BARE_H
#define METALLOID_BARE_H

#include <stddef.h>

void bare_rms_norm(size_t length, const float *x, const float *weight, float eps, float *out);
void bare_add_rms_norm(size_t length, const float *x, const float *residual, const float *weight, float eps, float *sum,
                       float *out);
void bare_layer_norm(size_t length, const float *x, const float *weight, const float *bias, float eps, float *out);
void bare_soft_sign(size_t length, const float *x, float *out);
void bare_swiglu(size_t length, const float *gate, const float *up, float *out);

#endif
