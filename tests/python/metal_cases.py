# ruff: noqa: E501 (kernels and their formulas stand on one line each)
"""Kernels in the Metal Shading Language with what NumPy says of the same: a case for every row of the support table in
docs/custom-kernels.md, and whole kernels as users write them. They run on the CPU and on a GPU alike."""

from dataclasses import dataclass, field

import numpy as np

try:
    import ml_dtypes

    bfloat16 = np.dtype(ml_dtypes.bfloat16)
except ImportError:
    bfloat16 = None


@dataclass
class Case:
    name: str
    source: str
    inputs: list
    expected: list
    grid: tuple = (32, 1, 1)
    threadgroup: tuple = (32, 1, 1)
    header: str = ""
    template: list = field(default_factory=list)
    rtol: float = 1e-5
    atol: float = 1e-6
    init_value: float | None = None
    atomic_outputs: bool = False

    @property
    def names(self):
        return ["abcdefg"[i] for i in range(len(self.inputs))], [f"out{i}" for i in range(len(self.expected))]


CASES = []


def case(name, source, inputs, expected, **more):
    CASES.append(Case(name, source, list(inputs), [np.asarray(e) for e in expected], **more))


rng = np.random.default_rng(20)
f32, f16, i32, u32 = np.float32, np.float16, np.int32, np.uint32
X = rng.uniform(-2, 2, 256).astype(f32)
P = rng.uniform(0.1, 4, 256).astype(f32)
I = rng.integers(-(2**31), 2**31, 256).astype(i32)
U = rng.integers(0, 2**32, 256).astype(u32)
FLAT = {"grid": (256, 1, 1), "threadgroup": (64, 1, 1)}
ID = "uint i = thread_position_in_grid.x;"


def on_vectors(name, expression, expected, inputs=(X,), dtype=f32, **more):
    """`expression` of float4 v (and w) for each four elements."""
    second = "float4 w = ((const device float4*)b)[i];" if len(inputs) > 1 else ""
    case(
        name,
        f"{ID} float4 v = ((const device float4*)a)[i]; {second} ((device float4*)out0)[i] = {expression};",
        inputs,
        [np.asarray(expected, dtype)],
        grid=(64, 1, 1),
        threadgroup=(32, 1, 1),
        **more,
    )


V = X.reshape(-1, 4).astype(np.float64)
W = P.reshape(-1, 4).astype(np.float64)

# ---- metal_math, one function at a time

_erf = np.vectorize(__import__("math").erf)
for _name, _ref, _domain in (
    ("exp", np.exp, X),
    ("exp2", np.exp2, X),
    ("exp10", lambda x: 10.0**x, X),
    ("log", np.log, P),
    ("log2", np.log2, P),
    ("log10", np.log10, P),
    ("sin", np.sin, 10 * X),
    ("cos", np.cos, 10 * X),
    ("tan", np.tan, X / 2),
    ("sinpi", lambda x: np.sin(np.pi * x), X),
    ("cospi", lambda x: np.cos(np.pi * x), X),
    ("tanpi", lambda x: np.tan(np.pi * x), X / 8),
    ("asin", np.arcsin, X / 2),
    ("acos", np.arccos, X / 2),
    ("atan", np.arctan, X),
    ("sinh", np.sinh, X),
    ("cosh", np.cosh, X),
    ("tanh", np.tanh, X),
    ("asinh", np.arcsinh, X),
    ("acosh", np.arccosh, P + 1),
    ("atanh", np.arctanh, X / 2.1),
    ("sqrt", np.sqrt, P),
    ("rsqrt", lambda x: 1 / np.sqrt(x), P),
    ("floor", np.floor, X),
    ("ceil", np.ceil, X),
    ("trunc", np.trunc, X),
    ("rint", np.rint, 2 * X),
    ("round", lambda x: np.trunc(x + np.copysign(0.5, x)), 2 * X),
    ("fabs", np.abs, X),
    ("abs", np.abs, X),
    ("sign", np.sign, X),
    ("fract", lambda x: x - np.floor(x), X),
    ("saturate", lambda x: np.clip(x, 0, 1), X),
    ("expm1", np.expm1, X),
    ("log1p", np.log1p, X / 2.1),
    ("erf", _erf, X),
):
    _x = _domain.astype(f32)
    _want = _ref(_x.astype(np.float64))
    case(f"math {_name}", f"{ID} out0[i] = {_name}(a[i]);", [_x], [_want.astype(f32)], rtol=2e-6, **FLAT)
    case(
        f"math {_name} half",
        f"{ID} out0[i] = metal::precise::{_name}(a[i]);"
        if _name not in ("expm1", "log1p", "erf")
        else f"{ID} out0[i] = {_name}(a[i]);",
        [_x.astype(f16)],
        [_ref(_x.astype(f16).astype(np.float64)).astype(f16)],
        rtol=1e-3,
        atol=1e-3,
        **FLAT,
    )
case("math erfinv", f"{ID} out0[i] = erf(erfinv(a[i]));", [X / 2.1], [X / f32(2.1)], rtol=1e-5, **FLAT)
for _name, _ref, _a, _b in (
    ("pow", np.power, P, X),
    ("powr", np.power, P, X),
    ("atan2", np.arctan2, X, P - 2),
    ("fmod", np.fmod, 10 * X, P),
    ("fmin", np.fmin, X, P),
    ("fmax", np.fmax, X, P),
    ("min", np.fmin, X, P),
    ("max", np.fmax, X, P),
    ("fdim", lambda x, y: np.maximum(x - y, 0), X, P),
    ("copysign", np.copysign, P, X),
    ("step", lambda e, x: (x >= e) * 1.0, X, P - 2),
    ("divide", np.divide, X, P),
):
    _a, _b = _a.astype(f32), _b.astype(f32)
    _want = _ref(_a.astype(np.float64), _b.astype(np.float64)).astype(f32)
    case(f"math {_name}", f"{ID} out0[i] = {_name}(a[i], b[i]);", [_a, _b], [_want], rtol=3e-6, **FLAT)
case("math nextafter", f"{ID} out0[i] = nextafter(a[i], b[i]);", [X, P], [np.nextafter(X, P)], rtol=0, atol=0, **FLAT)
on_vectors(
    "math three arguments",
    "fma(v, w, 1.0f) + mix(v, w, 0.25f) + clamp(v, -1, 1) + smoothstep(0.0f, 2.0f, v)"
    " + max3(v, w, 0.5f) + median3(v, w, float4(0.5))",
    (V * W + 1)
    + (V + (W - V) * 0.25)
    + np.clip(V, -1, 1)
    + (lambda t: t * t * (3 - 2 * t))(np.clip(V / 2, 0, 1))
    + np.maximum(np.maximum(V, W), 0.5)
    + np.median(np.stack([V, W, np.full_like(V, 0.5)]), axis=0),
    (X, P),
)
case(
    "math modf frexp ldexp ilogb sincos",
    f"{ID} float whole, c; int e; float f = modf(a[i], whole); float m = frexp(a[i], e); float s = sincos(a[i], c);"
    "out0[i] = f + 10 * whole; out1[i] = ldexp(m, e) + ilogb(a[i]); out2[i] = s + 2 * c;",
    [X],
    [
        np.modf(X)[0] + 10 * np.modf(X)[1],
        X + np.floor(np.log2(np.abs(X))),
        np.sin(X.astype(np.float64)) + 2 * np.cos(X.astype(np.float64)),
    ],
    **FLAT,
)
_special = np.array([np.inf, -np.inf, np.nan, 0, -0.0, 1, -1, 1e-40], f32)
case(
    "math special values",
    f"{ID} out0[i] = exp(a[i]); out1[i] = log(a[i]); out2[i] = isnan(a[i]) + 2 * isinf(a[i])"
    " + 4 * isfinite(a[i]) + 8 * isnormal(a[i]) + 16 * signbit(a[i]); out3[i] = pow(a[i], 2.0) + tanh(a[i]);",
    [_special],
    [
        np.array([np.inf, 0, np.nan, 1, 1, np.e, 1 / np.e, 1], f32),
        np.array([np.inf, np.nan, np.nan, -np.inf, -np.inf, 0, np.nan, np.log(1e-40)], f32),
        np.array([2, 18, 1, 4, 20, 12, 28, 4], i32),
        np.array([np.inf, np.inf, np.nan, 0, 0, 1 + np.tanh(1), 1 - np.tanh(1), 0], f32),
    ],
    grid=(8, 1, 1),
    threadgroup=(8, 1, 1),
)

# ---- scalars, vectors, matrices

case(
    "16-bit arithmetic rounds each operation",
    f"{ID} half x = a[i], y = b[i]; out0[i] = x * y + x; half z = i % 2 ? x : 0; out1[i] = i % 3 ? z : 0.5f; out2[i] = x / y;",
    [X.astype(f16), P.astype(f16)],
    [
        X.astype(f16) * P.astype(f16) + X.astype(f16),
        np.where(np.arange(256) % 3, np.where(np.arange(256) % 2, X.astype(f16), f16(0)).astype(f32), f32(0.5)),
        X.astype(f16) / P.astype(f16),
    ],
    rtol=0,
    atol=0,
    **FLAT,
)
if bfloat16 is not None:
    case(
        "bfloat",
        f"{ID} bfloat x = a[i]; out0[i] = x * x; out1[i] = float(x) * 3.0; bfloat y = bfloat(float(x) + 1); out2[i] = y;",
        [X.astype(bfloat16)],
        [
            (X.astype(bfloat16) * X.astype(bfloat16)),
            X.astype(bfloat16).astype(f32) * 3,
            (X.astype(bfloat16).astype(f32) + 1).astype(bfloat16),
        ],
        rtol=0,
        atol=0,
        **FLAT,
    )
case(
    "literals and conversions",
    f"{ID} out0[i] = 1.5 * a[i] + 2.0h + float(short(a[i])) + 0x1p-3; out1[i] = int(a[i]) + uchar(3);",
    [X],
    [1.5 * X + 2 + X.astype(np.int16) + 0.125, X.astype(i32) + 3],
    **FLAT,
)
on_vectors(
    "swizzles",
    "float4(v.wzyx) + float4(v.xy, v.x, 1) * float4(2, v.bgr)",
    V[:, ::-1] + np.stack([V[:, 0] * 2, V[:, 1] * V[:, 2], V[:, 0] * V[:, 1], V[:, 0]], 1),
)
case(
    "swizzles are assigned to",
    f"{ID} float4 v = ((const device float4*)a)[i]; v.xy = v.zw; v.bgr *= 2; v.wx += v.xw; v.y = 7;"
    "((device float4*)out0)[i] = v;",
    [X],
    [np.stack([V[:, 2] * 2 + V[:, 3], np.full(64, 7.0), V[:, 2] * 2, V[:, 3] + V[:, 2] * 2], 1).astype(f32)],
    grid=(64, 1, 1),
)
on_vectors(
    "constructors",
    "float4(1, 2.0h, v.x, int(3)) + float4(v.x, v.yz, v.w) + float4(float3(v.xyz), 1) + float4(0.5)",
    np.stack([1 + 2 * V[:, 0], 2 + 2 * V[:, 1], V[:, 0] + 2 * V[:, 2], 4 + V[:, 3]], 1) + 0.5,
)
case(
    "packed vectors",
    f"{ID} packed_float3 p = ((const device packed_float3*)a)[i]; float3 v = p; v += p.zyx;"
    "((device packed_float3*)out0)[i] = packed_float3(v * 2);",
    [X[:192]],
    [(lambda m: (m + m[:, ::-1]) * 2)(X[:192].reshape(-1, 3))],
    grid=(64, 1, 1),
)
case(
    "comparisons and select",
    f"{ID} float4 v = ((const device float4*)a)[i]; bool4 m = v > 0.0f && !(v > float4(1));"
    "((device float4*)out0)[i] = select(float4(-1), v, m); out1[i] = any(m) + 2 * all(m) + 4 * (m.x || m.y);",
    [X],
    [
        np.where((V > 0) & ~(V > 1), V, -1).astype(f32),
        (lambda m: m.any(1) + 2 * m.all(1) + 4 * (m[:, 0] | m[:, 1]))((V > 0) & ~(V > 1)).astype(i32),
    ],
    grid=(64, 1, 1),
)
case(
    "as_type",
    f"{ID} out0[i] = as_type<float>(as_type<uint>(a[i]) ^ 0x80000000u); out1[i] = as_type<uint>(half2(a[i], 1));",
    [X],
    [-X, X.astype(f16).view(np.uint16).astype(u32) | (u32(0x3C00) << u32(16))],
    **FLAT,
)
case(
    "matrices",
    "float2x2 m = float2x2(a[0], a[1], a[2], a[3]); float3x3 d(2.0); float2 v = m * float2(1, 2); float2 w = float2(1, 2) * m;"
    "out0[0] = v.x; out0[1] = v.y; out0[2] = w.x; out0[3] = w.y; out0[4] = determinant(m); out0[5] = determinant(d);"
    "out0[6] = (m * m)[1][0]; out0[7] = transpose(m)[0][1]; float4x4 q(1.0f); q = q * 3; out0[8] = determinant(q);",
    [f32([1, 2, 3, 4])],
    [f32([7, 10, 5, 11, -2, 8, 15, 3, 81])],
    grid=(1, 1, 1),
)
case(
    "arrays, structs, templates, constants in the header",
    f"{ID} Pair<float> p = {{a[i], table[i % 3]}}; float local[4] = {{1, 2}}; local[3] = p.sum(); out0[i] = twice(local[3]) + local[2] + COUNT;",
    [X],
    [2 * (X + np.array([1, 2, 4], f32)[np.arange(256) % 3]) + 5],
    header="#include <metal_stdlib>\nusing namespace metal;\n#define COUNT 5\nconstant float table[3] = {1.0, 2.0, 4.0};\n"
    "template <typename T> struct Pair { T x, y; T sum() const thread { return x + y; } };\n"
    "template <typename T> METAL_FUNC T twice(T x) { return x + x; }",
    **FLAT,
)
case(
    "limits",
    "out0[0] = numeric_limits<float>::max(); out0[1] = metal::numeric_limits<half>::max(); out0[2] = Limits<float>::min;"
    "out0[3] = is_same_v<float, half> ? 1 : 2; out0[4] = INFINITY; out0[5] = M_PI_F; out1[0] = numeric_limits<int>::min();"
    "out1[1] = INT_MAX;",
    [],
    [f32([3.4028235e38, 65504, -np.inf, 2, np.inf, np.pi]), i32([-(2**31), 2**31 - 1])],
    grid=(1, 1, 1),
)

case(
    "overloads that differ in address spaces alone",
    "threadgroup float shared[64]; uint i = thread_position_in_grid.x, l = thread_position_in_threadgroup.x;"
    "shared[l] = a[i]; threadgroup_barrier(mem_flags::mem_threadgroup);"
    "float own[2] = {1, 2}; Box box(3); threadgroup Box common; if (l == 0) common.value = 4;"
    "threadgroup_barrier(mem_flags::mem_threadgroup);"
    "out0[i] = second(a + i / 2) + 10 * second((threadgroup const float*)shared + l / 2) + 100 * second(own) + 1000 * weights[1]"
    " + Pointee<const device float*>::size + Pointee<threadgroup half*>::size; out1[i] = box.twice() + 10 * common.twice();",
    [X],
    [
        (lambda at: X[at // 2 + 1] + 10 * X[at // 64 * 64 + at % 64 // 2 + 1])(np.arange(256)) + 200 + 5000 + 6,
        np.full(256, 86.0, f32),
    ],
    header="template <typename T> T second(const device T* from) { return from[1]; }\n"
    "template <typename T> T second(threadgroup const T* values) { return values[1]; }\n"
    "template <typename T> T second(thread const T* p) { return p[1]; }\n"
    "constant float weights[2] = {4, 5};\n"
    "struct Box { float value; Box() thread = default; Box() threadgroup = default; Box() constant = default;\n"
    "    Box(float x) thread : value(x) {} Box(float x) constant : value(x) {} float twice() const thread { return 2 * value; }\n"
    "    float twice() const threadgroup { return 2 * value; } };\n"
    "template <typename T> struct Pointee;\n"
    "template <typename T> struct Pointee<device T*> { enum { size = sizeof(T) }; };\n"
    "template <typename T> struct Pointee<threadgroup T*> { enum { size = sizeof(T) }; };\n"
    "#if __METAL_VERSION__ > 9999\n"
    "inline float first(const device float* p) { return -1; }\n"
    "#else\n"
    "inline float first(const threadgroup float* p) { return -1; }\n"
    "#endif\n"
    "inline float used(const threadgroup float* p) { return first(p); }\n",
    **FLAT,
)
_a, _b = f32(1 + 2.0**-12) * np.ones(256, f32), f32(-(1 + 2.0**-11)) * np.ones(256, f32)
case(
    "products and sums that must not contract",
    f"#pragma clang fp contract(off)\n {ID} out0[i] = a[i] * a[i] + b[i]; float p = a[i] * a[i]; out1[i] = p + b[i];",
    [_a, _b],
    [_a * _a + _b, _a * _a + _b],
    rtol=0,
    atol=0,
    **FLAT,
)
case(
    "users' functions and constants that are named as the library's",
    f"{ID} out0[i] = sign(a[i]) + erf(half(a[i])) + absdiff(3, 5) + median3(a[i], 0.0f, 1.0f) + fabs(a[i]) + M_PI + clamp(a[i]);"
    "out1[i] = HAS_BFLOAT;",
    [X],
    [7 + 9 + 20 + 1 + np.abs(X.astype(np.float64)) + 3 + np.clip(X, 0, 1), np.full(256, 1, i32)],
    header="template <typename T> T sign(T) { return T(7); }\n"
    "template <typename... T> struct ignored { using type = void; };\n"
    "template <typename... T> using void_t = typename ignored<T...>::type;\n"
    "template <typename T> METAL_FUNC T erf(T) { return T(9); }\n"
    "template <typename T> inline T absdiff(T, T) { return T(20); }\n"
    "template <typename T> inline T median3(T, T, T) { return T(1); }\n"
    "template <typename T> inline T clamp(T x) { return clamp(x, T(0), T(1)); }\n"
    "constant float M_PI = 3;\n"
    "#if defined(__HAVE_BFLOAT__)\n#define HAS_BFLOAT 1\n#else\n#define HAS_BFLOAT 0\n#endif\n",
    rtol=1e-3,
    **FLAT,
)

# ---- integers

_bits = ((U[:, None] >> np.arange(32, dtype=u32)) & 1).astype(bool)
case(
    "popcount clz ctz reverse_bits",
    f"{ID} out0[i] = popcount(a[i]); out1[i] = clz(a[i] >> (i % 32)); out2[i] = ctz(a[i]);"
    "out3[i] = reverse_bits(a[i]); out4[i] = clz(uchar(a[i])) + 100 * ctz(uint(0));",
    [U],
    [
        _bits.sum(1).astype(u32),
        u32([32 - int(u >> (i % 32)).bit_length() for i, u in enumerate(U.tolist())]),
        np.where(U == 0, 32, _bits.argmax(1)).astype(u32),
        u32([int(f"{u:032b}"[::-1], 2) for u in U.tolist()]),
        u32([8 - (u & 255).bit_length() + 3200 for u in U.tolist()]),
    ],
    **FLAT,
)
_i64, _u64 = I.astype(np.int64), U.astype(np.uint64)
_J, _K = I[::-1].astype(np.int64), U[::-1].astype(np.uint64)
case(
    "mulhi rotate absdiff hadd saturating sums",
    f"{ID} out0[i] = mulhi(a[i], b[i]); out1[i] = mulhi(c[i], d[i]); out2[i] = rotate(c[i], d[i]);"
    "out3[i] = absdiff(c[i], d[i]) + hadd(c[i], d[i]); out4[i] = addsat(a[i], b[i]); out5[i] = subsat(c[i], d[i]); out6[i] = rhadd(a[i], b[i]);",
    [I, I[::-1].copy(), U, U[::-1].copy()],
    [
        ((_i64 * _J) >> 32).astype(i32),
        ((_u64 * _K) >> np.uint64(32)).astype(u32),
        u32(
            [
                ((u << (k & 31)) | (u >> (32 - (k & 31)))) & 0xFFFFFFFF
                for u, k in zip(U.tolist(), _K.tolist(), strict=True)
            ]
        ),
        (np.abs(U.astype(np.int64) - _K.astype(np.int64)) + ((U.astype(np.int64) + _K.astype(np.int64)) >> 1))
        .astype(np.uint64)
        .astype(u32),
        np.clip(_i64 + _J, -(2**31), 2**31 - 1).astype(i32),
        np.where(_u64 > _K, _u64 - _K, 0).astype(u32),
        ((_i64 + _J + 1) >> 1).astype(i32),
    ],
    **FLAT,
)
case(
    "extract_bits insert_bits mul24 mad24",
    f"{ID} out0[i] = extract_bits(a[i], 5u, 7u); out1[i] = extract_bits(b[i], 5u, 7u);"
    "out2[i] = insert_bits(b[i], 0x15u, 8u, 6u); out3[i] = mad24(int(a[i] & 0xfff), -7, 3) + mul24(2, 3);",
    [I, U],
    [
        ((I.astype(np.int64) << 20).astype(i32) >> 25),
        (U >> u32(5)) & u32(127),
        (U & ~u32(0x3F << 8)) | u32(0x15 << 8),
        (I & 0xFFF) * -7 + 9,
    ],
    **FLAT,
)

_d = np.where(U % 5, I % 1000, I) | 1
case(
    "integer division of every kind of operand",
    f"{ID} int x = a[i], d = b[i]; uint u = uint(x); const Ratio r = {{x, 3}}; Bits bits = {{7, 2}}; int w[sizeof(float4) / sizeof(Half)] = {{}};"
    "x /= d; int y = a[i]; y %= TILE / 2; half h = half(i % 7) / RATIO(8, int(i % 3 + 1)); h /= d > 0 ? 2 : d / d * 2; float f = float(i) / bits.a / bits.b; f /= int(i + 1);"
    "short s = short(a[i]); s /= short(d | 1); uint4 v = uint4(u, 7, i, 9) / uint4(i + 1, 2, 3, Count::TWO); v %= i + 5; v.xy /= (device_count / 2) + 1u;"
    "out0[i] = 0xffff & (x + y + r / 2 + (r %= 5) + quarter<64 / TILE>(12) + int(sizeof w / sizeof(w[0])) + s + int(v.x + v.y + v.z + v.w) + a[i] % d);"
    "out1[i] = f + h + 1 / 4 + 1.0 / 4 + (true / (i % 2 + 1)) + own::Angle{6} / own::Angle{4};",
    [I, _d],
    [
        (
            np.fix(I.astype(np.float64) / _d).astype(np.int64)
            + np.fmod(I.astype(np.int64), 8)
            + np.fix(I / 2 / 3).astype(np.int64)
            + np.fmod(np.fix(I.astype(np.float64) / 3), 5).astype(np.int64)
            + 3
            + 8
            + np.fix(I.astype(np.int16) / (_d | 1).astype(np.int16).astype(np.float64)).astype(np.int64)
            + I.view(u32) // (np.arange(256) + 1) % (np.arange(256) + 5) // 3
            + 3 % (np.arange(256) + 5) // 3
            + np.arange(256) // 3 % (np.arange(256) + 5)
            + 4 % (np.arange(256) + 5)
            + np.fmod(I.astype(np.int64), _d)
        ).astype(i32)
        & 0xFFFF,
        (
            np.arange(256) / 14 / (np.arange(256) + 1)
            + ((np.arange(256) % 7).astype(f16) / (8 // (np.arange(256) % 3 + 1)).astype(f16) / f16(2)).astype(
                np.float64
            )
            + 0.25
            + (np.arange(256) % 2 == 0)
            + 1.5
        ).astype(f32),
    ],
    header="#define TILE 16\n#define RATIO(a, b) ((a) / (b))\n#if RATIO(TILE, 4) % 3 != 1\n#error\n#endif\n"
    "typedef half Half; enum Count { ONE = 1, TWO }; constant int device_count = 5; struct Bits { uint a : 3, b : 3; };\n"
    "struct Ratio { int n, d; int operator/(int by) const { return n / by / d; } int operator%=(int by) { n /= d; d = 1; return n % by; }\n"
    "int operator%=(int by) const { return n / d % by; } };\n"
    "template <int N> int quarter(int x) { return x / N; }\n"
    "namespace own { struct Angle { float x; }; float operator/(Angle a, Angle b) { return a.x / b.x; } }\n",
    **FLAT,
)

# ---- geometric, pack

on_vectors(
    "geometric",
    "float4(dot(v, w), length(v.xyz), distance(v, w), length_squared(w.xy)) + normalize(v) + float4(cross(v.xyz, w.xyz), 0)"
    " + reflect(v, w) + faceforward(v, v, w)",
    np.stack(
        [(V * W).sum(1), np.linalg.norm(V[:, :3], axis=1), np.linalg.norm(V - W, axis=1), (W[:, :2] ** 2).sum(1)], 1
    )
    + V / np.linalg.norm(V, axis=1, keepdims=True)
    + np.pad(np.cross(V[:, :3], W[:, :3]), ((0, 0), (0, 1)))
    + V
    - 2 * W * (V * W).sum(1, keepdims=True)
    + np.where((V * W).sum(1, keepdims=True) < 0, V, -V),
    (X, P),
    rtol=1e-5,
    atol=1e-5,
)
case(
    "pack and unpack",
    f"{ID} float4 v = unpack_unorm4x8_to_float(a[i]); out0[i] = pack_float_to_unorm4x8(v); out1[i] = v.y;"
    "out2[i] = pack_float_to_snorm2x16(unpack_snorm2x16_to_float(a[i])); half4 h = unpack_snorm4x8_to_half(a[i]); out3[i] = h.w;",
    [U & u32(0x7FFF7FFF)],
    [
        U & u32(0x7FFF7FFF),
        ((U >> u32(8)) & u32(127)) / f32(255),
        U & u32(0x7FFF7FFF),
        (((U >> u32(24)) & u32(127)) / f32(127)).astype(f16),
    ],
    rtol=1e-3,
    atol=1e-3,
    **FLAT,
)

# ---- simdgroups: 40 lanes are one whole simdgroup and 8 lanes of another

L = X[:40]
_groups = [slice(0, 32), slice(32, 40)]


def by_group(f, x=None):
    x = L if x is None else x
    return np.concatenate([np.broadcast_to(f(x[g]), x[g].shape) for g in _groups])


SIMD = {"grid": (40, 1, 1), "threadgroup": (40, 1, 1)}
N = rng.integers(0, 2**20, 40).astype(i32)
case(
    "simd reductions",
    f"{ID} out0[i] = simd_sum(a[i]); out1[i] = simd_max(a[i]); out2[i] = simd_min(a[i]); out3[i] = simd_product(a[i]);"
    "out4[i] = simd_sum(half(a[i]));",
    [L],
    [
        by_group(np.sum),
        by_group(np.max),
        by_group(np.min),
        by_group(np.prod),
        by_group(np.sum, L.astype(f16).astype(f32)).astype(f16),
    ],
    rtol=2e-3,
    atol=1e-5,
    **SIMD,
)
case(
    "simd reductions of integers",
    f"{ID} out0[i] = simd_sum(a[i]); out1[i] = simd_and(a[i] | 1); out2[i] = simd_or(a[i]); out3[i] = simd_xor(a[i]);"
    "out4[i] = simd_sum(int64_t(a[i]) << 20);",
    [N],
    [
        by_group(np.sum, N).astype(i32),
        by_group(np.bitwise_and.reduce, N | 1),
        by_group(np.bitwise_or.reduce, N),
        by_group(np.bitwise_xor.reduce, N),
        by_group(np.sum, N.astype(np.int64) << 20),
    ],
    **SIMD,
)
case(
    "simd prefixes",
    f"{ID} out0[i] = simd_prefix_inclusive_sum(a[i]); out1[i] = simd_prefix_exclusive_sum(a[i]);"
    "out2[i] = simd_prefix_inclusive_product(a[i]); out3[i] = simd_prefix_exclusive_product(a[i]);",
    [L],
    [
        by_group(np.cumsum),
        by_group(lambda x: np.cumsum(x) - x),
        by_group(np.cumprod),
        by_group(lambda x: np.append(1, np.cumprod(x)[:-1])),
    ],
    rtol=1e-4,
    atol=1e-5,
    **SIMD,
)
_lane = np.arange(32)
F = X[:32]
case(
    "simd shuffles",
    f"{ID} float x = a[i]; out0[i] = simd_shuffle(x, (i * 7) % 32); out1[i] = simd_shuffle_xor(x, 5); out2[i] = i >= 3 ? simd_shuffle_up(x, 3) : 0;".replace(
        "i >= 3 ? simd_shuffle_up(x, 3) : 0", "simd_shuffle_up(x, 3) * (i >= 3)"
    )
    + "out3[i] = simd_shuffle_down(x, 4) * (i < 28); out4[i] = simd_broadcast(x, 9) + simd_broadcast_first(x);"
    "out5[i] = simd_shuffle_rotate_up(x, 5) + 2 * simd_shuffle_rotate_down(x, 6);"
    "out6[i] = simd_shuffle_and_fill_up(x, 10 + x, 3) + 100 * simd_shuffle_and_fill_down(x, 20 + x, 2, 8);",
    [F],
    [
        F[_lane * 7 % 32],
        F[_lane ^ 5],
        np.where(_lane >= 3, F[_lane - 3], 0),
        np.where(_lane < 28, F[(_lane + 4) % 32], 0),
        np.full(32, F[9] + F[0]),
        F[(_lane - 5) % 32] + 2 * F[(_lane + 6) % 32],
        np.where(_lane >= 3, F[_lane - 3], 10 + F[(_lane - 3) % 32])
        + 100 * np.where(_lane % 8 < 6, F[(_lane + 2) % 32], 20 + F[_lane // 8 * 8 + (_lane + 2) % 8]),
    ],
    rtol=1e-5,
    atol=1e-4,
)
case(
    "simd votes",
    f"{ID} out0[i] = simd_all(a[i] < 3) + 2 * simd_any(a[i] > 1.5) + 4 * simd_is_first(); simd_vote v = simd_ballot(a[i] > 0);"
    "out1[i] = ulong((simd_vote::vote_t)v); out2[i] = popcount(ulong(simd_vote::vote_t(simd_active_threads_mask()))) ;",
    [L],
    [
        (by_group(lambda x: 1 + 2 * (x > 1.5).any()) + 4 * np.isin(np.arange(40), [0, 32])).astype(i32),
        np.concatenate(
            [np.full(x.size, sum(1 << j for j in np.flatnonzero(x > 0)), np.uint64) for x in (L[:32], L[32:])]
        ),
        by_group(lambda x: x.size).astype(i32),
    ],
    **SIMD,
)
case(
    "simd in a divergent branch",
    f"{ID} float x = a[i]; if (i % 3 == 0) {{ out0[i] = simd_sum(x); }} else {{ out0[i] = -simd_sum(x); }}"
    "out1[i] = simd_sum(x);",
    [F],
    [np.where(_lane % 3 == 0, F[_lane % 3 == 0].sum(), -F[_lane % 3 != 0].sum()), np.full(32, F.sum())],
    rtol=1e-4,
    atol=1e-5,
)
_q = F.reshape(8, 4)
case(
    "quads",
    f"{ID} float x = a[i]; out0[i] = quad_sum(x) + quad_max(x); out1[i] = quad_broadcast(x, 2) + quad_shuffle_xor(x, 1);"
    "out2[i] = quad_shuffle_rotate_down(x, 1) + quad_prefix_inclusive_sum(x) + 2 * quad_prefix_exclusive_sum(x); out3[i] = quad_all(x > -1) + 2 * quad_any(x > 1);",
    [F],
    [
        np.repeat(_q.sum(1) + _q.max(1), 4),
        np.repeat(_q[:, 2], 4) + F[_lane ^ 1],
        (np.roll(_q, -1, 1) + 3 * np.cumsum(_q, 1) - 2 * _q).ravel(),
        np.repeat((_q > -1).all(1) + 2 * (_q > 1).any(1), 4).astype(i32),
    ],
    rtol=1e-4,
    atol=1e-5,
)

# ---- simdgroup_matrix

M8, M8b = X[:64].reshape(8, 8), X[64:128].reshape(8, 8)
case(
    "simdgroup_matrix",
    "simdgroup_float8x8 A, B, C = make_filled_simdgroup_matrix<float, 8, 8>(1.0f); simdgroup_load(A, a, 8); simdgroup_load(B, b, 8, ulong2(0, 0), true);"
    "simdgroup_multiply_accumulate(C, A, B, C); simdgroup_store(C, out0, 8); simdgroup_multiply(C, C, A); simdgroup_store(C, out1, 8);",
    [M8, M8b],
    [M8 @ M8b.T + 1, (M8 @ M8b.T + 1) @ M8],
    rtol=1e-5,
    atol=2e-5,
)
case(
    "simdgroup_matrix of half",
    "simdgroup_half8x8 A, B; simdgroup_float8x8 C(0.0f); simdgroup_load(A, a, 8); simdgroup_load(B, b, 8);"
    "simdgroup_multiply_accumulate(C, A, B, C); simdgroup_store(C, out0, 8); simdgroup_matrix<half, 8, 8> D; simdgroup_multiply(D, A, B); simdgroup_store(D, out1, 8);",
    [M8.astype(f16), M8b.astype(f16)],
    [
        M8.astype(f16).astype(f32) @ M8b.astype(f16).astype(f32),
        (M8.astype(f16).astype(f32) @ M8b.astype(f16).astype(f32)).astype(f16),
    ],
    rtol=2e-3,
    atol=2e-3,
)
_row = (_lane >> 4) * 4 + ((_lane >> 1) & 3)
_col = ((_lane >> 3) & 1) * 4 + (_lane & 1) * 2
_scaled = (M8 @ M8b).copy()
_scaled[_row, _col] *= _lane
case(
    "simdgroup_matrix thread_elements",
    "simdgroup_float8x8 A, B, C(0); simdgroup_load(A, a, 8); simdgroup_load(B, b, 8); simdgroup_multiply_accumulate(C, A, B, C);"
    "C.thread_elements()[0] *= float(thread_index_in_simdgroup); simdgroup_store(C, out0, 8); out1[thread_index_in_simdgroup] = C.thread_elements()[1];"
    "simdgroup_multiply(C, C, A); simdgroup_store(C, out2, 8);",
    [M8, M8b],
    [_scaled, _scaled[_row, _col + 1], _scaled @ M8],
    rtol=1e-4,
    atol=1e-3,
)

# ---- atomics, threadgroup memory, attributes

case(
    "atomics",
    f"{ID} atomic_fetch_add_explicit(&out0[i % 4], a[i], memory_order_relaxed); atomic_fetch_max_explicit(&out0[4], a[i], memory_order_relaxed);"
    "atomic_fetch_min_explicit(&out0[5], a[i], memory_order_relaxed);",
    [X],
    [np.array([*(X[k::4].sum() for k in range(4)), max(X.max(), 0), min(X.min(), 0)], f32)],
    init_value=0,
    atomic_outputs=True,
    rtol=1e-4,
    atol=1e-4,
    **FLAT,
)
case(
    "atomics of integers",
    f"{ID} atomic_fetch_add_explicit(&out0[0], 1, memory_order_relaxed); atomic_fetch_sub_explicit(&out0[1], 2, memory_order_relaxed);"
    "atomic_fetch_or_explicit(&out0[2], int(i), memory_order_relaxed); atomic_fetch_xor_explicit(&out0[3], int(i), memory_order_relaxed);"
    "atomic_fetch_and_explicit(&out0[4], 0, memory_order_relaxed); atomic_fetch_max_explicit(&out0[5], int(i), memory_order_relaxed);"
    "int old = 0; while (!atomic_compare_exchange_weak_explicit(&out0[6], &old, old + 3, memory_order_relaxed, memory_order_relaxed)) {}"
    "if (i == 0) { atomic_store_explicit(&out0[7], 9, memory_order_relaxed); atomic_exchange_explicit(&out0[8], atomic_load_explicit(&out0[7], memory_order_relaxed), memory_order_relaxed); }",
    [X],
    [i32([256, -512, 255, 0, 0, 255, 768, 9, 9])],
    init_value=0,
    atomic_outputs=True,
    **FLAT,
)
case(
    "threadgroup atomics: a histogram",
    "threadgroup atomic_uint bins[16]; uint l = thread_index_in_threadgroup; if (l < 16) atomic_store_explicit(&bins[l], 0u, memory_order_relaxed);"
    "threadgroup_barrier(mem_flags::mem_threadgroup); for (uint i = l; i < N; i += threads_per_threadgroup.x) atomic_fetch_add_explicit(&bins[a[i] >> 28], 1u, memory_order_relaxed);"
    "threadgroup_barrier(mem_flags::mem_threadgroup); if (l < 16) out0[l] = atomic_load_explicit(&bins[l], memory_order_relaxed);",
    [U],
    [np.bincount(U >> u32(28), minlength=16).astype(u32)],
    grid=(64, 1, 1),
    threadgroup=(64, 1, 1),
    template=[("N", 256)],
)
_g = np.indices((3, 5, 7)).reshape(3, -1)
case(
    "attributes, groups at the edges smaller",
    "uint3 p = thread_position_in_grid; uint n = (p.z * threads_per_grid.y + p.y) * threads_per_grid.x + p.x; uint3 l = thread_position_in_threadgroup;"
    "uint3 t = threads_per_threadgroup; out0[n] = thread_index_in_threadgroup; out1[n] = (t.x * 10 + t.y) * 10 + t.z;"
    "out2[n] = threadgroup_position_in_grid.x + 10 * threadgroups_per_grid.x + 100 * dispatch_threads_per_threadgroup.x;"
    "out3[n] = l.x + 10 * l.y + 100 * l.z + 1000 * simdgroups_per_threadgroup;",
    [],
    (
        lambda z, y, x: (
            lambda lx, ly, lz, ex, ey, ez: [
                ((lz * ey + ly) * ex + lx).astype(u32),
                ((ex * 10 + ey) * 10 + ez).astype(u32),
                (x // 4 + 10 * 2 + 100 * 4).astype(u32),
                (lx + 10 * ly + 100 * lz + 1000).astype(u32),
            ]
        )(
            x % 4,
            y % 2,
            z % 2,
            np.minimum(4, 7 - x // 4 * 4),
            np.minimum(2, 5 - y // 2 * 2),
            np.minimum(2, 3 - z // 2 * 2),
        )
    )(*_g),
    grid=(7, 5, 3),
    threadgroup=(4, 2, 2),
)

# ---- what users write

ROWS, COLS = 6, 1000
A = rng.standard_normal((ROWS, COLS)).astype(f32)
G = rng.uniform(0.5, 1.5, COLS).astype(f32)
REDUCE = """
template <typename Op> inline float reduce(float x, threadgroup float* shared, uint lane, uint group, uint groups, float neutral, Op op) {
    x = op.simd(x);
    if (lane == 0) shared[group] = x;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    x = op.simd(lane < groups ? shared[lane] : neutral);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return x;
}
struct Sum { float simd(float x) const { return simd_sum(x); } };
struct Max { float simd(float x) const { return simd_max(x); } };
"""
_e = np.exp(A.astype(np.float64) - A.max(1, keepdims=True))
case(
    "softmax",
    """
    threadgroup float shared[32];
    uint row = threadgroup_position_in_grid.x, l = thread_position_in_threadgroup.x, n = threads_per_threadgroup.x;
    uint lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup, groups = simdgroups_per_threadgroup;
    const device float* x = a + row * N;
    float m = -INFINITY;
    for (uint i = l; i < N; i += n) m = max(m, x[i]);
    m = reduce(m, shared, lane, group, groups, -INFINITY, Max());
    float s = 0;
    for (uint i = l; i < N; i += n) s += exp(x[i] - m);
    s = reduce(s, shared, lane, group, groups, 0.0f, Sum());
    for (uint i = l; i < N; i += n) out0[row * N + i] = exp(x[i] - m) / s;""",
    [A],
    [(_e / _e.sum(1, keepdims=True)).astype(f32)],
    grid=(ROWS * 128, 1, 1),
    threadgroup=(128, 1, 1),
    template=[("N", COLS)],
    header=REDUCE,
    rtol=2e-5,
)
RMS_NORM = """
    threadgroup float shared[32];
    uint row = threadgroup_position_in_grid.x, l = thread_position_in_threadgroup.x, n = threads_per_threadgroup.x;
    float s = 0;
    for (uint i = l; i < N; i += n) { float x = a[row * N + i]; s += x * x; }
    s = simd_sum(s);
    if (thread_index_in_simdgroup == 0) shared[simdgroup_index_in_threadgroup] = s;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    s = simd_sum(thread_index_in_simdgroup < simdgroups_per_threadgroup ? shared[thread_index_in_simdgroup] : 0.0f);
    float scale = metal::precise::rsqrt(s / N + c);
    for (uint i = l; i < N; i += n) out0[row * N + i] = T(a[row * N + i] * scale) * b[i];"""
for _t in (f32, f16) + ((bfloat16,) if bfloat16 is not None else ()):
    _a, _w = A.astype(_t), G.astype(_t)
    _d = _a.astype(np.float64)
    case(
        f"rms_norm {np.dtype(_t).name}",
        RMS_NORM,
        [_a, _w, np.asarray(1e-5, f32)],
        [(_d / np.sqrt((_d * _d).mean(1, keepdims=True) + 1e-5) * _w.astype(np.float64)).astype(_t)],
        grid=(ROWS * 256, 1, 1),
        threadgroup=(256, 1, 1),
        template=[("N", COLS), ("T", _t)],
        rtol=1e-5 if _t == f32 else 2e-2,
        atol=1e-5 if _t == f32 else 1e-2,
    )
Am, Bm = rng.standard_normal((40, 56)).astype(f32), rng.standard_normal((56, 24)).astype(f32)
case(
    "matrix product, threadgroup tiles",
    """
    threadgroup float ta[TILE][TILE], tb[TILE][TILE];
    uint2 l = thread_position_in_threadgroup.xy, p = threadgroup_position_in_grid.xy * TILE + l;
    float sum = 0;
    for (uint k = 0; k < K; k += TILE) {
        ta[l.y][l.x] = p.y < M && k + l.x < K ? a[p.y * K + k + l.x] : 0;
        tb[l.y][l.x] = k + l.y < K && p.x < N ? b[(k + l.y) * N + p.x] : 0;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint j = 0; j < TILE; ++j) sum += ta[l.y][j] * tb[j][l.x];
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    if (p.y < M && p.x < N) out0[p.y * N + p.x] = sum;""",
    [Am, Bm],
    [Am @ Bm],
    grid=(32, 48, 1),
    threadgroup=(16, 16, 1),
    template=[("M", 40), ("N", 24), ("K", 56), ("TILE", 16)],
    rtol=1e-4,
    atol=1e-4,
)
SIMD_PRODUCT = """
    uint2 tile = threadgroup_position_in_grid.xy * uint2(1, 2) + uint2(0, simdgroup_index_in_threadgroup);
    simdgroup_matrix<T, 8, 8> left, right;
    simdgroup_float8x8 sum = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    if (tile.y * 8 >= M) return;
    for (uint k = 0; k < K; k += 8) {
        simdgroup_load(left, a + tile.y * 8 * K + k, K);
        simdgroup_load(right, b, N, ulong2(tile.x * 8, k));
        simdgroup_multiply_accumulate(sum, left, right, sum);
    }
    simdgroup_store(sum, out0 + tile.y * 8 * N + tile.x * 8, N);"""
for _t in (f32, f16):
    case(
        f"matrix product, simdgroup_matrix {np.dtype(_t).name}",
        SIMD_PRODUCT,
        [Am.astype(_t), Bm.astype(_t)],
        [Am.astype(_t).astype(f32) @ Bm.astype(_t).astype(f32)],
        grid=(3 * 64, 3, 1),
        threadgroup=(64, 1, 1),
        template=[("M", 40), ("N", 24), ("K", 56), ("T", _t)],
        rtol=1e-4,
        atol=1e-4,
    )
case(
    "scan with simd_prefix",
    """
    threadgroup float sums[32];
    uint l = thread_index_in_threadgroup, lane = thread_index_in_simdgroup, g = simdgroup_index_in_threadgroup;
    float before = 0;
    for (uint base = 0; base < N; base += threads_per_threadgroup.x) {
        uint i = base + l;
        float x = i < N ? a[i] : 0, s = simd_prefix_inclusive_sum(x);
        if (lane == threads_per_simdgroup - 1) sums[g] = s;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (g == 0) sums[lane] = simd_prefix_inclusive_sum(lane < simdgroups_per_threadgroup ? sums[lane] : 0);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (i < N) out0[i] = before + s + (g > 0 ? sums[g - 1] : 0);
        before += sums[simdgroups_per_threadgroup - 1];
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }""",
    [A[0]],
    [np.cumsum(A[0].astype(np.float64)).astype(f32)],
    grid=(256, 1, 1),
    threadgroup=(256, 1, 1),
    template=[("N", COLS)],
    rtol=1e-4,
    atol=1e-3,
)
T_, D_ = 77, 64
Q, Kk, Vv = (rng.standard_normal(s).astype(f32) for s in ((4, D_), (4, T_, D_), (4, T_, D_)))
_s = np.einsum("hd,htd->ht", Q.astype(np.float64), Kk.astype(np.float64)) / 8
_p = np.exp(_s - _s.max(1, keepdims=True))
_p /= _p.sum(1, keepdims=True)
case(
    "flash attention, a decode step",
    """
    constexpr int E = D / 32;
    threadgroup float ms[8], ls[8], os[8][D];
    uint h = threadgroup_position_in_grid.x, lane = thread_index_in_simdgroup, g = simdgroup_index_in_threadgroup;
    float q[E], o[E] = {0}, m = -INFINITY, l = 0;
    for (int e = 0; e < E; ++e) q[e] = a[h * D + lane * E + e] * rsqrt(float(D));
    for (uint t = g; t < T; t += 8) {
        float s = 0;
        for (int e = 0; e < E; ++e) s += q[e] * b[(h * T + t) * D + lane * E + e];
        s = simd_sum(s);
        float next = max(m, s), scale = exp(m - next), p = exp(s - next);
        l = l * scale + p;
        for (int e = 0; e < E; ++e) o[e] = o[e] * scale + p * c[(h * T + t) * D + lane * E + e];
        m = next;
    }
    if (lane == 0) { ms[g] = m; ls[g] = l; }
    for (int e = 0; e < E; ++e) os[g][lane * E + e] = o[e];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (g == 0) {
        float most = -INFINITY, sum = 0;
        for (int k = 0; k < 8; ++k) most = max(most, ms[k]);
        for (int k = 0; k < 8; ++k) sum += ls[k] * exp(ms[k] - most);
        for (int e = 0; e < E; ++e) {
            float y = 0;
            for (int k = 0; k < 8; ++k) y += os[k][lane * E + e] * exp(ms[k] - most);
            out0[h * D + lane * E + e] = y / sum;
        }
    }""",
    [Q, Kk, Vv],
    [np.einsum("ht,htd->hd", _p, Vv.astype(np.float64)).astype(f32)],
    grid=(4 * 256, 1, 1),
    threadgroup=(256, 1, 1),
    template=[("T", T_), ("D", D_)],
    rtol=1e-4,
    atol=1e-5,
)
OUT_, IN_ = 24, 256
W4 = rng.integers(0, 2**32, (OUT_, IN_ // 8)).astype(u32)
S4, B4 = rng.uniform(0.01, 0.1, (OUT_, IN_ // 64)).astype(f16), rng.uniform(-1, 0, (OUT_, IN_ // 64)).astype(f16)
_w4 = ((W4[:, :, None] >> (4 * np.arange(8, dtype=u32))) & u32(15)).reshape(OUT_, IN_).astype(np.float64)
_w4 = _w4 * np.repeat(S4.astype(np.float64), 64, 1) + np.repeat(B4.astype(np.float64), 64, 1)
case(
    "4-bit matrix-vector product",
    """
    uint row = thread_position_in_grid.y, lane = thread_index_in_simdgroup;
    float sum = 0;
    for (uint word = lane; word < IN / 8; word += 32) {
        uint packed = b[row * (IN / 8) + word];
        half scale = c[row * (IN / 64) + word / 8], bias = d[row * (IN / 64) + word / 8];
        float part = 0, all = 0;
        for (uint j = 0; j < 8; ++j) { float x = a[word * 8 + j]; part += x * float(extract_bits(packed, 4 * j, 4u)); all += x; }
        sum += float(scale) * part + float(bias) * all;
    }
    sum = simd_sum(sum);
    if (simd_is_first()) out0[row] = sum;""",
    [X, W4, S4, B4],
    [(_w4 @ X.astype(np.float64)).astype(f32)],
    grid=(32, OUT_, 1),
    threadgroup=(32, 4, 1),
    template=[("IN", IN_)],
    rtol=1e-4,
    atol=1e-3,
)
case(
    "bitonic sort",
    """
    threadgroup float keys[N];
    uint l = thread_index_in_threadgroup;
    keys[l] = a[l];
    for (uint size = 2; size <= N; size <<= 1) {
        for (uint step = size >> 1; step > 0; step >>= 1) {
            threadgroup_barrier(mem_flags::mem_threadgroup);
            uint other = l ^ step;
            if (other > l) {
                float x = keys[l], y = keys[other];
                if ((x > y) == ((l & size) == 0)) { keys[l] = y; keys[other] = x; }
            }
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out0[l] = keys[l];""",
    [X],
    [np.sort(X)],
    grid=(256, 1, 1),
    threadgroup=(256, 1, 1),
    template=[("N", 256)],
    rtol=0,
    atol=0,
)
TK = rng.permutation(4 * 512).reshape(4, 512).astype(f32)
_order = np.argsort(-TK, axis=1)[:, :16]
case(
    "top-k by bitonic merges",
    """
    threadgroup Item best[N / 32][32];
    uint row = threadgroup_position_in_grid.y, lane = thread_index_in_simdgroup, g = simdgroup_index_in_threadgroup;
    uint column = thread_position_in_threadgroup.x;
    Item mine = {a[row * N + column], column};
    for (ushort size = 2; size <= 32; size <<= 1)
        for (ushort step = size >> 1; step > 0; step >>= 1) mine = compare(mine, step, ((lane & size) == 0) == ((lane & step) == 0));
    best[g][lane] = mine;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint half_ = N / 64; half_ > 0; half_ /= 2) {
        Item merged = mine;
        if (g < half_) {
            Item theirs = best[g + half_][31 - lane];  // the other way round: a bitonic sequence
            merged = theirs < mine ? mine : theirs;
            for (ushort step = 16; step > 0; step >>= 1) merged = compare(merged, step, (lane & step) == 0);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        best[g][lane] = mine = merged;
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    if (g == 0 && lane < K) { out0[row * K + lane] = mine.value; out1[row * K + lane] = mine.index; }""",
    [TK],
    [np.take_along_axis(TK, _order, 1), _order.astype(u32)],
    header="""
    struct Item {
        float value;
        uint index;
        bool operator<(Item other) const { return value < other.value || (value == other.value && index > other.index); }
    };
    METAL_FUNC Item compare(Item mine, ushort step, bool larger) {
        Item other = {simd_shuffle_xor(mine.value, step), simd_shuffle_xor(mine.index, step)};
        return (mine < other) == larger ? other : mine;
    }""",
    grid=(512, 4, 1),
    threadgroup=(512, 1, 1),
    template=[("N", 512), ("K", 16)],
)

_H, _T, _D = 2, 9, 32
RW = {n: rng.uniform(-1, 1, (_T, _H, _D)).astype(f16) for n in "rkv"}
RWd, RWu = np.exp(-np.exp(rng.uniform(-1, 1, (_H, _D)))).astype(f32), rng.uniform(-1, 1, (_H, _D)).astype(f32)
RWs = rng.uniform(-1, 1, (_H, _D, _D)).astype(f32)
_state, _rows = RWs.astype(np.float64), []
for _t in range(_T):
    _r, _k, _v = (RW[n][_t].astype(np.float64) for n in "rkv")
    _kv = _k[:, :, None] * _v[:, None, :]
    _rows.append(np.einsum("hi,hij->hj", _r, _state + RWu[:, :, None].astype(np.float64) * _kv))
    _state = _state * RWd[:, :, None].astype(np.float64) + _kv
case(
    "a linear recurrence with decay",
    """
    constexpr int V = D / 4;
    threadgroup float4 r4[V], k4[V], u4[V], w4[V];
    const uint h = threadgroup_position_in_grid.x, j = thread_index_in_threadgroup;
    float4 s[V];
    for (int i = 0; i < V; i++) for (int e = 0; e < 4; e++) s[i][e] = f[(h * D + 4 * i + e) * D + j];
    ((threadgroup float*)u4)[j] = e[h * D + j];
    ((threadgroup float*)w4)[j] = d[h * D + j];
    for (uint t = 0; t < T; t++) {
        const uint at = (t * threadgroups_per_grid.x + h) * D + j;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        reinterpret_cast<threadgroup float*>(r4)[j] = static_cast<float>(a[at]);
        reinterpret_cast<threadgroup float*>(k4)[j] = static_cast<float>(b[at]);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        const float v = c[at];
        float4 y = 0;
        #pragma clang loop unroll(full)
        for (int i = 0; i < V; i++) {
            const float4 kv = k4[i] * v;
            y += r4[i] * fma(u4[i], kv, s[i]);
            s[i] = fma(w4[i], s[i], kv);
        }
        out0[at] = half((y.x + y.y) + (y.z + y.w));
    }
    for (int i = 0; i < V; i++) for (int e = 0; e < 4; e++) out1[(h * D + 4 * i + e) * D + j] = s[i][e];""",
    [RW["r"], RW["k"], RW["v"], RWd, RWu, RWs],
    [np.stack(_rows).astype(f16), _state.astype(f32)],
    grid=(_H * _D, 1, 1),
    threadgroup=(_D, 1, 1),
    template=[("T", _T), ("D", _D)],
    rtol=2e-3,
    atol=2e-3,
)


def _philox(counter, key, rounds=10):
    c, k = [np.uint64(x) + np.zeros(counter[0].shape, np.uint64) for x in counter], [np.uint64(x) for x in key]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(rounds):
        p, q = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(q >> np.uint64(32)) ^ c[1] ^ k[0], q & low, (p >> np.uint64(32)) ^ c[3] ^ k[1], p & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return [x.astype(u32) for x in c]


_words = _philox([np.arange(100), np.uint64(7), np.uint64(0), np.uint64(0)], [20, 11])
_uniform = (np.stack(_words[:3], 1) >> u32(9) | u32(0x3F800000)).view(f32) - 1
case(
    "random numbers by Philox",
    """
    uint4 c = uint4(thread_position_in_grid.x, seed.z, 0, 0);
    uint2 k = seed.xy;
    for (int i = 0; i < 10; i++, k += uint2(0x9E3779B9u, 0xBB67AE85u)) {
        const uint2 low = c.xz * M, high = mulhi(c.xz, M);
        c = uint4(high.y ^ c.y ^ k.x, low.y, high.x ^ c.w ^ k.y, low.x);
    }
    reinterpret_cast<device packed_float3*>(out0)[thread_position_in_grid.x] = as_type<float3>(c.xyz >> 9 | 0x3F800000u) - 1;
    out1[thread_position_in_grid.x] = as_type<uchar4>(c.w).z;""".replace("seed", "(*(constant packed_uint3*)a)"),
    [np.array([20, 11, 7], u32)],
    [_uniform, (_words[3] >> u32(16) & u32(255)).astype(np.uint8)],
    header="constant constexpr uint2 M = uint2(0xD2511F53u, 0xCD9E8D57u);",
    grid=(100, 1, 1),
    threadgroup=(32, 1, 1),
    rtol=0,
    atol=0,
)
for _count in (1, 2, 3):
    _arrays = [np.zeros((2 + k, 7 + k, 3), f32) for k in range(_count)]
    for _words, _values in (
        (("shape",), lambda a: a.shape),
        (("strides",), lambda a: [s // 4 for s in a.strides]),
        (("ndim",), lambda a: [a.ndim]),
        (("shape", "strides", "ndim"), lambda a: [*a.shape, *(s // 4 for s in a.strides), a.ndim]),
    ):
        _reads = [
            f"{n}_{w}" + ("" if w == "ndim" else f"[{i}]")
            for n in "abc"[:_count]
            for w in _words
            for i in range(1 if w == "ndim" else 3)
        ]
        case(
            f"{' '.join(_words)} of {_count}",
            "".join(f"out0[{i}] = {read};" for i, read in enumerate(_reads)),
            _arrays,
            [np.array([v for a in _arrays for v in _values(a)], np.int64)],
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
        )
_t = X[:32].astype(np.float64)
case(
    "scalars beside 16-bit vectors in ?:, swizzles of other components",
    f"""{ID}
    half4 v = half4(a[i], 1, 2, 3); float4 f = float4(v); bfloat4 g = bfloat4(f);
    half4 w = a[i] > 0 ? v : 0.0f; half2 u = a[i] > 0 ? v.zw : 1.0h; half s = 5; half3 t = a[i] > 0 ? s : v.yzw;
    bfloat4 b4 = a[i] > 0 ? 0 : g; float2 p = a[i] > 0 ? f.xy : f.wz; w += a[i] > 1 ? v : 0.5f;
    uint2 q = i > 4 ? thread_position_in_grid.xy : thread_position_in_grid.yx;
    auto m = max(a[i] > 0 ? v.yzw : 1.5h, half3(0)) * 2.0h;
    ((device float4*)out0)[i] = float4(float(w.y) + float(u.x), float(t.z) + float(b4.w), p.y + q.x, m.z);""",
    [X[:32]],
    [
        np.stack(
            [
                np.where(_t > 0, 1, 0) + np.where(_t > 1, 1, 0.5) + np.where(_t > 0, 2, 1),
                np.where(_t > 0, 5 + 0, 3 + 3),
                np.where(_t > 0, 1, 2) + np.where(np.arange(32) > 4, np.arange(32), 0),
                np.where(_t > 0, 6, 3),
            ],
            1,
        ).astype(f32)
    ],
)
# Every operator between a vector, or its swizzle, and every scalar: T has to come of it, or bool4 of a comparison.
_four = np.arange(1.0, 5)
_results = [f(_four, 2.0) for f in (np.add, np.subtract, np.multiply, np.divide)]
_results += [f(2.0, _four) for f in (np.add, np.subtract, np.multiply, np.divide)]
_results += [f(_four, 2) for f in (np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal)]
_results += [f(2, _four) for f in (np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal)]
for _T in ("float", "half", "bfloat"):
    _body = f"{_T}4 v = {_T}4(a[0], a[1], a[2], a[3]), r; int n = 0; device float4 *o = (device float4*)out0;"
    for _scalar in (
        "int(2)",
        "2u",
        "2.0f",
        "short(2)",
        "ulong(2)",
        f"{_T}(2)",
        *(("2.0h", "2.0bf") if _T == "float" else ()),
    ):
        _body += f"{{ auto s = {_scalar};"
        for _left, _right in (("v", "s"), ("s", "v.xyzw")):
            for _op in ("+", "-", "*", "/"):
                _body += f"o[n++] = float4({_T}4({_left} {_op} {_right}));"
        for _left, _right in (("v.xyzw", "s"), ("s", "v")):
            for _op in ("==", "!=", "<", "<=", ">", ">="):
                _body += f"{{ bool4 t = {_left} {_op} {_right}; o[n++] = float4(t); }}"
        _body += "r = v; r += s; r -= s; r *= s; r /= s; o[n++] = float4(r); }"
    _count = _body.count("auto s =")
    case(
        f"{_T}4 and every scalar",
        _body,
        [_four.astype(f32)],
        [np.tile(np.concatenate([*_results, _four]), _count).astype(f32)],
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
        rtol=1e-2,
    )
_S = np.arange(24, dtype=f32).reshape(4, 6)
case(
    "complex numbers",
    f"{ID} complex64_t z = a[i]; z = z * z + 1.0f; z = z / a[i]; out0[i] = z; out1[i] = z.real;",
    [(X[:32] + 1j * P[:32]).astype(np.complex64)],
    [
        (lambda z: (z * z + 1) / z)(X[:32] + 1j * P[:32]).astype(np.complex64),
        (lambda z: (z * z + 1) / z)(X[:32] + 1j * P[:32]).real.astype(f32),
    ],
    rtol=1e-4,
    atol=1e-4,
)


# ---- combinations: one expression, said to MSL and to Python, for operands of every kind


class Vector:
    """What a vector is in each of the threads, with MSL's operators: results are rounded, or wrap, to its type."""

    def __init__(self, values, dtype=None):
        self.values = np.asarray(values)
        if dtype is not None:
            self.values = self.values.astype(dtype)

    def __getattr__(self, swizzle):
        return Vector(self.values[:, ["xyzw".index(letter) for letter in swizzle]])

    def apply(self, f, other=0):
        dtype = self.values.dtype
        other = other.values if isinstance(other, Vector) else np.asarray(other)
        wide = dtype if dtype.kind in "iu" else f32
        with np.errstate(all="ignore"):
            return Vector(f(self.values.astype(wide), other.astype(dtype).astype(wide)), dtype)


for _name, _f in {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "truediv": np.divide,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "lshift": np.left_shift,
    "rshift": np.right_shift,
}.items():
    setattr(Vector, f"__{_name}__", lambda a, b, f=_f: a.apply(f, b))
    setattr(Vector, f"__r{_name}__", lambda a, b, f=_f: a.apply(lambda x, y: f(y, x), b))
for _name, _f in {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}.items():
    setattr(Vector, f"__{_name}__", lambda a, b, f=_f: a.apply(lambda x, y: f(x, y).astype(x.dtype), b))
Vector.__hash__ = None
Vector.__neg__ = lambda a: a.apply(lambda x, _: -x)
Vector.__invert__ = lambda a: a.apply(lambda x, _: ~x)

_ITEMS = 16
_AROUND = """
template <typename X> X same(X x) { return x; }
template <typename X, uint N> vec<X, N> twice(vec<X, N> v) { return v + v; }
template <typename X> struct Held { char before; packed_TYPE4 p; X v[2]; };
constant TYPE K = 3;
enum Count { NONE, ONE, TWO };
#define PICK(c, a, b) c ? a : b
"""


def combine(T, dtype, width):
    integer = np.dtype(dtype).kind in "iu"

    def vectors():
        if not integer:
            return Vector(rng.uniform(-3, 3, (_ITEMS, 4)), dtype)
        return Vector(rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, (_ITEMS, 4), np.dtype(dtype)))

    x, y = vectors(), vectors()
    whole, mix = "xyzw"[:width], {2: "yx", 3: "zxy", 4: "wzyx"}[width]
    v, w = getattr(x, whole), getattr(y, whole)
    operands = ["v", f"x.{mix}", "p", f"p.{mix}", "s.v[1]", "*at", f"s.p.{whole}", f"same(x.{whole})"]
    scalars = ["e", "2", "K", "x.y", "p[1]", "s.p.y", "TWO", "true"]
    scalars += [] if integer else ["2.0", "2.0h", "2.0f"]
    pairs = [(a, "w") for a in operands] + [("v", c) for c in scalars]
    pairs += [(b, a) for a, b in pairs]
    listed = [f"{a} {o} {b}" for a, b in pairs for o in "+-*" + ("&|^" if integer else "/")]
    listed += [f"V(v {o} {b})" for o in ("<", "<=", ">", ">=", "==", "!=") for b in ("w", f"y.{mix}", "e", "2")]
    listed += [f"-{a}" for a in operands] + [f"twice(x.{mix})", f"max(v, x.{mix})", "min(p, 2)", f"max(y.{mix}, e)"]
    listed += ["clamp(v, 1, 2)", "select(v, w, v < w)", f"select(x.{mix}, w, v >= e)"]
    if integer:
        bits = 8 * np.dtype(dtype).itemsize - 1
        listed += [f"v << (w & {bits})", "v >> 1", f"v >> (x.{mix} & {bits})", "~v", f"~x.{mix}"]
    names = {
        "v": v,
        "w": w,
        "p": x,
        "x": x,
        "y": y,
        "e": x.z,
        "K": 3,
        "TWO": 2,
        "true": 1,
        "V": lambda a: a,
        "same": lambda a: a,
        "twice": lambda a: a + a,
        "max": lambda a, b: a.apply(np.maximum, b),
        "min": lambda a, b: a.apply(np.minimum, b),
        "clamp": lambda a, b, c: a.apply(lambda q, _: np.clip(q, b, c)),
        "select": lambda a, b, c: Vector(np.where(c.values, b.values, a.values)),
    }
    python = {"s.v[1]": "v", "*at": "v", "p[1]": "x.y", "s.p.": "x.", "min(p,": "min(v,", "2.0h": "2", "2.0f": "2"}
    expected = []
    for expression in listed:
        for metal, said in python.items():
            expression = expression.replace(metal, said)
        expression = " ".join("v" if word == "p" else word for word in expression.replace("-p", "-v").split(" "))
        expected.append(np.broadcast_to(eval(expression, names).values, (_ITEMS, width)))
    body = (
        f"{ID} typedef vec<{T}, {width}> V; typedef packed_{T}{width} P; typedef vec<{T}, 4> F; int n = 0;"
        f"F x = F(((const device packed_{T}4*)a)[i]), y = ((const device packed_{T}4*)b)[i]; V v = x.{whole}, w(y.{whole});"
        f"P p = v; {T} e = x.z; Held<V> s; s.p = x; s.v[1] = v; thread V* at = s.v + 1; device P* o = (device P*)out0 + i;"
    )
    body += "".join(f"o[{_ITEMS} * n++] = P({expression});\n" for expression in listed)
    for kind in ("V", "P"):
        body += f"{{ {kind} q = w; q.{mix} = v; q += e; q[1] -= K; q *= x.{mix}; q.x = 2; ++q; q.{mix[:2]} -= y.xy;"
        body += f"o[{_ITEMS} * n++] = P(q); }}\n"
    q = np.array(w.values)
    q[:, ["xyzw".index(letter) for letter in mix]] = v.values
    q = (Vector(q) + x.z).values
    q[:, 1:2] = (Vector(q[:, 1:2]) - 3).values
    q = (Vector(q) * getattr(x, mix)).values
    q[:, 0] = 2
    q = (Vector(q) + 1).values
    first = ["xyzw".index(letter) for letter in mix[:2]]
    q[:, first] = (Vector(q[:, first]) - y.xy).values
    expected += [q, q]
    body += f'{{ auto c = e > K ? w : x.{mix}; static_assert(is_same_v<decltype(c), V>, "");'
    body += f"o[{_ITEMS} * n++] = P(PICK(e < K, c, v)); }}"
    picked = np.where((x.z > 3).values, w.values, getattr(x, mix).values)
    expected.append(np.where((x.z < 3).values, picked, v.values))
    case(
        f"combinations of {T}{width}",
        body,
        [x.values, y.values],
        [np.stack(expected)],
        header=_AROUND.replace("TYPE", T),
        grid=(_ITEMS, 1, 1),
        rtol=1e-5 if T == "float" else 0,  # which may be multiplied and added to in one
        atol=1e-5 if T == "float" else 0,
    )


for _T, _dtype, _width in (
    ("half", f16, 4),
    ("bfloat", bfloat16, 3),
    ("float", f32, 2),
    ("uchar", np.uint8, 4),
    ("short", np.int16, 3),
    ("ulong", np.uint64, 2),
):
    if _dtype is not None:
        combine(_T, _dtype, _width)

# ---- what published kernels make of the language

_x, _y, _z, _w = np.split(X.reshape(-1, 4), 4, axis=1)
case(
    "swizzles are vectors wherever they are read",
    f"{ID} float4 v = ((const device float4*)a)[i]; auto p = v.yx; p += v.zw; decltype(v.xyz) t = v.zyx; Pair s; s.xy = v.wz; s.xy.x += 1;"
    "float2 q = square(v.xy) + SWAPPED(v) + s.xy * s.rg(); out0[i] = total(v.wzy) + total(t.xy) + as_type<float4>(as_type<uint4>(v)).zw.x"
    " + v.xyz.zy.x + (v + 1).xy[1] + float4{1, 2, 3, 4}.yz.x; TO(v) = q; ++v.zw; v.xy++; v.xyz[0] += 1;"
    "((device float4*)out1)[i] = v; out2[i] = p.x + square(p.yx).x;",
    [X],
    [
        (_w + _z + _y + _z + _y + _z + _z + _y + 1 + 2)[:, 0],
        np.concatenate([_x**2 + _y**2 + _w + 1 + 2, _y**2 + _x**2 + _z + 1, _z + 1, _w + 1], 1),
        (_y + _z + (_x + _w) ** 2)[:, 0],
    ],
    header="struct Pair { float2 xy; float2 rg() { return 1; } };\n"
    "template <typename T> T square(T x) { return x * x; }\n"
    "template <typename T, uint N> T total(vec<T, N> v) { T s = 0; for (uint i = 0; i < N; i++) s += v[i]; return s; }\n"
    "#define SWAPPED(v) square(v.yx)\n#define TO(v) v.xy\n",
    grid=(64, 1, 1),
)
_h, _n = X.astype(f16), np.arange(256)
case(
    "conditionals have the type of their arms",
    f'{ID} half h = a[i]; auto g = i % 2 ? h : 0; static_assert(is_same_v<decltype(g), half>, "");'
    "out0[i] = bytes(i < 100 && is_same_v<float, half> ? h : 1) + bytes(h > 1 ? h : h < 0 ? -h : 0) + bytes(i ? 1.h / 4 : 1.h)"
    " + 10 * bytes(i > 3 ? 1.0h : 2.0f) + bytes(LARGER(h, 0)); half c = i > 9 ? (i > 99 ? 1 / 64.h : 1 / 16.h) : (i > 4 ? 1 / 4.h : 1.h);"
    "out1[i] = c + g; out2[i] = (i % 3 ? half4(h) : half4(1.0h).wzyx).x;",
    [_h],
    [
        np.full(256, 48, i32),
        np.select([_n > 99, _n > 9, _n > 4], [1 / 64, 1 / 16, 1 / 4], 1).astype(f16) + np.where(_n % 2, _h, f16(0)),
        np.where(_n % 3, _h, f16(1)),
    ],
    header="template <typename T> int bytes(T) { return sizeof(T); }\n#define LARGER(a, b) (a) > (b) ? (a) : (b)\n",
    **FLAT,
)
_halves, _words = (3 * X).astype(f16), (3 * X).view(u32)
_bfloats = ((_words + 0x7FFF + (_words >> 16 & 1)) >> 16).astype(np.uint16)
case(
    "bytes of what was rounded to 16 bits",
    f"{ID} half h = half(3 * a[i]); bfloat b = bfloat(3 * a[i]); out0[i] = as_type<uchar2>(h).x; out1[i] = uchar(as_type<ushort>(b));"
    "((device uchar2*)out2)[i] = as_type<uchar2>(h).yx; threadgroup uchar low[64]; uint l = thread_position_in_threadgroup.x;"
    "low[l] = uchar(as_type<ushort>(h)); threadgroup_barrier(mem_flags::mem_threadgroup); out3[i] = low[l ^ 1];",
    [X],
    [
        _halves.view(np.uint16).astype(np.uint8),
        _bfloats.astype(np.uint8),
        _halves.view(np.uint16).byteswap().view(np.uint8),
        _halves.view(np.uint16).astype(np.uint8)[np.arange(256) ^ 1],
    ],
    **FLAT,
)
case(
    "initializers",
    f"{ID} uint l = thread_position_in_threadgroup.x; threadgroup float sums[4] = {{1, 2}};"
    "threadgroup int count __attribute__((aligned(8))) = 3, two[2][2] __attribute__((aligned(64))) = {{1, 2}, {3, 4}};"
    "threadgroup __attribute__((aligned(16))) int mark;"
    "float4 v = {a[i], 2}; packed_float3 p = {1, v.xy}; half2 h[2] = {{1, 2.0f}, half2(3)}; constexpr float4 k = float4(float2(1), 2, 3);"
    "float f[4] = {[0 ... 2] = 5.0, [3] = 7}; uint4 u = {i, 1u, 2}; float2x2 m = {{1, 2}, {3, 4}}; Defaults d; half e[3] = {1, 2.0, half(3)};"
    "if (l == 5) { sums[2] = 4; count += 2; mark = 1; } threadgroup_barrier(mem_flags::mem_threadgroup);"
    "out0[i] = sums[0] + sums[1] + sums[2] + sums[3] + count + two[1][0] * mark; out1[i] = v.x + v.y + v.z + p[1] + h[0].y + h[1].x + k.w;"
    "out2[i] = f[0] + f[2] + f[3] + u.x + u.w + m[1][0] + d.v.y + d.h[1] + e[2] + d.p.z + columns[1].x + sum({1, 2, 3});",
    [X],
    [np.full(256, 15.0, f32), 2 * X + 2 + 2 + 3 + 3, (17 + _n + 3 + 2 + 2 + 3 + 3 + 3 + 6).astype(f32)],
    header="struct Defaults { float2 v = {1, 2}; half h[2] = {1, 2.0h}; packed_float3 p = {1, 2, 3}; };\n"
    "constant float2x2 columns = float2x2(float2(1, 2), float2(3, 4));\n"
    "inline float sum(initializer_list<float> l) { float s = 0; for (float x : l) s += x; return s; }\n",
    **FLAT,
)
case(
    "users' names, namespaces and macros",
    f"{ID} SHARED float mine[64]; uint l = thread_position_in_threadgroup.x; mine[l] = a[i]; ARRAY(half, more, 64); more[l] = 2;"
    "SHARED_FLOAT third[64], fourth; third[l] = 3; if (l == 5) fourth = 4; \n#define OWN threadgroup int\n OWN fifth; if (l == 6) fifth = 5;"
    "threadgroup_barrier(mem_flags::mem_threadgroup); float s = 0; UNROLLED (int k = 0; k < 4; ++k) { s += summed(0.25f); }"
    "out0[i] = mine[l ^ 1] + more[l ^ 1] + third[l ^ 1] + fourth + fifth + s + ::own::metal::twice(1) + metal::halved(8) + numeric_limits<Wide>::max() + ::seven()"
    " + decltype(Wide())::size + max(NONE, TWO) + half(1) * TWO + simd_min(5);",
    [X],
    [X[_n ^ 1] + 2 + 3 + 4 + 5 + 32 + 2 + 4 + 9 + 7 + 3 + 2 + 2 + 5],
    header="#define SHARED threadgroup\n#define ARRAY(T, name, n) threadgroup T name[n]\n#define SHARED_FLOAT SHARED float\n"
    '#define UNROLLED(x) _Pragma("clang loop unroll(full)") for (x)\n'
    "enum Count { NONE, ONE, TWO }; struct Wide { enum { size = 3 }; }; inline int seven() { return 7; }\n"
    "namespace own { namespace metal { inline float twice(float x) { return 2 * ::metal::fabs(x); } } }\n"
    "namespace metal { inline float halved(float x) { return metal::sqrt(x * x) / 2; }\n"
    "template <> struct numeric_limits<Wide> { static constexpr int max() { return 9; } }; }\n"
    "template <typename T> T simd_min(T x) { return x; }\n"
    "template <typename T> constexpr T summed(T x) { return ::metal::simd_sum(x); }\n",
    **FLAT,
)

case(
    "users' own swap, move, ceildiv, array and others of Metal's names",
    f"{ID} uint l = thread_position_in_threadgroup.x; threadgroup float s[64]; s[l] = a[i]; float x = a[i], y = 2; swap(x, y);"
    "threadgroup_barrier(mem_flags::mem_threadgroup); if (l == 0) swap(s[0], s[1]); threadgroup_barrier(mem_flags::mem_threadgroup);"
    "out1[i] = a[i]; out1[256 + i] = 5; swap(out1[i], out1[256 + i]); array<float, 3> p = {x, y, 1};"
    "out0[i] = s[l] + 1000 * p.v[0] + move(y) + ceildiv(7, 2u) + dot(1.0f, 2.0f) + length(y) + cross(1, 2) + normalize(y) + distance(y, 1.0f)"
    " + select(1.0f, 2.0f, true) + isnormal(y) + ldexp(y, 1) + modf(y, x) + frexp(y, x) + sincos(y, x) + extract_bits(3u, 0, 1) + reflect(y, y);",
    [X],
    [
        X[np.where(_n % 64 < 2, _n ^ 1, _n)] + 10 * X + 2000 + 9 + 9 + 9 + 10 * 10,
        np.concatenate([np.full(256, 5, f32), X]),
    ],
    header="template <typename T> inline void swap(thread T& a, thread T& b) { T t = a; a = b; b = t; }\n"
    "template <typename T> inline void swap(threadgroup T& a, threadgroup T& b) { T t = a; a = b; b = t; }\n"
    "template <typename T> METAL_FUNC void swap(device T& a, device T& b) { T t = a; a = b; b = t; }\n"
    "template <class T> T move(T x) { return x; }\n"
    "template <class T, class U> inline T ceildiv(T x, U y) { return T(9); }\n"
    "template <class A, int N> struct array { A v[N]; };\n"
    "template <typename T> T dot(T x, T y) { return 9; }\n"
    "template <class T, class U> int cross(T x, U y) { return 10; }\n"
    "template <class T, class U, class V> T select(T x, U y, V z) { return 10; }\n"
    "template <class T> T extract_bits(T x, uint y, uint z) { return 9; }\n"
    "template <class T, class U> T distance(T x, U y) { return x; }\n"
    + "".join(
        f"template <typename T> T {name}(T x) {{ return x + 10; }}\n" for name in ("length", "normalize", "isnormal")
    )
    + "".join(f"template <class T, class U> T {name}(T x, U y) {{ return x + 10; }}\n" for name in ("ldexp", "reflect"))
    + "".join(
        f"template <class T, class U> T {name}(T x, thread U& y) {{ return x + 10; }}\n"
        for name in ("modf", "frexp", "sincos")
    ),
    **FLAT,
)

case(
    "unions as wholes",
    f"{ID} uint l = thread_position_in_threadgroup.x; U p, q; p.v = float4(a[i], 1, 2, 3); q = p; threadgroup U shared[64]; shared[l] = raised(q);"
    "union { half4 h; uint2 u; ushort s[4]; } n; n.h = half4(i, 1, 2, 3); auto m = n; m = n; Tagged t = {{p}, 7}, s; s.h = half2(1); s.k = 1; s = t;"
    "Block b, c = {}; b.m = float2x2(i); c = b; threadgroup_barrier(mem_flags::mem_threadgroup); q = shared[l ^ 1]; U of[2] = {p, q}; of[0] = of[1];"
    "out0[i] = of[0].a[0] + q.v.y + m.h.w + m.u.x * 0 + s.u.a[3] + s.k + c.m[1][1]; out1[i] = q.u.x;",
    [X],
    [X[_n ^ 1] + 2 + 3 + 3 + 7 + _n, X[_n ^ 1].view(u32)],
    header="union U { float4 v; float a[4]; uint4 u; };\ninline U raised(U u) { u.a[1] += 1; return u; }\n"
    "struct Tagged { union { U u; half2 h; }; int k; };\ntypedef union alignas(16) { float2x2 m; packed_float4 p; } Block;\n",
    **FLAT,
)
case(
    "volatile variables of every type",
    f"{ID} uint l = thread_position_in_threadgroup.x; threadgroup volatile half t[64]; volatile threadgroup half* p = t; threadgroup volatile float4 v[64];"
    "p[l] = a[i]; v[l] = float4(a[i], 1, 2, 3); v[l].y += 1; volatile bfloat f = bfloat(i % 8); f *= 2; f = f + f; volatile short3 s = short3(i % 9); s += 1; s = s * short3(2);"
    "threadgroup_barrier(mem_flags::mem_threadgroup); half h = t[l ^ 1]; float4 w = v[l ^ 1]; volatile ushort n = 3; n += 1; n /= 2; n = n % (n + 1);"
    "half2 k = as_type<half2>(1u); volatile thread half2& r = k; r = half2(h, t[l]); volatile device half* q = out1; q[i] = h; q[i] += 1.0h;"
    "out0[i] = max(half(t[l]), h) + w.x + w.y + f + s.x + s[1] + n + r.y + v[l].yx.y + (t[l] > h ? t[l] : h) + abs(p[l]);",
    [X.astype(f16)],
    [
        (
            3 * np.maximum(_h, _h[_n ^ 1])
            - np.maximum(_h, _h[_n ^ 1])
            + _h[_n ^ 1].astype(f32)
            + 2
            + 4.0 * (_n % 8)
            + 4 * (_n % 9 + 1)
            + 2
            + 2 * _h.astype(f32)
            + np.abs(_h)
        ).astype(f32),
        _h[_n ^ 1] + f16(1),
    ],
    rtol=2e-3,
    atol=2e-3,
    **FLAT,
)
case(
    "members by name, sequences and names of Metal's own header",
    f"{ID} assert(i < 256); Range r = {{.begin = i, .end = 2 * i + 1}}; r = wider(Range{{.begin = r.begin, .end = r.end}});"
    "threadgroup _atomic<int> n[1]; if (thread_position_in_threadgroup.x == 0) clear(n); threadgroup_barrier(mem_flags::mem_threadgroup);"
    "atomic_fetch_add_explicit(n, 1, memory_order_relaxed); threadgroup_barrier(mem_flags::mem_threadgroup);"
    "out0[i] = r.end - r.begin + sum_of(make_index_sequence<5>()) + Range::WHOLE.end + uint(atomic_load_explicit(n, memory_order_relaxed))"
    " + make_integer_sequence<int, 7>::size() + TAKEN[i % 2] - LIMBS[i % 2] + (a[i] < float(__FLT16_MAX__) ? __LITTLE_ENDIAN__ : 0);"
    'os_log_default.log("%d", i); logger.log_debug("%f of %u", a[i], i);',
    [X],
    [(_n + 2 + 10 + 9 + 64 + 7 + 1 + 1 + 2 * (_n % 2)).astype(u32)],
    header='#include <metal_logging>\nconstant os_log logger("own", "tests");\n'
    "constant uint LIMBS[2] = {3, 4}; constant uint2 TAKEN = {LIMBS[1], LIMBS[0] + LIMBS[1]};\n"
    "struct Range { uint begin, end; static const Range WHOLE; };\n"
    "constexpr constant Range Range::WHOLE{.begin = 0, .end = 9};\n"
    "inline Range wider(Range r) { return {.begin = r.begin, .end = r.end + 1}; }\n"
    "template <size_t... I> constexpr uint sum_of(index_sequence<I...>) { return uint((I + ... + 0)); }\n"
    "inline void clear(threadgroup _atomic<int>* n) { atomic_store_explicit(n, 0, memory_order_relaxed); }\n",
    **FLAT,
)
case(
    "members for each address space",
    f"{ID} const device Wide* p = (const device Wide*)a; Wide w = p[i] + p[0]; threadgroup Wide t[64]; uint l = thread_position_in_threadgroup.x;"
    "t[l] = -w; threadgroup_barrier(mem_flags::mem_threadgroup); Wide s = t[l ^ 1] + w; s += p[1]; out0[i] = s.v;",
    [X],
    [-(X[_n ^ 1] + X[0]) + X + X[0] + X[1]],
    header="struct Wide { float v; Wide() = default; explicit Wide(float x) : v(x) {} Wide(Wide const device& o) : v(o.v) {}\n"
    "Wide operator+(Wide o) const { return Wide(v + o.v); }\nWide operator+(Wide o) const device { return Wide(*this) + o; }\n"
    "Wide operator+(Wide o) const threadgroup { Wide own = Wide(*this); return own + o; }\nWide operator-() const { return Wide(-v); }\n"
    "void operator+=(Wide o) { v += o.v; }\nvoid operator+=(Wide o) device { v += o.v; } };\n",
    **FLAT,
)
case(
    "users' operators for anything",
    f"{ID} Dual<float> d = {{a[i], 2}}; d = d / int(i + 1); Modulus m = {{int(i)}}; m = m % 3.0f; out0[i] = d.a + d.b + m.v + int(i) / 7;",
    [X],
    [(X + 2) / (_n + 1) + _n - 3 + _n // 7],
    header="template <typename T> struct Dual { T a, b; };\n"
    "template <typename T, typename U> inline Dual<T> operator/(Dual<T> x, U y) { return {x.a / y, x.b / y}; }\n"
    "struct Modulus { int v; template <class U> Modulus operator%(const U k) const { return {v - int(k)}; } };\n",
    **FLAT,
)
case(
    "simd's names of types",
    f"{ID} simd::float2 v = {{a[i], 2}}; simd_float3 w = simd_float3(v, 3); vector_uint4 u = {{1, 2, 3, 4}};"
    "matrix_float2x2 m = {{1, 2}, {3, 4}}; simd_float2x2 n = m * m; out0[i] = v.x + w.y + w.z + u.w + n.columns[1].x;",
    [X],
    [X + 2 + 3 + 4 + 15],
    header="#include <simd/simd.h>\n",
    **FLAT,
)


# ---- lockstep ----------------------------------------------------------------------------------------------------------
# Bodies that set `s` for thread `i`. What becomes loops over the lanes of a simdgroup, and what has to have a stack for each thread.
LOCKSTEP = {
    "loops": "for (int k = 0; k < 5; k++) { if (k == i % 4) continue; if (k > int(i % 7)) break; s += simd_sum(k); }",
    "do": "int k = 0; do { s += simd_max(int(i) * k); k++; if (k == 3 && i % 2) break; } while (k < int(i % 5));",
    "while": "while (simd_any(s < int(i % 6))) { s += 1; int t = simd_min(s); s += t / 8; }",
    "endless": "for (;;) { s++; if (s > int(i % 9)) break; s += simd_sum(1) / 16; }",
    "else": "if (i % 3 == 0) s = simd_sum(1); else if (simd_all(i > 4)) s = 2; else { s = simd_sum(2); s *= 3; } s += simd_sum(s);",
    "return": "if (i % 5 == 1) { y[i] = -1; return; } s = simd_sum(1); if (i % 7 == 2) return; y[i] = s; s = simd_sum(1);",
    "return in a loop": "for (int k = 0; k < 9; k++) { if (x[i] + k > 40) { y[i] = k; return; } } s = simd_sum(1);",
    "barriers": "threadgroup int t[64]; uint n = threads_per_threadgroup.x, l = thread_position_in_threadgroup.x; t[l] = x[i];"
    "for (uint k = 1; k < 64; k *= 2) { threadgroup_barrier(mem_flags::mem_threadgroup); int o = t[(l + k) % n];"
    "simdgroup_barrier(mem_flags::mem_none); threadgroup_barrier(mem_flags::mem_threadgroup); t[l] += o; } s = t[l];",
    "pointers": "const device int* p = x + i; device int* q = y; q += i; p += 1 - int(i % 2); s = simd_sum(*p); *q = s; y += i; y[0] = s + 1; y -= i; s += *q;",
    "arrays": "int a[3] = {1, int(i), 3}, b = a[1]; thread int* p = a; s = simd_sum(a[2]); p[1] += s; s = a[1] + b; thread int& r = a[0]; r += simd_max(a[1]); s += a[0];",
    "scopes": "int k = 1; { int k = simd_sum(2); s += k; { int k = 5; s += simd_sum(k) + k; } s += k; } s += k;",
    "the same for all": "const uint n = threads_per_threadgroup.x; uint m = n / 2, g = threadgroup_position_in_grid.x; m += simd_sum(1); s = int(n + m + g * 100);",
    "guarded": "if (n0 == 0) { y[i] = 7; return; } uint q = 100 / n0; s = simd_sum(int(q));",
    "types": "using V = vec<int, 2>; struct P { int a; V b; }; constexpr int K = 2; P p = {int(i), V(K, 3)}; p.b.x = simd_sum(p.b.x); s = p.a + p.b.x + p.b.y;",
    "two": "int a = simd_sum(1), b = simd_max(int(i)); s = a + b; float f = simd_sum(0.5f) * simd_max(float(i)); s += int(f);",
    "of one another": "s = simd_shuffle_up(simd_sum(int(i)) + int(i), 1) + quad_sum(simd_prefix_inclusive_sum(1)); s = simd_sum(s) > 3 ? s : -s;",
    "pragma": "\n#pragma unroll\nfor (int k = 0; k < 4; k++) { s += k; }\n#pragma clang loop unroll(full)\nfor (int k = 0; k < 4; k++) { s += simd_sum(k); }",
    "strided": "for (uint k = i; k < 129; k += 7) s += x[k] * int(k); for (uint k = 2 * i + 1; k <= 120; k += N) { int v = s + x[k % 129]; s += v; } s += simd_sum(s);",
    "strided around": "for (uint k = i * 60000000; k < 4000000000u; k += 1000000000u) { s += 1 + int(k % 7); } s += simd_sum(s) * 100;",
    "strided under a mask": "if (i % 3) { s = simd_sum(1); for (int k = int(i); k < 100; k += 16) y[i] += k; s += y[i]; }",
    "strided with a mark": "\n#pragma unroll\nfor (uint k = i; k < 129; k += 32)\n s += x[k];\n s = simd_sum(s);",
    "moved": "x += n0; y += 0 * N; int v = x[i - n0 * (i > 3)]; const device int* p = x + i; x += 1; s = simd_sum(v + p[-n0]) + x[-1];",
    "moved by lanes": "x += i % 2; s = simd_sum(x[0] + int(i)); x += 1; s += x[0];",
    "if constexpr": "if constexpr (N > 3) { s = simd_sum(N); } else { s = simd_sum(1); }",
}
NOT_IN_LOCKSTEP = {
    "lambda": "auto f = [&](int v) { return simd_sum(v); }; s = f(1);",
    "closure": "int k = 1; auto f = [&](int v) { return v + k; }; s = simd_sum(1); k = 5; s += f(s);",
    "short circuit": "if (i % 2 && simd_any(i == 4)) s = 1; s += simd_sum(1);",
    "conditional": "s = i % 2 ? simd_sum(1) : 4;",
    "barrier in a branch": "if (i < 64) { threadgroup_barrier(mem_flags::mem_none); s = 1; } else { s = 2; threadgroup_barrier(mem_flags::mem_none); }",
    "switch": "switch (i % 3) { case 0: s = simd_sum(1); break; default: s = simd_sum(2); }",
    "macro": "s = TOTAL(1);",
    "reference": "const auto& r = i + 1; s = simd_sum(1); s += r;",
}
