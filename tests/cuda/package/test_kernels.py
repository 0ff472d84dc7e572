"""Custom kernels on CUDA tensors: every row of the support table, MLX's CUDA conventions, streams, graphs, errors."""

import contextlib
import gc
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

fast = pytest.importorskip("metalloid.fast", reason="the Python package is not built")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "python"))
import metal_cases  # noqa: E402
import metalloid  # noqa: E402

if not torch.cuda.is_available():
    pytest.skip("PyTorch sees no GPU", allow_module_level=True)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """A cache of this run's own, so that everything is compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METALLOID_CACHE", str(tmp_path_factory.mktemp("kernels")))
        yield


def to_torch(value):
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype == metal_cases.bfloat16:
        return torch.from_numpy(value.view(np.int16).copy()).view(torch.bfloat16).cuda()
    return torch.from_numpy(value.copy()).cuda()


def to_numpy(tensor):
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).cpu().numpy().view(metal_cases.bfloat16)
    return tensor.cpu().numpy()


def call(kernel, *inputs, like=None, grid=None, threads=256, **more):
    """The one output of a kernel, of the shape and dtype of its first input."""
    like = inputs[0] if like is None else like
    return kernel(
        inputs=list(inputs),
        output_shapes=[like.shape],
        output_dtypes=[like.dtype],
        grid=grid or (like.numel(), 1, 1),
        threadgroup=(threads, 1, 1),
        **more,
    )[0]


def metal(source, inputs=("x",), **more):
    return fast.metal_kernel("test", list(inputs), ["out"], source, **more)


@contextlib.contextmanager
def captured(graph):
    """Of this thread's calls: JAX's threads and what a garbage collection destroys are no business of a capture's."""
    gc.collect()
    gc.disable()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            yield
    finally:
        gc.enable()


TWICE = "uint i = thread_position_in_grid.x; out[i] = 2 * x[i];"


@pytest.mark.parametrize("case", metal_cases.CASES, ids=lambda case: case.name)
def test_kernel_agrees_with_numpy(case):
    input_names, output_names = case.names
    kernel = fast.metal_kernel(
        "language", input_names, output_names, case.source, header=case.header, atomic_outputs=case.atomic_outputs
    )
    with torch.device("cuda"):  # where outputs go if there is no input
        outputs = kernel(
            inputs=[to_torch(value) for value in case.inputs],
            output_shapes=[expected.shape for expected in case.expected],
            output_dtypes=[getattr(torch, expected.dtype.name) for expected in case.expected],
            grid=case.grid,
            threadgroup=case.threadgroup,
            template=case.template,
            init_value=case.init_value,
        )
    for output, expected in zip(outputs, case.expected, strict=True):
        assert output.is_cuda
        wide = np.complex128 if expected.dtype.kind == "c" else np.float64
        np.testing.assert_allclose(to_numpy(output).astype(wide), expected.astype(wide), case.rtol, case.atol)


def test_a_launch_is_queued_on_the_current_stream():
    x = torch.randn(1 << 20, device="cuda")
    kernel = metal(TWICE)
    call(kernel, x)  # the first call compiles
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        y = call(kernel, x)
    assert not stream.query()  # queued, and nothing waited
    stream.synchronize()
    assert torch.equal(y, 2 * x)


def test_graphs_capture_launches_copies_fills_and_the_first_call():
    x, kernel = torch.randn(64, 32, device="cuda"), metal(TWICE)
    sums = metal(
        "atomic_fetch_add_explicit(&out[thread_position_in_grid.x % 4], x[thread_position_in_grid.x] + s, "
        "memory_order_relaxed);",
        inputs=("x", "s"),
        atomic_outputs=True,
    )
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with captured(graph):
        y = call(kernel, x.T)
        (z,) = sums(
            inputs=[x, 1.0],
            output_shapes=[(4,)],
            output_dtypes=[torch.float32],
            grid=(x.numel(), 1, 1),
            threadgroup=(128, 1, 1),
            init_value=5,
        )
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, 2 * x.T)
        torch.testing.assert_close(z, 5 + (x + 1).reshape(-1, 4).sum(0), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("threads", [32, 64, 96, 256, 512, 1024])
@pytest.mark.parametrize("rest", [0, 40])
def test_a_threadgroup_of_any_size_knows_how_many_it_is(threads, rest):
    source = """
        threadgroup uint seen[1024];
        uint lid = thread_position_in_threadgroup.x, n = threads_per_threadgroup.x;
        seen[lid] = simd_sum(1u) + 100 * simdgroups_per_threadgroup;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        uint sum = 0;
        for (uint i = 0; i < n; i++) sum += seen[i];
        out[thread_position_in_grid.x] = sum + x[0];
    """
    x = torch.zeros(1, device="cuda", dtype=torch.int32)
    y = torch.empty(3 * threads + rest, device="cuda", dtype=torch.int32)
    got = call(metal(source), x, like=y, threads=threads).cpu().numpy()
    for first in range(0, len(got), threads):
        size = min(threads, len(got) - first)
        groups = -(-size // 32)
        lanes = sum(min(32, size - 32 * g) ** 2 for g in range(groups))
        assert (got[first : first + size] == lanes + 100 * groups * size).all()


def test_strides_scalars_and_tensors_of_the_host():
    x = torch.randn(8, 6, device="cuda").T
    seen = metal(
        "uint i = thread_position_in_grid.x; out[i] = s * x[elem_to_loc(i, x_shape, x_strides, x_ndim)];",
        inputs=("s", "x"),
        ensure_row_contiguous=False,
    )
    for scalar in (3, torch.tensor(3), np.float32(3)):  # a host's scalar in front: the outputs go where x is
        assert torch.equal(call(seen, scalar, x, like=x), 3 * x)
    with pytest.raises(ValueError, match="device"):
        call(seen, torch.ones(2), x, like=x)
    assert call(metal("out[thread_position_in_grid.x] = x[0];"), torch.ones(1, device="cuda")).is_cuda


@pytest.mark.parametrize("at", [0, 4, 8, 12])
@pytest.mark.parametrize("contiguous", [True, False])
def test_vectors_in_slices_that_begin_anywhere(at, contiguous):
    """A float4 is loaded and stored whole, at a multiple of 16 bytes."""
    source = """
        uint i = thread_position_in_grid.x;
        float4 v = ((const device float4*)x)[i * x_strides[0] / 4];
        *reinterpret_cast<device float4*>(out + 4 * i) += v;
    """
    n = 1000
    kernel = metalloid._native.Kernel("slices", ("x",), ("out",), source, ensure_row_contiguous=contiguous)
    memory = torch.randn(8 * n + 16, device="cuda")
    x = memory[at // 4 :][: 8 * n].view(n, 8)[:, :4]
    before = memory.clone()
    whole = torch.full((4 * n + 16,), 3.0, device="cuda")
    y = whole[at // 4 :][: 4 * n]
    for initial in (None, 1.0):
        whole.fill_(3)
        kernel.launch((x,), (y,), (n, 1, 1), (64, 1, 1), (), initial)
        assert torch.equal(y.view(n, 4), x + (3 if initial is None else initial))
        assert (whole[: at // 4] == 3).all()
        assert (whole[at // 4 + 4 * n :] == 3).all()
    assert torch.equal(memory, before)


def test_slices_of_16_bit_vectors_in_a_graph():
    kernel = metal("uint i = thread_position_in_grid.x; ((device half4*)out)[i] = 2 * ((const device half4*)x)[i];")
    x = torch.randn(1025, device="cuda").half()[1:]
    assert torch.equal(call(kernel, x, grid=(256, 1, 1)), 2 * x)
    graph = torch.cuda.CUDAGraph()
    with captured(graph):
        y = call(kernel, x, grid=(256, 1, 1))
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, 2 * x)


@pytest.mark.parametrize("threads", [32, 64, 256, 1024])
@pytest.mark.parametrize("length", [1, 31, 1000, 4096, 70000])
def test_loops_over_a_threadgroups_share(threads, length):
    """Those of few rounds are unrolled: each element once, whatever the length."""
    source = """
        threadgroup int sums[32];
        uint lid = thread_position_in_threadgroup.x, row = threadgroup_position_in_grid.x;
        const uint n = threads_per_threadgroup.x;
        int sum = 0;
        for (uint i = lid; i < N; i += n) sum += x[row * N + i];
        for (uint i = 2 * lid; i + 1 < uint(N); i += 2 * n) { sum += 3 * x[row * N + i]; if (i > N / 2) break; }
        sum = simd_sum(sum);
        if (simd_is_first()) sums[simdgroup_index_in_threadgroup] = sum;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        sum = 0;
        for (uint i = 0; i < simdgroups_per_threadgroup; i++) sum += sums[i];
        for (uint i = lid; i < N; i += n) { if (i == 7) continue; out[row * N + i] = sum + x[row * N + i]; }
    """
    x = torch.randint(-9, 9, (3, length), device="cuda", dtype=torch.int32)
    y = call(metal(source), x, grid=(3 * threads, 1, 1), threads=threads, template=[("N", length)], init_value=0)
    i = torch.arange(0, length - 1, 2, device="cuda")
    share = (i // 2) % threads
    later = i > length // 2
    first_later = {}
    for at, lid in zip(i[later].tolist(), share[later].tolist(), strict=True):
        first_later.setdefault(lid, at)
    done = [a for a, lid in zip(i.tolist(), share.tolist(), strict=True) if a <= first_later.get(lid, length)]
    sums = x.sum(1) + 3 * x[:, done].sum(1)
    expected = sums[:, None] + x
    if length > 7:
        expected[:, 7] = 0
    assert torch.equal(y, expected.int())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_cupy(dtype):
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        x = cupy.arange(512, dtype="float32").reshape(16, 32)
        x = x if dtype == "bfloat16" else x.astype(dtype)
        out = {"output_shapes": [x.T.shape], "output_dtypes": [dtype if dtype != "bfloat16" else "float32"]}
        (y,) = metal(TWICE)(inputs=[x.T], grid=(512, 1, 1), threadgroup=(64, 1, 1), **out)
    stream.synchronize()
    assert isinstance(y, cupy.ndarray)
    assert (y == 2 * x.T).all()


# ---- CUDA C++


def test_cuda_kernel_of_mlx_documentation():
    source = "auto elem = cooperative_groups::this_grid().thread_rank(); T tmp = inp[elem]; out[elem] = exp(tmp);"
    kernel = fast.cuda_kernel("myexp", ["inp"], ["out"], source)
    for dtype in (torch.float32, torch.float16):
        x = torch.randn(4, 16, device="cuda", dtype=dtype)
        torch.testing.assert_close(call(kernel, x, threads=64, template=[("T", dtype)]), x.exp())


def test_cuda_kernel_sees_shapes_strides_and_shared_memory():
    source = """
        extern __shared__ float row[];
        int i = blockIdx.x * blockDim.x + threadIdx.x;
        row[threadIdx.x] = i < size ? x[elem_to_loc(i, x_shape.data(), x_strides.data(), x_ndim)] : 0;
        __syncthreads();
        if (i < size) out[i] = row[threadIdx.x] + s[0] + row[0] * 0;
    """
    kernel = fast.cuda_kernel(
        "seen", ["x", "s"], ["out"], source.replace("size", "(x_shape[0] * x_shape[1])"), ensure_row_contiguous=False,
        shared_memory=64 << 10,
    )  # fmt: skip
    x = torch.randn(33, 65, device="cuda").T
    assert torch.equal(call(kernel, x, 2.0), x + 2)


# ---- compiled ones

CUDA_SOURCE = """
extern "C" __global__ void axpy(const float *x, float *y, int n, float a, double b, bool negate, long long by) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = (negate ? -1 : 1) * (a * x[i] + float(b)) + float(by >> 32);
}
"""


@pytest.fixture(scope="module", params=["ptx", "cubin"])
def image(request, tmp_path_factory):
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if not nvcc:
        pytest.skip("there is no nvcc")
    folder = tmp_path_factory.mktemp("image")
    (folder / "axpy.cu").write_text(CUDA_SOURCE)
    major, minor = torch.cuda.get_device_capability()
    target = f"-arch=sm_{major}{minor}"
    subprocess.run([nvcc, f"-{request.param}", target, "-o", folder / "image", folder / "axpy.cu"], check=True)
    return (folder / "image").read_bytes()


def axpy(image, x, scalars, name="axpy", **more):
    return fast.precompiled_cuda_kernel(
        name=name,
        compiled_source=image,
        inputs=[x],
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
        scalars=scalars,
        grid=(x.numel(), 1, 1),
        threadgroup=(128, 1, 1),
        **more,
    )[0]


def test_a_precompiled_kernel(image):
    x = torch.randn(1000, device="cuda")
    for _ in range(2):
        y = axpy(image, x, [1000, 2.0, 0.5, True, 3 << 32])
        torch.testing.assert_close(y, -(2 * x + 0.5) + 3)
    z = axpy(image, x, [10, 2.0, 0.5, False, 0], init_value=7)
    assert (z[10:] == 7).all()
    torch.testing.assert_close(z[:10], 2 * x[:10] + 0.5)
    strided = torch.randn(1000, 2, device="cuda")[:, 0]
    y = axpy(image, strided, [1000, 1.0, 0.0, False, 0], ensure_row_contiguous=True)
    assert torch.equal(y, strided)


def test_a_precompiled_kernel_is_given_what_it_takes(image):
    x = torch.randn(8, device="cuda")
    for scalars, words in (
        ([8, 2.0], "more parameters than the 4"),
        ([8, 2.0, 0.5, True, 0, 1], "has 7 parameters"),
        ([8.0, 2.0, 0.5, 1.0, 0], "scalar 3 is a float"),
        ([1 << 40, 2.0, 0.5, True, 0], "scalar 0 is 1099511627776"),
    ):
        with pytest.raises(ValueError, match=words):
            axpy(image, x, scalars)
    with pytest.raises(ValueError, match=r"scalars\[1\]"):
        axpy(image, x, [8, "2", 0.5, True, 0])
    with pytest.raises(ValueError, match="bytes"):
        axpy("text", x, [])
    with pytest.raises(RuntimeError, match="nobody"):
        axpy(image, x, [8, 2.0, 0.5, True, 0], name="nobody")
    with pytest.raises(RuntimeError, match="axpy"):
        axpy(b"no image", x, [8, 2.0, 0.5, True, 0])
    with pytest.raises(RuntimeError, match="CPU memory"):
        axpy(image, x.cpu(), [8, 2.0, 0.5, True, 0])


# ---- what goes wrong


@pytest.mark.parametrize("make", [fast.metal_kernel, fast.cuda_kernel])
@pytest.mark.parametrize("place", ["source", "header"])
def test_a_compile_error_names_the_users_line(make, place):
    wrong = "\nint f() {\n    return nowhere;\n}\n" if place == "header" else "\n\nout[0] = nowhere;\n"
    texts = {"source": "out[0] = x[0];", "header": ""} | {place: wrong}
    kernel = make("wrong", ["x"], ["out"], **texts)
    with pytest.raises(RuntimeError, match=rf"(?s)wrong.*{place}[(:]3\).*nowhere"):
        call(kernel, torch.ones(4, device="cuda"))


def test_without_a_compiler_it_says_what_to_install():
    program = f"""
import torch, metalloid.fast as fast
kernel = fast.metal_kernel("k", ["x"], ["out"], {TWICE!r} + "// of nobody else")
try:
    kernel(inputs=[torch.ones(4, device="cuda")], output_shapes=[(4,)], output_dtypes=[torch.float32], grid=(4, 1, 1),
           threadgroup=(4, 1, 1))
except RuntimeError as error:
    print(error)
"""
    environment = {**__import__("os").environ, "METALLOID_NVRTC": "/nowhere/libnvrtc.so"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "kernel k" in done.stdout
    assert "METALLOID_NVRTC=/nowhere/libnvrtc.so cannot be opened" in done.stdout


def test_nothing_is_launched_for_arguments_that_do_not_fit():
    x, kernel = torch.ones(4, device="cuda"), metal(TWICE)
    for threads, grid in ((2048, (4096, 1, 1)), (0, (4, 1, 1)), (32, (0, 1, 1)), (32, (-1, 1, 1))):
        with pytest.raises(ValueError, match=r"threadgroup|grid"):
            call(kernel, x, threads=threads, grid=grid)
    with pytest.raises(ValueError, match="inputs"):
        call(kernel, x, x)
