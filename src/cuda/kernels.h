/* The CUDA backend: its entry points, and the choice between it and the CPU. SPDX-License-Identifier: MIT */
#ifndef METALLOID_CUDA_KERNELS_H
#define METALLOID_CUDA_KERNELS_H

#include "core/context.h"
#include "core/operations.h"

/* The number of devices; 0 with the reason in `*why` where there is no driver or it has none. */
int mtl_cuda_device_count(const char **why);
void mtl_cuda_device_in_words(int device, char *words, size_t size); /* "NVIDIA H200, compute capability 9.0" */

/* Entry points take what the CPU's take. */
metalloid_status mtl_cuda_rms_norm(const metalloid_context *context, const char *op, const mtl_norm_args *args);
metalloid_status mtl_cuda_layer_norm(const metalloid_context *context, const char *op, const mtl_norm_args *args);
metalloid_status mtl_cuda_swiglu(const metalloid_context *context, const char *op, const mtl_gated_args *args);
metalloid_status mtl_cuda_geglu(const metalloid_context *context, const char *op, const mtl_gated_args *args);
metalloid_status mtl_cuda_rope(const metalloid_context *context, const char *op, const mtl_rope_args *args);
metalloid_status mtl_cuda_attention(const metalloid_context *context, const char *op, const mtl_attention_args *args);
metalloid_status mtl_cuda_cross_entropy(const metalloid_context *context, const char *op,
                                        const mtl_cross_entropy_args *args);
metalloid_status mtl_cuda_gated_delta(const metalloid_context *context, const char *op,
                                      const mtl_gated_delta_args *args);

#endif
