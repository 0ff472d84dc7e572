"""How results on tensors of PyTorch are typed: read by tools/check_types, never run."""

import metalloid
import metalloid.torch as mt
import numpy as np
import torch
from typing_extensions import assert_type

t = torch.ones(2, 3, 4, 8)
Pair = tuple[torch.Tensor, torch.Tensor]

assert_type(metalloid.rms_norm(t, t[0, 0, 0], 1e-5), torch.Tensor)
assert_type(metalloid.rms_norm(np.ones(8), None, 1e-5, out=t), torch.Tensor)
assert_type(metalloid.scaled_dot_product_attention(t, t, t, scale=1, return_logsumexp=True), Pair)
assert_type(mt.rms_norm(t, None, 1e-5, dtype=torch.bfloat16), torch.Tensor)
assert_type(mt.layer_norm(t, t, None, 1e-5), torch.Tensor)
assert_type(mt.add_rms_norm(t, t, None, 1e-5), Pair)
assert_type(mt.rope(t, 8, traditional=True, base=None, scale=1.0, offset=t, freqs=t), torch.Tensor)
assert_type(mt.geglu(t, t, approximate="tanh"), torch.Tensor)
assert_type(mt.scaled_dot_product_attention(t, t, t, scale=1.0, mask=t), torch.Tensor)
assert_type(mt.scaled_dot_product_attention(t, t, t, scale=1.0, return_logsumexp=True), Pair)
assert_type(mt.cross_entropy(t, t, ignore_index=-100), torch.Tensor)
assert_type(mt.gated_delta_update(t, t, t, t, t), list[torch.Tensor])
assert_type(mt.RMSNorm(8).forward(t), torch.Tensor)  # a module's call is Any to PyTorch
