// Scalars of the Metal Shading Language, their limits, type traits, as_type. Freestanding C++17 for clang and NVRTC.
//
// half and bfloat are classes everywhere: clang 14 on x86-64 and NVRTC have no arithmetic type of 16 bits, and one definition
// keeps CPU and GPU alike. Every operation is done in float and rounded once to nearest, which for + - * / and sqrt gives
// the correctly rounded 16-bit result (float has more than 2 * 11 + 2 bits).
#if defined(__CUDACC_RTC__) || MTL_TARGET_CUDA
#define MSL_GPU 1
#define MSL_FN  __forceinline__
#else
#define MSL_GPU 0
#define MSL_FN  inline __attribute__((always_inline))
#endif
#if MTL_MATH_FAST
#define MSL_MATH_FAST 1
#if MSL_GPU && !defined(__FAST_MATH__)
#define __FAST_MATH__ 1
#endif
#endif
#ifndef MSL_MATH_FAST
#define MSL_MATH_FAST 0
#endif
#define METAL_FUNC     inline
#define METAL_CONST    const
#define METAL_ALIGN(n) alignas(n)
#ifndef __METAL_VERSION__
#define __METAL_VERSION__ 320
#endif
#define __METAL__ 1
#ifndef __LITTLE_ENDIAN__ // which NVRTC leaves out
#define __LITTLE_ENDIAN__ 1
#endif
#define __HAVE_BFLOAT__ 1

#if !MSL_GPU    // NVRTC has its own
namespace std { // where compilers look for what {1, 2, 3} is as an argument
template <class T> class initializer_list {
    const T *first;
    unsigned long count;
    constexpr initializer_list(const T *begin, unsigned long n) : first(begin), count(n) {}

  public:
    using value_type = T;
    constexpr initializer_list() : first(nullptr), count(0) {}
    constexpr unsigned long size() const { return count; }
    constexpr const T *begin() const { return first; }
    constexpr const T *end() const { return first + count; }
};
} // namespace std
#endif

namespace metal {
using std::initializer_list;

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef long intptr_t;
typedef unsigned long uintptr_t;

// ---- type traits

template <class T, T Value> struct integral_constant {
    static constexpr T value = Value;
    using value_type = T;
    using type = integral_constant;
    constexpr operator T() const { return Value; }
};
using true_type = integral_constant<bool, true>;
using false_type = integral_constant<bool, false>;
template <bool B> using bool_constant = integral_constant<bool, B>;

template <class A, class B> struct is_same : false_type {};
template <class A> struct is_same<A, A> : true_type {};
template <class A, class B> constexpr bool is_same_v = is_same<A, B>::value;

template <bool B, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { using type = T; };
template <bool B, class T = void> using enable_if_t = typename enable_if<B, T>::type;

template <bool B, class T, class F> struct conditional { using type = T; };
template <class T, class F> struct conditional<false, T, F> { using type = F; };
template <bool B, class T, class F> using conditional_t = typename conditional<B, T, F>::type;

namespace msl_ {
template <class...> using void_t = void;
} // namespace msl_

#define MSL_REMOVE(name, from) \
    template <class T> struct name<from> { using type = T; };
#define MSL_REMOVER(name)                               \
    template <class T> struct name { using type = T; }; \
    template <class T> using name##_t = typename name<T>::type;
MSL_REMOVER(remove_reference)
MSL_REMOVE(remove_reference, T &)
MSL_REMOVE(remove_reference, T &&)
MSL_REMOVER(remove_const)
MSL_REMOVE(remove_const, const T)
MSL_REMOVER(remove_volatile)
MSL_REMOVE(remove_volatile, volatile T)
MSL_REMOVER(remove_cv)
MSL_REMOVE(remove_cv, const T)
MSL_REMOVE(remove_cv, volatile T)
MSL_REMOVE(remove_cv, const volatile T)
MSL_REMOVER(remove_pointer)
MSL_REMOVE(remove_pointer, T *)
MSL_REMOVE(remove_pointer, T *const)
MSL_REMOVER(remove_extent)
template <class T, size_t N> struct remove_extent<T[N]> { using type = T; };
#undef MSL_REMOVE
#undef MSL_REMOVER
template <class T> using decay_t = remove_cv_t<remove_reference_t<T>>;
template <class T> struct decay { using type = decay_t<T>; };
template <class T> struct remove_addrspace { using type = T; }; // which types have none of here
template <class T> using remove_addrspace_t = T;
template <class T> struct add_const { using type = const T; };
template <class T> struct add_pointer { using type = remove_reference_t<T> *; };
template <class T> using add_pointer_t = typename add_pointer<T>::type;

template <class T> T &&declval() noexcept;
// A user's function template of the same name is the one that is called: its like without a trailing pack is more
// specialized, and no redefinition.
#define MSL_REST          class... Rest
#define MSL_NO_REST(name) static_assert(sizeof...(Rest) == 0, "too many arguments of " #name)

template <class T, MSL_REST> MSL_FN constexpr remove_reference_t<T> &&move(T &&x, Rest...) {
    MSL_NO_REST(move);
    return static_cast<remove_reference_t<T> &&>(x);
}

namespace msl_ {
// What an arithmetic type is: kind 0 none, 1 bool, 2 integer (an enumeration too), 3 floating point.
template <class T> struct scalar {
    static constexpr int kind = __is_enum(T) ? 2 : 0;
    static constexpr bool is_signed = false;
};
#define MSL_SCALAR(T, Kind, Signed)               \
    template <> struct scalar<T> {                \
        static constexpr int kind = Kind;         \
        static constexpr bool is_signed = Signed; \
    };
MSL_SCALAR(bool, 1, false)
MSL_SCALAR(char, 2, true)
MSL_SCALAR(signed char, 2, true)
MSL_SCALAR(short, 2, true)
MSL_SCALAR(int, 2, true)
MSL_SCALAR(long, 2, true)
MSL_SCALAR(long long, 2, true)
MSL_SCALAR(unsigned char, 2, false)
MSL_SCALAR(unsigned short, 2, false)
MSL_SCALAR(unsigned int, 2, false)
MSL_SCALAR(unsigned long, 2, false)
MSL_SCALAR(unsigned long long, 2, false)
MSL_SCALAR(float, 3, true)
MSL_SCALAR(double, 3, true)
} // namespace msl_

template <class T> constexpr bool is_arithmetic_v = msl_::scalar<remove_cv_t<T>>::kind != 0 && !__is_enum(T);
template <class T>
constexpr bool is_integral_v = (msl_::scalar<remove_cv_t<T>>::kind == 1 || msl_::scalar<remove_cv_t<T>>::kind == 2) &&
                               !__is_enum(T);
template <class T> constexpr bool is_floating_point_v = msl_::scalar<remove_cv_t<T>>::kind == 3;
template <class T> constexpr bool is_signed_v = msl_::scalar<remove_cv_t<T>>::is_signed;
template <class T> constexpr bool is_unsigned_v = is_integral_v<T> && !is_signed_v<T>;
template <class T> constexpr bool is_scalar_v = is_arithmetic_v<T> || __is_enum(T);
template <class T> constexpr bool is_enum_v = __is_enum(T);
template <class T> constexpr bool is_class_v = __is_class(T);
template <class T> constexpr bool is_union_v = __is_union(T);
template <class T> constexpr bool is_trivially_copyable_v = __is_trivially_copyable(T);
template <class A, class B> constexpr bool is_base_of_v = __is_base_of(A, B);
template <class T> constexpr bool is_void_v = is_same_v<remove_cv_t<T>, void>;
template <class T> constexpr bool is_const_v = false;
template <class T> constexpr bool is_const_v<const T> = true;
template <class T> constexpr bool is_pointer_v = false;
template <class T> constexpr bool is_pointer_v<T *> = true;
template <class T> constexpr bool is_pointer_v<T *const> = true;
template <class T> constexpr bool is_reference_v = false;
template <class T> constexpr bool is_reference_v<T &> = true;
template <class T> constexpr bool is_reference_v<T &&> = true;
template <class T> constexpr bool is_array_v = false;
template <class T, size_t N> constexpr bool is_array_v<T[N]> = true;
namespace msl_ {
template <class To> void accept(To);
template <class From, class To, class = void> struct convertible : false_type {};
template <class From, class To>
struct convertible<From, To, void_t<decltype(accept<To>(declval<From>()))>> : true_type {};
} // namespace msl_
template <class From, class To> constexpr bool is_convertible_v = msl_::convertible<From, To>::value;
template <class From, class To> using is_convertible = msl_::convertible<From, To>;

#define MSL_TRAIT(name) \
    template <class T> struct name : bool_constant<name##_v<T>> {};
MSL_TRAIT(is_arithmetic)
MSL_TRAIT(is_integral)
MSL_TRAIT(is_floating_point)
MSL_TRAIT(is_signed)
MSL_TRAIT(is_unsigned)
MSL_TRAIT(is_scalar)
MSL_TRAIT(is_enum)
MSL_TRAIT(is_class)
MSL_TRAIT(is_union)
MSL_TRAIT(is_trivially_copyable)
MSL_TRAIT(is_void)
MSL_TRAIT(is_const)
MSL_TRAIT(is_pointer)
MSL_TRAIT(is_reference)
MSL_TRAIT(is_array)
#undef MSL_TRAIT
template <class A, class B> struct is_base_of : bool_constant<is_base_of_v<A, B>> {};
template <class... B> constexpr bool conjunction_v = (B::value && ...);
template <class... B> constexpr bool disjunction_v = (B::value || ...);
template <class... B> struct _conjunction : bool_constant<conjunction_v<B...>> {};
template <class... B> struct _disjunction : bool_constant<disjunction_v<B...>> {};
template <class B> struct _negation : bool_constant<!B::value> {};
template <class... B> using conjunction = _conjunction<B...>;
template <class... B> using disjunction = _disjunction<B...>;
template <class B> using negation = _negation<B>;

namespace msl_ {
template <int Size> struct sized;
template <> struct sized<1> {
    using i = signed char;
    using u = unsigned char;
};
template <> struct sized<2> {
    using i = short;
    using u = unsigned short;
};
template <> struct sized<4> {
    using i = int;
    using u = unsigned int;
};
template <> struct sized<8> {
    using i = long;
    using u = unsigned long;
};
} // namespace msl_
template <class T> using make_unsigned_t = typename msl_::sized<sizeof(T)>::u;
template <class T> using make_signed_t = typename msl_::sized<sizeof(T)>::i;
template <class T> struct make_unsigned { using type = make_unsigned_t<T>; };
template <class T> struct make_signed { using type = make_signed_t<T>; };

// ---- as_type

namespace msl_ {
MSL_FN void copy(void *to, const void *from, size_t bytes) {
#if MSL_GPU
    ::memcpy(to, from, bytes);
#else
    __builtin_memcpy(to, from, bytes);
#endif
}
} // namespace msl_

template <class To, class From> MSL_FN constexpr To as_type(const From &x) {
    static_assert(sizeof(To) == sizeof(From), "as_type: the types differ in size");
    if constexpr (__is_trivially_copyable(To) && __is_trivially_copyable(From)) {
        return __builtin_bit_cast(To, x);
    } else { // vectors: swizzles among their members make their assignment their own
        To to;
        msl_::copy(&to, &x, sizeof to);
        return to;
    }
}

// ---- division of integers
//
// By zero, and of the smallest integer by -1, it has some value in Metal, while x86's instruction ends the process. The generated source
// therefore has
//     a / !__mtl_trap / b    for    a / b
// and the same with % and /= and %=: operands need not be told apart then, the preprocessor computes the same from it as before (where
// an unknown name is 0), and all but integers come through unchanged.
#if MSL_GPU
#define MSL_OVER   /
#define MSL_MODULO %
#else
#define MSL_OVER   / !__mtl_trap /
#define MSL_MODULO % !__mtl_trap %
#define MSL_STEP   MSL_FN __attribute__((nodebug))
namespace msl_ {
template <class T> constexpr bool is_integer = scalar<T>::kind == 1 || scalar<T>::kind == 2;
template <class A> using if_scalar = enable_if_t<(scalar<remove_cv_t<A>>::kind > 0)>;
template <class A> using if_no_scalar = enable_if_t<scalar<remove_cv_t<A>>::kind == 0>;

// Neither divisor is taken at its word: a loop's invariant, where b is one.
template <class T> MSL_STEP constexpr T divisor_for(T b) {
    using U = typename sized<sizeof(T)>::u;
    if constexpr (scalar<T>::is_signed) return U(b) + U(1) <= U(1) ? T(1) : b;
    else return b == 0 ? T(1) : b;
}
template <class A, class B> MSL_STEP constexpr auto quotient(A a, B b) {
    using T = decltype(a / b);
    if constexpr (!is_integer<A> || !is_integer<B>) return a / b;
    else if constexpr (!scalar<T>::is_signed) return T(a) / divisor_for(T(b));
    else return T(b) == T(-1) ? T(0 - typename sized<sizeof(T)>::u(a)) : T(a) / divisor_for(T(b));
}
template <class A, class B> MSL_STEP constexpr auto remainder(A a, B b) {
    using T = decltype(a % b);
    return T(a) % divisor_for(T(b));
}

// What stands before the second sign, or behind it in an assignment.
template <class A> struct dividend {
    A value;
    template <class B, class = if_scalar<B>> friend MSL_STEP constexpr auto operator/(dividend a, B b) {
        return quotient(a.value, b);
    }
    template <class B, class = if_scalar<B>> friend MSL_STEP constexpr auto operator%(dividend a, B b) {
        return remainder(a.value, b);
    }
    template <class B, class = if_no_scalar<B>, class = void>
    friend MSL_STEP constexpr auto operator/(dividend a, const B &b) {
        return a.value / b;
    }
    template <class B, class = if_no_scalar<B>, class = void>
    friend MSL_STEP constexpr auto operator%(dividend a, const B &b) {
        return a.value % b;
    }
};
template <class B> struct divisor {
    B value;
    MSL_STEP constexpr operator B() const { return value; }
    template <class A, class = enable_if_t<!__is_class(A)>> friend MSL_STEP constexpr A &operator/=(A &a, divisor b) {
        return a = A(quotient(remove_cv_t<A>(a), b.value));
    }
    template <class A, class = enable_if_t<!__is_class(A)>> friend MSL_STEP constexpr A &operator%=(A &a, divisor b) {
        return a = A(remainder(remove_cv_t<A>(a), b.value));
    }
};
template <class B> struct scalar<divisor<B>> : scalar<B> {};
struct no_trap {
    template <template <class> class Of, class A> static MSL_STEP constexpr auto mark(A a) {
        if constexpr (is_integer<A>) return Of<A>{a};
        else return a;
    }
#define MSL_MARKED(op)                                                                                     \
    template <class A, class = if_scalar<A>> friend MSL_STEP constexpr auto operator op(A a, no_trap) {    \
        return mark<dividend>(a);                                                                          \
    }                                                                                                      \
    template <class A, class = if_no_scalar<A>, class = void>                                              \
    friend MSL_STEP constexpr const A &operator op(const A &a, no_trap) {                                  \
        return a;                                                                                          \
    }                                                                                                      \
    template <class B, class = if_scalar<B>> friend MSL_STEP constexpr auto operator op##=(no_trap, B b) { \
        return mark<divisor>(b);                                                                           \
    }                                                                                                      \
    template <class B, class = if_no_scalar<B>, class = void>                                              \
    friend MSL_STEP constexpr const B &operator op##=(no_trap, const B &b) {                               \
        return b;                                                                                          \
    }
    MSL_MARKED(/)
    MSL_MARKED(%)
#undef MSL_MARKED
};
struct trap {
    friend MSL_STEP constexpr no_trap operator!(trap) { return {}; }
};
} // namespace msl_
constexpr msl_::trap __mtl_trap;
#undef MSL_STEP
#endif

// ---- half, bfloat

namespace msl_ {
MSL_FN constexpr uint bits(float x) { return __builtin_bit_cast(uint, x); }
MSL_FN constexpr float float_of(uint x) { return __builtin_bit_cast(float, x); }

// Exact; branch-free, so that loops over it vectorize. The product by 2^112 moves the exponent and normalizes subnormals.
MSL_FN constexpr float half_bits_to_float(uint h) {
    uint magnitude = bits(float_of((h & 0x7fffu) << 13) * 0x1p112f);
    magnitude |= (h & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
    return float_of(magnitude | (h & 0x8000u) << 16);
}

// To nearest, ties to even: adding 2^(e + 13) (at least 2^-1, for subnormal results) leaves the rounded mantissa in the
// low bits of the sum, and the product with 2^112 makes infinities of what is too large.
MSL_FN constexpr uint float_to_half_bits(float x) {
    uint w = bits(x);
    uint magnitude = w & 0x7fffffffu;
    float a = (float_of(magnitude) * 0x1p112f) * 0x1p-110f;
    uint exponent = magnitude & 0x7f800000u;
    exponent = exponent < 0x38800000u ? 0x38800000u : exponent;
    uint sum = bits(a + float_of(exponent + 0x07800000u));
    uint h = ((sum >> 13) & 0x7c00u) + (sum & 0xfffu);
    h = magnitude > 0x7f800000u ? 0x7e00u : h;
    return (w >> 16 & 0x8000u) | h;
}

MSL_FN constexpr uint float_to_bfloat_bits(float x) {
    uint w = bits(x);
    uint rounded = (w + 0x7fffu + (w >> 16 & 1u)) >> 16;
    return (w & 0x7fffffffu) > 0x7f800000u ? (w >> 16 | 0x40u) : rounded;
}

#if MSL_GPU
MSL_FN float half_bits_to_float_gpu(ushort h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
// By way of a register of its own, which costs no instruction: where the low byte of what cvt itself gave is stored,
// ptxas (of CUDA 13.0 and 13.2) stores the number converted to an integer instead (F2I.U8.F16).
MSL_FN ushort float_to_half_bits_gpu(float f) {
    ushort h;
    asm("{ .reg .b16 t; cvt.rn.f16.f32 t, %1; mov.b16 %0, t; }" : "=h"(h) : "f"(f));
    return h;
}
#if __CUDA_ARCH__ >= 800
MSL_FN ushort float_to_bfloat_bits_gpu(float f) {
    ushort h;
    asm("{ .reg .b16 t; cvt.rn.bf16.f32 t, %1; mov.b16 %0, t; }" : "=h"(h) : "f"(f));
    return h;
}
#else
MSL_FN ushort float_to_bfloat_bits_gpu(float f) { return ushort(float_to_bfloat_bits(f)); }
#endif
#endif
} // namespace msl_

struct half;
struct bfloat;
namespace msl_ {
MSL_SCALAR(half, 3, true)
MSL_SCALAR(bfloat, 3, true)
#undef MSL_SCALAR

// The type of a 16-bit operand H with an arithmetic operand A: H with integers, float with floats and with the other 16-bit type.
template <class H, class A, int Kind = scalar<A>::kind> struct arithmetic_with {};
template <class H, class A> struct arithmetic_with<H, A, 1> { using type = H; };
template <class H, class A> struct arithmetic_with<H, A, 2> { using type = H; };
template <class H, class A> struct arithmetic_with<H, A, 3> { using type = float; };
template <class H> struct arithmetic_with<H, H, 3> {};
template <class H, class A> using with = typename arithmetic_with<H, A>::type;
template <class A> using if_integral = enable_if_t<scalar<A>::kind == 1 || scalar<A>::kind == 2>;
template <class A> using if_not_16_bit = enable_if_t<scalar<A>::kind != 3 || sizeof(A) != 2>;

// What is read from a volatile H, and what is assigned to one. Neither is a copy constructor or assignment as C++ has them: those would
// cost H its trivial ones.
template <class H, class A> using if_volatile = enable_if_t<is_same_v<remove_const_t<A>, volatile H>>;
template <class H> struct assigned {
    H value;
    template <class A, class = decltype(H(declval<const A &>()))> MSL_FN constexpr assigned(const A &a) : value(H(a)) {}
};
} // namespace msl_

#define MSL_16_BIT_OP(H, op)                                                                                          \
    friend MSL_FN constexpr H operator op(H a, H b) { return H(float(a) op float(b)); }                               \
    template <class A> friend MSL_FN constexpr msl_::with<H, A> operator op(H a, A b) {                               \
        return msl_::with<H, A>(float(a) op float(b));                                                                \
    }                                                                                                                 \
    template <class A, class = msl_::if_not_16_bit<A>>                                                                \
    friend MSL_FN constexpr msl_::with<H, A> operator op(A a, H b) {                                                  \
        return msl_::with<H, A>(float(a) op float(b));                                                                \
    }                                                                                                                 \
    template <class A> MSL_FN constexpr H &operator op##=(const A &b) { return *this = H(float(*this) op float(b)); } \
    template <class A> MSL_FN void operator op##=(const A &b) volatile { *this = H(float(*this) op float(b)); }

// Comparisons are those of float, by conversion.
#define MSL_16_BIT_CLASS(H)                                                                            \
    ushort bits;                                                                                       \
    H() = default;                                                                                     \
    template <class A, class = enable_if_t<(msl_::scalar<A>::kind > 0) && !is_same_v<A, H>>>           \
    MSL_FN constexpr H(A x) : H(float(x)) {}                                                           \
    template <class A, class = msl_::if_volatile<H, A>, class = void> MSL_FN H(A &x) : bits(x.bits) {} \
    MSL_FN void operator=(msl_::assigned<H> x) volatile { bits = x.value.bits; }                       \
    MSL_FN operator float() const volatile { return H(*this); }                                        \
    MSL_16_BIT_OP(H, +)                                                                                \
    MSL_16_BIT_OP(H, -)                                                                                \
    MSL_16_BIT_OP(H, *)                                                                                \
    MSL_16_BIT_OP(H, /)                                                                                \
    friend MSL_FN constexpr H operator-(H a) {                                                         \
        a.bits ^= 0x8000u;                                                                             \
        return a;                                                                                      \
    }                                                                                                  \
    friend MSL_FN constexpr H operator+(H a) { return a; }                                             \
    MSL_FN constexpr H &operator++() { return *this = H(float(*this) + 1.0f); }                        \
    MSL_FN constexpr H &operator--() { return *this = H(float(*this) - 1.0f); }                        \
    MSL_FN constexpr H operator++(int) {                                                               \
        H old = *this;                                                                                 \
        ++*this;                                                                                       \
        return old;                                                                                    \
    }                                                                                                  \
    MSL_FN constexpr H operator--(int) {                                                               \
        H old = *this;                                                                                 \
        --*this;                                                                                       \
        return old;                                                                                    \
    }

#if MSL_GPU
#define MSL_16_BIT(constant, hardware) (__builtin_is_constant_evaluated() ? (constant) : (hardware))
#else
#define MSL_16_BIT(constant, hardware) (constant)
#endif

struct half {
    MSL_FN constexpr half(float x)
        : bits(ushort(MSL_16_BIT(msl_::float_to_half_bits(x), msl_::float_to_half_bits_gpu(x)))) {}
    MSL_FN constexpr operator float() const {
        return MSL_16_BIT(msl_::half_bits_to_float(bits), msl_::half_bits_to_float_gpu(bits));
    }
    MSL_16_BIT_CLASS(half)
};

struct bfloat {
    MSL_FN constexpr bfloat(float x)
        : bits(ushort(MSL_16_BIT(msl_::float_to_bfloat_bits(x), msl_::float_to_bfloat_bits_gpu(x)))) {}
    MSL_FN constexpr operator float() const { return msl_::float_of(uint(bits) << 16); }
    MSL_16_BIT_CLASS(bfloat)
};
#undef MSL_16_BIT_CLASS
#undef MSL_16_BIT_OP
#undef MSL_16_BIT

// `c ? h : 0` and `c ? h : 0.0f` are ambiguous with a class that converts both ways. The generated source wraps both arms of a
// conditional in (armed(), (...)), which gives a half a type that integers convert to and that converts to float: what C does.
// Vectors of them, and swizzles, follow in vectors.h. All else is left to the comma that C++ has, which changes nothing: an arm may
// be void or a bit-field.
namespace msl_ {
template <class H> struct arm {
    H value;
    MSL_FN constexpr arm(H h) : value(h) {}
    template <class A, class = if_integral<A>> MSL_FN constexpr arm(A a) : value(a) {}
    MSL_FN constexpr operator H() const { return value; }
    template <class F, class = enable_if_t<is_same_v<F, float>>> MSL_FN constexpr operator F() const { return value; }
    template <class A, class = enable_if_t<scalar<A>::kind == 2>, class = void>
    MSL_FN constexpr explicit operator A() const {
        return A(float(value));
    }
    template <class A> MSL_FN constexpr arm &operator=(const A &a) {
        value = H(a);
        return *this;
    }
#define MSL_ARM_OP(op)                                                                                     \
    friend MSL_FN constexpr H operator op(arm a, arm b) { return a.value op b.value; }                     \
    friend MSL_FN constexpr H operator op(arm a, H b) { return a.value op b; }                             \
    friend MSL_FN constexpr H operator op(H a, arm b) { return a op b.value; }                             \
    template <class A> friend MSL_FN constexpr with<H, A> operator op(arm a, A b) { return a.value op b; } \
    template <class A> friend MSL_FN constexpr with<H, A> operator op(A a, arm b) { return a op b.value; } \
    template <class A> MSL_FN constexpr arm &operator op##=(const A &a) {                                  \
        value = H(value op a);                                                                             \
        return *this;                                                                                      \
    }
    MSL_ARM_OP(+)
    MSL_ARM_OP(-)
    MSL_ARM_OP(*)
    MSL_ARM_OP(/)
#undef MSL_ARM_OP
    friend MSL_FN constexpr H operator-(arm a) { return -a.value; }
};
struct armed {};
// What the generated source makes of a whole conditional: (unarmed(), (c ? a : b)).
struct unarmed {};
template <class H> MSL_FN constexpr H operator,(unarmed, arm<H> x) { return x.value; }
template <class H> using if_16_bit = enable_if_t<is_same_v<H, half> || is_same_v<H, bfloat>>;
template <class H, class = if_16_bit<H>> MSL_FN constexpr arm<H> operator,(armed, H x) { return x; }
} // namespace msl_

// ---- limits

// By the name that Metal's own header gives what users specialize.
template <class T> struct _numeric_limits_impl {
    static constexpr bool is_specialized = is_integral_v<T>;
    static constexpr bool is_signed = is_signed_v<T>;
    static constexpr bool is_integer = true;
    static constexpr bool is_exact = true;
    static constexpr bool has_infinity = false;
    static constexpr bool has_quiet_NaN = false;
    static constexpr int radix = 2;
    static constexpr int digits = is_same_v<T, bool> ? 1 : int(sizeof(T)) * 8 - is_signed;
    static constexpr int digits10 = digits * 3 / 10;
    static MSL_FN constexpr T max() { return is_same_v<T, bool> ? T(1) : T(~0ul >> (64 - digits)); }
    static MSL_FN constexpr T min() { return is_signed ? T(-long(~0ul >> (64 - digits)) - 1) : T(0); }
    static MSL_FN constexpr T lowest() { return min(); }
    static MSL_FN constexpr T epsilon() { return T(0); }
    static MSL_FN constexpr T infinity() { return T(0); }
    static MSL_FN constexpr T quiet_NaN() { return T(0); }
    static MSL_FN constexpr T denorm_min() { return T(0); }
};
#define MSL_FLOAT_LIMITS(T, U, Digits, MinExponent, Min, Max, Epsilon, Inf, NaN)       \
    template <> struct _numeric_limits_impl<T> {                                       \
        static constexpr bool is_specialized = true;                                   \
        static constexpr bool is_signed = true;                                        \
        static constexpr bool is_integer = false;                                      \
        static constexpr bool is_exact = false;                                        \
        static constexpr bool has_infinity = true;                                     \
        static constexpr bool has_quiet_NaN = true;                                    \
        static constexpr int radix = 2;                                                \
        static constexpr int digits = Digits;                                          \
        static constexpr int digits10 = (Digits - 1) * 3 / 10;                         \
        static constexpr int max_digits10 = 2 + Digits * 3 / 10;                       \
        static constexpr int min_exponent = MinExponent;                               \
        static constexpr int max_exponent = 3 - MinExponent;                           \
        static MSL_FN constexpr T min() { return as_type<T>(U(Min)); }                 \
        static MSL_FN constexpr T max() { return as_type<T>(U(Max)); }                 \
        static MSL_FN constexpr T lowest() { return -max(); }                          \
        static MSL_FN constexpr T epsilon() { return as_type<T>(U(Epsilon)); }         \
        static MSL_FN constexpr T round_error() { return T(0.5f); }                    \
        static MSL_FN constexpr T infinity() { return as_type<T>(U(Inf)); }            \
        static MSL_FN constexpr T quiet_NaN() { return as_type<T>(U(NaN)); }           \
        static MSL_FN constexpr T signaling_NaN() { return as_type<T>(U((Inf) + 1)); } \
        static MSL_FN constexpr T denorm_min() { return as_type<T>(U(1)); }            \
    };
MSL_FLOAT_LIMITS(float, uint, 24, -125, 0x00800000, 0x7f7fffff, 0x34000000, 0x7f800000, 0x7fc00000)
MSL_FLOAT_LIMITS(half, ushort, 11, -13, 0x0400, 0x7bff, 0x1400, 0x7c00, 0x7e00)
MSL_FLOAT_LIMITS(bfloat, ushort, 8, -125, 0x0080, 0x7f7f, 0x3c00, 0x7f80, 0x7fc0)
#undef MSL_FLOAT_LIMITS
template <class T> struct numeric_limits : _numeric_limits_impl<T> {};
template <class T> struct numeric_limits<const T> : numeric_limits<T> {};

// ---- array, thread scopes and other names of the standard library

template <class T, size_t N> struct array {
    T data_[N];
    MSL_FN constexpr T &operator[](size_t i) { return data_[i]; }
    MSL_FN constexpr const T &operator[](size_t i) const { return data_[i]; }
    MSL_FN constexpr T *data() { return data_; }
    MSL_FN constexpr const T *data() const { return data_; }
    MSL_FN constexpr T *begin() { return data_; }
    MSL_FN constexpr T *end() { return data_ + N; }
    MSL_FN constexpr const T *begin() const { return data_; }
    MSL_FN constexpr const T *end() const { return data_ + N; }
    static MSL_FN constexpr size_t size() { return N; }
};

template <class T, T... I> struct integer_sequence {
    using value_type = T;
    static MSL_FN constexpr size_t size() { return sizeof...(I); }
};
namespace msl_ {
template <class A, class B> struct joined;
template <class T, T... I, T... J> struct joined<integer_sequence<T, I...>, integer_sequence<T, J...>> {
    using type = integer_sequence<T, I..., T(sizeof...(I)) + J...>;
};
template <class T, size_t N>
struct counted : joined<typename counted<T, N / 2>::type, typename counted<T, N - N / 2>::type> {};
template <class T> struct counted<T, 0> { using type = integer_sequence<T>; };
template <class T> struct counted<T, 1> { using type = integer_sequence<T, T(0)>; };
} // namespace msl_
template <class T, T N> using make_integer_sequence = typename msl_::counted<T, size_t(N)>::type;
template <size_t... I> using index_sequence = integer_sequence<size_t, I...>;
template <size_t N> using make_index_sequence = make_integer_sequence<size_t, N>;

template <class T, MSL_REST> MSL_FN constexpr void swap(T &a, T &b, Rest...) {
    MSL_NO_REST(swap);
    T old = a;
    a = b;
    b = old;
}

// Messages go nowhere.
enum os_log_type { OS_LOG_TYPE_DEFAULT, OS_LOG_TYPE_INFO, OS_LOG_TYPE_DEBUG, OS_LOG_TYPE_ERROR, OS_LOG_TYPE_FAULT };
struct os_log {
    MSL_FN constexpr os_log(const char *, const char *) {}
    template <class... A> MSL_FN void log_with_type(os_log_type, const char *, A...) const {}
    template <class... A> MSL_FN void log(const char *, A...) const {}
    template <class... A> MSL_FN void log_info(const char *, A...) const {}
    template <class... A> MSL_FN void log_debug(const char *, A...) const {}
    template <class... A> MSL_FN void log_error(const char *, A...) const {}
    template <class... A> MSL_FN void log_fault(const char *, A...) const {}
};
constexpr os_log os_log_default("", "");

} // namespace metal

#undef assert
#define assert(condition) ((void)0)

#define CHAR_BIT          8
#define SCHAR_MAX         127
#define SCHAR_MIN         (-128)
#define CHAR_MAX          127
#define CHAR_MIN          (-128)
#define UCHAR_MAX         255
#define SHRT_MAX          32767
#define SHRT_MIN          (-32768)
#define USHRT_MAX         65535
#define INT_MAX           2147483647
#define INT_MIN           (-2147483647 - 1)
#define UINT_MAX          4294967295u
#define LONG_MAX          9223372036854775807l
#define LONG_MIN          (-9223372036854775807l - 1)
#define ULONG_MAX         18446744073709551615ul
#define INFINITY          (::metal::numeric_limits<float>::infinity())
#define NAN               (::metal::numeric_limits<float>::quiet_NaN())
#define HUGE_VALF         INFINITY
#define HUGE_VALH         (::metal::numeric_limits<::metal::half>::infinity())
#define MAXFLOAT          0x1.fffffep127f
#define FLT_MAX           0x1.fffffep127f
#define FLT_MIN           0x1p-126f
#define FLT_EPSILON       0x1p-23f
#define FLT_DIG           6
#define FLT_MANT_DIG      24
#define FLT_RADIX         2
#define FLT_MAX_EXP       128
#define FLT_MIN_EXP       (-125)
#define FLT_MAX_10_EXP    38
#define FLT_MIN_10_EXP    (-37)
#define MAXHALF           ::metal::half(0x1.ffcp15f)
#define HALF_MAX          ::metal::half(0x1.ffcp15f)
#define HALF_MIN          ::metal::half(0x1p-14f)
#define HALF_EPSILON      ::metal::half(0x1p-10f)
#define HALF_DIG          3
#define HALF_MANT_DIG     11
#define HALF_RADIX        2
#define HALF_MAX_EXP      16
#define HALF_MIN_EXP      (-13)
#define M_E_F             2.71828182845904523536f
#define M_LOG2E_F         1.44269504088896340736f
#define M_LOG10E_F        0.434294481903251827651f
#define M_LN2_F           0.693147180559945309417f
#define M_LN10_F          2.30258509299404568402f
#define M_PI_F            3.14159265358979323846f
#define M_PI_2_F          1.57079632679489661923f
#define M_PI_4_F          0.785398163397448309616f
#define M_1_PI_F          0.318309886183790671538f
#define M_2_PI_F          0.636619772367581343076f
#define M_2_SQRTPI_F      1.12837916709551257390f
#define M_SQRT2_F         1.41421356237309504880f
#define M_SQRT1_2_F       0.707106781186547524401f
#define M_E_H             ::metal::half(M_E_F)
#define M_LOG2E_H         ::metal::half(M_LOG2E_F)
#define M_LOG10E_H        ::metal::half(M_LOG10E_F)
#define M_LN2_H           ::metal::half(M_LN2_F)
#define M_LN10_H          ::metal::half(M_LN10_F)
#define M_PI_H            ::metal::half(M_PI_F)
#define M_PI_2_H          ::metal::half(M_PI_2_F)
#define M_PI_4_H          ::metal::half(M_PI_4_F)
#define M_1_PI_H          ::metal::half(M_1_PI_F)
#define M_2_PI_H          ::metal::half(M_2_PI_F)
#define M_2_SQRTPI_H      ::metal::half(M_2_SQRTPI_F)
#define M_SQRT2_H         ::metal::half(M_SQRT2_F)
#define M_SQRT1_2_H       ::metal::half(M_SQRT1_2_F)

#undef __FLT16_MAX__ // a compiler's own are of its own type
#undef __FLT16_MIN__
#undef __FLT16_EPSILON__
#define __FLT16_MAX__     HALF_MAX
#define __FLT16_MIN__     HALF_MIN
#define __FLT16_EPSILON__ HALF_EPSILON
