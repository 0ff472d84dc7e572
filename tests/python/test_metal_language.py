"""Every row of the support table of docs/custom-kernels.md, and kernels as users write them, against NumPy."""

import os
import shutil

import metal_cases
import metalloid.fast
import numpy as np
import pytest

CLANG = shutil.which("clang++") or shutil.which("clang")
pytestmark = pytest.mark.skipif(not CLANG and "METALLOID_CXX" not in os.environ, reason="no clang")


@pytest.mark.parametrize("case", metal_cases.CASES, ids=lambda case: case.name)
def test_kernel_agrees_with_numpy(case):
    input_names, output_names = case.names
    kernel = metalloid.fast.metal_kernel(
        "language", input_names, output_names, case.source, header=case.header, atomic_outputs=case.atomic_outputs
    )
    outputs = kernel(
        inputs=case.inputs,
        output_shapes=[expected.shape for expected in case.expected],
        output_dtypes=[expected.dtype for expected in case.expected],
        grid=case.grid,
        threadgroup=case.threadgroup,
        template=case.template,
        init_value=case.init_value,
    )
    for output, expected in zip(outputs, case.expected, strict=True):
        wide = np.complex128 if expected.dtype.kind == "c" else np.float64
        np.testing.assert_allclose(output.astype(wide), expected.astype(wide), case.rtol, case.atol)


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("texture2d<float> t;", "textures"),
        ("texture2d<half, access::read> t;", "textures"),
        ("sampler s;", "samplers"),
        ("visible_function_table<void()> t;", "function tables"),
        ("raytracing::intersector<int> i;", "ray tracing"),
        ("constant bool fast_path [[function_constant(0)]];\n", "function constants.*template argument"),
        ("constant int width [[function_constant(3)]], height = 2;\n", "function constants.*template argument"),
    ],
)
def test_what_is_not_supported_says_so(source, what):
    header, body = (source, "out[0] = 1;") if source.endswith("\n") else ("", source)
    kernel = metalloid.fast.metal_kernel("unsupported", [], ["out"], body, header=header)
    with pytest.raises(RuntimeError, match=what):
        kernel(inputs=[], output_shapes=[(1,)], output_dtypes=[np.float32], grid=(1, 1, 1), threadgroup=(1, 1, 1))


def test_a_cuda_kernel_wants_a_gpu():
    x = np.ones(4, np.float32)
    kernel = metalloid.fast.cuda_kernel("k", ["a"], ["out"], "out[threadIdx.x] = a[threadIdx.x];")
    call = {
        "inputs": [x],
        "output_shapes": [x.shape],
        "output_dtypes": [x.dtype],
        "grid": (4, 1, 1),
        "threadgroup": (4, 1, 1),
    }
    assert "mtl_kernel" in kernel.source(**call)
    with pytest.raises((RuntimeError, ValueError), match="CUDA C"):
        kernel(**call)
    with pytest.raises(ValueError, match="shared_memory"):
        metalloid.fast.cuda_kernel("k", [], ["out"], "", shared_memory=-1)


def test_a_precompiled_kernel_wants_a_gpu():
    x = np.ones(4, np.float32)
    call = {
        "name": "k",
        "compiled_source": b"\x7fELF\0\0",
        "inputs": [x],
        "output_shapes": [x.shape],
        "output_dtypes": [x.dtype],
        "scalars": [4, 1.5, True],
        "grid": (4, 1, 1),
        "threadgroup": (4, 1, 1),
    }
    fast = metalloid.fast
    with pytest.raises(RuntimeError, match="a precompiled one, for NVIDIA GPUs"):
        fast.precompiled_cuda_kernel(**call)
    for wrong, words in (
        ({"scalars": ["4"]}, r"scalars\[0\]"),
        ({"scalars": [0] * 65}, "64 scalars"),
        ({"compiled_source": "text"}, "bytes"),
        ({"name": "a\0b"}, "NUL"),
        ({"name": ""}, "name"),
        ({"grid": (0, 1, 1)}, "grid"),
    ):
        with pytest.raises(ValueError, match=words):
            fast.precompiled_cuda_kernel(**(call | wrong))
