"""Random arrays in every layout of memory, outputs that notice a write beside them, and the calls that use both."""

import re
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import strategies as st
from reference import FLOATING, assert_close, float32

INTEGERS = tuple(np.dtype(name) for name in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"))
LAYOUTS = ("contiguous", "transposed", "sliced", "reversed", "broadcast", "any")
OUT_LAYOUTS = ("contiguous", "transposed", "sliced", "reversed", "any")

# Lengths of a row: the small ones, and both sides of every vector width and block.
lengths = st.one_of(
    st.integers(0, 40), st.sampled_from([47, 48, 49, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 513, 1024, 1031])
)
floating = st.sampled_from(FLOATING)
# One dtype for the whole call three times out of four, as models do, else each operand has its own.
dtype_of_call = st.sampled_from([*FLOATING, *FLOATING, *FLOATING, None, None])


def bits(array):
    """The array as unsigned integers: equal bits, NaN and the sign of zero included."""
    array = np.asarray(array)
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def assert_same_bits(a, b):
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    np.testing.assert_array_equal(bits(a), bits(b))


def _frame(shape, dtype, layout, rng):
    """(buffer, window): window(buffer) is a view of `shape` in the drawn layout."""
    rank = len(shape)
    order = rng.permutation(rank) if layout in ("transposed", "any") else np.arange(rank)
    sliced, flipped = layout in ("sliced", "any"), {"reversed": 1.0, "any": 0.5}.get(layout, 0.0)
    steps = rng.integers(1, 4, rank) if sliced else np.ones(rank, int)
    before, after = (rng.integers(0, 3, rank) if sliced else np.zeros(rank, int) for _ in range(2))
    directions = np.where(rng.random(rank) < flipped, -1, 1)
    extents = [int(before[a] + shape[a] * steps[a] + after[a]) for a in order]

    def window(buffer):
        view = buffer.transpose(np.argsort(order))
        view = view[(..., *(slice(b, b + n * s, s) for b, n, s in zip(before, shape, steps, strict=True)))]
        return view[(..., *(slice(None, None, direction) for direction in directions))]

    return np.empty(extents, dtype), window


def arranged(values, layout, rng):
    """The same values in another layout; "broadcast" repeats the first entry along some axes, so the values change."""
    values = np.asarray(values)
    if layout == "contiguous":
        return np.ascontiguousarray(values).reshape(values.shape)
    if layout == "broadcast" or (layout == "any" and rng.random() < 0.2):
        repeated = rng.random(values.ndim) < 0.5
        first = values[tuple(slice(0, 1) if r else slice(None) for r in repeated)]
        return np.broadcast_to(first, values.shape)
    buffer, window = _frame(values.shape, values.dtype, layout, rng)
    buffer[...] = np.nan if values.dtype in FLOATING else 1  # a read beside the view shows
    view = window(buffer)
    view[...] = values
    return view


class Output:
    """An `out=` in some layout, inside a buffer whose other bytes must stay."""

    def __init__(self, shape, dtype, layout="contiguous", rng=None):
        dtype = np.dtype(dtype)
        self.buffer, window = _frame(shape, dtype, layout, rng or np.random.default_rng(0))
        self.buffer.view(f"u{dtype.itemsize}")[...] = int.from_bytes(b"\xa5" * dtype.itemsize, "little")
        self.view = window(self.buffer)
        self._outside = np.ones(self.buffer.shape, bool)
        window(self._outside)[...] = False
        self._before = bits(self.buffer).copy()

    def assert_nothing_else_written(self):
        np.testing.assert_array_equal(bits(self.buffer)[self._outside], self._before[self._outside])

    def assert_untouched(self):
        np.testing.assert_array_equal(bits(self.buffer), self._before)


class Maker:
    """Draws what shapes an example from hypothesis, and its numbers from a generator with a drawn seed."""

    def __init__(self, data):
        self.draw = data.draw
        self.rng = np.random.default_rng(self.draw(st.integers(0, 2**32 - 1), "seed"))
        self._dtype = self.draw(dtype_of_call, "dtype of the call")

    def dtype(self):
        return self._dtype or self.draw(floating, "dtype")

    def shape(self, length=lengths, least_rank=1, most_rank=4, most=5):
        leading = self.draw(
            st.lists(st.integers(0, most) | st.integers(1, most), min_size=least_rank - 1, max_size=most_rank - 1)
        )
        return (*leading, self.draw(length, "length"))

    def normal(self, shape, dtype=None, deviation=1.0, mean=0.0):
        return self.lay(self.rng.normal(mean, deviation, shape).astype(dtype or self.dtype()))

    def uniform(self, shape, low, high, dtype=None):
        return self.lay(self.rng.uniform(low, high, shape).astype(dtype or self.dtype()))

    def integers(self, shape, low, high, dtype):
        return self.lay(self.rng.integers(low, high, shape, endpoint=True).astype(dtype))

    def lay(self, values):
        return arranged(values, self.draw(st.sampled_from(LAYOUTS), "layout"), self.rng)

    def out(self, shape, dtype):
        return Output(shape, dtype, self.draw(st.sampled_from(OUT_LAYOUTS), "layout of out"), self.rng)

    def maybe(self, make):
        return make() if self.draw(st.booleans()) else None


class Expected(NamedTuple):
    op: str
    ref: np.ndarray
    dtype: np.dtype
    magnitude: np.ndarray | None = None
    slack: np.ndarray | float = 0.0

    def check(self, out):
        assert type(out) is np.ndarray
        assert out.dtype == self.dtype, f"{self.op} returned {out.dtype} instead of {self.dtype}"
        assert_close(self.op, out, self.ref, self.magnitude, self.slack)


def check_call(maker, function, arguments, keywords, *expected):
    """Calls twice, into a new array and into a strided `out=`: both must be right, and nothing else written."""
    inputs = [a for a in (*arguments, *keywords.values()) if isinstance(a, np.ndarray)]
    before = [bits(a).copy() for a in inputs]
    results = function(*arguments, **keywords)
    several = len(expected) > 1
    assert several == isinstance(results, (tuple, list))
    results = tuple(results) if several else (results,)
    assert len(results) == len(expected)
    for want, result in zip(expected, results, strict=True):
        want.check(result)

    outputs = [maker.out(want.ref.shape, want.dtype) for want in expected]
    views = tuple(output.view for output in outputs)
    returned = function(*arguments, **keywords, out=views if several else views[0])
    for want, output, result in zip(expected, outputs, returned if several else (returned,), strict=True):
        assert result is output.view
        want.check(output.view)
        output.assert_nothing_else_written()
    for a, b in zip(inputs, before, strict=True):
        np.testing.assert_array_equal(bits(a), b, err_msg="an input was written")
    return results if several else results[0]


# ---- refusals


class Bad(NamedTuple):
    """A change that makes a good call bad, the argument that the message must name, and the exception."""

    argument: str
    change: dict
    exception: type | tuple = ValueError

    def __str__(self):
        return f"{self.argument}: " + ", ".join(f"{name}={describe(value)}" for name, value in self.change.items())


def describe(value):
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, tuple):
        return f"({', '.join(map(describe, value))})"
    return "removed" if value is REMOVED else repr(value)


def bad_calls(*table):
    return pytest.mark.parametrize("bad", table, ids=str)


def refuse(function, op, good, bad, outputs):
    """The bad call raises what it should, in one line that names the operation and the argument, and writes nothing.
    `outputs` are (shape, dtype) of the results; a change may bring its own `out`."""
    function(**good)  # the call is good but for the change
    frames = [Output(shape, dtype) for shape, dtype in outputs]
    views = tuple(frame.view for frame in frames)
    arguments = {**good, "out": views[0] if len(views) == 1 else views, **bad.change}
    arguments = {name: value for name, value in arguments.items() if value is not REMOVED}
    arrays = [a for a in flat(arguments.values()) if isinstance(a, np.ndarray) and not a.dtype.hasobject]
    before = [bits(a).copy() for a in arrays]
    with pytest.raises(bad.exception) as caught:
        function(**arguments)
    for a, b in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(bits(a), b)
    for frame in frames:
        frame.assert_untouched()
    message = str(caught.value)
    assert re.search(rf"\b{bad.argument}\b", message), message
    if caught.type is ValueError:
        assert "\n" not in message
        assert message.startswith(f"{op}: "), message


REMOVED = object()  # as a change: the argument is left out


def flat(values):
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from value
        else:
            yield value


def misaligned(shape, dtype=float32):
    """An array whose data is not aligned to its elements."""
    dtype = np.dtype(dtype)
    array = np.zeros(int(np.prod(shape)) * dtype.itemsize + 1, np.uint8)[1:].view(dtype).reshape(shape)
    assert not array.flags.aligned
    return array


def read_only(shape, dtype=float32):
    array = np.zeros(shape, dtype)
    array.flags.writeable = False
    return array


def overlapping_itself(shape, dtype=float32):
    """A writable array whose first axis has stride 0."""
    return np.lib.stride_tricks.as_strided(np.zeros(shape[1:], dtype), shape, (0, *np.zeros(shape[1:], dtype).strides))


def bad_floating(argument, shape):
    """What every floating tensor refuses."""
    return [
        Bad(argument, {argument: np.zeros(shape, np.int32)}),
        Bad(argument, {argument: np.zeros(shape, bool)}),
        Bad(argument, {argument: np.zeros(shape, np.complex64)}),
        Bad(argument, {argument: np.zeros(shape, object)}),
        Bad(argument, {argument: misaligned(shape)}),
        Bad(argument, {argument: "text"}, (TypeError, ValueError)),
    ]


def bad_integers(argument, shape, bool_too=True):
    """What every integer tensor refuses; bool as well where it is no mask."""
    return [
        Bad(argument, {argument: np.zeros(shape, np.float32)}),
        Bad(argument, {argument: np.zeros(shape, np.complex64)}),
        *([Bad(argument, {argument: np.zeros(shape, bool)})] if bool_too else []),
        Bad(argument, {argument: misaligned(shape, np.int32)}),
        Bad(argument, {argument: "text"}, (TypeError, ValueError)),
    ]


def bad_shape(argument, shape, dtype=float32):
    """Shapes that differ from the one wanted: rank, each extent, extents of 1 (nothing broadcasts)."""
    shapes = [(*shape, 1), (1, *shape), shape[1:], shape[:-1]]
    for axis, extent in enumerate(shape):
        shapes += [(*shape[:axis], other, *shape[axis + 1 :]) for other in (extent + 1, 1, 0) if other != extent]
    return [Bad(argument, {argument: np.zeros(other, dtype)}) for other in dict.fromkeys(shapes) if other != shape]


def bad_out(shape, dtype=float32):
    """What a single `out=` refuses."""
    return [
        Bad("out", {"out": np.zeros(shape, np.int32)}),
        *bad_shape("out", shape, dtype),
        Bad("out", {"out": read_only(shape, dtype)}),
        Bad("out", {"out": misaligned(shape, dtype)}),
        Bad("out", {"out": overlapping_itself(shape, dtype)}),
        Bad("out", {"out": "text"}, (TypeError, ValueError)),
    ]


def bad_eps():
    return [
        Bad("eps", {"eps": -1e-5}),
        Bad("eps", {"eps": float("nan")}),
        Bad("eps", {"eps": float("inf")}),
        Bad("eps", {"eps": "small"}, TypeError),
        Bad("eps", {"eps": REMOVED}, TypeError),
    ]


def bad_signature(extra="surprise"):
    return [Bad(extra, {extra: 1}, TypeError)]


def partial_overlap(shape, dtype=float32):
    """(input, output): two views of one buffer, one row apart."""
    buffer = np.ones((shape[0] + 1, *shape[1:]), dtype)
    return buffer[:-1], buffer[1:]
