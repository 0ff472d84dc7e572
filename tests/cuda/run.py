"""usage: python tests/cuda/run.py [PYTEST ARGUMENT]...

Runs the CUDA tests: those of this folder, and the case tables of tests/python with every call made on the GPU, where
on_gpu.py stands in for the Python package. float64, which GPUs are not given, and what only the binding does are left
out. Needs PyTorch, NumPy, ml_dtypes, pytest and hypothesis, and a GPU; without one it says so and succeeds.
"""

import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
CASES = HERE.parent / "python"
OPERATIONS = (
    *("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm", "rope", "qk_norm_rope", "swiglu", "geglu"),
    *("cross_entropy", "gated_delta_update", "attention", "kv_cache_sdpa_update"),
)
# The binding's own: signatures, exceptions, other libraries' arrays. Checks that the CPU alone makes. And attention
# whose scale, softcap or sums leave float32's range, which the CPU does again in double and the GPU does not (README).
LEFT_OUT = "refused or float64 or accepts_mlx_keywords or every_form_of_the_same or beyond_float32 or near_the_largest"


def main(arguments):
    try:
        import torch
    except ImportError:
        print("CUDA tests left out: there is no PyTorch")
        return 0
    if not torch.cuda.is_available():
        print("CUDA tests left out: PyTorch sees no GPU")
        return 0
    import pytest

    sys.path[:0] = [str(HERE), str(CASES)]
    import on_gpu

    sys.modules["metalloid"] = on_gpu
    import reference

    reference.FLOATING = tuple(dtype for dtype in reference.FLOATING if dtype != reference.float64)
    whole = reference.tolerance

    def tolerance(op, dtype, ref, magnitude=None, slack=0.0):
        """16-bit attention multiplies values by 16-bit weights, in matrix units."""
        bound = whole(op, dtype, ref, magnitude, slack)
        if op in ("attention", "kv_cache_sdpa_update") and dtype in (reference.float16, reference.bfloat16):
            scale = abs(ref) + (reference.row_magnitude(ref) if magnitude is None else magnitude)
            bound = bound + (2e-3 if dtype == reference.float16 else 2e-2) * scale
        return bound

    reference.tolerance = tolerance
    files = [str(CASES / f"test_{op}.py") for op in OPERATIONS] + [str(path) for path in sorted(HERE.glob("test_*.py"))]
    return pytest.main([*files, "-q", "-p", "no:cacheprovider", "-k", f"not ({LEFT_OUT})", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
