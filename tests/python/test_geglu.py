import metalloid
import numpy as np
import pytest
import reference
from arrays import (
    REMOVED,
    Bad,
    Expected,
    Maker,
    bad_calls,
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
from reference import FLOATING, float32, promoted

OP = "geglu"


@given(st.data())
def test_is_the_formula_for_any_shape_dtype_and_layout(data):
    maker = Maker(data)
    shape = data.draw(st.sampled_from([(), *[None] * 9]))
    shape = maker.shape() if shape is None else shape
    gate = maker.normal(shape, deviation=data.draw(st.sampled_from([1.0, 10.0])))
    up = maker.normal(shape)
    dtype = promoted(gate.dtype, up.dtype)
    keywords = data.draw(st.sampled_from([{}, {"approximate": "none"}, {"approximate": "tanh"}]))
    check_call(maker, metalloid.geglu, (gate, up), keywords, Expected(OP, reference.geglu(gate, up, **keywords), dtype))


@given(st.data())
@pytest.mark.parametrize("out_is", ["gate", "up"])
def test_may_be_its_own_input(out_is, data):
    maker = Maker(data)
    shape = maker.shape()
    gate, up = maker.normal(shape, dtype := maker.dtype()), maker.normal(shape, dtype)
    ref = reference.geglu(gate, up)
    place = maker.out(shape, dtype)
    place.view[...] = gate if out_is == "gate" else up
    arguments = {"gate": gate, "up": up} | {out_is: place.view}
    assert metalloid.geglu(**arguments, out=place.view) is place.view
    reference.assert_close(OP, place.view, ref)
    place.assert_nothing_else_written()


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_finite_for_every_finite_gate(dtype, approximate):
    """Each gate in a row of its own, so that each is held to its own magnitude."""
    largest = float(reference.ml_dtypes.finfo(dtype).max)
    gate = np.array([0, *np.geomspace(1e-6, 40, 600), 88, 100, 1e3, 1e4, 6e4, largest])
    gate = np.concatenate([gate, -gate])[:, None].astype(dtype)
    out = metalloid.geglu(gate, np.ones_like(gate), approximate=approximate)
    assert np.isfinite(out).all()
    reference.assert_close(OP, out, reference.geglu(gate, np.ones_like(gate), approximate=approximate))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("length", [1, 8, 37])
def test_nan_and_infinity(length, approximate):
    gate = np.ones((6, length), np.float32)
    up = np.ones((6, length), np.float32)
    gate[0], gate[1], gate[2], up[3], up[4] = np.nan, np.inf, -np.inf, np.nan, -np.inf
    out = metalloid.geglu(gate, up, approximate=approximate)
    assert np.isnan(out[[0, 3]]).all()
    assert (out[1] == np.inf).all()
    assert (out[2] == 0).all()
    assert (out[4] == -np.inf).all()
    assert np.isfinite(out[5]).all()


GOOD = {"gate": np.ones((2, 4), np.float32), "up": np.ones((2, 4), np.float32)}
AHEAD, BEHIND = partial_overlap((2, 4))


@bad_calls(
    *bad_floating("gate", (2, 4)),
    *bad_floating("up", (2, 4)),
    *bad_shape("up", (2, 4)),
    *bad_out((2, 4)),
    *bad_signature(),
    Bad("approximate", {"approximate": "erf"}),
    Bad("approximate", {"approximate": ""}),
    Bad("approximate", {"approximate": 1}, (TypeError, ValueError)),
    Bad("out", {"gate": AHEAD, "out": BEHIND}),
    Bad("out", {"up": AHEAD, "out": BEHIND}),
    Bad("out", {"up": AHEAD, "out": AHEAD[:, ::-1]}),
    Bad("up", {"up": REMOVED}, TypeError),
)
def test_bad_arguments_are_refused(bad):
    refuse(metalloid.geglu, OP, GOOD, bad, [((2, 4), float32)])
