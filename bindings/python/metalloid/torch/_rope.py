"""rope and qk_norm_rope. The gradient of a rotation is the rotation by the negative angle: rope itself, with the
negative scale."""

from typing import Any

import torch
from torch import Tensor

import metalloid._native as native
from metalloid.torch._norm import rms_norm_gradient
from metalloid.torch._register import define, like, promote, wide, widen

# Of the arguments that follow `dims`, `offsets` is `offset` where that is a tensor.
_SCHEMA = (
    "bool traditional, float? base, float scale, SymInt offset, Tensor? offsets=None, Tensor? freqs=None, "
    "Tensor? position_ids=None, Tensor? inv_freqs=None, int time_axis=-2"
)
_COUNT = 9


def _keywords(
    traditional, base, scale, offset, offsets=None, freqs=None, position_ids=None, inv_freqs=None, time_axis=-2
):
    return {
        "traditional": traditional,
        "base": base,
        "scale": scale,
        "offset": offset if offsets is None else offsets,
        "freqs": freqs,
        "position_ids": position_ids,
        "inv_freqs": inv_freqs,
        "time_axis": time_axis,
    }


def _split_offset(offset: int | Tensor) -> tuple[Any, Tensor | None]:
    return (0, offset) if isinstance(offset, Tensor) else (offset, None)


def _save_rotation(ctx, arguments):
    traditional, base, scale, offset, *tensors, time_axis = arguments
    ctx.rotation = (traditional, base, scale, offset, time_axis)
    return tensors


def _rotate_back(ctx, g: Tensor, dims: int, tensors) -> Tensor:
    traditional, base, scale, offset, time_axis = ctx.rotation
    return _rope_op(g, dims, traditional, base, -scale, offset, *tensors, time_axis)


# ---- rope


def _rope(a: Tensor, dims: int, *rotation: Any) -> Tensor:
    return native.rope(a, dims, **_keywords(*rotation))


def _rope_fake(a, dims, *rotation):
    return a.new_empty(a.shape)


def _rope_context(ctx, inputs, output):
    _, ctx.dims, *rotation = inputs
    ctx.save_for_backward(*_save_rotation(ctx, rotation))


def _rope_backward(ctx, g):
    return _rotate_back(ctx, g, ctx.dims, ctx.saved_tensors), *(None,) * (1 + _COUNT)


_rope_op = define(f"rope(Tensor a, int dims, {_SCHEMA}) -> Tensor", _rope, _rope_fake, _rope_context, _rope_backward)


def rope(
    a: Tensor,
    dims: int,
    *,
    traditional: bool,
    base: float | None,
    scale: float,
    offset: int | Tensor,
    freqs: Tensor | None = None,
    position_ids: Tensor | None = None,
    inv_freqs: Tensor | None = None,
    time_axis: int = -2,
) -> Tensor:
    """Rotary position embedding (Su et al. 2021): pair i of the first `dims` features turns by position * scale *
    inv_freq[i].

    a: floating, rank 3 or more, batch first. dims: even, 2 to the length of the last axis; further features pass
    through.
    traditional: pairs (x[2i], x[2i+1]) instead of (x[i], x[i + dims/2]).
    base: of the inverse frequencies base**(-2i/dims), finite and positive; None with freqs or inv_freqs.
    scale: multiplies positions.
    offset: position of the first time step, an integer, or an integer tensor {}, {1} or {B}; 0 with position_ids.
    freqs: real, {dims/2}, inverse frequencies are 1/freqs. inv_freqs: real, {dims/2}, used as given.
    position_ids: integer, {B, T}, a position for each token in any order.
    time_axis: where time stands, -2 ({B, ..., T, D}) or 1 ({B, T, ..., D}).
    Returns a tensor of a's shape and dtype. Positions and frequencies have no gradient.

    Raises ValueError for a dtype, rank, shape or value that is refused.

    >>> rope(torch.ones(1, 2, 2), 2, traditional=False, base=10000.0, scale=1.0, offset=0)
    tensor([[[ 1.0000,  1.0000],
             [-0.3012,  1.3818]]])
    """
    offset, offsets = _split_offset(offset)
    return _rope_op(a, dims, traditional, base, scale, offset, offsets, freqs, position_ids, inv_freqs, time_axis)


# ---- qk_norm_rope


def _split_dtype(rotation):
    """The dispatcher leaves out what stands at the end and is the default."""
    return (rotation[:_COUNT], rotation[_COUNT]) if len(rotation) > _COUNT else (rotation, None)


def _qk_norm_rope(q, k, q_weight, k_weight, eps, dims, *rotation):
    rotation, dtype = _split_dtype(rotation)
    out: Any = None
    if dtype is not None:
        out = tuple(torch.empty(x.shape, dtype=dtype, device=x.device) for x in (q, k))
    return native.qk_norm_rope(q, k, q_weight, k_weight, eps, dims, **_keywords(*rotation), out=out)


def _qk_norm_rope_fake(q, k, q_weight, k_weight, eps, dims, *rotation):
    _, dtype = _split_dtype(rotation)
    return (
        q.new_empty(q.shape, dtype=dtype or promote(q.dtype, q_weight)),
        k.new_empty(k.shape, dtype=dtype or promote(k.dtype, k_weight)),
    )


def _qk_norm_rope_context(ctx, inputs, output):
    q, k, q_weight, k_weight, ctx.eps, ctx.dims, *rotation, _ = inputs
    ctx.save_for_backward(q, k, q_weight, k_weight, *_save_rotation(ctx, rotation))


def _qk_norm_rope_backward(ctx, g_q, g_k):
    q, k, q_weight, k_weight, *tensors = ctx.saved_tensors
    gradients = []
    for g, x, weight in ((g_q, q, q_weight), (g_k, k, k_weight)):
        dtype = wide(x, weight)
        g = _rotate_back(ctx, g.to(dtype), ctx.dims, tensors)
        dx, dweight = rms_norm_gradient(g, x.to(dtype), widen(weight, dtype), ctx.eps)
        gradients.append((like(dx, x), like(dweight, weight)))
    (dq, dq_weight), (dk, dk_weight) = gradients
    return dq, dk, dq_weight, dk_weight, *(None,) * (3 + _COUNT)


_qk_norm_rope_op = define(
    f"qk_norm_rope(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, float eps, int dims, {_SCHEMA}, "
    "ScalarType? dtype=None) -> (Tensor, Tensor)",
    _qk_norm_rope,
    _qk_norm_rope_fake,
    _qk_norm_rope_context,
    _qk_norm_rope_backward,
)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    dims: int,
    *,
    traditional: bool,
    base: float | None,
    scale: float,
    offset: int | Tensor,
    freqs: Tensor | None = None,
    position_ids: Tensor | None = None,
    inv_freqs: Tensor | None = None,
    time_axis: int = -2,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """rms_norm of each head of q and k, then rope, in one pass (as in Qwen3).

    q: floating, {B, N_q, T, D}. k: floating, {B, N_kv, T, D}; {B, T, N, D} with time_axis=1. q_weight, k_weight:
    floating, {D}, or None. eps: finite, not negative. dims: even, 2 to D. The other arguments are those of `rope`.
    Returns (q, k): each promoted with its weight, or both of the floating `dtype`.

    Raises ValueError for a dtype, rank, shape or value that is refused.

    >>> q, k = torch.full((1, 2, 1, 2), 3.0), torch.full((1, 1, 1, 2), 5.0)
    >>> q, k = qk_norm_rope(q, k, None, None, 0.0, 2, traditional=False, base=10000.0, scale=1.0, offset=0)
    >>> q.ravel(), k.ravel()
    (tensor([1., 1., 1., 1.]), tensor([1., 1.]))
    """
    offset, offsets = _split_offset(offset)
    rotation = (traditional, base, scale, offset, offsets, freqs, position_ids, inv_freqs, time_axis, dtype)
    return _qk_norm_rope_op(q, k, q_weight, k_weight, eps, dims, *rotation)
