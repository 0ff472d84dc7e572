/* Custom kernels below the public interface: tokens, translation, digests. What kernels compute is tested from Python.
 * SPDX-License-Identifier: MIT */
#include "support.h"

#include "kernel/messages.h"
#include "kernel/sha256.h"
#include "kernel/source.h"
#include "kernel/tokenizer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void every_byte_belongs_to_a_token(void **state) {
    (void)state;
    static const char *const texts[] = {
        "",
        "a",
        "/* open",
        "\"open",
        "'",
        "R\"x(raw )\" )x\" after",
        "#define A(x) \\\n  x + 1\nint b;",
        "#error it's\nint x;",
        "1.5e-3f 0x1p-4 0xe+1 1'000",
        "\xc3\xa9t\xc3\xa9",
        "a->b::c",
        "// comment \\\n goes on\nx",
        "#",
        "#include",
        "u8\"x\" L'c'",
    };
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        mtl_tokens tokens;
        assert_true(mtl_tokenize(&tokens, texts[i], strlen(texts[i])));
        const char *at = texts[i];
        for (size_t t = 0; t < tokens.count; t++) {
            assert_ptr_equal(tokens.token[t].text, at);
            at += tokens.token[t].length;
        }
        assert_int_equal(*at, '\0');
        mtl_tokens_free(&tokens);
    }
}

static void numbers_end_where_they_should(void **state) {
    (void)state;
    static const char text[] = "0xe+1 1e+1 x.y .5h 1..2";
    static const char *const expected[] = {"0xe", "+", "1", "1e+1", "x", ".", "y", ".5h", "1..2"};
    mtl_tokens tokens;
    assert_true(mtl_tokenize(&tokens, text, sizeof text - 1));
    size_t found = 0;
    for (size_t t = 0; t < tokens.count; t++) {
        if (tokens.token[t].kind == MTL_TOKEN_SPACE) continue;
        assert_int_equal(tokens.token[t].length, strlen(expected[found]));
        assert_memory_equal(tokens.token[t].text, expected[found], tokens.token[t].length);
        found++;
    }
    assert_int_equal(found, sizeof expected / sizeof expected[0]);
    mtl_tokens_free(&tokens);
}

typedef struct {
    const char *metal, *expected;
} pair;

static void expect_translation(const pair *pairs, size_t count, mtl_region region, const mtl_unit_options *options) {
    for (size_t i = 0; i < count; i++) {
        mtl_text out = {0};
        mtl_translate(&out, pairs[i].metal, region, options);
        assert_string_equal(mtl_text_string(&out), pairs[i].expected);
        mtl_text_free(&out);
    }
}

static void metal_becomes_cxx(void **state) {
    (void)state;
    static const pair pairs[] = {
        {"device float* p", "       float* p"},
        {"const device T& x", "const        T& x"},
        {"constant float* p", "const float* p"},
        {"const constant int* p", "const          int* p"},
        {"constant const int* p", "         const int* p"},
        {"static constant float x = 1;", "static constexpr float x = 1;"},
        {"a = 1.0 * b + 2.f - 1e-3 + 0x1p3 + 7;", "a = 1.0f * b + 2.f - 1e-3f + 0x1p3f + 7;"},
        {"half h = 1.0h;", "half h = ::metal::half(1.0f);"},
        {"b = .5BF - 1e-3bf;", "b = ::metal::bfloat(.5f) - ::metal::bfloat(1e-3f);"},
        {"void f(float x [[buffer(0)]])", "void f(float x              )"},
        {"[[maybe_unused]] int x;", "[[maybe_unused]] int x;"},
        {"#include <metal_stdlib>\nint x;", "                       \nint x;"},
        {"#include \"own.h\"\n", "#include \"own.h\"\n"},
        {"kernel void f()", "       void f()"},
        {"template kernel F f<int>; a.kernel = 1;", "template        F f<int>; a.kernel = 1;"},
        {"threadgroup float* p = shared;", "            float* p = shared;"},
        {"f((threadgroup float*)p);", "f((            float*)p);"},
        {"// device 1.0\n\"constant\"", "// device 1.0\n\"constant\""},
        {"threadgroup float a[4];",
         "typedef float __mtl_a_0[4]; __mtl_a_0 &a = __mtl_variable<__mtl_a_0>(__mtl_group, 0);"},
        {"threadgroup vec<T, 2> a[N][2], b;",
         "typedef vec<T, 2> __mtl_a_0[N][2], __mtl_b_1; __mtl_a_0 &a = __mtl_variable<__mtl_a_0>(__mtl_group, 0); "
         "__mtl_b_1 &b = __mtl_variable<__mtl_b_1>(__mtl_group, 1);"},
        {"threadgroup int n = 2 * 1.0, a[2] = {0};",
         "typedef int __mtl_n_0          , __mtl_a_1[2]      ; __mtl_n_0 &n = __mtl_variable<__mtl_n_0>(__mtl_group, "
         "0, 2 * "
         "1.0f); __mtl_a_1 &a = __mtl_variable<__mtl_a_1>(__mtl_group, 1, __mtl_a_1{0});"},
        {"#define TG threadgroup\nf((TG float*)p);", "#define TG            \nf((            float*)p);"},
        {"#define SHARED(T, n) threadgroup T n[4]\n", "#define SHARED(T, n) typedef T __mtl_##n[4]; __mtl_##n &n = "
                                                      "__mtl_variable<__mtl_##n>(__mtl_group, 96 + __COUNTER__)\n"},
        {"#define SF threadgroup float\n#define S2 SF\nS2\na[4]; f((S2*)p);",
         "#define SF             float\n#define S2 SF\ntypedef S2\n__mtl_a_0[4]; __mtl_a_0 &a = "
         "__mtl_variable<__mtl_a_0>(__mtl_group, 0); f((S2*)p);"},
        {"#define P threadgroup float*\nP p;", "#define P             float*\nP p;"},
        {"return ::exp(x);", "return ::metal::exp(x);"},
        {"inline ::c10::X f() { return ::metal::exp(decltype(x)::v); }",
         "inline ::metal::c10::X f() { return ::metal::exp(decltype(x)::v); }"},
        {"metal::exp(x)", "metal::exp(x)"},
        {"coherent(system) device T* p; coherent = 1;", "                        T* p; coherent = 1;"},
        {"float a[[unclosed;", "float a[[unclosed;"},
    };
    const mtl_unit_options options = {0};
    expect_translation(pairs, sizeof pairs / sizeof pairs[0], MTL_REGION_BODY, &options);
    static const pair header[] = {
        {"#define SHARED threadgroup\nconstant float a[1] = {1};",
         "#define SHARED            \nconst float a[1] = {1};"},
        {"namespace metal { int f(); } namespace a { namespace metal { } }",
         "extern \"C++\" { int f(); } namespace a { namespace metal { } }"},
        {"template <class T, uint N> T f(vec<T, N> v);", "template <class T, int N> T f(vec<T, N> v);"},
        {"template <class T, uint N> T f(thread T (&a)[N]);", "template <class T, uint N> T f(       T (&a)[N]);"},
        {"struct S { S(int x) constant {} int f() constant { return 1; } };",
         "struct S { S(int x)          {} int f() const { return 1; } };"},
        {"void f(device T* m [[function_constant(has_m)]])", "void f(       T* m                             )"},
    };
    expect_translation(header, sizeof header / sizeof header[0], MTL_REGION_HEADER, &options);
    static const pair cuda[] = {
        {"#define SHARED threadgroup\nconstant float a[1] = {1};",
         "#define SHARED            \nconst float a[1] = {1};"},
        {"#define SF threadgroup float\nSF a[4];", "#define SF             float\n__shared__ SF a[4];"},
        {"threadgroup int n = 1, m;", "__shared__ int n    , m; __mtl_initialize(n, 1);"},
        {"float a[4] = {[0 ... 3] = 1.0};",
         "float a[4] =  {}                ; for (int __mtl_at = 0 ; __mtl_at <=  3; ++__mtl_at) a[__mtl_at] = 1.0f;"},
    };
    const mtl_unit_options gpu = {.target = MTL_TARGET_CUDA};
    expect_translation(cuda, sizeof cuda / sizeof cuda[0], MTL_REGION_BODY, &gpu);
}

static void swizzles_are_values(void **state) {
    (void)state;
    static const pair pairs[] = {
#define VALUE(x) "(::metal::msl_::valued(), " x ")"
        {"f(v.xy);", "f(" VALUE("v.xy") ");"},
        {"auto a = p->c[1].v.bgr + ns::g<2>(x).ww;",
         "auto a = " VALUE("p->c[1].v.bgr") " + " VALUE("ns::g<2>(x).ww") ";"},
        {"x = (a + b).xyz.x + float4{1, 2, 3, 4}.yz[0];",
         "x = " VALUE("(a + b).xyz") ".x + " VALUE("float4{1, 2, 3, 4}.yz") "[0];"},
        {"v.xy = w.yx; v.zw += 1; ++v.xy; v.zw--; (v.xy) *= 2; v.xyz.x = 1; v.xyz[0] = 1;",
         "v.xy = " VALUE("w.yx") "; v.zw += 1; ++v.xy; v.zw--; (v.xy) *= 2; v.xyz.x = 1; v.xyz[0] = 1;"},
        {"v.x = s.rg(); if (v.xy == w) return v.zw;",
         "v.x = s.rg(); if (" VALUE("v.xy") " == w) return " VALUE("v.zw") ";"},
        {"#define A(v) v.xy\n#define B(v) (v.xy)\nint xy;", "#define A(v) v.xy\n#define B(v) (v.xy)\nint xy;"},
        {"#define C(v) f(v.xy + 1) + f(v.xy)\n", "#define C(v) f(" VALUE("v.xy") " + 1) + f(" VALUE("v.xy") ")\n"},
    };
    const mtl_unit_options options = {0};
    expect_translation(pairs, sizeof pairs / sizeof pairs[0], MTL_REGION_BODY, &options);
}

static void overloads_are_left_out(void **state) {
    (void)state;
    static const pair pairs[] = {
        {"void f(device T* p) { *p = 1; }\nvoid f(threadgroup T* q) { *q = 1; } int x;",
         "void f(       T* p) { *p = 1; }\n                                     int x;"},
        {"int g(constant T* p);\nint g(const device T* p);", "int g(const T* p);\n                         "},
        {"struct S { S() thread : x(1) {} S() constant : x(1) {} };",
         "struct S { S()        : x(1) {}                        };"},
        {"struct S { S() thread = default; S() device = default; int f() const device { return 1; }\n};",
         "struct S { S()        = default;                       int f() const        { return 1; }\n};"},
        {"struct S { int g() const { return -v; }\nint g() device const { return -S(*this).v; } };",
         "struct S { int g() const { return -v; }\n                                             };"},
        /* what does something else, stands twice, or in another branch of the preprocessor's */
        {"int f(device T* p) { return 1; } int f(thread T* p) { return 2; }",
         "int f(       T* p) { return 1; } int f(       T* p) { return 2; }"},
        {"int f(device T* p); int f(device T* p);", "int f(       T* p); int f(       T* p);"},
        {"struct S { int g() const { return v; } int h() device const { return S(*this).v; } };",
         "struct S { int g() const { return v; } int h()        const { return S(*this).v; } };"},
        {"#if A\nint f(device T* p);\n#else\nint f(thread T* p);\n#endif\n",
         "#if A\nint f(       T* p);\n#else\nint f(       T* p);\n#endif\n"},
        {"int f(device T* p, int q) { return q; } int f(thread T* q, int p) { return q; }",
         "int f(       T* p, int q) { return q; } int f(       T* q, int p) { return q; }"},
    };
    const mtl_unit_options options = {0};
    expect_translation(pairs, sizeof pairs / sizeof pairs[0], MTL_REGION_HEADER, &options);
    static const pair statements[] = {
        {"*(device T*)p = 1; *(thread T*)p = 1;", "*(       T*)p = 1; *(       T*)p = 1;"}};
    expect_translation(statements, 1, MTL_REGION_BODY, &options);
}

static void quotients_do_not_trap(void **state) {
    (void)state;
    static const pair pairs[] = {
        {"a / b % c", "a / !__mtl_trap / b % !__mtl_trap % c"},
        {"a /= b; a %= (b);", "a /= !__mtl_trap /= b; a %= !__mtl_trap %= (b);"},
        {"a / 2 % 0x10 / 1.0 % 0", "a / 2 % 0x10 / 1.0f % !__mtl_trap % 0"},
        {"S operator/(S a, int b); S &operator %= (int);", "S operator/(S a, int b); S &operator %= (int);"},
        {"DEFINE(/, %) // a / b", "DEFINE(/, %) // a / b"},
        {"#define D(a, b) (a) / (b)\n#if A / B\n", "#define D(a, b) (a) / !__mtl_trap / (b)\n#if A / B\n"},
    };
    static const pair generic[] = {
        {"template <typename T, typename U> D<T> operator/(D<T> a, const U b) { return a.x / b; }",
         "template <typename T, typename U> D<T> operator/(D<T> a, const U b) { return a.x / b; }"},
        {"struct M { template <class U> M operator%(thread U &k) const { return v % k; } };",
         "struct M { template <class U> M operator%(       U &k) const { return v % k; } };"},
        {"template <typename T> D<T> operator/(D<T> a, D<T> b) { return a.x / b.x; }",
         "template <typename T> D<T> operator/(D<T> a, D<T> b) { return a.x / !__mtl_trap / b.x; }"},
    };
    const mtl_unit_options cpu = {.target = MTL_TARGET_CPU}, gpu = {.target = MTL_TARGET_CUDA};
    expect_translation(generic, sizeof generic / sizeof generic[0], MTL_REGION_HEADER, &cpu);
    expect_translation(pairs, sizeof pairs / sizeof pairs[0], MTL_REGION_BODY, &cpu);
    expect_translation(&(pair){"a / b", "a / b"}, 1, MTL_REGION_BODY, &gpu);
}

#define ASSIGNMENT(type)           \
    type " &operator=(const " type \
         " &__mtl_from) { ::metal::msl_::copy(this, &__mtl_from, sizeof *this); return *this; } "

static void unions_are_assigned(void **state) {
    (void)state;
    static const pair pairs[] = {
        {"union U { float4 v; int i; };", "union U { float4 v; int i; " ASSIGNMENT("U") "};"},
        {"union { half h; } a, b;", "union __mtl_union_0 { half h; " ASSIGNMENT("__mtl_union_0 ") "} a, b;"},
        {"struct S : B { union { half h; int i; }; };",
         "struct S : B { union { half h; int i; }; " ASSIGNMENT("S") "};"},
        {"typedef struct { union { half h; }; } S;",
         "typedef struct __mtl_union_0 { union { half h; }; " ASSIGNMENT("__mtl_union_0 ") "} S;"},
        {"struct S { half h; }; union U; union U u;", "struct S { half h; }; union U; union U u;"},
        {"union U { half h; U& operator=(const U& u) { h = u.h; return *this; } };",
         "union U { half h; U& operator=(const U& u) { h = u.h; return *this; } };"},
    };
    const mtl_unit_options options = {.target = MTL_TARGET_CUDA};
    expect_translation(pairs, sizeof pairs / sizeof pairs[0], MTL_REGION_HEADER, &options);
}

static void alignment_goes_to_a_member(void **state) {
    (void)state;
#define MEMBER(e) "alignas(" e ") char __mtl_aligned[0] = {}; }"
    static const pair pairs[] = {
        {"struct alignas(16) Q { float v[4]; };", "struct             Q { float v[4]; " MEMBER("16") ";"},
        {"template <int n> struct alignas(n * sizeof(T)) R : B<n> { uchar v[n]; };",
         "template <int n> struct                        R : B<n> { uchar v[n]; " MEMBER("n * sizeof(T)") ";"},
        {"struct __attribute__((aligned(8))) Q { half v[4]; };",
         "struct                             Q { half v[4]; " MEMBER("8") ";"},
        {"struct Q { half v[4]; } __attribute__((aligned(8))) q;",
         "struct Q { half v[4]; " MEMBER("8") "                             q;"},
        {"union alignas(16) U { float4 v; int i; };",
         "union             U { float4 v; int i; " ASSIGNMENT("U") "alignas(16) char __mtl_aligned[0]; };"},
        {"struct alignas(16) Q; struct Q { alignas(16) float v[4]; };",
         "struct alignas(16) Q; struct Q { alignas(16) float v[4]; };"},
    };
    const mtl_unit_options options = {.target = MTL_TARGET_CPU};
    expect_translation(pairs, sizeof pairs / sizeof pairs[0], MTL_REGION_HEADER, &options);
}

static void arms_are_wrapped(void **state) {
    (void)state;
    static const pair pairs[] = {
#define ARM(x)   "(::metal::msl_::armed(), (" x "))"
#define WHOLE(x) "(::metal::msl_::unarmed(), (" x "))"
        {"x = c ? a : b;", "x = " WHOLE("c ? " ARM("a") " : " ARM("b")) ";"},
        {"f(c ? a + 1 : 0, d);", "f(" WHOLE("c ? " ARM("a + 1") " : 0") ", d);"},
        {"x = a ? b : c ? d : e;", "x = " WHOLE("a ? " ARM("b") " : " ARM(WHOLE("c ? " ARM("d") " : " ARM("e")))) ";"},
        {"return a <= b && is_same_v<A, B> ? 1.0h : 2;",
         "return " WHOLE("a <= b && is_same_v<A, B> ? " ARM("::metal::half(1.0f)") " : 2") ";"},
        {"if (q) a <<= b == c ? d : 1;", "if (q) a <<= " WHOLE("b == c ? " ARM("d") " : 1") ";"},
        {"f<c ? 1 : 2>(x);", "f<c ? 1 : 2>(x);"},
        {"#define M(a, b) a > b ? a : b\n#define N 1\n",
         "#define M(a, b) " WHOLE("a > b ? " ARM("a") " : " ARM("b")) "\n#define N 1\n"},
        {"#if A ? B : C\n", "#if A ? B : C\n"},
    };
    const mtl_unit_options options = {.arms = true};
    expect_translation(pairs, sizeof pairs / sizeof pairs[0], MTL_REGION_BODY, &options);
}

static void loops_over_a_share_are_unrolled(void **state) {
    (void)state;
#define UNROLLED "_Pragma(\"unroll\") "
    static const pair pairs[] = {
        {"for (uint i = lid; i < N; i += threads_per_threadgroup.x) a();",
         UNROLLED "for (uint i = lid; i < N; i += threads_per_threadgroup.x) a();"},
        {"uint n = threads_per_threadgroup.x, m = N / 4; for (uint i = lid; i < m; i += n) a();",
         "uint n = threads_per_threadgroup.x, m = N / 4; " UNROLLED "for (uint i = lid; i < m; i += n) a();"},
        {"for (i = 2 * lid; i < uint(2 * (N + 1)) - 4u; i += 256 * 2) a();",
         UNROLLED "for (i = 2 * lid; i < uint(2 * (N + 1)) - 4u; i += 256 * 2) a();"},
        {"for (uint i = lid; i < M; i += 256) a();", "for (uint i = lid; i < M; i += 256) a();"}, /* 17 rounds */
        {"for (uint i = lid; i < N; i += 32) a();", "for (uint i = lid; i < N; i += 32) a();"},
        {"for (uint i = lid; i < x_shape[0]; i += 256) a();", "for (uint i = lid; i < x_shape[0]; i += 256) a();"},
        {"uint n = 256; n += k; for (uint i = lid; i < N; i += n) a();",
         "uint n = 256; n += k; for (uint i = lid; i < N; i += n) a();"},
        {"uint n = n; for (uint i = lid; i < N; i += n) a();", "uint n = n; for (uint i = lid; i < N; i += n) a();"},
        {"for (uint i = lid; i < N / 0; i += 256) a();", "for (uint i = lid; i < N / 0; i += 256) a();"},
        {"#pragma unroll 1\nfor (uint i = lid; i < N; i += 256) a();",
         "#pragma unroll 1\nfor (uint i = lid; i < N; i += 256) a();"},
        {"_Pragma(\"nounroll\") for (uint i = lid; i < N; i += 256) a();",
         "_Pragma(\"nounroll\") for (uint i = lid; i < N; i += 256) a();"},
        {"ONCE for (uint i = lid; i < N; i += 256) a();", "ONCE for (uint i = lid; i < N; i += 256) a();"},
        {"if (x) for (uint i = lid; i < N; i += 256) a();",
         "if (x) " UNROLLED "for (uint i = lid; i < N; i += 256) a();"},
        {"uint n = 2 * N; for (uint i = lid; i < N / 2; i += n) { y[i] = x[N - i]; z[i * 2] = 0; }",
         "uint n = 2 * N; " UNROLLED
         "for (uint i = lid; i < N / 2; i += n, i = (N / 2) <= (n) ? ~0u : i) { y[i] = x[N - i]; "
         "z[i * 2] = 0; }"},
        {"for (uint i = lid; i < N; i += N) if (i == 7) continue; else x[i] = i < 9;", UNROLLED
         "for (uint i = lid; i < N; i += N, i = (N) <= (N) ? ~0u : i) if (i == 7) continue; else x[i] = i < 9;"},
        {"for (uint i = lid; i < N; i += N) f(i);", UNROLLED "for (uint i = lid; i < N; i += N) f(i);"},
        {"for (uint i = lid; i < N; i += N) x[--i] = 1;", UNROLLED "for (uint i = lid; i < N; i += N) x[--i] = 1;"},
        {"for (uint i = lid; i < N; i += N) if (a) b[i] = 1; else i = 0;",
         UNROLLED "for (uint i = lid; i < N; i += N) if (a) b[i] = 1; else i = 0;"},
        {"for (uint i = lid; i < N; i += N) { device auto& j = i; --j; }",
         UNROLLED "for (uint i = lid; i < N; i += N) {        auto& j = i; --j; }"},
        {"for (int i = lid; i < N; i += N) x[i] = 1;", UNROLLED "for (int i = lid; i < N; i += N) x[i] = 1;"},
        {"for (uint i = lid, j = i; j < N; j += N) x[j] = 1;",
         UNROLLED "for (uint i = lid, j = i; j < N; j += N) x[j] = 1;"},
        {"for (uint i = lid; i < N; i += (256", "for (uint i = lid; i < N; i += (256"},
        {"for (", "for ("},
    };
    static const mtl_template_value values[] = {{.name = "N", .kind = METALLOID_TEMPLATE_INT, .integer = 4096},
                                                {.name = "M", .kind = METALLOID_TEMPLATE_INT, .integer = 4097}};
    const mtl_types types = {.template_count = 2, .template_values = values};
    const mtl_unit_options options = {.target = MTL_TARGET_CUDA, .line = 256, .types = &types};
    expect_translation(pairs, sizeof pairs / sizeof pairs[0], MTL_REGION_BODY, &options);
}

static void places_are_marked(void **state) {
    (void)state;
    const mtl_names none = {0};
    const mtl_unit_options options = {.meeting = &none};
    static const pair pairs[] = {
        {"simd_sum(x);", "(__mtl_at(0, 16777216), simd_sum(x));"},
        {"for (;;) a();", "for (;;) a();"},
        {"for (;;) metal::simd_sum(x);",
         "for (;;) if (__mtl_loop(0, 16777216)); else  (__mtl_at(1, 16777225), metal::simd_sum(x));"},
        {"x = ::metal::simd_sum(x);", "x = (__mtl_at(0, 16777223), ::metal::simd_sum(x));"},
        {"#define LOOP(x) for (x)\nLOOP (int i = 0; i < 4; ++i) { simd_sum(x); }",
         "#define LOOP(x) for (x)\nLOOP (int i = 0; i < 4; ++i) if (__mtl_loop(0, 16777230)); else  { (__mtl_at(1, "
         "16777256), "
         "simd_sum(x)); }"},
        {"constexpr float simd_sum_of(float x) { return simd_sum(x); }",
         "          float simd_sum_of(float x) { __mtl_frame __mtl_here;  return (__mtl_at(0, 16777231), simd_sum(x)); "
         "}"},
        {"float simd_sum_of(float x) { return simd_sum(x); }",
         "float simd_sum_of(float x) { __mtl_frame __mtl_here;  return (__mtl_at(0, 16777229), simd_sum(x)); }"},
    };
    expect_translation(pairs, sizeof pairs / sizeof pairs[0], MTL_REGION_BODY, &options);
}

/* A line of the text, with its number in place of @, until there are `size` bytes. */
static void repeat(mtl_text *text, const char *line, size_t size) {
    for (int number = 0; text->length < size; number++) {
        for (const char *at = line; *at; at++) {
            if (*at == '@') mtl_text_format(text, "%d", number);
            else mtl_text_add(text, at, 1);
        }
    }
}

/* Each is done in a few hundredths of a second; with a look through the text for each of its lines this test would take
 * hours, and be stopped. */
static void long_sources_are_translated_in_linear_time(void **state) {
    (void)state;
    static const struct {
        const char *begin, *line, *end;
        bool header;
    } texts[] = {
        {"float s = x[0]; ", "s = simd_sum(s * @);\n", "", false},
        {"y[0] = simd_sum(x[0]);", "{ uint u@ = threadgroup_position_in_grid.x; y[u@] = x[u@]; }\n", "", false},
        {"for (;;) { if (simd_sum(x[0]) > 0) continue; {", "if (x[@]) return; switch (i) { case @: break; }\n", "}}",
         false},
        {"half t[] = {", "i < @ ? 1.0h : i == @ ? v.yx : 3.0h, ", "0};", false},
        {"half t = ", "i == @ ? @.0h : ", "0.0h;", true},
        {"v", ".xyz.zyx", " = 1;", false},
        {"", "threadgroup float a@[N]; for (uint i = lid; i < N; i += 256) a@[i] = 0;\n", "", false},
        {"float t[] = {", "[@] = 1.0h, ", "};", false},
        {"", "constant float c@[2] = {1.0, 2.0h};\n", "", true},
        {"", "float f@(device T *p) { return g@(p) / 2; } float f@(threadgroup T *q) { return g@(q) / 2; }\n", "",
         true},
        {"float h(float a) { return simd_sum(a); }\n", "float f@(float a) { return h(a); }\n", "", true},
        {"", "#define S@ threadgroup\nstruct C@ { C@() constant {} C@() device {} };\n", "", true},
        {"", "T a@[4] = {[0] = 1);\n", "", false}, /* no C++, and none of it read twice */
        {"", "threadgroup float a@ struct S@, a) ", "", false},
        {"", "v.xy }class <", "", true},
        {"y[0] = simd_sum(x[0]);", "[x, ", "", false},
        {"", "#if 1\nvoid f(device T *p);\n", "", true},
        {"device ", "void f();", "", true},
    };
    const char *const names[] = {"x"}, *const outputs[] = {"y"};
    const mtl_buffer_type input = {.dtype = MTL_F16};
    const mtl_dtype output = MTL_F16;
    const mtl_template_value value = {.name = "N", .kind = METALLOID_TEMPLATE_INT, .integer = 256};
    const mtl_types types = {&input, &output, 1, &value, false, false};
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        mtl_text text = {0};
        mtl_text_add_string(&text, texts[i].begin);
        repeat(&text, texts[i].line, 1 << 18);
        mtl_text_add_string(&text, texts[i].end);
        assert_false(text.failed);
        const char *source = mtl_text_string(&text);
        const mtl_definition definition = {
            "k", 1, 1, names, outputs, texts[i].header ? "y[0] = x[0];" : source, texts[i].header ? source : "", false};
        for (int target = 0; target < 2; target++) {
            const mtl_unit_options options = {.target = (mtl_target)target,
                                              .stack_bits = 16,
                                              .most_threads = 256,
                                              .line = target == MTL_TARGET_CUDA ? 256 : 0,
                                              .lockstep = true};
            mtl_mentions mentions;
            assert_true(mtl_find_mentions(&mentions, &definition));
            mtl_text out = {0};
            mtl_translation_unit(&out, &definition, &mentions, &types, &options);
            assert_false(out.failed);
            mtl_text_free(&out);
        }
        mtl_text_free(&text);
    }
}

/* Nested as deep as a text can be: what goes down into it stops somewhere. */
static void deep_sources_are_translated(void **state) {
    (void)state;
    enum { DEPTH = 50000 };
    static const char *const parts[][3] = {{"{", "s = simd_sum(s);", "}"},
                                           {"simd_sum(", "x", ")"},
                                           {"if (a) s = simd_sum(s); else ", "s = 1;", ""},
                                           {"(", "v.xy", ").xy"},
                                           {"struct A { ", "int a;", "};"},
                                           {"a ? ", "b", ": 0.0h"}};
    const char *const names[] = {"x"}, *const outputs[] = {"y"};
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        mtl_text text = {0};
        for (int n = 0; n < DEPTH; n++) mtl_text_add_string(&text, parts[i][0]);
        mtl_text_add_string(&text, parts[i][1]);
        for (int n = 0; n < DEPTH; n++) mtl_text_add_string(&text, parts[i][2]);
        const mtl_definition definition = {"k", 1, 1, names, outputs, mtl_text_string(&text), "", false};
        const mtl_unit_options options = {.arms = true};
        mtl_mentions mentions;
        assert_true(mtl_find_mentions(&mentions, &definition));
        mtl_text out = {0};
        mtl_translate_in_lockstep(&out, &definition, &mentions, &options);
        assert_false(out.failed);
        mtl_text_free(&out);
        mtl_text_free(&text);
    }
}

/* 4 KiB, with a pointer for each buffer. */
static void parameters_of_a_launch_fit(void **state) {
    (void)state;
    mtl_definition definition = {.input_count = MTL_MOST_BUFFERS, .output_count = MTL_MOST_BUFFERS};
    mtl_mentions mentions = {.input = {MTL_MENTIONS_SHAPE | MTL_MENTIONS_STRIDES}};
    int size = mtl_cuda_layout_of(&definition, &mentions).size;
    assert_true(size + 2 * MTL_MOST_BUFFERS * (int)sizeof(void *) <= 4096);
}

static mtl_mentions mentions_of(const mtl_definition *definition) {
    mtl_mentions mentions;
    assert_true(mtl_find_mentions(&mentions, definition));
    return mentions;
}

static void threads_of_a_gpu_do_several_positions(void **state) {
    (void)state;
    static const char plain[] = "uint i = thread_position_in_grid.x; out[i] = x[i];";
    static const struct {
        const char *source;
        bool atomic, is_scalar;
        mtl_dtype dtype;
        int width;
    } cases[] = {
        {plain, false, false, MTL_F64, 4},
        {plain, false, false, MTL_F32, 4},
        {plain, false, false, MTL_F16, 8},
        {plain, false, false, MTL_BOOL, 8},
        {plain, false, true, MTL_F32, 8},
        {plain, true, false, MTL_F32, 0},
        {"out[thread_position_in_grid.x] = simd_sum(x[0]);", false, false, MTL_F32, 0},
        {"out[thread_position_in_grid.x] = x[thread_index_in_threadgroup];", false, false, MTL_F32, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const mtl_definition definition = {
            .input_count = 1,
            .input_names = (const char *const[]){"x"},
            .source = cases[i].source,
            .header = "",
            .atomic_outputs = cases[i].atomic,
        };
        const mtl_types types = {
            .inputs = &(mtl_buffer_type){.dtype = cases[i].dtype, .is_scalar = cases[i].is_scalar},
        };
        const mtl_mentions mentions = mentions_of(&definition);
        assert_int_equal(mtl_cuda_width(&definition, &mentions, &types), cases[i].width);
    }
}

/* A thread that left would be counted at a later barrier. */
static void blocks_with_threads_that_leave_do_one_threadgroup(void **state) {
    (void)state;
    static const struct {
        const char *source, *header;
        bool atomic;
        int line;
        bool repeats;
    } cases[] = {
        {"a();", "float f() { return 1; }\n", false, 32, true},
        {"a();", "", false, 64, true},
        {"a();", "", false, 1024, true},
        {"a();", "", false, 256, false},
        {"a();", "", false, 0, false},
        {"a();", "", true, 32, false},
        {"if (x) return; a();", "", false, 32, false},
        {"LEAVE a();", "#define LEAVE if (x) return;\n", false, 32, false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const mtl_definition definition = {
            .source = cases[i].source, .header = cases[i].header, .atomic_outputs = cases[i].atomic};
        const mtl_mentions mentions = mentions_of(&definition);
        assert_int_equal(mtl_cuda_repeats(&definition, &mentions, cases[i].line), cases[i].repeats);
    }
}

/* As clang 14, later versions of clang, and NVRTC quote a line that is not the user's. */
static void messages_quote_the_users_lines(void **state) {
    (void)state;
    static const mtl_definition definition = {
        .name = "k",
        .header = "\ndevice float* f() { return a / b / c; }\n",
        .source = "uint i = 1;\r\n\ty[i] = 7 / n / zz + (n);\r\nfloat z = 1.0h\n",
    };
    static const pair pairs[] = {
        {"source:2:38: error: no 'zz'\n        y[i] = 7 / !__mtl_trap / n / zz + (n);\n"
         "                                     ^~\n                                     yy\n1 error generated.\n",
         "source:2:17: error: no 'zz'\n\ty[i] = 7 / n / zz + (n);\n\t               ^\n1 error generated.\n"},
        {"source:2:38: error: no 'zz'\n    1 | uint i = 1;\n    2 |         y[i] = 7 / !__mtl_trap / n / zz + (n);\n"
         "      |                                      ^~\n      |                                      yy\n",
         "source:2:17: error: no 'zz'\n    2 | \ty[i] = 7 / n / zz + (n);\n      | \t               ^\n"},
        {"source(2): error: there is\n          no zz\n  \ty[i] = 7 / !__mtl_trap / n / zz + (n);\n"
         "  \t                             ^\n\n1 error detected\n",
         "source(2): error: there is\n          no zz\n  \ty[i] = 7 / n / zz + (n);\n  \t               ^\n\n"
         "1 error detected\n"},
        /* A slash that is there three times in one and twice in the other; what only the translation has. */
        {"source:2:19: error: no\n        y[i] = 7 / !__mtl_trap / n / zz + (n);\n                  ^\n",
         "source:2: error: no\n\ty[i] = 7 / n / zz + (n);\n"},
        {"source:2:20: error: no\n        y[i] = 7 / !__mtl_trap / n / zz + (n);\n                    ^\nheader:9:1: "
         "note: no\n",
         "source:2: error: no\n\ty[i] = 7 / n / zz + (n);\nheader:9:1: note: no\n"},
        /* At the end of a line. */
        {"source:3:30: error: no ;\nfloat z = ::metal::half(1.0f)\n                             ^\n                    "
         "         ;\n",
         "source:3:15: error: no ;\nfloat z = 1.0h\n              ^\n"},
        {"header:2:20: note: no 'a'\n       float* f() { return a / b / c; }\n                           ^\n",
         "header:2:28: note: no 'a'\ndevice float* f() { return a / b / c; }\n                           ^\n"},
        /* The user's own line stays as it was quoted; so do others', and lines that there are not. */
        {"source:2:38: error: no\n        y[i] = 7 / n / zz + (n);\n               ^~~~~\n",
         "source:2:38: error: no\n        y[i] = 7 / n / zz + (n);\n               ^~~~~\n"},
        {"metalloid/math.h:2:1: note: here\n__mtl_at\n^\nsource:4:2: error: no }\n}\n ^\n",
         "metalloid/math.h:2:1: note: here\n__mtl_at\n^\nsource:4:2: error: no }\n}\n ^\n"},
        {"", ""},
        {"source:", "source:"},
        {"source:2:1", "source:2:1"},
        {"source(2): error\n^", "source(2): error\n^"},
        {"source:2:1: no\n__\n^", "source:2: no\n\ty[i] = 7 / n / zz + (n);\n"},
    };
    for (size_t i = 0; i < sizeof pairs / sizeof pairs[0]; i++) {
        mtl_text out = {0};
        mtl_explain(&out, &definition, pairs[i].metal);
        assert_string_equal(mtl_text_string(&out), pairs[i].expected);
        mtl_text_free(&out);
    }
}

static void hints_say_what_compilers_do_not(void **state) {
    (void)state;
    static const char *const outputs[] = {"x", "y"};
    static const struct {
        const char *header, *source, *hint; /* what the text begins with */
        bool atomic;
    } examples[] = {
        {"", "\nkernel void f(device float* y) { y[0] = 1; }", "source:2: source is a kernel's body alone", false},
        {"", "\n\n[[kernel]]\nvoid f() {}", "source:3: source is a kernel's body alone", false},
        {"", "float kernel[3]; /* kernel void */", "", false},
        {"", "\natomic_fetch_add_explicit(&y[i], 1, memory_order_relaxed);",
         "source:2: atomic_fetch_add_explicit needs an atomic, and y is none", false},
        {"", "atomic_store_explicit(x + i, 1, memory_order_relaxed);", "source:1: atomic_store_explicit needs", false},
        {"", "atomic_store_explicit(x + i, 1, memory_order_relaxed);", "", true},
        {"", "atomic_store_explicit((device atomic_int*)x, 1, memory_order_relaxed);", "", false},
        {"", "if (a) {\nif (b) {\n}", "source:1: the braces do not balance: no } closes the {", false},
        {"", "if (a) {\nif (b) {\n '}'; // }\n", "source:2: the braces do not balance", false},
        {"", "if (a) {\n}\n}\n", "source:3: the braces do not balance: } closes none", false},
        {"struct S {\n int a;\n", "", "header:1: the braces do not balance", false},
        {"", "#if A\nif (a) {\n#if B\n#endif\n#else\n#ifdef C\n#endif\nif (b) {\n#endif\n}", "", false},
        {"", "}\nvoid g() {", "", false},
        {"#define OPEN {\n", "a();", "", false},
    };
    for (size_t i = 0; i < sizeof examples / sizeof examples[0]; i++) {
        const mtl_definition definition = {.name = "k",
                                           .header = examples[i].header,
                                           .source = examples[i].source,
                                           .output_names = outputs,
                                           .output_count = 2,
                                           .atomic_outputs = examples[i].atomic};
        mtl_text out = {0};
        mtl_explain(&out, &definition, "");
        size_t length = examples[i].hint[0] ? strlen(examples[i].hint) : out.length + 1;
        assert_int_equal(strncmp(mtl_text_string(&out), examples[i].hint, length), 0);
        mtl_text_free(&out);
    }
}

/* FIPS 180-4's examples. */
static void digests_are_the_standards(void **state) {
    (void)state;
    static const struct {
        const char *text, *hex;
    } examples[] = {
        {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
        {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
        {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
         "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
    };
    for (size_t i = 0; i < sizeof examples / sizeof examples[0]; i++) {
        mtl_sha256 hash;
        mtl_sha256_begin(&hash);
        mtl_sha256_add(&hash, examples[i].text, strlen(examples[i].text));
        mtl_digest digest = mtl_sha256_end(&hash);
        char hex[65];
        for (int b = 0; b < 32; b++) snprintf(hex + 2 * b, 3, "%02x", digest.bytes[b]);
        assert_string_equal(hex, examples[i].hex);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_byte_belongs_to_a_token),
        cmocka_unit_test(numbers_end_where_they_should),
        cmocka_unit_test(metal_becomes_cxx),
        cmocka_unit_test(swizzles_are_values),
        cmocka_unit_test(overloads_are_left_out),
        cmocka_unit_test(quotients_do_not_trap),
        cmocka_unit_test(unions_are_assigned),
        cmocka_unit_test(alignment_goes_to_a_member),
        cmocka_unit_test(arms_are_wrapped),
        cmocka_unit_test(loops_over_a_share_are_unrolled),
        cmocka_unit_test(places_are_marked),
        cmocka_unit_test(long_sources_are_translated_in_linear_time),
        cmocka_unit_test(deep_sources_are_translated),
        cmocka_unit_test(parameters_of_a_launch_fit),
        cmocka_unit_test(threads_of_a_gpu_do_several_positions),
        cmocka_unit_test(blocks_with_threads_that_leave_do_one_threadgroup),
        cmocka_unit_test(messages_quote_the_users_lines),
        cmocka_unit_test(hints_say_what_compilers_do_not),
        cmocka_unit_test(digests_are_the_standards),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
