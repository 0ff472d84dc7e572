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
    bad_shape,
    bad_signature,
    check_call,
    read_only,
    refuse,
)
from hypothesis import given
from hypothesis import strategies as st
from reference import FLOATING, float16, float32, float64, promoted

OP = "gated_delta_update"
update = metalloid.gated_delta_update


def expected(q, k, *rest, **keywords):
    """[out, state]: out as q and k promote, the state float32 unless some operand is float64."""
    out, state = reference.gated_delta_update(q, k, *rest, **keywords)
    dtype = promoted(q.dtype, k.dtype)
    state_dtype = float64 if any(x is not None and x.dtype == float64 for x in (q, k, *rest)) else float32
    return [Expected(OP, ref, to, np.abs(ref).max(initial=0)) for ref, to in ((out, dtype), (state, state_dtype))]


def operands(rng, batch, time, k_heads, heads, key_dim, value_dim, per_channel=False):
    """q, k, v, gamma, beta as a model makes them: k of unit length, decay and step within (0, 1)."""
    q, k = (rng.normal(size=(batch, time, k_heads, key_dim)) for _ in range(2))
    k /= np.maximum(np.linalg.norm(k, axis=-1, keepdims=True), 1e-3)
    v = rng.normal(size=(batch, time, heads, value_dim))
    gamma = rng.uniform(0.8, 1, (batch, time, heads, key_dim) if per_channel else (batch, time, heads))
    return q, k, v, gamma, rng.uniform(0, 1, (batch, time, heads))


@given(st.data())
def test_is_the_recurrence_for_any_shape_dtype_layout_and_mask(data):
    maker = Maker(data)
    small = st.integers(0, 3) | st.integers(1, 3)
    batch, k_heads, group = data.draw(small), data.draw(small), data.draw(st.integers(1, 3))
    time = data.draw(st.integers(0, 12) | st.sampled_from([1, 1, 63, 64, 65, 70]))
    size = st.integers(0, 12) | st.sampled_from([16, 33])
    key_dim, value_dim = data.draw(size), data.draw(size)
    heads = k_heads * group
    arrays = operands(
        maker.rng, batch, time, k_heads, heads, key_dim, value_dim, data.draw(st.booleans(), "per channel")
    )
    arrays = [maker.lay(array.astype(maker.dtype())) for array in arrays]
    state = maker.maybe(lambda: maker.normal((batch, heads, value_dim, key_dim)))
    keywords = {}
    if data.draw(st.booleans(), "mask"):
        live = maker.rng.random((batch, time)) < 0.7
        keywords["mask"] = maker.lay((live * 2).astype(data.draw(st.sampled_from([np.dtype(bool), *INTEGERS]))))
    want = expected(*arrays, state, **keywords)
    check_list(maker, (*arrays, state), keywords, want)


def check_list(maker, arguments, keywords, want):
    assert type(update(*arguments, **keywords)) is list  # as MLX returns it
    check_call(maker, update, arguments, keywords, *want)


@pytest.mark.parametrize("dtype", [float32, float64, float16], ids=str)
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_long_sequence_keeps_its_accuracy(per_channel, dtype):
    arrays = [a.astype(dtype) for a in operands(np.random.default_rng(0), 1, 1024, 1, 2, 16, 8, per_channel)]
    for want, result in zip(expected(*arrays), update(*arrays), strict=True):
        want.check(result)


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (96, 40)], ids=str)
def test_head_dimensions_of_models(dims):
    arrays = [a.astype(np.float32) for a in operands(np.random.default_rng(1), 1, 130, 2, 4, *dims)]
    for want, result in zip(expected(*arrays), update(*arrays), strict=True):
        want.check(result)


@pytest.mark.parametrize("cut", [0, 1, 40, 64, 99, 100])
def test_a_sequence_may_be_cut_anywhere(cut):
    rng = np.random.default_rng(2)
    arrays = [a.astype(np.float32) for a in operands(rng, 2, 100, 2, 2, 16, 16)]
    whole, state = update(*arrays)
    first, between = update(*[a[:, :cut] for a in arrays])
    second, end = update(*[a[:, cut:] for a in arrays], between)
    scale = np.abs(whole).max()
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), whole, rtol=0, atol=1e-5 * scale)
    np.testing.assert_allclose(end, state, rtol=0, atol=1e-5 * np.abs(state).max())


def test_a_masked_step_is_as_if_it_were_not_there():
    rng = np.random.default_rng(3)
    arrays = [a.astype(np.float32) for a in operands(rng, 1, 30, 1, 2, 8, 8)]
    mask = rng.random((1, 30)) < 0.6
    for array in arrays:
        array[~mask] = np.nan  # not even NaN gets in
    out, state = update(*arrays, None, mask)
    short, short_state = update(*[np.ascontiguousarray(a[:, mask[0]]) for a in arrays])
    np.testing.assert_allclose(out[:, mask[0]], short, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state, short_state, rtol=1e-5, atol=1e-6)
    assert not out[:, ~mask[0]].any()


def test_a_masked_row_gives_zeros_and_its_initial_state():
    arrays = [a.astype(np.float32) for a in operands(np.random.default_rng(4), 2, 5, 1, 1, 4, 4)]
    initial = np.random.default_rng(5).normal(size=(2, 1, 4, 4)).astype(np.float32)
    out, state = update(*arrays, initial, np.array([[True] * 5, [False] * 5]))
    assert not out[1].any()
    assert out[0].any()
    assert_same_bits(state[1], initial[1])


def test_no_steps_give_the_initial_state():
    arrays = [a.astype(np.float32) for a in operands(np.random.default_rng(6), 2, 0, 1, 2, 4, 3)]
    initial = np.random.default_rng(7).normal(size=(2, 2, 3, 4)).astype(np.float32)
    out, state = update(*arrays, initial)
    assert out.shape == (2, 0, 2, 3)
    assert_same_bits(state, initial)
    assert not update(*arrays)[1].any()


@pytest.mark.parametrize("time", [1, 7, 80])
def test_the_state_may_be_updated_in_place(time):
    arrays = [a.astype(np.float32) for a in operands(np.random.default_rng(8), 2, time, 1, 2, 16, 16)]
    state = np.random.default_rng(9).normal(size=(2, 2, 16, 16)).astype(np.float32)
    want, want_state = update(*arrays, state.copy())
    out = np.empty_like(want)
    results = update(*arrays, state, out=(out, state))
    assert results[0] is out
    assert results[1] is state
    assert_same_bits(out, want)
    assert_same_bits(state, want_state)


def test_a_state_of_half_precision_is_read_as_float32():
    arrays = [a.astype(np.float32) for a in operands(np.random.default_rng(10), 1, 3, 1, 1, 4, 4)]
    initial = np.random.default_rng(11).normal(size=(1, 1, 4, 4)).astype(np.float16)
    for a, b in zip(update(*arrays, initial), update(*arrays, initial.astype(np.float32)), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_the_state_is_float32_but_for_float64(dtype):
    arrays = [a.astype(dtype) for a in operands(np.random.default_rng(12), 1, 3, 1, 1, 4, 4)]
    out, state = update(*arrays)
    assert out.dtype == dtype
    assert state.dtype == (float64 if dtype == float64 else float32)


def test_accepts_mlx_keywords():
    arrays = [a.astype(np.float32) for a in operands(np.random.default_rng(13), 1, 3, 1, 1, 4, 4)]
    named = dict(zip(("q", "k", "v", "gamma", "beta"), arrays, strict=True))
    results = metalloid.fast.gated_delta_update(**named, initial_state=None, mask=None, stream=None)
    for a, b in zip(update(*arrays), results, strict=True):
        assert_same_bits(a, b)


QK, V, S = (2, 3, 2, 4), (2, 3, 4, 5), (2, 4, 5, 4)
GOOD = {
    "q": np.ones(QK, np.float32),
    "k": np.ones(QK, np.float32),
    "v": np.ones(V, np.float32),
    "gamma": np.ones(V[:3], np.float32),
    "beta": np.ones(V[:3], np.float32),
    "initial_state": np.ones(S, np.float32),
    "mask": np.ones((2, 3), bool),
}
OUT, STATE = np.zeros(V, np.float32), np.zeros(S, np.float32)


@bad_calls(
    *[
        bad
        for name in ("q", "k", "v", "gamma", "beta", "initial_state")
        for bad in bad_floating(name, GOOD[name].shape)
    ],
    *bad_integers("mask", (2, 3), bool_too=False),
    *bad_shape("mask", (2, 3), bool),
    *bad_shape("initial_state", S),
    *bad_shape("beta", V[:3]),
    *[bad for bad in bad_shape("gamma", V[:3]) if bad.change["gamma"].shape != (*V[:3], 4)],
    Bad("gamma", {"gamma": np.ones((2, 3, 4, 5), np.float32)}),
    Bad("q", {"q": np.ones((3, 2, 4), np.float32)}),
    Bad("(q|k)", {"k": np.ones((2, 3, 2, 5), np.float32)}),
    Bad("(q|k)", {"q": np.ones((2, 3, 1, 4), np.float32)}),
    Bad("v", {"v": np.ones((2, 3, 4), np.float32)}),
    Bad("v", {"v": np.ones((2, 4, 4, 5), np.float32)}),
    Bad("(v|q|k)", {"v": np.ones((2, 3, 3, 5), np.float32)}),
    Bad("out", {"out": OUT}, (TypeError, ValueError)),
    Bad("out", {"out": (read_only(V), STATE)}),
    Bad("out", {"out": (np.zeros((2, 3, 4, 6), np.float32), STATE)}),
    Bad("(out|state)", {"out": (OUT, read_only(S))}),
    Bad("(out|state)", {"out": (OUT, np.zeros((2, 4, 4, 5), np.float32))}),
    Bad("(out|state)", {"out": (OUT, np.zeros(S, np.float16))}),
    Bad("out", {"v": OUT, "out": (OUT, STATE)}),
    *bad_signature(),
)
def test_bad_arguments_are_refused(bad):
    refuse(update, OP, GOOD, bad, [(V, float32), (S, float32)])
