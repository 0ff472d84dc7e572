"""swiglu and geglu. Gradients are plain formulas of PyTorch, that of gelu its own."""

from typing import Literal

import torch
from torch import Tensor

import metalloid._native as native
from metalloid.torch._register import define, like, promote, wide


def _swiglu_fake(gate, up):
    return gate.new_empty(gate.shape, dtype=promote(gate.dtype, up))


def _swiglu_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx, g):
    gate, up = ctx.saved_tensors
    dtype = wide(gate, up)
    g, x = g.to(dtype), gate.to(dtype)
    sigmoid = torch.sigmoid(x)
    dgate = g * up * sigmoid * (1 + x * (1 - sigmoid))
    return like(dgate, gate), like(g * x * sigmoid, up)


_swiglu_op = define(
    "swiglu(Tensor gate, Tensor up) -> Tensor", native.swiglu, _swiglu_fake, _swiglu_context, _swiglu_backward
)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, where silu(x) = x / (1 + exp(-x)) (Shazeer 2020).

    gate, up: floating, same shape, any rank. Returns a tensor of that shape, both promoted.

    Raises ValueError for a dtype or shape that is refused.

    >>> swiglu(torch.tensor([0.0, 1.0]), torch.tensor([5.0, 2.0]))
    tensor([0.0000, 1.4621])
    """
    return _swiglu_op(gate, up)


def _geglu(gate: Tensor, up: Tensor, approximate: Literal["none", "tanh"] = "none") -> Tensor:
    return native.geglu(gate, up, approximate=approximate)


def _geglu_fake(gate, up, approximate="none"):
    return gate.new_empty(gate.shape, dtype=promote(gate.dtype, up))


def _geglu_context(ctx, inputs, output):
    gate, up, ctx.approximate = inputs
    ctx.save_for_backward(gate, up)


def _geglu_backward(ctx, g):
    gate, up = ctx.saved_tensors
    dtype = wide(gate, up)
    g, x = g.to(dtype), gate.to(dtype)
    dgate = torch.ops.aten.gelu_backward(g * up, x, approximate=ctx.approximate)
    return like(dgate, gate), like(g * torch.nn.functional.gelu(x, approximate=ctx.approximate), up), None


_geglu_op = define(
    'geglu(Tensor gate, Tensor up, str approximate="none") -> Tensor',
    _geglu,
    _geglu_fake,
    _geglu_context,
    _geglu_backward,
)


def geglu(gate: Tensor, up: Tensor, *, approximate: Literal["none", "tanh"] = "none") -> Tensor:
    """gelu(gate) * up; gelu(x) is x/2 (1 + erf(x / sqrt 2)), or with approximate="tanh" that of tanh (Shazeer 2020).

    gate, up: floating, same shape, any rank. Returns a tensor of that shape, both promoted.

    Raises ValueError for a dtype, shape or value that is refused.

    >>> geglu(torch.tensor([0.0, 1.0]), torch.tensor([5.0, 2.0]))
    tensor([0.0000, 1.6827])
    """
    return _geglu_op(gate, up, approximate)
