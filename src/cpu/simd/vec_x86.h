/* What vec.h needs by name on x86-64: AVX2 with FMA and F16C, or AVX-512. SPDX-License-Identifier: MIT */
#include <immintrin.h>

#if VECTOR_BYTES == 64
#define MM(name) _mm512_##name
#else
#define MM(name) _mm256_##name
#endif

#if !defined(MTL_IN_DOUBLE)
#define angle_fma(a, b, c) ((angle_vec)MM(fmadd_pd)(a, b, c))
#endif

/* Lanes 0 and 1, 2 and 3, ... trade places. */
#ifdef MTL_IN_DOUBLE
INLINE vec vec_swap_neighbours(vec v) { return (vec)MM(permute_pd)(v, LANES == 8 ? 0x55 : 0x5); }
#else
INLINE vec vec_swap_neighbours(vec v) { return (vec)MM(permute_ps)(v, 0xb1); }
#endif

#ifdef MTL_IN_DOUBLE

INLINE vec vec_fma(vec a, vec b, vec c) { return (vec)MM(fmadd_pd)(a, b, c); }
INLINE vec vec_max(vec a, vec b) { return (vec)MM(max_pd)(a, b); } /* b where either is NaN */
INLINE vec vec_min(vec a, vec b) { return (vec)MM(min_pd)(a, b); }

#else

INLINE vec vec_fma(vec a, vec b, vec c) { return (vec)MM(fmadd_ps)(a, b, c); }
INLINE vec vec_max(vec a, vec b) { return (vec)MM(max_ps)(a, b); } /* b where either is NaN */
INLINE vec vec_min(vec a, vec b) { return (vec)MM(min_ps)(a, b); }

#if VECTOR_BYTES == 64
INLINE vec vec_load_f16(const void *from) { return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)); }
INLINE vec_half vec_to_f16(vec v) {
    return (vec_half)_mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
INLINE vec vec_load_bf16(const void *from) {
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
}
INLINE vec_half vec_to_bf16(vec v) {
#ifdef MTL_ISA_AVX512_BF16
    /* The instruction takes subnormals for 0. */
    if (!_mm512_fpclass_ps_mask(v, 0x20)) return (vec_half)_mm512_cvtneps_pbh(v);
#endif
    __m512i bits = (__m512i)v, odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet);
    return (vec_half)_mm512_cvtepi32_epi16(rounded);
}
#else
INLINE vec vec_load_f16(const void *from) { return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)); }
INLINE vec_half vec_to_f16(vec v) {
    return (vec_half)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
INLINE vec vec_load_bf16(const void *from) {
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from)), 16);
}
INLINE vec_half vec_to_bf16(vec v) {
    __m256i bits = (__m256i)v, odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
    rounded = _mm256_blendv_epi8(rounded, quiet, (__m256i)_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    __m256i packed =
        _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08); /* 0, 2: the two halves' low words */
    return (vec_half)_mm256_castsi256_si128(packed);
}
#endif
#endif

/* ---- 2 LANES elements of 16 bits ------------------------------------------------------------------------------------------- */

#ifndef MTL_IN_DOUBLE
#define VEC_HAS_TWO_HALVES
INLINE vec vec_join(vec_half low, vec_half high) {
#if VECTOR_BYTES == 64
    return (vec)_mm512_inserti64x4(_mm512_castsi256_si512((__m256i)low), (__m256i)high, 1);
#else
    return (vec)_mm256_inserti128_si256(_mm256_castsi128_si256((__m128i)low), (__m128i)high, 1);
#endif
}
INLINE vec vec_to_two_f16(vec low, vec high) { return vec_join(vec_to_f16(low), vec_to_f16(high)); }
#ifdef MTL_ISA_AVX512_BF16
/* Out of line: its constants would push those of the loops around it out of their registers. */
static __attribute__((noinline, cold, unused)) vec vec_to_two_bf16_with_subnormals(vec low, vec high) {
    return vec_join(vec_to_bf16(low), vec_to_bf16(high));
}
INLINE vec vec_to_two_bf16(vec low, vec high) { /* as vec_to_bf16 */
    __mmask16 small = _kor_mask16(_mm512_fpclass_ps_mask(low, 0x20), _mm512_fpclass_ps_mask(high, 0x20));
    if (__builtin_expect(_kortestz_mask16_u8(small, small), 1)) return (vec)_mm512_cvtne2ps_pbh(high, low);
    return vec_to_two_bf16_with_subnormals(low, high);
}
#else
INLINE vec vec_to_two_bf16(vec low, vec high) { return vec_join(vec_to_bf16(low), vec_to_bf16(high)); }
#endif
#if VECTOR_BYTES == 64
#define VEC_HAS_TWO_BF16
/* One load, and one shuffle a vector, which puts an element above a zero. */
INLINE void vec_load_two_bf16(const void *from, vec *low, vec *high) {
    const __m512i place = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0,
                                           3, 0, 2, 0, 1, 0, 0, 0);
    __m512i both = _mm512_loadu_si512(from);
    *low = (vec)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, place, both);
    *high = (vec)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, _mm512_add_epi16(place, _mm512_set1_epi16(16)), both);
}
#endif
#endif

/* ---- stores past the caches; the address is a multiple of STREAM_ALIGNMENT -------------------------------------------------  */

#define VEC_HAS_STREAM
enum { STREAM_ALIGNMENT = 16 }; /* NumPy's, which is not a line's: a line is then put together from quarters */

INLINE void stream_quarters(void *to, const void *from, int count) {
    for (int i = 0; i < count; i++) _mm_stream_si128((__m128i *)to + i, _mm_loadu_si128((const __m128i *)from + i));
}
INLINE void vec_stream(void *to, vec v) {
#if VECTOR_BYTES == 64
    if ((uintptr_t)to % VECTOR_BYTES == 0) _mm512_stream_si512((__m512i *)to, (__m512i)v);
#else
    if ((uintptr_t)to % VECTOR_BYTES == 0) _mm256_stream_si256((__m256i *)to, (__m256i)v);
#endif
    else stream_quarters(to, &v, VECTOR_BYTES / 16);
}
#if VECTOR_BYTES == 64 && !defined(MTL_IN_DOUBLE)
INLINE void vec_stream_half(void *to, vec_half v) {
    if ((uintptr_t)to % sizeof v == 0) _mm256_stream_si256((__m256i *)to, (__m256i)v);
    else stream_quarters(to, &v, 2);
}
#elif !defined(MTL_IN_DOUBLE)
INLINE void vec_stream_half(void *to, vec_half v) { _mm_stream_si128((__m128i *)to, (__m128i)v); }
#endif
/* Other threads see them after this. */
INLINE void vec_stream_end(void) { _mm_sfence(); }

/* ---- what AVX-512 alone has an instruction for ------------------------------------------------------------------------------- */

#if VECTOR_BYTES == 64
#define VEC_HAS_SCALE
#define VEC_HAS_NONZERO_BYTES
#ifdef MTL_IN_DOUBLE
INLINE vec vec_scale(vec v, vec n) { return (vec)_mm512_scalef_pd(v, n); } /* v 2^floor(n) */
INLINE vec vec_reciprocal(vec v) { return vec_set(1) / v; }
INLINE vec_int vec_nonzero_bytes(const char *from) {
    __m128i bytes = _mm_loadl_epi64((const __m128i *)from);
    return (vec_int)_mm512_movm_epi64((__mmask8)_mm_test_epi8_mask(bytes, bytes));
}
#else
INLINE vec vec_scale(vec v, vec n) { return (vec)_mm512_scalef_ps(v, n); } /* v 2^floor(n) */
INLINE vec vec_above_floor(vec v) { return (vec)_mm512_reduce_ps(v, 1); }  /* v - floor(v); 0 for infinity */
/* Of normal numbers with a normal reciprocal: 14 bits, and a Newton step to within a unit in the last place. */
INLINE vec vec_reciprocal(vec v) {
    vec guess = (vec)_mm512_rcp14_ps(v);
    return vec_fma(vec_fma(-v, guess, vec_set(1)), guess, guess);
}
INLINE vec_int vec_nonzero_bytes(const char *from) {
    __m128i bytes = _mm_loadu_si128((const __m128i *)from);
    return (vec_int)_mm512_movm_epi32(_mm_test_epi8_mask(bytes, bytes));
}
#endif
#else
INLINE vec vec_reciprocal(vec v) { return vec_set(1) / v; }
#endif

/* ---- reductions, in a fixed order --------------------------------------------------------------------------------------- */

#define VEC_HAS_REDUCTIONS
#if VECTOR_BYTES == 64 && !defined(MTL_IN_DOUBLE)
INLINE real vec_sum(vec v) { return _mm512_reduce_add_ps(v); }
INLINE real vec_largest(vec v) { return _mm512_reduce_max_ps(v); }
#elif VECTOR_BYTES == 64
INLINE real vec_sum(vec v) { return _mm512_reduce_add_pd(v); }
INLINE real vec_largest(vec v) { return _mm512_reduce_max_pd(v); }
#elif !defined(MTL_IN_DOUBLE)
#define FOLD(name, op)                                                                 \
    INLINE real name(vec v) {                                                          \
        __m128 half = op##_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); \
        half = op##_ps(half, _mm_movehl_ps(half, half));                               \
        return _mm_cvtss_f32(op##_ps(half, _mm_movehdup_ps(half)));                    \
    }
FOLD(vec_sum, _mm_add)
FOLD(vec_largest, _mm_max)
#else
#define FOLD(name, op)                                                                  \
    INLINE real name(vec v) {                                                           \
        __m128d half = op##_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1)); \
        return _mm_cvtsd_f64(op##_pd(half, _mm_unpackhi_pd(half, half)));               \
    }
FOLD(vec_sum, _mm_add)
FOLD(vec_largest, _mm_max)
#endif

/* ---- pairs of bfloat16 ---------------------------------------------------------------------------------------------------- */

#if defined(MTL_ISA_AVX512_BF16) && !defined(MTL_IN_DOUBLE)
#define VEC_HAS_PAIRS
INLINE vec vec_dot_pairs(vec a, vec b, vec sum) { return (vec)_mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
INLINE vec vec_pack_pairs(vec first, vec second) { return (vec)_mm512_cvtne2ps_pbh(second, first); }
INLINE vec vec_broadcast_pair(const void *from) {
    int32_t pair;
    memcpy(&pair, from, sizeof pair);
    return (vec)_mm512_set1_epi32(pair);
}
/* LANES pairs of what stands at the same place of a and of b. */
INLINE vec vec_zip_pairs(const void *a, const void *b) {
    __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)a));
    __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)b));
    return (vec)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
#endif
