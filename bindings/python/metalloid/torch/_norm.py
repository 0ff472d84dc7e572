"""rms_norm, layer_norm and both on the sum of two tensors. Gradients are plain formulas of PyTorch."""

import torch
from torch import Tensor

import metalloid._native as native
from metalloid.torch._register import define, like, promote, wide, widen


def _sum_of_rows(x: Tensor) -> Tensor:
    return x.sum(dim=tuple(range(x.ndim - 1))) if x.ndim > 1 else x


def rms_norm_gradient(g: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None]:
    """dx and dweight, all in one dtype."""
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    normal = x * scale
    gw = g if weight is None else g * weight
    dx = scale * (gw - normal * (gw * normal).mean(-1, keepdim=True))
    return dx, None if weight is None else _sum_of_rows(g * normal)


def layer_norm_gradient(
    g: Tensor, x: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """dx, dweight and dbias, all in one dtype."""
    x = x - x.mean(-1, keepdim=True)
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    normal = x * scale
    gw = g if weight is None else g * weight
    dx = scale * (gw - gw.mean(-1, keepdim=True) - normal * (gw * normal).mean(-1, keepdim=True))
    return dx, None if weight is None else _sum_of_rows(g * normal), _sum_of_rows(g)


def _layer_norm_dtype(dtype: torch.dtype, weight: Tensor | None, bias: Tensor | None) -> torch.dtype:
    return dtype if weight is None else promote(dtype, weight, bias)


# ---- rms_norm


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    if dtype is None:
        return native.rms_norm(x, weight, eps)
    return native.rms_norm(x, weight, eps, out=torch.empty(x.shape, dtype=dtype, device=x.device))


def _rms_norm_fake(x, weight, eps, dtype=None):
    return x.new_empty(x.shape, dtype=dtype or promote(x.dtype, weight))


def _rms_norm_context(ctx, inputs, output):
    x, weight, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)


def _rms_norm_backward(ctx, g):
    x, weight = ctx.saved_tensors
    dtype = wide(x, weight)
    dx, dweight = rms_norm_gradient(g.to(dtype), x.to(dtype), widen(weight, dtype), ctx.eps)
    return like(dx, x), like(dweight, weight), None, None


_rms_norm_op = define(
    "rms_norm(Tensor x, Tensor? weight, float eps, ScalarType? dtype=None) -> Tensor",
    _rms_norm,
    _rms_norm_fake,
    _rms_norm_context,
    _rms_norm_backward,
)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, dtype: torch.dtype | None = None) -> Tensor:
    """Root mean square norm over the last axis: x / sqrt(mean(x**2) + eps) * weight (Zhang and Sennrich 2019).

    x: floating, rank 1 or more. weight: floating, {length of the last axis}, or None. eps: finite, not negative.
    Returns a tensor of x's shape, of x's and weight's dtype promoted, or of the floating `dtype`.

    Raises ValueError for a dtype, rank, shape or value that is refused.

    >>> rms_norm(torch.tensor([[3.0, 4.0]]), None, 0.0)
    tensor([[0.8485, 1.1314]])
    """
    return _rms_norm_op(x, weight, eps, dtype)


# ---- layer_norm


def _layer_norm_fake(x, weight, bias, eps):
    return x.new_empty(x.shape, dtype=_layer_norm_dtype(x.dtype, weight, bias))


def _layer_norm_context(ctx, inputs, output):
    x, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias)


def _layer_norm_backward(ctx, g):
    x, weight, bias = ctx.saved_tensors
    dtype = wide(x, weight, bias)
    dx, dweight, dbias = layer_norm_gradient(g.to(dtype), x.to(dtype), widen(weight, dtype), ctx.eps)
    return like(dx, x), like(dweight, weight), like(dbias, bias), None


_layer_norm_op = define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    native.layer_norm,
    _layer_norm_fake,
    _layer_norm_context,
    _layer_norm_backward,
)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm over the last axis: (x - mean) / sqrt(variance + eps) * weight + bias, the variance biased (Ba et
    al. 2016).

    x: floating, rank 1 or more. weight, bias: floating, {length of the last axis}, or None. eps: finite, not negative.
    Returns a tensor of x's shape; x, weight and, where there is a weight, bias promoted.

    Raises ValueError for a dtype, rank, shape or value that is refused.

    >>> layer_norm(torch.tensor([[1.0, 3.0]]), None, None, 0.0)
    tensor([[-1.,  1.]])
    """
    return _layer_norm_op(x, weight, bias, eps)


# ---- on the sum of two tensors


def _add_rms_norm_fake(x, residual, weight, eps):
    dtype = promote(x.dtype, residual)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape, dtype=promote(dtype, weight))


def _add_rms_norm_context(ctx, inputs, output):
    x, residual, weight, ctx.eps = inputs
    ctx.save_for_backward(x, residual, weight)


def _add_rms_norm_backward(ctx, g_sum, g):
    x, residual, weight = ctx.saved_tensors
    dtype = wide(x, residual, weight)
    total = x.to(dtype) + residual.to(dtype)
    dx, dweight = rms_norm_gradient(g.to(dtype), total, widen(weight, dtype), ctx.eps)
    dx = dx + g_sum
    return like(dx, x), like(dx, residual), like(dweight, weight), None


_add_rms_norm_op = define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps) -> (Tensor, Tensor)",
    native.add_rms_norm,
    _add_rms_norm_fake,
    _add_rms_norm_context,
    _add_rms_norm_backward,
)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """x + residual and its rms_norm, in one pass; the norm is taken from the unrounded sum.

    x, residual: floating, same shape, rank 1 or more. weight: floating, {length of the last axis}, or None.
    Returns (sum, norm): x and residual promoted, and with weight.

    Raises ValueError for a dtype, rank, shape or value that is refused.

    >>> add_rms_norm(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 3.0]), None, 0.0)
    (tensor([3., 4.]), tensor([0.8485, 1.1314]))
    """
    return _add_rms_norm_op(x, residual, weight, eps)


def _add_layer_norm_fake(x, residual, weight, bias, eps):
    dtype = promote(x.dtype, residual)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape, dtype=_layer_norm_dtype(dtype, weight, bias))


def _add_layer_norm_context(ctx, inputs, output):
    x, residual, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, residual, weight, bias)


def _add_layer_norm_backward(ctx, g_sum, g):
    x, residual, weight, bias = ctx.saved_tensors
    dtype = wide(x, residual, weight, bias)
    total = x.to(dtype) + residual.to(dtype)
    dx, dweight, dbias = layer_norm_gradient(g.to(dtype), total, widen(weight, dtype), ctx.eps)
    dx = dx + g_sum
    return like(dx, x), like(dx, residual), like(dweight, weight), like(dbias, bias), None


_add_layer_norm_op = define(
    "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
    native.add_layer_norm,
    _add_layer_norm_fake,
    _add_layer_norm_context,
    _add_layer_norm_backward,
)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """x + residual and its layer_norm, in one pass; the norm is taken from the unrounded sum.

    x, residual: floating, same shape, rank 1 or more. weight, bias: floating, {length of the last axis}, or None.
    Returns (sum, norm): x and residual promoted, and as layer_norm does from there.

    Raises ValueError for a dtype, rank, shape or value that is refused.

    >>> add_layer_norm(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 2.0]), None, None, 0.0)
    (tensor([1., 3.]), tensor([-1.,  1.]))
    """
    return _add_layer_norm_op(x, residual, weight, bias, eps)
