"""metalloid.mlx, by the primitive and by evaluating: the kernels' own bits, MLX's transformations, MLX programs."""

import doctest
import gc
import inspect
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec

import metalloid
import ml_dtypes
import numpy as np
import pytest
from arrays import assert_same_bits
from operation_calls import CALLS, directions_and_cotangents, slope

mx = pytest.importorskip("mlx.core")

import metalloid.mlx as mm  # noqa: E402

every_call = pytest.mark.parametrize("call", CALLS, ids=str)
by_label = {call.label: call for call in CALLS}
FAST = ["cross_entropy", "gated_delta_update", "layer_norm", "rms_norm", "rope", "scaled_dot_product_attention"]


def primitive_is_possible():
    return shutil.which("c++") is not None and find_spec("nanobind") is not None


@pytest.fixture(params=["primitive", "evaluating"])
def mode(request, monkeypatch):
    """Both ways to run a call; the primitive only where there is what it is compiled with."""
    if request.param == "evaluating":
        monkeypatch.setattr(mm, "_primitive", None)
    else:
        if not primitive_is_possible():
            pytest.skip("no C++ compiler or no nanobind")
        mm.build()
    assert mm.mode() == request.param
    return request.param


def array_of(numpy):
    if numpy.dtype == ml_dtypes.bfloat16:
        return mx.array(numpy.astype(np.float32)).astype(mx.bfloat16)
    return mx.array(numpy)


def numpy_of(array):
    if array.dtype == mx.bfloat16:
        return np.array(array.astype(mx.float32)).astype(ml_dtypes.bfloat16)
    return np.array(array)


def results_of(value):
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def function_of(call):
    def function(*arrays):
        args, keywords = call.with_arrays(arrays)
        return results_of(getattr(mm, call.op)(*args, **keywords))

    return function


def arrays_of(call):
    return [array_of(a) for _, a in call.arrays()]


def assert_results(call, results):
    for result, expected in zip(results, call.expected(), strict=True):
        assert isinstance(result, mx.array)
        assert_same_bits(numpy_of(result), expected)


# ---- values


@every_call
def test_results_have_the_bits_of_the_same_call_on_numpy_arrays(call, mode):
    assert_results(call, function_of(call)(*arrays_of(call)))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("label", ["rms_norm", "rope", "attention causal", "swiglu", "cross_entropy"])
def test_16_bit_dtypes(label, dtype, mode):
    call = by_label[label].cast(dtype)
    assert_results(call, function_of(call)(*arrays_of(call)))


def test_arrays_are_read_as_they_lie(mode):
    call = by_label["attention causal"]
    arrays = [mx.array(np.ascontiguousarray(a.transpose(0, 2, 1, 3))).transpose(0, 2, 1, 3) for _, a in call.arrays()]
    assert_results(call, function_of(call)(*arrays))
    x = mx.arange(64, dtype=mx.float32).reshape(8, 8)
    for view in (x[::2], x[:, ::-1], x.T, mx.broadcast_to(x[0], (3, 8)), x[1:][:, 2:]):
        assert_same_bits(numpy_of(mm.rms_norm(view, None, 1e-5)), metalloid.rms_norm(np.array(view), None, 1e-5))


def test_an_array_not_yet_evaluated_is(mode):
    x = mx.ones((4, 8)) * 3 + mx.arange(8, dtype=mx.float32)
    y = mm.rms_norm(mm.rms_norm(x, None, 1e-5) * 2, None, 1e-5)
    step = metalloid.rms_norm(np.array(x), None, 1e-5) * 2
    assert_same_bits(numpy_of(y), metalloid.rms_norm(step, None, 1e-5))


def test_empty_arrays(mode):
    assert mm.rms_norm(mx.zeros((0, 4)), None, 1e-5).shape == (0, 4)
    out = mm.scaled_dot_product_attention(
        mx.ones((1, 1, 2, 4)), mx.zeros((1, 1, 0, 4)), mx.zeros((1, 1, 0, 3)), scale=1.0
    )
    assert_same_bits(numpy_of(out), np.zeros((1, 1, 2, 3), np.float32))


def test_results_are_lazy_with_the_primitive():
    if not primitive_is_possible():
        pytest.skip("no C++ compiler or no nanobind")
    mm.build()
    loss = mm.cross_entropy(mx.ones((1, 4)), mx.array([9]))  # wrong, which shows when it runs
    with pytest.raises((ValueError, RuntimeError), match="targets must lie in"):
        mx.eval(loss)


def test_a_cache_that_nobody_else_holds_keeps_its_memory():
    if not primitive_is_possible():
        pytest.skip("no C++ compiler or no nanobind")
    mm.build()
    k_cache, v_cache = mx.zeros((1, 64, 2, 8)), mx.zeros((1, 64, 2, 8))
    q = new = mx.ones((1, 1, 2, 8))
    k_cache, v_cache = (
        mx.slice_update(k_cache, new, mx.array([0]), (1,)),
        mx.slice_update(v_cache, new, mx.array([0]), (1,)),
    )
    mx.eval(k_cache, v_cache)
    before = np.array(k_cache, copy=False).ctypes.data
    for at in range(1, 4):
        out, k_cache, v_cache = mm.kv_cache_sdpa_update(q, new, new, k_cache, v_cache, at, None, 1.0)
        mx.eval(out, k_cache, v_cache)
    assert np.array(k_cache, copy=False).ctypes.data == before
    assert np.array(k_cache)[0, :5, 0, 0].tolist() == [1, 1, 1, 1, 0]


# ---- transformations


@every_call
def test_compiled(call, mode):
    arrays = arrays_of(call)
    compiled = mx.compile(function_of(call))
    for result, expected in zip(compiled(*arrays), call.expected(), strict=True):
        if mode == "primitive" and call.op != "kv_cache_sdpa_update":
            assert_same_bits(numpy_of(result), expected)
        else:  # MLX's own operation, or a formula
            np.testing.assert_allclose(numpy_of(result), expected, atol=2e-5, rtol=2e-5)


def test_compiled_without_shapes():
    if not primitive_is_possible():
        pytest.skip("no C++ compiler or no nanobind")
    mm.build()
    traced = []

    def function(x):
        traced.append(x)
        return mm.rms_norm(x * 2, None, 1e-5)

    compiled = mx.compile(function, shapeless=True)
    for rows in (2, 5):
        x = np.random.default_rng(rows).standard_normal((rows, 16)).astype(np.float32)
        assert_same_bits(numpy_of(compiled(mx.array(x))), metalloid.rms_norm(x * 2, None, 1e-5))
    assert len(traced) == 1


@every_call
def test_gradients_are_the_slopes_of_the_formula_in_float64(call, mode):
    directions, cotangents = directions_and_cotangents(call)
    arrays = arrays_of(call)
    moving = [i for i, d in enumerate(directions) if d is not None]

    def loss(*some):
        whole = list(arrays)
        for i, array in zip(moving, some, strict=True):
            whole[i] = array
        return sum(
            (mx.where(mx.array(c != 0), r, 0) * mx.array(c.astype(np.float32))).sum()
            for c, r in zip(cotangents, function_of(call)(*whole), strict=True)
        )

    values = [arrays[i] for i in moving]
    gradients = mx.grad(lambda values: loss(*values))(values)
    products = [np.array(g, np.float64) * directions[i] for g, i in zip(gradients, moving, strict=True)]
    size = sum(np.abs(p).sum() for p in products)
    expected = slope(call, directions, cotangents)
    for gradient, i in zip(gradients, moving, strict=True):
        assert gradient.shape == arrays[i].shape
        assert mx.abs(gradient).max().item() > 0, "no gradient"
    assert abs(sum(p.sum() for p in products) - expected) <= 5e-5 * size

    # The same slope forwards.
    _, (forward,) = mx.jvp(loss, values, [mx.array(directions[i].astype(np.float32)) for i in moving])
    assert abs(forward.item() - expected) <= 5e-5 * size


@pytest.mark.parametrize("label", ["rms_norm", "layer_norm", "rope", "attention causal", "swiglu", "cross_entropy"])
def test_vmap(label, mode):
    call = by_label[label]
    function, arrays = function_of(call), arrays_of(call)
    first = mx.stack([arrays[0], arrays[0] * 0.5])
    got = mx.vmap(lambda x: function(x, *arrays[1:]))(first)
    for i in range(2):
        for result, expected in zip(got, function(first[i], *arrays[1:]), strict=True):
            np.testing.assert_allclose(numpy_of(result[i]), numpy_of(expected), atol=2e-5, rtol=2e-5)


def test_a_compiled_training_step(mode):
    """Loss, gradients and the update of a small block, with and without."""
    rng = np.random.default_rng(5)
    x, target = mx.array(rng.standard_normal((2, 6, 8)).astype(np.float32)), mx.array(rng.integers(0, 8, (2, 6)))
    weights = [mx.array(rng.standard_normal(shape).astype(np.float32) / 3) for shape in ((8,), (8, 8))]

    def loss(weights, fast):
        y = fast.rms_norm(x, weights[0], 1e-5) @ weights[1]
        heads = y.reshape(2, 6, 2, 4).transpose(0, 2, 1, 3)
        turned = fast.rope(heads, 4, traditional=False, base=1e4, scale=1.0, offset=0)
        out = fast.scaled_dot_product_attention(turned, turned, heads, scale=0.5, mask="causal")
        return fast.cross_entropy(out.transpose(0, 2, 1, 3).reshape(2, 6, 8), target).mean()

    def train(fast):
        step = mx.compile(mx.value_and_grad(lambda weights: loss(weights, fast)))
        w, values = list(weights), []
        for _ in range(3):
            value, gradients = step(w)
            w = [a - 0.1 * g for a, g in zip(w, gradients, strict=True)]
            values.append(value.item())
        return values

    own = train(mx.fast)
    np.testing.assert_allclose(train(mm), own, rtol=1e-5)
    assert own[2] < own[0]


# ---- MLX arrays in metalloid's own functions


def test_metalloid_fast_takes_mlx_arrays(mode):
    call = by_label["attention causal"]
    arrays = arrays_of(call)
    q, k, v = arrays
    assert_results(call, (metalloid.fast.scaled_dot_product_attention(*arrays, **call.keywords),))
    assert_results(call, (metalloid.scaled_dot_product_attention(q=q, k=k, v=v, **call.keywords, out=None),))
    gradient = mx.grad(lambda q: metalloid.fast.scaled_dot_product_attention(q, k, v, **call.keywords).sum())(q)
    own = mx.grad(lambda q: mx.fast.scaled_dot_product_attention(q, k, v, **call.keywords).sum())(q)
    np.testing.assert_allclose(np.array(gradient), np.array(own), atol=1e-5)


def test_an_mlx_array_does_not_change():
    x = mx.ones((2, 4))
    for given in (x, np.ones((2, 4), np.float32)):
        with pytest.raises(ValueError, match="out"):
            metalloid.rms_norm(given, None, 1e-5, out=x)
    assert (x == 1).all()


# ---- programs


def test_install_and_uninstall(mode):
    own = {name: getattr(mx.fast, name) for name in FAST}
    with mm.installed():
        for name in FAST:
            assert getattr(mx.fast, name) is not own[name]
        with mm.installed():
            pass
        assert mx.fast.rms_norm is not own["rms_norm"]  # the outer one holds
        x = np.random.default_rng(0).standard_normal((3, 7)).astype(np.float32)
        got = mx.fast.rms_norm(mx.array(x), None, 1e-5, stream=mx.cpu)
        assert_same_bits(numpy_of(got), metalloid.rms_norm(x, None, 1e-5))
        # What Metalloid refuses MLX takes, or refuses in its own words.
        with pytest.raises((ValueError, TypeError)):
            mx.fast.rms_norm(mx.array(x), mx.ones(6), 1e-5)
    assert {name: getattr(mx.fast, name) for name in FAST} == own
    with pytest.raises(ZeroDivisionError), mm.installed():
        raise ZeroDivisionError
    assert {name: getattr(mx.fast, name) for name in FAST} == own


def test_a_program_that_asks_for_metal_first():
    own = mx.gpu
    with mm.installed():
        assert mx.metal.is_available()
        assert mx.is_available(mx.gpu)
        assert mx.is_available(mx.cpu)
        assert mx.default_device() == mx.gpu
        assert mx.default_device() == mx.Device(mx.gpu)
        assert mx.default_device().type == mx.gpu
        assert mx.default_device() == mx.cpu
        assert str(mx.gpu) == "DeviceType.cpu", "no program is told that there is a GPU"
    assert mx.gpu is own
    assert not mx.metal.is_available()
    assert mx.default_device() != mx.gpu


def test_a_program_that_chooses_the_gpu(mode):
    """As it stands on a Mac, device by device and stream by stream; what runs, runs on the CPU."""
    x = mx.arange(4, dtype=mx.float32)
    with mm.installed():
        for where in (mx.gpu, mx.Device(mx.gpu), mx.default_stream(mx.gpu), mx.new_stream(mx.gpu)):
            assert mx.add(x, 1, stream=where).tolist() == [1, 2, 3, 4]
            assert mx.fast.rms_norm(x, None, 1e-5, stream=where).shape == (4,)
            assert mx.random.normal((2, 3), stream=where).shape == (2, 3)
            with mx.stream(where):
                assert (x + x).tolist() == [0, 2, 4, 6]
                assert mx.fast.rms_norm(x, None, 1e-5).shape == (4,)
        mx.set_default_device(mx.gpu)
        mx.set_default_stream(mx.default_stream(mx.gpu))
        assert (x + x).tolist() == [0, 2, 4, 6]
        assert mx.default_device() == mx.gpu
        mx.synchronize(mx.default_stream(mx.gpu))
        limit = mx.set_wired_limit(mx.device_info()["max_recommended_working_set_size"])
        mx.set_wired_limit(limit)
        assert mx.device_info()["memory_size"] > mx.device_info(mx.gpu)["max_recommended_working_set_size"] > 0
    with pytest.raises(ValueError, match="gpu"):
        mx.set_default_device(mx.gpu)


# ---- custom kernels

has_clang = pytest.mark.skipif(
    not (shutil.which("clang++") or shutil.which("clang")) and "METALLOID_CXX" not in os.environ, reason="no clang"
)


@pytest.fixture
def square(mode):
    """s * x * x by a kernel that mx.fast makes."""
    with mm.installed():
        kernel = mx.fast.metal_kernel(
            name="square",
            input_names=["x", "s"],
            output_names=["y"],
            source="uint i = thread_position_in_grid.x; y[i] = s * x[i] * x[i];",
        )

        def run(x, s=1.0, **more):
            how = {"grid": (x.size, 1, 1), "threadgroup": (64, 1, 1), "output_shapes": [x.shape], **more}
            return kernel(inputs=[x, s], output_dtypes=[x.dtype], **how)[0]

        yield run


@has_clang
def test_a_custom_kernel(square, capsys):
    x = mx.arange(6, dtype=mx.float32)
    for s in (2, 2.0, mx.array(2.0), mx.array(2), True):
        factor = 1 if s is True else 2
        assert square(x, s, stream=mx.gpu).tolist() == [factor * i * i for i in range(6)]
    assert square(x.reshape(2, 3).T).tolist() == [[0, 9], [1, 16], [4, 25]]
    y = square(x.reshape(2, 3))
    assert y.T.tolist() == [[0, 9], [1, 16], [4, 25]]
    assert (y.T + 1).reshape(6).tolist() == [1, 10, 2, 17, 5, 26]
    assert (y.T @ mx.ones((2, 1))).tolist() == [[9], [17], [29]]
    assert y[:, 1:].flatten().tolist() == [1, 4, 16, 25]
    assert square(x, output_shapes=[(8,)], init_value=7).tolist() == [0, 1, 4, 9, 16, 25, 7, 7]
    assert square(mx.array([1j, 2], mx.complex64)).tolist() == [-1, 4]
    mx.eval(square(x, verbose=True))
    assert "custom_kernel_square" in capsys.readouterr().out
    results = [square(x + i) for i in range(300)]
    assert results[-1].tolist() == [(i + 299) ** 2 for i in range(6)]


@has_clang
def test_template_arguments_that_are_equal_are_told_apart(mode):
    with mm.installed():
        kernel = mx.fast.metal_kernel(
            name="size", input_names=[], output_names=["y"], source="y[0] = sizeof(N) + y[0];"
        )
        how = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1), "output_shapes": [(1,)], "output_dtypes": [mx.float32]}
        for value, size in ((1, 4), (True, 1), (1, 4)):
            assert kernel(inputs=[], template=[("N", value)], init_value=0, **how)[0].item() == size
        source = "y[0] = 1 / y[0];"
        inverse = mx.fast.metal_kernel(name="inverse", input_names=[], output_names=["y"], source=source)
        assert [inverse(inputs=[], init_value=i, **how)[0].item() for i in (0.0, -0.0)] == [np.inf, -np.inf]


@has_clang
def test_a_custom_kernel_under_compile(square):
    x, calls = mx.arange(4, dtype=mx.float32), []
    compiled = mx.compile(lambda x, y=None: calls.append(0) or square(x + 1) * 2)
    for _ in range(3):
        assert compiled(x).tolist() == [2, 8, 18, 32]
    outer = mx.compile(lambda x: compiled(x) - 1)
    assert outer(x).tolist() == [1, 7, 17, 31]
    with pytest.raises(ZeroDivisionError):
        mx.compile(lambda x: square(x) / (1 // 0))(x)
    if mm.mode() == "evaluating":
        assert len(calls) > 3, "traced once, in vain"
        with pytest.raises((ValueError, RuntimeError)):
            mx.eval(mx.compile(square, inputs=[x])(x))
        return
    assert len(calls) <= 2, "once for each signature and tracing"
    state = [mx.ones(4)]

    def step(x):
        state[0] = square(state[0] + x)
        return state[0].sum()

    step = mx.compile(step, inputs=state, outputs=state)
    assert step(x).item() == 1 + 4 + 9 + 16
    assert step(x).item() == 1 + 25 + 121 + 361
    assert state[0].tolist() == [1, 25, 121, 361]


@has_clang
def test_a_custom_kernel_in_a_custom_function(square):
    """Where a Mac has them: gradients, also compiled and under vmap; a kernel alone has none, and says so."""
    x = mx.arange(4, dtype=mx.float32)

    @mx.custom_function
    def f(x):
        return square(x)

    @f.vjp
    def f_vjp(x, cotangent, _):
        return 2 * x * cotangent

    def gradient(x):
        return mx.grad(lambda x: (f(x) * 3).sum())(x)

    assert f(x).tolist() == [0, 1, 4, 9]
    assert gradient(x).tolist() == [0, 6, 12, 18]
    assert mx.value_and_grad(lambda x: f(x).sum())(x)[0].item() == 14
    assert mx.grad(lambda x: mx.checkpoint(f)(x).sum())(x).tolist() == [0, 2, 4, 6]
    if mm.mode() == "primitive":
        assert mx.compile(gradient)(x).tolist() == [0, 6, 12, 18]
        assert mx.vmap(gradient)(mx.stack([x, x])).tolist() == [[0, 6, 12, 18]] * 2
    for traced in (
        lambda: mx.grad(lambda x: square(x).sum())(x),
        lambda: mx.jvp(square, [x], [x]),
        lambda: mx.vmap(square)(mx.stack([x, x])),
    ):
        with pytest.raises(ValueError, match=r"custom kernel.*(mx\.custom_function|traced)"):
            mx.eval(traced())


@has_clang
def test_the_jvp_and_the_vmap_of_a_custom_function_around_a_kernel():
    if not primitive_is_possible():
        pytest.skip("no C++ compiler or no nanobind")
    mm.build()
    x = mx.arange(4, dtype=mx.float32)
    with mm.installed():
        kernel = mx.fast.metal_kernel(
            name="cube", input_names=["x"], output_names=["y"],
            source="uint i = thread_position_in_grid.x; y[i] = x[i] * x[i] * x[i];",
        )  # fmt: skip

        @mx.custom_function
        def f(x):
            how = {"grid": (x.size, 1, 1), "threadgroup": (64, 1, 1)}
            return kernel(inputs=[x], output_shapes=[x.shape], output_dtypes=[x.dtype], **how)[0]

        @f.jvp
        def f_jvp(x, tangent):
            return 3 * x * x * tangent

        @f.vmap
        def f_vmap(x, axis):
            return f(x), axis

        (y,), (dy,) = mx.jvp(f, [x], [mx.ones(4)])
        assert y.tolist() == [0, 1, 8, 27]
        assert dy.tolist() == [0, 3, 12, 27]
        both = mx.stack([x, x + 1])
        assert mx.vmap(f)(both).tolist() == [[0, 1, 8, 27], [1, 8, 27, 64]]
        assert mx.vmap(f, in_axes=1, out_axes=1)(both).tolist() == [[0, 1, 8, 27], [1, 8, 27, 64]]


@has_clang
def test_calls_of_a_large_graph_are_let_go_of():
    """The stream's thread, which has no GIL, is the last to hold them."""
    if not primitive_is_possible():
        pytest.skip("no C++ compiler or no nanobind")
    mm.build()
    native = metalloid._native.Kernel("add", ("x",), ("y",), "y[thread_position_in_grid.x] = x[0] + 1;")
    references = sys.getrefcount(native)

    def launch(x):
        described = (((4,), "float32"),)
        call, _ = native.prepare(described, described, (4, 1, 1), (4, 1, 1), (), None)
        return mm._primitive.launch(call, [x], [[4]], [mx.float32], stream=mx.cpu)[0]

    for _ in range(3):
        x = mx.zeros(4)
        for _ in range(100):
            x = launch(x)
        assert x.tolist() == [100] * 4
    x = launch(mx.zeros(4))
    mx.eval(x)
    mx.synchronize(mx.cpu)
    del x
    for _ in range(100):  # where Python looks for pending calls
        if sys.getrefcount(native) == references:
            break
        time.sleep(0.01)
    assert sys.getrefcount(native) == references


@has_clang
def test_a_custom_kernel_that_is_wrong(square):
    x = mx.ones(4)
    wrong = mx.fast.metal_kernel(name="wrong", input_names=["x"], output_names=["y"], source="\ny[0] = nowhere;")
    how = {"output_shapes": [(4,)], "output_dtypes": [mx.float32], "threadgroup": (4, 1, 1)}
    with pytest.raises(RuntimeError, match=r"(?s)wrong.*source:2.*nowhere"):
        mx.eval(wrong(inputs=[x], grid=(4, 1, 1), **how))
    for bad in (
        {"inputs": [x, x], "grid": (4, 1, 1)},
        {"inputs": [x], "grid": (0, 1, 1)},
        {"inputs": [x], "grid": (4, 1)},
        {"inputs": [x], "grid": (4096, 1, 1), "threadgroup": (2048, 1, 1)},
        {"inputs": [x], "grid": (4, 1, 1), "output_shapes": [(-1,)]},
        {"inputs": [x], "grid": (4, 1, 1), "template": [("T", float)]},
    ):
        with pytest.raises(ValueError, match="metal_kernel"):
            mx.eval(wrong(**{**how, **bad}))
    assert square(x).tolist() == [1] * 4
    barrier = "if (x[0] > 0 && thread_position_in_grid.x) threadgroup_barrier(mem_flags::mem_none); y[0] = 1;"
    stuck = mx.fast.metal_kernel(name="stuck", input_names=["x"], output_names=["y"], source=barrier)
    with pytest.raises(RuntimeError, match="barrier"):
        mx.eval(stuck(inputs=[x], grid=(4, 1, 1), **how))


@has_clang
@pytest.mark.parametrize(
    ("bad", "exception", "words"),
    [
        ({"output_shapes": [(2**31,)]}, ValueError, r"output_shapes\[0\]"),
        ({"stream": 7}, TypeError, "stream"),
        ({"output_dtypes": mx.float32}, TypeError, "output_dtypes must be a list"),
        ({"output_dtypes": [1.0]}, ValueError, "output_dtypes"),
        ({"inputs": [None]}, TypeError, r"inputs\[0\]"),
        ({"inputs": [np.array(["a"])]}, ValueError, r"inputs\[0\]"),
        ({"inputs": [2**63]}, ValueError, r"inputs\[0\] must fit"),
        ({"inputs": mx.ones((1, 4))}, TypeError, "inputs must be a list"),
        ({"template": [("N", 1.0)]}, ValueError, "template argument N must be"),
        ({"template": [("N", mx.array(1))]}, ValueError, "template argument N must be"),
        ({"template": [("N", np.float32(1))]}, ValueError, "template argument N must be"),
        ({"template": [1]}, TypeError, "template must consist of pairs"),
        ({"template": {"T": 1}}, TypeError, "template must be a list of pairs"),
        ({"template": [("x", 1)]}, ValueError, "template argument x has the name of an input"),
        ({"template": [("y", 1)]}, ValueError, "template argument y has the name of an output"),
        ({"template": [("N", 2**70)]}, ValueError, "template argument N must fit.*0x4000"),
    ],
)
def test_bad_arguments_of_a_custom_kernel_are_named(bad, exception, words, mode):
    how = {"inputs": [mx.ones(4)], "grid": (4, 1, 1), "threadgroup": (4, 1, 1)}
    how |= {"output_shapes": [(4,)], "output_dtypes": [mx.float32]}
    with mm.installed():
        kernel = mx.fast.metal_kernel(name="k", input_names=["x"], output_names=["y"], source="y[0] = 1;")
        with pytest.raises(exception, match="^metal_kernel: .*" + words):
            kernel(**{**how, **bad})


def values_after_failing(array):
    """None of them where MLX evaluates it again, in vain."""
    try:
        return array.tolist()
    except (ValueError, RuntimeError):
        return []


@has_clang
def test_nothing_comes_of_a_custom_kernel_that_fails(mode, capsys):
    """NumPy swallows what MLX raises when an array is evaluated, and asks again: the values show it."""
    barrier = "if (x[0] > 0 && thread_position_in_grid.x) threadgroup_barrier(mem_flags::mem_none); y[0] = 1;"
    how = {"inputs": [mx.ones(4)], "grid": (4, 1, 1), "threadgroup": (4, 1, 1), "output_shapes": [(4,), (0,)]}
    with mm.installed():
        names = {"input_names": ["x"], "output_names": ["y", "empty"]}
        wrong = mx.fast.metal_kernel(name="wrong", source="y[0] = nowhere;", **names)
        stuck = mx.fast.metal_kernel(name="stuck", source=barrier, **names)
        dtypes = (mx.float32, mx.float16, mx.bfloat16, mx.float64, mx.complex64, mx.int32, mx.uint8, mx.bool_)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="nowhere"):
                wrong(output_dtypes=[mx.float32] * 2, verbose=True, **how)
            assert "custom_kernel_wrong" in capsys.readouterr().out
        for dtype in dtypes:
            if mm.mode() == "evaluating":
                with pytest.raises(RuntimeError, match="barrier"):
                    stuck(output_dtypes=[dtype] * 2, **how)
                continue
            y, _ = stuck(output_dtypes=[dtype] * 2, **how)
            with pytest.raises(RuntimeError, match="barrier"):
                mx.eval(y)
            for value in values_after_failing(y):
                assert value != value if mx.issubdtype(dtype, mx.inexact) else value == 0


def test_nothing_comes_of_an_operation_that_fails():
    if not primitive_is_possible():
        pytest.skip("no C++ compiler or no nanobind")
    mm.build()
    losses = mm.cross_entropy(mx.ones((3, 4)), mx.array([0, 9, 1]))
    with pytest.raises((ValueError, RuntimeError), match="targets"):
        mx.eval(losses)
    assert np.isnan(values_after_failing(losses)).all()


@has_clang
def test_vectors_in_mlx_arrays(mode):
    """MLX's memory begins 8 bytes behind a multiple of 16; slices anywhere."""
    source = "uint i = thread_position_in_grid.x; ((device float4*)y)[i] = 2 * ((const device float4*)x)[i];"
    with mm.installed():
        kernel = mx.fast.metal_kernel(name="twice", input_names=["x"], output_names=["y"], source=source)
        whole = mx.random.normal((1029,))
        for first in range(5):
            x = whole[first : first + 1024]
            how = {"output_shapes": [x.shape], "output_dtypes": [x.dtype]}
            (y,) = kernel(inputs=[x], grid=(256, 1, 1), threadgroup=(64, 1, 1), **how)
            assert (y == 2 * x).all()


# ---- the primitive's file


@pytest.mark.skipif(not primitive_is_possible(), reason="no C++ compiler or no nanobind")
def test_the_primitive_is_compiled_once_and_found_again(tmp_path):
    program = (
        "import metalloid.mlx as m, mlx.core as mx, sys, time;"
        "before = m.mode(); m.install(primitive=True);"
        "y = mx.fast.rms_norm(mx.array([2.0, 2.0]), None, 0.0).tolist();"
        "print(before, m.mode(), y, m.build())"
    )
    environment = {**os.environ, "METALLOID_CACHE": str(tmp_path / "metalloid")}
    runs = [
        subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert [run.stderr for run in runs] == ["", ""]
    assert runs[0].stdout.startswith("evaluating primitive [1.0, 1.0]")
    assert runs[1].stdout.startswith("primitive primitive [1.0, 1.0]")
    (file,) = (tmp_path / "metalloid").iterdir()
    assert (tmp_path / "metalloid").stat().st_mode & 0o077 == 0

    file.write_bytes(b"no library")
    environment["CXX"] = "false"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert "RuntimeError: the primitive does not" in done.stderr


def test_without_a_compiler_calls_evaluate(tmp_path):
    program = (
        "import metalloid.mlx as m, mlx.core as mx; m.install();"
        "print(m.mode(), mx.fast.rms_norm(mx.array([2.0, 2.0]), None, 0.0).tolist())"
    )
    environment = {**os.environ, "METALLOID_CACHE": str(tmp_path / "metalloid"), "PATH": str(tmp_path)}
    environment.pop("CXX", None)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "evaluating [1.0, 1.0]\n"
    assert done.stderr == ""


@pytest.mark.parametrize("place", ["relative", "/dev/null/cache"])
def test_no_place_for_a_cache(place):
    program = "import metalloid.mlx as m; m.install(); print(m.mode()); m.install(primitive=True)"
    environment = {**os.environ, "METALLOID_CACHE": place}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "evaluating\n"
    assert "METALLOID_CACHE" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_masked_arrays_are_refused(call):
    for masked in call.masked(mx.array):
        args, keywords = call.with_arrays(masked)
        with pytest.raises(TypeError, match=rf"^{call.op}: \w+ is a masked array"):
            getattr(mm, call.op)(*args, **keywords)


def test_a_cache_that_others_can_write_is_not_used(tmp_path):
    (tmp_path / "metalloid").mkdir(mode=0o777)
    (tmp_path / "metalloid").chmod(0o777)
    program = "import metalloid.mlx as m; m.install(primitive=True)"
    environment = {**os.environ, "METALLOID_CACHE": str(tmp_path / "metalloid")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert "can be written by others" in done.stderr


# ---- bad input


x = np.ones((2, 8), np.float32)
q4 = np.ones((1, 2, 3, 8), np.float32)
rope_keywords = {"traditional": False, "base": 1e4, "scale": 1.0, "offset": 0}


@pytest.mark.parametrize(
    ("op", "args", "keywords", "argument", "exception"),
    [
        ("rms_norm", (x, np.ones(7, np.float32), 1e-5), {}, "weight", ValueError),
        ("rms_norm", (x, None, -1.0), {}, "eps", ValueError),
        ("rms_norm", (x.astype(np.complex64), None, 1e-5), {}, "x", ValueError),
        ("rms_norm", (x.astype(np.int32), None, 1e-5), {}, "x", ValueError),
        ("rms_norm", ([1.0, 2.0], None, 1e-5), {}, "x", TypeError),
        ("rms_norm", (None, None, 1e-5), {}, "x", TypeError),
        ("rope", (q4, 7), rope_keywords, "dims", ValueError),
        ("rope", (q4, 8), {**rope_keywords, "offset": np.ones(3, np.int32)}, "offsets", ValueError),
        ("rope", (q4, 8), {**rope_keywords, "base": None}, "base", ValueError),
        ("geglu", (x, x), {"approximate": "erf"}, "approximate", ValueError),
        ("scaled_dot_product_attention", (q4, q4[:, :, :, :4], q4), {"scale": 1.0}, "k", ValueError),
        ("scaled_dot_product_attention", (q4, q4, q4), {"scale": 1.0, "mask": "full"}, "mask", ValueError),
        ("kv_cache_sdpa_update", (q4, q4, q4, q4, q4, 1, None, 1.0), {}, "offset", ValueError),
        ("kv_cache_sdpa_update", (q4, q4, q4, q4, q4, np.array([1]), None, 1.0), {}, "offset", ValueError),
        ("kv_cache_sdpa_update", (q4, q4, q4, q4, q4, np.array([0.5]), None, 1.0), {}, "offset", ValueError),
        ("kv_cache_sdpa_update", (q4, q4, q4, "cache", q4, 0, None, 1.0), {}, "k_cache", TypeError),
        ("cross_entropy", (x, np.zeros(2, np.float32)), {}, "targets", ValueError),
        ("gated_delta_update", (q4, q4, q4, x, x), {}, "gamma", ValueError),
    ],
)
def test_bad_input_is_an_exception_at_once(op, args, keywords, argument, exception, mode):
    def convert(a):
        return mx.array(a) if isinstance(a, np.ndarray) else a

    for given in (lambda a: a, convert):
        with pytest.raises(exception, match=rf"^{op}: .*\b{argument}\b"):
            getattr(mm, op)(*map(given, args), **{name: given(a) for name, a in keywords.items()})


def test_nothing_leaks(mode):
    resource = pytest.importorskip("resource")
    x, weight, bad = mx.ones((4, 64)), mx.ones(64), mx.ones(63)
    references = sys.getrefcount(x), sys.getrefcount(weight)

    def rounds(count):
        for i in range(count):
            y = metalloid.rms_norm(x, weight, 1e-5)
            mx.eval(y)
            if i % 20 == 0:
                mx.grad(lambda x: mm.rms_norm(x, weight, 1e-5).sum())(x)
                with pytest.raises(ValueError, match="weight"):
                    mm.rms_norm(x, bad, 1e-5)

    rounds(500)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rounds(10_000)
    gc.collect()
    assert (sys.getrefcount(x), sys.getrefcount(weight)) == references
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB: 10,000 results are 10,000


# ---- signatures, examples


@pytest.mark.parametrize("name", FAST)
def test_parameters_are_those_of_mlx_with_extras_behind(name):
    ours = inspect.signature(getattr(mm, name)).parameters
    line = next(line for line in getattr(mx.fast, name).__doc__.splitlines() if line.startswith(f"{name}("))
    for parameter in ours:
        if parameter in line:
            continue
        assert ours[parameter].kind is inspect.Parameter.KEYWORD_ONLY
        assert ours[parameter].default is not inspect.Parameter.empty


@pytest.mark.parametrize("name", ["metalloid.mlx", *mm.__all__])
def test_examples(name):
    target = mm if name == "metalloid.mlx" else getattr(mm, name)
    example = doctest.DocTestParser().get_doctest(inspect.getdoc(target) or "", dict(vars(mm)), name, None, 0)
    assert example.examples or name in ("build", "uninstall", "kv_cache_sdpa_update")
    runner = doctest.DocTestRunner()
    runner.run(example)
    assert runner.summarize().failed == 0
