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
    read_only,
    refuse,
)
from hypothesis import given
from hypothesis import strategies as st
from reference import FLOATING, float32, promoted

OP = "rms_norm"
eps_values = st.sampled_from([1e-5, 1e-6, 0, 1.0, 1e-12])


@given(st.data())
def test_is_the_formula_for_any_shape_dtype_and_layout(data):
    maker = Maker(data)
    shape = maker.shape()
    x = maker.normal(shape, deviation=data.draw(st.sampled_from([1.0, 100.0, 1e-3])))
    weight = maker.maybe(lambda: maker.normal(shape[-1:]))
    eps = data.draw(eps_values)
    dtype = promoted(x.dtype, *([] if weight is None else [weight.dtype]))
    check_call(maker, metalloid.rms_norm, (x, weight, eps), {}, Expected(OP, reference.rms_norm(x, weight, eps), dtype))


@given(st.data())
def test_may_be_its_own_input(data):
    maker = Maker(data)
    values = maker.normal(maker.shape())
    weight = maker.maybe(lambda: maker.normal(values.shape[-1:], values.dtype))
    x = maker.out(values.shape, values.dtype)
    x.view[...] = values
    assert metalloid.rms_norm(x.view, weight, 1e-5, out=x.view) is x.view
    reference.assert_close(OP, x.view, reference.rms_norm(values, weight, 1e-5))
    x.assert_nothing_else_written()


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_long_rows(dtype):
    rng = np.random.default_rng(1)
    x = rng.normal(3, 1, (2, 1 << 20)).astype(dtype)
    reference.assert_close(OP, metalloid.rms_norm(x, None, 1e-5), reference.rms_norm(x, None, 1e-5))


@pytest.mark.parametrize("length", [4096, 100_003, 1 << 20])
def test_rounding_errors_of_a_constant_row_do_not_add_up(length):
    x = np.full((1, length), 1.1, np.float32)
    reference.assert_close(OP, metalloid.rms_norm(x, None, 0), reference.rms_norm(x, None, 0))


@pytest.mark.parametrize("size", [1e-18, 1e-25, 1e-36, 1e15])
def test_rows_of_extreme_size_keep_their_accuracy(size):
    x = (np.random.default_rng(2).normal(0, 1, (3, 65)) * size).astype(np.float32)
    reference.assert_close(OP, metalloid.rms_norm(x, None, 0), reference.rms_norm(x, None, 0))


def test_zero_row_with_eps_is_zero():
    assert not metalloid.rms_norm(np.zeros((2, 9), np.float32), np.ones(9, np.float32), 1e-6).any()


@pytest.mark.parametrize("length", [1, 5, 64, 131])
def test_nan_and_infinity_stay_in_their_row(length):
    x = np.ones((4, length), np.float32)
    x[1, 0], x[2, -1] = np.nan, np.inf
    out = metalloid.rms_norm(x, None, 0)
    assert np.isnan(out[1]).all()
    assert np.isnan(out[2, -1])
    assert not out[2, :-1].any()
    assert (out[[0, 3]] == 1).all()


def test_weight_is_not_rounded_to_the_dtype_of_x():
    weight = np.full(8, 1 + 2**-12, np.float32)
    out = metalloid.rms_norm(np.ones((1, 8), np.float16), weight, 0)
    assert out.dtype == float32
    assert (out == weight).all()


def test_accepts_mlx_keywords_and_scalars_of_numpy():
    x = np.random.default_rng(3).normal(size=(3, 8)).astype(np.float32)
    want = metalloid.rms_norm(x, None, 1e-5)
    assert_same_bits(want, metalloid.rms_norm(x=x, weight=None, eps=np.float64(1e-5), stream=None))
    assert_same_bits(want, metalloid.fast.rms_norm(x, None, 1e-5))
    assert_same_bits(metalloid.rms_norm(x, None, 0.0), metalloid.rms_norm(x, None, 0))


def test_read_only_inputs():
    x, weight = read_only((2, 3)), read_only((3,))
    assert metalloid.rms_norm(x, weight, 1e-5).shape == (2, 3)


GOOD = {"x": np.ones((2, 4), np.float32), "weight": np.ones(4, np.float32), "eps": 1e-5}
AHEAD, BEHIND = partial_overlap((2, 4))


@bad_calls(
    *bad_floating("x", (2, 4)),
    *bad_floating("weight", (4,)),
    *bad_shape("weight", (4,)),
    Bad("x", {"x": np.ones((), np.float32)}),
    Bad("weight", {"x": np.ones((2, 5), np.float32), "out": np.ones((2, 5), np.float32)}),
    *bad_eps(),
    *bad_out((2, 4)),
    *bad_signature(),
    Bad("out", {"x": AHEAD, "out": BEHIND}),
    Bad("out", {"x": np.ones((1, 4), np.float32), "weight": AHEAD[0], "out": AHEAD[:1]}),
    Bad("x", {"x": REMOVED}, TypeError),
    Bad("x", {"x": None}, (TypeError, ValueError)),
)
def test_bad_arguments_are_refused(bad):
    refuse(metalloid.rms_norm, OP, GOOD, bad, [((2, 4), float32)])
