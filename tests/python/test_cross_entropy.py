import metalloid
import numpy as np
import pytest
import reference
from arrays import (
    INTEGERS,
    Bad,
    Expected,
    Maker,
    assert_same_bits,
    bad_calls,
    bad_floating,
    bad_integers,
    bad_out,
    bad_shape,
    bad_signature,
    check_call,
    refuse,
)
from hypothesis import given
from hypothesis import strategies as st
from reference import FLOATING, float32

OP = "cross_entropy"


@given(st.data())
def test_is_the_formula_for_any_shape_dtype_and_layout(data):
    maker = Maker(data)
    shape = maker.shape(st.integers(1, 40) | st.sampled_from([63, 64, 65, 129, 1000, 4097]))
    classes = shape[-1]
    deviation = data.draw(st.sampled_from([1.0, 5.0, 30.0]))
    logits = maker.normal(shape, deviation=deviation)
    fit = [dtype for dtype in INTEGERS if np.iinfo(dtype).max >= classes]
    dtype = data.draw(st.sampled_from(fit))
    targets = maker.rng.integers(0, classes, shape[:-1])
    keywords = {}
    if data.draw(st.booleans()):
        keywords["ignore_index"] = data.draw(
            st.sampled_from([-100, -1, 0, classes, 100] if dtype.kind == "i" else [0, classes, 100])
        )
        targets = np.where(maker.rng.random(targets.shape) < 0.3, keywords["ignore_index"], targets)
    targets = maker.lay(targets.astype(dtype))
    ref = reference.cross_entropy(logits, targets, **keywords)
    check_call(
        maker, metalloid.cross_entropy, (logits, targets), keywords, Expected(OP, ref.astype(np.float64), float32)
    )


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("classes", [49152, 151_936])
def test_vocabularies_of_models(classes, dtype):
    rng = np.random.default_rng(classes)
    logits, targets = rng.normal(0, 3, (5, classes)).astype(dtype), rng.integers(0, classes, 5)
    reference.assert_close(
        OP, metalloid.cross_entropy(logits, targets), reference.cross_entropy(logits, targets).astype(np.float64)
    )


def test_equal_logits_give_the_logarithm_of_their_number():
    logits = np.full((3, 151_936), [[0.0], [1e4], [-1e4]], np.float32)
    out = metalloid.cross_entropy(logits, np.array([0, 5, 151_935]))
    np.testing.assert_allclose(out, np.log(151_936), rtol=1e-6)


@pytest.mark.parametrize("margin", [1.0, 5.0, 10.0, 14.0, 20.0, 40.0])
def test_a_confident_row_keeps_its_small_loss(margin):
    logits = np.zeros((1, 9), np.float32)
    logits[0, 4] = margin
    out = metalloid.cross_entropy(logits, np.array([4]))
    reference.assert_close(OP, out, np.log1p(8 * np.exp(-np.float64(margin))).reshape(1))


@pytest.mark.parametrize("length", [3, 70])
def test_large_logits_do_not_overflow_and_infinite_ones_are_ordinary(length):
    logits = np.zeros((6, length), np.float32)
    logits[0], logits[1, 0], logits[2, 0], logits[3, 1], logits[4, :-1] = 3e38, 3e38, -3e38, -np.inf, -np.inf
    logits[5, 1] = np.nan
    targets = np.array([0, 0, 0, 0, length - 1, 0])
    out = metalloid.cross_entropy(logits, targets)
    np.testing.assert_allclose(out[:5], [np.log(length), 0, 3e38, np.log(length - 1), 0], rtol=1e-6)
    assert np.isnan(out[5])
    assert metalloid.cross_entropy(logits[3:4], np.array([1])) == np.inf


def test_a_single_class_has_no_loss():
    assert not metalloid.cross_entropy(np.full((4, 1), 7.3, np.float16), np.zeros(4, np.uint8)).any()


def test_rows_that_are_all_ignored_need_no_valid_target():
    out = metalloid.cross_entropy(np.full((3, 5), np.nan, np.float32), np.full(3, -100), ignore_index=-100)
    assert (out == 0).all()


def test_no_rows_need_no_classes():
    assert metalloid.cross_entropy(np.zeros((0, 0), np.float32), np.zeros(0, np.int32)).shape == (0,)


def test_accepts_mlx_keywords():
    logits, targets = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32), np.array([1, 2, 3])
    want = metalloid.cross_entropy(logits, targets)
    assert_same_bits(want, metalloid.fast.cross_entropy(logits=logits, targets=targets, stream=None))


GOOD = {"logits": np.ones((2, 3, 5), np.float32), "targets": np.zeros((2, 3), np.int64)}


@bad_calls(
    *bad_floating("logits", (2, 3, 5)),
    *bad_integers("targets", (2, 3)),
    *bad_shape("targets", (2, 3), np.int64),
    Bad("logits", {"logits": np.ones((), np.float32), "targets": np.zeros((), np.int64)}),
    Bad("logits", {"logits": np.ones((2, 3, 0), np.float32)}),
    *[Bad("targets", {"targets": np.array([[0, 1, 2], [4, value, 0]])}) for value in (5, -1, -100, 2**40, -(2**62))],
    Bad("targets", {"targets": np.array([[0, 1, 2], [4, 2**64 - 1, 0]], np.uint64)}),
    Bad("targets", {"targets": np.array([[0, -1, 2], [4, 1, 0]]), "ignore_index": -100}),
    Bad("targets", {"targets": np.full((2, 3), 2**64 - 1, np.uint64), "ignore_index": -1}),
    Bad("ignore_index", {"ignore_index": 1.5}, TypeError),
    Bad("ignore_index", {"ignore_index": 2**70}, (ValueError, OverflowError)),
    *[bad._replace(argument="(out|loss)") for bad in bad_out((2, 3))],
    *bad_signature(),
)
def test_bad_arguments_are_refused(bad):
    refuse(metalloid.cross_entropy, OP, GOOD, bad, [((2, 3), float32)])
