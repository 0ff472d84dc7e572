"""What lies between Python and the C library: signatures, arrays of any library, dtypes of results, errors, memory."""

import ctypes
import doctest
import gc
import inspect
import os
import sys
import threading
import time
import tracemalloc

import metalloid
import ml_dtypes
import numpy as np
import pytest
from metalloid import fast
from operation_calls import CALLS

try:
    import torch
except ImportError:
    torch = None
needs_torch = pytest.mark.skipif(torch is None, reason="PyTorch is not installed")

BF16 = np.dtype(ml_dtypes.bfloat16)
F16, F32, F64 = np.dtype("float16"), np.dtype("float32"), np.dtype("float64")
FLOATING = (F32, F16, BF16, F64)
# test_metal_kernel.py is about the makers of kernels.
FUNCTIONS = [n for n in metalloid.__all__ if callable(getattr(metalloid, n)) and not n.endswith("_kernel")]
ROPE = {"traditional": False, "base": 10000.0, "scale": 1.0, "offset": 0}


def ones(*shape, dtype=F32):
    return np.ones(shape, dtype)


def normal(*shape, dtype=F32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def every_call(dtype=F32, array=lambda x: x):
    """name -> (function of out=, shapes of the results), each operation once, on small arrays."""

    def some(*shape, seed=0, dtype=dtype):
        return array(normal(*shape, dtype=dtype, seed=seed))

    x, w, y = some(2, 3, 8), some(8, seed=1), some(2, 3, 8, seed=2)
    q, k, v = some(1, 4, 3, 8), some(1, 2, 5, 8, seed=1), some(1, 2, 5, 6, seed=2)
    step_q, step_k = some(1, 3, 4, 8), some(1, 3, 2, 8, seed=1)
    caches = some(1, 9, 2, 8), some(1, 9, 2, 8, seed=1)
    gates = array(np.full((1, 3, 4), 0.5, dtype))
    targets = array(np.array([[1, 2, 3], [4, 5, 6]]))
    calls = {
        "rms_norm": (lambda **kw: metalloid.rms_norm(x, w, 1e-5, **kw), [(2, 3, 8)]),
        "layer_norm": (lambda **kw: metalloid.layer_norm(x, w, w, 1e-5, **kw), [(2, 3, 8)]),
        "add_rms_norm": (lambda **kw: metalloid.add_rms_norm(x, y, w, 1e-5, **kw), [(2, 3, 8)] * 2),
        "add_layer_norm": (lambda **kw: metalloid.add_layer_norm(x, y, w, w, 1e-5, **kw), [(2, 3, 8)] * 2),
        "rope": (lambda **kw: metalloid.rope(x, 8, **ROPE, **kw), [(2, 3, 8)]),
        "qk_norm_rope": (
            lambda **kw: metalloid.qk_norm_rope(q, k[:, :, :3], w, w, 1e-5, 8, **ROPE, **kw),
            [(1, 4, 3, 8), (1, 2, 3, 8)],
        ),
        "swiglu": (lambda **kw: metalloid.swiglu(x, y, **kw), [(2, 3, 8)]),
        "geglu": (lambda **kw: metalloid.geglu(x, y, approximate="tanh", **kw), [(2, 3, 8)]),
        "scaled_dot_product_attention": (
            lambda **kw: metalloid.scaled_dot_product_attention(q, k, v, scale=0.3, mask="causal", **kw),
            [(1, 4, 3, 6)],
        ),
        "kv_cache_sdpa_update": (
            lambda **kw: metalloid.kv_cache_sdpa_update(step_q, step_k, step_k, *caches, 2, None, 0.3, **kw),
            [(1, 4, 3, 8)],
        ),
        "cross_entropy": (lambda **kw: metalloid.cross_entropy(x, targets, **kw), [(2, 3)]),
        "gated_delta_update": (
            lambda **kw: metalloid.gated_delta_update(step_k, step_k, step_q, gates, gates, **kw),
            [(1, 3, 4, 8), (1, 4, 8, 8)],
        ),
    }
    assert set(calls) == set(FUNCTIONS) - {"set_num_threads", "get_num_threads", "cpu_isa"}
    return calls


def results_of(returned):
    return list(returned) if isinstance(returned, (tuple, list)) else [returned]


OPERATIONS = sorted(every_call())


# ---- signatures ------------------------------------------------------------------------------------------------------

# mlx.core.fast of MLX 0.32: parameters without a default, "*" before keyword-only ones, then those with their default.
MLX = {
    "rms_norm": "x weight eps * stream=None",
    "layer_norm": "x weight bias eps * stream=None",
    "cross_entropy": "logits targets * stream=None",
    "rope": "a dims * traditional base scale offset freqs=None stream=None",
    "scaled_dot_product_attention": "q k v * scale mask=None sinks=None force_fused=False stream=None",
    "gated_delta_update": "q k v gamma beta initial_state=None mask=None stream=None",
}
EXTRAS = {
    "cross_entropy": {"ignore_index"},
    "rope": {"position_ids", "inv_freqs", "time_axis"},
    "scaled_dot_product_attention": {"causal", "key_mask", "window", "softcap", "causal_offset", "return_logsumexp"},
}


@pytest.mark.parametrize("name", MLX)
def test_signature_is_that_of_mlx_with_keyword_only_extras(name):
    parameters = list(inspect.signature(getattr(fast, name)).parameters.values())
    extras = {"out"} | EXTRAS.get(name, set())
    assert {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} >= extras
    text, keyword_only = [], False
    for p in (p for p in parameters if p.name not in extras):
        if p.kind is p.KEYWORD_ONLY and not keyword_only:
            text.append("*")
            keyword_only = True
        text.append(p.name if p.default is p.empty else f"{p.name}={p.default}")
    assert " ".join(text) == MLX[name]


def test_fast_and_the_package_share_their_functions():
    assert sorted(fast.__all__) == sorted([*MLX, "metal_kernel", "cuda_kernel", "precompiled_cuda_kernel"])
    for name in fast.__all__:
        assert getattr(fast, name) is getattr(metalloid, name)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_written_signature_is_the_one_that_is_parsed(name):
    """Required and unknown parameters fail where the text says so."""
    function = getattr(metalloid, name)
    parameters = inspect.signature(function).parameters.values()
    required = [p for p in parameters if p.default is p.empty]
    if any(p.kind is p.POSITIONAL_ONLY for p in required) or not required:
        return
    for missing in required:
        given = {p.name: None for p in parameters if p is not missing}
        with pytest.raises(TypeError, match=f"missing required argument: '{missing.name}'"):
            function(**given)
    given = {p.name: None for p in parameters}
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        function(**given, nonsense=1)
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    with pytest.raises(TypeError, match=f"takes {len(positional)} positional arguments but {len(positional) + 1} were"):
        function(*[None] * (len(positional) + 1))
    with pytest.raises(TypeError, match=f"multiple values for argument '{positional[0].name}'"):
        function(None, **given)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_documented_example(name):
    function = getattr(metalloid, name)
    tests = doctest.DocTestFinder().find(function, name, globs={n: getattr(metalloid, n) for n in FUNCTIONS})
    assert sum(len(test.examples) for test in tests) >= 1
    runner = doctest.DocTestRunner()
    for test in tests:
        runner.run(test)
    assert runner.failures == 0


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_docstring_speaks_of_a_stream_where_there_is_one(name):
    function = getattr(metalloid, name)
    assert ("`stream` is ignored" in function.__doc__) == ("stream" in inspect.signature(function).parameters)


def test_mlx_callers_arguments_are_accepted():
    x = normal(1, 2, 3, 4)
    assert fast.rms_norm(x, None, 1e-5, stream="cpu") is not None
    assert fast.scaled_dot_product_attention(x, x, x, scale=1.0, force_fused=True, stream=None) is not None
    gates = ones(1, 2, 3)
    assert len(fast.gated_delta_update(x, x, x, gates, gates, None, None, None)) == 2


# ---- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_results_are_fresh_row_contiguous_numpy_arrays(name, dtype):
    call, shapes = every_call(dtype)[name]
    returned = call()
    assert type(returned) is (list if name == "gated_delta_update" else tuple if len(shapes) == 2 else np.ndarray)
    for result, shape in zip(results_of(returned), shapes, strict=True):
        assert type(result) is np.ndarray
        assert result.shape == shape
        assert result.flags.c_contiguous
        assert result.flags.writeable


@pytest.mark.parametrize("name", OPERATIONS)
def test_out_is_filled_and_returned(name):
    expected = results_of(every_call()[name][0]())
    call, shapes = every_call()[name]
    outs = tuple(np.full(shape, np.nan, F32) for shape in shapes)
    returned = results_of(call(out=outs if len(outs) == 2 else outs[0]))
    for out, result, want in zip(outs, returned, expected, strict=True):
        assert result is out
        np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("name", [n for n in OPERATIONS if n != "gated_delta_update"])  # whose state is float32 alone
def test_out_decides_the_dtype(name):
    call, shapes = every_call(F64)[name]
    exact = results_of(every_call(F64)[name][0]())
    outs = tuple(np.empty(shape, BF16) for shape in shapes)
    call(out=outs if len(outs) == 2 else outs[0])
    for out, want in zip(outs, exact, strict=True):
        np.testing.assert_allclose(out.astype(F64), want.astype(F64), rtol=2**-7, atol=1e-6)


def promoted(*dtypes):
    """MLX's promotion of floating dtypes."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    return F64 if F64 in dtypes else F32


PAIRS = [(a, b) for a in FLOATING for b in FLOATING]


@pytest.mark.parametrize(("a", "b"), PAIRS, ids=str)
def test_dtype_of_results_is_that_of_mlx(a, b):
    x, y, w = ones(2, 8, dtype=a), ones(2, 8, dtype=b), ones(8, dtype=b)
    both = promoted(a, b)
    assert metalloid.rms_norm(x, w, 1e-5).dtype == both
    assert metalloid.rms_norm(x, None, 1e-5).dtype == a
    assert metalloid.layer_norm(x, w, None, 1e-5).dtype == both
    assert metalloid.layer_norm(x, None, w, 1e-5).dtype == a
    assert metalloid.layer_norm(x, ones(8, dtype=a), w, 1e-5).dtype == both
    assert [r.dtype for r in metalloid.add_rms_norm(x, y, ones(8, dtype=a), 1e-5)] == [both, promoted(both, a)]
    assert [r.dtype for r in metalloid.add_rms_norm(x, x, w, 1e-5)] == [a, both]
    assert [r.dtype for r in metalloid.add_layer_norm(x, x, w, None, 1e-5)] == [a, both]
    assert [r.dtype for r in metalloid.add_layer_norm(x, x, None, w, 1e-5)] == [a, a]
    assert metalloid.swiglu(x, y).dtype == both
    assert metalloid.geglu(x, y).dtype == both
    assert metalloid.cross_entropy(x, np.zeros(2, np.int32)).dtype == F32

    q, k = ones(1, 1, 2, 8, dtype=a), ones(1, 1, 2, 8, dtype=b)
    freqs = {**ROPE, "base": None, "freqs": ones(4, dtype=b)}
    assert metalloid.rope(q, 8, **freqs).dtype == a
    assert [r.dtype for r in metalloid.qk_norm_rope(q, k, None, None, 1e-5, 8, **ROPE)] == [a, b]
    assert [r.dtype for r in metalloid.qk_norm_rope(q, k, w, w, 1e-5, 8, **ROPE)] == [both, b]
    for operands in ((q, k, k), (q, q, k), (q, k, q)):
        assert metalloid.scaled_dot_product_attention(*operands, scale=1.0).dtype == both
    out, lse = metalloid.scaled_dot_product_attention(q, k, k, scale=1.0, return_logsumexp=True)
    assert (out.dtype, lse.dtype) == (both, F64 if both == F64 else F32)
    if promoted(a, b) == a:  # others are refused: they would widen the arithmetic
        assert (
            metalloid.scaled_dot_product_attention(q, q, q, scale=1.0, mask=k[..., :2], sinks=k[0, 0, :1, 0]).dtype == a
        )
    assert metalloid.kv_cache_sdpa_update(q, k, k, k.copy(), k.copy(), 0, None, 1.0).dtype == both

    gates = ones(1, 1, 2, dtype=b)
    out, state = metalloid.gated_delta_update(q, q, k, gates, gates)
    assert (out.dtype, state.dtype) == (a, F64 if both == F64 else F32)
    assert metalloid.gated_delta_update(q, k, q, gates, gates)[0].dtype == both


def test_in_place():
    x, w = normal(3, 8), normal(8, seed=1)
    want = metalloid.rms_norm(x, w, 1e-5)
    assert metalloid.rms_norm(x, w, 1e-5, out=x) is x
    np.testing.assert_array_equal(x, want)


def test_logsumexp_comes_second():
    q = normal(1, 2, 3, 8)
    outs = np.empty_like(q), np.empty((1, 2, 3), F32)
    returned = metalloid.scaled_dot_product_attention(q, q, q, scale=0.5, return_logsumexp=True, out=outs)
    assert type(returned) is tuple
    assert returned[0] is outs[0]
    assert returned[1] is outs[1]
    np.testing.assert_allclose(outs[1], np.log(np.exp(0.5 * q @ q.swapaxes(2, 3)).sum(-1)), rtol=1e-5)


# ---- arguments -------------------------------------------------------------------------------------------------------


def test_mask_causal_is_causal_true_and_goes_with_an_array():
    q, k = normal(1, 2, 3, 8), normal(1, 2, 5, 8, seed=1)
    causal = metalloid.scaled_dot_product_attention(q, k, k, scale=0.5, causal=True)
    np.testing.assert_array_equal(metalloid.scaled_dot_product_attention(q, k, k, scale=0.5, mask="causal"), causal)
    np.testing.assert_array_equal(
        metalloid.scaled_dot_product_attention(q, k, k, scale=0.5, mask="causal", causal=True), causal
    )
    hides = np.arange(5) > 0
    both = metalloid.scaled_dot_product_attention(q, k, k, scale=0.5, causal=True, mask=hides)
    lower = np.tril(np.ones((3, 5), bool), 2) & hides
    np.testing.assert_allclose(both, metalloid.scaled_dot_product_attention(q, k, k, scale=0.5, mask=lower), rtol=1e-6)
    with pytest.raises(ValueError, match="mask must be 'causal', an array or None, got 'full'"):
        metalloid.scaled_dot_product_attention(q, k, k, scale=0.5, mask="full")


def test_window_softcap_and_causal_offset():
    q = normal(1, 1, 4, 8)

    def attention(**options):
        return metalloid.scaled_dot_product_attention(q, q, q, scale=0.5, **options)

    index = np.arange(4)
    seen = (index <= index[:, None]) & (index > index[:, None] - 2)
    np.testing.assert_allclose(attention(window=2, causal=True), attention(mask=seen), rtol=1e-6)
    np.testing.assert_array_equal(attention(window=2), attention(window=2, causal=True))
    np.testing.assert_allclose(
        attention(causal=True, causal_offset=-1)[0, 0, 1:], attention(mask=index < index[:, None])[0, 0, 1:], rtol=1e-6
    )
    np.testing.assert_array_equal(attention(causal=True, causal_offset=-(2**63)), np.zeros_like(q))
    np.testing.assert_array_equal(attention(causal=True, causal_offset=2**63 - 1), attention())
    assert np.abs(attention(softcap=0.1) - q.mean(2, keepdims=True)).max() < 0.2
    for bad in ({"window": 0}, {"window": -1}, {"softcap": 0.0}, {"softcap": -1.0}, {"causal_offset": 2**63}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            attention(**bad)


def test_rope_positions_agree_in_every_form():
    x = normal(2, 3, 5, 8)
    options = {"traditional": True, "base": 10000.0, "scale": 0.5}
    want = metalloid.rope(x, 6, offset=7, **options)
    batch_first = np.ascontiguousarray(x.swapaxes(1, 2))
    ids = np.broadcast_to(np.arange(7, 12, dtype=np.int32), (2, 5))
    for got in (
        metalloid.rope(x, np.int64(6), offset=np.int32(7), **options),
        metalloid.rope(x, 6, offset=np.array(7), **options),
        metalloid.rope(x, 6, offset=np.array([7], np.uint8), **options),
        metalloid.rope(x, 6, offset=np.array([7, 7], np.int16), **options),
        metalloid.rope(x, 6, offset=0, position_ids=ids, **options),
        metalloid.rope(batch_first, 6, offset=7, time_axis=1, **options).swapaxes(1, 2),
        metalloid.rope(x, 6, offset=7, time_axis=2, **options),
    ):
        np.testing.assert_array_equal(got, want)
    options["base"] = None
    freqs = 10000.0 ** (np.arange(3) / 3)
    np.testing.assert_allclose(metalloid.rope(x, 6, offset=7, freqs=freqs, **options), want, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        metalloid.rope(x, 6, offset=7, inv_freqs=1 / freqs, **options), want, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("offset", [3, np.int64(3), np.array(3), np.array([3], np.uint16)], ids=repr)
def test_kv_cache_is_updated_in_place(offset):
    q, new = normal(1, 1, 2, 4), normal(1, 1, 2, 4, seed=1)
    k_cache, v_cache = np.zeros((1, 6, 2, 4), F32), np.zeros((1, 6, 2, 4), F32)
    visible = np.arange(6)[None] <= 3
    out = metalloid.kv_cache_sdpa_update(q, new, 2 * new, k_cache, v_cache, offset, visible, 0.5)
    np.testing.assert_array_equal(k_cache[:, 3:4], new)
    np.testing.assert_array_equal(v_cache[:, 3:4], 2 * new)
    assert not k_cache[:, [0, 1, 2, 4, 5]].any()
    k, v = (c.swapaxes(1, 2) for c in (k_cache, v_cache))
    want = metalloid.scaled_dot_product_attention(q.swapaxes(1, 2), k, v, scale=0.5, key_mask=visible)
    np.testing.assert_allclose(out, want, rtol=1e-6)


def test_ignore_index():
    logits = normal(3, 5)
    loss = metalloid.cross_entropy(logits, np.array([1, -7, 2]), ignore_index=-7)
    assert loss[1] == 0
    np.testing.assert_array_equal(loss[[0, 2]], metalloid.cross_entropy(logits[[0, 2]], np.array([1, 2])))
    with pytest.raises(ValueError, match="targets"):
        metalloid.cross_entropy(logits, np.array([1, -7, 2]))


X3, X4 = ones(1, 2, 8), ones(1, 1, 2, 8)
TYPE_ERRORS = [
    (lambda: metalloid.rms_norm([1.0, 2.0], None, 1e-5), "rms_norm: x must be an array .* got list"),
    (lambda: metalloid.rms_norm(np.float32(1), None, 1e-5), "x must be an array .* got numpy.float32"),
    (lambda: metalloid.rms_norm(None, None, 1e-5), "x must be an array .* got NoneType"),
    (lambda: metalloid.rms_norm(np.ndarray, None, 1e-5), "x must be an array .* got type"),
    (lambda: metalloid.rms_norm(X3, 1.0, 1e-5), "weight must be an array .* got float"),
    (lambda: metalloid.rms_norm(X3, None, "small"), "eps must be a real number, got str"),
    (lambda: metalloid.rms_norm(X3, None, None), "eps must be a real number, got NoneType"),
    (lambda: metalloid.rope(X3, None, **ROPE), "dims must be an integer, got NoneType"),
    (lambda: metalloid.rms_norm(X3, None, 1j), "eps must be a real number, got complex"),
    (lambda: metalloid.rms_norm(X3, None, 1e-5, out=[0.0]), "out must be an array .* got list"),
    (lambda: metalloid.rope(X3, 8.0, **ROPE), "dims must be an integer, got float"),
    (lambda: metalloid.rope(X3, True, **ROPE), "dims must be an integer, got bool"),
    (lambda: metalloid.rope(X3, 8, **{**ROPE, "offset": 1.0}), "offset must be an integer or an array .* got float"),
    (lambda: metalloid.rope(X3, 8, **{**ROPE, "offset": True}), "offset must be an integer, got bool"),
    (
        lambda: metalloid.rope(X3, 8, **{**ROPE, "offset": None}),
        "offset must be an integer or an array .* got NoneType",
    ),
    (lambda: metalloid.rope(X3, 8, **{**ROPE, "traditional": 1}), "traditional must be True or False, got int"),
    (lambda: metalloid.add_rms_norm(X3, X3, None, 1e-5, out=X3.copy()), "out must be a tuple of two arrays, got"),
    (lambda: metalloid.add_rms_norm(X3, X3, None, 1e-5, out=(X3,)), "out must be a tuple of two arrays, got tuple"),
    (lambda: metalloid.add_rms_norm(X3, X3, None, 1e-5, out=(None, X3)), "out must be a tuple of two arrays, got None"),
    (lambda: metalloid.geglu(X3, X3, approximate=True), "approximate must be 'none' or 'tanh', got bool"),
    (
        lambda: metalloid.scaled_dot_product_attention(X4, X4, X4, scale=1.0, causal="yes"),
        "causal must be True or False",
    ),
    (
        lambda: metalloid.cross_entropy(X3, np.array([[0, 1]]), ignore_index=0.5),
        "ignore_index must be an integer, got float",
    ),
    (lambda: metalloid.set_num_threads(1.5), "threads must be an integer, got float"),
]
VALUE_ERRORS = [
    (lambda: metalloid.rms_norm(np.arange(4), None, 1e-5), "rms_norm: x must be float32.* got int64"),
    (
        lambda: metalloid.rms_norm(ones(3, dtype=np.complex64), None, 1e-5),
        "x must be float32, float16, bfloat16 or float64, got complex64",
    ),
    (
        lambda: metalloid.rms_norm(ones(3, dtype=np.longdouble), None, 1e-5),
        "x has the dtype float128",
    ),
    (lambda: metalloid.rms_norm(ones(3, dtype=">f4"), None, 1e-5), "x has the dtype >f4"),
    (lambda: metalloid.rms_norm(np.array(["a"]), None, 1e-5), "x has the dtype <U1"),
    (lambda: metalloid.rms_norm(ones(3, dtype=ml_dtypes.float8_e4m3fn), None, 1e-5), "x has the dtype float8_e4m3fn"),
    (lambda: metalloid.rms_norm(np.zeros(3, "V2"), None, 1e-5), r"x has the dtype \|V2"),
    (
        lambda: metalloid.rms_norm(np.zeros(3, "i1,f4")["f1"], None, 1e-5),
        "axis 0 of x has a stride of 5 bytes",
    ),
    (lambda: metalloid.rms_norm(np.frombuffer(bytes(9), np.uint8)[1:].view(F32), None, 1e-5), "x must be aligned"),
    (lambda: metalloid.rms_norm(X3, ones(7), 1e-5), r"weight must have shape \{8\}, got \{7\}"),
    (lambda: metalloid.rms_norm(X3, None, -1.0), "eps must be finite"),
    (lambda: metalloid.rms_norm(X3, None, 10**400), "eps must fit in a float"),
    (lambda: metalloid.rms_norm(np.zeros((), F32), None, 1e-5), "x must have rank 1 or more, got 0"),
    (lambda: metalloid.rms_norm(X3, None, 1e-5, out=ones(2, 8)), r"out must have shape \{1, 2, 8\}, got \{2, 8\}"),
    (lambda: metalloid.rms_norm(X3, None, 1e-5, out=np.broadcast_to(ones(8), (1, 2, 8))), "out is read-only"),
    (lambda: metalloid.rope(X3, 7, **ROPE), "dims must be even"),
    (lambda: metalloid.rope(X3, 2**64, **ROPE), "dims must fit in 64 bits, got 18446744073709551616"),
    (lambda: metalloid.rope(X3, 8, **{**ROPE, "base": None}), "exactly one of base, freqs and inv_freqs"),
    (lambda: metalloid.rope(X3, 8, **{**ROPE, "base": 0}), "base must be finite and positive, got 0"),
    (lambda: metalloid.rope(X3, 8, freqs=ones(4), **ROPE), "exactly one of base, freqs and inv_freqs"),
    (lambda: metalloid.rope(X3, 8, **{**ROPE, "offset": np.array(1.0)}), "offsets must be an integer"),
    (lambda: metalloid.rope(X3, 8, **{**ROPE, "offset": np.array(True)}), "offsets must be an integer"),
    (
        lambda: metalloid.rope(X3, 8, **{**ROPE, "offset": 1}, position_ids=np.zeros((1, 2), int)),
        "offset must be 0 where position_ids",
    ),
    (
        lambda: metalloid.add_rms_norm(X3, X3, None, 1e-5, out=(X3, X3)),
        "out must be two arrays, got the same one twice",
    ),
    (lambda: metalloid.rope(ones(1, 2, 3, 8), 8, time_axis=0, **ROPE), "time_axis must be -2, .* or 1, got 0"),
    (lambda: metalloid.geglu(X3, X3, approximate="sigmoid"), "approximate must be 'none' or 'tanh', got 'sigmoid'"),
    (lambda: metalloid.scaled_dot_product_attention(X3, X4, X4, scale=1.0), "q must have rank 4, got 3"),
    (lambda: metalloid.scaled_dot_product_attention(X4, X4, X3, scale=1.0), "v must have shape"),
    (lambda: metalloid.kv_cache_sdpa_update(X4, X4, X4, X4.copy(), X4.copy(), 1, None, 1.0), "offset must lie in"),
    (
        lambda: metalloid.kv_cache_sdpa_update(X4, X4, X4, X4.copy(), X4.copy(), np.zeros(2, int), None, 1.0),
        "offset must be",
    ),
    (
        lambda: metalloid.kv_cache_sdpa_update(X4, X4, X4, X4.copy(), X4.copy(), np.array(0.0), None, 1.0),
        "offset must be",
    ),
    (lambda: metalloid.cross_entropy(X3, np.array([[0, 8]])), r"targets must lie in \[0, 8\), got 8"),
    (lambda: metalloid.gated_delta_update(X3, X3, X3, X3, X3), "q must have rank 4, got 3"),
    (lambda: metalloid.set_num_threads(-1), "threads"),
    (lambda: metalloid.set_num_threads(2**40), "threads must fit in 32 bits"),
]


@pytest.mark.parametrize(("call", "message"), TYPE_ERRORS, ids=[m for _, m in TYPE_ERRORS])
def test_type_error(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize(("call", "message"), VALUE_ERRORS, ids=[m for _, m in VALUE_ERRORS])
def test_value_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("which", ["k_cache", "v_cache"])
def test_read_only_caches_are_refused(which):
    caches = {"k_cache": X4.copy(), "v_cache": X4.copy()}
    caches[which].flags.writeable = False
    with pytest.raises(ValueError, match=f"kv_cache_sdpa_update: {which} is read-only"):
        metalloid.kv_cache_sdpa_update(X4, 2 * X4, 2 * X4, offset=0, key_mask=None, scale=1.0, **caches)
    assert (caches["k_cache"] == 1).all()
    assert (caches["v_cache"] == 1).all()


@pytest.mark.parametrize("name", OPERATIONS)
def test_read_only_out_is_refused_and_stays(name):
    call, shapes = every_call()[name]
    for last in range(len(shapes)):
        outs = tuple(np.full(shape, 7, F32) for shape in shapes)
        outs[last].flags.writeable = False
        which = "out" if len(outs) == 1 else rf"out\[{last}\]"
        with pytest.raises(ValueError, match=f"{name}: {which} is read-only"):
            call(out=outs if len(outs) == 2 else outs[0])
        assert all((out == 7).all() for out in outs)


def test_read_only_inputs_are_fine():
    x = normal(3, 8)
    want = metalloid.rms_norm(x, x[0], 1e-5)
    x.flags.writeable = False
    np.testing.assert_array_equal(metalloid.rms_norm(x, x[0], 1e-5), want)


def address_of_result(x):
    return metalloid.rms_norm(x, None, 1e-5).ctypes.data


def test_a_large_result_takes_the_memory_of_the_last_one_that_is_gone():
    x = np.ones((512, 512), np.float32)
    first = metalloid.rms_norm(x, None, 1e-5)
    second = metalloid.rms_norm(x, None, 1e-5)
    places = {first.ctypes.data, second.ctypes.data}
    assert len(places) == 2
    del first, second
    assert address_of_result(x) in places
    view = metalloid.rms_norm(x, None, 1e-5)[1:]
    assert address_of_result(x) != view.base.ctypes.data  # as long as anything refers to it, it is not gone


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="frees late under AddressSanitizer")
def test_memory_of_large_results_is_bounded():
    def resident():
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    for rows in range(1, 40):  # every size is another
        metalloid.rms_norm(np.ones((rows * 512, 1024), np.float32), None, 1e-5)
    assert resident() - before < 300 << 20  # of 1.6 GB


def test_a_large_result_can_be_resized():
    x = np.ones((512, 512), np.float32)
    expected = metalloid.rms_norm(x, None, 0.0)
    for shape in ((1024, 1024), (3, 3)):
        result = metalloid.rms_norm(x, None, 0.0)
        result.resize(shape, refcheck=False)
        same = min(result.size, expected.size)
        assert (result.ravel()[:same] == expected.ravel()[:same]).all()
        assert not result.ravel()[same:].any()


def test_numpy_rank_64():
    shape = (1,) * 62 + (2, 8)
    x = normal(*shape)
    np.testing.assert_array_equal(
        metalloid.rms_norm(x, None, 1e-5).ravel(), metalloid.rms_norm(x.reshape(2, 8), None, 1e-5).ravel()
    )


class Subclass(np.ndarray):
    pass


def test_numpy_subclasses_give_plain_arrays():
    x = normal(3, 8)
    result = metalloid.rms_norm(x.view(Subclass), None, 1e-5)
    assert type(result) is np.ndarray
    np.testing.assert_array_equal(result, metalloid.rms_norm(x, None, 1e-5))


@pytest.mark.parametrize("made", CALLS, ids=str)
def test_masked_arrays_are_refused(made):
    """Whose mask would be lost, at every place of an array."""
    for masked in made.masked(np.copy):
        before = [a.copy() for a in masked]
        args, keywords = made.with_arrays(masked)
        with pytest.raises(
            TypeError, match=rf"^{made.op}: \w+ is a masked array, whose mask would be lost: pass \w+\."
        ):
            getattr(metalloid, made.op)(*args, **keywords)
        for a, b in zip(masked, before, strict=True):
            np.testing.assert_array_equal(np.ma.getdata(a), np.ma.getdata(b))


@pytest.mark.parametrize("name", OPERATIONS)
def test_masked_out_is_refused(name):
    call, shapes = every_call()[name]
    outs = tuple(np.ma.masked_array(np.full(shape, 7, F32), mask=True) for shape in shapes)
    with pytest.raises(TypeError, match=rf"^{name}: out(\[0\])? is a masked array"):
        call(out=outs if len(outs) == 2 else outs[0])
    assert all((out.data == 7).all() for out in outs)


def test_matrices_and_mapped_files(tmp_path):
    x = normal(3, 8)
    want = metalloid.rms_norm(x, None, 1e-5)
    mapped = np.memmap(tmp_path / "x", F32, "w+", shape=(3, 8))
    mapped[:] = x
    out = np.memmap(tmp_path / "out", F32, "w+", shape=(3, 8))
    for array in (x.view(np.matrix), mapped, x[::-1, ::-1].copy()[::-1, ::-1]):
        np.testing.assert_array_equal(metalloid.rms_norm(array, None, 1e-5, out=out), want)
        out.flush()
        np.testing.assert_array_equal(np.fromfile(tmp_path / "out", F32).reshape(3, 8), want)
        out[:] = 0
    reading = np.memmap(tmp_path / "x", F32, "r", shape=(3, 8))
    np.testing.assert_array_equal(metalloid.rms_norm(reading, None, 1e-5), want)
    with pytest.raises(ValueError, match="rms_norm: out is read-only"):
        metalloid.rms_norm(x, None, 1e-5, out=reading)


# ---- DLPack capsules -------------------------------------------------------------------------------------------------


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class Managed(ctypes.Structure):
    _fields_ = [("tensor", DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class ManagedVersioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", DLTensor),
    ]


DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
capsule_is = ctypes.pythonapi.PyCapsule_IsValid
capsule_is.argtypes = [ctypes.py_object, ctypes.c_char_p]


class Exporter:
    """A library that nobody knows: one array, exported as told, with every release counted."""

    def __init__(
        self,
        array,
        *,
        versioned=True,
        knows_max_version=True,
        null_strides=False,
        byte_offset=0,
        flags=0,
        major=1,
        device=1,
    ):
        self.array, self.versioned, self.knows_max_version = array, versioned, knows_max_version
        self.null_strides, self.byte_offset, self.flags, self.major, self.device = (
            null_strides,
            byte_offset,
            flags,
            major,
            device,
        )
        self.exported, self.released, self.capsules = 0, 0, []
        self.deleter = DELETER(self._release)
        self.shape = (ctypes.c_int64 * max(array.ndim, 1))(*array.shape)
        self.strides = (ctypes.c_int64 * max(array.ndim, 1))(*(s // array.itemsize for s in array.strides))

    def _release(self, _):
        self.released += 1

    def __dlpack_device__(self):
        return (self.device, 0)

    def __dlpack__(self, **options):
        if options and not self.knows_max_version:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        if not options and self.versioned:
            raise BufferError("only versioned capsules")
        assert not options or options["max_version"][0] == 1
        code = {"f": 2, "i": 0, "u": 1, "b": 6, "V": 4}[self.array.dtype.kind]
        address = self.array.ctypes.data - self.byte_offset
        strides = None if self.null_strides else self.strides
        dtype = code, 8 * self.array.itemsize, 1
        tensor = DLTensor(address, self.device, 0, self.array.ndim, *dtype, self.shape, strides, self.byte_offset)
        deleter = ctypes.cast(self.deleter, ctypes.c_void_p)
        if self.versioned:
            self.managed = ManagedVersioned(self.major, 0, None, deleter, self.flags, tensor)
        else:
            self.managed = Managed(tensor, None, deleter)
        self.exported += 1
        name = b"dltensor_versioned" if self.versioned else b"dltensor"
        self.capsules.append(new_capsule(ctypes.addressof(self.managed), name, None))
        return self.capsules[-1]


class Namespaced(Exporter):
    """And one that can import results."""

    def __array_namespace__(self):
        return np


FORMS = {
    "versioned": {},
    "unversioned": {"versioned": False},
    "before max_version": {"versioned": False, "knows_max_version": False},
    "NULL strides": {"null_strides": True},
    "unversioned, NULL strides": {"versioned": False, "null_strides": True},
    "byte_offset": {"byte_offset": 64},
    "pinned host memory": {"device": 3},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_capsule_as_input_and_output(form):
    x, w = normal(3, 8), normal(8, seed=1)
    out = np.empty_like(x)
    exporters = [Exporter(a, **form) for a in (x, w, out)]
    assert metalloid.rms_norm(exporters[0], exporters[1], 1e-5, out=exporters[2]) is exporters[2]
    np.testing.assert_array_equal(out, metalloid.rms_norm(x, w, 1e-5))
    used = b"used_dltensor" if not exporters[0].versioned else b"used_dltensor_versioned"
    for exporter in exporters:
        assert (exporter.exported, exporter.released) == (1, 1)
        assert capsule_is(exporter.capsules[0], used)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_capsule_with_strides_and_every_dtype(dtype):
    x = normal(4, 6, 8, dtype=dtype)[::-2, 1:4].swapaxes(0, 1)
    out = np.empty(x.shape, dtype)
    metalloid.rms_norm(Exporter(x), None, 1e-5, out=out)
    np.testing.assert_array_equal(out.view(np.uint8), metalloid.rms_norm(x, None, 1e-5).view(np.uint8))


def test_capsule_of_bool_and_integers_as_masks():
    q, keep = normal(1, 1, 2, 8), np.array([[True, False]])
    want = metalloid.scaled_dot_product_attention(q, q, q, scale=1.0, key_mask=keep)
    for mask in (keep, keep.astype(np.int8), keep.astype(np.uint64)):
        got = metalloid.scaled_dot_product_attention(q, q, q, scale=1.0, key_mask=Exporter(mask))
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("flags", "message"), [(1, "out is read-only"), (2, "out was exported as a copy")])
def test_capsule_that_must_not_be_written(flags, message):
    x, out = normal(3, 8), np.zeros((3, 8), F32)
    exporter = Exporter(out, flags=flags)
    with pytest.raises(ValueError, match=message):
        metalloid.rms_norm(x, None, 1e-5, out=exporter)
    assert not out.any()
    assert exporter.released == 1
    reading = Exporter(x, flags=flags)
    np.testing.assert_array_equal(metalloid.rms_norm(reading, None, 1e-5, out=out), metalloid.rms_norm(x, None, 1e-5))
    assert reading.released == 1


def test_capsules_are_released_when_a_later_argument_fails():
    first, second = Exporter(normal(3, 8)), Exporter(normal(7))
    with pytest.raises(ValueError, match=r"weight must have shape \{8\}, got \{7\}"):
        metalloid.rms_norm(first, second, 1e-5, out=np.empty((3, 8), F32))
    with pytest.raises(TypeError, match="eps"):
        metalloid.rms_norm(first, second, "eps")
    with pytest.raises(TypeError, match="weight must be an array"):
        metalloid.rms_norm(first, "w", 1e-5)
    assert (first.exported, first.released, second.exported, second.released) == (3, 3, 2, 2)


def test_unknown_major_version_is_released_unread():
    exporter = Exporter(normal(3, 8), major=2)
    with pytest.raises(ValueError, match="x comes by DLPack 2, only 1 is known"):
        metalloid.rms_norm(exporter, None, 1e-5)
    assert exporter.released == 1


def test_other_devices_are_a_runtime_error():
    x, out = (Exporter(normal(3, 8), device=2) for _ in range(2))
    for options in ({}, {"out": out}):
        with pytest.raises(RuntimeError, match="device of DLPack type 2, which no backend of this build serves"):
            metalloid.rms_norm(x, None, 1e-5, **options)
    with pytest.raises(ValueError, match="out must be on the device of x"):
        metalloid.rms_norm(x, None, 1e-5, out=np.empty((3, 8), F32))
    assert (x.released, out.released) == (3, 1)


def test_failure_to_export_is_a_value_error_with_its_cause():
    class Refuses:
        def __dlpack__(self, **_):
            raise BufferError("not now")

    with pytest.raises(ValueError, match="rms_norm: the memory of x cannot be shared: not now") as caught:
        metalloid.rms_norm(Refuses(), None, 1e-5)
    assert isinstance(caught.value.__cause__, BufferError)

    class Interrupted:
        def __dlpack__(self, **_):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        metalloid.rms_norm(Interrupted(), None, 1e-5)

    class Nonsense:
        def __dlpack__(self, **_):
            return 5

    with pytest.raises(ValueError, match="__dlpack__ of x returned no DLPack capsule"):
        metalloid.rms_norm(Nonsense(), None, 1e-5)


def test_errors_of_an_export_are_one_line_and_name_the_argument():
    class Unprintable(Exception):
        def __str__(self):
            raise RuntimeError

    class Refuses:
        def __dlpack__(self, **_):
            raise error

    class RefusesAttributes:
        def __getattr__(self, name):
            raise error

    for error, words in (
        (BufferError("not\n\n  now"), "not now"),
        (Unprintable(), "Unprintable"),
        (OSError(), "OSError"),
    ):
        for array in (Refuses(), RefusesAttributes()):
            with pytest.raises(
                ValueError, match=f"^rms_norm: the memory of weight cannot be shared: {words}$"
            ) as caught:
                metalloid.rms_norm(normal(3, 8), array, 1e-5)
            assert caught.value.__cause__ is error


def test_negative_extents_name_their_argument():
    for shape in ((-1, 8), (3, -8)):
        lying = Namespaced(normal(3, 8))
        lying.shape = (ctypes.c_int64 * 2)(*shape)
        with pytest.raises(ValueError, match=rf"rms_norm: x must not have a negative extent, got {min(shape)}"):
            metalloid.rms_norm(lying, None, 1e-5)
        assert lying.released == 1


@pytest.mark.parametrize("wrap", [lambda x: x, Namespaced], ids=["NumPy", "namespace"])
def test_results_too_large_for_an_address_space_are_refused(wrap):
    x = np.broadcast_to(np.ones((), BF16), (1 << 40, 1 << 21))
    with pytest.raises(ValueError, match=r"rms_norm: out would be too large: its size in bytes overflows"):
        metalloid.rms_norm(wrap(x), ones(1 << 21), 1e-5)


@pytest.mark.parametrize("bits", [0, 1, 24, 128, 255])
def test_kv_cache_offset_of_an_unknown_width_is_refused(bits):
    class Wide(Exporter):
        def __dlpack__(self, **options):
            capsule = super().__dlpack__(**options)
            self.managed.tensor.bits = bits
            return capsule

    step, caches = ones(1, 1, 2, 8), [np.zeros((1, 4, 2, 8), F32) for _ in range(2)]
    with pytest.raises(ValueError, match="kv_cache_sdpa_update: offset must be an integer or an integer array"):
        metalloid.kv_cache_sdpa_update(step, step, step, *caches, Wide(np.zeros(64, np.int64)[:1]), None, 1.0)
    assert not caches[0].any()


def test_a_call_without_a_place_for_its_results_writes_nothing():
    class Raises(Exporter):
        def __array_namespace__(self):
            raise RuntimeError("no namespace today")

    step = ones(1, 1, 2, 8)
    for kind, error in ((Exporter, ValueError), (Raises, RuntimeError)):
        caches = [np.zeros((1, 4, 2, 8), F32) for _ in range(2)]
        with pytest.raises(error, match="namespace"):
            metalloid.kv_cache_sdpa_update(kind(step), step, step, *caches, 0, None, 1.0)
        assert not caches[0].any()
        assert not caches[1].any()


def test_results_go_through_the_array_namespace():
    x = normal(3, 8)
    result = metalloid.rms_norm(Namespaced(x), None, 1e-5)
    assert type(result) is np.ndarray
    np.testing.assert_array_equal(result, metalloid.rms_norm(x, None, 1e-5))
    total, norm = metalloid.add_rms_norm(Namespaced(x), x, None, 1e-5)
    np.testing.assert_array_equal(total, x + x)
    np.testing.assert_array_equal(norm, metalloid.add_rms_norm(x, x, None, 1e-5)[1])
    exporter = Exporter(x)
    with pytest.raises(ValueError, match="Exporter, which has no __array_namespace__: pass out="):
        metalloid.rms_norm(exporter, None, 1e-5)
    assert exporter.released == 1


# ---- PyTorch ---------------------------------------------------------------------------------------------------------


def to_torch(array):
    """The same memory as a tensor."""
    if array.dtype == BF16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor):
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BF16)
    return tensor.numpy()


@needs_torch
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_torch_in_torch_out(name, dtype):
    call, shapes = every_call(dtype, to_torch)[name]
    want = results_of(every_call(dtype)[name][0]())
    for result, expected, shape in zip(results_of(call()), want, shapes, strict=True):
        assert type(result) is torch.Tensor
        assert tuple(result.shape) == shape
        assert result.is_contiguous()
        assert to_numpy(result).dtype == expected.dtype
        np.testing.assert_array_equal(to_numpy(result), expected)


@needs_torch
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_torch_views_are_read_and_written_in_place(dtype):
    buffer = to_torch(normal(6, 5, 8, dtype=dtype))
    view = buffer[1::2].transpose(0, 1)
    want = metalloid.rms_norm(view.contiguous(), None, 1e-5)
    before = buffer.clone()
    assert metalloid.rms_norm(view, None, 1e-5, out=view) is view
    assert torch.equal(view, want)
    assert torch.equal(buffer[::2], before[::2])
    out = np.empty((5, 3, 8), dtype)
    metalloid.rms_norm(before[1::2].transpose(0, 1), None, 1e-5, out=out)
    np.testing.assert_array_equal(out, to_numpy(want.contiguous()))


@needs_torch
def test_torch_and_numpy_mix_and_the_first_decides():
    x, w = normal(3, 8), normal(8, seed=1)
    assert type(metalloid.rms_norm(to_torch(x), w, 1e-5)) is torch.Tensor
    assert type(metalloid.rms_norm(x, to_torch(w), 1e-5)) is np.ndarray
    offsets = torch.tensor([3])
    y = normal(1, 3, 8)
    want = metalloid.rope(y, 8, **{**ROPE, "offset": 3})
    np.testing.assert_array_equal(metalloid.rope(y, 8, **{**ROPE, "offset": offsets}), want)
    np.testing.assert_array_equal(metalloid.rope(y, 8, **{**ROPE, "offset": offsets[0]}), want)


@needs_torch
def test_torch_gradients_are_never_lost():
    x = torch.ones(3, 8, requires_grad=True)
    with pytest.raises(ValueError, match="rms_norm: x requires gradients"):
        metalloid.rms_norm(x, None, 1e-5)
    with pytest.raises(ValueError, match="out requires gradients"):
        metalloid.rms_norm(x.detach(), None, 1e-5, out=x)
    weight = torch.nn.Parameter(torch.ones(8))
    with torch.no_grad():
        result = metalloid.rms_norm(x, weight, 1e-5)
    assert type(result) is torch.Tensor
    assert not result.requires_grad
    assert torch.equal(result, metalloid.rms_norm(x.detach(), weight.detach(), 1e-5))
    with torch.inference_mode():
        assert torch.equal(metalloid.rms_norm(x, weight, 1e-5), result)


@needs_torch
@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: torch.ones(3, 8, dtype=torch.int32), "x must be float32"),
        (lambda: torch.ones(3, 8, dtype=torch.complex64), "x must be float32"),
        (lambda: torch.ones(3, 8).to_sparse(), "the memory of x cannot be shared"),
        (lambda: torch.ones(3, 8, device="meta"), "."),
    ],
    ids=["int32", "complex64", "sparse", "meta"],
)
def test_torch_tensors_that_are_refused(make, error):
    with pytest.raises((ValueError, RuntimeError), match=error):
        metalloid.rms_norm(make(), None, 1e-5)


@needs_torch
def test_torch_result_is_an_ordinary_tensor():
    result = metalloid.rms_norm(torch.ones(3, 8), None, 1e-5)
    result.resize_(5, 8)
    assert result.device.type == "cpu"
    assert not result.is_shared()


# ---- memory and threads ----------------------------------------------------------------------------------------------


def leaked(call, times=10_000):
    """Bytes that many calls leave behind, the least of three times: pytest-xdist has a thread that allocates too."""
    least = left_behind(call, times)
    for _ in range(2):
        if least >= 5000:
            least = min(least, left_behind(call, times))
    return least


def left_behind(call, times):
    for _ in range(times // 10):
        call()
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(times):
        call()
    gc.collect()
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return after - before


def refused(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except (TypeError, ValueError):
        return
    raise AssertionError("was not refused")


@pytest.mark.parametrize("name", OPERATIONS)
def test_calls_leave_nothing_behind(name):
    call, shapes = every_call()[name]
    outs = tuple(np.empty(shape, F32) for shape in shapes)
    out = outs if len(outs) == 2 else outs[0]
    counts = [sys.getrefcount(o) for o in outs]
    assert leaked(call) < 5000
    assert leaked(lambda: call(out=out)) < 5000
    assert [sys.getrefcount(o) for o in outs] == counts


x_ok, x_short = normal(3, 8), normal(3, 7)
x_masked = np.ma.masked_array(x_ok[0], mask=x_ok[0] < 0)
exporter = Exporter(x_ok)


def refused_export(*arguments, **options):
    exporter.capsules.clear()
    refused(metalloid.rms_norm, exporter, *arguments, **options)


ERROR_PATHS = {
    "shape": lambda: refused(metalloid.rms_norm, x_ok, x_short[0], 1e-5),
    "second out": lambda: refused(metalloid.add_rms_norm, x_ok, x_ok, None, 1e-5, out=(np.empty_like(x_ok), x_short)),
    "no array": lambda: refused(metalloid.rms_norm, x_ok, [1.0], 1e-5),
    "masked": lambda: refused(metalloid.rms_norm, x_ok, x_masked, 1e-5),
    "keyword": lambda: refused(metalloid.rms_norm, x_ok, None, 1e-5, wrong=1),
    "value": lambda: refused(metalloid.rms_norm, x_ok, None, "eps"),
}
# NumPy frees a capsule's memory behind tracemalloc's back. Nobody notices where the next allocation takes the same
# place, but AddressSanitizer keeps it free for long.
CAPSULE_PATHS = {
    "capsule": lambda: refused_export(x_short[0], 1e-5),
    "no namespace": lambda: refused_export(None, 1e-5),
}
capsules_are_counted = pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="runs under AddressSanitizer"
)
ERROR_PATHS |= {name: pytest.param(path, marks=capsules_are_counted) for name, path in CAPSULE_PATHS.items()}


@pytest.mark.parametrize("path", ERROR_PATHS.values(), ids=ERROR_PATHS)
def test_errors_leave_nothing_behind(path):
    gc.collect()  # what an earlier test left
    counts = sys.getrefcount(x_ok), sys.getrefcount(x_short)
    assert leaked(path, 3000) < 5000
    assert (sys.getrefcount(x_ok), sys.getrefcount(x_short)) == counts


@capsules_are_counted
def test_results_by_namespace_leave_nothing_behind():
    source = Namespaced(x_ok)

    def call():
        source.capsules.clear()
        metalloid.rms_norm(source, None, 1e-5)

    assert leaked(call, 3000) < 5000


@needs_torch
def test_torch_calls_leave_nothing_behind():
    x, out = torch.ones(3, 8), torch.empty(3, 8)
    counts = sys.getrefcount(x), sys.getrefcount(out)
    for call in (
        lambda: metalloid.rms_norm(x, None, 1e-5),
        lambda: metalloid.rms_norm(x, None, 1e-5, out=out),
        lambda: refused(metalloid.rms_norm, x, x, 1e-5, out=out),
    ):
        assert leaked(call) < 5000
    assert (sys.getrefcount(x), sys.getrefcount(out)) == counts


def test_other_threads_run_during_a_large_call(threads):
    threads(1)
    gate = np.ones(1 << 23)
    out = np.empty_like(gate)
    worker = threading.Thread(target=lambda: [metalloid.geglu(gate, gate, out=out) for _ in range(4)])
    worker.start()
    ticks = 0
    while worker.is_alive():
        time.sleep(0.001)
        ticks += 1
    assert ticks >= 10  # four calls that held the lock would let this loop in four times


def test_eight_threads_at_once():
    x = [normal(64, 300, seed=seed) for seed in range(8)]
    want = [metalloid.rms_norm(a, None, 1e-5) for a in x]
    wrong = []

    def work(index):
        for _ in range(50):
            if not np.array_equal(metalloid.rms_norm(x[index], None, 1e-5), want[index]):
                wrong.append(index)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
