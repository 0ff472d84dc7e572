// Attention on Hopper with key masks and boolean masks. SPDX-License-Identifier: MIT
#include "cuda/attention_hopper.cuh"

ATTENTION_KERNELS(attention_masked_f16, __half, HIDDEN)
ATTENTION_KERNELS(attention_masked_bf16, __nv_bfloat16, HIDDEN)
