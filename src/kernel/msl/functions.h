// metal_integer, metal_relational, metal_geometric, metal_pack.
namespace metal {

namespace msl_ {
template <class T> using unsigned_of = make_unsigned_t<T>;
MSL_FN constexpr int leading_zeros(uint x) {
#if MSL_GPU
    return ::__clz(int(x));
#else
    return x == 0 ? 32 : __builtin_clz(x);
#endif
}
MSL_FN constexpr int leading_zeros(ulong x) {
#if MSL_GPU
    return ::__clzll((long long)x);
#else
    return x == 0 ? 64 : __builtin_clzl(x);
#endif
}
MSL_FN constexpr int ones(ulong x) {
#if MSL_GPU
    return ::__popcll(x);
#else
    return __builtin_popcountl(x);
#endif
}
MSL_FN constexpr int ones(uint x) {
#if MSL_GPU
    return ::__popc(x);
#else
    return __builtin_popcount(x);
#endif
}
template <class T> using word = conditional_t<sizeof(T) == 8, ulong, uint>;
template <class T> MSL_FN constexpr word<T> zero_extended(T x) { return word<T>(unsigned_of<T>(x)); }
template <class T> constexpr int width_of = int(sizeof(T)) * 8;
template <class T> MSL_FN constexpr T clz_of(T x) {
    return T(leading_zeros(zero_extended(x)) - (width_of<word<T>> - width_of<T>));
}
template <class T> MSL_FN constexpr T ctz_of(T x) {
    word<T> w = zero_extended(x);
    return w == 0 ? T(width_of<T>) : T(width_of<word<T>> - 1 - leading_zeros(word<T>(w & (0 - w))));
}
template <class T> MSL_FN constexpr T reverse_of(T x) {
    ulong w = zero_extended(x);
    w = (w >> 1 & 0x5555555555555555ul) | (w & 0x5555555555555555ul) << 1;
    w = (w >> 2 & 0x3333333333333333ul) | (w & 0x3333333333333333ul) << 2;
    w = (w >> 4 & 0x0f0f0f0f0f0f0f0ful) | (w & 0x0f0f0f0f0f0f0f0ful) << 4;
    w = (w >> 8 & 0x00ff00ff00ff00fful) | (w & 0x00ff00ff00ff00fful) << 8;
    w = (w >> 16 & 0x0000ffff0000fffful) | (w & 0x0000ffff0000fffful) << 16;
    w = w >> 32 | w << 32;
    return T(w >> (64 - width_of<T>));
}
template <class T> MSL_FN constexpr T rotate_of(T x, T by) {
    int n = int(by) & (width_of<T> - 1);
    word<T> w = zero_extended(x);
    return T(n == 0 ? w : w << n | w >> (width_of<T> - n));
}
template <class T> MSL_FN constexpr T extract_of(T x, uint offset, uint count) {
    if (count == 0) return T(0);
    // signed ones extend the sign of the field
    auto up = unsigned_of<T>(unsigned_of<T>(x) << (width_of<T> - offset - count));
    return T(T(up) >> (width_of<T> - count));
}
template <class T> MSL_FN constexpr T insert_of(T base, T insert, uint offset, uint count) {
    if (count == 0) return base;
    word<T> mask = (~word<T>(0) >> (width_of<word<T>> - count)) << offset;
    return T((zero_extended(base) & ~mask) | (zero_extended(insert) << offset & mask));
}
template <class T> MSL_FN constexpr T mulhi_of(T a, T b) {
    if constexpr (sizeof(T) < 8) {
        using wide = conditional_t<scalar<T>::is_signed, long, ulong>;
        return T(wide(a) * wide(b) >> width_of<T>);
    } else {
        // Schoolbook in halves, then what two's complement takes off for a negative factor.
        ulong x = ulong(a), y = ulong(b), xl = x & 0xfffffffful, xh = x >> 32, yl = y & 0xfffffffful, yh = y >> 32;
        ulong middle = xh * yl + (xl * yl >> 32), low = (middle & 0xfffffffful) + xl * yh;
        ulong high = xh * yh + (middle >> 32) + (low >> 32);
        if (scalar<T>::is_signed) high -= (long(x) < 0 ? y : 0ul) + (long(y) < 0 ? x : 0ul);
        return T(high);
    }
}
template <class T> MSL_FN constexpr T addsat_of(T a, T b) {
    T s = T(unsigned_of<T>(a) + unsigned_of<T>(b));
    if constexpr (!scalar<T>::is_signed) return s < a ? T(~T(0)) : s;
    else return ((a ^ s) & (b ^ s)) < 0 ? (a < 0 ? numeric_limits<T>::min() : numeric_limits<T>::max()) : s;
}
template <class T> MSL_FN constexpr T subsat_of(T a, T b) {
    T s = T(unsigned_of<T>(a) - unsigned_of<T>(b));
    if constexpr (!scalar<T>::is_signed) return a < b ? T(0) : s;
    else return ((a ^ b) & (a ^ s)) < 0 ? (a < 0 ? numeric_limits<T>::min() : numeric_limits<T>::max()) : s;
}
template <class T> MSL_FN constexpr T absdiff_of(T a, T b) {
    return a > b ? T(unsigned_of<T>(a) - unsigned_of<T>(b)) : T(unsigned_of<T>(b) - unsigned_of<T>(a));
}
MSL_FN constexpr int low24(int x) { return int(uint(x) << 8) >> 8; }
MSL_FN constexpr uint low24(uint x) { return x & 0xffffffu; }
} // namespace msl_

namespace msl_ {
MSL_FUNCTOR_T(popcount, (T x), ones(zero_extended(x)))
MSL_FUNCTOR_T(clz, (T x), clz_of(x))
MSL_FUNCTOR_T(ctz, (T x), ctz_of(x))
MSL_FUNCTOR_T(reverse_bits, (T x), reverse_of(x))
} // namespace msl_
#define MSL_INTEGER_1(name)                                                              \
    template <class A, MSL_REST> MSL_FN constexpr msl_::number_t<A> name(A a, Rest...) { \
        MSL_NO_REST(name);                                                               \
        using V = msl_::number_t<A>;                                                     \
        return msl_::each<V>(msl_::name##_f(), V(a));                                    \
    }
MSL_INTEGER_1(popcount)
MSL_INTEGER_1(clz)
MSL_INTEGER_1(ctz)
MSL_INTEGER_1(reverse_bits)
#undef MSL_INTEGER_1
MSL_ANY_2(absdiff, msl_::absdiff_of(x, y))
MSL_ANY_2(addsat, msl_::addsat_of(x, y))
MSL_ANY_2(subsat, msl_::subsat_of(x, y))
MSL_ANY_2(hadd, (x >> 1) + (y >> 1) + (x & y & 1))
MSL_ANY_2(rhadd, (x >> 1) + (y >> 1) + ((x | y) & 1))
MSL_ANY_2(rotate, msl_::rotate_of(x, y))
MSL_ANY_2(mulhi, msl_::mulhi_of(x, y))
MSL_ANY_2(mul24, msl_::low24(x) * msl_::low24(y))
MSL_ANY_3(mad24, msl_::low24(x) * msl_::low24(y) + z)
MSL_ANY_3(madhi, msl_::mulhi_of(x, y) + z)
MSL_ANY_3(madsat, msl_::addsat_of(T(x *y), z))
template <class A, MSL_REST> MSL_FN constexpr msl_::number_t<A> extract_bits(A a, uint offset, uint count, Rest...) {
    MSL_NO_REST(extract_bits);
    using V = msl_::number_t<A>;
    return msl_::each<V>([=](auto x) { return msl_::extract_of(x, offset, count); }, V(a));
}
template <class A, class B, MSL_REST>
MSL_FN constexpr msl_::common_t<A, B> insert_bits(A base, B insert, uint offset, uint count, Rest...) {
    MSL_NO_REST(insert_bits);
    using V = msl_::common_t<A, B>;
    return msl_::each<V>([=](auto x, auto y) { return msl_::insert_of(x, y, offset, count); }, V(base), V(insert));
}

// ---- relational: by bits, so that they hold in fast math too

#define MSL_CLASSIFY(name, body)                                                                              \
    namespace msl_ {                                                                                          \
    MSL_FUNCTOR(name, (float x), body)                                                                        \
    }                                                                                                         \
    template <class A, MSL_REST> MSL_FN constexpr msl_::rebind_t<msl_::float_t<A>, bool> name(A a, Rest...) { \
        MSL_NO_REST(name);                                                                                    \
        using V = msl_::float_t<A>;                                                                           \
        return msl_::each<msl_::rebind_t<V, bool>>(msl_::name##_f(), V(a));                                   \
    }
MSL_CLASSIFY(isnan, is_nan(x))
MSL_CLASSIFY(isinf, is_inf(x))
MSL_CLASSIFY(isfinite, (bits(x) & 0x7f800000u) != 0x7f800000u)
MSL_CLASSIFY(signbit, bits(x) >> 31 != 0)
#undef MSL_CLASSIFY
template <class A, MSL_REST> MSL_FN constexpr auto isnormal(A a, Rest...) {
    MSL_NO_REST(isnormal);
    using V = msl_::float_t<A>;
    using S = make_scalar_t<V>;
    return msl_::each<msl_::rebind_t<V, bool>>(
        [](S s) {
            float x = float(s);
            return !msl_::is_nan(x) && !msl_::is_inf(x) && msl_::abs_of(x) >= float(numeric_limits<S>::min());
        },
        V(a));
}
template <class A, class B, MSL_REST> MSL_FN constexpr auto isunordered(A a, B b, Rest...) {
    MSL_NO_REST(isunordered);
    using V = msl_::common_float_t<A, B>;
    return isnan(V(a)) || isnan(V(b));
}
template <class A, class B, MSL_REST> MSL_FN constexpr auto isordered(A a, B b, Rest...) {
    MSL_NO_REST(isordered);
    return !isunordered(a, b);
}
MSL_FN constexpr bool any(bool x) { return x; }
MSL_FN constexpr bool all(bool x) { return x; }
MSL_FN constexpr bool any(const bool2 &v) { return v.x || v.y; }
MSL_FN constexpr bool all(const bool2 &v) { return v.x && v.y; }
MSL_FN constexpr bool any(const bool3 &v) { return v.x || v.y || v.z; }
MSL_FN constexpr bool all(const bool3 &v) { return v.x && v.y && v.z; }
MSL_FN constexpr bool any(const bool4 &v) { return v.x || v.y || v.z || v.w; }
MSL_FN constexpr bool all(const bool4 &v) { return v.x && v.y && v.z && v.w; }
template <class A, class B, class C, MSL_REST> MSL_FN constexpr msl_::common_t<A, B> select(A a, B b, C c, Rest...) {
    MSL_NO_REST(select);
    using V = msl_::common_t<A, B>;
    using S = make_scalar_t<V>;
    return msl_::each<V>(
        [](S x, S y, bool choose) {
            if (choose) return y;
            return x;
        },
        V(a), V(b), msl_::rebind_t<V, bool>(msl_::number_t<C>(c)));
}

// ---- geometric: sums in float

namespace msl_ {
template <class V> MSL_FN constexpr auto dot_of(const V &a, const V &b) {
    using S = typename V::scalar_type;
    using Sum = conditional_t<scalar<S>::kind == 3, float, S>;
    Sum sum = Sum(a.x) * Sum(b.x) + Sum(a.y) * Sum(b.y);
    if constexpr (V::width > 2) sum += Sum(a.z) * Sum(b.z);
    if constexpr (V::width > 3) sum += Sum(a.w) * Sum(b.w);
    return sum;
}
// The two arguments' vector type, where at least one is a vector.
template <class A, class B> using vectors_t = vector_t<common_t<A, B>>;
} // namespace msl_
template <class A, class B, class V = msl_::vectors_t<A, B>, MSL_REST>
MSL_FN constexpr typename V::scalar_type dot(A a, B b, Rest...) {
    MSL_NO_REST(dot);
    return typename V::scalar_type(msl_::dot_of(V(a), V(b)));
}
template <class A, class V = msl_::vector_t<A>, MSL_REST>
MSL_FN constexpr typename V::scalar_type length_squared(A a, Rest...) {
    MSL_NO_REST(length_squared);
    return dot(V(a), V(a));
}
template <class A, class V = msl_::vector_t<A>, MSL_REST> MSL_FN typename V::scalar_type length(A a, Rest...) {
    MSL_NO_REST(length);
    return typename V::scalar_type(msl_::sqrt(msl_::dot_of(V(a), V(a))));
}
template <class A, class B, class V = msl_::vectors_t<A, B>, MSL_REST>
MSL_FN typename V::scalar_type distance(A a, B b, Rest...) {
    MSL_NO_REST(distance);
    return length(V(a) - V(b));
}
template <class A, class B, class V = msl_::vectors_t<A, B>, MSL_REST>
MSL_FN constexpr typename V::scalar_type distance_squared(A a, B b, Rest...) {
    MSL_NO_REST(distance_squared);
    return length_squared(V(a) - V(b));
}
template <class A, class V = msl_::vector_t<A>, MSL_REST> MSL_FN V normalize(A a, Rest...) {
    MSL_NO_REST(normalize);
    float scale = msl_::rsqrt(float(msl_::dot_of(V(a), V(a))));
    return msl_::each<V>([=](float x) { return x * scale; }, V(a));
}
template <class A, class B, class V = msl_::vectors_t<A, B>, MSL_REST> MSL_FN constexpr V cross(A a, B b, Rest...) {
    MSL_NO_REST(cross);
    static_assert(V::width == 3, "cross takes vectors of 3");
    V u(a), v(b);
    return V(u.y * v.z - u.z * v.y, u.z * v.x - u.x * v.z, u.x * v.y - u.y * v.x);
}
template <class A, class B, class V = msl_::vectors_t<A, B>, MSL_REST> MSL_FN V reflect(A incident, B normal, Rest...) {
    MSL_NO_REST(reflect);
    return V(incident) - V(normal) * typename V::scalar_type(2.0f * float(dot(V(normal), V(incident))));
}
template <class A, class B, class V = msl_::vectors_t<A, B>, MSL_REST>
MSL_FN V refract(A incident, B normal, typename V::scalar_type eta, Rest...) {
    MSL_NO_REST(refract);
    float c = float(dot(V(normal), V(incident))), e = float(eta), k = 1.0f - e * e * (1.0f - c * c);
    return k < 0.0f ? V(typename V::scalar_type(0))
                    : V(incident) * eta - V(normal) * typename V::scalar_type(e * c + msl_::sqrt(k));
}
template <class A, class B, class C, class V = msl_::vectors_t<A, B>, MSL_REST>
MSL_FN V faceforward(A normal, B incident, C reference, Rest...) {
    MSL_NO_REST(faceforward);
    return float(dot(V(reference), V(incident))) < 0.0f ? V(normal) : -V(normal);
}

#define MSL_ALSO_GEOMETRIC    \
    using metal::distance;    \
    using metal::length;      \
    using metal::normalize;   \
    using metal::reflect;     \
    using metal::refract;     \
    using metal::faceforward; \
    using metal::dot;         \
    using metal::cross;
namespace precise {
MSL_ALSO_GEOMETRIC
}
namespace fast {
MSL_ALSO_GEOMETRIC
}
#undef MSL_ALSO_GEOMETRIC

// ---- pack, unpack

namespace msl_ {
MSL_FN uint to_unorm(float x, float scale) { return uint(rint(fmin(fmax(x, 0.0f), 1.0f) * scale)); }
MSL_FN uint to_snorm(float x, float scale, uint mask) {
    return uint(int(rint(fmin(fmax(x, -1.0f), 1.0f) * scale))) & mask;
}
MSL_FN float from_snorm(int x, float scale) { return fmax(float(x) / scale, -1.0f); }
// sRGB's transfer function (IEC 61966-2-1)
MSL_FN float to_srgb(float x) { return x <= 0.0031308f ? 12.92f * x : 1.055f * pow(x, 1.0f / 2.4f) - 0.055f; }
MSL_FN float from_srgb(float x) { return x <= 0.04045f ? x / 12.92f : pow((x + 0.055f) / 1.055f, 2.4f); }
} // namespace msl_
#define MSL_PACK(T)                                                                                                    \
    MSL_FN uint pack_##T##_to_unorm4x8(vec<T, 4> v) {                                                                  \
        return msl_::to_unorm(v.x, 255.0f) | msl_::to_unorm(v.y, 255.0f) << 8 | msl_::to_unorm(v.z, 255.0f) << 16 |    \
               msl_::to_unorm(v.w, 255.0f) << 24;                                                                      \
    }                                                                                                                  \
    MSL_FN uint pack_##T##_to_snorm4x8(vec<T, 4> v) {                                                                  \
        return msl_::to_snorm(v.x, 127.0f, 255u) | msl_::to_snorm(v.y, 127.0f, 255u) << 8 |                            \
               msl_::to_snorm(v.z, 127.0f, 255u) << 16 | msl_::to_snorm(v.w, 127.0f, 255u) << 24;                      \
    }                                                                                                                  \
    MSL_FN uint pack_##T##_to_unorm2x16(vec<T, 2> v) {                                                                 \
        return msl_::to_unorm(v.x, 65535.0f) | msl_::to_unorm(v.y, 65535.0f) << 16;                                    \
    }                                                                                                                  \
    MSL_FN uint pack_##T##_to_snorm2x16(vec<T, 2> v) {                                                                 \
        return msl_::to_snorm(v.x, 32767.0f, 65535u) | msl_::to_snorm(v.y, 32767.0f, 65535u) << 16;                    \
    }                                                                                                                  \
    MSL_FN uint pack_##T##_to_unorm10a2(vec<T, 4> v) {                                                                 \
        return msl_::to_unorm(v.x, 1023.0f) | msl_::to_unorm(v.y, 1023.0f) << 10 |                                     \
               msl_::to_unorm(v.z, 1023.0f) << 20 | msl_::to_unorm(v.w, 3.0f) << 30;                                   \
    }                                                                                                                  \
    MSL_FN ushort pack_##T##_to_unorm565(vec<T, 3> v) {                                                                \
        return ushort(msl_::to_unorm(v.x, 31.0f) << 11 | msl_::to_unorm(v.y, 63.0f) << 5 |                             \
                      msl_::to_unorm(v.z, 31.0f));                                                                     \
    }                                                                                                                  \
    MSL_FN uint pack_##T##_to_srgb_unorm4x8(vec<T, 4> v) {                                                             \
        return pack_float_to_unorm4x8(vec<float, 4>(msl_::to_srgb(v.x), msl_::to_srgb(v.y), msl_::to_srgb(v.z), v.w)); \
    }                                                                                                                  \
    MSL_FN vec<T, 4> unpack_unorm4x8_to_##T(uint x) {                                                                  \
        return vec<T, 4>(float(x & 255u) / 255.0f, float(x >> 8 & 255u) / 255.0f, float(x >> 16 & 255u) / 255.0f,      \
                         float(x >> 24) / 255.0f);                                                                     \
    }                                                                                                                  \
    MSL_FN vec<T, 4> unpack_snorm4x8_to_##T(uint x) {                                                                  \
        return vec<T, 4>(msl_::from_snorm(int8_t(x), 127.0f), msl_::from_snorm(int8_t(x >> 8), 127.0f),                \
                         msl_::from_snorm(int8_t(x >> 16), 127.0f), msl_::from_snorm(int8_t(x >> 24), 127.0f));        \
    }                                                                                                                  \
    MSL_FN vec<T, 2> unpack_unorm2x16_to_##T(uint x) {                                                                 \
        return vec<T, 2>(float(x & 65535u) / 65535.0f, float(x >> 16) / 65535.0f);                                     \
    }                                                                                                                  \
    MSL_FN vec<T, 2> unpack_snorm2x16_to_##T(uint x) {                                                                 \
        return vec<T, 2>(msl_::from_snorm(int16_t(x), 32767.0f), msl_::from_snorm(int16_t(x >> 16), 32767.0f));        \
    }                                                                                                                  \
    MSL_FN vec<T, 4> unpack_unorm10a2_to_##T(uint x) {                                                                 \
        return vec<T, 4>(float(x & 1023u) / 1023.0f, float(x >> 10 & 1023u) / 1023.0f,                                 \
                         float(x >> 20 & 1023u) / 1023.0f, float(x >> 30) / 3.0f);                                     \
    }                                                                                                                  \
    MSL_FN vec<T, 3> unpack_unorm565_to_##T(ushort x) {                                                                \
        return vec<T, 3>(float(x >> 11) / 31.0f, float(x >> 5 & 63) / 63.0f, float(x & 31) / 31.0f);                   \
    }                                                                                                                  \
    MSL_FN vec<T, 4> unpack_unorm4x8_srgb_to_##T(uint x) {                                                             \
        vec<float, 4> v = unpack_unorm4x8_to_float(x);                                                                 \
        return vec<T, 4>(msl_::from_srgb(v.x), msl_::from_srgb(v.y), msl_::from_srgb(v.z), v.w);                       \
    }
MSL_PACK(float)
MSL_PACK(half)
#undef MSL_PACK

} // namespace metal
