"""CPU tensors of PyTorch through the same functions: the bits that NumPy arrays of the same layout give, as tensors."""

import metalloid
import numpy as np
import pytest
from arrays import assert_same_bits, bits

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

DTYPES = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: None, torch.float64: np.float64}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def to_numpy(tensor):
    """A view of the tensor's memory: bfloat16 as ml_dtypes has it."""
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def check(function, *arguments, **keywords):
    """The tensors' results are tensors with the bits of the arrays' results."""

    def swap(value):
        return to_numpy(value) if isinstance(value, torch.Tensor) else value

    results = function(*arguments, **keywords)
    want = function(*map(swap, arguments), **{name: swap(value) for name, value in keywords.items()})
    several = isinstance(want, (tuple, list))
    for result, array in zip(results if several else (results,), want if several else (want,), strict=True):
        assert type(result) is torch.Tensor
        assert_same_bits(to_numpy(result), array)
    return results


@every_dtype
def test_norms(dtype):
    x, weight = normal(3, 5, 64, dtype=dtype), normal(64, dtype=dtype, seed=1)
    check(metalloid.rms_norm, x, weight, 1e-5)
    check(metalloid.layer_norm, x, weight, None, 1e-5)
    check(metalloid.layer_norm, x.transpose(0, 1), weight, weight, 1e-5)
    check(metalloid.add_rms_norm, x, x[:, :1].expand(3, 5, 64), weight, 1e-5)
    check(metalloid.add_layer_norm, x, x, None, None, 1e-5)


@every_dtype
def test_rotation(dtype):
    x = normal(2, 5, 3, 16, dtype=dtype)
    arguments = {"traditional": False, "scale": 1.0}
    check(metalloid.rope, x.transpose(1, 2), 16, **arguments, base=1e4, offset=3)
    check(metalloid.rope, x, 8, **arguments, base=1e4, offset=torch.tensor([1, 2]))
    check(
        metalloid.rope, x, 16, **arguments, base=1e4, offset=0, position_ids=torch.arange(10).reshape(2, 5), time_axis=1
    )
    check(metalloid.rope, x, 16, **arguments, base=None, offset=0, freqs=torch.arange(1, 9, dtype=torch.float32))
    check(metalloid.qk_norm_rope, x, x[:, :, :1], None, None, 1e-6, 16, **arguments, base=1e4, offset=2, time_axis=1)


@every_dtype
def test_gated_activations(dtype):
    gate, up = normal(4, 33, dtype=dtype), normal(4, 33, dtype=dtype, seed=1)
    check(metalloid.swiglu, gate, up)
    check(metalloid.geglu, gate[:, ::2], up[:, ::2], approximate="tanh")


@every_dtype
def test_attention(dtype):
    q, k, v = (
        normal(2, 5, 4, 16, dtype=dtype),
        normal(2, 9, 2, 16, dtype=dtype, seed=1),
        normal(2, 9, 2, 16, dtype=dtype, seed=2),
    )
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    attend = metalloid.scaled_dot_product_attention
    check(attend, q, k, v, scale=0.25, mask="causal")
    check(attend, q, k, v, scale=0.25, mask=normal(5, 9, dtype=dtype), return_logsumexp=True)
    check(attend, q, k, v, scale=0.25, mask=normal(2, 1, 1, 9) > 0, sinks=normal(4, dtype=dtype))
    check(attend, q, k, v, scale=0.25, key_mask=torch.ones(2, 9, dtype=torch.bool), window=3)


@every_dtype
def test_attention_is_that_of_torch(dtype):
    q, k, v = (normal(2, 4, 7, 32, dtype=dtype, seed=seed) for seed in range(3))
    out = metalloid.scaled_dot_product_attention(q, k, v, scale=32**-0.5, causal=True)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    rounding = 2 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-5  # torch's own probabilities may have 16 bits
    torch.testing.assert_close(out, want, rtol=rounding, atol=rounding)


def test_cache_update():
    caches = [normal(2, 8, 2, 16, seed=seed) for seed in (1, 2)]
    arrays = [cache.numpy().copy() for cache in caches]
    q, new = normal(2, 1, 4, 16), normal(2, 1, 2, 16, seed=3)
    out = metalloid.kv_cache_sdpa_update(q, new, new, *caches, 5, torch.ones(2, 8, dtype=torch.bool), 0.25)
    want = metalloid.kv_cache_sdpa_update(q.numpy(), new.numpy(), new.numpy(), *arrays, 5, np.ones((2, 8), bool), 0.25)
    assert_same_bits(out.numpy(), want)
    for cache, array in zip(caches, arrays, strict=True):
        assert_same_bits(cache.numpy(), array)
        assert_same_bits(cache[:, 5:6].numpy(), new.numpy())


def test_loss_and_gated_delta():
    check(metalloid.cross_entropy, normal(3, 4, 50, dtype=torch.bfloat16), torch.arange(12).reshape(3, 4))
    q, v, gamma = normal(1, 6, 2, 8), normal(1, 6, 4, 8, seed=1), torch.rand(1, 6, 4)
    check(metalloid.gated_delta_update, q, q / 4, v, gamma, gamma, None, torch.arange(6)[None] != 2)


def test_out_is_written_where_it_lies():
    x, out = normal(3, 8), torch.full((3, 16), 7.0)
    result = metalloid.rms_norm(x, None, 1e-5, out=out[:, ::2])
    assert result.data_ptr() == out.data_ptr()
    assert (out[:, 1::2] == 7).all()
    assert_same_bits(out[:, ::2].numpy(), metalloid.rms_norm(x.numpy(), None, 1e-5))
    metalloid.rms_norm(x, None, 1e-5, out=x)
    assert_same_bits(x.numpy(), np.ascontiguousarray(out[:, ::2].numpy()))


def test_empty_and_scalar_tensors():
    assert metalloid.rms_norm(torch.zeros(0, 8), None, 1e-5).shape == (0, 8)
    assert metalloid.swiglu(torch.tensor(1.0), torch.tensor(2.0)).shape == ()


@pytest.mark.parametrize(
    "x", [torch.ones(2, 4, dtype=torch.int32), torch.ones(2, 4, dtype=torch.complex64), torch.tensor(1.0)]
)
def test_refusals_name_the_argument(x):
    out = torch.full((2, 4), 7.0)
    with pytest.raises(ValueError, match=r"^rms_norm: x\b"):
        metalloid.rms_norm(x, None, 1e-5, out=out)
    assert (bits(out.numpy()) == bits(np.full((2, 4), 7, np.float32))).all()


def test_tensors_of_another_device_are_refused():
    with pytest.raises((ValueError, RuntimeError), match="x"):
        metalloid.rms_norm(torch.ones(2, 4, device="meta"), None, 1e-5)
