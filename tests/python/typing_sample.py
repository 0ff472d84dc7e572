"""What type checkers must accept, and how results are typed; checked by `make lint`, never run."""

import metalloid
import metalloid.fast
import metalloid.torch as mt
import metalloid.transformers
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM
from typing_extensions import assert_type

x: NDArray[np.float32] = np.ones((2, 3, 4, 8), np.float32)
y: NDArray[np.float32] = metalloid.rms_norm(x, None, 1e-5)
pair: tuple[NDArray[np.float32], NDArray[np.float32]] = metalloid.add_rms_norm(x, x, None, 1e-5)
out: NDArray[np.float32] = metalloid.fast.rope(x, 8, traditional=False, base=1e4, scale=1.0, offset=np.array([1, 2]))
attended: NDArray[np.float32] = metalloid.fast.scaled_dot_product_attention(x, x, x, scale=0.5, mask="causal")
states: list[NDArray[np.float32]] = metalloid.fast.gated_delta_update(x, x, x, x[..., 0], x[..., 0])

t = torch.ones(2, 3, 4, 8)
assert_type(metalloid.rms_norm(t, t[0, 0, 0], 1e-5), torch.Tensor)
assert_type(metalloid.rms_norm(x, None, 1e-5, out=t), torch.Tensor)
assert_type(
    metalloid.scaled_dot_product_attention(t, t, t, scale=1, return_logsumexp=True), tuple[torch.Tensor, torch.Tensor]
)
assert_type(mt.rms_norm(t, None, 1e-5), torch.Tensor)
assert_type(mt.layer_norm(t, t, None, 1e-5), torch.Tensor)
assert_type(mt.add_rms_norm(t, t, None, 1e-5), tuple[torch.Tensor, torch.Tensor])
assert_type(mt.rope(t, 8, traditional=True, base=None, scale=1.0, offset=t, freqs=t), torch.Tensor)
assert_type(mt.geglu(t, t, approximate="tanh"), torch.Tensor)
assert_type(mt.scaled_dot_product_attention(t, t, t, scale=1.0, mask=t), torch.Tensor)
assert_type(
    mt.scaled_dot_product_attention(t, t, t, scale=1.0, return_logsumexp=True), tuple[torch.Tensor, torch.Tensor]
)
assert_type(mt.cross_entropy(t, t, ignore_index=-100), torch.Tensor)
assert_type(mt.gated_delta_update(t, t, t, t, t), list[torch.Tensor])
assert_type(mt.RMSNorm(8).forward(t), torch.Tensor)  # a module's call is Any to PyTorch

report = metalloid.transformers.patch(LlamaForCausalLM(LlamaConfig()))
names: tuple[str, ...] = report.swapped["norms"]
