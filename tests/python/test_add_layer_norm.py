import metalloid
import numpy as np
import pytest
import reference
from arrays import (
    Bad,
    Expected,
    Maker,
    assert_same_bits,
    bad_calls,
    bad_eps,
    bad_floating,
    bad_shape,
    bad_signature,
    check_call,
    partial_overlap,
    refuse,
)
from hypothesis import given
from hypothesis import strategies as st
from reference import float16, float32, promoted

OP = "add_layer_norm"


@given(st.data())
def test_is_the_formula_for_any_shape_dtype_and_layout(data):
    maker = Maker(data)
    shape = maker.shape(length=st.integers(0, 1) | st.integers(8, 300))
    x, residual = (maker.lay(maker.rng.normal(0, 2, shape).astype(maker.dtype())) for _ in range(2))
    weight = maker.maybe(lambda: maker.normal(shape[-1:]))
    bias = maker.maybe(lambda: maker.normal(shape[-1:]))
    eps = data.draw(st.sampled_from([1e-5, 1e-3, 1.0]))
    total, norm = reference.add_layer_norm(x, residual, weight, bias, eps)
    flat = (
        np.abs(total.mean(-1, keepdims=True)) > 100 * total.std(-1, keepdims=True) if total.size else np.zeros(1, bool)
    )
    if flat.any():  # broadcast along the row: the mean's own rounding is all that is left
        gain = 1.0 if weight is None else np.abs(reference.widened(weight, np.float64))
        slack = np.broadcast_to(np.where(flat, 2e-7 * np.abs(total) / np.sqrt(eps), 0) * gain, total.shape)
    else:
        slack = 0.0
    dtype = promoted(x.dtype, residual.dtype)
    norm_dtype = dtype if weight is None else promoted(dtype, weight.dtype, *([] if bias is None else [bias.dtype]))
    check_call(
        maker,
        metalloid.add_layer_norm,
        (x, residual, weight, bias, eps),
        {},
        Expected(OP, total, dtype),
        Expected(OP, norm, norm_dtype, slack=slack),
    )


def test_the_residual_stream_may_be_updated_in_place():
    rng = np.random.default_rng(0)
    x, residual = rng.normal(size=(2, 3, 65)).astype(np.float32), rng.normal(size=(2, 3, 65)).astype(np.float32)
    want = metalloid.add_layer_norm(x, residual, None, None, 1e-5)
    out = metalloid.add_layer_norm(x, residual, None, None, 1e-5, out=(residual, x))
    assert out[0] is residual
    assert out[1] is x
    assert_same_bits(residual, want[0])
    assert_same_bits(x, want[1])


def test_the_norm_is_taken_from_the_unrounded_sum():
    x = np.full((1, 64), 2048, np.float16)
    residual = (np.arange(64) % 4 / 4).astype(np.float16).reshape(1, 64)
    total, out = metalloid.add_layer_norm(x, residual, None, None, 1e-5)
    assert total.dtype == float16
    assert (total == 2048).all()
    ref = reference.add_layer_norm(x, residual, None, None, 1e-5)[1]
    reference.assert_close(OP, out, ref, slack=1e-3 * np.abs(ref).max())


@pytest.mark.parametrize("mean", [1e4, -1e4])
def test_variance_survives_a_large_mean(mean):
    rng = np.random.default_rng(5)
    x, residual = rng.normal(mean, 1, (4, 777)).astype(np.float32), rng.normal(0, 1, (4, 777)).astype(np.float32)
    ref = reference._layer_norm((x + residual).astype(np.float64), None, None, 1e-5)  # of the float32 sum
    out = metalloid.add_layer_norm(x, residual, None, None, 1e-5)[1]
    large = np.abs(ref) > 0.1
    assert (np.abs(out - ref)[large] <= (1e-3 * np.abs(ref))[large]).all()


GOOD = {name: np.ones((2, 4), np.float32) for name in ("x", "residual")} | {
    "weight": np.ones(4, np.float32),
    "bias": np.ones(4, np.float32),
    "eps": 1e-5,
}
AHEAD, BEHIND = partial_overlap((2, 4))
ONE, OTHER = np.zeros((2, 4), np.float32), np.zeros((2, 4), np.float32)


@bad_calls(
    *bad_floating("x", (2, 4)),
    *bad_floating("residual", (2, 4)),
    *bad_floating("weight", (4,)),
    *bad_floating("bias", (4,)),
    *bad_shape("residual", (2, 4)),
    *bad_shape("weight", (4,)),
    *bad_shape("bias", (4,)),
    Bad("x", {"x": np.ones((), np.float32)}),
    *bad_eps(),
    *bad_signature(),
    Bad("out", {"out": ONE}, (TypeError, ValueError)),
    Bad("out", {"out": (ONE,)}, (TypeError, ValueError)),
    Bad("out", {"out": (ONE, ONE)}),
    Bad("out", {"out": (ONE, np.zeros((2, 5), np.float32))}),
    Bad("sum", {"out": (np.zeros((2, 5), np.float32), ONE)}),
    Bad("sum", {"x": AHEAD, "out": (BEHIND, ONE)}),
    Bad("out", {"residual": AHEAD, "out": (ONE, BEHIND)}),
)
def test_bad_arguments_are_refused(bad):
    refuse(metalloid.add_layer_norm, OP, GOOD, bad, [((2, 4), float32), ((2, 4), float32)])
