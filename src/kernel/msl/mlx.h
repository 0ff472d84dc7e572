// What MLX has before every custom kernel. Functions are templates where users define their own of the same name.
namespace metal {

typedef half float16_t;
typedef bfloat bfloat16_t;
MSL_FN constexpr uint16_t bfloat16_to_uint16(bfloat16_t x) { return x.bits; }
MSL_FN constexpr bfloat16_t uint16_to_bfloat16(uint16_t x) { return as_type<bfloat16_t>(x); }

// ---- complex numbers

template <class T> struct complex_t;
template <class T> constexpr bool is_complex_v = false;
template <class T> constexpr bool is_complex_v<complex_t<T>> = true;
template <class T> struct complex_t {
    using value_type = T;
    T real, imag;
    complex_t() = default;
    MSL_FN constexpr complex_t(T re, T im) : real(re), imag(im) {}
    template <class A, class = enable_if_t<(msl_::scalar<A>::kind > 0)>>
    MSL_FN constexpr complex_t(A re) : real(T(re)), imag(T(0)) {}
    template <class U, class = enable_if_t<!is_same_v<U, T>>, class = void>
    MSL_FN constexpr complex_t(const complex_t<U> &z) : real(T(z.real)), imag(T(z.imag)) {}
    MSL_FN constexpr complex_t(const vec<T, 2> &v) : real(v.x), imag(v.y) {}
    MSL_FN constexpr operator vec<T, 2>() const { return vec<T, 2>(real, imag); }
    template <class A, class = enable_if_t<(msl_::scalar<A>::kind > 0)>> MSL_FN constexpr operator A() const {
        return A(real);
    }
    friend MSL_FN constexpr complex_t operator-(complex_t a) { return {T(-a.real), T(-a.imag)}; }
    friend MSL_FN constexpr complex_t operator+(complex_t a, complex_t b) {
        return {T(a.real + b.real), T(a.imag + b.imag)};
    }
    friend MSL_FN constexpr complex_t operator-(complex_t a, complex_t b) {
        return {T(a.real - b.real), T(a.imag - b.imag)};
    }
    friend MSL_FN constexpr complex_t operator*(complex_t a, complex_t b) {
        return {T(a.real * b.real - a.imag * b.imag), T(a.real * b.imag + a.imag * b.real)};
    }
    friend MSL_FN constexpr complex_t operator/(complex_t a, complex_t b) {
        T d = b.real * b.real + b.imag * b.imag;
        return {T((a.real * b.real + a.imag * b.imag) / d), T((a.imag * b.real - a.real * b.imag) / d)};
    }
    friend MSL_FN constexpr complex_t operator%(complex_t a, complex_t b) {
        T re = a.real - b.real * T(int64_t(a.real / b.real)), im = a.imag - b.imag * T(int64_t(a.imag / b.imag));
        if (re != 0 && (re < 0) != (b.real < 0)) re += b.real;
        if (im != 0 && (im < 0) != (b.imag < 0)) im += b.imag;
        return {re, im};
    }
    // Lexicographic, as NumPy sorts them.
    friend MSL_FN constexpr bool operator==(complex_t a, complex_t b) { return a.real == b.real && a.imag == b.imag; }
    friend MSL_FN constexpr bool operator!=(complex_t a, complex_t b) { return !(a == b); }
    friend MSL_FN constexpr bool operator>=(complex_t a, complex_t b) {
        return a.real > b.real || (a.real == b.real && a.imag >= b.imag);
    }
    friend MSL_FN constexpr bool operator>(complex_t a, complex_t b) {
        return a.real > b.real || (a.real == b.real && a.imag > b.imag);
    }
    friend MSL_FN constexpr bool operator<=(complex_t a, complex_t b) { return b >= a; }
    friend MSL_FN constexpr bool operator<(complex_t a, complex_t b) { return b > a; }
#define MSL_COMPLEX_OP(op)                                               \
    template <class A, class = enable_if_t<(msl_::scalar<A>::kind > 0)>> \
    friend MSL_FN constexpr complex_t operator op(complex_t a, A b) {    \
        return a op complex_t(b);                                        \
    }                                                                    \
    template <class A, class = enable_if_t<(msl_::scalar<A>::kind > 0)>> \
    friend MSL_FN constexpr complex_t operator op(A a, complex_t b) {    \
        return complex_t(a) op b;                                        \
    }                                                                    \
    template <class A> MSL_FN constexpr complex_t &operator op##=(const A &b) { return *this = *this op b; }
    MSL_COMPLEX_OP(+)
    MSL_COMPLEX_OP(-)
    MSL_COMPLEX_OP(*)
    MSL_COMPLEX_OP(/)
#undef MSL_COMPLEX_OP
};
typedef complex_t<half> complex32_t;
typedef complex_t<float> complex64_t;

// ---- limits: infinities count

template <class T> struct Limits {
    static constexpr T max = is_floating_point_v<T> ? numeric_limits<T>::infinity() : numeric_limits<T>::max();
    static constexpr T min = is_floating_point_v<T> ? T(-numeric_limits<T>::infinity()) : numeric_limits<T>::min();
    static constexpr T finite_max = numeric_limits<T>::max();
    static constexpr T finite_min = numeric_limits<T>::lowest();
};
template <> struct Limits<bool> { static constexpr bool max = true, min = false; };
template <class T> struct Limits<complex_t<T>> {
    static constexpr complex_t<T> max{numeric_limits<T>::infinity(), numeric_limits<T>::infinity()};
    static constexpr complex_t<T> min{-numeric_limits<T>::infinity(), -numeric_limits<T>::infinity()};
};

// ---- where the element of a number (or position) lies in a strided array

template <class I = int64_t, class = enable_if_t<is_integral_v<I>>>
MSL_FN I elem_to_loc(I elem, const int *shape, const int64_t *strides, int ndim) {
    I loc = 0;
    for (int i = ndim - 1; i >= 0 && elem > 0; --i) {
        loc += I(elem % shape[i]) * I(strides[i]);
        elem /= shape[i];
    }
    return loc;
}
template <class I = int64_t> MSL_FN I elem_to_loc(uint3 elem, const int *shape, const int64_t *strides, int ndim) {
    I loc = I(elem.x) * I(strides[ndim - 1]) + I(elem.y) * I(strides[ndim - 2]);
    for (int d = ndim - 3; d >= 0; --d) {
        loc += I(elem.z % shape[d]) * I(strides[d]);
        elem.z /= shape[d];
    }
    return loc;
}
template <class I = int64_t> MSL_FN I elem_to_loc_1(uint elem, const int64_t &stride) { return I(elem) * I(stride); }
template <class I = int64_t> MSL_FN I elem_to_loc_2(uint2 elem, const int64_t *strides) {
    return I(elem.x) * I(strides[1]) + I(elem.y) * I(strides[0]);
}
template <class I = int64_t> MSL_FN I elem_to_loc_3(uint3 elem, const int64_t *strides) {
    return I(elem.x) * I(strides[2]) + I(elem.y) * I(strides[1]) + I(elem.z) * I(strides[0]);
}
template <class I = int64_t>
MSL_FN vec<I, 2> elem_to_loc_2_nd(uint3 elem, const int *shape, const int64_t *a_strides, const int64_t *b_strides,
                                  int ndim) {
    return vec<I, 2>(elem_to_loc<I>(elem, shape, a_strides, ndim), elem_to_loc<I>(elem, shape, b_strides, ndim));
}
template <class I = int64_t>
MSL_FN vec<I, 3> elem_to_loc_3_nd(uint3 elem, const int *shape, const int64_t *a_strides, const int64_t *b_strides,
                                  const int64_t *c_strides, int ndim) {
    return vec<I, 3>(elem_to_loc<I>(elem, shape, a_strides, ndim), elem_to_loc<I>(elem, shape, b_strides, ndim),
                     elem_to_loc<I>(elem, shape, c_strides, ndim));
}
// The offset of an element that moves on by one or by n; kept as the element's number, whatever the rank.
template <int DIM, class OffsetT = size_t, bool General = true> struct LoopedElemToLoc {
    int dim;
    OffsetT offset{0}, index{0};
    MSL_FN LoopedElemToLoc(int d) : dim(d) {}
    MSL_FN void next(const int *shape, const int64_t *strides) { next(1, shape, strides); }
    MSL_FN void next(int n, const int *shape, const int64_t *strides) {
        index += n;
        offset = elem_to_loc<OffsetT>(index, shape, strides, dim);
    }
    MSL_FN OffsetT location() const { return offset; }
};

// ---- calculation

#define MLX_MTL_PRAGMA_UNROLL _Pragma("unroll")
template <class T> struct WorkPerThread { static constexpr int n = 8 / sizeof(T); };
template <class T, class U, MSL_REST> MSL_FN constexpr T ceildiv(T n, U m, Rest...) {
    MSL_NO_REST(ceildiv);
    return (n + m - 1) MSL_OVER m;
}
MSL_MATH_1(log1p, msl_::log1p(x))
MSL_MATH_1(expm1, msl_::expm1(x))
MSL_MATH_1(erf, msl_::erf(x))
MSL_MATH_1(erfinv, msl_::erfinv(x))
MSL_FN complex64_t log1p(complex64_t z) {
    float x = z.real, y = z.imag, r = x * (2.0f + x) + y * y; // |1 + z|^2 - 1, without loss near 0
    return {0.5f * msl_::log1p(r), msl_::atan2(y, x + 1.0f)};
}
template <bool Condition, class T, class U> struct ConditionalType { using type = conditional_t<Condition, T, U>; };
template <class U, class T, MSL_REST> MSL_FN constexpr U cast_to(T x, Rest...) {
    MSL_NO_REST(cast_to);
    if constexpr (is_same_v<U, bool> && is_complex_v<T>) return x.real != 0 || x.imag != 0;
    else return static_cast<U>(x);
}

} // namespace metal
