"""Custom kernels on the CPU: what MLX documents and tests of its own, threads that meet, errors, the cache."""

import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import metal_cases
import metalloid
import ml_dtypes
import numpy as np
import pytest
from metalloid.fast import metal_kernel

CLANG = shutil.which("clang++") or shutil.which("clang")
pytestmark = pytest.mark.skipif(not CLANG and "METALLOID_CXX" not in os.environ, reason="no clang")

F32 = np.float32


def run(source, inputs, *, out, grid, threadgroup=(32, 1, 1), outputs=("out",), template=None, init_value=None, **made):
    """Runs a kernel whose inputs are named by a dict; `out` is a (shape, dtype) or several of them."""
    kernel = metal_kernel(
        name="test", input_names=list(inputs), output_names=list(outputs), source=textwrap.dedent(source), **made
    )
    specs = [out] if isinstance(out, tuple) else out
    results = kernel(
        inputs=list(inputs.values()),
        output_shapes=[shape for shape, _ in specs],
        output_dtypes=[dtype for _, dtype in specs],
        grid=grid,
        threadgroup=threadgroup,
        template=template,
        init_value=init_value,
    )
    return results[0] if isinstance(out, tuple) else results


def normal(*shape, seed=7, dtype=F32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


# ---- MLX's documentation and tests ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_exp_elementwise(dtype):
    a = normal(4, 16, dtype=dtype)
    source = "uint elem = thread_position_in_grid.x; T tmp = inp[elem]; out[elem] = metal::exp(tmp);"
    b = run(source, {"inp": a}, out=(a.shape, dtype), grid=(a.size, 1, 1), threadgroup=(256, 1, 1),
            template=[("T", np.float32)])  # fmt: skip
    np.testing.assert_allclose(b.astype(F32), np.exp(a.astype(F32)), rtol=1e-2 if dtype != np.float32 else 2e-6)


@pytest.mark.parametrize("contiguous", [True, False])
def test_strides(contiguous):
    x = normal(6, 8)[::2].T
    loc = "elem" if contiguous else "elem_to_loc(elem, inp_shape, inp_strides, inp_ndim)"
    source = f"""
        uint elem = thread_position_in_grid.x;
        uint loc = {loc};
        T tmp = inp[loc];
        out[elem] = metal::precise::exp(tmp) * threads_per_simdgroup;
    """
    out = run(source, {"inp": x}, out=(x.shape, F32), grid=(x.size, 1, 1), threadgroup=(256, 1, 1),
              template=[("T", F32)], ensure_row_contiguous=contiguous)  # fmt: skip
    np.testing.assert_allclose(out, np.exp(x) * 32, rtol=1e-5)


def test_strides_are_those_of_the_array():
    x = np.arange(24, dtype=np.int32).reshape(2, 3, 4)[:, ::-1, ::2]
    source = """
        for (int i = 0; i < x_ndim; i++) { shape[i] = x_shape[i]; strides[i] = x_strides[i]; }
        first[0] = x[0];
    """
    shape, strides, first = run(
        source, {"x": x}, outputs=("shape", "strides", "first"), ensure_row_contiguous=False,
        out=[((3,), np.int32), ((3,), np.int64), ((1,), np.int32)], grid=(1, 1, 1))  # fmt: skip
    assert shape.tolist() == [2, 3, 2]
    assert strides.tolist() == [12, -4, 2]
    assert first[0] == 8


def test_template_arguments_and_scalars():
    a, b, c = normal(3, 6), np.array([3, 4, 5], np.int32), normal(2, 2).astype(ml_dtypes.bfloat16)
    source = """
        uint elem = thread_position_in_grid.x;
        T tmp = a[0];
        if (e) {
            out1[elem] = a[1] + b[2] + c[3] + d + f;
        } else {
            out1[elem] = 1;
        }
        out2[elem] = a[1] + b[2] + c[1] - d;
    """
    out1, out2 = run(
        source, {"a": a, "b": b, "c": c, "d": 7.3}, outputs=("out1", "out2"), grid=(6, 1, 1), threadgroup=(2, 1, 1),
        out=[((3, 2), F32), ((3, 2), np.int32)], template=[("e", True), ("f", 3), ("T", np.float16)])  # fmt: skip
    flat = c.astype(F32).ravel()
    np.testing.assert_allclose(out1, np.full((3, 2), a[0, 1] + 5 + flat[3] + 7.3 + 3), rtol=1e-5)
    assert (out2 == int(a[0, 1] + 5 + flat[1] - F32(7.3))).all()


def test_helper_in_header():
    a = normal(2, 2)
    header = "template <typename T> T do_exp(T x) { return metal::precise::exp(x); }"
    source = "uint elem = thread_position_in_grid.x; out[elem] = do_exp(a[elem]);"
    out = run(source, {"a": a}, out=(a.shape, F32), grid=(4, 1, 1), threadgroup=(2, 1, 1), header=header)
    np.testing.assert_allclose(out, np.exp(a), rtol=1e-6)


def test_threadgroup_is_cut_to_the_grid():
    assert run("out[0] = threads_per_threadgroup.x;", {}, out=((1,), np.uint32), grid=(2, 1, 1), threadgroup=(64, 1, 1))


def test_one_name_two_sources():
    x = np.arange(32, dtype=F32)
    doubled = run(
        "uint e = thread_position_in_grid.x; out[e] = x[e] * 2.0f;", {"x": x}, out=((32,), F32), grid=(32, 1, 1)
    )
    moved = run(
        "uint e = thread_position_in_grid.x; out[e] = x[e] + 100.0f;", {"x": x}, out=((32,), F32), grid=(32, 1, 1)
    )
    assert np.array_equal(doubled, x * 2)
    assert np.array_equal(moved, x + 100)


ALIGNED = {
    "alignas": "struct alignas(32) Q { float4 a, b; };",
    "no vector": "struct alignas(16) Q { float v[8]; };",
    "attribute": "struct __attribute__((aligned(16))) Q { float v[8]; };",
    "behind": "struct Q { float v[8]; } __attribute__((aligned(32)));",
    "template": "template <typename T, int n> struct alignas(n * sizeof(T)) V { T v[n]; }; using Q = V<float, 8>;",
}


@pytest.mark.parametrize(
    "body", ["((device Q*)out)[0] = q;", "threadgroup Q s[2]; s[1] = q; ((device Q*)out)[0] = s[1];"]
)
@pytest.mark.parametrize("header", ALIGNED.values(), ids=ALIGNED)
def test_aligned_structs_in_an_array_that_begins_anywhere(header, body):
    raw = np.zeros(80, F32)
    x = raw[-raw.ctypes.data % 64 // 4 + 1 :][:8]
    x[:] = range(8)
    body = 'static_assert(sizeof(Q) == 32 && alignof(Q) >= 16, ""); Q q = ((const device Q*)x)[0]; ' + body
    assert (run(body, {"x": x}, out=((8,), F32), grid=(1, 1, 1), header=header) == x).all()


def test_aligned_structs_are_aggregates():
    body = "struct alignas(16) Q { float x, y, z; }; Q q = {1, 2, 3}, r{4}; out[0] = q.x + q.y + q.z; out[1] = r.x;"
    assert run(body, {}, out=((2,), F32), grid=(1, 1, 1)).tolist() == [6, 4]


def test_arms_of_any_kind():
    """void, bit-fields, swizzles, scalars beside 16-bit vectors."""
    body = """
        float ab = 0; i >= 0 ? (void)(ab = 3) : (void)0; out[0] = ab;
        struct B { int f : 4, g : 4; } b = {3, 5}; out[1] = i > 0 ? b.f : b.g;
        float4 v(1, 2, 3, 4); float2 w = i > 0 ? v.xy : v.zw; out[2] = w.x;
        half4 h = 1; out[3] = (i > 0 ? h : 0.0f).w; half one = 1; out[4] = i > 0 ? 7 : one;"""
    got = run(body.replace("i >", "thread_position_in_grid.x >"), {}, out=((5,), F32), grid=(1, 1, 1))
    assert got.tolist() == [3, 5, 3, 0, 1]


def test_16_bit_vectors_of_other_scalars():
    body = "half4 r = 0; r = 2.5f; half4 u = x[1]; bfloat2 b = 3; out[0] = r.x + u.y; out[1] = b.y;"
    assert run(body, {"x": np.array([1, 4], F32)}, out=((2,), F32), grid=(1, 1, 1)).tolist() == [6.5, 3]


@pytest.mark.parametrize("mode", ["safe", "relaxed", "fast"])
def test_infinity_and_nan_count_in_every_math_mode(mode):
    body = """
        float m = -INFINITY; for (int k = 0; k < 4; k++) m = max(m, x[k] + (k > 1 ? -INFINITY : 0.0f));
        out[0] = m; out[1] = exp(x[1] - INFINITY); out[2] = isnan(x[1] * NAN); out[3] = isinf(x[1] / 0.0f);"""
    x = np.arange(4, dtype=F32)
    got = run(body, {"x": x}, out=((4,), F32), grid=(1, 1, 1), compile_options={"math_mode": mode})
    assert got.tolist() == [1, 0, 1, 1]


def test_math_mode():
    source = """
        #if defined(__FAST_MATH__) && __FAST_MATH__
        out[0] = 1;
        #else
        out[0] = metal::exp(-INFINITY) == 0 ? 0 : 2;
        #endif
    """
    for mode, expected in (("safe", 0), ("relaxed", 0), ("fast", 1)):
        got = run(source, {}, out=((1,), np.int32), grid=(1, 1, 1), compile_options={"math_mode": mode})
        assert got[0] == expected, mode


def test_dtypes_of_one_kernel():
    kernel = metal_kernel(name="twice", input_names=["x"], output_names=["out"],
                          source="uint i = thread_position_in_grid.x; out[i] = x[i] + x[i];")  # fmt: skip
    names = [
        "float32",
        "float16",
        "bfloat16",
        "float64",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "complex64",
    ]
    for name in names:
        dtype = ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)
        x = np.arange(5).astype(dtype)
        (out,) = kernel(inputs=[x], output_shapes=[(5,)], output_dtypes=[dtype], grid=(5, 1, 1), threadgroup=(5, 1, 1))
        assert out.dtype == dtype, name
        assert np.array_equal(out.astype(complex), 2 * np.arange(5)), name


GRID_SAMPLE = """
    uint elem = thread_position_in_grid.x;
    int H = x_shape[1];
    int W = x_shape[2];
    int C = x_shape[3];
    int padded = ceildiv(C, threads_per_simdgroup) * threads_per_simdgroup;
    int gH = grid_shape[1];
    int gW = grid_shape[2];
    uint at = elem / padded * 2;
    float ix = ((grid[at] + 1) * W - 1) / 2;
    float iy = ((grid[at + 1] + 1) * H - 1) / 2;
    int x0 = floor(ix), y0 = floor(iy);
    int channel = elem % padded, batch = elem / padded / gH / gW;
    T gix = T(0), giy = T(0);
    if (channel < C) {
        T cot = cotangent[elem / padded * C + channel];
        for (int corner = 0; corner < 4; corner++) {
            int cx = x0 + (corner & 1), cy = y0 + (corner >> 1);
            if (cx < 0 || cx >= W || cy < 0 || cy >= H) continue;
            T wx = 1 - metal::abs(ix - cx), wy = 1 - metal::abs(iy - cy);
            int offset = ((batch * H + cy) * W + cx) * C + channel;
            atomic_fetch_add_explicit(&x_grad[offset], wx * wy * cot, memory_order_relaxed);
            gix += (corner & 1 ? 1 : -1) * wy * x[offset] * cot;
            giy += (corner >> 1 ? 1 : -1) * wx * x[offset] * cot;
        }
    }
    gix = simd_sum(gix);
    giy = simd_sum(giy);
    if (thread_index_in_simdgroup == 0) {
        atomic_fetch_add_explicit(&grid_grad[at], gix * (W / 2), memory_order_relaxed);
        atomic_fetch_add_explicit(&grid_grad[at + 1], giy * (H / 2), memory_order_relaxed);
    }
"""


@pytest.mark.parametrize("channels", [4, 40])
def test_atomic_gradient_of_grid_sample(channels):
    batch, height, width, rows, columns = 2, 6, 8, 5, 3
    x, cotangent = normal(batch, height, width, channels), normal(batch, rows, columns, channels, seed=8)
    grid = np.random.default_rng(9).uniform(-1.1, 1.1, (batch, rows, columns, 2)).astype(F32)
    padded = (channels + 31) // 32 * 32
    x_grad, grid_grad = run(
        GRID_SAMPLE, {"x": x, "grid": grid, "cotangent": cotangent}, outputs=("x_grad", "grid_grad"),
        out=[(x.shape, F32), (grid.shape, F32)], grid=(batch * rows * columns * padded, 1, 1),
        threadgroup=(256, 1, 1), template=[("T", F32)], atomic_outputs=True, init_value=0)  # fmt: skip

    expected_x, expected_grid = np.zeros(x.shape), np.zeros(grid.shape)
    for b, r, c in np.ndindex(batch, rows, columns):
        ix = ((float(grid[b, r, c, 0]) + 1) * width - 1) / 2
        iy = ((float(grid[b, r, c, 1]) + 1) * height - 1) / 2
        for corner in range(4):
            cx, cy = int(np.floor(ix)) + corner % 2, int(np.floor(iy)) + corner // 2
            if not (0 <= cx < width and 0 <= cy < height):
                continue
            wx, wy = 1 - abs(ix - cx), 1 - abs(iy - cy)
            expected_x[b, cy, cx] += wx * wy * cotangent[b, r, c]
            dot = float(x[b, cy, cx].astype(float) @ cotangent[b, r, c])
            expected_grid[b, r, c, 0] += (1 if corner % 2 else -1) * wy * dot * (width // 2)
            expected_grid[b, r, c, 1] += (1 if corner // 2 else -1) * wx * dot * (height // 2)
    np.testing.assert_allclose(x_grad, expected_x, atol=1e-4)
    np.testing.assert_allclose(grid_grad, expected_grid, atol=2e-3)


# ---- positions -----------------------------------------------------------------------------------------------------

VECTORS = ["thread_position_in_grid", "thread_position_in_threadgroup", "threadgroup_position_in_grid",
           "threadgroups_per_grid", "threads_per_grid", "threads_per_threadgroup",
           "dispatch_threads_per_threadgroup", "grid_origin", "grid_size"]  # fmt: skip
SCALARS = ["thread_index_in_threadgroup", "thread_index_in_simdgroup", "simdgroup_index_in_threadgroup",
           "simdgroups_per_threadgroup", "dispatch_simdgroups_per_threadgroup", "threads_per_simdgroup",
           "thread_execution_width", "thread_index_in_quadgroup", "quadgroup_index_in_threadgroup",
           "quadgroups_per_threadgroup", "dispatch_quadgroups_per_threadgroup"]  # fmt: skip


@pytest.mark.parametrize("meet", [False, True], ids=["loop", "threads"])
@pytest.mark.parametrize(
    ("grid", "group"),
    [
        ((8, 4, 2), (4, 2, 1)),
        ((7, 5, 3), (4, 2, 2)),
        ((70, 1, 1), (64, 1, 1)),
        ((70, 3, 2), (64, 1, 1)),
        ((1, 70, 2), (1, 8, 1)),
        ((3, 3, 3), (9, 9, 9)),
    ],
)
def test_attributes(grid, group, meet):
    """Each attribute for each thread, also where the threadgroup does not divide the grid."""
    body = f"uint3 p = thread_position_in_grid; uint at = (p.z * {grid[1]} + p.y) * {grid[0]} + p.x;"
    body += "".join(f"v[(at * {len(VECTORS)} + {i}) * 3 + 0] = {n}.x; v[(at * {len(VECTORS)} + {i}) * 3 + 1] = {n}.y;"
                    f"v[(at * {len(VECTORS)} + {i}) * 3 + 2] = {n}.z;" for i, n in enumerate(VECTORS))  # fmt: skip
    body += "".join(f"s[at * {len(SCALARS)} + {i}] = {n};" for i, n in enumerate(SCALARS))
    if meet:
        body += "threadgroup_barrier(mem_flags::mem_device);"
    count = int(np.prod(grid))
    v, s = run(body, {}, outputs=("v", "s"), grid=grid, threadgroup=group, init_value=-1,
               out=[((count, len(VECTORS), 3), np.int32), ((count, len(SCALARS)), np.int32)])  # fmt: skip
    group = np.minimum(group, grid)
    groups = -(-np.array(grid) // group)
    for z, y, x in np.ndindex(grid[::-1]):
        position = np.array([x, y, z])
        of_group, local = position // group, position % group
        extent = np.minimum(group, grid - of_group * group)
        index = (local[2] * extent[1] + local[1]) * extent[0] + local[0]
        threads, nominal = int(extent.prod()), int(group.prod())
        at = (z * grid[1] + y) * grid[0] + x
        assert v[at].tolist() == [*map(list, [position, local, of_group, groups, grid, extent, group, [0, 0, 0], grid])]
        assert s[at].tolist() == [index, index % 32, index // 32, -(-threads // 32), -(-nominal // 32), 32, 32,
                                  index % 4, index // 4, -(-threads // 4), -(-nominal // 4)]  # fmt: skip


def test_one_kernel_in_threadgroups_of_every_shape():
    """What is compiled for threadgroups along x serves no others."""
    kernel = metal_kernel(
        name="shapes",
        input_names=[],
        output_names=["out"],
        source="""uint3 p = thread_position_in_grid, n = threads_per_grid, l = thread_position_in_threadgroup;
                  out[(p.z * n.y + p.y) * n.x + p.x] = l.x + 100 * l.y + 10000 * l.z + 1000000 * simd_max(l.y);""",
    )
    for group in [(64, 1, 1), (16, 4, 1), (64, 1, 1), (8, 2, 2), (32, 1, 1), (4, 16, 1)]:
        (out,) = kernel(
            inputs=[],
            grid=(64, 16, 2),
            threadgroup=group,
            output_shapes=[(2, 16, 64)],
            output_dtypes=[np.int32],
        )
        z, y, x = np.indices((2, 16, 64))
        local = x % group[0] + 100 * (y % group[1]) + 10000 * (z % group[2])
        index = (z % group[2] * group[1] + y % group[1]) * group[0] + x % group[0]
        last = np.minimum(index // 32 * 32 + 31, np.prod(group) - 1)  # of the simdgroup
        first = index // 32 * 32
        rows = np.max([np.minimum(first + i, last) // group[0] % group[1] for i in range(32)], axis=0)
        assert np.array_equal(out, local + 1000000 * rows)


# ---- threads that meet ---------------------------------------------------------------------------------------------


def test_sum_over_a_threadgroup():
    x = normal(1000)
    source = """
        threadgroup float shared[32];
        uint i = thread_position_in_grid.x;
        float sum = simd_sum(x[i]);
        if (thread_index_in_simdgroup == 0) shared[simdgroup_index_in_threadgroup] = sum;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        sum = thread_index_in_simdgroup < simdgroups_per_threadgroup ? shared[thread_index_in_simdgroup] : 0.0f;
        out[i] = simd_sum(sum);
    """
    out = run(source, {"x": x}, out=((1000,), F32), grid=(1000, 1, 1), threadgroup=(256, 1, 1))
    for begin in range(0, 1000, 256):
        np.testing.assert_allclose(out[begin : begin + 256], x[begin : begin + 256].astype(float).sum(), atol=1e-4)


def test_barriers_in_loops():
    x = np.arange(512, dtype=np.int32)
    source = """
        threadgroup int shared[2][N];
        uint i = thread_position_in_threadgroup.x;
        shared[0][i] = x[thread_position_in_grid.x];
        int from = 0;
        for (uint step = 1; step < N; step *= 2) {
            threadgroup_barrier(mem_flags::mem_threadgroup);
            shared[1 - from][i] = shared[from][i] + (i >= step ? shared[from][i - step] : 0);
            from = 1 - from;
        }
        out[thread_position_in_grid.x] = shared[from][i];
    """
    out = run(
        source, {"x": x}, out=((512,), np.int32), grid=(512, 1, 1), threadgroup=(128, 1, 1), template=[("N", 128)]
    )
    assert np.array_equal(out, np.cumsum(x.reshape(4, 128), axis=1).ravel())


LANES = np.arange(32)


def exchange(body, **more):
    """out[lane] after `body` has set `r`, for one simdgroup."""
    source = "int lane = thread_index_in_simdgroup; int r = -1;\n" + textwrap.dedent(body) + "\nout[lane] = r;"
    return run(source, {}, out=((32,), np.int32), grid=(32, 1, 1), **more)


def test_both_branches_meet_among_themselves():
    got = exchange("if (lane < 10) { r = simd_sum(lane); } else { r = simd_sum(1); }")
    assert got.tolist() == [45] * 10 + [22] * 22


def test_lanes_meet_again_behind_a_branch():
    got = exchange("if (lane % 2) { r = simd_sum(1); } else { r = 100; } r = simd_sum(r);")
    assert (got == 16 * 16 + 16 * 100).all()


def test_loops_of_different_lengths():
    got = exchange("r = 0; for (int i = 0; i < lane; i++) r += simd_sum(1); r = r * 100 + simd_sum(1);")
    expected = [sum(int((i < LANES).sum()) for i in range(lane)) * 100 + 32 for lane in LANES]
    assert got.tolist() == expected


def test_iterations_that_some_lanes_skip():
    got = exchange("r = 0; for (int i = 0; i < 8; i++) { if ((lane + i) % 2) continue; r += simd_sum(1 << i); }")
    expected = [sum((1 << i) * 16 for i in range(8) if (lane + i) % 2 == 0) for lane in LANES]
    assert got.tolist() == expected


def test_nested_loops():
    got = exchange("""
        r = 0;
        for (int i = 0; i < 3; i++) {
            int j = 0;
            while (j < lane % 3) { r += simd_sum(1 << i); j++; }
            do { r += simd_sum(1000); j++; } while (j < 2);
        }
    """)
    expected = []
    for lane in LANES:
        total = 0
        for i in range(3):
            for j in range(lane % 3):
                total += (1 << i) * int((j < LANES % 3).sum())
            for step in range(max(1, 2 - lane % 3)):
                total += 1000 * int((np.maximum(1, 2 - LANES % 3) > step).sum())
        expected.append(total)
    assert got.tolist() == expected


def test_one_function_from_two_places():
    header = """
        template <typename T>
        T total(T x) { T sum = simd_sum(x); return sum; }
        inline int twice(int x) { return 2 * total(x); }
    """
    got = exchange("if (lane < 8) r = twice(1); else r = total(lane); r += twice(1);", header=header)
    assert got.tolist() == [16 + 64] * 8 + [int(LANES[8:].sum()) + 64] * 24


def test_lambda_and_method():
    header = "struct Adder { int scale; int add(int x) const thread { return scale * simd_sum(x); } };"
    got = exchange("""
        auto total = [&](int x) { return simd_sum(x); };
        Adder adder = {10};
        if (lane % 4 == 0) r = total(1); else if (lane % 4 == 1) r = total(2); else r = adder.add(1);
    """, header=header)  # fmt: skip
    assert got.tolist() == [[8, 16, 160, 160][lane % 4] for lane in LANES]


def test_lanes_that_have_ended():
    got = exchange("if (lane >= 20) { out[lane] = 7; return; } r = simd_sum(1);")
    assert got.tolist() == [20] * 20 + [7] * 12


def test_exchange_of_an_exchange():
    got = exchange("r = simd_max(simd_sum(lane < 4 ? lane : 0)) + simd_shuffle_xor(simd_min(lane), 1);")
    assert (got == 6).all()


def test_divergent_exchanges_of_several_types():
    got = exchange("""
        if (lane < 8) { r = int(simd_sum(1.5f)); }
        else if (lane < 16) { r = int(simd_sum(ulong(3000000000)) / 1000000000); }
        else { float4 v = simd_sum(float4(1, 2, 3, 4)); r = int(v.w); }
    """)
    assert got.tolist() == [12] * 8 + [24] * 8 + [64] * 16


def test_partial_simdgroup():
    source = "out[thread_position_in_grid.x] = simd_sum(1) * 100 + popcount(uint(ulong(simd_active_threads_mask())));"
    out = run(source, {}, out=((40,), np.int32), grid=(40, 1, 1), threadgroup=(40, 1, 1))
    assert out.tolist() == [3232] * 32 + [808] * 8


def test_simdgroups_do_not_wait_for_each_other():
    source = """
        uint i = thread_position_in_grid.x, r = 0;
        if (simdgroup_index_in_threadgroup == 1) { for (int k = 0; k < 5; k++) r += simd_sum(1); }
        threadgroup_barrier(mem_flags::mem_none);
        out[i] = r + simd_sum(1);
    """
    out = run(source, {}, out=((96,), np.uint32), grid=(96, 1, 1), threadgroup=(96, 1, 1))
    assert out.tolist() == [32] * 32 + [192] * 32 + [32] * 32


def test_simdgroups_keep_pace():
    """Threadgroup memory that is read, reduced and written again with no barrier in between."""
    rows, width = 3, 3000
    x = normal(rows, width)
    source = """
        threadgroup float shared[32];
        uint lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
        uint y = thread_position_in_grid.y;
        float most = -1e30f, sum = 0;
        for (uint i = thread_index_in_threadgroup; i < WIDTH; i += 1024) most = max(most, x[y * WIDTH + i]);
        most = simd_max(most);
        if (lane == 0) shared[simdgroup] = most;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        most = simd_max(shared[lane]);
        for (uint i = thread_index_in_threadgroup; i < WIDTH; i += 1024) sum += exp(x[y * WIDTH + i] - most);
        sum = simd_sum(sum);
        if (lane == 0) shared[simdgroup] = sum;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        sum = simd_sum(shared[lane]);
        out[y * 1024 + thread_position_in_grid.x] = most + log(sum);
    """
    b = run(source, {"x": x}, out=((rows, 1024), F32), grid=(1024, rows, 1), threadgroup=(1024, 1, 1),
            template=[("WIDTH", width)])  # fmt: skip
    expected = np.log(np.exp(x.astype(np.float64)).sum(-1, keepdims=True))
    np.testing.assert_allclose(b, np.broadcast_to(expected, b.shape), rtol=1e-5)


def test_threadgroup_variables_of_many_kinds():
    source = """
        threadgroup int plain, other;
        threadgroup float4 vectors[4], *pointer = vectors;
        threadgroup atomic_int counter;
        const threadgroup float4 &first = pointer[0];
        uint i = thread_position_in_threadgroup.x;
        if (i == 0) { plain = 5; other = 7; atomic_store_explicit(&counter, 0, memory_order_relaxed); }
        if (i < 4) vectors[i] = float4(i, 1, 2, 3);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        atomic_fetch_add_explicit(&counter, 1, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        threadgroup vec<int, 2> pair[N / 2];
        if (i < N / 2) pair[i].y = i;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        out[i] = plain + other + int(vectors[3].x) + int(first.y) + pair[N / 2 - 1].y +
            atomic_load_explicit(&counter, memory_order_relaxed);
    """
    out = run(source, {}, out=((64,), np.int32), grid=(64, 1, 1), threadgroup=(64, 1, 1), template=[("N", 64)])
    assert (out == 5 + 7 + 3 + 1 + 31 + 64).all()


def test_large_private_arrays():
    """Beyond the usual stack of a thread."""
    source = """
        float values[20000];
        uint i = thread_position_in_grid.x;
        for (int k = 0; k < 20000; k++) values[k] = x[(k * 7 + i) % 64];
        threadgroup_barrier(mem_flags::mem_none);
        float sum = 0;
        for (int k = 0; k < 20000; k++) sum += values[(k * int(x[1])) % 20000];
        out[i] = sum + simd_sum(1.0f);
    """
    x = np.ones(64, F32)
    out = run(source, {"x": x}, out=((64,), F32), grid=(64, 1, 1), threadgroup=(64, 1, 1))
    assert (out == 20032).all()


@pytest.mark.parametrize("body", [*metal_cases.LOCKSTEP, *metal_cases.NOT_IN_LOCKSTEP])
def test_lockstep(tmp_path, monkeypatch, body):
    """Bodies give the same in lockstep as with a stack for each thread, which counted iterations ask for."""
    monkeypatch.setenv("METALLOID_CACHE", str(tmp_path))
    text = (metal_cases.LOCKSTEP | metal_cases.NOT_IN_LOCKSTEP)[body]
    source = f"uint i = thread_position_in_grid.x; int s = 0;\n{text}\ny[i] = s;"
    x = np.random.default_rng(3).integers(0, 50, 129, dtype=np.int32)
    results = [
        run(source, {"x": x, "n0": 0 if body == "guarded" else 3}, out=((128,), np.int32), outputs=("y",),
            grid=(128, 1, 1), threadgroup=(group, 1, 1), template=[("N", 5)], init_value=0,
            header="#define TOTAL(x) simd_sum(x)", debug_options=options)
        for group in (64, 40)
        for options in ({}, {"max_iterations": 1 << 40})
    ]  # fmt: skip
    objects = [b"mtl_kernel_lockstep" in entry.read_bytes() for entry in entries(tmp_path)]
    assert any(objects) == (body in metal_cases.LOCKSTEP)
    assert results[0].tolist() == results[1].tolist()
    assert results[2].tolist() == results[3].tolist()


def test_simdgroups_see_what_others_wrote():
    """In an output as in threadgroup memory: it is written by others between two barriers."""
    source = """
        uint group = threadgroup_position_in_grid.x, i = thread_index_in_threadgroup;
        if (i == 0) out[group] = 5;
        threadgroup_barrier(mem_flags::mem_device);
        if (i == 40) out[group] += 4;
        threadgroup_barrier(mem_flags::mem_device);
        if (i == 0) out[group] += 10 * out[group];
    """
    assert run(source, {}, out=((5,), np.int32), grid=(320, 1, 1), threadgroup=(64, 1, 1)).tolist() == [99] * 5


@pytest.mark.parametrize("count", [1, 2])
def test_threads_of_the_pool(threads, count):
    threads(count)
    x = normal(300_000)
    source = "uint i = thread_position_in_grid.x; out[i] = simd_sum(x[i]);"
    out = run(source, {"x": x}, out=(x.shape, F32), grid=(x.size, 1, 1), threadgroup=(96, 1, 1))
    expected = np.repeat(x.astype(float).reshape(-1, 32).sum(1), 32)
    np.testing.assert_allclose(out, expected, atol=1e-4)


# ---- errors --------------------------------------------------------------------------------------------------------


def test_barrier_that_some_threads_do_not_reach():
    source = "if (thread_position_in_grid.x == 3) return; threadgroup_barrier(mem_flags::mem_none); out[0] = 1;"
    for _ in range(3):
        with pytest.raises(RuntimeError, match=r"kernel test: 1 of the 64 threads of threadgroup \(0, 0, 0\)"):
            run(source, {}, out=((1,), np.int32), grid=(128, 1, 1), threadgroup=(64, 1, 1))
    assert exchange("r = simd_sum(1);")[0] == 32  # and the next one runs


@pytest.mark.parametrize(
    "loop", ["while (x[0] > 0) { n++; }", "for (;;) n++;", "do n++; while (x[0] > 0);", "while (n++, x[0] > 0);"]
)
def test_kernel_that_never_ends(loop):
    with pytest.raises(RuntimeError, match="more than 1000 iterations"):
        run(f"int n = 0; {loop} out[0] = n;", {"x": np.ones(1, F32)}, out=((1,), np.int32), grid=(1, 1, 1),
            debug_options={"max_iterations": 1000})  # fmt: skip


def test_counted_kernel_that_ends():
    source = "int n = 0; for (int i = 0; i < 100; i++) { if (i % 2) n++; else n += 2; } out[0] = n;"
    assert run(source, {}, out=((1,), np.int32), grid=(1, 1, 1), debug_options={"max_iterations": 100})[0] == 150


@pytest.mark.parametrize(
    ("body", "threads", "options"),
    [
        ("while (k++ < 1u << 31 && x[0] > 0);", 1, {"max_iterations": 1 << 33}),
        ("while (k++ < 1u << 26 && x[0] > 0) k += simd_sum(1u) - 32;", 32, {}),
        ("while (k++ < 1u << 26 && x[0] > 0) threadgroup_barrier(mem_flags::mem_none);", 64, {}),
        ("while (k++ < 1u << 25 && x[0] > 0) if (x[1] > 0 && simd_any(true)) k += x[2] < 0;", 64, {}),
        ("for (int n = 0; n < 9999; n++) k = k * 3 + uint(x[n % 32]);", 1 << 26, {}),
    ],
)
def test_control_c(body, threads, options):
    def launch():
        return run(f"uint k = 0; {body} if (k == 77) out[0] = k;", {"x": np.ones(64, F32)}, out=((1,), F32),
                   grid=(threads, 1, 1), threadgroup=(min(threads, 64), 1, 1), debug_options=options)  # fmt: skip

    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    pressed = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    pressed.start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        launch()
    assert 0.4 < time.monotonic() - begun < 5
    pressed.join()
    assert exchange("r = simd_sum(1);")[0] == 32


def test_a_handler_of_the_programs_lets_kernels_end():
    came = []
    before = signal.signal(signal.SIGINT, lambda *_: came.append(1))
    try:
        pressed = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        pressed.start()
        source = (
            "uint k = 0; while (k < 1u << 24 && x[0] > 0) k += simd_sum(1u) / 16; out[thread_position_in_grid.x] = k;"
        )
        out = run(source, {"x": np.ones(64, F32)}, out=((64,), F32), grid=(64, 1, 1), threadgroup=(64, 1, 1))
        pressed.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert (out == 1 << 24).all()
    assert came == [1]


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_division_without_a_quotient(dtype):
    """By zero, and of the smallest integer by -1: some value, where x86's own instruction ends the process."""
    least = int(np.iinfo(dtype).min)
    x = np.array([7, 0, least, least, least, 100, 7], dtype)
    d = np.array([0, 0, 0, -1 if least else 1, 3, 7, 2], dtype)
    source = """
        uint i = thread_position_in_grid.x;
        MEET
        T a = x[i], b = d[i], c = a, e = a;
        c /= b;
        e %= b;
        out[i] = a / b + (OVER(a, b) - c) + quotient(0, b) * 0 + (vec<T, 2>(1, a) / vec<T, 2>(2, b)).x;
        mod[i] = a % b + (e - a % b) + (vec<T, 4>(a) % vec<T, 2>(b).yxxy).x - (vec<T, 3>(a) % b).z + T(1 / (a - a)) * 0;
    """
    header = """
        #define OVER(a, b) ((a) / (b))
        template <class T> inline T quotient(int a, T b) { return a / b; }
        inline int twice(int x) { return simd_sum(x) * 2; }
    """
    for meet, debug in (("", False), ("simd_sum(1);", False), ("twice(1);", False), ("", True))[: 4 if least else 1]:
        kernel = metalloid.fast.metal_kernel(
            "over", ["x", "d"], ["out", "mod"], source.replace("MEET", meet), header, debug_options={"debug": debug}
        )
        out, mod = kernel(inputs=[x, d], output_shapes=[x.shape] * 2, output_dtypes=[dtype] * 2, grid=(7, 1, 1),
                          threadgroup=(7, 1, 1), template=[("T", dtype)])  # fmt: skip
        assert out[4:].tolist() == [-(-least // 3), 14, 3]
        assert mod[3:].tolist() == [0, -(-least % 3), 2, 1]


def test_compile_error_in_source():
    source = "uint i = thread_position_in_grid.x;\n\n  out[i] = missing[i] * 2.0;\n"
    with pytest.raises(RuntimeError, match=r"kernel test does not compile\nsource:3:12: error: .*'missing'"):
        run(source, {}, out=((1,), F32), grid=(1, 1, 1))


def test_compile_error_in_header():
    header = "#include <metal_stdlib>\nusing namespace metal;\nfloat f(device float* x) {\n  return undeclared;\n}\n"
    with pytest.raises(RuntimeError, match=r"header:4:10: error"):
        run("out[0] = f(out);", {}, out=((1,), F32), grid=(1, 1, 1), header=header)


@pytest.mark.parametrize("body", ["", "if (simd_sum(1) > 0) "], ids=["lockstep", "threads"])
@pytest.mark.parametrize("barrier", ["threadgroup_barrier", "simdgroup_barrier"])
def test_a_barriers_argument_is_compiled(barrier, body):
    with pytest.raises(RuntimeError, match=r"source:2:.*'mem_thredgroup'"):
        run(f"\n{body}{barrier}(mem_flags::mem_thredgroup); out[0] = 1;", {}, out=((1,), F32), grid=(1, 1, 1))


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("int n = 7 / int(i + 1) / missing; out[i] = n;", "missing"),
        ("out[i] = simd_sum(out[i]) + missing;", "missing"),
        ("threadgroup float s[4]; s[i] = 1.0h; out[i] = s[i] +  missing;", "missing"),
        ("\tout[i] = 1 / i + missing; // of one", "missing"),
    ],
)
def test_compile_errors_quote_the_users_line(line, wrong):
    source = f"uint i = thread_position_in_grid.x;\n{line}\n"
    with pytest.raises(RuntimeError) as raised:
        metal_kernel("quoted", [], ["out"], source)(
            inputs=[], output_shapes=[(4,)], output_dtypes=[F32], grid=(4, 1, 1), threadgroup=(4, 1, 1)
        )
    message = str(raised.value)
    assert f"source:2:{line.index(wrong) + 1}: error: use of undeclared identifier" in message
    assert line in message.expandtabs() or line in message
    assert "__mtl" not in message


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("kernel void f(device float* out) {\n  out[0] = 1;\n}", "source:1: source is a kernel's body alone"),
        ("out[0] = 1;\nif (out[0]) {\n  out[0] = 2;\n", "source:2: the braces do not balance"),
        (
            "\natomic_fetch_add_explicit(&out[0], 1.0f, memory_order_relaxed);",
            "source:2: atomic_fetch_add_explicit needs an atomic, and out is none: .* with atomic_outputs=True",
        ),
    ],
)
def test_compile_errors_say_what_is_meant(source, hint):
    with pytest.raises(RuntimeError, match=f"does not compile\n{hint}"):
        run(source, {}, out=((1,), F32), grid=(1, 1, 1))


def test_textures_are_refused_in_words():
    with pytest.raises(RuntimeError, match=r"source:1.*(not supported|texture)"):
        run("texture2d<float> t; out[0] = 1;", {}, out=((1,), F32), grid=(1, 1, 1))


SOUND = {"inputs": [np.ones(4, F32)], "output_shapes": [(4,)], "output_dtypes": [F32], "grid": (4, 1, 1),
         "threadgroup": (4, 1, 1)}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"inputs": []}, "inputs must have 1"),
        ({"output_shapes": []}, "output_shapes must have 1"),
        ({"output_dtypes": [F32, F32]}, "output_dtypes must have 1"),
        ({"output_dtypes": ["nonsense"]}, "is no dtype"),
        ({"output_dtypes": [float]}, "is no dtype"),
        ({"output_dtypes": [np.complex128]}, "kernels have no dtype complex128"),
        ({"output_shapes": [(-1,)]}, "output_shapes must lie in 0..2^63 - 1"),
        ({"output_shapes": [(2**63,)]}, "output_shapes must lie in 0..2^63 - 1"),
        ({"output_shapes": [(1.5,)]}, "output_shapes must consist of integers"),
        ({"output_shapes": ["4"]}, "output_shapes must consist of integers"),
        ({"init_value": 2**2000}, "init_value must be a number"),
        ({"init_value": "zero"}, "init_value must be a number"),
        ({"grid": (0, 1, 1)}, "at least 1"),
        ({"grid": (4, -1, 1)}, "at least 1"),
        ({"grid": (4, 1)}, "grid must be three"),
        ({"grid": (2**31, 1, 1)}, "grid must be 1 to"),
        ({"threadgroup": (1, 0, 1)}, "at least 1"),
        ({"threadgroup": (33, 32, 1), "grid": (64, 64, 1)}, "at most 1024 threads, got 1056"),
        ({"template": [("N", 1.0)]}, "template argument N must be"),
        ({"template": [("N", 2**70)]}, "template argument N must fit"),
        ({"template": [("N", np.float32(1))]}, "template argument N must be"),
        ({"inputs": [2**63]}, "inputs[0] must fit"),
        ({"template": [("T", "nonsense")]}, "is no dtype"),
        ({"template": [("T", 2**40)]}, "must fit in 32 bits"),
        ({"template": [("T; int x", 1)]}, "must be an identifier"),
        ({"template": [("int", 1)]}, "word of the language"),
        ({"template": [("T", 1), ("T", 2)]}, "two template arguments are called T"),
        ({"template": [("T", np.complex128)]}, "no dtype complex128"),
    ],
)
def test_arguments_that_are_refused(changed, message):
    kernel = metal_kernel(name="never", input_names=["x"], output_names=["y"], source="this would not compile")
    with pytest.raises(ValueError, match=re.escape(message)):
        kernel(**(SOUND | changed))


@pytest.mark.parametrize("name", ["", "a b", "$(touch x)", "a;b", "`id`", "../x", "é", "a'b", 'a"b', "a\nb", "-o"])
def test_names_are_identifiers(name):
    for made in (
        {"name": name, "input_names": [], "output_names": ["y"]},
        {"name": "k", "input_names": [name], "output_names": ["y"]},
        {"name": "k", "input_names": [], "output_names": [name]},
    ):
        with pytest.raises(ValueError, match="identifier"):
            metal_kernel(source="y[0] = 1;", **made)


def test_a_kernels_name_may_begin_with_a_digit():
    """MLX puts custom_kernel_ before it; parameters stand alone."""
    kernel = metal_kernel(name="2nd", input_names=[], output_names=["y"], source="y[0] = 2;")
    (y,) = kernel(inputs=[], output_shapes=[(1,)], output_dtypes=[F32], grid=(1, 1, 1), threadgroup=(1, 1, 1))
    assert y.tolist() == [2]
    with pytest.raises(ValueError, match=r"output_names\[0\] must be an identifier.*no digit first"):
        metal_kernel(name="k", input_names=[], output_names=["2nd"], source="")


@pytest.mark.parametrize("at", [4, 8, 12])
@pytest.mark.parametrize("contiguous", [True, False])
def test_vectors_in_buffers_that_are_not_aligned(at, contiguous):
    """A float4 is loaded and stored whole; slices and MLX's arrays begin anywhere."""
    n = 64
    source = """
        uint i = thread_position_in_grid.x;
        float4 sum = 0;
        for (int k = 0; k < 4; ++k) sum += ((const device float4*)x)[i * x_strides[0] / 4];
        *reinterpret_cast<device float4*>(y + 4 * i) = sum + ((device float4*)y)[i];
    """
    kernel = metalloid._native.Kernel("unaligned", ("x",), ("y",), source, ensure_row_contiguous=contiguous)
    memory = np.zeros(4 * n * 2 + 16, F32)
    first = -memory.ctypes.data % 16 // 4 + at // 4  # `at` bytes behind a multiple of 16
    x = np.lib.stride_tricks.as_strided(memory[first:], (n, 4), (32, 4))
    x[:] = np.arange(4 * n, dtype=F32).reshape(n, 4)
    before, y = x.copy(), np.zeros(4 * n + 8, F32)
    y = y[-y.ctypes.data % 16 // 4 + at // 4 :][: 4 * n]
    kernel.launch((x,), (y,), (n, 1, 1), (32, 1, 1), (), 1.0)
    assert (y.reshape(n, 4) == 4 * before + 1).all()
    assert (x == before).all()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"output_names": []}, "at least one name"),
        ({"output_names": ["x"]}, "x is the name of two"),
        ({"output_names": ["device"]}, "word of the language"),
        ({"output_names": ["thread_position_in_grid"]}, "name of a Metal attribute"),
        ({"input_names": ["thread_index_in_simdgroup"]}, "name of a Metal attribute"),
        ({"output_names": "y"}, "list of strings"),
        ({"compile_options": {"math_mode": "precise"}}, "math_mode must be"),
        ({"compile_options": {"unknown": 1}}, "no option 'unknown'"),
        ({"debug_options": {"max_iterations": -1}}, "must not be negative"),
        ({"source": "a\0b"}, "NUL"),
    ],
)
def test_definitions_that_are_refused(made, message):
    sound = {"name": "k", "input_names": ["x"], "output_names": ["y"], "source": "y[0] = x[0];"}
    with pytest.raises(ValueError, match=re.escape(message)):
        metal_kernel(**(sound | made))


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        ({"name": None}, TypeError, "name must be a string, got NoneType"),
        ({"name": b"k"}, TypeError, "name must be a string, got bytes"),
        ({"name": "\ud800"}, ValueError, "name must be text"),
        ({"source": b"y[0] = 1;"}, TypeError, "source must be a string, got bytes"),
        ({"source": None}, TypeError, "source must be a string, got NoneType"),
        ({"header": None}, TypeError, "header must be a string, got NoneType"),
        ({"input_names": None}, TypeError, "input_names must be a list of strings, got NoneType"),
        ({"input_names": b"x"}, TypeError, "input_names must be a list of strings, got bytes"),
        ({"input_names": {"x"}}, TypeError, "input_names must be a list of strings, got set"),
        ({"input_names": (c for c in "x")}, TypeError, "input_names must be a list of strings, got generator"),
        ({"input_names": ["a", 1]}, TypeError, "input_names[1] must be a string, got int"),
        ({"input_names": ["\ud800"]}, ValueError, "input_names[0] must be text"),
        ({"input_names": ["a\0"]}, ValueError, "input_names[0] must not contain NUL"),
        ({"input_names": ["x", "x"]}, ValueError, "x is the name of two"),
        ({"output_names": [None]}, TypeError, "output_names[0] must be a string, got NoneType"),
        ({"ensure_row_contiguous": None}, TypeError, "ensure_row_contiguous must be True or False, got NoneType"),
        ({"atomic_outputs": "no"}, TypeError, "atomic_outputs must be True or False, got str"),
        ({"compile_options": "safe"}, TypeError, "compile_options must be a dict, got str"),
        ({"compile_options": {"math_mode": ["safe"]}}, ValueError, "math_mode must be 'safe'"),
        ({"debug_options": 1}, TypeError, "debug_options must be a dict, got int"),
        ({"debug_options": {"debug": "no"}}, TypeError, "debug must be True or False, got str"),
        ({"debug_options": {"max_iterations": "1"}}, TypeError, "max_iterations must be an integer, got str"),
        ({"debug_options": {"max_iterations": 2**70}}, ValueError, "max_iterations must not be negative, or"),
    ],
)
def test_definitions_of_wrong_types(made, error, message):
    sound = {"name": "k", "input_names": ["x"], "output_names": ["y"], "source": "y[0] = x[0];"}
    with pytest.raises(error, match=f"^metal_kernel: {re.escape(message)}"):
        metal_kernel(**(sound | made))


HUGE = 10**5000  # Python does not print it


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"inputs": np.ones((1, 4), F32)}, TypeError, "inputs must be a list, got ndarray"),
        ({"inputs": [[1.0]]}, TypeError, "inputs[0] must be an array or a number, got list"),
        ({"inputs": ["1"]}, TypeError, "inputs[0] must be an array or a number, got str"),
        ({"inputs": [None]}, TypeError, "inputs[0] must be an array or a number, got NoneType"),
        ({"inputs": [np.ndarray]}, TypeError, "inputs[0] must be an array or a number, got type"),
        ({"inputs": [memoryview(b"1234")]}, TypeError, "inputs[0] must be an array or a number, got memoryview"),
        ({"inputs": [HUGE]}, ValueError, "inputs[0] must fit in 64 bits"),
        ({"inputs": [np.ma.masked_array([1.0], F32)]}, TypeError, "x is a masked array"),
        ({"inputs": [np.ma.masked]}, TypeError, "x is a masked array"),
        ({"inputs": [np.ones(4, ">f4")]}, ValueError, "x has the dtype >f4"),
        ({"inputs": [np.ones(4, [("a", F32)])]}, ValueError, "x has the dtype [('a', '<f4')]"),
        ({"output_shapes": None}, TypeError, "output_shapes must be a list, got NoneType"),
        ({"output_shapes": [None]}, ValueError, "output_shapes must consist of integers, got None"),
        ({"output_shapes": [HUGE]}, ValueError, "output_shapes must lie in 0..2^63 - 1"),
        ({"output_shapes": [(2**62, 2)]}, ValueError, "output_shapes must have at most 64 axes and 2^60 - 1 elements"),
        ({"output_shapes": [(1,) * 65]}, ValueError, "output_shapes must have at most 64 axes"),
        ({"output_dtypes": F32}, TypeError, "output_dtypes must be a list, got type"),
        ({"output_dtypes": [{}]}, ValueError, "output_dtypes: {} is no dtype"),
        ({"grid": None}, ValueError, "grid must be three integers, got None"),
        ({"grid": (4, 1, 1, 1)}, ValueError, "grid must be three integers, got (4, 1, 1, 1)"),
        ({"grid": (HUGE, 1, 1)}, ValueError, "grid and threadgroup are too large"),
        ({"threadgroup": 4}, ValueError, "threadgroup must be three integers, got 4"),
        ({"threadgroup": (4.0, 1, 1)}, ValueError, "threadgroup must be three integers, got (4.0, 1, 1)"),
        ({"template": {"T": 1}}, TypeError, "template must be a list of pairs (name, value), got dict"),
        ({"template": ["T1"]}, TypeError, "template must consist of pairs (name, value), got 'T1'"),
        ({"template": [(HUGE, 1)]}, TypeError, "template must consist of pairs (name, value), got tuple"),
        ({"template": [("\ud800", 1)]}, ValueError, "the name of a template argument must be text"),
        ({"template": [("T\0", 1)]}, ValueError, "the name of a template argument must not contain NUL"),
        ({"template": [("T", HUGE)]}, ValueError, "template argument T must fit in 32 bits"),
        ({"template": [("T", None)]}, ValueError, "template argument T must be an int, a bool or a dtype"),
        ({"init_value": "0"}, ValueError, "init_value must be a number, got '0'"),
        ({"init_value": 1j}, ValueError, "init_value must be a number, got 1j"),
    ],
)
def test_arguments_of_wrong_types(changed, error, message):
    kernel = metal_kernel(name="never", input_names=["x"], output_names=["y"], source="this would not compile")
    for call in (kernel, kernel.source):
        with pytest.raises(error, match=f"^metal_kernel: {re.escape(message)}"):
            call(**(SOUND | changed))


def test_keywords_that_are_not_known():
    kernel = metal_kernel(name="never", input_names=["x"], output_names=["y"], source="this would not compile")
    for call in (kernel, kernel.source):
        with pytest.raises(TypeError, match="'unknown'"):
            call(**SOUND, unknown=1)
    with pytest.raises(TypeError, match="'unknown'"):
        metal_kernel(name="k", input_names=[], output_names=["y"], source="", unknown=1)


def test_forms_that_mlx_takes():
    """NumPy's integers, lists, tuples and arrays."""
    kernel = metal_kernel(
        name="copies", input_names=("x",), output_names=("y",), source="y[thread_position_in_grid.x] = x[0] + N;"
    )
    for four in (np.int64(4), np.uint8(4), np.array(4)):
        for sequence in (list, tuple, np.array):
            (y,) = kernel(
                inputs=(np.ones(1, F32),),
                output_shapes=(sequence([four]),),
                output_dtypes=(np.dtype(F32),),
                grid=sequence([four, 1, 1]),
                threadgroup=sequence([1, 1, 1]),
                template=(["N", np.int16(2)],),
                init_value=np.float32(0),
            )
            assert y.tolist() == [3, 3, 3, 3]


def test_masked_arrays_under_mlx():
    mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
    import metalloid.mlx as mm

    with mm.installed(primitive=False):
        kernel = mx.fast.metal_kernel("never", ["x"], ["y"], "this would not compile")
        with pytest.raises(TypeError, match=r"metal_kernel: inputs\[0\] is a masked array"):
            kernel(**(SOUND | {"inputs": [np.ma.masked_array([1.0], F32)], "output_dtypes": [mx.float32]}))


class OnlyMemory:
    """DLPack's two methods and no library."""

    def __dlpack__(self, **given):
        return np.ones(4, F32).__dlpack__(**given)

    def __dlpack_device__(self):
        return 1, 0


def test_an_array_of_no_library_as_first_input():
    kernel = metal_kernel(name="never", input_names=["x"], output_names=["y"], source="this would not compile")
    with pytest.raises(ValueError, match="outputs cannot be allocated as OnlyMemory, which has no __array_namespace__"):
        kernel(**(SOUND | {"inputs": [OnlyMemory()]}))


PRECOMPILED = {"name": "k", "compiled_source": b"", "scalars": [], **SOUND}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"name": None}, TypeError, "name must be a string"),
        ({"compiled_source": 5}, TypeError, "compiled_source must be bytes, got int"),
        ({"inputs": None}, TypeError, "inputs must be a list, got NoneType"),
        ({"output_shapes": 4}, TypeError, "output_shapes must be a list, got int"),
        ({"scalars": None}, TypeError, "scalars must be a list, got NoneType"),
        ({"scalars": [2**70]}, ValueError, "scalars[0] must fit in 64 bits"),
        ({"shared_memory": "1"}, TypeError, "shared_memory must be an integer, got str"),
        ({"shared_memory": -1}, ValueError, "shared_memory must not be negative"),
        ({"ensure_row_contiguous": 1}, TypeError, "ensure_row_contiguous must be True or False, got int"),
    ],
)
def test_arguments_of_a_precompiled_kernel(changed, error, message):
    with pytest.raises(error, match=f"^precompiled_cuda_kernel: {re.escape(message)}"):
        metalloid.fast.precompiled_cuda_kernel(**(PRECOMPILED | changed))


def test_failed_call_writes_nothing():
    kernel = metalloid._native.Kernel("k", (), ("y",), "nonsense")
    out = np.full(4, 7, F32)
    with pytest.raises(RuntimeError):
        kernel.launch((), (out,), (4, 1, 1), (4, 1, 1), (), 0.0)
    assert (out == 7).all()


def test_outputs_overlap_nothing():
    kernel = metalloid._native.Kernel("k", ("x",), ("y",), "y[0] = x[0];")
    out = np.zeros(4, F32)
    with pytest.raises(ValueError, match="y must not overlap x"):
        kernel.launch((out,), (out,), (1, 1, 1), (1, 1, 1), (), None)


# ---- source, initial values, libraries -----------------------------------------------------------------------------


def test_source_and_verbose(capsys):
    kernel = metal_kernel(name="myexp", input_names=["inp"], output_names=["out"],
                          source="uint elem = thread_position_in_grid.x; "
                                 "out[elem] = T(inp[elem]) + inp_shape[0];")  # fmt: skip
    call = {"inputs": [np.ones((4, 16), np.float16)], "template": [("T", F32), ("N", -3), ("on", True)],
            "output_shapes": [(4, 16)], "output_dtypes": [np.float16]}  # fmt: skip
    text = kernel.source(**call)
    assert "template <typename T, int N, bool on>\n[[kernel]] void custom_kernel_myexp_" in text
    assert "  const device float16_t* inp [[buffer(0)]],\n  const constant int* inp_shape [[buffer(1)]],\n" in text
    assert (
        "  device float16_t* out [[buffer(2)]],\n  uint3 thread_position_in_grid [[thread_position_in_grid]]) {" in text
    )
    assert "<float, -3, 1>" in text
    kernel(**call, grid=(64, 1, 1), threadgroup=(64, 1, 1), verbose=True)
    assert text in capsys.readouterr().out
    assert "mtl_kernel_run" in kernel.source(**call, translated=True)


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [(F32, -1.5, -1.5), (np.float16, 1e-3, np.float16(1e-3)), (np.int8, 300, 127), (np.uint16, -5, 0),
     (np.int64, -7.9, -7), (np.bool_, 2, True), (np.uint64, 2.0**63, 2**63), (np.complex64, 3, 3)],
)  # fmt: skip
def test_init_value(dtype, value, expected):
    out = run("if (false) out[0] = 0;", {}, out=((5,), dtype), grid=(1, 1, 1), init_value=value)
    assert (out == np.array(expected, dtype)).all()


def test_empty_arrays():
    out = run("(void)x;", {"x": np.empty((0, 3), F32)}, out=((0,), F32), grid=(1, 1, 1))
    assert out.shape == (0,)


def test_torch():
    torch = pytest.importorskip("torch")
    source = "uint i = thread_position_in_grid.x; out[i] = x[i] * T(s) + T(1);"
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64):
        x = torch.arange(10).to(dtype)
        out = run(source, {"x": x, "s": 3}, out=((10,), dtype), grid=(10, 1, 1), template=[("T", dtype)])
        assert isinstance(out, torch.Tensor)
        assert out.dtype == dtype
        assert torch.equal(out, x * 3 + 1)


def test_mlx():
    mx = pytest.importorskip("mlx.core")
    source = "uint i = thread_position_in_grid.x; out[i] = x[i] * T(2);"
    for dtype in (mx.float32, mx.bfloat16, mx.int32, mx.bool_):
        x = mx.arange(10).astype(dtype)
        out = run(source, {"x": x}, out=((10,), dtype), grid=(10, 1, 1), template=[("T", dtype)])
        assert isinstance(out, mx.array)
        assert out.dtype == dtype
        assert mx.array_equal(out, (x * 2).astype(dtype))


# ---- the cache, the compiler ---------------------------------------------------------------------------------------

PROGRAM = """
import sys, time
import numpy as np
from metalloid.fast import metal_kernel
kernel = metal_kernel(name="cached", input_names=["x"], output_names=["y"],
                      source="uint i = thread_position_in_grid.x; y[i] = x[i] + 1;")
x = np.arange(8, dtype=np.float32)
(y,) = kernel(inputs=[x], output_shapes=[(8,)], output_dtypes=[np.float32], grid=(8, 1, 1), threadgroup=(8, 1, 1))
assert np.array_equal(y, x + 1)
"""


def program(directory, text=PROGRAM, check=True, **changes):
    environment = dict(os.environ, METALLOID_CACHE=str(directory)) | changes
    environment = {name: value for name, value in environment.items() if value is not None}
    done = subprocess.run(
        [sys.executable, "-c", text], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def entries(directory):
    return sorted(Path(directory).glob("*.so"))


def test_cache_is_private_and_used(tmp_path):
    directory = tmp_path / "deep" / "cache"
    program(directory)
    (entry,) = entries(directory)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600
    assert [path.name for path in directory.iterdir()] == [entry.name], "nothing is left behind"
    before = entry.stat().st_mtime_ns
    program(directory)
    assert entry.stat().st_mtime_ns == before, "the second process compiled again"


def test_cache_does_not_grow_without_end(tmp_path):
    """Beyond a size, what was not used for longest goes, with what a debugger was to see of it."""
    debug = PROGRAM.replace('input_names=["x"]', 'input_names=["x"], debug_options={"debug": True}')
    program(tmp_path, debug)
    (first,) = entries(tmp_path)
    program(tmp_path)
    (second,) = set(entries(tmp_path)) - {first}
    for age, entry in ((2, first), (3, second)):  # hours; the older one is used again
        before = time.time() - 3600 * age
        os.utime(entry, (before, before))
    program(tmp_path)
    assert second.stat().st_atime > time.time() - 600
    stranger = tmp_path / "notes.so"
    stranger.write_bytes(bytes(1 << 20))
    room = (2 * second.stat().st_size + 4096) / 2**20  # for two of the size
    program(tmp_path, PROGRAM.replace("x[i] + 1", "1 + x[i]"), METALLOID_CACHE_MIB=str(room))
    assert second.exists()
    assert not first.exists()
    assert len(entries(tmp_path)) == 3  # the second, the new one, the stranger's
    assert not list(tmp_path.glob("*.debug"))
    program(tmp_path, PROGRAM.replace("x[i] + 1", "x[i] - -1"), METALLOID_CACHE_MIB="0")
    assert len(entries(tmp_path)) == 2, "what was just made stays"
    assert stranger.exists()


@pytest.mark.parametrize(
    "damage", ["truncated", "empty", "changed", "of another key", "world-writable", "foreign", "link"]
)
def test_entry_that_is_not_sound_is_made_again(tmp_path, damage):
    program(tmp_path)
    (entry,) = entries(tmp_path)
    whole = entry.read_bytes()
    evil = tmp_path.parent / "evil.so"
    if damage == "truncated":
        entry.write_bytes(whole[: len(whole) // 2])
    elif damage == "empty":
        entry.write_bytes(b"")
    elif damage == "changed":
        entry.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    elif damage == "of another key":
        entry.write_bytes(whole[:-64] + bytes(32) + whole[-32:])
    elif damage == "world-writable":
        entry.chmod(0o666)
    elif damage == "foreign":
        if os.geteuid() != 0:
            pytest.skip("only root gives files away")
        os.chown(entry, 12345, 12345)
    else:
        evil.write_bytes(whole)
        entry.unlink()
        entry.symlink_to(evil)
    program(tmp_path)
    (entry,) = entries(tmp_path)
    assert entry.stat().st_uid == os.geteuid()
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600
    assert not entry.is_symlink()
    assert len(entry.read_bytes()) == len(whole)


def test_directory_that_others_may_write_becomes_private(tmp_path):
    tmp_path.chmod(0o777)
    program(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


def test_directory_of_the_users_own_keeps_what_is_in_it(tmp_path):
    notes = tmp_path / "build-debug1" / "notes"
    notes.parent.mkdir()
    notes.write_text("mine")
    tmp_path.chmod(0o755)
    for path in (notes, notes.parent):
        os.utime(path, (0, 0))
    program(tmp_path)
    assert notes.read_text() == "mine"
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    assert entries(tmp_path)


def test_directory_that_is_everybodys_stays_so(tmp_path):
    tmp_path.chmod(0o1777)
    program(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o1777
    assert not list(tmp_path.iterdir())


def test_array_whose_length_is_no_constant():
    with pytest.raises(RuntimeError, match="variable length array"):
        run(
            "float a[int(x[0])]; a[0] = 1; y[0] = a[0];",
            {"x": np.ones(1, F32)},
            out=((1,), F32),
            outputs=["y"],
            grid=(1, 1, 1),
        )


def test_compiler_that_does_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("METALLOID_CACHE", str(tmp_path))
    monkeypatch.setenv("METALLOID_CXX", "/bin/false")
    with pytest.raises(RuntimeError, match="/bin/false made nothing of it"):
        run("y[0] = 1;", {"x": np.ones(1, F32)}, out=((1,), F32), outputs=["y"], grid=(1, 1, 1))


def test_tensors_of_a_subclass_and_conjugated():
    torch = pytest.importorskip("torch")
    kernel = metalloid.metal_kernel("twice", ["x"], ["y"], "y[0] = 2 * x[0];")
    given = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1), "output_shapes": [(1,)], "output_dtypes": [torch.float32]}
    (y,) = kernel(inputs=[torch.ones(1).as_subclass(type("Sub", (torch.Tensor,), {}))], **given)
    assert isinstance(y, torch.Tensor)
    assert y.item() == 2
    with pytest.raises(ValueError, match=r"metal_kernel: x is a view of conjugated memory: pass .*resolve_conj"):
        kernel(inputs=[torch.ones(1, dtype=torch.complex64).conj()], **given)
    with pytest.raises(ValueError, match=r"not record: pass x\.detach"):
        kernel(inputs=[torch.ones(1, requires_grad=True)], **given)


def test_entry_that_is_a_fifo(tmp_path):
    program(tmp_path)
    (entry,) = entries(tmp_path)
    entry.unlink()
    os.mkfifo(entry)
    program(tmp_path)  # opened to be read it would wait for a writer
    assert stat.S_ISREG(entry.stat().st_mode)


@pytest.mark.parametrize("grid", [(4.5, 1, 1), ("4", 1, 1), (float("inf"), 1, 1), (2**63, 1, 1), (4, 1, 2**64)])
def test_grid_that_is_no_three_sizes(grid):
    kernel = metalloid.metal_kernel("sizes", [], ["y"], "y[0] = 1;")
    with pytest.raises(ValueError, match="grid"):
        kernel(inputs=[], output_shapes=[(1,)], output_dtypes=[np.float32], grid=grid, threadgroup=(1, 1, 1))


def test_none_is_no_dtype():
    kernel = metalloid.metal_kernel("dtypes", [], ["y"], "y[0] = 1;")
    with pytest.raises(ValueError, match="None is no dtype"):
        kernel(inputs=[], output_shapes=[(1,)], output_dtypes=[None], grid=(1, 1, 1), threadgroup=(1, 1, 1))


def test_directory_of_another_user_is_not_used(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root gives directories away")
    directory = tmp_path / "foreign"
    directory.mkdir(0o700)
    os.chown(directory, 12345, 12345)
    program(directory)
    assert not list(directory.iterdir())


@pytest.mark.parametrize("place", ["/proc/nothing", "/dev/null/cache", "relative"])
def test_no_place_for_a_cache(place):
    """The kernel runs, and one line says that it is not kept."""
    (line,) = program(place).stderr.splitlines()
    assert line.startswith(
        f"metalloid: METALLOID_CACHE={place} is ignored: it must be the absolute path of a directory"
    )


def test_settings_that_are_not_understood(tmp_path):
    settings = {"METALLOID_NUM_THREADS": "many", "METALLOID_CPU_ISA": "mmx", "METALLOID_CACHE_MIB": "-5"}
    twice = PROGRAM + "metalloid = sys.modules['metalloid']; metalloid.rms_norm(x, None, 0.0)\n"
    lines = program(tmp_path, twice, **settings).stderr.splitlines()
    assert sorted(line.split(" is ignored: ")[0] for line in lines) == sorted(
        f"metalloid: {name}={value}" for name, value in settings.items()
    )


def test_no_compiler(tmp_path):
    done = program(tmp_path, check=False, PATH="/nowhere", METALLOID_CXX=None)
    if "ziglang" in sys.modules or done.returncode == 0:
        pytest.skip("ziglang is installed")
    assert "RuntimeError: metal_kernel: no C++ compiler for kernel cached: install clang" in done.stderr
    done = program(tmp_path, check=False, METALLOID_CXX="/no such/compiler")
    assert "METALLOID_CXX=/no such/compiler is no program" in done.stderr


def test_compiler_with_blanks_and_arguments(tmp_path):
    folder = tmp_path / "a folder; touch owned"
    folder.mkdir()
    (folder / "my clang").symlink_to(CLANG)
    program(tmp_path / "one", METALLOID_CXX=str(folder / "my clang"))
    program(tmp_path / "two", METALLOID_CXX=f"{CLANG} -DNOTHING")
    assert len(entries(tmp_path / "one")) == len(entries(tmp_path / "two")) == 1
    assert not (tmp_path / "owned").exists()


def test_compiler_that_fails_without_a_word(tmp_path):
    done = program(tmp_path, check=False, METALLOID_CXX=shutil.which("false"))
    assert "RuntimeError: metal_kernel: kernel cached does not compile" in done.stderr


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_a_compiler_that_is_not_clang(tmp_path):
    done = program(tmp_path, check=False, METALLOID_CXX="g++")
    assert "does not compile\nMETALLOID_CXX=g++ is not clang, which kernels are compiled with\n" in done.stderr


def test_full_disk(tmp_path):
    """Files end at a size that no object fits in: an error that says so, and nothing left."""
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({1 << 16}, {1 << 16}))\n" + PROGRAM
    done = program(tmp_path, limited, check=False)
    assert done.returncode == 1
    assert "RuntimeError: metal_kernel" in done.stderr
    assert not list(tmp_path.iterdir())
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_processes_that_compile_at_once(tmp_path):
    environment = dict(os.environ, METALLOID_CACHE=str(tmp_path))
    running = [subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment) for _ in range(4)]
    assert [process.wait(timeout=120) for process in running] == [0] * 4
    assert len(list(tmp_path.iterdir())) == 1


def test_debug_build_keeps_its_sources(tmp_path):
    program(tmp_path, PROGRAM.replace('input_names=["x"]', 'input_names=["x"], debug_options={"debug": True}'))
    (kept,) = tmp_path.glob("*.debug")
    assert (kept / "source").read_text() == "uint i = thread_position_in_grid.x; y[i] = x[i] + 1;"
    assert (kept / "unit.cc").exists()
    assert (kept / "header").exists()


def asan_runtime():
    for name in ("libclang_rt.asan-x86_64.so", "libclang_rt.asan-aarch64.so"):
        path = subprocess.run(
            [CLANG, f"-print-file-name={name}"], capture_output=True, text=True, check=False
        ).stdout.strip()
        if os.path.isabs(path) and os.path.exists(path):
            return path
    return None


@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="gcc's AddressSanitizer is in this process")
@pytest.mark.parametrize(
    "body",
    [
        "y[i + 8] = x[i];",
        "threadgroup float t[8]; t[i + 1] = x[i]; threadgroup_barrier(mem_flags::mem_none); y[i] = t[i];",
    ],
    ids=["output", "threadgroup"],
)
def test_address_sanitizer(tmp_path, body):
    sanitized = PROGRAM.replace("y[i] = x[i] + 1;", body).replace(
        'input_names=["x"]', 'input_names=["x"], debug_options={"address_sanitizer": True}'
    )
    done = program(tmp_path, sanitized, check=False)
    assert "asks for AddressSanitizer, whose run-time is not in this process" in done.stderr
    if not (runtime := asan_runtime()):
        pytest.skip("clang's AddressSanitizer is not installed")
    done = program(tmp_path, sanitized, check=False, LD_PRELOAD=runtime, PYTHONMALLOC="malloc",
                   ASAN_OPTIONS="detect_leaks=0")  # fmt: skip
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr
    assert re.search(r"\bsource:1", done.stderr), done.stderr
