"""What arrays of NumPy and tensors of PyTorch can be that is refused: a clear error, nothing written, nothing lost.

Each bad call is repeated 10,000 times, while references are counted and the process' memory is watched."""

import gc
import os
import sys

import metalloid
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

under_asan = pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="frees late under AddressSanitizer")

READ_ONLY = np.zeros((2, 4), np.float32)
READ_ONLY.flags.writeable = False
ONES = torch.ones(2, 4)


class Raises:
    def __dlpack__(self, **_):
        raise BufferError("not today")

    def __dlpack_device__(self):
        return 1, 0


def norm(x=ONES, weight=None, **options):
    return metalloid.rms_norm(x, weight, 1e-5, **options)


def attend(mask=None, **options):
    q = ONES[None, None]
    return metalloid.scaled_dot_product_attention(q, q, q, scale=1.0, mask=mask, **options)


BAD = {  # name: (what is called with the bad value, the bad value, what the message says)
    **{
        f"{dtype}": (
            norm,
            torch.ones(2, 4).to(dtype),
            r"rms_norm: x must be float32, float16, bfloat16 or float64, got ",
        )
        for dtype in (
            torch.float8_e4m3fn,
            torch.float8_e5m2,
            torch.complex64,
            torch.complex128,
            torch.int32,
            torch.bool,
        )
    },
    "complex weight": (lambda w: norm(weight=w), torch.ones(4, dtype=torch.complex64), r"rms_norm: weight must be "),
    "float8 mask": (attend, torch.ones(2, 2).to(torch.float8_e5m2), r"scaled\w+: mask must be "),
    "NumPy complex": (norm, np.ones((2, 4), np.complex64), r"rms_norm: x must be "),
    "NumPy objects": (norm, np.ones((2, 4), object), r"rms_norm: x has the dtype object"),
    "NumPy other byte order": (norm, np.ones((2, 4), ">f4"), r"rms_norm: x has the dtype >f4"),
    "another device": (lambda w: norm(weight=w), torch.ones(4, device="meta"), r"rms_norm: .*weight.*meta"),
    "requires grad": (
        norm,
        torch.ones(2, 4, requires_grad=True),
        r"rms_norm: x requires gradients.*metalloid\.torch\.",
    ),
    "weight requires grad": (
        lambda w: norm(weight=w),
        torch.nn.Parameter(torch.ones(4)),
        r"rms_norm: weight requires gradients",
    ),
    "sparse": (norm, torch.ones(2, 4).to_sparse(), r"rms_norm: the memory of x cannot be shared: "),
    "negated view": (
        norm,
        torch.ones(2, 4, dtype=torch.complex64).conj().imag,
        r"rms_norm: x is a view of negated memory",
    ),
    "__dlpack__ raises": (norm, Raises(), r"rms_norm: the memory of x cannot be shared: not today"),
    "out: read-only": (lambda o: norm(ONES.numpy(), out=o), READ_ONLY, r"rms_norm: out is read-only"),
    "out: its elements overlap": (lambda o: norm(out=o), torch.zeros(1, 4).expand(2, 4), r"rms_norm: out "),
    "out: overlaps x": (lambda o: norm(o.flatten()[1:9].view(2, 4), out=o[:2]), torch.zeros(3, 4), r"rms_norm: out "),
    "out: another shape": (lambda o: norm(out=o), torch.zeros(4, 2), r"rms_norm: out must "),
    "out: another dtype": (lambda o: norm(out=o), torch.zeros(2, 4, dtype=torch.int32), r"rms_norm: out must be "),
    "out: __dlpack__ raises": (
        lambda o: norm(out=o),
        Raises(),
        r"rms_norm: the memory of out cannot be shared: not today",
    ),
    "out: requires grad": (
        lambda o: norm(out=o),
        torch.zeros(2, 4, requires_grad=True),
        r"rms_norm: out requires gradients",
    ),
}
every_bad = pytest.mark.parametrize(("call", "value", "message"), BAD.values(), ids=BAD)


@every_bad
def test_refused_with_nothing_written(call, value, message):
    out = torch.full((2, 4), 7.0)
    before = None if not hasattr(value, "shape") or getattr(value, "is_meta", False) else str(value)
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        call(value) if "out" in message else call(value, out=out) if call is norm else call(value)
    assert "\n" not in str(caught.value)
    assert (out == 7).all()
    assert before is None or str(value) == before


def resident():
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@under_asan
@every_bad
def test_nothing_is_lost_in_10000_calls(call, value, message):
    def repeat(times):
        for _ in range(times):
            try:
                call(value)
            except ValueError:
                continue
            raise AssertionError("was not refused")

    repeat(1000)
    gc.collect()
    references, memory = (sys.getrefcount(value), sys.getrefcount(ONES), sys.getrefcount(None)), resident()
    repeat(10_000)
    gc.collect()
    assert (sys.getrefcount(value), sys.getrefcount(ONES)) == references[:2]
    assert abs(sys.getrefcount(None) - references[2]) < 100
    assert resident() - memory < 1 << 20  # 10,000 objects of 100 bytes


def test_strided_and_transposed_out_is_written_in_place():
    frame = torch.zeros(4, 6)
    norm(out=frame.T[1:3, :])
    assert torch.allclose(frame[:, 1:3], torch.tensor(1.0))
    assert (frame[:, [0, 3, 4, 5]] == 0).all()


def test_a_gradient_that_nobody_records_is_fine():
    parameter = torch.nn.Parameter(torch.ones(4))
    with torch.no_grad():
        assert not norm(weight=parameter).requires_grad
        assert norm(weight=parameter, out=parameter.data[None].expand(2, 4).clone()) is not None
