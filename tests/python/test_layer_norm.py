import metalloid
import numpy as np
import pytest
import reference
from arrays import (
    REMOVED,
    Bad,
    Expected,
    Maker,
    assert_same_bits,
    bad_calls,
    bad_eps,
    bad_floating,
    bad_out,
    bad_shape,
    bad_signature,
    check_call,
    partial_overlap,
    refuse,
)
from hypothesis import given
from hypothesis import strategies as st
from reference import FLOATING, float16, float32, float64, promoted

OP = "layer_norm"


def slack_of_flat_rows(x, weight, eps, ref):
    """Where |mean| passes 100 deviations, the deviations of a row are little more than the mean's rounding errors."""
    x = reference.widened(x, np.longdouble)
    if x.size == 0:
        return 0.0
    mean, deviation = np.abs(x.mean(-1, keepdims=True)), x.std(-1, keepdims=True)
    gain = 1.0 if weight is None else np.abs(reference.widened(weight, np.float64))
    off = 2e-7 * mean / np.sqrt(deviation**2 + eps) * gain
    return np.where(mean > 100 * deviation, np.broadcast_to(off, ref.shape), 0)


@given(st.data())
def test_is_the_formula_for_any_shape_dtype_and_layout(data):
    maker = Maker(data)
    shape = maker.shape()
    x = maker.normal(
        shape, deviation=data.draw(st.sampled_from([1.0, 30.0])), mean=data.draw(st.sampled_from([0.0, 5.0]))
    )
    weight = maker.maybe(lambda: maker.normal(shape[-1:]))
    bias = maker.maybe(lambda: maker.normal(shape[-1:]))
    eps = data.draw(st.sampled_from([1e-5, 1e-6, 1e-3, 1.0]))
    dtype = x.dtype if weight is None else promoted(x.dtype, weight.dtype, *([] if bias is None else [bias.dtype]))
    ref = reference.layer_norm(x, weight, bias, eps)
    slack = slack_of_flat_rows(x, weight, eps, ref)
    check_call(maker, metalloid.layer_norm, (x, weight, bias, eps), {}, Expected(OP, ref, dtype, slack=slack))


@given(st.data())
def test_may_be_its_own_input(data):
    maker = Maker(data)
    values = maker.normal(maker.shape(st.integers(2, 300)))
    weight = maker.maybe(lambda: maker.normal(values.shape[-1:], values.dtype))
    bias = maker.maybe(lambda: maker.normal(values.shape[-1:], values.dtype))
    x = maker.out(values.shape, values.dtype)
    x.view[...] = values
    assert metalloid.layer_norm(x.view, weight, bias, 1e-3, out=x.view) is x.view
    ref = reference.layer_norm(values, weight, bias, 1e-3)
    reference.assert_close(OP, x.view, ref, slack=slack_of_flat_rows(values, weight, 1e-3, ref))
    x.assert_nothing_else_written()


@pytest.mark.parametrize("dtype", [float32, float64], ids=str)
@pytest.mark.parametrize("length", [2, 7, 64, 768, 4099, 100_000])
@pytest.mark.parametrize("mean", [1e4, -1e4, 1e6])
def test_variance_survives_a_large_mean(mean, length, dtype):
    x = np.random.default_rng(length).normal(mean, 1, (4, length)).astype(dtype)
    out, ref = metalloid.layer_norm(x, None, None, 1e-5), reference.layer_norm(x, None, None, 1e-5)
    large = np.abs(ref) > 0.1
    assert (np.abs(out - ref)[large] <= (1e-3 * np.abs(ref))[large]).all()


@pytest.mark.parametrize("length", [16, 63, 768, 5000])
@pytest.mark.parametrize("mean", [10.0, 50.0, 90.0])
def test_means_of_less_than_100_deviations_keep_the_usual_bound(mean, length):
    x = np.random.default_rng(length).normal(mean, 1, (8, length)).astype(np.float32)
    reference.assert_close(OP, metalloid.layer_norm(x, None, None, 1e-5), reference.layer_norm(x, None, None, 1e-5))


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_long_rows(dtype):
    x = np.random.default_rng(1).normal(3, 1, (2, 1 << 20)).astype(dtype)
    reference.assert_close(OP, metalloid.layer_norm(x, None, None, 1e-5), reference.layer_norm(x, None, None, 1e-5))


@pytest.mark.parametrize("length", [1, 3, 7, 100, 1025])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.3, 1e4])
def test_a_constant_row_gives_the_bias(value, length):
    bias = np.linspace(-1, 1, length).astype(np.float32)
    out = metalloid.layer_norm(np.full((2, length), value, np.float32), None, bias, 1e-5)
    np.testing.assert_allclose(out, np.broadcast_to(bias, (2, length)), rtol=0, atol=1e-7 * abs(value) / np.sqrt(1e-5))


@pytest.mark.parametrize("size", [1e-18, 1e-25, 1e-36, 1e15])
def test_rows_of_extreme_size_keep_their_accuracy(size):
    x = (np.random.default_rng(2).normal(0, 1, (3, 65)) * size).astype(np.float32)
    reference.assert_close(OP, metalloid.layer_norm(x, None, None, 0), reference.layer_norm(x, None, None, 0))


def test_nan_and_infinity_stay_in_their_row():
    x = np.random.default_rng(3).normal(size=(4, 70)).astype(np.float32)
    want = metalloid.layer_norm(x, None, None, 1e-5)
    x[1, 0], x[2, -1] = np.nan, np.inf
    out = metalloid.layer_norm(x, None, None, 1e-5)
    assert np.isnan(out[[1, 2]]).all()
    assert_same_bits(out[[0, 3]], want[[0, 3]])


def test_bias_alone_does_not_promote():
    x, bias = np.ones((2, 4), np.float16), np.ones(4, np.float32)
    assert metalloid.layer_norm(x, None, bias, 1e-5).dtype == float16
    assert metalloid.layer_norm(x, bias.astype(np.float16), bias, 1e-5).dtype == float32


def test_accepts_mlx_keywords():
    x = np.random.default_rng(3).normal(size=(3, 8)).astype(np.float32)
    want = metalloid.layer_norm(x, None, None, 1e-5)
    assert_same_bits(want, metalloid.fast.layer_norm(x=x, weight=None, bias=None, eps=1e-5, stream=None))


GOOD = {"x": np.ones((2, 4), np.float32), "weight": np.ones(4, np.float32), "bias": np.ones(4, np.float32), "eps": 1e-5}
AHEAD, BEHIND = partial_overlap((2, 4))


@bad_calls(
    *bad_floating("x", (2, 4)),
    *bad_floating("weight", (4,)),
    *bad_floating("bias", (4,)),
    *bad_shape("weight", (4,)),
    *bad_shape("bias", (4,)),
    Bad("x", {"x": np.ones((), np.float32)}),
    *bad_eps(),
    *bad_out((2, 4)),
    *bad_signature(),
    Bad("out", {"x": AHEAD, "out": BEHIND}),
    Bad("out", {"x": np.ones((1, 4), np.float32), "bias": AHEAD[0], "out": AHEAD[:1]}),
    Bad("bias", {"bias": REMOVED}, TypeError),
)
def test_bad_arguments_are_refused(bad):
    refuse(metalloid.layer_norm, OP, GOOD, bad, [((2, 4), float32)])
