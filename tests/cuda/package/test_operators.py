"""metalloid.torch and metalloid.jax on a GPU: each operator beside its result on the CPU, compiled, differentiated."""

import importlib.util
import os
import pathlib
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("metalloid._native", reason="the Python package is not built")
if not torch.cuda.is_available():
    pytest.skip("PyTorch sees no GPU", allow_module_level=True)
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "python"))
import metalloid.torch as mt
from operation_calls import CALLS

every_call = pytest.mark.parametrize("call", CALLS, ids=str)
BOUND = {"rtol": 2e-5, "atol": 2e-5}


def results_of(call, results, arguments):
    if call.op == "kv_cache_sdpa_update":
        return results if isinstance(results, tuple) else (results, arguments[3], arguments[4])
    return tuple(results) if isinstance(results, (tuple, list)) else (results,)


# ---- PyTorch


@every_call
def test_torch_operator_agrees_with_the_cpu(call):
    arguments, keywords = call.with_arrays([torch.from_numpy(a.copy()).cuda() for _, a in call.arrays()])
    results = results_of(call, getattr(mt, call.op)(*arguments, **keywords), arguments)
    for result, expected in zip(results, call.expected(), strict=True):
        assert result.is_cuda
        np.testing.assert_allclose(result.cpu().numpy(), expected, **BOUND)


def layer(x, weight, gate, up):
    """A bit of a model: norm, rotation, attention, gate."""
    normed = mt.rms_norm(x, weight, 1e-5)
    turned = mt.rope(normed, 64, traditional=False, base=10000.0, scale=1.0, offset=0)
    seen = mt.scaled_dot_product_attention(turned, turned, normed, scale=0.125, mask="causal")
    return mt.swiglu(seen @ gate, seen @ up)


def layer_arguments(device):
    generator = torch.Generator().manual_seed(3)
    shapes = (2, 4, 32, 64), (64,), (64, 96), (64, 96)
    made = [(torch.randn(shape, generator=generator) / shape[0] ** 0.5).to(device) for shape in shapes]
    return [tensor.requires_grad_() for tensor in made]


@pytest.mark.parametrize("compiled", [False, True])
def test_torch_gradients_agree_with_the_cpu(compiled):
    function = torch.compile(layer, fullgraph=True) if compiled else layer
    outcomes = []
    for device, run in (("cpu", layer), ("cuda", function)):
        arguments = layer_arguments(device)
        result = run(*arguments)
        assert result.device.type == device
        (result * result).mean().backward()
        outcomes.append([result.detach().cpu(), *(a.grad.cpu() for a in arguments)])
    for on_cpu, on_gpu in zip(*outcomes, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-4)


def test_torch_operators_run_on_the_current_stream():
    x, weight = torch.randn(64, 4096, device="cuda"), torch.ones(4096, device="cuda")
    mt.rms_norm(x, weight, 1e-5)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        y = mt.rms_norm(x, weight, 1e-5)
    assert not stream.query()
    stream.synchronize()
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (4096,), weight, 1e-5))


# ---- JAX

needs_jax = pytest.mark.skipif(not importlib.util.find_spec("jax"), reason="JAX is not installed")


@pytest.fixture(scope="module")
def mj():
    import jax
    import metalloid.jax

    if jax.default_backend() != "gpu":
        pytest.skip("JAX has no GPU")
    return metalloid.jax


@needs_jax
@every_call
def test_jax_function_agrees_with_the_cpu(mj, call):
    import jax
    import jax.numpy as jnp

    def function(*arrays):
        arguments, keywords = call.with_arrays(arrays)
        return results_of(call, getattr(mj, call.op)(*arguments, **keywords), arguments)

    arrays = [jnp.asarray(a) for _, a in call.arrays()]
    for run in (function, jax.jit(function)):
        for result, expected in zip(run(*arrays), call.expected(), strict=True):
            assert next(iter(result.devices())).platform == "gpu"
            np.testing.assert_allclose(np.asarray(result), expected, **BOUND)


@needs_jax
def test_jax_gradients_agree_with_torch(mj):
    import jax
    import jax.numpy as jnp

    def loss(x, weight, gate, up):
        normed = mj.rms_norm(x, weight, 1e-5)
        turned = mj.rope(normed, 64, traditional=False, base=10000.0, scale=1.0, offset=0)
        seen = mj.scaled_dot_product_attention(turned, turned, normed, scale=0.125, mask="causal")
        with jax.default_matmul_precision("highest"):
            return (mj.swiglu(seen @ gate, seen @ up) ** 2).mean()

    arguments = layer_arguments("cpu")
    (layer(*arguments) ** 2).mean().backward()
    with jax.default_matmul_precision("highest"):
        gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*(jnp.asarray(a.detach()) for a in arguments))
    for gradient, argument in zip(gradients, arguments, strict=True):
        np.testing.assert_allclose(np.asarray(gradient), argument.grad.numpy(), rtol=1e-3, atol=1e-4)
