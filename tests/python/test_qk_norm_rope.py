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
from reference import INT32_MAX, float32, float64, promoted
from test_rope import draw_rope, features

OP = "qk_norm_rope"


def expected(q, k, q_weight, k_weight, eps, dims, **arguments):
    results = []
    for turned, x, weight in zip(
        reference.qk_norm_rope(q, k, q_weight, k_weight, eps, dims, **arguments),
        (q, k),
        (q_weight, k_weight),
        strict=True,
    ):
        dtype = promoted(x.dtype, *([] if weight is None else [weight.dtype]))
        slack = turned.angle * 2**-51 * turned.magnitude if dtype == float64 else 0.0
        results.append(Expected(OP, turned.out, dtype, turned.magnitude, slack))
    return results


@given(st.data())
def test_is_the_formula_for_every_frequency_position_and_layout(data):
    maker = Maker(data)
    batch, time, length = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 5)), data.draw(features)
    time_axis = data.draw(st.sampled_from([-2, 1]))

    def shape(heads):
        return (batch, heads, time, length) if time_axis == -2 else (batch, time, heads, length)

    q, k = (maker.normal(shape(data.draw(st.integers(0, 4), "heads"))) for _ in range(2))
    q_weight, k_weight = (maker.maybe(lambda: maker.normal((length,))) for _ in range(2))
    dims, arguments = draw_rope(data, maker, q.shape, time_axis)
    eps = data.draw(st.sampled_from([1e-6, 1e-5, 0.5]))
    call = (q, k, q_weight, k_weight, eps, dims)
    check_call(maker, metalloid.qk_norm_rope, call, arguments, *expected(*call, **arguments))


@pytest.mark.parametrize("time_axis", [-2, 1])
def test_q_and_k_may_be_their_own_outputs(time_axis):
    rng = np.random.default_rng(0)
    fused = rng.normal(size=(2, 7, 6, 64)).astype(np.float32)  # q and k side by side, as one projection leaves them
    q, k = fused[:, :, :4], fused[:, :, 4:]
    if time_axis == -2:
        q, k = q.swapaxes(1, 2), k.swapaxes(1, 2)
    weight = rng.normal(size=64).astype(np.float32)
    call = {"q_weight": weight, "k_weight": weight, "eps": 1e-6, "dims": 64}
    arguments = {"traditional": False, "base": 1e6, "scale": 1.0, "offset": 41, "time_axis": time_axis}
    want = expected(q.copy(), k.copy(), *call.values(), **arguments)
    out = metalloid.qk_norm_rope(q, k, **call, **arguments, out=(q, k))
    assert out[0] is q
    assert out[1] is k
    want[0].check(q)
    want[1].check(k)


def test_the_norm_spans_all_features_though_fewer_turn():
    q = np.random.default_rng(1).normal(size=(1, 2, 3, 32)).astype(np.float32)
    q[..., 20:] *= 100
    call, arguments = (q, q[:, :1], None, None, 1e-6, 16), {"traditional": True, "base": 1e4, "scale": 1.0, "offset": 3}
    for want, out in zip(expected(*call, **arguments), metalloid.qk_norm_rope(*call, **arguments), strict=True):
        want.check(out)
        np.testing.assert_allclose((out**2).mean(-1), 1, rtol=1e-5)


Q, K = (2, 4, 3, 8), (2, 2, 3, 8)
GOOD = {
    "q": np.ones(Q, np.float32),
    "k": np.ones(K, np.float32),
    "q_weight": np.ones(8, np.float32),
    "k_weight": np.ones(8, np.float32),
    "eps": 1e-6,
    "dims": 8,
    "traditional": False,
    "base": 1e4,
    "scale": 1.0,
    "offset": 0,
}
OUT_Q, OUT_K = np.zeros(Q, np.float32), np.zeros(K, np.float32)
AHEAD, BEHIND = partial_overlap(Q)


@bad_calls(
    *bad_floating("q", Q),
    *bad_floating("k", K),
    *bad_floating("q_weight", (8,)),
    *bad_floating("k_weight", (8,)),
    *bad_shape("q_weight", (8,)),
    *bad_shape("k_weight", (8,)),
    Bad("q", {"q": np.ones((2, 3, 8), np.float32)}),
    Bad("k", {"k": np.ones((3, 2, 3, 8), np.float32)}),
    Bad("k", {"k": np.ones((2, 2, 4, 8), np.float32)}),
    Bad("k", {"k": np.ones((2, 2, 3, 10), np.float32)}),
    Bad("k", {"k": np.ones((2, 3, 8), np.float32)}),
    *bad_eps(),
    *[Bad("dims", {"dims": dims}) for dims in (7, 0, -2, 10)],
    *[Bad("base", {"base": base}) for base in (-1.0, float("nan"))],
    Bad("scale", {"scale": float("inf")}),
    Bad("offset", {"offset": INT32_MAX}),
    Bad("(offset|position_ids)", {"position_ids": np.zeros((2, 3), np.int32), "offset": 1}),
    *bad_shape("position_ids", (2, 3), np.int32),
    *[Bad("time_axis", {"time_axis": axis}) for axis in (0, 3, -1)],
    Bad("(out|q_out)", {"out": OUT_Q}, (TypeError, ValueError)),
    Bad("(out|q_out|k_out)", {"out": (OUT_Q, OUT_Q)}),
    Bad("(out|q_out|k_out)", {"out": (read_only(Q), OUT_K)}),
    Bad("(out|q_out|k_out)", {"out": (OUT_Q[:, :2], OUT_K)}),
    Bad("(out|q_out|k_out)", {"q": AHEAD, "out": (BEHIND, OUT_K)}),
    Bad("(out|q_out|k_out)", {"out": (AHEAD, BEHIND[:, 1:3])}),
    *bad_signature(),
)
def test_bad_arguments_are_refused(bad):
    refuse(metalloid.qk_norm_rope, OP, GOOD, bad, [(Q, float32), (K, float32)])
