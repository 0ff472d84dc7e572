"""The Python package on CUDA arrays: in, out, on the current stream. Skipped where the package is not built."""

import importlib.util

import numpy as np
import pytest
import torch

native = pytest.importorskip("metalloid._native", reason="the Python package is not built")


def expected(x, weight):
    x = x.astype(np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight


def test_torch():
    x, weight = torch.randn(64, 4096, device="cuda"), torch.randn(4096, device="cuda")
    native.rms_norm(x, weight, 1e-5)  # the first call loads the kernel, and that waits
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        y = native.rms_norm(x, weight, 1e-5)
    assert not stream.query()  # queued, and nothing waited
    stream.synchronize()
    assert isinstance(y, torch.Tensor)
    assert y.is_cuda
    np.testing.assert_allclose(y.cpu(), expected(x.cpu().numpy(), weight.cpu().numpy()), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not importlib.util.find_spec("cupy"), reason="CuPy is not installed")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_cupy(dtype):
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        x = cupy.random.standard_normal((64, 4096), dtype="float32").astype(dtype)
        weight = cupy.ones(4096, dtype)
        y = native.rms_norm(x, weight, 1e-5)
        out = cupy.empty_like(x)
        assert native.rms_norm(x, weight, 1e-5, out=out) is out
    stream.synchronize()
    assert isinstance(y, cupy.ndarray)
    assert y.dtype == dtype
    bound = 1e-5 if dtype == "float32" else 2e-3
    np.testing.assert_allclose(y.get(), expected(x.get(), 1), rtol=bound, atol=bound)
    assert (out == y).all()


@pytest.mark.skipif(not importlib.util.find_spec("jax"), reason="JAX is not installed")
def test_jax_arrays_go_in_and_come_out():
    import jax.numpy as jnp

    x, weight = jnp.linspace(-1, 1, 64 * 4096).reshape(64, 4096), jnp.ones(4096)
    if next(iter(x.devices())).platform != "gpu":
        pytest.skip("JAX has no GPU")
    y = native.rms_norm(x, weight, 1e-5)
    assert isinstance(y, type(x))
    assert y.devices() == x.devices()
    np.testing.assert_allclose(np.asarray(y), expected(np.asarray(x), 1), rtol=1e-5, atol=1e-5)
