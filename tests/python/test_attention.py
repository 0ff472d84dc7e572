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
    misaligned,
    refuse,
)
from hypothesis import given
from hypothesis import strategies as st
from reference import FLOATING, bfloat16, float16, float32, float64, promoted

OP = "attention"
attend = metalloid.scaled_dot_product_attention


def expected(q, k, v, **options):
    """[out, logsumexp] as they must come out."""
    ref = reference.attention(q, k, v, **options)
    dtype = promoted(q.dtype, k.dtype, v.dtype)
    log_dtype = float64 if dtype == float64 else float32
    return [Expected(OP, ref.out, dtype, ref.magnitude), Expected(OP, ref.logsumexp, log_dtype, ref.score_magnitude)]


def check(q, k, v, **options):
    """Out and logsumexp of contiguous arrays."""
    results = attend(q, k, v, **options, return_logsumexp=True)
    for want, result in zip(expected(q, k, v, **options), results, strict=True):
        want.check(result)
    return results


def normal(seed, *shapes, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


def draw_options(data, maker, batch, heads, queries, keys, dtype):
    """Any combination of masks. Floating operands have a dtype that promotes to that of q, k and v."""
    draw = data.draw
    narrower = [d for d in FLOATING if promoted(d, dtype) == dtype]
    options = {}
    kind = draw(st.sampled_from(["none", "none", "bool", "float", "integer", "causal"]), "mask")
    if kind == "causal":
        options["mask"] = "causal"
    elif kind != "none":
        rank = draw(st.integers(0, 4), "rank of the mask")
        full = (batch, heads, queries, keys)[4 - rank :]
        shape = tuple(1 if draw(st.booleans()) else extent for extent in full)
        values = maker.rng.random(shape)
        if kind == "bool":
            mask = values < draw(st.sampled_from([0.9, 0.5, 0.1, 0.0, 1.0]))
        elif kind == "integer":
            chosen = draw(st.sampled_from(INTEGERS))
            mask = (values * 4 - (2 if chosen.kind == "i" else 0)).astype(chosen)
        else:
            mask = np.where(values < draw(st.sampled_from([0.0, 0.3])), -np.inf, values * 6 - 3)
            mask = np.asarray(mask).astype(draw(st.sampled_from(narrower)))
        options["mask"] = maker.lay(mask)
    if draw(st.booleans(), "key mask"):
        seen = maker.rng.random((batch, keys)) < draw(st.sampled_from([0.8, 0.2, 0.0]))
        chosen = draw(st.sampled_from([np.dtype(bool), *INTEGERS]))
        options["key_mask"] = maker.lay((seen * draw(st.sampled_from([1, 3]))).astype(chosen))
    if draw(st.booleans(), "causal"):
        options["causal"] = True
    if draw(st.booleans(), "window"):
        options["window"] = draw(st.integers(1, max(1, keys + 2)) | st.just(2**40))
    if draw(st.booleans(), "causal offset"):
        options["causal_offset"] = draw(st.integers(-queries - 2, keys + 2))
    if draw(st.booleans(), "softcap"):
        options["softcap"] = draw(st.sampled_from([0.5, 5.0, 50.0]))
    if draw(st.booleans(), "sinks"):
        options["sinks"] = maker.lay(maker.rng.normal(0, 2, heads).astype(draw(st.sampled_from(narrower))))
    return options


@given(st.data())
def test_is_the_formula_for_every_combination_of_options(data):
    maker = Maker(data)
    small = st.integers(0, 3) | st.integers(1, 3)
    batch, kv_heads, group = data.draw(small), data.draw(small), data.draw(st.integers(1, 4))
    heads = kv_heads * group
    queries, keys = (data.draw(st.integers(0, 20) | st.sampled_from([1, 1, 31, 33, 65])) for _ in range(2))
    size = st.integers(0, 20) | st.sampled_from([32, 64, 65])
    key_dim, value_dim = data.draw(size), data.draw(size)
    q = maker.normal((batch, heads, queries, key_dim))
    k = maker.normal((batch, kv_heads, keys, key_dim))
    v = maker.normal((batch, kv_heads, keys, value_dim))
    dtype = promoted(q.dtype, k.dtype, v.dtype)
    options = draw_options(data, maker, batch, heads, queries, keys, dtype)
    options["scale"] = data.draw(st.sampled_from([max(key_dim, 1) ** -0.5, 0.1, -0.2, 0.0]), "scale")
    out, logsumexp = expected(q, k, v, **options)
    if data.draw(st.booleans(), "logsumexp"):
        check_call(maker, attend, (q, k, v), {**options, "return_logsumexp": True}, out, logsumexp)
    else:
        check_call(maker, attend, (q, k, v), options, out)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize(
    "dims", [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (576, 512), (3, 5)], ids=str
)
@pytest.mark.parametrize("lengths", [(1, 200), (7, 7), (65, 130)], ids=str)
def test_head_dimensions_of_models(lengths, dims, dtype):
    (queries, keys), (key_dim, value_dim) = lengths, dims
    q, k, v = normal(1, (1, 4, queries, key_dim), (1, 2, keys, key_dim), (1, 2, keys, value_dim), dtype=dtype)
    check(q, k, v, scale=key_dim**-0.5, causal=True)


@pytest.mark.parametrize("keys", [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 257, 513])
@pytest.mark.parametrize("queries", [1, 2, 5, 16, 33, 70])
def test_lengths_on_both_sides_of_a_block(queries, keys):
    q, k, v = normal(2, (2, 2, queries, 16), (2, 1, keys, 16), (2, 1, keys, 16))
    check(q, k, v, scale=0.25)
    check(q, k, v, scale=0.25, causal=True)
    check(q, k, v, scale=0.25, window=20, causal_offset=keys // 2)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_layout_of_models_time_before_heads(dtype):
    q, k, v = normal(3, (2, 40, 6, 64), (2, 70, 2, 64), (2, 70, 2, 64), dtype=dtype)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    check(q, k, v, scale=0.125, mask="causal")
    out = np.empty((2, 40, 6, 64), dtype).swapaxes(1, 2)
    attend(q, k, v, scale=0.125, out=out)
    expected(q, k, v, scale=0.125)[0].check(out)


def test_many_keys_lose_no_accuracy():
    q, k, v = normal(4, (1, 1, 2, 8), (1, 1, 70_000, 8), (1, 1, 70_000, 8))
    check(q, k, v + 1, scale=0.3)
    check(np.zeros_like(q), k, np.full_like(v, 1.1), scale=0.3)


@pytest.mark.parametrize("direction", [1, -1])
def test_scores_that_rise_from_block_to_block_do_not_overflow(direction):
    keys = 300
    k = np.arange(keys, dtype=np.float32)[::direction].reshape(1, 1, keys, 1)
    q, v = np.full((1, 1, 3, 1), 40, np.float32), normal(5, (1, 1, keys, 4))[0]
    out, logsumexp = attend(q, np.ascontiguousarray(k), v, scale=1.0, return_logsumexp=True)
    np.testing.assert_array_equal(out, np.broadcast_to(v[:, :, -1:] if direction == 1 else v[:, :, :1], out.shape))
    np.testing.assert_allclose(logsumexp, 40 * (keys - 1))


def masked(way, batch=2, heads=4, queries=6, keys=40):
    """Options that hide all but keys 3 to 7, and for query 2 every key."""
    see = np.zeros((queries, keys), bool)
    see[:, 3:8] = True
    see[2] = False
    if way == "bool":
        return {"mask": see}
    if way == "float":
        return {"mask": np.where(see, 0, -np.inf).astype(np.float32)}
    if way == "key mask":
        return {"key_mask": np.broadcast_to(see[0], (batch, keys)), "mask": see.any(-1)[:, None]}
    return {"window": 5, "causal_offset": 7, "mask": (np.arange(queries)[:, None] != 2) & np.ones(keys, bool)}


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("way", ["bool", "float", "key mask"])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("queries", [1, 3, 6])
def test_what_a_hidden_key_holds_never_shows(queries, dtype, way, poison):
    q, k, v = normal(6, (2, 4, 6, 32), (2, 2, 40, 32), (2, 2, 40, 32), dtype=dtype)
    q = np.ascontiguousarray(q[:, :, :queries])
    options = masked(way)
    if "mask" in options:
        options["mask"] = options["mask"][:queries]
        if options["mask"].dtype == float32:
            options["mask"] = options["mask"].astype(dtype)
    hidden = np.ones(40, bool)
    hidden[3:8] = False
    k[:, :, hidden] = poison
    v[:, :, hidden] = poison
    for result in check(q, k, v, scale=0.2, **options):
        assert np.isfinite(np.compress(np.arange(queries) != 2, result, axis=2)).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf, 7.0])
@pytest.mark.parametrize("queries", [1, 6])
def test_what_a_hidden_key_holds_changes_no_bit(queries, poison):
    """A cache whose free slots were never written must give the same bits on every run."""
    q, k, v = normal(6, (2, 4, queries, 32), (2, 2, 40, 32), (2, 2, 40, 32))
    seen = np.broadcast_to(np.arange(40) < 23, (2, 40))
    clean = attend(q, k, v, scale=0.2, key_mask=seen, return_logsumexp=True)
    k[:, :, 23:], v[:, :, 23:] = poison, poison
    for a, b in zip(attend(q, k, v, scale=0.2, key_mask=seen, return_logsumexp=True), clean, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize(("queries", "keys"), [(1, 30), (30, 30), (20, 70)])
def test_the_future_never_shows_through_causal_or_window(queries, keys):
    q, k, v = normal(7, (1, 2, queries, 16), (1, 2, keys, 16), (1, 2, keys, 16))
    offset = keys - queries - 1 if keys > queries else -1
    for options in ({"causal": True}, {"window": 4}, {"causal": True, "window": 9}):
        options |= {"causal_offset": offset, "scale": 0.25}
        poisoned_k, poisoned_v = k.copy(), v.copy()
        poisoned_k[:, :, -1] = poisoned_v[:, :, -1] = np.nan  # no query sees the last key
        out, logsumexp = check(q, poisoned_k, poisoned_v, **options)
        assert not np.isnan(out).any()
        assert not np.isnan(logsumexp).any()
    # Each key holds NaN for the queries before it alone.
    for key in range(0, keys, 7):
        poisoned = v.copy()
        poisoned[:, :, key] = np.nan
        out = attend(q, k, poisoned, scale=0.25, causal=True, causal_offset=offset)
        sees = key <= np.arange(queries) + offset
        assert np.isnan(out[:, :, sees]).all()
        assert not np.isnan(out[:, :, ~sees]).any()


@pytest.mark.parametrize("way", ["bool", "float", "key mask", "window"])
@pytest.mark.parametrize("sinks", [False, True])
def test_a_query_that_sees_no_key_gives_zeros(sinks, way):
    q, k, v = normal(8, (2, 4, 6, 16), (2, 2, 40, 16), (2, 2, 40, 16))
    options = masked(way) | ({"sinks": np.arange(4, dtype=np.float32)} if sinks else {})
    out, logsumexp = check(q, k, v, scale=0.25, **options)
    assert not out[:, :, 2].any()
    assert not np.signbit(out[:, :, 2]).any()
    assert (logsumexp[:, :, 2] == (np.arange(4) if sinks else -np.inf)).all()
    assert out[:, :, [0, 1, 3, 4, 5]].any(-1).all()


def test_a_visible_nan_shows_in_its_query_alone():
    q, k, v = normal(9, (1, 1, 4, 8), (1, 1, 50, 8), (1, 1, 50, 8))
    mask = np.ones((4, 50), bool)
    mask[1:, 30] = False
    for name, x in (("k", k), ("v", v)):
        arrays = {"k": k, "v": v} | {name: x.copy()}
        arrays[name][0, 0, 30, 5] = np.nan
        out = attend(q, arrays["k"], arrays["v"], scale=0.3, mask=mask)
        assert np.isnan(out[0, 0, 0, 5])
        assert np.isfinite(out[0, 0, 1:]).all()
        assert np.isnan(out[0, 0, 0]).all() == (name == "k")


@pytest.mark.parametrize("keys", [3, 50, 5000])
def test_a_sink_hides_no_nan(keys):
    q, k, v = normal(9, (1, 2, 3, 8), (1, 1, keys, 8), (1, 1, keys, 8))
    q[0, 1, 1, 2] = np.nan
    out, logsumexp = attend(q, k, v, scale=0.3, sinks=np.array([1.0, 2.0], np.float32), return_logsumexp=True)
    assert np.isnan(out[0, 1, 1]).all()
    assert np.argwhere(np.isnan(logsumexp)).tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("value", [-1e9, np.finfo(np.float32).min])
def test_a_large_finite_mask_is_an_ordinary_number(value):
    _, k, v = normal(10, (1,), (1, 1, 30, 8), (1, 1, 30, 8))
    q = np.zeros((1, 1, 2, 8), np.float32)
    mask = np.full((2, 30), value, np.float32)
    mask[1, 4] = 0
    out, logsumexp = attend(q, k, v, scale=1.0, mask=mask, return_logsumexp=True)
    np.testing.assert_allclose(out[0, 0, 0], v[0, 0].mean(axis=0), rtol=1e-5, atol=1e-5)  # all alike: the mean
    np.testing.assert_array_equal(out[0, 0, 1], v[0, 0, 4])
    np.testing.assert_allclose(logsumexp[0, 0], [value, 0], rtol=1e-6)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_an_integer_mask_is_added(dtype):
    q, k, v = normal(11, (1, 2, 3, 8), (1, 2, 9, 8), (1, 2, 9, 8))
    mask = (np.arange(27).reshape(3, 9) % 4).astype(dtype)
    out = attend(q, k, v, scale=0.3, mask=mask)
    expected(q, k, v, scale=0.3, mask=mask.astype(np.float32))[0].check(out)
    assert np.abs(out - attend(q, k, v, scale=0.3)).max() > 1e-3


@pytest.mark.parametrize("sinks", [None, np.array([0.5, -3.0], np.float32)], ids=["plain", "sinks"])
def test_no_keys_give_zeros(sinks):
    q, k, v = normal(12, (1, 2, 3, 8), (1, 2, 0, 8), (1, 2, 0, 4))
    out, logsumexp = attend(q, k, v, scale=1.0, sinks=sinks, return_logsumexp=True)
    assert out.shape == (1, 2, 3, 4)
    assert not out.any()
    want = np.full(2, -np.inf) if sinks is None else sinks
    np.testing.assert_array_equal(logsumexp, np.broadcast_to(want[None, :, None], (1, 2, 3)))


def test_no_features_give_the_mean_of_v():
    q, k, v = normal(13, (1, 2, 3, 0), (1, 2, 5, 0), (1, 2, 5, 4))
    out, logsumexp = check(q, k, v, scale=1.0)
    np.testing.assert_allclose(out, np.broadcast_to(v.mean(2, keepdims=True), out.shape), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logsumexp, np.log(5), rtol=1e-6)


def test_values_without_features_still_have_a_logsumexp():
    q, k, v = normal(14, (1, 2, 3, 8), (1, 1, 5, 8), (1, 1, 5, 0))
    out, _ = check(q, k, v, scale=1.0)
    assert out.shape == (1, 2, 3, 0)


@given(st.data())
def test_split_keys_merge_by_logsumexp(data):
    maker = Maker(data)
    batch, heads, queries, keys = 2, 4, data.draw(st.sampled_from([1, 5, 33])), data.draw(st.integers(2, 90))
    q, k, v = (
        maker.normal(shape, float32)
        for shape in ((batch, heads, queries, 16), (batch, 2, keys, 16), (batch, 2, keys, 8))
    )
    options = draw_options(data, maker, batch, heads, queries, keys, float32)
    if isinstance(options.get("mask"), str):
        options |= {"mask": None, "causal": True}
    options |= {"scale": 0.25, "causal_offset": options.get("causal_offset", keys - queries)}
    cut = data.draw(st.integers(0, keys), "cut")
    parts = []
    for first, part in ((0, slice(0, cut)), (cut, slice(cut, keys))):
        own = options | {"causal_offset": options["causal_offset"] - first}
        if own.get("mask") is not None and own["mask"].ndim and own["mask"].shape[-1] == keys:
            own["mask"] = own["mask"][..., part]
        if "key_mask" in own:
            own["key_mask"] = own["key_mask"][:, part]
        if parts:  # the sinks go to one part alone
            own.pop("sinks", None)
        parts.append((q, k[:, :, part], v[:, :, part], own))
    merged, logsumexp = reference.merged([attend(*part[:3], **part[3], return_logsumexp=True) for part in parts])
    whole, whole_logsumexp = attend(q, k, v, **options, return_logsumexp=True)
    np.testing.assert_allclose(merged, whole, rtol=2e-5, atol=6e-5)
    np.testing.assert_allclose(logsumexp, whole_logsumexp, rtol=2e-5, atol=6e-5)


def test_causal_is_a_string_a_flag_or_a_mask():
    q, k, v = normal(15, (1, 2, 5, 8), (1, 2, 9, 8), (1, 2, 9, 8))
    want = attend(q, k, v, scale=0.3, causal=True)
    assert_same_bits(want, attend(q, k, v, scale=0.3, mask="causal"))
    assert_same_bits(want, attend(q, k, v, scale=0.3, causal=True, causal_offset=4))
    mask = np.tril(np.ones((5, 9), bool), 4)
    np.testing.assert_allclose(want, attend(q, k, v, scale=0.3, mask=mask), rtol=1e-5, atol=1e-5)
    both = attend(q, k, v, scale=0.3, causal=True, mask=np.arange(9) != 2)
    np.testing.assert_allclose(both, attend(q, k, v, scale=0.3, mask=mask & (np.arange(9) != 2)), rtol=1e-5, atol=1e-5)


def test_grouped_heads_read_the_key_head_of_their_group():
    q, k, v = normal(16, (1, 6, 4, 8), (1, 2, 7, 8), (1, 2, 7, 8))
    out = attend(q, k, v, scale=0.3)
    np.testing.assert_allclose(out, attend(q, k.repeat(3, 1), v.repeat(3, 1), scale=0.3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offset", [2**40, -(2**40), 2**62, -(2**62)])
def test_far_causal_offsets_do_not_wrap(offset):
    q, k, v = normal(17, (1, 1, 3, 4), (1, 1, 5, 4), (1, 1, 5, 4))
    check(q, k, v, scale=0.5, causal=True, causal_offset=offset)
    check(q, k, v, scale=0.5, window=2**62, causal_offset=offset)
    check(q, k, v, scale=0.5, window=1, causal_offset=offset)


@pytest.mark.parametrize("dtype", [float16, bfloat16], ids=str)
def test_scores_past_float16_are_float32(dtype):
    q, k, v = np.full((1, 1, 1, 64), 200, dtype), np.full((1, 1, 3, 64), 200, dtype), np.ones((1, 1, 3, 64), dtype)
    k[0, 0, 1] = -200
    out, logsumexp = attend(q, k, v, scale=1.0, return_logsumexp=True)
    assert (out == 1).all()
    np.testing.assert_allclose(logsumexp, 200 * 200 * 64 + np.log(2), rtol=1e-6)


@pytest.mark.parametrize("queries", [1, 3, 20])
@pytest.mark.parametrize("softcap", [1e39, 1e300, 1e-50])
def test_a_softcap_beyond_float32_is_a_number_like_any(queries, softcap):
    q, k, v = normal(5, (1, 2, queries, 16), (1, 2, 70, 16), (1, 2, 70, 8))
    check(q, k, v, scale=0.3, softcap=softcap)


@pytest.mark.parametrize("queries", [1, 3, 20])
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_a_scale_beyond_float32_is_a_number_like_any(queries, size):
    q, k, v = normal(6, (1, 2, queries, 16), (1, 2, 70, 16), (1, 2, 70, 8))
    q, k = q * np.float32(size), k * np.float32(size**0.5)
    check(q, k, v, scale=1 / size**1.5)


@pytest.mark.parametrize("queries", [1, 3, 20])
@pytest.mark.parametrize("dtype", [float32, bfloat16])
def test_values_near_the_largest_do_not_overflow_in_their_mean(queries, dtype):
    q, k = normal(7, (1, 2, queries, 16), (1, 2, 70, 16), dtype=dtype)
    largest = np.array(3e38, dtype)
    out = attend(q, k, np.full((1, 2, 70, 8), largest), scale=0.3)
    np.testing.assert_allclose(out.astype(np.float64), float(largest), rtol=1e-2 if dtype == bfloat16 else 1e-5)


def test_accepts_mlx_keywords():
    q, k, v = normal(18, (1, 2, 5, 8), (1, 2, 9, 8), (1, 2, 9, 8))
    want = attend(q, k, v, scale=0.3)
    fast = metalloid.fast.scaled_dot_product_attention
    assert_same_bits(want, fast(q=q, k=k, v=v, scale=0.3, mask=None, sinks=None, force_fused=True, stream=None))


Q, K, V, OUT = (2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 6), (2, 4, 3, 6)
GOOD = {"q": np.ones(Q, np.float32), "k": np.ones(K, np.float32), "v": np.ones(V, np.float32), "scale": 0.3}
HALF = {name: GOOD[name].astype(np.float16) for name in "qkv"} | {"out": np.zeros(OUT, np.float16)}
BUFFER = np.ones(400, np.float32)


@bad_calls(
    *bad_floating("q", Q),
    *bad_floating("k", K),
    *bad_floating("v", V),
    Bad("q", {"q": np.ones((4, 3, 8), np.float32)}),
    Bad("k", {"k": np.ones((2, 5, 8), np.float32)}),
    Bad("v", {"v": np.ones((2, 5, 6), np.float32)}),
    Bad("(q|k)", {"q": np.ones((2, 3, 3, 8), np.float32), "out": np.zeros((2, 3, 3, 6), np.float32)}),
    Bad("(q|k)", {"k": np.ones((2, 3, 5, 8), np.float32), "v": np.ones((2, 3, 5, 6), np.float32)}),
    Bad("(q|k)", {"k": np.ones((2, 0, 5, 8), np.float32), "v": np.ones((2, 0, 5, 6), np.float32)}),
    Bad("k", {"k": np.ones((3, 2, 5, 8), np.float32)}),
    Bad("k", {"k": np.ones((2, 2, 5, 7), np.float32)}),
    Bad("v", {"v": np.ones((2, 2, 4, 6), np.float32)}),
    Bad("v", {"v": np.ones((2, 1, 5, 6), np.float32)}),
    Bad("v", {"v": np.ones((1, 2, 5, 6), np.float32)}),
    *[Bad("scale", {"scale": scale}) for scale in (float("nan"), float("inf"))],
    Bad("scale", {"scale": REMOVED}, TypeError),
    Bad("mask", {"mask": "lower"}),
    Bad("mask", {"mask": np.ones((1, 2, 4, 3, 5), bool)}),
    Bad("mask", {"mask": np.ones((4, 5), bool)}),
    Bad("mask", {"mask": np.ones((3, 4), bool)}),
    Bad("mask", {"mask": np.ones((3, 4, 3, 5), bool)}),
    Bad("mask", {"mask": np.ones((2, 2, 3, 5), bool)}),
    Bad("mask", {"mask": np.ones((3, 0), bool)}),
    Bad("mask", {"mask": np.ones((3, 5), np.complex64)}),
    Bad("mask", {"mask": np.ones((3, 5), np.float64)}),
    Bad("mask", {"mask": misaligned((3, 5))}),
    Bad("mask", HALF | {"mask": np.ones((3, 5), np.float32)}),
    Bad("mask", HALF | {"mask": np.ones((3, 5), bfloat16)}),
    *bad_integers("key_mask", (2, 5), bool_too=False),
    *bad_shape("key_mask", (2, 5), bool),
    *bad_floating("sinks", (4,)),
    *bad_shape("sinks", (4,)),
    Bad("sinks", {"sinks": np.ones(4, np.float64)}),
    Bad("sinks", HALF | {"sinks": np.ones(4, np.float32)}),
    *[Bad("window", {"window": window}) for window in (0, -1)],
    Bad("window", {"window": 1.5}, TypeError),
    *[Bad("softcap", {"softcap": softcap}) for softcap in (0.0, -1.0, float("nan"), float("inf"))],
    Bad("causal_offset", {"causal_offset": 1.5}, TypeError),
    *bad_out(OUT),
    *bad_signature(),
    Bad("out", {"q": BUFFER[: np.prod(Q)].reshape(Q), "out": BUFFER[10 : 10 + np.prod(OUT)].reshape(OUT)}),
    Bad("out", {"v": BUFFER[: np.prod(V)].reshape(V), "out": BUFFER[np.prod(V) - 1 :][: np.prod(OUT)].reshape(OUT)}),
    Bad("out", {"return_logsumexp": True}, (TypeError, ValueError)),
    Bad("logsumexp", {"return_logsumexp": True, "out": (np.zeros(OUT, np.float32), np.zeros((2, 4, 4), np.float32))}),
    Bad("logsumexp", {"return_logsumexp": True, "out": (np.zeros(OUT, np.float32), np.zeros((2, 4, 3), np.int32))}),
    Bad("logsumexp", {"return_logsumexp": True, "out": (np.zeros(OUT, np.float32), np.zeros((2, 4, 3), np.float16))}),
)
def test_bad_arguments_are_refused(bad):
    refuse(attend, "scaled_dot_product_attention", GOOD, bad, [(OUT, float32)])
