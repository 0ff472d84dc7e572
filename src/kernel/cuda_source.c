/* From a CUDA C++ kernel's body to what NVRTC compiles. SPDX-License-Identifier: MIT
 *
 * The conventions are those of mlx.core.fast.cuda_kernel: parameters, namespace mlx::core::cu, template arguments as constants,
 * and in scope what its device/utils.cuh has. CUDA's own headers cost up to a second to compile: each is included where the source or
 * a type asks for it. */
#include "kernel/cuda_source.h"
#include "kernel/tokenizer.h"

#include <stdio.h>
#include <string.h>

static const char prelude[] =
    "typedef signed char int8_t;\n"
    "typedef short int16_t;\n"
    "typedef int int32_t;\n"
    "typedef signed long long int64_t;\n" /* as cuda/std has it */
    "typedef unsigned char uint8_t;\n"
    "typedef unsigned short uint16_t;\n"
    "typedef unsigned int uint32_t;\n"
    "typedef unsigned long long uint64_t;\n"
    "typedef uint64_t uintptr_t;\n"
    "#define MAX_NDIM 10\n"
    "#define WARP_SIZE 32\n"
    "#ifndef INFINITY\n"
    "#define INFINITY __int_as_float(0x7f800000)\n"
    "#define NAN __int_as_float(0x7fffffff)\n"
    "#endif\n"
    "namespace mlx::core::cu {\n"
    "template <class T, int N>\n"
    "struct extents {\n"
    "    T values[N];\n"
    "    __device__ const T *data() const { return values; }\n"
    "    __device__ const T &operator[](int i) const { return values[i]; }\n"
    "    __device__ const T *begin() const { return values; }\n"
    "    __device__ const T *end() const { return values + N; }\n"
    "    static __device__ constexpr int size() { return N; }\n"
    "};\n"
    "using Shape = extents<int32_t, MAX_NDIM>;\n"
    "using Strides = extents<int64_t, MAX_NDIM>;\n"
    "template <class T>\n"
    "struct complex_t {\n"
    "    T re, im;\n"
    "    __device__ T real() const { return re; }\n"
    "    __device__ T imag() const { return im; }\n"
    "    friend __device__ complex_t operator+(complex_t a, complex_t b) { return {a.re + b.re, a.im + b.im}; }\n"
    "    friend __device__ complex_t operator-(complex_t a, complex_t b) { return {a.re - b.re, a.im - b.im}; }\n"
    "    friend __device__ complex_t operator*(complex_t a, complex_t b) {\n"
    "        return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};\n"
    "    }\n"
    "};\n"
    "using complex64_t = complex_t<float>;\n"
    "template <class T, int N>\n"
    "struct alignas(sizeof(T) * N) AlignedVector {\n"
    "    T val[N];\n"
    "    __device__ T &operator[](int i) { return val[i]; }\n"
    "    __device__ T operator[](int i) const { return val[i]; }\n"
    "};\n"
    "template <int N, class T>\n"
    "__device__ bool is_aligned(T *x) { return reinterpret_cast<uintptr_t>(x) % (N * sizeof(T)) == 0; }\n"
    "template <int N, class T>\n"
    "__device__ AlignedVector<T, N> unsafe_load_vector(const T *p, uint32_t offset) {\n"
    "    return reinterpret_cast<const AlignedVector<T, N> *>(p)[offset];\n"
    "}\n"
    "template <int N, class T>\n"
    "__device__ AlignedVector<T, N> load_vector(const T *p, uint32_t offset) {\n"
    "    if (is_aligned<N>(p)) return unsafe_load_vector<N>(p, offset);\n"
    "    AlignedVector<T, N> v;\n"
    "    for (int i = 0; i < N; ++i) v[i] = p[offset * N + i];\n"
    "    return v;\n"
    "}\n"
    "template <int N, class T, class SizeT>\n"
    "__device__ AlignedVector<T, N> load_vector(const T *p, uint32_t offset, SizeT size, T fallback) {\n"
    "    if (is_aligned<N>(p) && (offset + 1) * N <= size) return unsafe_load_vector<N>(p, offset);\n"
    "    AlignedVector<T, N> v;\n"
    "    for (int i = 0; i < N; ++i) v[i] = offset * N + i < size ? p[offset * N + i] : fallback;\n"
    "    return v;\n"
    "}\n"
    "template <int N, class T>\n"
    "__device__ void unsafe_store_vector(T *p, uint32_t offset, const AlignedVector<T, N> &v) {\n"
    "    reinterpret_cast<AlignedVector<T, N> *>(p)[offset] = v;\n"
    "}\n"
    "template <int N, class T>\n"
    "__device__ void store_vector(T *p, uint32_t offset, const AlignedVector<T, N> &v) {\n"
    "    if (is_aligned<N>(p)) return unsafe_store_vector(p, offset, v);\n"
    "    for (int i = 0; i < N; ++i) p[offset * N + i] = v[i];\n"
    "}\n"
    "template <int N, class T, class SizeT>\n"
    "__device__ void store_vector(T *p, uint32_t offset, const AlignedVector<T, N> &v, SizeT size) {\n"
    "    if (is_aligned<N>(p) && (offset + 1) * N <= size) return unsafe_store_vector(p, offset, v);\n"
    "    for (int i = 0; offset * N + i < size && i < N; ++i) p[offset * N + i] = v[i];\n"
    "}\n"
    "template <class I = int64_t>\n"
    "__device__ I elem_to_loc(I elem, const int *shape, const int64_t *strides, int ndim) {\n"
    "    I loc = 0;\n"
    "    for (int i = ndim - 1; i >= 0 && elem > 0; --i) {\n"
    "        loc += (elem % shape[i]) * I(strides[i]);\n"
    "        elem /= shape[i];\n"
    "    }\n"
    "    return loc;\n"
    "}\n"
    "template <int NDIM, class I = int64_t>\n"
    "__device__ I elem_to_loc_nd(I elem, const int *shape, const int64_t *strides) {\n"
    "    I loc = 0;\n"
    "    for (int i = NDIM - 1; i >= 0; --i) {\n"
    "        loc += (elem % shape[i]) * I(strides[i]);\n"
    "        elem /= shape[i];\n"
    "    }\n"
    "    return loc;\n"
    "}\n"
    "}\n";

static bool mentions_any(const mtl_definition *definition, const char *const *beginnings) {
    const char *const texts[] = {definition->header, definition->source};
    bool found = false;
    for (int text = 0; text < 2 && !found; text++) {
        mtl_tokens tokens;
        if (!mtl_tokenize(&tokens, texts[text], strlen(texts[text]))) return true; /* it will fail for memory anyway */
        for (size_t t = 0; t < tokens.count && !found; t++) {
            const mtl_token *token = &tokens.token[t];
            for (const char *const *word = beginnings; *word && token->kind == MTL_TOKEN_IDENTIFIER; word++)
                found |= token->length >= strlen(*word) && memcmp(token->text, *word, strlen(*word)) == 0;
            found |= token->kind == MTL_TOKEN_INCLUDE && strcmp(beginnings[0], "#include") == 0;
        }
        mtl_tokens_free(&tokens);
    }
    return found;
}

static bool has_dtype(const mtl_definition *definition, const mtl_types *types, mtl_dtype dtype) {
    bool found = false;
    for (int i = 0; i < definition->input_count; i++) found |= types->inputs[i].dtype == dtype;
    for (int i = 0; i < definition->output_count; i++) found |= types->outputs[i] == dtype;
    for (int i = 0; i < types->template_count; i++) {
        found |= types->template_values[i].kind == METALLOID_TEMPLATE_DTYPE && types->template_values[i].dtype == dtype;
    }
    return found;
}

static const char *cuda_type(mtl_dtype dtype) {
    static const char *const name[MTL_DTYPES] = {"float",    "__half",   "__nv_bfloat16", "double",     "bool",
                                                 "int8_t",   "int16_t",  "int32_t",       "int64_t",    "uint8_t",
                                                 "uint16_t", "uint32_t", "uint64_t",      "complex64_t"};
    return name[dtype];
}

static void add_includes(mtl_text *out, const mtl_definition *definition, const mtl_types *types, bool *include) {
    static const char *const halves[] = {"__half", "half", "cuda_fp16", NULL};
    static const char *const bfloats[] = {"__nv_bfloat", "nv_bfloat", "cuda_bf16", NULL};
    static const char *const groups[] = {"cooperative_groups", "cg", NULL};
    static const char *const standard[] = {"cuda", NULL};
    static const char *const limits[] = {"Limits", NULL};
    static const char *const includes[] = {"#include", NULL};
    const struct {
        bool wanted;
        const char *text;
    } headers[] = {
        {has_dtype(definition, types, MTL_F16) || mentions_any(definition, halves), "#include <cuda_fp16.h>\n"},
        {has_dtype(definition, types, MTL_BF16) || mentions_any(definition, bfloats), "#include <cuda_bf16.h>\n"},
        {mentions_any(definition, groups),
         "#include <cooperative_groups.h>\nnamespace mlx::core::cu { namespace cg = cooperative_groups; }\n"},
        {mentions_any(definition, standard) || mentions_any(definition, limits),
         "#include <cuda/std/array>\n#include <cuda/std/limits>\n#include <cuda/std/tuple>\n#include "
         "<cuda/std/type_traits>\n"},
        {mentions_any(definition, limits),
         "namespace mlx::core::cu {\n"
         "template <class T> struct Limits {\n"
         "    using limits = cuda::std::numeric_limits<T>;\n"
         "    static constexpr __device__ T max() { return limits::has_infinity ? limits::infinity() : limits::max(); "
         "}\n"
         "    static constexpr __device__ T min() { return limits::has_infinity ? -limits::infinity() : limits::min(); "
         "}\n"
         "    static constexpr __device__ T finite_max() { return limits::max(); }\n"
         "    static constexpr __device__ T finite_min() { return limits::lowest(); }\n"
         "};\n}\n"}};
    *include = mentions_any(definition, includes);
    for (size_t i = 0; i < sizeof headers / sizeof headers[0]; i++) {
        if (!headers[i].wanted) continue;
        mtl_text_add_string(out, headers[i].text);
        *include = true;
    }
}

void mtl_cuda_unit(mtl_text *out, const mtl_definition *definition, const mtl_mentions *mentions,
                   const mtl_types *types, bool *include) {
    mtl_text_add_string(out, "#line 1 \"metalloid\"\n");
    mtl_text_add_string(out, prelude);
    add_includes(out, definition, types, include);
    mtl_text_format(out,
                    "#line 1 \"header\"\n%s\n#line 1 \"generated\"\n"
                    "namespace mlx::core::cu {\nextern \"C\" __global__ void mtl_kernel(",
                    definition->header);
    for (int i = 0; i < definition->input_count; i++) {
        const char *name = definition->input_names[i];
        mtl_text_format(out, "const %s* %s, ", cuda_type(types->inputs[i].dtype), name);
        if (types->inputs[i].is_scalar) continue;
        if (mentions->input[i] & MTL_MENTIONS_SHAPE)
            mtl_text_format(out, "const __grid_constant__ Shape %s_shape, ", name);
        if (mentions->input[i] & MTL_MENTIONS_STRIDES)
            mtl_text_format(out, "const __grid_constant__ Strides %s_strides, ", name);
        if (mentions->input[i] & MTL_MENTIONS_RANK) mtl_text_format(out, "const __grid_constant__ int %s_ndim, ", name);
    }
    for (int i = 0; i < definition->output_count; i++) {
        mtl_text_format(out, "%s%s* %s", i ? ", " : "", cuda_type(types->outputs[i]), definition->output_names[i]);
    }
    mtl_text_add_string(out, ") {\n");
    for (int i = 0; i < types->template_count; i++) {
        const mtl_template_value *value = &types->template_values[i];
        switch (value->kind) {
        case METALLOID_TEMPLATE_INT:
            mtl_text_format(out, "constexpr int %s = %lld;\n", value->name, (long long)value->integer);
            break;
        case METALLOID_TEMPLATE_BOOL:
            mtl_text_format(out, "constexpr bool %s = %s;\n", value->name, value->integer ? "true" : "false");
            break;
        case METALLOID_TEMPLATE_DTYPE:
            mtl_text_format(out, "using %s = %s;\n", value->name, cuda_type(value->dtype));
            break;
        }
    }
    mtl_text_format(out, "#line 1 \"source\"\n%s\n}\n}\n", definition->source);
}
