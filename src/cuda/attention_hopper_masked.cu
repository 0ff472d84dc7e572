// Attention on Hopper with any mask, cap and scale. SPDX-License-Identifier: MIT
#include "cuda/attention_hopper.cuh"

ATTENTION_KERNELS(attention_masked_f16, __half, true)
ATTENTION_KERNELS(attention_masked_bf16, __nv_bfloat16, true)
