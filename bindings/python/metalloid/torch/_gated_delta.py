"""gated_delta_update. The gradient is a plain formula of PyTorch, step by step."""

import math

import torch
from torch import Tensor

import metalloid._native as native
from metalloid.torch._register import define, lower_precision, needs_gradient, promote, wide


def _gated_delta(q, k, v, gamma, beta, initial_state=None, mask=None):
    return tuple(native.gated_delta_update(q, k, v, gamma, beta, initial_state, mask))


def _gated_delta_fake(q, k, v, gamma, beta, initial_state=None, mask=None):
    batch, _, heads, value_dim = v.shape
    return (
        v.new_empty(v.shape, dtype=promote(q.dtype, k)),
        v.new_empty((batch, heads, value_dim, q.shape[3]), dtype=wide(q, k, v, gamma, beta, initial_state)),
    )


def _gated_delta_gradient(g, g_state, q, k, v, gamma, beta, initial_state, mask):
    """With D = S * gamma (S the state before the step), e = v - D k and the state after it D + beta e k^T, whose
    gradient is G (plus g q^T, g that of the output): dq = (D + beta e k^T)^T g; de = beta G k = dv; dbeta = e^T G k;
    dD = G - de k^T; dk = beta G^T e - D^T de; dgamma = sum over v of dD * S; dS = dD * gamma. States before every
    n-th step are kept and those between computed again, n the square root of T."""
    dtype = wide(q, k, v, gamma, beta, initial_state)
    batch, time, k_heads, key_dim = q.shape
    group = v.shape[2] // k_heads
    dq, dk, dv, dgamma, dbeta = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v, gamma, beta))

    def rows(x: Tensor, t: int) -> Tensor:  # of q or k, as value heads see them
        return x[:, t].to(dtype).repeat_interleave(group, dim=1)

    def shared(x: Tensor) -> Tensor:
        return x.view(batch, k_heads, group, key_dim).sum(2)

    def decay(t: int) -> Tensor:
        x = gamma[:, t].to(dtype)
        return x[:, :, None, None] if gamma.ndim == 3 else x[:, :, None, :]

    def where_live(t: int, value: Tensor, otherwise: Tensor | float) -> Tensor:
        if mask is None:
            return value
        return torch.where((mask[:, t] != 0).view(batch, *(1,) * (value.ndim - 1)), value, otherwise)

    def step(state: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor]:
        decayed, key = state * decay(t), rows(k, t)
        error = v[:, t].to(dtype) - (decayed @ key[..., None])[..., 0]
        after = decayed + (beta[:, t].to(dtype)[..., None] * error)[..., None] * key[:, :, None, :]
        return decayed, error, after

    def advance(state: Tensor, t: int) -> Tensor:
        return where_live(t, step(state, t)[2], state)

    state = (
        torch.zeros(g_state.shape, dtype=dtype, device=q.device) if initial_state is None else initial_state.to(dtype)
    )
    stride = max(1, math.isqrt(time))
    kept = []
    for t in range(time):
        if t % stride == 0:
            kept.append(state)
        state = advance(state, t)
    dstate = g_state.to(dtype)
    for begin in reversed(range(0, time, stride)):
        states = [kept.pop()]
        for t in range(begin, min(begin + stride, time) - 1):
            states.append(advance(states[-1], t))
        for t in reversed(range(begin, begin + len(states))):
            before = states.pop()
            decayed, error, after = step(before, t)
            query, key, scale = rows(q, t), rows(k, t), beta[:, t].to(dtype)[..., None]
            g_t = g[:, t].to(dtype)
            total = dstate + g_t[..., None] * query[:, :, None, :]
            total_key = (total @ key[..., None])[..., 0]
            derror = scale * total_key
            ddecayed = total - derror[..., None] * key[:, :, None, :]
            gradients = {
                dq: shared((after.mT @ g_t[..., None])[..., 0]),
                dk: shared(scale * (total.mT @ error[..., None])[..., 0] - (decayed.mT @ derror[..., None])[..., 0]),
                dv: derror,
                dbeta: (error * total_key).sum(-1),
                dgamma: (ddecayed * before).sum((2, 3) if gamma.ndim == 3 else 2),
            }
            for gradient, value in gradients.items():
                gradient[:, t] = where_live(t, value, 0)
            dstate = where_live(t, ddecayed * decay(t), dstate)
    return dq, dk, dv, dgamma, dbeta, dstate


def _gated_delta_backward_compute(g, g_state, q, k, v, gamma, beta, initial_state, mask):
    gradients = _gated_delta_gradient(g, g_state, q, k, v, gamma, beta, initial_state, mask)
    of = (q, k, v, gamma, beta, g_state if initial_state is None else initial_state)
    return tuple(gradient.to(x.dtype, copy=gradient is g_state) for gradient, x in zip(gradients, of, strict=True))


def _gated_delta_backward_fake(g, g_state, q, k, v, gamma, beta, initial_state, mask):
    of = (q, k, v, gamma, beta, g_state if initial_state is None else initial_state)
    return tuple(x.new_empty(x.shape) for x in of)


# An operator too, since torch.compile would unroll its loop.
_gated_delta_backward_op = define(
    "gated_delta_update_backward(Tensor g, Tensor g_state, Tensor q, Tensor k, Tensor v, Tensor gamma, Tensor beta, "
    "Tensor? initial_state, Tensor? mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _gated_delta_backward_compute,
    _gated_delta_backward_fake,
    backends=("CompositeExplicitAutograd",),
)


def _gated_delta_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gated_delta_backward(ctx, g, g_state):
    *gradients, dstate = _gated_delta_backward_op(g, g_state, *ctx.saved_tensors)
    return *gradients, dstate if needs_gradient(ctx, 5) else None, None


_gated_delta_op = define(
    "gated_delta_update(Tensor q, Tensor k, Tensor v, Tensor gamma, Tensor beta, Tensor? initial_state=None, "
    "Tensor? mask=None) -> (Tensor, Tensor)",
    _gated_delta,
    _gated_delta_fake,
    _gated_delta_context,
    _gated_delta_backward,
)
lower_precision(_gated_delta_op, "q", "k", "v")


def gated_delta_update(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
) -> list[Tensor]:
    """The gated delta rule (Yang et al. 2024): at each step S = S * gamma; S = S + beta (v - S k) k.T; the output is
    S q.

    q, k: floating, {B, T, H_k, D_k}. v: floating, {B, T, H_v, D_v}, H_v a multiple of H_k. gamma: floating, the decay
    itself, {B, T, H_v}, or a channel's own, {B, T, H_v, D_k}. beta: floating, {B, T, H_v}.
    initial_state: floating, {B, H_v, D_v, D_k}, or None for zeros.
    mask: bool or integer, {B, T}; a step of mask 0 leaves the state as it was and gives 0.
    Returns the list [out, state]: {B, T, H_v, D_v}, q and k promoted, and {B, H_v, D_v, D_k}, float32 (float64 where
    a tensor is). All but the mask have gradients; second derivatives are refused. Under torch.autocast q, k and v
    come in its dtype.

    Raises ValueError for a dtype, rank, shape or value that is refused.

    >>> q = k = torch.ones(1, 2, 1, 1)
    >>> gamma = beta = torch.full((1, 2, 1), 0.5)
    >>> out, state = gated_delta_update(q, k, 4 * q, gamma, beta)
    >>> out.ravel(), state.ravel()
    (tensor([2.0000, 2.5000]), tensor([2.5000]))
    """
    return list(_gated_delta_op(q, k, v, gamma, beta, initial_state, mask))
