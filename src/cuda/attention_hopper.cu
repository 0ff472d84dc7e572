// Attention on Hopper where causal and window alone hide keys. SPDX-License-Identifier: MIT
#include "cuda/attention_hopper.cuh"

ATTENTION_KERNELS(attention_f16, __half, PLAIN)
ATTENTION_KERNELS(attention_bf16, __nv_bfloat16, PLAIN)
