"""The four operations of a Llama block, by Metalloid and by plain NumPy, behind one interface.

Heads are {batch, heads, time, head_dim}; any strides will do.
"""

from __future__ import annotations

from time import perf_counter

import metalloid
import numpy as np


class Metalloid:
    """Metalloid's kernels, and the seconds spent in them."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def _timed(self, function, *arguments, **options):
        start = perf_counter()
        result = function(*arguments, **options)
        self.seconds += perf_counter() - start
        return result

    def rms_norm(self, x, weight, eps):
        return self._timed(metalloid.rms_norm, x, weight, eps)

    def rope(self, x, dims, base, freqs, offset):
        base = None if freqs is not None else base
        return self._timed(metalloid.rope, x, dims, traditional=True, base=base, scale=1.0, offset=offset, freqs=freqs)

    def attention(self, q, k, v, scale):
        return self._timed(metalloid.scaled_dot_product_attention, q, k, v, scale=scale, mask="causal")

    def swiglu(self, gate, up):
        return self._timed(metalloid.swiglu, gate, up)


class PlainNumPy:
    """The same in NumPy alone, as one would write it down."""

    seconds = 0.0

    def rms_norm(self, x, weight, eps):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * weight

    def rope(self, x, dims, base, freqs, offset):
        inv_freqs = base ** (-np.arange(0, dims, 2) / dims) if freqs is None else 1 / freqs.astype(np.float64)
        angles = (offset + np.arange(x.shape[-2]))[:, None] * inv_freqs
        cosines, sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        out = x.copy()
        x1, x2 = x[..., 0:dims:2], x[..., 1:dims:2]
        out[..., 0:dims:2] = x1 * cosines - x2 * sines
        out[..., 1:dims:2] = x1 * sines + x2 * cosines
        return out

    def attention(self, q, k, v, scale):
        group = q.shape[1] // k.shape[1]
        scores = q @ np.repeat(k, group, axis=1).swapaxes(-1, -2) * np.float32(scale)
        hidden = np.triu(np.ones(scores.shape[-2:], dtype=bool), k=1 + k.shape[2] - q.shape[2])
        scores[..., hidden] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return weights @ np.repeat(v, group, axis=1)

    def swiglu(self, gate, up):
        with np.errstate(over="ignore"):  # a large negative gate: 0, as it should be
            return gate / (1 + np.exp(-gate)) * up
