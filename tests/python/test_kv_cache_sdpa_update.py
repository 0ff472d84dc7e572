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
    overlapping_itself,
    read_only,
    refuse,
)
from hypothesis import given
from hypothesis import strategies as st
from reference import FLOATING, float32, promoted

OP = "kv_cache_sdpa_update"
step = metalloid.kv_cache_sdpa_update


class Step:
    """One call, its caches inside guarded buffers."""

    def __init__(self, maker, queries, offset, room, kv_heads=2, group=2, dims=(16, 16), batch=2, key_mask=None):
        heads = kv_heads * group
        self.q = maker.normal((batch, queries, heads, dims[0]))
        self.offset, self.key_mask, self.scale = offset, key_mask, 0.25
        self.caches, self.before, self.new = [], [], []
        for dim in dims:
            dtype = maker.dtype()
            cache = maker.out((batch, room, kv_heads, dim), dtype)
            cache.view[...] = maker.rng.normal(size=cache.view.shape).astype(dtype)
            self.caches.append(cache)
            self.before.append(cache.view.copy())
            self.new.append(maker.normal((batch, queries, kv_heads, dim), dtype))

    def run(self, **out):
        caches = [cache.view for cache in self.caches]
        return step(self.q, *self.new, *caches, self.offset, self.key_mask, self.scale, **out)

    def check(self, out):
        ref = reference.kv_cache_sdpa_update(
            self.q, *self.new, *self.before, int(np.asarray(self.offset).reshape(())), self.key_mask, self.scale
        )
        dtype = promoted(self.q.dtype, *(cache.view.dtype for cache in self.caches))
        Expected(OP, ref.out.out, dtype, ref.out.magnitude).check(out)
        for cache, want in zip(self.caches, (ref.k_cache, ref.v_cache), strict=True):
            assert_same_bits(cache.view, want)
            cache.assert_nothing_else_written()


@given(st.data())
def test_writes_the_new_keys_and_attends(data):
    maker = Maker(data)
    queries = data.draw(st.sampled_from([1, 1, 1, 0, 2, 3, 17]))
    room = queries + data.draw(st.integers(0, 40))
    offset = data.draw(st.integers(0, room - queries))
    batch = data.draw(st.integers(0, 3))
    key_mask = None
    if data.draw(st.booleans(), "key mask"):
        seen = maker.rng.random((batch, room)) < data.draw(st.sampled_from([0.7, 0.1, 0.0]))
        key_mask = maker.lay(seen.astype(data.draw(st.sampled_from([np.dtype(bool), *INTEGERS]))))
    dims = data.draw(st.sampled_from([(16, 16), (64, 64), (5, 3)]))
    kv_heads, group = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 3))
    call = Step(maker, queries, offset, room, kv_heads, group, dims, batch, key_mask)
    kind = data.draw(st.sampled_from(["int", "scalar", "one"]))
    if kind != "int":
        call.offset = np.full(() if kind == "scalar" else (1,), offset, data.draw(st.sampled_from(INTEGERS)))
    if data.draw(st.booleans(), "out"):
        shape = (batch, kv_heads * group, queries, dims[1])
        out = maker.out(shape, promoted(call.q.dtype, *(cache.view.dtype for cache in call.caches)))
        assert call.run(out=out.view) is out.view
        call.check(out.view)
        out.assert_nothing_else_written()
    else:
        call.check(call.run())


def plain(queries, room, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = [(2, queries, 4, 16), (2, queries, 2, 16), (2, queries, 2, 16), (2, room, 2, 16), (2, room, 2, 16)]
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_masked_slots_of_the_cache_may_hold_anything(poison):
    q, new_k, new_v, k_cache, v_cache = plain(1, 20)
    k_cache[:, 11:], v_cache[:, 11:] = poison, poison
    seen = np.broadcast_to(np.arange(20) <= 10, (2, 20))
    out = step(q, new_k, new_v, k_cache, v_cache, 10, seen, 0.25)
    assert np.isfinite(out).all()
    assert_same_bits(k_cache[:, 10:11], new_k)
    assert np.array_equal(k_cache[:, 11:], np.full_like(k_cache[:, 11:], poison), equal_nan=True)


def test_several_queries_are_causal_from_the_offset():
    q, new_k, new_v, k_cache, v_cache = plain(4, 20)
    k_cache[:, 9:], v_cache[:, 9:] = np.nan, np.nan  # the future, without a key mask
    whole = step(q, new_k, new_v, k_cache, v_cache, 5, None, 0.25)
    assert np.isfinite(whole).all()
    for t in range(4):  # the same as one token after the other
        seen = np.broadcast_to(np.arange(20) <= 5 + t, (2, 20))
        one = step(q[:, t : t + 1], new_k[:, t : t + 1], new_v[:, t : t + 1], k_cache, v_cache, 5 + t, seen, 0.25)
        np.testing.assert_allclose(one[:, :, 0], whole[:, :, t], rtol=1e-5, atol=1e-5)


def test_one_query_sees_every_allowed_key_later_ones_too():
    q, new_k, new_v, k_cache, v_cache = plain(1, 20)
    out = step(q, new_k, new_v, k_cache, v_cache, 3, np.ones((2, 20), np.uint8), 0.25)
    want = reference.attention(*(x.swapaxes(1, 2) for x in (q, k_cache, v_cache)), scale=0.25)
    reference.assert_close(OP, out, want.out, want.magnitude)


def test_a_decoding_loop_is_attention_over_what_was_written():
    rng = np.random.default_rng(1)
    k_cache, v_cache = np.full((1, 32, 2, 16), np.nan, np.float32), np.full((1, 32, 2, 16), np.nan, np.float32)
    keys, values = [], []
    for t in range(32):
        q, k, v = (rng.normal(size=(1, 1, heads, 16)).astype(np.float32) for heads in (6, 2, 2))
        keys.append(k)
        values.append(v)
        out = step(q, k, v, k_cache, v_cache, t, np.arange(32)[None] <= t, 0.25)
        want = reference.attention(
            *(x.swapaxes(1, 2) for x in (q, np.concatenate(keys, 1), np.concatenate(values, 1))), scale=0.25
        )
        reference.assert_close(OP, out, want.out, want.magnitude)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_out_is_heads_before_time(dtype):
    q, new_k, new_v, k_cache, v_cache = plain(3, 9, dtype)
    assert step(q, new_k, new_v, k_cache, v_cache, 0, None, 0.25).shape == (2, 4, 3, 16)


Q, NEW, CACHE, OUT = (2, 2, 4, 8), (2, 2, 2, 8), (2, 6, 2, 8), (2, 4, 2, 8)
GOOD = {
    "q": np.ones(Q, np.float32),
    "new_k": np.ones(NEW, np.float32),
    "new_v": np.ones(NEW, np.float32),
    "k_cache": np.ones(CACHE, np.float32),
    "v_cache": np.ones(CACHE, np.float32),
    "offset": 1,
    "key_mask": np.ones((2, 6), bool),
    "scale": 0.3,
}
SHARED = np.ones((2, 12, 2, 8), np.float32)


@bad_calls(
    *[bad for name in ("q", "new_k", "new_v", "k_cache", "v_cache") for bad in bad_floating(name, GOOD[name].shape)],
    Bad("q", {"q": np.ones((2, 4, 8), np.float32)}),
    Bad("(q|new_k|k_cache)", {"q": np.ones((2, 2, 3, 8), np.float32), "out": np.zeros((2, 3, 2, 8), np.float32)}),
    Bad("(q|new_k|k_cache)", {"q": np.ones((3, 2, 4, 8), np.float32)}),
    Bad("(q|new_k|k_cache)", {"q": np.ones((2, 2, 4, 7), np.float32)}),
    *bad_shape("new_k", NEW),
    *bad_shape("new_v", NEW),
    Bad("new_k", {"new_k": np.ones(NEW, np.float16)}),
    Bad("new_v", {"new_v": np.ones(NEW, np.float64)}),
    Bad("(k_cache|v_cache|new_k)", {"k_cache": np.ones((2, 6, 1, 8), np.float32)}),
    Bad("v_cache", {"v_cache": np.ones((2, 5, 2, 8), np.float32)}),
    Bad("k_cache", {"k_cache": read_only(CACHE)}),
    Bad("v_cache", {"v_cache": read_only(CACHE)}),
    Bad("k_cache", {"k_cache": overlapping_itself(CACHE)}),
    Bad("v_cache", {"k_cache": SHARED[:, :6], "v_cache": SHARED[:, 5:11]}),
    Bad("(k_cache|new_k)", {"k_cache": SHARED[:, :6], "new_k": SHARED[:, 4:6]}),
    Bad("(out|v_cache)", {"v_cache": SHARED[:, :6], "out": SHARED[:, 4:8].reshape(2, 4, 2, 8)[:, :, ::-1]}),
    *[Bad("offset", {"offset": offset}) for offset in (-1, 5, 6, 2**40, -(2**40))],
    Bad("offset", {"offset": 2**70}, (ValueError, OverflowError)),
    Bad("offset", {"offset": np.array([0, 1])}),
    Bad("offset", {"offset": np.array(1.0)}, (ValueError, TypeError)),
    Bad("offset", {"offset": 1.0}, (ValueError, TypeError)),
    *bad_integers("key_mask", (2, 6), bool_too=False),
    *bad_shape("key_mask", (2, 6), bool),
    Bad("scale", {"scale": float("nan")}),
    *bad_out(OUT),
    *bad_signature(),
)
def test_bad_arguments_are_refused(bad):
    refuse(step, OP, GOOD, bad, [(OUT, float32)])
