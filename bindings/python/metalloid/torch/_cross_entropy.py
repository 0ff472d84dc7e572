"""cross_entropy. The gradient is a plain formula of PyTorch."""

import torch
from torch import Tensor

import metalloid._native as native
from metalloid.torch._register import define, like, wide


def _cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int | None = None) -> Tensor:
    return native.cross_entropy(logits, targets, ignore_index=ignore_index)


def _cross_entropy_fake(logits, targets, ignore_index=None):
    return logits.new_empty(targets.shape, dtype=torch.float32)


def _cross_entropy_context(ctx, inputs, output):
    logits, targets, ctx.ignore_index = inputs
    ctx.save_for_backward(logits, targets)


def _cross_entropy_backward(ctx, g):
    logits, targets = ctx.saved_tensors
    targets, dtype = targets.long()[..., None], wide(logits)
    inside = (targets >= 0) & (targets < logits.shape[-1])
    index = torch.where(inside, targets, 0)
    probabilities = torch.softmax(logits, -1, dtype=dtype)
    gradient = probabilities.scatter_add(-1, index, -torch.ones_like(index, dtype=dtype)) * g.to(dtype)[..., None]
    gradient = torch.where(inside, gradient, torch.nan)  # as the loss is on a GPU
    if ctx.ignore_index is not None:
        gradient = torch.where(targets == ctx.ignore_index, 0, gradient)
    return like(gradient, logits), None, None


_cross_entropy_op = define(
    "cross_entropy(Tensor logits, Tensor targets, SymInt? ignore_index=None) -> Tensor",
    _cross_entropy,
    _cross_entropy_fake,
    _cross_entropy_context,
    _cross_entropy_backward,
)


def cross_entropy(logits: Tensor, targets: Tensor, *, ignore_index: int | None = None) -> Tensor:
    """logsumexp(logits, last axis) - logits[..., target], reading the logits once.

    logits: floating, {..., V}, rank 1 or more. targets: integer, {...}, each 0 to V - 1, or ignore_index, which gives
    0.
    Returns float32 of the shape of targets, whatever the logits' dtype: the loss of each, neither summed nor averaged.

    Raises ValueError for a dtype, rank, shape or value that is refused; on a GPU a target out of range gives NaN.

    >>> cross_entropy(torch.zeros(2, 4), torch.tensor([3, -100]), ignore_index=-100)
    tensor([1.3863, 0.0000])
    """
    return _cross_entropy_op(logits, targets, ignore_index)
