"""Calls of every operation with NumPy arrays, for libraries that are given the same arrays as their own."""

from collections.abc import Callable
from typing import NamedTuple

import metalloid
import numpy as np
import reference


class Call(NamedTuple):
    """`wide` gives the results in float64, of the same arguments."""

    label: str
    op: str
    args: tuple
    keywords: dict
    wide: Callable

    def __str__(self):
        return self.label

    def expected(self):
        """Metalloid's own results, as a tuple; the caches of kv_cache_sdpa_update too."""
        args = [a.copy() if isinstance(a, np.ndarray) else a for a in self.args]
        results = getattr(metalloid, self.op)(*args, **self.keywords)
        if self.op == "kv_cache_sdpa_update":
            return results, args[3], args[4]
        return tuple(results) if isinstance(results, (tuple, list)) else (results,)

    def arrays(self):
        """(place, array) of every array: an index of args, or a keyword."""
        return [(place, a) for place, a in (*enumerate(self.args), *self.keywords.items()) if isinstance(a, np.ndarray)]

    def with_arrays(self, arrays):
        """The arguments with other arrays in the same places."""
        args, keywords = list(self.args), dict(self.keywords)
        for (place, _), array in zip(self.arrays(), arrays, strict=True):
            (keywords if isinstance(place, str) else args)[place] = array
        return args, keywords

    def masked(self, convert):
        """The arrays with each of them masked in turn, the others converted."""
        arrays = [array for _, array in self.arrays()]
        for at in range(len(arrays)):
            yield [np.ma.masked_array(a, mask=True) if i == at else convert(a) for i, a in enumerate(arrays)]

    def cast(self, dtype):
        """The call with its floating arrays in another dtype."""
        return self._replace(
            args=tuple(_cast(a, dtype) for a in self.args),
            keywords={name: _cast(a, dtype) for name, a in self.keywords.items()},
        )


def _cast(value, dtype):
    return value.astype(dtype) if isinstance(value, np.ndarray) and value.dtype == np.float32 else value


def _results(value):
    """Of reference.py, as a tuple of arrays."""
    if isinstance(value, reference.Rope):
        return (value.out,)
    if isinstance(value, reference.Attention):
        return (value.out, value.logsumexp)
    if isinstance(value, reference.CacheUpdate):
        return (value.out.out, value.k_cache, value.v_cache)
    if isinstance(value, tuple) and any(isinstance(v, reference.Rope) for v in value):
        return tuple(v.out for v in value)
    return value if isinstance(value, tuple) else (value,)


def calls():
    rng = np.random.default_rng(7)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    def case(label, op, *args, **keywords):
        name = "attention" if op == "scaled_dot_product_attention" else op

        def wide(*args, **keywords):
            keywords.pop("return_logsumexp", None)
            results = _results(getattr(reference, name)(*args, **keywords))
            return results if label.endswith("logsumexp") or name != "attention" else results[:1]

        return Call(label, op, args, keywords, wide)

    x, weight = normal(3, 5, 16), normal(16)
    a = normal(2, 3, 4, 8)
    q, k, v = normal(2, 4, 5, 8), normal(2, 2, 7, 8), normal(2, 2, 7, 6)
    rope = {"traditional": False, "base": 10000.0, "scale": 0.5, "offset": 3}
    scale = 8**-0.5
    ids = rng.integers(0, 50, (2, 4)).astype(np.int32)
    frequencies = np.exp(normal(4))
    bool_mask = rng.random((5, 7)) < 0.7
    bool_mask[0] = False  # a query that sees nothing
    key_mask = rng.random((2, 7)) < 0.7
    gamma = rng.random((2, 6, 4)).astype(np.float32)
    delta = (normal(2, 6, 2, 8) / 4, normal(2, 6, 2, 8) / 4, normal(2, 6, 4, 6))
    cache = (normal(2, 1, 4, 8), normal(2, 1, 2, 8), normal(2, 1, 2, 6), normal(2, 7, 2, 8), normal(2, 7, 2, 6))
    more = (normal(2, 3, 4, 8), normal(2, 3, 2, 8), normal(2, 3, 2, 6), *cache[3:])
    return [
        case("rms_norm", "rms_norm", x, weight, 1e-5),
        case("rms_norm without weight", "rms_norm", x, None, 1e-5),
        case("layer_norm", "layer_norm", x, weight, normal(16), 1e-5),
        case("layer_norm without weight", "layer_norm", x, None, None, 1e-5),
        case("add_rms_norm", "add_rms_norm", x, normal(3, 5, 16), weight, 1e-5),
        case("add_layer_norm", "add_layer_norm", x, normal(3, 5, 16), weight, normal(16), 1e-5),
        case("rope", "rope", a, 8, **rope),
        case("rope traditional, in part", "rope", a, 6, **{**rope, "traditional": True}),
        case("rope offsets", "rope", a, 8, **{**rope, "offset": np.array([3, 40], np.int32)}),
        case("rope freqs", "rope", a, 8, **{**rope, "base": None, "freqs": frequencies}),
        case("rope position_ids", "rope", a, 8, **{**rope, "offset": 0, "position_ids": ids}),
        case("rope inv_freqs, time_axis", "rope", a, 8,
             **{**rope, "base": None, "inv_freqs": frequencies, "time_axis": 1}),
        case("qk_norm_rope", "qk_norm_rope", a, normal(2, 1, 4, 8), normal(8), normal(8), 1e-5, 8, **rope),
        case("swiglu", "swiglu", x, normal(3, 5, 16)),
        case("geglu", "geglu", x, normal(3, 5, 16)),
        case("geglu tanh", "geglu", x, normal(3, 5, 16), approximate="tanh"),
        case("attention", "scaled_dot_product_attention", q, k, v, scale=scale),
        case("attention causal", "scaled_dot_product_attention", q, k, v, scale=scale, mask="causal"),
        case("attention bool mask", "scaled_dot_product_attention", q, k, v, scale=scale, mask=bool_mask),
        case("attention float mask, sinks", "scaled_dot_product_attention", q, k, v, scale=scale,
             mask=normal(2, 1, 5, 7), sinks=normal(4)),
        case("attention with everything, logsumexp", "scaled_dot_product_attention", q, k, v, scale=scale,
             mask=bool_mask, causal=True, key_mask=key_mask, window=3, softcap=2.0, causal_offset=1, sinks=normal(4),
             return_logsumexp=True),
        case("kv_cache_sdpa_update", "kv_cache_sdpa_update", *cache, 4, np.arange(7)[None].repeat(2, 0) <= 4, scale),
        case("kv_cache_sdpa_update of three", "kv_cache_sdpa_update", *more, 2, None, scale),
        case("cross_entropy", "cross_entropy", normal(3, 5, 9), rng.integers(0, 9, (3, 5)).astype(np.int32)),
        case("cross_entropy ignore_index", "cross_entropy", normal(4, 9), np.array([1, -100, 8, 0], np.int32),
             ignore_index=-100),
        case("gated_delta_update", "gated_delta_update", *delta, gamma, gamma[::-1].copy()),
        case("gated_delta_update state, mask, channels", "gated_delta_update", *delta,
             rng.random((2, 6, 4, 8)).astype(np.float32), gamma, normal(2, 4, 6, 8), rng.random((2, 6)) < 0.7),
    ]  # fmt: skip


CALLS = calls()


def slope(call, directions, cotangents, step=1e-5):
    """The derivative of the sum of cotangent * result along directions of floating arrays, by float64 differences."""

    def at(distance):
        arrays = [
            a.astype(np.float64) + distance * d if d is not None else a
            for (_, a), d in zip(call.arrays(), directions, strict=True)
        ]
        args, keywords = call.with_arrays(arrays)
        return sum(float(np.sum(c * r)) for c, r in zip(cotangents, call.wide(*args, **keywords), strict=True))

    return (at(step) - at(-step)) / (2 * step)


def directions_and_cotangents(call, seed=11):
    rng = np.random.default_rng(seed)
    directions = [rng.standard_normal(a.shape) if a.dtype.kind in "fV" else None for _, a in call.arrays()]
    cotangents = [rng.standard_normal(r.shape) for r in call.expected()]
    finite = [np.isfinite(np.asarray(r, np.float64)) for r in call.expected()]  # no slope at -inf
    return directions, [np.where(f, c, 0) for f, c in zip(finite, cotangents, strict=True)]
