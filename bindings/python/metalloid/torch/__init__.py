"""Metalloid for PyTorch: every operation as an operator, torch.ops.metalloid.*, that autograd,
torch.compile(fullgraph=True), torch.export, torch.func and torch.autocast know, on the CPU and on CUDA devices, there
on the current stream.

The functions take tensors alone and have no `out`; otherwise their names and arguments are those of `metalloid`. A
call that has nothing for PyTorch's dispatcher to do (no gradient, mode, transform or autocast) goes around it.
"""

from metalloid.torch._attention import kv_cache_sdpa_update, scaled_dot_product_attention
from metalloid.torch._cross_entropy import cross_entropy
from metalloid.torch._gated import geglu, swiglu
from metalloid.torch._gated_delta import gated_delta_update
from metalloid.torch._modules import LayerNorm, RMSNorm
from metalloid.torch._norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from metalloid.torch._rope import qk_norm_rope, rope

__all__ = [
    "LayerNorm",
    "RMSNorm",
    "add_layer_norm",
    "add_rms_norm",
    "cross_entropy",
    "gated_delta_update",
    "geglu",
    "kv_cache_sdpa_update",
    "layer_norm",
    "qk_norm_rope",
    "rms_norm",
    "rope",
    "scaled_dot_product_attention",
    "swiglu",
]
