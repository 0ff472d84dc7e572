import metalloid
import numpy as np
import pytest
import reference
from arrays import (
    Bad,
    Expected,
    Maker,
    bad_calls,
    bad_eps,
    bad_floating,
    bad_shape,
    bad_signature,
    check_call,
    partial_overlap,
    read_only,
    refuse,
)
from hypothesis import given
from hypothesis import strategies as st
from reference import float16, float32, promoted

OP = "add_rms_norm"


@given(st.data())
def test_is_the_formula_for_any_shape_dtype_and_layout(data):
    maker = Maker(data)
    shape = maker.shape()
    x, residual = maker.normal(shape), maker.normal(shape, deviation=3)
    weight = maker.maybe(lambda: maker.normal(shape[-1:]))
    eps = data.draw(st.sampled_from([1e-5, 1e-6, 1.0]))
    total, norm = reference.add_rms_norm(x, residual, weight, eps)
    dtype = promoted(x.dtype, residual.dtype)
    norm_dtype = promoted(dtype, *([] if weight is None else [weight.dtype]))
    check_call(
        maker,
        metalloid.add_rms_norm,
        (x, residual, weight, eps),
        {},
        Expected(OP, total, dtype),
        Expected(OP, norm, norm_dtype),
    )


@given(st.data())
@pytest.mark.parametrize("sum_is", ["x", "residual", "neither"])
@pytest.mark.parametrize("out_is", ["x", "residual", "neither"])
def test_results_may_be_the_inputs(sum_is, out_is, data):
    if sum_is == out_is != "neither":
        return  # refused below
    maker = Maker(data)
    shape = maker.shape(most_rank=3)
    dtype = maker.dtype()
    x, residual = maker.normal(shape, dtype), maker.normal(shape, dtype)
    weight = maker.maybe(lambda: maker.normal(shape[-1:], dtype))
    want = reference.add_rms_norm(x, residual, weight, 1e-5)
    places = {name: maker.out(shape, dtype) for name in ("x", "residual", "sum", "out")}
    places["x"].view[...], places["residual"].view[...] = x, residual
    results = tuple(places[is_ if is_ != "neither" else name] for is_, name in ((sum_is, "sum"), (out_is, "out")))
    metalloid.add_rms_norm(places["x"].view, places["residual"].view, weight, 1e-5, out=tuple(r.view for r in results))
    for place, ref in zip(results, want, strict=True):
        reference.assert_close(OP, place.view, ref)
    for place in places.values():
        place.assert_nothing_else_written()


def test_the_norm_is_taken_from_the_unrounded_sum():
    x = np.full((1, 64), 2048, np.float16)
    residual = (np.arange(64) % 4 / 4).astype(np.float16).reshape(1, 64)  # lost when the sum is rounded to float16
    total, out = metalloid.add_rms_norm(x, residual, np.full(64, 2048, np.float32), 0)
    assert total.dtype == float16
    assert (total == 2048).all()
    assert out.dtype == float32
    reference.assert_close(OP, out, reference.add_rms_norm(x, residual, np.full(64, 2048, np.float32), 0)[1])
    assert len(np.unique(out)) == 4


GOOD = {name: np.ones((2, 4), np.float32) for name in ("x", "residual")} | {
    "weight": np.ones(4, np.float32),
    "eps": 1e-5,
}
AHEAD, BEHIND = partial_overlap((2, 4))
ONE, OTHER = np.zeros((2, 4), np.float32), np.zeros((2, 4), np.float32)


@bad_calls(
    *bad_floating("x", (2, 4)),
    *bad_floating("residual", (2, 4)),
    *bad_floating("weight", (4,)),
    *bad_shape("residual", (2, 4)),
    *bad_shape("weight", (4,)),
    Bad("x", {"x": np.ones((), np.float32)}),
    *bad_eps(),
    *bad_signature(),
    Bad("out", {"out": ONE}, (TypeError, ValueError)),
    Bad("out", {"out": (ONE,)}, (TypeError, ValueError)),
    Bad("out", {"out": (ONE, OTHER, ONE)}, (TypeError, ValueError)),
    Bad("out", {"out": (ONE, ONE)}),
    Bad("out", {"out": (ONE, np.zeros((2, 5), np.float32))}),
    Bad("sum", {"out": (np.zeros((2, 5), np.float32), ONE)}),
    Bad("out", {"out": (ONE, read_only((2, 4)))}),
    Bad("(sum|out)", {"out": (read_only((2, 4)), ONE)}),
    Bad("sum", {"x": AHEAD, "out": (BEHIND, ONE)}),
    Bad("out", {"residual": AHEAD, "out": (ONE, BEHIND)}),
    Bad("out", {"x": ONE, "out": (ONE, ONE)}),
    Bad("(sum|out)", {"out": (AHEAD, BEHIND)}),
)
def test_bad_arguments_are_refused(bad):
    refuse(metalloid.add_rms_norm, OP, GOOD, bad, [((2, 4), float32), ((2, 4), float32)])
