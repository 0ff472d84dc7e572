import metalloid
import numpy as np
import pytest
import reference
from arrays import (
    INTEGERS,
    REMOVED,
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
    floating,
    partial_overlap,
    refuse,
)
from hypothesis import given
from hypothesis import strategies as st
from reference import FLOATING, INT32_MAX, INT32_MIN, float32, float64

OP = "rope"
SIGNED = [d for d in INTEGERS if d.kind == "i"]


def expected(x, dims, **arguments):
    ref = reference.rope(x, dims, **arguments)
    # A float64 result hangs on an angle that is itself a float64 number, at best.
    slack = ref.angle * 2**-51 * ref.magnitude if x.dtype == float64 else 0.0
    return Expected(OP, ref.out, x.dtype, ref.magnitude, slack)


def draw_rope(data, maker, shape, time_axis, small=False):
    """Dimensions, one of the frequency forms and one of the position forms."""
    batch, time, features = shape[0], shape[time_axis], shape[-1]
    dims = 2 * data.draw(st.integers(1, features // 2), "dims / 2")
    arguments = {
        "traditional": data.draw(st.booleans(), "traditional"),
        "scale": data.draw(st.sampled_from([1.0, 1.0, 0.25, -1.0, 0.0, 1 / 3]), "scale"),
        "base": None,
        "offset": 0,
    }
    if time_axis == 1:
        arguments["time_axis"] = 1
    frequencies = data.draw(st.sampled_from(["base", "base", "freqs", "inv_freqs"]), "frequencies")
    if frequencies == "base":
        arguments["base"] = data.draw(st.sampled_from([10_000.0, 1e6, 100_000, 500_000.0, 1.0, 7.5]), "base")
    else:
        values = maker.rng.uniform(1, 1e4, dims // 2) * np.where(maker.rng.random(dims // 2) < 0.1, np.inf, 1)
        dtype = maker.draw(floating, "dtype of frequencies")
        arguments[frequencies] = maker.lay((values if frequencies == "freqs" else 1 / values).astype(dtype))

    low, high = (
        (-100, 1000)
        if small
        else data.draw(
            st.sampled_from(
                [
                    (0, 100),
                    (-100, 100),
                    (INT32_MAX - 2000, INT32_MAX),
                    (INT32_MIN, INT32_MIN + 2000),
                    (10**6, 10**6 + 10),
                ]
            )
        )
    )
    positions = data.draw(st.sampled_from(["int", "int", "scalar", "one", "batch", "ids", "ids"]), "positions")
    if positions == "ids":
        arguments["position_ids"] = maker.integers((batch, time), low, high, draw_integer(data, low, high))
    else:
        high = max(low, high - max(time, 1) + 1)
        shape_of_offset = {"int": (), "scalar": (), "one": (1,), "batch": (batch,)}[positions]
        offset = maker.integers(shape_of_offset, low, high, draw_integer(data, low, high))
        arguments["offset"] = int(offset) if positions == "int" else offset
    return dims, arguments


def draw_integer(data, low, high):
    fit = [d for d in INTEGERS if np.iinfo(d).min <= low and high <= np.iinfo(d).max]
    return data.draw(st.sampled_from(fit), "integer dtype")


features = st.integers(2, 40) | st.sampled_from([48, 63, 64, 65, 80, 96, 128, 192, 256])


@given(st.data())
def test_is_the_formula_for_every_frequency_position_and_layout(data):
    maker = Maker(data)
    shape = maker.shape(features, least_rank=3, most_rank=5)
    time_axis = data.draw(st.sampled_from([-2, 1]), "time axis")
    dims, arguments = draw_rope(data, maker, shape, time_axis)
    x = maker.normal(shape)
    out = check_call(maker, metalloid.rope, (x, dims), arguments, expected(x, dims, **arguments))
    assert_same_bits(np.asarray(out)[..., dims:], np.asarray(x)[..., dims:])


@given(st.data())
def test_may_be_its_own_input(data):
    maker = Maker(data)
    values = maker.normal(maker.shape(features, least_rank=3))
    time_axis = data.draw(st.sampled_from([-2, 1]))
    dims, arguments = draw_rope(data, maker, values.shape, time_axis)
    x = maker.out(values.shape, values.dtype)
    x.view[...] = values
    assert metalloid.rope(x.view, dims, **arguments, out=x.view) is x.view
    expected(values, dims, **arguments).check(x.view)
    x.assert_nothing_else_written()


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("base", [10_000.0, 1e6])
@pytest.mark.parametrize("offset", [1_000_000, INT32_MAX - 7, INT32_MIN, -1_000_000])
def test_angles_of_large_positions_are_accurate(offset, base, traditional, dtype):
    x = np.random.default_rng(0).normal(size=(1, 2, 8, 128)).astype(dtype)
    arguments = {"traditional": traditional, "base": base, "scale": 1.0, "offset": offset}
    expected(x, 128, **arguments).check(metalloid.rope(x, 128, **arguments))


@pytest.mark.parametrize("time_axis", [-2, 1])
def test_position_ids_of_padding_repeat_and_go_back(time_axis):
    ids = np.array([[0, 0, 0, 0, 1, 2], [5, 4, INT32_MAX, INT32_MIN, -1, 5]], np.int32)
    shape = (2, 3, 6, 16) if time_axis == -2 else (2, 6, 3, 16)
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    arguments = {
        "traditional": False,
        "base": 1e4,
        "scale": 1.0,
        "offset": 0,
        "position_ids": ids,
        "time_axis": time_axis,
    }
    out = metalloid.rope(x, 16, **arguments)
    expected(x, 16, **arguments).check(out)
    one, two = (out[0, :, t] if time_axis == -2 else out[0, t] for t in (0, 1))
    x_one, x_two = (x[0, :, t] if time_axis == -2 else x[0, t] for t in (0, 1))
    assert_same_bits(one, x_one)  # position 0 does not turn
    assert_same_bits(two, x_two)


def test_the_two_time_axes_are_transposes_of_each_other():
    x = np.random.default_rng(2).normal(size=(2, 3, 5, 64)).astype(np.float32)
    arguments = {"traditional": False, "base": 1e4, "scale": 1.0, "offset": 9}
    out = metalloid.rope(x, 64, **arguments)
    other = metalloid.rope(np.ascontiguousarray(x.swapaxes(1, 2)), 64, **arguments, time_axis=1)
    np.testing.assert_array_equal(out, other.swapaxes(1, 2))


def test_every_form_of_the_same_frequencies_and_positions_agrees():
    x = np.random.default_rng(3).normal(size=(2, 3, 5, 32))
    inverse = 1e4 ** (-np.arange(0, 32, 2) / 32)
    common = {"traditional": True, "scale": 1.0}
    want = metalloid.rope(x, 32, **common, base=1e4, offset=7)
    ids = np.broadcast_to(np.arange(7, 12), (2, 5))
    for frequencies in ({"base": 1e4}, {"base": None, "freqs": 1 / inverse}, {"base": None, "inv_freqs": inverse}):
        for positions in (
            {"offset": np.int32(7)},
            {"offset": np.array(7, np.uint8)},
            {"offset": np.array([7], np.int64)},
            {"offset": np.array([7, 7], np.int16)},
            {"offset": 0, "position_ids": ids},
        ):
            out = metalloid.rope(x, 32, **common, **frequencies, **positions)
            np.testing.assert_allclose(out, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.float16, np.float64], ids=str)
@pytest.mark.parametrize("name", ["freqs", "inv_freqs"])
def test_frequencies_of_any_real_dtype(name, dtype):
    x = np.random.default_rng(4).normal(size=(1, 2, 3, 8)).astype(np.float32)
    arguments = {"traditional": False, "base": None, "scale": 0.5, "offset": 3, name: np.array([1, 2, 3, 100], dtype)}
    expected(x, 8, **arguments).check(metalloid.rope(x, 8, **arguments))


def test_an_infinite_frequency_leaves_its_pair():
    x = np.random.default_rng(5).normal(size=(1, 1, 3, 4)).astype(np.float32)
    arguments = {
        "traditional": False,
        "base": None,
        "scale": 1.0,
        "offset": 1000,
        "freqs": np.array([np.inf, 1], np.float32),
    }
    out = metalloid.rope(x, 4, **arguments)
    assert_same_bits(out[..., [0, 2]], x[..., [0, 2]])
    assert (out[..., [1, 3]] != x[..., [1, 3]]).all()


def test_base_and_scale_stay_doubles():
    x = np.random.default_rng(6).normal(size=(1, 1, 4, 8)).astype(np.float32)
    arguments = {"traditional": False, "base": 10000.0003, "scale": 1.0000000001, "offset": 2_000_000_000}
    expected(x, 8, **arguments).check(metalloid.rope(x, 8, **arguments))


def test_features_past_dims_keep_their_bits():
    x = np.full((1, 2, 3, 10), np.nan, np.float32)
    x.view(np.uint32)[...] |= 0x1234  # a NaN with a payload
    x[..., :4] = 1
    out = metalloid.rope(x, 4, traditional=False, base=1e4, scale=1.0, offset=5)
    assert_same_bits(out[..., 4:], x[..., 4:])
    assert np.isfinite(out[..., :4]).all()


def test_accepts_mlx_keywords():
    x = np.ones((1, 2, 3, 4), np.float32)
    arguments = {"traditional": False, "base": 1e4, "scale": 1.0, "offset": 1}
    want = metalloid.rope(x, 4, **arguments)
    assert_same_bits(want, metalloid.fast.rope(a=x, dims=4, **arguments, freqs=None, stream=None))


SHAPE = (2, 3, 4, 8)
GOOD = {"a": np.ones(SHAPE, np.float32), "dims": 8, "traditional": False, "base": 1e4, "scale": 1.0, "offset": 0}
TABLE = np.ones(4, np.float32)
IDS = np.zeros((2, 4), np.int32)
AHEAD, BEHIND = partial_overlap(SHAPE)


@bad_calls(
    *[b._replace(argument="(a|x)") for b in bad_floating("a", SHAPE)],
    Bad("(a|x)", {"a": np.ones((4, 8), np.float32)}),
    Bad("(a|x)", {"a": np.ones((), np.float32)}),
    *[Bad("dims", {"dims": dims}) for dims in (7, 0, -2, 10, 1)],
    Bad("dims", {"dims": 4.0}, TypeError),
    Bad("dims", {"dims": 2**70}, (ValueError, OverflowError, TypeError)),
    *[Bad("base", {"base": base}) for base in (0.0, -1.0, float("nan"), float("inf"))],
    *[Bad("scale", {"scale": scale}) for scale in (float("nan"), float("inf"))],
    Bad("(base|freqs|frequencies)", {"base": None}),
    Bad("(base|freqs)", {"freqs": TABLE}),
    Bad("(base|inv_freqs)", {"inv_freqs": TABLE}),
    Bad("(freqs|inv_freqs)", {"base": None, "freqs": TABLE, "inv_freqs": TABLE}),
    *[
        Bad(name, {"base": None, name: bad.change["freqs"]})
        for name in ("freqs", "inv_freqs")
        for bad in bad_shape("freqs", (4,))
    ],
    Bad("freqs", {"base": None, "freqs": np.ones(4, bool)}),
    Bad("freqs", {"base": None, "freqs": np.ones(4, np.complex64)}),
    *[Bad("offset", {"offset": offset}) for offset in (INT32_MAX - 2, INT32_MAX + 1, INT32_MIN - 1)],
    Bad("offset", {"offset": 2**63}, (ValueError, OverflowError)),
    Bad("offset", {"offset": -(2**70)}, (ValueError, OverflowError)),
    Bad("offset", {"offset": 1.5}, (TypeError, ValueError)),
    Bad("offset", {"offset": True}, (TypeError, ValueError)),
    Bad("offsets?", {"offset": np.array([True, False])}),
    Bad("offsets?", {"offset": np.zeros(2, np.float32)}),
    Bad("offsets?", {"offset": np.zeros(3, np.int32)}),
    Bad("offsets?", {"offset": np.zeros((2, 1), np.int32)}),
    Bad("offsets?", {"offset": np.array([0, INT32_MAX], np.int64)}),
    Bad("offsets?", {"offset": np.array([2**40], np.int64)}),
    Bad("offsets?", {"offset": np.array([2**64 - 1], np.uint64)}),
    Bad("offsets?", {"offset": np.array(INT32_MIN - 1)}),
    *bad_integers("position_ids", (2, 4)),
    *bad_shape("position_ids", (2, 4), np.int32),
    Bad("position_ids", {"position_ids": np.full((2, 4), 2**31, np.int64)}),
    Bad("position_ids", {"position_ids": np.full((2, 4), -(2**31) - 1, np.int64)}),
    Bad("position_ids", {"position_ids": np.full((2, 4), 2**64 - 1, np.uint64)}),
    Bad("(offset|position_ids)", {"position_ids": IDS, "offset": 1}),
    Bad("(offset|position_ids)", {"position_ids": IDS, "offset": np.zeros(2, np.int32)}),
    *[Bad("time_axis", {"time_axis": axis}) for axis in (0, 3, -1, -4, 4)],
    *bad_out(SHAPE),
    *bad_signature(),
    Bad("out", {"a": AHEAD, "out": BEHIND}),
    Bad("traditional", {"traditional": REMOVED}, TypeError),
)
def test_bad_arguments_are_refused(bad):
    refuse(metalloid.rope, OP, GOOD, bad, [(SHAPE, float32)])
