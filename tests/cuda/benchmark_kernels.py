"""usage: python tests/cuda/benchmark_kernels.py

What custom kernels cost on a GPU, as ratios inside one run: an elementwise body beside a copy, rms_norm in the Metal
Shading Language beside the library's, a tile product by simdgroup_matrix beside a plain one, and the host's side: a
launch from C, a first call. The C library by ctypes.
"""

import ctypes
import functools
import os
import statistics
import subprocess
import tempfile
import time

os.environ["METALLOID_CACHE"] = tempfile.mkdtemp()  # first calls compile

import torch
from benchmark import CODES, run, seconds, view
from library import byref, check, kernel, kernel_call, library

RMS_NORM = """
    threadgroup float shared[32];
    uint row = threadgroup_position_in_grid.x, lid = thread_position_in_threadgroup.x;
    uint lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;
    uint groups = simdgroups_per_threadgroup, threads = threads_per_threadgroup.x;
    BODY
"""
SUM = """
    sum = simd_sum(sum);
    if (lane == 0) shared[group] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float total = simd_sum(lane < groups ? shared[lane] : 0.0f);
    float scale = metal::precise::rsqrt(total / N + 1e-5f);
"""
BY_ELEMENTS = (
    "x += row * N; out += row * N; float sum = 0;"
    "for (uint i = lid; i < N; i += threads) { float v = x[i]; sum += v * v; }"
    + SUM
    + "for (uint i = lid; i < N; i += threads) out[i] = T(float(x[i]) * scale * float(w[i]));"
)
BY_FOURS = (
    "const device vec<T, 4>* v = (const device vec<T, 4>*)(x + row * N);"
    "const device vec<T, 4>* u = (const device vec<T, 4>*)w;"
    "device vec<T, 4>* o = (device vec<T, 4>*)(out + row * N); float sum = 0;"
    "for (uint i = lid; i < N / 4; i += threads) { float4 f = float4(v[i]); sum += dot(f, f); }"
    + SUM
    + "for (uint i = lid; i < N / 4; i += threads) o[i] = vec<T, 4>(float4(v[i]) * scale * float4(u[i]));"
)
# 32 x 32 of the product a threadgroup: one element a thread, and four 8 x 8 tiles a simdgroup of four.
PLAIN_TILES = """
    threadgroup T sa[32][32], sb[32][32];
    uint tx = thread_position_in_threadgroup.x, ty = thread_position_in_threadgroup.y;
    uint row = threadgroup_position_in_grid.y * 32 + ty, column = threadgroup_position_in_grid.x * 32 + tx;
    float sum = 0;
    for (uint k = 0; k < N; k += 32) {
        sa[ty][tx] = a[row * N + k + tx];
        sb[ty][tx] = b[(k + ty) * N + column];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint i = 0; i < 32; i++) sum += float(sa[ty][i]) * float(sb[i][tx]);
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    out[row * N + column] = sum;
"""
MATRIX_TILES = """
    uint group = simdgroup_index_in_threadgroup;
    uint row = threadgroup_position_in_grid.y * 64 + (group / 2) * 32;
    uint column = threadgroup_position_in_grid.x * 64 + (group % 2) * 32;
    simdgroup_matrix<float, 8, 8> sums[4][4];
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) sums[i][j] = simdgroup_matrix<float, 8, 8>(0);
    for (uint k = 0; k < N; k += 8) {
        simdgroup_matrix<T, 8, 8> ma[4], mb[4];
        for (int i = 0; i < 4; i++) simdgroup_load(ma[i], a + (row + 8 * i) * N + k, N);
        for (int j = 0; j < 4; j++) simdgroup_load(mb[j], b + k * N + column + 8 * j, N);
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 4; j++) simdgroup_multiply_accumulate(sums[i][j], ma[i], mb[j], sums[i][j]);
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) simdgroup_store(sums[i][j], out + (row + 8 * i) * N + column + 8 * j, N);
"""
LAUNCHES = """
#include <time.h>
double launches(int (*launch)(void *, void *, const void *), void *context, void *kernel, const void *call, int count) {
    struct timespec begin, end;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    for (int i = 0; i < count; i++)
        if (launch(context, kernel, call)) return -1;
    clock_gettime(CLOCK_MONOTONIC, &end);
    return (end.tv_sec - begin.tv_sec + 1e-9 * (end.tv_nsec - begin.tv_nsec)) / count;
}
"""


def launcher(source, inputs, outputs, grid, threadgroup, *, language=0, **template):
    """A function that launches the kernel on the current stream; inputs and outputs are tensors by their names."""
    made = kernel(source, list(inputs), list(outputs), language=language)
    values = [(n, CODES[v] if isinstance(v, torch.dtype) else v) for n, v in template.items()]
    call = kernel_call(
        [view(t) for t in inputs.values()], [view(t) for t in outputs.values()], grid, threadgroup, values
    )

    def launch():
        stream = torch.cuda.current_stream().cuda_stream
        check(library.metalloid_kernel_launch(run.contexts[stream], made, byref(call)))

    launch.parts = made, call
    return launch


def copies():
    """Elementwise bodies beside a copy of as much."""
    for dtype in (torch.float32, torch.float16):
        x = torch.randn(1 << 28, device="cuda").to(dtype)
        y, size = torch.empty_like(x), x.numel()
        metal = "uint i = thread_position_in_grid.x; T tmp = x[i]; y[i] = metal::exp(tmp);"
        cuda = "auto i = cooperative_groups::this_grid().thread_rank(); T tmp = x[i]; y[i] = exp(tmp);"
        functions = {
            "copy": functools.partial(y.copy_, x),
            "metal_kernel": launcher(metal, {"x": x}, {"y": y}, (size, 1, 1), (256, 1, 1), T=dtype),
            "cuda_kernel": launcher(cuda, {"x": x}, {"y": y}, (size, 1, 1), (256, 1, 1), language=1, T=dtype),
        }
        times = {name: seconds([function]) for name, function in functions.items()}
        assert torch.allclose(y[:4096].float(), x[:4096].float().exp(), rtol=1e-2)
        for name, took in times.items():
            rate, share = 2 * size * x.element_size() / took / 1e9, times["copy"] / took
            print(f"elementwise {str(dtype)[6:]:8} {name:14} {rate:7.0f} GB/s {share:6.0%} of copy (target 90%)")


def norms():
    rows, length = 16384, 4096
    for dtype in (torch.float32, torch.bfloat16):
        x, w = (torch.randn(s, device="cuda").to(dtype) for s in ((rows, length), (length,)))
        y, ours = torch.empty_like(x), torch.empty_like(x)
        took = seconds([functools.partial(run, "rms_norm", x, w, 1e-5, ours)])
        print(f"rms_norm {str(dtype)[6:]:9} metalloid          {took * 1e6:8.1f} us")
        for name, body in (("by elements", BY_ELEMENTS), ("by fours", BY_FOURS)):
            for threads in (256, 512, 1024):
                source = RMS_NORM.replace("BODY", body)
                function = launcher(
                    source, {"x": x, "w": w}, {"out": y}, (rows * threads, 1, 1), (threads, 1, 1), T=dtype, N=length
                )
                own = seconds([function])
                assert torch.allclose(y[:64].float(), ours[:64].float(), rtol=2e-2, atol=1e-2)
                label = f"{name}, {threads}"
                print(f"rms_norm {str(dtype)[6:]:9} {label:18} {own * 1e6:8.1f} us {took / own:6.0%} (target 80%)")


def products():
    n = 4096
    for dtype in (torch.float32, torch.float16):
        a, b = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))
        out = torch.empty(n, n, device="cuda")
        arguments = {"a": a, "b": b}, {"out": out}
        plain = launcher(PLAIN_TILES, *arguments, (n, n, 1), (32, 32, 1), T=dtype, N=n)
        tiles = launcher(MATRIX_TILES, *arguments, (n // 64 * 128, n // 64, 1), (128, 1, 1), T=dtype, N=n)
        times = []
        for function in (plain, tiles):
            out.fill_(torch.nan)
            times.append(seconds([function], replays=5))
            error = (out[:64] - a[:64].double() @ b.double()).norm() / (a[:64].double() @ b.double()).norm()
            assert error < 2e-3, error
        for name, took in zip(("plain tiles", "simdgroup_matrix"), times, strict=True):
            rate = 2 * n**3 / took / 1e12
            print(f"product {str(dtype)[6:]:8} {name:17} {rate:6.1f} TFLOP/s {times[0] / took:5.2f}x (target 3x)")


def host():
    x = torch.ones(32, device="cuda")
    y = torch.empty_like(x)
    metal, cuda = "y[thread_position_in_grid.x] = x[thread_position_in_grid.x];", "y[threadIdx.x] = x[threadIdx.x];"
    for name, source, language in (("metal_kernel", metal, 0), ("cuda_kernel", cuda, 1)):
        for which in ("first call of the process", "first call", "first call of another kernel, from the cache"):
            text = source if which.endswith("cache") else source + f"// {which}"
            text = source + "// first call" if which.endswith("cache") else text
            launch = launcher(text, {"x": x}, {"y": y}, (32, 1, 1), (32, 1, 1), language=language)
            begin = time.perf_counter()
            launch()
            took = time.perf_counter() - begin
            target = "5 ms" if which.endswith("cache") else "500 ms"
            print(f"{name}: {which}: {took * 1e3:.1f} ms (target {target})")
        torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(
                ["cc", "-O2", "-shared", "-fPIC", "-x", "c", "-", "-o", f"{folder}/launches.so"],
                input=LAUNCHES, text=True, check=True,
            )  # fmt: skip
            time_them = ctypes.CDLL(f"{folder}/launches.so").launches
        time_them.restype = ctypes.c_double
        made, call = launch.parts
        context = run.contexts[torch.cuda.current_stream().cuda_stream]
        address = ctypes.cast(library.metalloid_kernel_launch, ctypes.c_void_p)
        times = []
        for _ in range(20):
            times.append(time_them(address, context, made, byref(call), 500))
            torch.cuda.synchronize()  # no more than fit in the queue
        print(f"{name}: launch from C: {statistics.median(times) * 1e6:.2f} us (target 5 us)")


if __name__ == "__main__":
    print(torch.cuda.get_device_name())
    host()
    copies()
    norms()
    products()
