/* What vec.h needs by name on 64-bit Arm: Advanced SIMD; BFCVTN, BFDOT for `neon_bf16`. SPDX-License-Identifier: MIT */
#include <arm_neon.h>

#ifdef MTL_IN_DOUBLE

INLINE vec vec_fma(vec a, vec b, vec c) { return (vec)vfmaq_f64(c, a, b); }
INLINE vec vec_swap_neighbours(vec v) { return (vec)vextq_f64(v, v, 1); }
/* b where either is NaN; FMAX would give NaN, FMAXNM the number. */
INLINE vec vec_max(vec a, vec b) { return (vec)vbslq_f64(vcgtq_f64(a, b), a, b); }
INLINE vec vec_min(vec a, vec b) { return (vec)vbslq_f64(vcltq_f64(a, b), a, b); }

#else

#define angle_fma(a, b, c) ((angle_vec)vfmaq_f64(c, a, b))

INLINE vec vec_fma(vec a, vec b, vec c) { return (vec)vfmaq_f32(c, a, b); }
INLINE vec vec_swap_neighbours(vec v) { return (vec)vrev64q_f32(v); } /* lanes 0 and 1, 2 and 3 trade places */
/* b where either is NaN; FMAX would give NaN, FMAXNM the number. */
INLINE vec vec_max(vec a, vec b) { return (vec)vbslq_f32(vcgtq_f32(a, b), a, b); }
INLINE vec vec_min(vec a, vec b) { return (vec)vbslq_f32(vcltq_f32(a, b), a, b); }

INLINE vec vec_load_f16(const void *from) {
    float16x4_t half;
    memcpy(&half, from, sizeof half);
    return (vec)vcvt_f32_f16(half);
}
INLINE vec_half vec_to_f16(vec v) { return (vec_half)vcvt_f16_f32(v); }

INLINE vec vec_load_bf16(const void *from) {
    uint16x4_t half;
    memcpy(&half, from, sizeof half);
    return (vec)vshll_n_u16(half, 16);
}
#ifdef MTL_ISA_NEON_BF16
/* To nearest even, subnormals kept, NaN made quiet: as mtl_float_to_bf16. */
INLINE vec_half vec_to_bf16(vec v) { return (vec_half)vcvt_bf16_f32(v); }
#else
INLINE vec_half vec_to_bf16(vec v) {
    uint32x4_t bits = (uint32x4_t)v, odd = (bits >> 16) & 1;
    bits = vbslq_u32(vceqq_f32(v, v), bits + (odd + 0x7fff), bits | 0x400000); /* NaN: the quiet bit, and no carry */
    return (vec_half)vshrn_n_u32(bits, 16);
}
#endif
#endif

#if defined(MTL_ISA_NEON_BF16) && !defined(MTL_IN_DOUBLE)
#define VEC_HAS_PAIRS /* BFDOT adds both products to the sum, rounded to odd where there is no EBF16 */
INLINE vec vec_dot_pairs(vec a, vec b, vec sum) {
    return (vec)vbfdotq_f32((float32x4_t)sum, vreinterpretq_bf16_f32((float32x4_t)a),
                            vreinterpretq_bf16_f32((float32x4_t)b));
}
INLINE vec vec_pack_pairs(vec first, vec second) {
    bfloat16x8_t pairs = vcvtq_high_bf16_f32(vcvtq_low_bf16_f32((float32x4_t)first), (float32x4_t)second);
    return (vec)vreinterpretq_f32_bf16(pairs);
}
INLINE vec vec_broadcast_pair(const void *from) {
    uint32_t pair;
    memcpy(&pair, from, sizeof pair);
    return (vec)vdupq_n_u32(pair);
}
/* LANES pairs of what stands at the same place of a and of b. */
INLINE vec vec_zip_pairs(const void *a, const void *b) {
    uint16x4_t low, high;
    memcpy(&low, a, sizeof low);
    memcpy(&high, b, sizeof high);
    return (vec)vcombine_u16(vzip1_u16(low, high), vzip2_u16(low, high));
}
#endif

INLINE vec vec_reciprocal(vec v) { return vec_set(1) / v; }

#define VEC_HAS_REDUCTIONS /* of neighbours first; FMAXNM passes over NaN */
#ifdef MTL_IN_DOUBLE
INLINE real vec_sum(vec v) { return vaddvq_f64(v); }
INLINE real vec_largest(vec v) { return vmaxnmvq_f64(v); }
#else
INLINE real vec_sum(vec v) { return vaddvq_f32(v); }
INLINE real vec_largest(vec v) { return vmaxnmvq_f32(v); }
#endif
