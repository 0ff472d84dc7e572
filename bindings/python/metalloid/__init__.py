"""Metalloid: fused transformer kernels, the operations of ``mlx.core.fast`` on Linux.

Arrays are NumPy's, PyTorch's, or any other library's with ``__dlpack__``; results come in the library of the first
array. All operations stand here; ``metalloid.fast`` holds those that ``mlx.core.fast`` has, with its signatures.
"""

from metalloid import fast
from metalloid._kernel import cuda_kernel, metal_kernel, precompiled_cuda_kernel
from metalloid._native import (
    __version__,
    add_layer_norm,
    add_rms_norm,
    cpu_isa,
    cross_entropy,
    gated_delta_update,
    geglu,
    get_num_threads,
    kv_cache_sdpa_update,
    layer_norm,
    qk_norm_rope,
    rms_norm,
    rope,
    scaled_dot_product_attention,
    set_num_threads,
    swiglu,
)

__all__ = [
    "__version__",
    "add_layer_norm",
    "add_rms_norm",
    "cpu_isa",
    "cross_entropy",
    "cuda_kernel",
    "fast",
    "gated_delta_update",
    "geglu",
    "get_num_threads",
    "kv_cache_sdpa_update",
    "layer_norm",
    "metal_kernel",
    "precompiled_cuda_kernel",
    "qk_norm_rope",
    "rms_norm",
    "rope",
    "scaled_dot_product_attention",
    "set_num_threads",
    "swiglu",
]
