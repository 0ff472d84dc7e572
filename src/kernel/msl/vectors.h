// Vectors of 2, 3 and 4 components as classes: components, swizzles on both sides of an assignment, every constructor,
// componentwise operators. A vector of 3 has the size and alignment of one of 4, as in Metal; packed_ ones have those of an array.
//
// All swizzles of all widths are 680 members; the generated source therefore lists those that it mentions in
// MSL_SWIZZLES_<width>(S2, S3, S4), as S2(xy, 0, 1) and the like.
#ifndef MSL_SWIZZLES_2
#define MSL_SWIZZLES_2(S2, S3, S4) S2(xy, 0, 1)
#define MSL_SWIZZLES_3(S2, S3, S4) S2(xy, 0, 1) S3(xyz, 0, 1, 2)
#define MSL_SWIZZLES_4(S2, S3, S4) S2(xy, 0, 1) S2(zw, 2, 3) S3(xyz, 0, 1, 2)
#endif

namespace metal {

template <class T, int N> struct vec;
template <class V> struct packed_vec;

namespace msl_ {
template <class... A> using if_scalars = enable_if_t<((scalar<A>::kind > 0) && ...)>;
// Another scalar, where one of both is a 16-bit float: a class, to or from which is one conversion too many on the way to a vector.
template <class T> constexpr bool is_16_bit = is_same_v<T, half> || is_same_v<T, bfloat>;
template <class T, class A>
using if_scalar_for = enable_if_t<(scalar<A>::kind > 0) && !is_same_v<T, A> && (is_16_bit<T> || is_16_bit<A>)>;

// Components I of the Width elements that this member of a union overlays, as a value of type V.
template <class V, class T, int Width, int... I> struct swizzle {
    T e[Width];
    MSL_FN constexpr operator V() const { return V(e[I]...); }
    MSL_FN void operator=(const swizzle &s) { set(s); }
    MSL_FN void operator=(const V &v) { set(v); }
    MSL_FN T &operator[](int i) {
        constexpr int at[] = {I...};
        return e[at[i]];
    }
    MSL_FN T operator[](int i) const {
        constexpr int at[] = {I...};
        return e[at[i]];
    }
    MSL_FN void set(V v) {
        int i = 0;
        ((e[I] = v[i++]), ...);
    }
    MSL_FN operator V() const volatile { return V(T(e[I])...); }
    MSL_FN void operator=(const V &v) volatile {
        int i = 0;
        ((e[I] = v[i++]), ...);
    }
#define MSL_SWIZZLE_OP(op) \
    template <class A> MSL_FN void operator op##=(const A &a) { set(V(*this) op a); }
    MSL_SWIZZLE_OP(+)
    MSL_SWIZZLE_OP(-)
    MSL_SWIZZLE_OP(*)
    MSL_SWIZZLE_OP(/)
    MSL_SWIZZLE_OP(%)
    MSL_SWIZZLE_OP(&)
    MSL_SWIZZLE_OP(|)
    MSL_SWIZZLE_OP(^)
    MSL_SWIZZLE_OP(<<)
    MSL_SWIZZLE_OP(>>)
#undef MSL_SWIZZLE_OP
    MSL_FN V operator++() { return *this += T(1), V(*this); }
    MSL_FN V operator--() { return *this -= T(1), V(*this); }
    MSL_FN V operator++(int) {
        V old = *this;
        *this += T(1);
        return old;
    }
    MSL_FN V operator--(int) {
        V old = *this;
        *this -= T(1);
        return old;
    }
};

// What a vector is made of: how many components an argument brings, and component I of all arguments, 0 behind the last.
template <class T> constexpr int parts_of = scalar<T>::kind > 0;
template <class T, int N> constexpr int parts_of<vec<T, N>> = N;
template <class V, class T, int W, int... I> constexpr int parts_of<swizzle<V, T, W, I...>> = sizeof...(I);
template <class V> constexpr int parts_of<packed_vec<V>> = V::width;
template <int N, class... P>
using if_parts = enable_if_t<(sizeof...(P) > 1) && ((parts_of<P> > 0) && ...) &&
                             ((parts_of<P> + ...) == N || (((parts_of<P> == 1) && ...) && sizeof...(P) < N))>;
template <int I> MSL_FN constexpr int component() { return 0; }
template <int I, class A, class... P> MSL_FN constexpr auto component(const A &a, const P &...p) {
    if constexpr (I >= parts_of<A>) return component<I - parts_of<A>>(p...);
    else if constexpr (scalar<A>::kind > 0) return a;
    else return a[I];
}
} // namespace msl_

#if MSL_GPU
#define MSL_VEC(T, N, alignment) alignas(alignment) vec<T, N>
#define MSL_WHOLE(alignment)     alignas(alignment)
#else
// Aligned by a base, not by a word of its own: structs are laid out as Metal lays them out, but behind a pointer no more than 8 bytes are
// counted on (-fmax-type-align, which such a word overrules), so that vectors may lie in arrays that begin anywhere: slices, and MLX's.
namespace msl_ {
template <size_t Bytes> struct alignas(Bytes) aligned {};
} // namespace msl_
#define MSL_VEC(T, N, alignment) vec<T, N> : msl_::aligned<alignment>
#define MSL_WHOLE(alignment)
#endif

#define MSL_S2(name, ...)     msl_::swizzle<vec<T, 2>, T, MSL_WIDTH, __VA_ARGS__> name;
#define MSL_S3(name, ...)     msl_::swizzle<vec<T, 3>, T, MSL_WIDTH, __VA_ARGS__> name;
#define MSL_S4(name, ...)     msl_::swizzle<vec<T, 4>, T, MSL_WIDTH, __VA_ARGS__> name;

#define MSL_BINARY(T, op, c)  T(a.c op b.c)
#define MSL_UNARY(T, op, c)   T(op a.c)
#define MSL_CONVERT(T, op, c) T(b.c)
#define MSL_EACH_2(T, F, op)  F(T, op, x), F(T, op, y)
#define MSL_EACH_3(T, F, op)  F(T, op, x), F(T, op, y), F(T, op, z)
#define MSL_EACH_4(T, F, op)  F(T, op, x), F(T, op, y), F(T, op, z), F(T, op, w)
#define MSL_ASSIGN_2          x = b.x, y = b.y
#define MSL_ASSIGN_3          x = b.x, y = b.y, z = b.z
#define MSL_ASSIGN_4          x = b.x, y = b.y, z = b.z, w = b.w
#define MSL_AT_2              (__builtin_is_constant_evaluated() ? (i == 0 ? x : y) : e[i])
#define MSL_AT_3              (__builtin_is_constant_evaluated() ? (i == 0 ? x : i == 1 ? y : z) : e[i])
#define MSL_AT_4              (__builtin_is_constant_evaluated() ? (i == 0 ? x : i == 1 ? y : i == 2 ? z : w) : e[i])

#define MSL_VEC_ARITHMETIC(EACH, op, on)                                                                        \
    friend MSL_FN constexpr vec operator op(vec a, vec b) { return vec(EACH(T, MSL_BINARY, on)); }              \
    friend MSL_FN constexpr vec operator op(vec a, T b) { return a op vec(b); }                                 \
    friend MSL_FN constexpr vec operator op(T a, vec b) { return vec(a) op b; }                                 \
    template <class A, class = msl_::if_scalar_for<T, A>> friend MSL_FN constexpr vec operator op(vec a, A b) { \
        return a op vec(b);                                                                                     \
    }                                                                                                           \
    template <class A, class = msl_::if_scalar_for<T, A>> friend MSL_FN constexpr vec operator op(A a, vec b) { \
        return vec(a) op b;                                                                                     \
    }                                                                                                           \
    template <class A> MSL_FN constexpr vec &operator op##=(const A &b) { return *this = *this op b; }          \
    template <class A> MSL_FN void operator op##=(const A &b) volatile { *this = vec(*this) op b; }
#define MSL_VEC_COMPARISON(N, EACH, op)                                                  \
    friend MSL_FN constexpr vec<bool, N> operator op(vec a, vec b) {                     \
        return vec<bool, N>(EACH(bool, MSL_BINARY, op));                                 \
    }                                                                                    \
    friend MSL_FN constexpr vec<bool, N> operator op(vec a, T b) { return a op vec(b); } \
    friend MSL_FN constexpr vec<bool, N> operator op(T a, vec b) { return vec(a) op b; } \
    template <class A, class = msl_::if_scalar_for<T, A>>                                \
    friend MSL_FN constexpr vec<bool, N> operator op(vec a, A b) {                       \
        return a op vec(b);                                                              \
    }                                                                                    \
    template <class A, class = msl_::if_scalar_for<T, A>>                                \
    friend MSL_FN constexpr vec<bool, N> operator op(A a, vec b) {                       \
        return vec(a) op b;                                                              \
    }
#define MSL_VEC_COMMON(N, EACH)                                                                              \
    using scalar_type = T;                                                                                   \
    static constexpr int width = N;                                                                          \
    vec() = default;                                                                                         \
    constexpr vec(const vec &) = default;                                                                    \
    MSL_FN constexpr vec &operator=(const vec &b) {                                                          \
        if (__builtin_is_constant_evaluated()) MSL_ASSIGN_##N;                                               \
        else whole = b.whole;                                                                                \
        return *this;                                                                                        \
    }                                                                                                        \
    template <class A, class = msl_::if_scalar_for<T, A>> MSL_FN constexpr vec(A s) : vec(T(s)) {}           \
    template <class A, class = msl_::if_volatile<vec, A>, class = void>                                      \
    MSL_FN vec(A &b) : vec(EACH(T, MSL_CONVERT, )) {}                                                        \
    MSL_FN void operator=(msl_::assigned<vec> from) volatile {                                               \
        const vec b = from.value;                                                                            \
        MSL_ASSIGN_##N;                                                                                      \
    }                                                                                                        \
    MSL_FN volatile T &operator[](int i) volatile { return e[i]; }                                           \
    MSL_FN T operator[](int i) const volatile { return e[i]; }                                               \
    template <class U, int M, class = enable_if_t<(M >= N)>>                                                 \
    MSL_FN constexpr explicit vec(vec<U, M> b) : vec(EACH(T, MSL_CONVERT, )) {}                              \
    template <class V, class U, int W, int... I>                                                             \
    MSL_FN constexpr explicit vec(const msl_::swizzle<V, U, W, I...> &b) : vec(b.operator V()) {}            \
    template <class V> MSL_FN constexpr explicit vec(const packed_vec<V> &b) : vec(b.operator V()) {}        \
    MSL_FN constexpr T &operator[](int i) { return e[i]; }                                                   \
    MSL_FN constexpr T operator[](int i) const { return MSL_AT_##N; }                                        \
    MSL_VEC_ARITHMETIC(EACH, +, +)                                                                           \
    MSL_VEC_ARITHMETIC(EACH, -, -)                                                                           \
    MSL_VEC_ARITHMETIC(EACH, *, *)                                                                           \
    MSL_VEC_ARITHMETIC(EACH, /, MSL_OVER)                                                                    \
    MSL_VEC_ARITHMETIC(EACH, %, MSL_MODULO)                                                                  \
    MSL_VEC_ARITHMETIC(EACH, &, &)                                                                           \
    MSL_VEC_ARITHMETIC(EACH, |, |)                                                                           \
    MSL_VEC_ARITHMETIC(EACH, ^, ^)                                                                           \
    MSL_VEC_ARITHMETIC(EACH, <<, <<)                                                                         \
    MSL_VEC_ARITHMETIC(EACH, >>, >>)                                                                         \
    MSL_VEC_COMPARISON(N, EACH, ==)                                                                          \
    MSL_VEC_COMPARISON(N, EACH, !=)                                                                          \
    MSL_VEC_COMPARISON(N, EACH, <)                                                                           \
    MSL_VEC_COMPARISON(N, EACH, <=)                                                                          \
    MSL_VEC_COMPARISON(N, EACH, >)                                                                           \
    MSL_VEC_COMPARISON(N, EACH, >=)                                                                          \
    MSL_VEC_COMPARISON(N, EACH, &&)                                                                          \
    MSL_VEC_COMPARISON(N, EACH, ||)                                                                          \
    friend MSL_FN constexpr vec operator-(vec a) { return vec(EACH(T, MSL_UNARY, -)); }                      \
    friend MSL_FN constexpr vec operator+(vec a) { return a; }                                               \
    friend MSL_FN constexpr vec operator~(vec a) { return vec(EACH(T, MSL_UNARY, ~)); }                      \
    friend MSL_FN constexpr vec<bool, N> operator!(vec a) { return vec<bool, N>(EACH(bool, MSL_UNARY, !)); } \
    MSL_FN constexpr vec &operator++() { return *this = *this + T(1); }                                      \
    MSL_FN constexpr vec &operator--() { return *this = *this - T(1); }                                      \
    MSL_FN constexpr vec operator++(int) {                                                                   \
        vec old = *this;                                                                                     \
        ++*this;                                                                                             \
        return old;                                                                                          \
    }                                                                                                        \
    MSL_FN constexpr vec operator--(int) {                                                                   \
        vec old = *this;                                                                                     \
        --*this;                                                                                             \
        return old;                                                                                          \
    }

template <class T> struct MSL_VEC(T, 2, sizeof(T) * 2) {
    union {
        struct {
            T x, y;
        };
        struct {
            T r, g;
        };
        T e[2];
        struct MSL_WHOLE(sizeof(T) * 2) {
            T e[2];
        } whole; // one store
#define MSL_WIDTH 2
        MSL_SWIZZLES_2(MSL_S2, MSL_S3, MSL_S4)
#undef MSL_WIDTH
    };
    MSL_FN constexpr vec(T s) : x(s), y(s) {}
    MSL_FN constexpr vec(T a, T b) : x(a), y(b) {}
    template <class... P, class = msl_::if_parts<2, P...>>
    MSL_FN constexpr vec(const P &...p) : x(T(msl_::component<0>(p...))), y(T(msl_::component<1>(p...))) {}
    MSL_VEC_COMMON(2, MSL_EACH_2)
};

template <class T> struct MSL_VEC(T, 3, sizeof(T) * 4) {
    union {
        struct {
            T x, y, z;
        };
        struct {
            T r, g, b;
        };
        T e[3];
        struct MSL_WHOLE(sizeof(T) * 4) {
            T e[3];
        } whole; // one store
#define MSL_WIDTH 3
        MSL_SWIZZLES_3(MSL_S2, MSL_S3, MSL_S4)
#undef MSL_WIDTH
    };
    MSL_FN constexpr vec(T s) : x(s), y(s), z(s) {}
    MSL_FN constexpr vec(T a, T b, T c) : x(a), y(b), z(c) {}
    template <class... P, class = msl_::if_parts<3, P...>>
    MSL_FN constexpr vec(const P &...p)
        : x(T(msl_::component<0>(p...))), y(T(msl_::component<1>(p...))), z(T(msl_::component<2>(p...))) {}
    MSL_FN constexpr vec(T a, vec<T, 2> b) : x(a), y(b.x), z(b.y) {}
    MSL_FN constexpr vec(vec<T, 2> a, T b) : x(a.x), y(a.y), z(b) {}
    MSL_VEC_COMMON(3, MSL_EACH_3)
};

template <class T> struct MSL_VEC(T, 4, sizeof(T) * 4) {
    union {
        struct {
            T x, y, z, w;
        };
        struct {
            T r, g, b, a;
        };
        T e[4];
        struct MSL_WHOLE(sizeof(T) * 4) {
            T e[4];
        } whole; // one store
#define MSL_WIDTH 4
        MSL_SWIZZLES_4(MSL_S2, MSL_S3, MSL_S4)
#undef MSL_WIDTH
    };
    MSL_FN constexpr vec(T s) : x(s), y(s), z(s), w(s) {}
    MSL_FN constexpr vec(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}
    template <class... P, class = msl_::if_parts<4, P...>>
    MSL_FN constexpr vec(const P &...p)
        : x(T(msl_::component<0>(p...))), y(T(msl_::component<1>(p...))), z(T(msl_::component<2>(p...))),
          w(T(msl_::component<3>(p...))) {}
    MSL_FN constexpr vec(T a, T b, vec<T, 2> c) : x(a), y(b), z(c.x), w(c.y) {}
    MSL_FN constexpr vec(T a, vec<T, 2> b, T c) : x(a), y(b.x), z(b.y), w(c) {}
    MSL_FN constexpr vec(T a, vec<T, 3> b) : x(a), y(b.x), z(b.y), w(b.z) {}
    MSL_FN constexpr vec(vec<T, 2> a, T b, T c) : x(a.x), y(a.y), z(b), w(c) {}
    MSL_FN constexpr vec(vec<T, 2> a, vec<T, 2> b) : x(a.x), y(a.y), z(b.x), w(b.y) {}
    MSL_FN constexpr vec(vec<T, 3> a, T b) : x(a.x), y(a.y), z(a.z), w(b) {}
    MSL_VEC_COMMON(4, MSL_EACH_4)
};
#undef MSL_VEC
#undef MSL_WHOLE
#undef MSL_VEC_COMMON
#undef MSL_VEC_ARITHMETIC
#undef MSL_VEC_COMPARISON

// By a vector of another integer type.
template <class T, class U, int N, class = enable_if_t<!is_same_v<T, U>>>
MSL_FN constexpr vec<T, N> operator<<(vec<T, N> a, vec<U, N> b) {
    return a << vec<T, N>(b);
}
template <class T, class U, int N, class = enable_if_t<!is_same_v<T, U>>>
MSL_FN constexpr vec<T, N> operator>>(vec<T, N> a, vec<U, N> b) {
    return a >> vec<T, N>(b);
}

// Components as an array has them, aligned as one component; arithmetic is that of V.
template <class V, class T, int N> struct packed_components;
template <class V, class T> struct packed_components<V, T, 2> {
    union {
        struct {
            T x, y;
        };
        struct {
            T r, g;
        };
        T e[2];
#define MSL_WIDTH 2
        MSL_SWIZZLES_2(MSL_S2, MSL_S3, MSL_S4)
#undef MSL_WIDTH
    };
    packed_components() = default;
    MSL_FN constexpr packed_components(const V &v) : x(v.x), y(v.y) {}
    MSL_FN constexpr operator V() const { return V(x, y); }
};
template <class V, class T> struct packed_components<V, T, 3> {
    union {
        struct {
            T x, y, z;
        };
        struct {
            T r, g, b;
        };
        T e[3];
#define MSL_WIDTH 3
        MSL_SWIZZLES_3(MSL_S2, MSL_S3, MSL_S4)
#undef MSL_WIDTH
    };
    packed_components() = default;
    MSL_FN constexpr packed_components(const V &v) : x(v.x), y(v.y), z(v.z) {}
    MSL_FN constexpr operator V() const { return V(x, y, z); }
};
template <class V, class T> struct packed_components<V, T, 4> {
    union {
        struct {
            T x, y, z, w;
        };
        struct {
            T r, g, b, a;
        };
        T e[4];
#define MSL_WIDTH 4
        MSL_SWIZZLES_4(MSL_S2, MSL_S3, MSL_S4)
#undef MSL_WIDTH
    };
    packed_components() = default;
    MSL_FN constexpr packed_components(const V &v) : x(v.x), y(v.y), z(v.z), w(v.w) {}
    MSL_FN constexpr operator V() const { return V(x, y, z, w); }
};
template <class V> struct packed_vec : packed_components<V, typename V::scalar_type, V::width> {
    using scalar_type = typename V::scalar_type;
    static constexpr int width = V::width;
    packed_vec() = default;
    constexpr packed_vec(const packed_vec &) = default;
    MSL_FN constexpr packed_vec(const V &v) : packed_components<V, typename V::scalar_type, V::width>(v) {}
    template <class A, class = enable_if_t<msl_::scalar<A>::kind == 0, decltype(V(declval<A>()))>>
    MSL_FN constexpr explicit packed_vec(const A &a) : packed_vec(V(a)) {}
    template <class... A, class = enable_if_t<(sizeof...(A) > 1), decltype(V(declval<A>()...))>>
    MSL_FN constexpr packed_vec(const A &...a) : packed_vec(V(a...)) {}
    template <class A, class = msl_::if_scalars<A>> MSL_FN constexpr packed_vec(A a) : packed_vec(V(a)) {}
    MSL_FN packed_vec &operator=(const packed_vec &b) {
#if MSL_GPU // where a copy of memory is one of bytes
        for (int i = 0; i < width; ++i) this->e[i] = b.e[i];
#else
        msl_::copy(this, &b, sizeof *this);
#endif
        return *this;
    }
    MSL_FN scalar_type &operator[](int i) { return this->e[i]; }
    MSL_FN scalar_type operator[](int i) const { return this->e[i]; }
#define MSL_PACKED_OP(op) \
    template <class A> MSL_FN packed_vec &operator op##=(const A &a) { return *this = packed_vec(V(*this) op a); }
    MSL_PACKED_OP(+)
    MSL_PACKED_OP(-)
    MSL_PACKED_OP(*)
    MSL_PACKED_OP(/)
    MSL_PACKED_OP(%)
    MSL_PACKED_OP(<<)
    MSL_PACKED_OP(>>)
    MSL_PACKED_OP(&)
    MSL_PACKED_OP(|)
    MSL_PACKED_OP(^)
#undef MSL_PACKED_OP
    MSL_FN packed_vec &operator++() { return *this += scalar_type(1); }
    MSL_FN packed_vec &operator--() { return *this -= scalar_type(1); }
    MSL_FN V operator++(int) {
        V old = *this;
        ++*this;
        return old;
    }
    MSL_FN V operator--(int) {
        V old = *this;
        --*this;
        return old;
    }
};
#undef MSL_S2
#undef MSL_S3
#undef MSL_S4

#define MSL_VEC_NAMES(T)                         \
    typedef vec<T, 2> T##2;                      \
    typedef vec<T, 3> T##3;                      \
    typedef vec<T, 4> T##4;                      \
    typedef packed_vec<vec<T, 2>> packed_##T##2; \
    typedef packed_vec<vec<T, 3>> packed_##T##3; \
    typedef packed_vec<vec<T, 4>> packed_##T##4;
MSL_VEC_NAMES(bool)
MSL_VEC_NAMES(char)
MSL_VEC_NAMES(uchar)
MSL_VEC_NAMES(short)
MSL_VEC_NAMES(ushort)
MSL_VEC_NAMES(int)
MSL_VEC_NAMES(uint)
MSL_VEC_NAMES(long)
MSL_VEC_NAMES(ulong)
MSL_VEC_NAMES(half)
MSL_VEC_NAMES(bfloat)
MSL_VEC_NAMES(float)
#undef MSL_VEC_NAMES

template <class T> constexpr bool is_vector_v = false;
template <class T, int N> constexpr bool is_vector_v<vec<T, N>> = true;
template <class T> struct is_vector : bool_constant<is_vector_v<T>> {};
template <class T> struct make_scalar { using type = T; };
template <class T, int N> struct make_scalar<vec<T, N>> { using type = T; };
template <class T> using make_scalar_t = typename make_scalar<T>::type;
template <class T> struct vec_elements : integral_constant<ushort, 1> {};
template <class T, int N> struct vec_elements<vec<T, N>> : integral_constant<ushort, N> {};

namespace msl_ {
// An arm of ?: that a scalar may stand beside.
template <class V> struct vector_arm : V {
    using T = typename V::scalar_type;
    MSL_FN constexpr vector_arm(const V &v) : V(v) {}
    template <class A, class = if_scalars<A>> MSL_FN constexpr vector_arm(A a) : V(T(a)) {}
    MSL_FN constexpr vector_arm(arm<T> a) : V(T(a)) {}
};
template <class H, int N, class = if_16_bit<H>> MSL_FN constexpr vector_arm<vec<H, N>> operator,(armed, vec<H, N> v) {
    return v;
}
template <class V, class T, int W, int... I> MSL_FN constexpr auto operator,(armed, swizzle<V, T, W, I...> s) {
    return (armed(), V(s));
}

template <class V> MSL_FN constexpr auto operator,(armed, const packed_vec<V> &p) { return (armed(), V(p)); }
template <class V> MSL_FN constexpr V operator,(unarmed, const vector_arm<V> &v) { return v; }

// What the generated source makes of a swizzle that is read: (valued(), v.xy).
struct valued {};
template <class V, class T, int W, int... I> MSL_FN constexpr V operator,(valued, const swizzle<V, T, W, I...> &s) {
    return s;
}
template <class V, class T, int W, int... I> MSL_FN V operator,(valued, const volatile swizzle<V, T, W, I...> &s) {
    return s;
}

// What a function's argument counts as: a scalar, or the vector that a swizzle or a packed vector stands for.
template <class T, class = void> struct number {};
template <class T> struct number<T, enable_if_t<(scalar<T>::kind > 0) && !__is_enum(T)>> { using type = T; };
template <class T> struct number<T, enable_if_t<__is_enum(T)>> { using type = decltype(+T()); };
template <class H> struct number<arm<H>> { using type = H; };
template <class V> struct number<vector_arm<V>> { using type = V; };
template <class T, int N> struct number<vec<T, N>> { using type = vec<T, N>; };
template <class V, class T, int W, int... I> struct number<swizzle<V, T, W, I...>> { using type = V; };
template <class V> struct number<packed_vec<V>> { using type = V; };
template <class T> using number_t = typename number<T>::type;

// The same for functions of floating point: integers count as float.
template <class N> struct floating {
    using type = conditional_t<scalar<N>::kind == 3, conditional_t<is_same_v<N, double>, float, N>, float>;
};
template <class T, int N> struct floating<vec<T, N>> { using type = vec<T, N>; };
template <class T> using float_t = typename floating<number_t<T>>::type;

// The common type of several arguments: a vector beside scalars; among scalars the float there is, or C's rule.
template <class A, class B, bool Scalars> struct common2 { using type = decltype(A() + B()); };
template <class A> struct common2<A, A, true> { using type = A; };
template <class A, class B> struct common2<A, B, false> {};
template <class T, int N, class U, int M> struct common2<vec<T, N>, vec<U, M>, false> {};
template <class T, int N> struct common2<vec<T, N>, vec<T, N>, false> { using type = vec<T, N>; };
template <class T, int N, class B> struct common2<vec<T, N>, B, false> { using type = vec<T, N>; };
template <class T, int N, class B> struct common2<B, vec<T, N>, false> { using type = vec<T, N>; };
template <class A, class B>
using common2_t = typename common2<A, B, (scalar<A>::kind > 0) && (scalar<B>::kind > 0)>::type;
template <class A, class B> using common_t = common2_t<number_t<A>, number_t<B>>;
template <class A, class B, class C> using common3_t = common2_t<common_t<A, B>, number_t<C>>;
template <class A, class B> using common_float_t = float_t<common_t<A, B>>;
template <class A, class B, class C> using common3_float_t = float_t<common3_t<A, B, C>>;
template <class T> using vector_t = enable_if_t<is_vector_v<number_t<T>>, number_t<T>>;

// f on each component.
template <class R, class F, class T> MSL_FN constexpr R each(F f, T a) { return f(a); }
template <class R, class F, class T, class U> MSL_FN constexpr R each(F f, T a, U b) { return f(a, b); }
template <class R, class F, class T, class U, class V> MSL_FN constexpr R each(F f, T a, U b, V c) {
    return f(a, b, c);
}
template <class R, class F, class T> MSL_FN constexpr R each(F f, vec<T, 2> a) { return R(f(a.x), f(a.y)); }
template <class R, class F, class T, class U> MSL_FN constexpr R each(F f, vec<T, 2> a, vec<U, 2> b) {
    return R(f(a.x, b.x), f(a.y, b.y));
}
template <class R, class F, class T, class U, class V>
MSL_FN constexpr R each(F f, vec<T, 2> a, vec<U, 2> b, vec<V, 2> c) {
    return R(f(a.x, b.x, c.x), f(a.y, b.y, c.y));
}
template <class R, class F, class T> MSL_FN constexpr R each(F f, vec<T, 3> a) { return R(f(a.x), f(a.y), f(a.z)); }
template <class R, class F, class T, class U> MSL_FN constexpr R each(F f, vec<T, 3> a, vec<U, 3> b) {
    return R(f(a.x, b.x), f(a.y, b.y), f(a.z, b.z));
}
template <class R, class F, class T, class U, class V>
MSL_FN constexpr R each(F f, vec<T, 3> a, vec<U, 3> b, vec<V, 3> c) {
    return R(f(a.x, b.x, c.x), f(a.y, b.y, c.y), f(a.z, b.z, c.z));
}
template <class R, class F, class T> MSL_FN constexpr R each(F f, vec<T, 4> a) {
    return R(f(a.x), f(a.y), f(a.z), f(a.w));
}
template <class R, class F, class T, class U> MSL_FN constexpr R each(F f, vec<T, 4> a, vec<U, 4> b) {
    return R(f(a.x, b.x), f(a.y, b.y), f(a.z, b.z), f(a.w, b.w));
}
template <class R, class F, class T, class U, class V>
MSL_FN constexpr R each(F f, vec<T, 4> a, vec<U, 4> b, vec<V, 4> c) {
    return R(f(a.x, b.x, c.x), f(a.y, b.y, c.y), f(a.z, b.z, c.z), f(a.w, b.w, c.w));
}
template <class V, class T> struct rebind { using type = T; };
template <class S, int N, class T> struct rebind<vec<S, N>, T> { using type = vec<T, N>; };
// V's shape with components of type T.
template <class V, class T> using rebind_t = typename rebind<V, T>::type;
template <class T> using component_t = make_scalar_t<number_t<T>>;
} // namespace msl_

} // namespace metal
