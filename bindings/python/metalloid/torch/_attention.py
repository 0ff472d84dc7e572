"""scaled_dot_product_attention and kv_cache_sdpa_update. The gradient is a plain formula of PyTorch, over blocks of
queries."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

import metalloid._native as native
from metalloid.torch._register import define, lower_precision, needs_gradient, promote, wide

_OPTIONS = (
    "float scale, Tensor? mask=None, Tensor? sinks=None, bool causal=False, Tensor? key_mask=None, "
    "SymInt? window=None, float? softcap=None, SymInt? causal_offset=None"
)
_TENSORS = "Tensor q, Tensor k, Tensor v"
_BLOCK = 1 << 22  # scores that the backward pass holds at once, a few times over


def _names(scale, mask=None, sinks=None, causal=False, key_mask=None, window=None, softcap=None, causal_offset=None):
    return {
        "scale": scale,
        "mask": mask,
        "sinks": sinks,
        "causal": causal,
        "key_mask": key_mask,
        "window": window,
        "softcap": softcap,
        "causal_offset": causal_offset,
    }


def _attention(q, k, v, *options):
    return native.scaled_dot_product_attention(q, k, v, **_names(*options))


def _attention_with_logsumexp(q, k, v, *options):
    return native.scaled_dot_product_attention(q, k, v, **_names(*options), return_logsumexp=True)


def _attention_fake(q, k, v, *options):
    return q.new_empty((*q.shape[:3], v.shape[3]), dtype=promote(q.dtype, k, v))


def _attention_with_logsumexp_fake(q, k, v, *options):
    return _attention_fake(q, k, v), q.new_empty(q.shape[:3], dtype=wide(q, k, v))


# ---- gradient


def _visible(mask, causal, key_mask, window, position: Tensor, keys: int) -> Tensor | None:
    """Which keys the queries at `position` see; mask is theirs alone."""
    visible = None

    def hide(where: Tensor) -> None:
        nonlocal visible
        visible = where if visible is None else visible & where

    key = torch.arange(keys, device=position.device)
    if causal:
        hide(key <= position[:, None])
    if window is not None:
        hide((key > position[:, None] - window) & (key <= position[:, None]))
    if key_mask is not None:
        hide((key_mask != 0)[:, None, None, :])
    if mask is not None:
        hide(mask if mask.dtype == torch.bool else mask != -torch.inf)
    return visible


def _attention_gradient(
    g, g_logsumexp, q, k, v, scale, mask, sinks, causal, key_mask, window, softcap, causal_offset
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dmask, dsinks. Scores of a block of queries are computed again, whole rows of them, so that neither
    the forward
    pass keeps anything nor the score matrix is ever there at once. With P = softmax(S), of which the sink takes its
    part: dV = P^T g; dP = g V^T; dS = P * (dP - sum(dP * P) + g_logsumexp); dQ = scale dS K; dK = scale dS^T Q."""
    dtype = wide(q, k, v)
    batch, heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1:3]
    offset = keys - queries if causal_offset is None else causal_offset

    def grouped(x: Tensor) -> Tensor:  # heads that share keys are rows of one product
        return x.reshape(batch, kv_heads, -1, x.shape[-1])

    def ungrouped(x: Tensor) -> Tensor:
        return x.reshape(batch, heads, -1, x.shape[-1])

    k, v = k.to(dtype), v.to(dtype)
    finite_k = torch.where(k.isfinite(), k, 0)  # what nobody sees may be anything
    dq, dk, dv = torch.empty_like(q, dtype=dtype), torch.zeros_like(k), torch.zeros_like(v)
    dmask, dsinks = q.new_empty(0), q.new_empty(0)  # of what is not there
    sink = total_bias = None
    if sinks is not None:
        sink = sinks.to(dtype)[:, None, None]
        dsinks = torch.zeros(heads, dtype=dtype, device=q.device)
    if mask is not None:
        shape = mask.shape
        mask = mask.reshape((1,) * (4 - mask.ndim) + shape)
        if mask.is_floating_point():
            total_bias = torch.zeros(mask.shape, dtype=dtype, device=q.device)
            dmask = total_bias.view(shape)
    block = max(1, _BLOCK // max(1, batch * heads * keys))
    for begin in range(0, queries, block):
        rows = slice(begin, min(begin + block, queries))
        mask_rows = mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]
        q_rows, g_rows = q[:, :, rows].to(dtype), g[:, :, rows].to(dtype)
        scores = ungrouped(grouped(q_rows) @ k.mT) * scale
        bent = None
        if softcap is not None:
            bent = torch.tanh(scores / softcap)
            scores = softcap * bent
        if mask_rows is not None and mask_rows.dtype != torch.bool:
            scores = scores + mask_rows
        position = torch.arange(rows.start, rows.stop, device=q.device) + offset
        visible = _visible(mask_rows, causal, key_mask, window, position, keys)
        if visible is not None:
            scores = torch.where(visible, scores, -torch.inf)
        largest = scores.amax(-1, keepdim=True) if keys else scores.new_full((*scores.shape[:3], 1), -torch.inf)
        if sink is not None:
            largest = torch.maximum(largest, sink)
        largest = torch.where(largest == -torch.inf, 0, largest)
        p = torch.exp(scores - largest)
        total = p.sum(-1, keepdim=True)
        if sink is not None:
            total = total + torch.exp(sink - largest)
        inverse = torch.where(total > 0, 1 / total, 0)
        p = p * inverse
        dp = ungrouped(grouped(g_rows) @ v.mT)
        if visible is not None:
            dp = torch.where(visible, dp, 0)
        common = -(dp * p).sum(-1, keepdim=True)
        if g_logsumexp is not None:
            common = common + g_logsumexp[:, :, rows, None]
        ds = p * (dp + common)
        dv += grouped(p).mT @ grouped(g_rows)
        if sink is not None:
            dsinks += (torch.exp(sink - largest) * inverse * common).sum((0, 2, 3))
        if total_bias is not None:
            part = total_bias if total_bias.shape[2] == 1 else total_bias[:, :, rows]
            part += ds.sum_to_size(part.shape)
        if bent is not None:
            ds = ds * (1 - bent * bent)
            if visible is not None:
                ds = torch.where(visible, ds, 0)
        ds = grouped(ds * scale)
        dq[:, :, rows] = ungrouped(ds @ finite_k)
        dk += ds.mT @ grouped(q_rows)
    return dq, dk, dv, dmask, dsinks


def _attention_backward_like(q, k, v, mask, sinks) -> list[Any]:
    """What the five gradients look like."""
    additive = mask is not None and mask.is_floating_point()
    return [q, k, v, mask if additive else q.new_empty(0), q.new_empty(0) if sinks is None else sinks]


def _attention_backward_compute(g, g_logsumexp, q, k, v, scale, mask, sinks, *options):
    gradients = _attention_gradient(g, g_logsumexp, q, k, v, scale, mask, sinks, *options)
    of = _attention_backward_like(q, k, v, mask, sinks)
    return tuple(gradient.to(x.dtype).contiguous() for gradient, x in zip(gradients, of, strict=True))


def _attention_backward_fake(g, g_logsumexp, q, k, v, scale, mask, sinks, *options):
    return tuple(x.new_empty(x.shape) for x in _attention_backward_like(q, k, v, mask, sinks))


# An operator too, since torch.compile would unroll its loop.
_attention_backward_op = define(
    f"scaled_dot_product_attention_backward(Tensor g, Tensor? g_logsumexp, {_TENSORS}, float scale, Tensor? mask, "
    "Tensor? sinks, bool causal, Tensor? key_mask, SymInt? window, float? softcap, SymInt? causal_offset) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _attention_backward_compute,
    _attention_backward_fake,
    backends=("CompositeExplicitAutograd",),
)


def _attention_context(ctx, inputs, output):
    q, k, v, scale, mask, sinks, causal, key_mask, window, softcap, causal_offset = inputs
    ctx.save_for_backward(q, k, v, mask, sinks, key_mask)
    ctx.options = scale, causal, window, softcap, causal_offset


def _attention_backward(ctx, g, g_logsumexp=None):
    q, k, v, mask, sinks, key_mask = ctx.saved_tensors
    scale, causal, window, softcap, causal_offset = ctx.options
    dq, dk, dv, dmask, dsinks = _attention_backward_op(
        g, g_logsumexp, q, k, v, scale, mask, sinks, causal, key_mask, window, softcap, causal_offset
    )
    dmask = dmask if needs_gradient(ctx, 4) else None
    dsinks = dsinks if needs_gradient(ctx, 5) else None
    return dq, dk, dv, None, dmask, dsinks, *(None,) * 5


# ---- scaled_dot_product_attention

_attention_op = define(
    f"scaled_dot_product_attention({_TENSORS}, {_OPTIONS}) -> Tensor",
    _attention,
    _attention_fake,
    _attention_context,
    _attention_backward,
)
_attention_with_logsumexp_op = define(
    f"scaled_dot_product_attention_with_logsumexp({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor)",
    _attention_with_logsumexp,
    _attention_with_logsumexp_fake,
    _attention_context,
    _attention_backward,
)
lower_precision(_attention_op, "q", "k", "v", "mask", "sinks")
lower_precision(_attention_with_logsumexp_op, "q", "k", "v", "mask", "sinks")


@overload
def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | str | None = None,
    sinks: Tensor | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    causal_offset: int | None = None,
    return_logsumexp: Literal[False] = False,
) -> Tensor: ...
@overload
def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | str | None = None,
    sinks: Tensor | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    causal_offset: int | None = None,
    return_logsumexp: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | str | None = None,
    sinks: Tensor | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    causal_offset: int | None = None,
    return_logsumexp: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q @ k.T + mask) @ v, without storing the scores (Dao et al. 2022).

    q: floating, {B, N_q, T_q, D}. k: floating, {B, N_kv, T_kv, D}. v: floating, {B, N_kv, T_kv, D_v}. N_q is a
    multiple of N_kv. What hides keys combines freely; a query that sees none gives zeros.
    scale: finite, multiplies the scores.
    mask: None, "causal" (as causal=True), or a tensor that broadcasts to {B, N_q, T_q, T_kv}: bool, where False
    hides, or real, added to the scores, of a dtype that promotes to that of q, k and v.
    sinks: floating, {N_q}, a logit a head without a value.
    causal: query i sees key j when j <= i + causal_offset, which is T_kv - T_q where not given.
    key_mask: bool or integer, {B, T_kv}, 0 hides.
    window: query i sees only the last `window` keys up to i + causal_offset.
    softcap: scores become softcap * tanh(scores / softcap) before the mask.
    Returns {B, N_q, T_q, D_v}, q, k and v promoted; with return_logsumexp=True (out, logsumexp), the latter {B, N_q,
    T_q} and float32 (float64 for float64). q, k, v, a floating mask and sinks have gradients; second derivatives are
    refused. Under torch.autocast these five come in its dtype.

    Raises ValueError for a dtype, rank, shape or value that is refused.

    >>> q = k = torch.zeros(1, 1, 2, 4)
    >>> v = torch.tensor([[[[1.0], [3.0]]]])
    >>> scaled_dot_product_attention(q, k, v, scale=0.5, mask="causal").ravel()
    tensor([1., 2.])
    """
    if isinstance(mask, str):
        if mask != "causal":
            raise ValueError(f"scaled_dot_product_attention: mask must be 'causal', a tensor or None, got {mask!r}")
        mask, causal = None, True
    op = _attention_with_logsumexp_op if return_logsumexp else _attention_op
    return op(q, k, v, scale, mask, sinks, causal, key_mask, window, softcap, causal_offset)


# ---- kv_cache_sdpa_update


def _cache_update(q, new_k, new_v, k_cache, v_cache, offset, offsets, key_mask, scale):
    return native.kv_cache_sdpa_update(
        q, new_k, new_v, k_cache, v_cache, offset if offsets is None else offsets, key_mask, scale
    )


def _cache_update_fake(q, new_k, new_v, k_cache, v_cache, offset, offsets, key_mask, scale):
    batch, queries, heads, _ = q.shape
    return q.new_empty((batch, heads, queries, v_cache.shape[3]), dtype=promote(q.dtype, k_cache, v_cache))


_cache_update_op = define(
    "kv_cache_sdpa_update(Tensor q, Tensor new_k, Tensor new_v, Tensor(a!) k_cache, Tensor(b!) v_cache, SymInt offset, "
    "Tensor? offsets, Tensor? key_mask, float scale) -> Tensor",
    _cache_update,
    _cache_update_fake,
    updates=("k_cache", "v_cache"),
)
lower_precision(_cache_update_op, "q", new_k="k_cache", new_v="v_cache")


def kv_cache_sdpa_update(
    q: Tensor,
    new_k: Tensor,
    new_v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    offset: int | Tensor,
    key_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """A decode step: writes new_k and new_v into the caches at time `offset`, then attends over the caches.

    q: floating, {B, T_q, N_q, D}. new_k: {B, T_q, N_kv, D}, new_v: {B, T_q, N_kv, D_v}, of the caches' dtypes.
    k_cache: floating, {B, T_max, N_kv, D}, v_cache: {B, T_max, N_kv, D_v}: both updated in place.
    offset: 0 to T_max - T_q, an integer or an integer tensor {} or {1} on the CPU.
    key_mask: bool or integer, {B, T_max}, 0 hides; None hides nothing, not even what is not filled yet. With more
    than one query each sees the keys up to its own only. scale: finite, multiplies the scores.
    Returns {B, N_q, T_q, D_v}, q and the caches promoted. Where a gradient is recorded the step is two: a copy into
    the caches, which PyTorch records, and scaled_dot_product_attention.

    Raises ValueError for a dtype, rank, shape or value that is refused.

    >>> q = new_k = torch.zeros(1, 1, 1, 2)
    >>> k_cache, v_cache = torch.zeros(1, 4, 1, 2), torch.full((1, 4, 1, 2), 3.0)
    >>> visible = torch.tensor([[True, True, False, False]])
    >>> kv_cache_sdpa_update(q, new_k, torch.full_like(new_k, 5.0), k_cache, v_cache, 1, visible, 1.0).ravel()
    tensor([4., 4.])
    >>> v_cache[0, :, 0, 0]
    tensor([3., 5., 3., 3.])
    """
    position, offsets = (0, offset) if isinstance(offset, Tensor) else (offset, None)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, new_k, new_v, k_cache, v_cache)):
        position = position if offsets is None else int(offsets)
        queries = q.shape[1]
        if not 0 <= position <= k_cache.shape[1] - queries:
            raise ValueError(f"kv_cache_sdpa_update: offset must be 0 to {k_cache.shape[1] - queries}, got {position}")
        k_cache.narrow(1, position, queries).copy_(new_k)
        v_cache.narrow(1, position, queries).copy_(new_v)
        return scaled_dot_product_attention(
            q.transpose(1, 2),
            k_cache.transpose(1, 2),
            v_cache.transpose(1, 2),
            scale=scale,
            causal=queries > 1,
            causal_offset=position,
            key_mask=key_mask,
        )
    return _cache_update_op(q, new_k, new_v, k_cache, v_cache, position, offsets, key_mask, scale)
