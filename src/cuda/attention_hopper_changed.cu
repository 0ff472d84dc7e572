// Attention on Hopper with additive masks, caps and any scale. SPDX-License-Identifier: MIT
#include "cuda/attention_hopper.cuh"

ATTENTION_KERNELS(attention_changed_f16, __half, CHANGED)
ATTENTION_KERNELS(attention_changed_bf16, __nv_bfloat16, CHANGED)
