"""metalloid.jax: the kernels' own bits under jit and vmap, gradients against differences in float64, shard_map."""

import doctest
import gc
import subprocess
import sys
import sysconfig
from pathlib import Path

import metalloid
import ml_dtypes
import numpy as np
import pytest
from arrays import assert_same_bits
from operation_calls import CALLS, Call, directions_and_cotangents, slope

jax = pytest.importorskip("jax")
jnp = jax.numpy

import metalloid.jax as mj  # noqa: E402

by_label = {call.label: call for call in CALLS}
every_call = pytest.mark.parametrize("call", CALLS, ids=str)


def results_of(value):
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def function_of(call: Call):
    """The call as a function of its arrays alone, which gives a tuple."""

    def function(*arrays):
        args, keywords = call.with_arrays(arrays)
        return results_of(getattr(mj, call.op)(*args, **keywords))

    return function


def arrays_of(call: Call):
    return [jnp.asarray(a) for _, a in call.arrays()]


# ---- values


@every_call
def test_results_have_the_bits_of_the_same_call_on_numpy_arrays(call):
    function, arrays = function_of(call), arrays_of(call)
    for run in (function, jax.jit(function)):
        for result, expected in zip(run(*arrays), call.expected(), strict=True):
            assert isinstance(result, jax.Array)
            assert_same_bits(np.asarray(result), expected)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize(
    "label", ["rms_norm", "rope", "attention causal", "swiglu", "cross_entropy", "gated_delta_update"]
)
def test_16_bit_dtypes(label, dtype):
    call = by_label[label].cast(dtype)
    for result, expected in zip(jax.jit(function_of(call))(*arrays_of(call)), call.expected(), strict=True):
        assert_same_bits(np.asarray(result), expected)


def test_float64_where_jax_has_it():
    with jax.enable_x64(True):
        call = by_label["attention with everything, logsumexp"].cast(np.float64)
        for result, expected in zip(jax.jit(function_of(call))(*arrays_of(call)), call.expected(), strict=True):
            assert_same_bits(np.asarray(result), expected)


@pytest.mark.parametrize("op", ["rms_norm", "swiglu"])
def test_mixed_dtypes_promote(op):
    x, y = np.ones(8, np.float16), np.ones(8, ml_dtypes.bfloat16)
    args = (x, y, 1e-5) if op == "rms_norm" else (x, y)
    result = getattr(mj, op)(*(jnp.asarray(a) if isinstance(a, np.ndarray) else a for a in args))
    assert result.dtype == jnp.float32
    assert_same_bits(np.asarray(result), getattr(metalloid, op)(*args))


def test_empty_arrays():
    assert mj.rms_norm(jnp.zeros((0, 4)), None, 1e-5).shape == (0, 4)
    out = mj.scaled_dot_product_attention(
        jnp.ones((1, 1, 2, 4)), jnp.ones((1, 1, 0, 4)), jnp.ones((1, 1, 0, 3)), scale=1
    )
    assert_same_bits(np.asarray(out), np.zeros((1, 1, 2, 3), np.float32))


def test_kv_cache_offset_may_be_traced():
    call = by_label["kv_cache_sdpa_update"]
    arrays = arrays_of(call)
    step = jax.jit(lambda offset, *a: mj.kv_cache_sdpa_update(*a[:5], offset, a[5], call.args[-1]))
    for result, expected in zip(step(4, *arrays), call.expected(), strict=True):
        assert_same_bits(np.asarray(result), expected)


def test_a_donated_cache_keeps_its_memory():
    call = by_label["kv_cache_sdpa_update"]
    q, new_k, new_v, k_cache, v_cache, mask = arrays_of(call)
    step = jax.jit(
        lambda k_cache, v_cache: mj.kv_cache_sdpa_update(q, new_k, new_v, k_cache, v_cache, 4, mask, 1.0),
        donate_argnums=(0, 1),
    )
    k_cache, v_cache = k_cache + 0, v_cache + 0  # memory of JAX's own
    before = k_cache.unsafe_buffer_pointer(), v_cache.unsafe_buffer_pointer()
    _, k_after, v_after = step(k_cache, v_cache)
    assert (k_after.unsafe_buffer_pointer(), v_after.unsafe_buffer_pointer()) == before
    assert k_cache.is_deleted()


# ---- vmap


@every_call
def test_vmap_is_the_call_on_each(call):
    function, arrays = function_of(call), arrays_of(call)
    # Arrays that are no batch of the operation's own are batched too: the norms' weights, freqs, sinks.
    stacked = [jnp.stack([a, a[::-1] if a.ndim and call.op != "kv_cache_sdpa_update" else a]) for a in arrays]
    got = jax.vmap(function)(*stacked)
    for i in range(2):
        for result, expected in zip(got, function(*[a[i] for a in stacked]), strict=True):
            assert_same_bits(np.asarray(result[i]), np.asarray(expected))


def batched_alone(call, index, arrays):
    axes = [0 if i == index else None for i in range(len(arrays))]
    stacked = [
        jnp.stack([a, a * 0.5 if a.dtype == jnp.float32 else a]) if i == index else a for i, a in enumerate(arrays)
    ]
    return axes, stacked


@every_call
def test_vmap_over_one_array_alone(call):
    function, arrays = function_of(call), arrays_of(call)
    for index in range(len(arrays)):
        axes, stacked = batched_alone(call, index, arrays)
        got = jax.vmap(function, in_axes=axes)(*stacked)
        for i in range(2):
            one = [a[i] if axis == 0 else a for axis, a in zip(axes, stacked, strict=True)]
            for result, expected in zip(got, function(*one), strict=True):
                assert_same_bits(np.asarray(result[i]), np.asarray(expected))


@pytest.mark.parametrize("label", ["rms_norm", "rope", "attention causal", "attention bool mask", "cross_entropy"])
def test_vmap_makes_one_call_where_the_operation_has_leading_axes(label):
    call = by_label[label]
    arrays = arrays_of(call)
    axes, stacked = batched_alone(call, 0, arrays)
    text = jax.jit(jax.vmap(function_of(call), in_axes=axes)).lower(*stacked).as_text()
    assert text.count("stablehlo.custom_call @metalloid_") == 1
    assert "stablehlo.while" not in text


def test_vmap_of_vmap():
    x = jnp.arange(48.0).reshape(2, 3, 2, 4)
    got = jax.vmap(jax.vmap(lambda x: mj.rms_norm(x, None, 1e-5)))(x)
    assert_same_bits(np.asarray(got), np.asarray(mj.rms_norm(x, None, 1e-5)))


# ---- grad


@every_call
def test_gradients_are_the_slopes_of_the_formula_in_float64(call):
    directions, cotangents = directions_and_cotangents(call)
    arrays = arrays_of(call)
    moving = [i for i, d in enumerate(directions) if d is not None]

    def loss(*some):
        whole = list(arrays)
        for i, array in zip(moving, some, strict=True):
            whole[i] = array
        # where, so that the -inf of a logsumexp counts for nothing
        return sum(
            jnp.where(c != 0, r, 0).astype(jnp.float32).ravel() @ jnp.asarray(c, jnp.float32).ravel()
            for c, r in zip(cotangents, function_of(call)(*whole), strict=True)
        )

    gradients = jax.jit(jax.grad(loss, argnums=tuple(range(len(moving)))))(*[arrays[i] for i in moving])
    got = sum(float(np.sum(np.asarray(g, np.float64) * directions[i])) for g, i in zip(gradients, moving, strict=True))
    size = sum(float(np.sum(np.abs(np.asarray(g) * directions[i]))) for g, i in zip(gradients, moving, strict=True))
    for g, i in zip(gradients, moving, strict=True):
        assert g.shape == arrays[i].shape
        assert g.dtype == arrays[i].dtype
        assert np.abs(np.asarray(g)).max() > 0, "no gradient"
    assert abs(got - slope(call, directions, cotangents)) <= 2e-5 * size


def test_the_gradient_of_rope_is_as_exact_at_large_positions():
    x = jnp.ones((1, 1, 1, 64))
    back = jax.grad(lambda x: mj.rope(x, 64, traditional=False, base=1e4, scale=1.0, offset=1_000_000).sum())(x)
    expected = metalloid.rope(np.ones((1, 1, 1, 64)), 64, traditional=False, base=1e4, scale=-1.0, offset=1_000_000)
    np.testing.assert_allclose(np.asarray(back), expected, atol=4e-6)


def test_grad_of_vmap_and_vmap_of_grad():
    call = by_label["attention bool mask"]
    q, k, v, mask = arrays_of(call)
    qs = jnp.stack([q, 2 * q, 3 * q])

    def loss(q):
        return (mj.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask) ** 2).sum()

    one = jnp.stack([jax.grad(loss)(q) for q in qs])
    np.testing.assert_allclose(jax.vmap(jax.grad(loss))(qs), one, atol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda qs: jax.vmap(loss)(qs).sum())(qs), one, atol=1e-6)


def test_keys_that_nobody_sees_may_be_nan_in_gradients_too():
    q, k, v = (jnp.ones((1, 1, 3, 4)) for _ in range(3))
    k, v = k.at[:, :, 2].set(jnp.nan), v.at[:, :, 2].set(jnp.nan)
    seen = jnp.array([[True, True, False]])
    gradients = jax.grad(
        lambda q, k, v: mj.scaled_dot_product_attention(q, k, v, scale=1.0, key_mask=seen).sum(), argnums=(0, 1, 2)
    )(q, k, v)
    for gradient in gradients:
        assert np.isfinite(gradient).all()


# ---- several devices


def test_shard_map_on_four_devices():
    from jax.sharding import Mesh
    from jax.sharding import PartitionSpec as P

    assert jax.device_count() == 4, "XLA_FLAGS came too late"
    mesh = Mesh(np.array(jax.devices()), ("i",))
    x, weight = jnp.arange(64.0).reshape(8, 8), jnp.arange(8.0)
    q, k, v = (jnp.asarray(np.random.default_rng(3).standard_normal((1, 8, 5, 16)), jnp.float32) for _ in range(3))

    norm = jax.shard_map(lambda x, w: mj.rms_norm(x, w, 1e-5), mesh=mesh, in_specs=(P("i"), P()), out_specs=P("i"))
    assert_same_bits(np.asarray(jax.jit(norm)(x, weight)), np.asarray(mj.rms_norm(x, weight, 1e-5)))

    heads = P(None, "i")
    attention = jax.shard_map(
        lambda q, k, v: mj.scaled_dot_product_attention(q, k, v, scale=0.25, mask="causal"),
        mesh=mesh,
        in_specs=(heads, heads, heads),
        out_specs=heads,
    )
    whole = mj.scaled_dot_product_attention(q, k, v, scale=0.25, mask="causal")
    assert_same_bits(np.asarray(jax.jit(attention)(q, k, v)), np.asarray(whole))

    def loss(function):
        return lambda x, w: (function(x, w) ** 3).sum()

    got = jax.jit(jax.grad(loss(norm), argnums=(0, 1)))(x, weight)
    expected = jax.grad(loss(lambda x, w: mj.rms_norm(x, w, 1e-5)), argnums=(0, 1))(x, weight)
    for g, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-5)


# ---- JAX arrays in metalloid's own functions


def test_metalloid_fast_takes_jax_arrays_and_tracers():
    call = by_label["attention causal"]
    arrays = arrays_of(call)

    def function(*arrays):
        args, keywords = call.with_arrays(arrays)
        return metalloid.fast.scaled_dot_product_attention(*args, **keywords)

    for result in (function(*arrays), jax.jit(function)(*arrays)):
        assert isinstance(result, jax.Array)
        assert_same_bits(np.asarray(result), call.expected()[0])
    through = jax.grad(lambda q: function(q, *arrays[1:]).sum())(arrays[0])
    direct = jax.grad(lambda q: function_of(call)(q, *arrays[1:])[0].sum())(arrays[0])
    assert_same_bits(np.asarray(through), np.asarray(direct))


def test_a_jax_array_does_not_change():
    x = jnp.ones((2, 4))
    for given in (x, np.ones((2, 4), np.float32)):
        with pytest.raises(ValueError, match="out"):
            metalloid.rms_norm(given, None, 1e-5, out=x)
    assert (x == 1).all()


# ---- bad input


x = np.ones((2, 8), np.float32)
q4 = np.ones((1, 2, 3, 8), np.float32)
rope_keywords = {"traditional": False, "base": 1e4, "scale": 1.0, "offset": 0}


@pytest.mark.parametrize(
    ("op", "args", "keywords", "argument", "exception"),
    [
        ("rms_norm", (x, np.ones(7, np.float32), 1e-5), {}, "weight", ValueError),
        ("rms_norm", (x, None, -1.0), {}, "eps", ValueError),
        ("rms_norm", (x, None, float("nan")), {}, "eps", ValueError),
        ("rms_norm", (x, None, "small"), {}, "eps", TypeError),
        ("rms_norm", (x.astype(np.complex64), None, 1e-5), {}, "x", ValueError),
        ("rms_norm", (x.astype(ml_dtypes.float8_e4m3fn), None, 1e-5), {}, "x", ValueError),
        ("rms_norm", (x.astype(np.int32), None, 1e-5), {}, "x", ValueError),
        ("rms_norm", ([1.0, 2.0], None, 1e-5), {}, "x", TypeError),
        ("rms_norm", (None, None, 1e-5), {}, "x", TypeError),
        ("rms_norm", (np.float32(1), None, 1e-5), {}, "x", TypeError),
        ("layer_norm", (x, None, np.ones((1, 8), np.float32), 1e-5), {}, "bias", ValueError),
        ("add_rms_norm", (x, x[:1], None, 1e-5), {}, "residual", ValueError),
        ("rope", (q4, 7), rope_keywords, "dims", ValueError),
        ("rope", (q4, 8.0), rope_keywords, "dims", TypeError),
        ("rope", (q4, 8), {**rope_keywords, "base": None}, "base", ValueError),
        ("rope", (q4, 8), {**rope_keywords, "offset": np.ones(1, np.float32)}, "offsets", ValueError),
        ("rope", (q4, 8), {**rope_keywords, "offset": np.ones(3, np.int32)}, "offsets", ValueError),
        ("rope", (q4, 8), {**rope_keywords, "traditional": 1}, "traditional", TypeError),
        ("rope", (q4, 8), {**rope_keywords, "time_axis": 0}, "time_axis", ValueError),
        ("rope", (x, 8), rope_keywords, "x", ValueError),
        ("swiglu", (x, x[:, :4]), {}, "up", ValueError),
        ("geglu", (x, x), {"approximate": "erf"}, "approximate", ValueError),
        ("geglu", (x, x), {"approximate": 1}, "approximate", TypeError),
        ("scaled_dot_product_attention", (q4, q4[:, :, :, :4], q4), {"scale": 1.0}, "k", ValueError),
        ("scaled_dot_product_attention", (x, x, x), {"scale": 1.0}, "q", ValueError),
        ("scaled_dot_product_attention", (q4, q4, q4), {"scale": 1.0, "mask": "full"}, "mask", ValueError),
        (
            "scaled_dot_product_attention",
            (q4, q4, q4),
            {"scale": 1.0, "mask": np.ones((2, 2), bool)},
            "mask",
            ValueError,
        ),
        ("scaled_dot_product_attention", (q4, q4, q4), {"scale": 1.0, "window": 0}, "window", ValueError),
        ("scaled_dot_product_attention", (q4, q4, q4), {"scale": 1.0, "softcap": 0}, "softcap", ValueError),
        ("scaled_dot_product_attention", (q4, q4, q4), {"scale": float("inf")}, "scale", ValueError),
        ("kv_cache_sdpa_update", (q4, q4, q4, q4, q4, 1, None, 1.0), {}, "offset", ValueError),
        ("kv_cache_sdpa_update", (q4, q4, q4, q4[:, :1], q4, 0, None, 1.0), {}, "v_cache", ValueError),
        ("cross_entropy", (x, np.zeros(2, np.float32)), {}, "targets", ValueError),
        ("cross_entropy", (x, np.zeros(3, np.int32)), {}, "targets", ValueError),
        ("gated_delta_update", (q4, q4, q4, x, x), {}, "gamma", ValueError),
    ],
)
def test_bad_input_is_an_exception_while_tracing(op, args, keywords, argument, exception):
    def call(convert):
        return getattr(mj, op)(*map(convert, args), **{name: convert(a) for name, a in keywords.items()})

    def to_jax(a):
        return jnp.asarray(a) if isinstance(a, np.ndarray) else a

    for convert in (lambda a: a, to_jax):
        for run in (call, jax.jit(call, static_argnums=0)):
            with pytest.raises(exception, match=rf"^{op}: .*\b{argument}\b"):
                run(convert)


@every_call
def test_masked_arrays_are_refused(call):
    for masked in call.masked(jnp.asarray):
        args, keywords = call.with_arrays(masked)
        with pytest.raises(TypeError, match=rf"^{call.op}: \w+ is a masked array"):
            getattr(mj, call.op)(*args, **keywords)


def test_deleted_and_donated_arrays_are_refused_by_name():
    x, weight = jnp.ones((2, 8)), jnp.ones(8)
    weight.delete()
    for module in (mj, metalloid):
        with pytest.raises(ValueError, match=r"^rms_norm: weight has been deleted or donated"):
            module.rms_norm(x, weight, 1e-5)
    donated = jnp.ones((2, 8))
    jax.jit(lambda a: a + 1, donate_argnums=0)(donated)
    with pytest.raises(ValueError, match=r"^rms_norm: x has been deleted or donated"):
        mj.rms_norm(donated, None, 1e-5)
    with pytest.raises(ValueError, match=r"^rms_norm: the memory of weight cannot be shared"):
        metalloid.rms_norm(np.ones((2, 8), np.float32), weight, 1e-5)


def test_a_custom_kernel_takes_no_tracer_and_no_deleted_array():
    kernel = metalloid.metal_kernel("never", ["x"], ["y"], "this would not compile")

    def call(x):
        (y,) = kernel(
            inputs=[x], output_shapes=[(4,)], output_dtypes=["float32"], grid=(4, 1, 1), threadgroup=(4, 1, 1)
        )
        return y

    x, deleted = jnp.ones(4), jnp.ones(4)
    deleted.delete()
    for run in (jax.jit(call), jax.grad(lambda x: call(x).sum()), lambda x: jax.vmap(call)(x[None])):
        with pytest.raises(ValueError, match=r"metal_kernel: the memory of inputs\[0\] \(\w+Tracer\) cannot be shared"):
            run(x)
    with pytest.raises(ValueError, match=r"metal_kernel: the memory of inputs\[0\] \(ArrayImpl\) cannot be shared"):
        call(deleted)


def test_what_only_values_show_is_an_exception_when_it_runs():
    with pytest.raises(jax.errors.JaxRuntimeError, match="targets must lie in"):
        mj.cross_entropy(jnp.ones((2, 4)), jnp.array([1, 4])).block_until_ready()
    cache = jnp.ones((1, 4, 2, 8))
    step = jax.jit(lambda at: mj.kv_cache_sdpa_update(*[cache[:, :1]] * 3, cache, cache, at, None, 1.0))
    with pytest.raises(jax.errors.JaxRuntimeError, match="offset must lie in"):
        step(4)[0].block_until_ready()


def test_the_handler_refuses_what_it_was_not_made_for():
    def call(*arrays, **attributes):
        return jax.ffi.ffi_call("metalloid_rms_norm", jax.ShapeDtypeStruct((2,), jnp.float32))(*arrays, **attributes)

    x = jnp.ones(2)
    one, three, eps = np.int64(1), np.int64(3), np.float64(1e-5)
    assert call(x, given=one, eps=eps).shape == (2,)
    for arrays, attributes in [
        ((x,), {}),
        ((x,), {"given": one}),
        ((x,), {"given": one, "eps": np.float32(1)}),
        ((x,), {"given": np.int32(1), "eps": np.float64(2e-5)}),
        ((x,), {"given": three, "eps": eps}),
        ((x, x), {"given": one, "eps": eps}),
        ((x,) * 9, {"given": one, "eps": eps}),
        ((x.astype(jnp.complex64),), {"given": one, "eps": eps}),
        ((), {"given": np.int64(0), "eps": eps}),
        ((x,), {"given": np.int64(1 << 40), "eps": eps}),
    ]:
        with pytest.raises(jax.errors.JaxRuntimeError):
            jax.block_until_ready(call(*arrays, **attributes))


def test_nothing_leaks():
    resource = pytest.importorskip("resource")
    x, bad = jnp.ones((4, 64)), jnp.ones(63)
    weight = jnp.ones(64)
    references = sys.getrefcount(x), sys.getrefcount(weight)

    def rounds(count):
        for _ in range(count):
            mj.rms_norm(x, weight, 1e-5)
            metalloid.rms_norm(x, weight, 1e-5)
        for _ in range(count // 20):
            with pytest.raises(ValueError, match="weight"):
                mj.rms_norm(x, bad, 1e-5)

    rounds(500)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rounds(10_000)
    gc.collect()
    assert (sys.getrefcount(x), sys.getrefcount(weight)) == references
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB: 10,000 results are 10,000


# ---- the ABI, and the examples


def test_the_declared_abi_is_that_of_the_installed_header(tmp_path):
    here = Path(__file__).parent
    root = here.parents[1]
    source = tmp_path / "abi.c"
    source.write_text((here / "xla_abi.c").read_text())
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    subprocess.run(
        [
            compiler,
            "-std=c11",
            "-fsyntax-only",
            f"-I{jax.ffi.include_dir()}",
            f"-I{root / 'bindings/python/src'}",
            source,
        ],
        check=True,
    )


@pytest.mark.parametrize("name", ["metalloid.jax", *mj.__all__])
def test_examples(name):
    target = mj if name == "metalloid.jax" else getattr(mj, name)
    example = doctest.DocTestParser().get_doctest(target.__doc__, dict(vars(mj)), name, None, 0)
    assert example.examples
    runner = doctest.DocTestRunner()
    runner.run(example)
    assert runner.summarize().failed == 0
