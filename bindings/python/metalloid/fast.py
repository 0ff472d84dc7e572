"""The functions of ``mlx.core.fast``, with its signatures: ``mx.fast.X(...)`` becomes ``metalloid.fast.X(...)``."""

from metalloid._kernel import cuda_kernel, metal_kernel, precompiled_cuda_kernel
from metalloid._native import (
    cross_entropy,
    gated_delta_update,
    layer_norm,
    rms_norm,
    rope,
    scaled_dot_product_attention,
)

__all__ = [
    "cross_entropy",
    "cuda_kernel",
    "gated_delta_update",
    "layer_norm",
    "metal_kernel",
    "precompiled_cuda_kernel",
    "rms_norm",
    "rope",
    "scaled_dot_product_attention",
]
