"""The operations as plain array code, written once for JAX and MLX: what their gradients and transformations are taken
from, until the C library has backward functions.

Every function computes in float32 (float64 where an array is) and rounds once, as the kernels do; none is fast,
attention stores its scores. `ns` is a `Namespace` of the library whose arrays are given; arguments are those of the
operations, defaults settled.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

Array = Any  # of JAX or MLX


class Namespace(NamedTuple):
    xp: Any  # jax.numpy or mlx.core: what both have under one name
    erf: Callable[[Array], Array]
    sigmoid: Callable[[Array], Array]
    stop_gradient: Callable[[Array], Array]
    # (step, state, arrays with time first) -> (state, outputs with time first), as jax.lax.scan
    scan: Callable[..., tuple[Array, Array]]
    # (array, update, start along axis 1)
    update_at: Callable[[Array, Array, Any], Array]

    def promote(self, *arrays: Array | None) -> Any:
        """The dtype that arithmetic on all that are there gives; float16 with bfloat16 gives float32."""
        dtypes = [a.dtype for a in arrays if a is not None]
        if all(dtype == dtypes[0] for dtype in dtypes):
            return dtypes[0]
        return self.wide(*arrays)

    def wide(self, *arrays: Array | None) -> Any:
        """What is computed in."""
        double = any(a is not None and a.dtype == self.xp.float64 for a in arrays)
        return self.xp.float64 if double else self.xp.float32


# ---- norms


def rms_norm(ns: Namespace, x: Array, weight: Array | None, eps: float) -> Array:
    return _rms_norm(ns, x.astype(ns.wide(x, weight)), weight, eps).astype(ns.promote(x, weight))


def _rms_norm(ns: Namespace, x: Array, weight: Array | None, eps: float) -> Array:
    y = x / ns.xp.sqrt(ns.xp.mean(x * x, axis=-1, keepdims=True) + eps)
    return y if weight is None else y * weight.astype(x.dtype)


def layer_norm(ns: Namespace, x: Array, weight: Array | None, bias: Array | None, eps: float) -> Array:
    return _layer_norm(ns, x.astype(ns.wide(x, weight, bias)), weight, bias, eps).astype(
        ns.promote(x) if weight is None else ns.promote(x, weight, bias)
    )


def _layer_norm(ns: Namespace, x: Array, weight: Array | None, bias: Array | None, eps: float) -> Array:
    deviation = x - ns.xp.mean(x, axis=-1, keepdims=True)
    y = deviation / ns.xp.sqrt(ns.xp.mean(deviation * deviation, axis=-1, keepdims=True) + eps)
    if weight is not None:
        y = y * weight.astype(x.dtype)
    return y if bias is None else y + bias.astype(x.dtype)


def add_rms_norm(ns: Namespace, x: Array, residual: Array, weight: Array | None, eps: float) -> tuple[Array, Array]:
    wide = ns.wide(x, residual, weight)
    total = x.astype(wide) + residual.astype(wide)
    norm = _rms_norm(ns, total, weight, eps)
    return total.astype(ns.promote(x, residual)), norm.astype(ns.promote(x, residual, weight))


def add_layer_norm(
    ns: Namespace, x: Array, residual: Array, weight: Array | None, bias: Array | None, eps: float
) -> tuple[Array, Array]:
    wide = ns.wide(x, residual, weight, bias)
    total = x.astype(wide) + residual.astype(wide)
    norm = _layer_norm(ns, total, weight, bias, eps)
    sum_dtype = ns.promote(x, residual)
    return total.astype(sum_dtype), norm.astype(sum_dtype if weight is None else ns.promote(x, residual, weight, bias))


# ---- rotary position embedding


class Rope(NamedTuple):
    """rope's arguments beside the array. `offset` is an integer or an array {B}; base, freqs or inv_freqs is there."""

    dims: int
    traditional: bool
    base: float | None
    scale: float
    offset: Any
    freqs: Array | None
    position_ids: Array | None
    inv_freqs: Array | None
    time_axis: int  # 1 or -2


def rope(ns: Namespace, a: Array, arguments: Rope) -> Array:
    return _rope(ns, a.astype(ns.wide(a)), arguments).astype(a.dtype)


def _rope(ns: Namespace, a: Array, given: Rope) -> Array:
    xp, half, wide = ns.xp, given.dims // 2, a.dtype
    time = a.shape[given.time_axis]
    if given.position_ids is not None:
        positions = given.position_ids.astype(wide)  # {B, T}
    elif isinstance(given.offset, int):
        positions = (xp.arange(time) + given.offset).astype(wide)[None]
    else:
        positions = (xp.arange(time)[None] + given.offset.reshape(-1, 1)).astype(wide)
    if given.freqs is not None:
        inverse = 1 / given.freqs.astype(wide)
    elif given.inv_freqs is not None:
        inverse = given.inv_freqs.astype(wide)
    else:
        assert given.base is not None
        inverse = xp.exp(xp.arange(half).astype(wide) * (-2 * math.log(given.base) / given.dims))
    angle = (positions * given.scale)[..., None] * inverse  # {B or 1, T, dims/2}
    between = a.ndim - 3  # the axes beside batch, time and features
    rows = angle.shape[0]
    if given.time_axis == 1:
        angle = angle.reshape(rows, time, *[1] * between, half)
    else:
        angle = angle.reshape(rows, *[1] * between, time, half)

    turned, rest = a[..., : given.dims], a[..., given.dims :]
    if given.traditional:
        x1, x2 = turned[..., 0::2], turned[..., 1::2]
    else:
        x1, x2 = turned[..., :half], turned[..., half:]
    cos, sin = xp.cos(angle), xp.sin(angle)
    y1, y2 = x1 * cos - x2 * sin, x1 * sin + x2 * cos
    if given.traditional:
        y = xp.stack([y1, y2], axis=-1).reshape(*a.shape[:-1], given.dims)
    else:
        y = xp.concatenate([y1, y2], axis=-1)
    return xp.concatenate([y, rest], axis=-1)


def qk_norm_rope(
    ns: Namespace, q: Array, k: Array, q_weight: Array | None, k_weight: Array | None, eps: float, arguments: Rope
) -> tuple[Array, Array]:
    def one(x: Array, weight: Array | None) -> Array:
        normalized = _rms_norm(ns, x.astype(ns.wide(x, weight)), weight, eps)
        return _rope(ns, normalized, arguments).astype(ns.promote(x, weight))

    return one(q, q_weight), one(k, k_weight)


# ---- gated activations


def swiglu(ns: Namespace, gate: Array, up: Array) -> Array:
    wide = ns.wide(gate, up)
    x = gate.astype(wide)
    return (x * ns.sigmoid(x) * up.astype(wide)).astype(ns.promote(gate, up))


def geglu(ns: Namespace, gate: Array, up: Array, tanh: bool) -> Array:
    wide = ns.wide(gate, up)
    x = gate.astype(wide)
    if tanh:
        gelu = x * ns.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))
    else:
        gelu = x * (0.5 * (1 + ns.erf(x * math.sqrt(0.5))))
    return (gelu * up.astype(wide)).astype(ns.promote(gate, up))


# ---- attention


class Attention(NamedTuple):
    """attention's arguments beside its arrays. `causal_offset` is an integer or an integer array {}."""

    scale: float
    causal: bool
    causal_offset: Any
    window: int | None
    softcap: float | None


def attention(
    ns: Namespace,
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    sinks: Array | None,
    key_mask: Array | None,
    given: Attention,
) -> tuple[Array, Array]:
    """(out, logsumexp)"""
    xp, wide, dtype = ns.xp, ns.wide(q, k, v), ns.promote(q, k, v)
    q, k, v = q.astype(wide), k.astype(wide), v.astype(wide)
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, kv_len, value_dim = k.shape[1], k.shape[2], v.shape[3]
    group = q_heads // kv_heads
    sink = None if sinks is None else sinks.astype(wide).reshape(1, q_heads, 1, 1)
    if kv_len == 0:
        nothing = xp.zeros((batch, q_heads, q_len), dtype=wide)
        out = xp.zeros((batch, q_heads, q_len, value_dim), dtype=dtype)
        return out, nothing - math.inf if sink is None else nothing + sink.reshape(1, q_heads, 1)

    visible = xp.ones((1, 1, q_len, kv_len), dtype=xp.bool_)
    difference = xp.arange(kv_len)[None] - xp.arange(q_len)[:, None] - given.causal_offset
    if given.causal:
        visible = visible & (difference <= 0)
    if given.window is not None:
        visible = visible & (difference <= 0) & (difference > -given.window)
    if key_mask is not None:
        visible = visible & (key_mask != 0)[:, None, None, :]
    if mask is not None and mask.dtype == xp.bool_:
        visible = visible & mask
    elif mask is not None:
        mask = mask.astype(wide)
        visible = visible & (mask != -math.inf)
    visible = xp.broadcast_to(visible, (batch, q_heads, q_len, kv_len))

    # Keys that no query sees may hold anything, NaN included, and must not reach a product with 0.
    seen = xp.any(visible.reshape(batch, kv_heads, group * q_len, kv_len), axis=2)[..., None]
    k, v = xp.where(seen, k, 0), xp.where(seen, v, 0)

    scores = q.reshape(batch, kv_heads, group * q_len, head_dim) @ xp.swapaxes(k, -1, -2)
    scores = scores.reshape(batch, q_heads, q_len, kv_len) * given.scale
    if given.softcap is not None:
        scores = given.softcap * xp.tanh(scores / given.softcap)
    if mask is not None and mask.dtype != xp.bool_:
        scores = scores + mask
    scores = xp.where(visible, scores, -math.inf)

    largest = scores.max(-1, keepdims=True)
    if sink is not None:
        largest = xp.maximum(largest, sink)
    largest = ns.stop_gradient(xp.where(largest == -math.inf, 0, largest))
    weights = xp.where(visible, xp.exp(xp.where(visible, scores, largest) - largest), 0)
    total = weights.sum(-1, keepdims=True)
    if sink is not None:
        total = total + xp.exp(sink - largest)
    empty = total == 0
    total = xp.where(empty, 1, total)
    out = (weights.reshape(batch, kv_heads, group * q_len, kv_len) @ v).reshape(batch, q_heads, q_len, value_dim)
    logsumexp = xp.where(empty, -math.inf, largest + xp.log(total))
    return (out / total).astype(dtype), logsumexp.reshape(batch, q_heads, q_len)


def kv_cache_sdpa_update(
    ns: Namespace,
    q: Array,
    new_k: Array,
    new_v: Array,
    k_cache: Array,
    v_cache: Array,
    offset: Any,
    key_mask: Array | None,
    scale: float,
) -> tuple[Array, Array, Array]:
    """(out, k_cache, v_cache)"""
    k_cache, v_cache = ns.update_at(k_cache, new_k, offset), ns.update_at(v_cache, new_v, offset)
    given = Attention(scale, q.shape[1] > 1, offset, None, None)
    q, k, v = (ns.xp.swapaxes(a, 1, 2) for a in (q, k_cache, v_cache))
    out, _ = attention(ns, q, k, v, None, None, key_mask, given)
    return out, k_cache, v_cache


# ---- loss


def cross_entropy(ns: Namespace, logits: Array, targets: Array, ignore_index: int | None) -> Array:
    xp, wide = ns.xp, ns.wide(logits)
    x = logits.astype(wide)
    largest = ns.stop_gradient(x.max(-1, keepdims=True))
    logsumexp = xp.log(xp.exp(x - largest).sum(-1)) + largest.reshape(targets.shape)
    ignored = None if ignore_index is None else targets == ignore_index
    at = targets if ignored is None else xp.where(ignored, 0, targets)
    loss = logsumexp - xp.take_along_axis(x, at[..., None].astype(xp.int32), axis=-1).reshape(targets.shape)
    if ignored is not None:
        loss = xp.where(ignored, 0, loss)
    return loss.astype(xp.float32)


# ---- gated delta rule


def gated_delta_update(
    ns: Namespace,
    q: Array,
    k: Array,
    v: Array,
    gamma: Array,
    beta: Array,
    initial_state: Array | None,
    mask: Array | None,
) -> tuple[Array, Array]:
    """(out, state)"""
    xp = ns.xp
    wide, dtype = ns.wide(q, k, v, gamma, beta, initial_state), ns.promote(q, k)
    batch, _, key_heads, key_dim = q.shape
    value_heads, value_dim = v.shape[2:]
    q, k, v, gamma, beta = (a.astype(wide) for a in (q, k, v, gamma, beta))
    if gamma.ndim == 3:
        gamma = gamma[..., None]

    def steps(a: Array) -> Array:  # time first
        return xp.swapaxes(a, 0, 1)

    def of_value_heads(a: Array) -> Array:  # {B, T, H_k, D_k} -> {B, T, H_v, D_k}
        return xp.repeat(a, value_heads // key_heads, axis=2) if value_heads != key_heads else a

    def step(state: Array, now: tuple[Array, ...]) -> tuple[Array, Array]:
        q_t, k_t, v_t, gamma_t, beta_t, *mask_t = now
        after = state * gamma_t[:, :, None, :]
        error = v_t - (after * k_t[:, :, None, :]).sum(-1)
        after = after + (beta_t[..., None] * error)[..., None] * k_t[:, :, None, :]
        out = (after * q_t[:, :, None, :]).sum(-1)
        if mask_t:
            runs = (mask_t[0] != 0)[:, None, None]
            after, out = xp.where(runs[..., None], after, state), xp.where(runs, out, 0)
        return after, out

    if initial_state is None:
        state = xp.zeros((batch, value_heads, value_dim, key_dim), dtype=wide)
    else:
        state = initial_state.astype(wide)
    arrays = [steps(a) for a in (of_value_heads(q), of_value_heads(k), v, gamma, beta)]
    if mask is not None:
        arrays.append(steps(mask))
    state, out = ns.scan(step, state, tuple(arrays))
    return xp.swapaxes(out, 0, 1).astype(dtype), state
