"""Every operation in wide NumPy arithmetic, written from its formula, and the accuracy that its results must have.

The functions read arrays of any dtype as they are (already rounded) and compute in float64, or in `np.longdouble` where
an operand is float64, so that the reference's own error does not count. Nothing here is fast or shares an idea with the
library's kernels: scores are stored, masks are materialized, recurrences are loops.
"""

from typing import NamedTuple

import metalloid
import ml_dtypes
import numpy as np

float16 = np.dtype(np.float16)
bfloat16 = np.dtype(ml_dtypes.bfloat16)
float32 = np.dtype(np.float32)
float64 = np.dtype(np.float64)
FLOATING = (float32, float16, bfloat16, float64)

INT32_MAX = 2**31 - 1
INT32_MIN = -(2**31)


def wide_type(*arrays):
    return np.longdouble if any(a is not None and a.dtype == float64 for a in arrays) else np.float64


def widened(array, dtype):
    """The exact values in a wide dtype. bfloat16 goes through float32, as ml_dtypes knows no cast to longdouble."""
    array = np.asarray(array)
    if array.dtype == bfloat16:
        array = array.astype(np.float32)
    return array.astype(dtype)


def promoted(*dtypes):
    """MLX's promotion of floating dtypes: float16 with bfloat16 gives float32."""
    dtypes = {np.dtype(dtype) for dtype in dtypes}
    if len(dtypes) == 1:
        return dtypes.pop()
    return float64 if float64 in dtypes else float32


# ---- norms


def rms_norm(x, weight, eps):
    wide = wide_type(x, weight)
    return _rms_norm(widened(x, wide), weight, eps)


def _rms_norm(x, weight, eps):
    if x.size == 0:
        return x
    with np.errstate(all="ignore"):
        y = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(eps))
        return y if weight is None else y * widened(weight, x.dtype)


def layer_norm(x, weight, bias, eps):
    wide = wide_type(x, weight, bias)
    return _layer_norm(widened(x, wide), weight, bias, eps)


def _layer_norm(x, weight, bias, eps):
    if x.size == 0:
        return x
    with np.errstate(all="ignore"):
        deviation = x - np.mean(x, axis=-1, keepdims=True)
        y = deviation / np.sqrt(np.mean(deviation * deviation, axis=-1, keepdims=True) + x.dtype.type(eps))
        if weight is not None:
            y = y * widened(weight, x.dtype)
        return y if bias is None else y + widened(bias, x.dtype)


def add_rms_norm(x, residual, weight, eps):
    wide = wide_type(x, residual, weight)
    total = widened(x, wide) + widened(residual, wide)
    return total, _rms_norm(total, weight, eps)


def add_layer_norm(x, residual, weight, bias, eps):
    wide = wide_type(x, residual, weight, bias)
    total = widened(x, wide) + widened(residual, wide)
    return total, _layer_norm(total, weight, bias, eps)


# ---- rotary position embedding


class Rope(NamedTuple):
    out: np.ndarray
    magnitude: np.ndarray  # largest |x| of the pair that a feature belongs to; 0 for features that pass through
    angle: np.ndarray  # of each feature; 0 for features that pass through


def rope(
    x, dims, *, traditional, base=None, scale=1.0, offset=0, freqs=None, position_ids=None, inv_freqs=None, time_axis=-2
):
    """Angles are longdouble whatever the dtype: float64 keeps only 1e-7 of the angle that position 2^31 turns by."""
    x = widened(x, np.longdouble)
    batch, time = x.shape[0], x.shape[time_axis]
    half = dims // 2
    if freqs is not None:
        with np.errstate(divide="ignore"):
            inverse = 1 / widened(freqs, np.longdouble)
    elif inv_freqs is not None:
        inverse = widened(inv_freqs, np.longdouble)
    else:
        inverse = np.longdouble(base) ** (-2 * np.arange(half, dtype=np.longdouble) / dims)

    if position_ids is not None:
        positions = widened(position_ids, np.longdouble)
    else:
        start = np.broadcast_to(np.asarray(offset).reshape(-1, 1), (batch, 1))
        positions = widened(start, np.longdouble) + np.arange(time)
    angle = (positions * np.longdouble(scale))[..., None] * inverse  # {B, T, dims/2}
    between = x.ndim - 3  # the axes beside batch, time and features
    if time_axis == 1:
        angle = angle.reshape(batch, time, *[1] * between, half)
    else:
        angle = angle.reshape(batch, *[1] * between, time, half)

    first = slice(0, dims, 2) if traditional else slice(0, half)
    second = slice(1, dims, 2) if traditional else slice(half, dims)
    x1, x2 = x[..., first], x[..., second]
    cos, sin = np.cos(angle), np.sin(angle)
    out, magnitude, angles = x.copy(), np.zeros_like(x), np.zeros_like(x)
    out[..., first] = x1 * cos - x2 * sin
    out[..., second] = x1 * sin + x2 * cos
    magnitude[..., first] = magnitude[..., second] = np.maximum(abs(x1), abs(x2))
    angles[..., first] = angles[..., second] = abs(angle)
    return Rope(out, magnitude, angles)


def qk_norm_rope(q, k, q_weight, k_weight, eps, dims, **rope_arguments):
    """(Rope of q, Rope of k), with the row's largest normalized value as magnitude."""
    wide = wide_type(q, k, q_weight, k_weight)
    results = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        normalized = _rms_norm(widened(x, wide), weight, eps)
        turned = rope(normalized, dims, **rope_arguments)
        results.append(turned._replace(magnitude=row_magnitude(normalized)))
    return tuple(results)


# ---- gated activations


def swiglu(gate, up):
    wide = wide_type(gate, up)
    gate, up = widened(gate, wide), widened(up, wide)
    with np.errstate(all="ignore"):
        return np.where(gate == -np.inf, -wide(0), gate / (1 + np.exp(-gate))) * up


def geglu(gate, up, *, approximate="none"):
    wide = wide_type(gate, up)
    gate, up = widened(gate, wide), widened(up, wide)
    with np.errstate(all="ignore"):
        if approximate == "tanh":  # x/2 (1 + tanh u) = x / (1 + exp(-2u)), which does not cancel for a negative u
            u = np.sqrt(2 / np.arccos(wide(-1))) * (gate + wide("0.044715") * gate**3)
            gelu = gate / (1 + np.exp(-2 * u))
        else:
            gelu = gate / 2 * _erfc(-gate / np.sqrt(wide(2)))
        return np.where(gate == -np.inf, -wide(0), gelu) * up


def _erfc(x):
    """erfc by a power series for a small |x| and a continued fraction for a large one, to longdouble's digits."""
    x = np.asarray(x)
    magnitude, pi = np.abs(x), np.arccos(x.dtype.type(-1))
    small = np.minimum(magnitude, 2)
    term = small.copy()  # erf(x) = 2/sqrt(pi) exp(-x^2) sum of 2^n x^(2n+1) / (2n+1)!!: every term positive
    series = term.copy()
    for n in range(1, 60):
        term = term * 2 * small * small / (2 * n + 1)
        series += term
    below = 1 - 2 / np.sqrt(pi) * np.exp(-small * small) * series
    large = np.clip(magnitude, 2, 200)
    fraction = large  # x + (1/2)/(x + (2/2)/(x + (3/2)/(x + ...))), from the far end
    for n in range(180, 0, -1):
        fraction = large + n / x.dtype.type(2) / fraction
    above = np.exp(-large * large) / (np.sqrt(pi) * fraction)
    positive = np.where(magnitude < 2, below, above)
    return np.where(np.isnan(x), x, np.where(x < 0, 2 - positive, positive))


# ---- attention


class Attention(NamedTuple):
    out: np.ndarray
    logsumexp: np.ndarray
    magnitude: np.ndarray  # largest |v| that a query sees, {B, N_q, T_q, 1}
    score_magnitude: np.ndarray  # largest sum of |terms| of a score that a query sees, or its sink, {B, N_q, T_q}


def attention(
    q, k, v, *, scale, mask=None, sinks=None, causal=False, key_mask=None, window=None, softcap=None, causal_offset=None
):
    wide = wide_type(q, k, v)
    batch, heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1:3]
    group = heads // kv_heads if kv_heads else 1
    shape = (batch, heads, queries, keys)
    q = widened(q, wide)
    k, v = (np.repeat(widened(x, wide), group, axis=1) for x in (k, v))

    visible = np.ones(shape, bool)
    position = np.arange(queries)[:, None] + (keys - queries if causal_offset is None else causal_offset)
    key = np.arange(keys)
    if causal or mask_is_causal(mask):
        visible &= key <= position
    if window is not None:
        visible &= (key > position - window) & (key <= position)
    if key_mask is not None:
        visible &= (np.asarray(key_mask) != 0)[:, None, None, :]
    added = np.zeros(shape, wide)
    if mask is not None and not mask_is_causal(mask):
        if mask.dtype == bool:
            visible &= mask
        else:
            added = added + widened(mask, wide)
            visible &= added != -np.inf

    with np.errstate(all="ignore"):
        scores = wide(scale) * (q @ np.swapaxes(k, -1, -2))
        if softcap is not None:
            scores = wide(softcap) * np.tanh(scores / wide(softcap))
        scores = np.where(visible, scores + np.where(visible, added, 0), -np.inf)
        sink = np.full(heads, -np.inf, wide) if sinks is None else widened(sinks, wide)
        sink = np.broadcast_to(sink[None, :, None, None], (*shape[:3], 1))
        everything = np.concatenate([scores, sink], axis=-1)
        largest = everything.max(axis=-1, keepdims=True)
        exponent = np.where(everything == -np.inf, -np.inf, everything - largest)
        weights = np.exp(exponent)
        total = weights.sum(axis=-1, keepdims=True)
        logsumexp = np.where(total > 0, largest + np.log(total), np.where(np.isnan(total), np.nan, -np.inf))[..., 0]
        weights = np.where(total > 0, weights / total, np.where(np.isnan(total), np.nan, 0))[..., :keys]
        if np.isfinite(v).all():
            out = weights @ v
        else:  # a hidden key's v counts for nothing, not even as 0 times it
            seen = visible[..., None]
            out = np.where(seen, weights[..., None] * v[:, :, None], 0).sum(axis=-2)
        size = np.abs(v).max(axis=-1, initial=0)[:, :, None, :]
        magnitude = np.where(visible, size, 0).max(axis=-1, initial=0, keepdims=True)
        terms = abs(scale) * (np.abs(q) @ np.abs(np.swapaxes(k, -1, -2))) + np.abs(added)
        terms = np.concatenate([np.where(visible, terms, 0), np.abs(sink)], axis=-1)
    return Attention(out, logsumexp, magnitude, np.where(np.isfinite(terms), terms, 0).max(axis=-1))


def mask_is_causal(mask):
    return isinstance(mask, str) and mask == "causal"


def merged(parts):
    """The whole attention from (out, logsumexp) of its parts over split keys."""
    outs = [np.asarray(out, np.float64) for out, _ in parts]
    logs = np.stack([np.asarray(log, np.float64) for _, log in parts])
    largest = logs.max(axis=0)
    largest = np.where(largest == -np.inf, 0, largest)
    weights = np.exp(logs - largest)
    total = weights.sum(axis=0)
    out = sum(weight[..., None] * part for weight, part in zip(weights, outs, strict=True))
    with np.errstate(divide="ignore"):
        return out / np.where(total > 0, total, 1)[..., None], largest + np.log(total)


class CacheUpdate(NamedTuple):
    out: Attention
    k_cache: np.ndarray
    v_cache: np.ndarray


def kv_cache_sdpa_update(q, new_k, new_v, k_cache, v_cache, offset, key_mask, scale):
    queries = q.shape[1]
    k_cache, v_cache = k_cache.copy(), v_cache.copy()
    k_cache[:, offset : offset + queries] = new_k
    v_cache[:, offset : offset + queries] = new_v
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k_cache, v_cache))
    causal = {"causal": True, "causal_offset": offset} if queries > 1 else {}
    return CacheUpdate(attention(q, k, v, scale=scale, key_mask=key_mask, **causal), k_cache, v_cache)


# ---- loss


def cross_entropy(logits, targets, *, ignore_index=None):
    logits = widened(logits, wide_type(logits))
    targets = np.asarray(targets)
    ignored = np.zeros(targets.shape, bool) if ignore_index is None else targets == ignore_index
    if targets.size == 0 or ignored.all():
        return np.zeros(targets.shape, logits.dtype)
    chosen = np.where(ignored, 0, targets).astype(np.int64)[..., None]
    with np.errstate(all="ignore"):
        largest = logits.max(axis=-1, keepdims=True)
        below = np.where(logits == largest, 0, logits - largest)
        np.put_along_axis(below, logits.argmax(axis=-1, keepdims=True), -np.inf, axis=-1)
        others = np.exp(below).sum(axis=-1)  # beside the largest, whose share is 1: a small loss keeps its digits
        loss = (largest - np.take_along_axis(logits, chosen, axis=-1))[..., 0] + np.log1p(others)
    return np.where(ignored, 0, loss)


# ---- gated delta rule


def gated_delta_update(q, k, v, gamma, beta, initial_state=None, mask=None):
    wide = wide_type(q, k, v, gamma, beta, initial_state)
    batch, time, k_heads, key_dim = k.shape
    heads, value_dim = v.shape[2:]
    q, k, v, gamma, beta = (widened(x, wide) for x in (q, k, v, gamma, beta))
    group = heads // k_heads if k_heads else 1
    q, k = np.repeat(q, group, axis=2), np.repeat(k, group, axis=2)
    if gamma.ndim == 3:
        gamma = gamma[..., None]
    state = (
        np.zeros((batch, heads, value_dim, key_dim), wide) if initial_state is None else widened(initial_state, wide)
    )
    out = np.zeros((batch, time, heads, value_dim), wide)
    for t in range(time):
        decayed = state * gamma[:, t, :, None, :]
        error = v[:, t] - np.einsum("bhvk,bhk->bhv", decayed, k[:, t])
        after = decayed + beta[:, t, :, None, None] * error[..., None] * k[:, t, :, None, :]
        result = np.einsum("bhvk,bhk->bhv", after, q[:, t])
        live = np.ones(batch, bool) if mask is None else np.asarray(mask)[:, t] != 0
        state = np.where(live[:, None, None, None], after, state)
        out[:, t] = np.where(live[:, None, None], result, 0)
    return out, state


# ---- accuracy


RELATIVE = {  # float32, float64
    "rms_norm": (2e-6, 1e-13),
    "layer_norm": (2e-6, 1e-13),
    "rope": (2e-6, 1e-13),
    "swiglu": (2e-6, 1e-13),
    "geglu": (2e-6, 1e-13),
    "add_rms_norm": (2e-6, 1e-13),
    "add_layer_norm": (2e-6, 1e-13),
    "qk_norm_rope": (2e-6, 1e-13),
    "attention": (1e-5, 1e-12),
    "kv_cache_sdpa_update": (1e-5, 1e-12),
    "cross_entropy": (1e-5, 1e-13),
    "gated_delta_update": (1e-4, 1e-13),
}


def row_magnitude(ref):
    """Largest |ref| of each row (last axis), infinities aside."""
    finite = np.where(np.isfinite(ref), np.abs(ref), 0)
    return finite.max(axis=-1, keepdims=True, initial=0) if finite.ndim else finite


def unit(dtype, magnitude):
    """One unit in the last place of a 16-bit dtype at a magnitude."""
    info = ml_dtypes.finfo(dtype)
    _, exponent = np.frexp(np.asarray(magnitude, np.float64))
    return np.ldexp(1.0, np.maximum(exponent - 1, info.minexp) - info.nmant)


def tolerance(op, dtype, ref, magnitude=None, slack=0.0):
    """How far a result of `op` in `dtype` may lie from `ref`: rtol (|ref| + m), where m is `magnitude`, by default the
    largest |ref| of the row.

    16-bit results are float32 results rounded once, to nearest even: half a unit in the last place beside float32's
    bound. That is within the one unit that norms, rope, swiglu and geglu may lose, and within twice the rounding that
    attention may. `slack` is absolute: what an input of bad condition costs. A factor too small for a normal float32
    may be flushed, and the result with it.
    """
    dtype = np.dtype(dtype)
    single, double = RELATIVE[op]
    scale = np.abs(ref) + (row_magnitude(ref) if magnitude is None else magnitude)
    if dtype == bfloat16 and op in ("attention", "kv_cache_sdpa_update") and metalloid.cpu_isa().endswith("_bf16"):
        single = 2**-8  # weights rounded to bfloat16 are off by 2**-9; the contract would allow 2e-2
    bound = (double if dtype == float64 else single) * scale + slack
    if dtype in (float16, bfloat16):
        bound = bound + unit(dtype, np.abs(ref) + bound) / 2
    return bound + 1024 * np.finfo(np.float64 if dtype == float64 else np.float32).tiny


def assert_close(op, out, ref, magnitude=None, slack=0.0):
    """`out` is `ref` within its tolerance: NaN where that is NaN, the same infinity where it is infinite."""
    out, ref = np.asarray(out), np.asarray(ref)
    assert out.shape == ref.shape, f"{op}: shape {out.shape} instead of {ref.shape}"
    with np.errstate(all="ignore"):
        rounded = ref.astype(np.float32 if out.dtype == bfloat16 else out.dtype).astype(out.dtype).astype(np.float64)
        got = widened(out, ref.dtype)
        error = np.abs(got - ref)
        # What rounds to an infinity is one, or just misses it.
        right = (error <= tolerance(op, out.dtype, ref, magnitude, slack)) & np.isfinite(ref)
        right |= (got == rounded) | (np.isnan(got) & np.isnan(ref))
    if right.all():
        return
    wrong = np.argwhere(~right)
    at = tuple(wrong[0]) if wrong.size else ()
    bound = np.broadcast_to(tolerance(op, out.dtype, ref, magnitude, slack), ref.shape)
    raise AssertionError(
        f"{op} in {out.dtype}: {len(wrong)} of {out.size} results are wrong, first at {list(map(int, at))}: "
        f"{got[at]!r} instead of {ref[at]!r}, off by {error[at]:.3g}, allowed {bound[at]:.3g}"
    )
