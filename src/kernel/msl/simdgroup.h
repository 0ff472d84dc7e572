// metal_simdgroup, barriers. Only the active lanes of a simdgroup take part: those that stand at the same call. What Metal
// leaves undefined (a shuffle from a lane that is not there) gives the own value.
namespace metal {

struct simd_vote {
    typedef ulong vote_t;
    vote_t lanes;
    simd_vote() = default;
    MSL_FN constexpr explicit simd_vote(vote_t v) : lanes(v) {}
    MSL_FN constexpr explicit operator vote_t() const { return lanes; }
    MSL_FN constexpr bool all() const { return (lanes & 0xfffffffful) == 0xfffffffful; }
    MSL_FN constexpr bool any() const { return lanes != 0; }
    friend MSL_FN constexpr bool operator==(simd_vote a, simd_vote b) { return a.lanes == b.lanes; }
    friend MSL_FN constexpr simd_vote operator&(simd_vote a, simd_vote b) { return simd_vote(a.lanes & b.lanes); }
    friend MSL_FN constexpr simd_vote operator|(simd_vote a, simd_vote b) { return simd_vote(a.lanes | b.lanes); }
    friend MSL_FN constexpr simd_vote operator^(simd_vote a, simd_vote b) { return simd_vote(a.lanes ^ b.lanes); }
    friend MSL_FN constexpr simd_vote operator~(simd_vote a) { return simd_vote(~a.lanes & 0xfffffffful); }
};
struct quad_vote : simd_vote {
    using simd_vote::simd_vote;
    MSL_FN constexpr bool all() const { return (lanes & 15ul) == 15ul; }
};

namespace msl_ {
// What lanes hand over: the bytes of a value, in words of 32 bits on the GPU.
template <class T> struct bytes {
    static constexpr int words = (sizeof(T) + 3) / 4;
    uint w[words];
};
template <class T> MSL_FN bytes<T> to_bytes(const T &x) {
    bytes<T> b;
    if constexpr (sizeof(T) % 4 != 0) b.w[bytes<T>::words - 1] = 0;
    copy(b.w, &x, sizeof(T));
    return b;
}
template <class T> MSL_FN T from_bytes(const bytes<T> &b) {
    T x;
    copy(&x, b.w, sizeof(T));
    return x;
}

// On scalars in float where they are 16 bits, rounded at the end of a reduction as Metal rounds; componentwise on vectors.
struct sum_f {
    template <class T> MSL_FN constexpr T operator()(T a, T b) const { return T(a + b); }
};
struct product_f {
    template <class T> MSL_FN constexpr T operator()(T a, T b) const { return T(a * b); }
};
struct min_of_f {
    template <class T> MSL_FN constexpr T operator()(T a, T b) const { return T(metal::min(a, b)); }
};
struct max_of_f {
    template <class T> MSL_FN constexpr T operator()(T a, T b) const { return T(metal::max(a, b)); }
};
struct and_f {
    template <class T> MSL_FN constexpr T operator()(T a, T b) const { return T(a & b); }
};
struct or_f {
    template <class T> MSL_FN constexpr T operator()(T a, T b) const { return T(a | b); }
};
struct xor_f {
    template <class T> MSL_FN constexpr T operator()(T a, T b) const { return T(a ^ b); }
};
// The type in which lanes are combined: float for 16-bit floats.
template <class T> struct combined { using type = conditional_t<scalar<T>::kind == 3, float, T>; };
template <class T, int N> struct combined<vec<T, N>> { using type = vec<typename combined<T>::type, N>; };
template <class T> using combined_t = typename combined<T>::type;

#if MSL_GPU

MSL_FN uint lane() {
    uint l;
    asm("mov.u32 %0, %%laneid;" : "=r"(l));
    return l;
}
MSL_FN uint active() { return ::__activemask(); }
template <class T, class F> MSL_FN T exchange(const T &x, F word) {
    bytes<T> b = to_bytes(x);
    for (int i = 0; i < bytes<T>::words; ++i) b.w[i] = word(b.w[i]);
    return from_bytes(b);
}
// From lane `from`, the own value where that lane takes no part.
template <class T> MSL_FN T from_lane(const T &x, uint from) {
    uint mask = active();
    T y = exchange(x, [=](uint w) { return ::__shfl_sync(mask, w, int(from & 31)); });
    return from < 32 && mask >> from & 1 ? y : x;
}
template <class T> MSL_FN T from_xor(const T &x, uint flip) { return from_lane(x, lane() ^ flip); }
template <int Width, class T, class F> MSL_FN T reduce(const T &x, F f) {
    using C = combined_t<T>;
    uint mask = active(), base = Width == 32 ? 0 : lane() & ~3u;
    uint group = Width == 32 ? 0xffffffffu : 15u << base;
    C c(x);
    if ((mask & group) == group) {
        for (int step = Width / 2; step > 0; step /= 2)
            c = f(c, exchange(c, [=](uint w) { return ::__shfl_xor_sync(mask, w, step); }));
        return T(c);
    }
    // Part of the lanes: every one goes over all that are there.
    bool first = true;
    C sum = c;
    uint rest = mask; // of which the own lane is one: never 0
    do {
        int from = __ffs(int(rest)) - 1;
        C y = exchange(c, [=](uint w) { return ::__shfl_sync(mask, w, from); });
        if (Width == 32 || (uint(from) & ~3u) == base) {
            sum = first ? y : f(sum, y);
            first = false;
        }
        rest &= rest - 1;
    } while (rest != 0);
    return T(sum);
}
template <bool Inclusive, class T, class F> MSL_FN T prefix(const T &x, F f, T identity) {
    using C = combined_t<T>;
    uint mask = active(), me = lane();
    C c(x);
    if (mask == 0xffffffffu) {
        for (int step = 1; step < 32; step *= 2) {
            C y = exchange(c, [=](uint w) { return ::__shfl_up_sync(mask, w, step); });
            c = me >= uint(step) ? f(y, c) : c;
        }
        if (Inclusive) return T(c);
        C y = exchange(c, [=](uint w) { return ::__shfl_up_sync(mask, w, 1); });
        return me == 0 ? identity : T(y);
    }
    C sum(identity);
    bool first = true;
    uint rest = mask; // of which the own lane is one: never 0
    do {
        int from = __ffs(int(rest)) - 1;
        C y = exchange(c, [=](uint w) { return ::__shfl_sync(mask, w, from); });
        if (uint(from) < me || (Inclusive && uint(from) == me)) {
            sum = first ? y : f(sum, y);
            first = false;
        }
        rest &= rest - 1;
    } while (rest != 0);
    return T(sum);
}
MSL_FN uint ballot(bool b) { return ::__ballot_sync(active(), b); }

#else

MSL_FN uint lane() { return __mtl_lane(); }
MSL_FN uint active() {
    return __mtl_collective_uniform<uint>('\0', [](const char(&)[32], uint mask) { return mask; });
}
template <class T> struct from {
    bytes<T> value;
    uint lane;
};
template <class T> MSL_FN T from_lane(const T &x, uint source) {
    using B = bytes<T>;
    return from_bytes<T>(
        __mtl_collective<B>(from<T>{to_bytes(x), source}, [](const from<T>(&in)[32], B(&out)[32], uint mask) {
            for (uint i = 0; i < 32; ++i) {
                if (!(mask >> i & 1)) continue;
                uint s = in[i].lane;
                out[i] = in[s < 32 && mask >> s & 1 ? s : i].value;
            }
        }));
}
// What all lanes of `mask` give together.
template <class T, class F> MSL_FN bytes<T> reduce_all(const bytes<T> (&in)[32], uint mask) {
    using C = combined_t<T>;
    if (mask == 0xffffffffu) { // a tree, level by level in vectors
        C c[32];
        for (uint i = 0; i < 32; ++i) c[i] = C(from_bytes<T>(in[i]));
        for (uint step = 16; step > 0; step /= 2)
            for (uint i = 0; i < step; ++i) c[i] = F()(c[i], c[i + step]);
        return to_bytes(T(c[0]));
    }
    uint first = uint(__builtin_ctz(mask));
    C sum(from_bytes<T>(in[first]));
    for (uint rest = mask & (mask - 1); rest; rest &= rest - 1)
        sum = F()(sum, C(from_bytes<T>(in[__builtin_ctz(rest)])));
    return to_bytes(T(sum));
}
// The same for each `Width` lanes.
template <int Width, class T, class F>
MSL_FN void reduce_parts(const bytes<T> (&in)[32], bytes<T> (&out)[32], uint mask) {
    using C = combined_t<T>;
    for (uint base = 0; base < 32; base += Width) {
        bool first = true;
        C sum;
        for (uint i = base; i < base + Width; ++i) {
            if (!(mask >> i & 1)) continue;
            C c(from_bytes<T>(in[i]));
            sum = first ? c : F()(sum, c);
            first = false;
        }
        if (first) continue;
        bytes<T> result = to_bytes(T(sum));
        for (uint i = base; i < base + Width; ++i) out[i] = result;
    }
}
template <class T> struct prefix_argument { bytes<T> value, identity; };
template <bool Inclusive, class T, class F>
MSL_FN void prefix_all(const prefix_argument<T> (&in)[32], bytes<T> (&out)[32], uint mask) {
    using C = combined_t<T>;
    bool first = true;
    C sum;
    for (uint i = 0; i < 32; ++i) {
        if (!(mask >> i & 1)) continue;
        C c(from_bytes<T>(in[i].value));
        if (!Inclusive) out[i] = first ? in[i].identity : to_bytes(T(sum));
        sum = first ? c : F()(sum, c);
        first = false;
        if (Inclusive) out[i] = to_bytes(T(sum));
    }
}
MSL_FN uint votes_of(const bool (&in)[32], uint mask) {
    uint votes = 0;
    for (uint i = 0; i < 32; ++i) votes |= uint(mask >> i & 1 && in[i]) << i;
    return votes;
}
template <class T> MSL_FN T from_xor(const T &x, uint flip) { return from_lane(x, lane() ^ flip); }
template <int Width, class T, class F> MSL_FN T reduce(const T &x, F) {
    using B = bytes<T>;
    if constexpr (Width == 32 && sizeof(B) <= 64) {
        return from_bytes<T>(__mtl_collective_uniform<B>(
            to_bytes(x), [](const B(&in)[32], uint mask) { return reduce_all<T, F>(in, mask); }));
    }
    return from_bytes<T>(__mtl_collective<B>(
        to_bytes(x), [](const B(&in)[32], B(&out)[32], uint mask) { reduce_parts<Width, T, F>(in, out, mask); }));
}
template <bool Inclusive, class T, class F> MSL_FN T prefix(const T &x, F, T identity) {
    using B = bytes<T>;
    using P = prefix_argument<T>;
    return from_bytes<T>(
        __mtl_collective<B>(P{to_bytes(x), to_bytes(identity)}, [](const P(&in)[32], B(&out)[32], uint mask) {
            prefix_all<Inclusive, T, F>(in, out, mask);
        }));
}
MSL_FN uint ballot(bool b) {
    return __mtl_collective_uniform<uint>(b, [](const bool(&in)[32], uint mask) { return votes_of(in, mask); });
}

#endif

MSL_FN uint first_lane(uint mask) {
    uint i = 0;
#if MSL_GPU
    i = uint(__ffs(int(mask)) - 1);
#else
    i = uint(__builtin_ctz(mask));
#endif
    return i;
}
// A type that lanes can hand to each other: a number, or any other class (complex64_t, a user's struct).
template <class T, class = void> struct handed { using type = T; };
template <class T> struct handed<T, msl_::void_t<number_t<T>>> { using type = number_t<T>; };
template <class T> using handed_t = typename handed<T>::type;
} // namespace msl_

template <class T> struct __is_valid_simdgroup_type : bool_constant<msl_::scalar<T>::kind != 0 || is_vector_v<T>> {};
#if MSL_UNIFORM
template <class T> using uniform = T;
template <class T> MSL_FN constexpr T make_uniform(T x) { return x; }
#endif

// ---- the lanes there are

MSL_FN simd_vote simd_active_threads_mask() { return simd_vote(msl_::active()); }
MSL_FN bool simd_is_first() { return msl_::lane() == msl_::first_lane(msl_::active()); }
MSL_FN bool simd_is_helper_thread() { return false; }
MSL_FN simd_vote simd_ballot(bool b) { return simd_vote(msl_::ballot(b)); }
MSL_FN bool simd_any(bool b) { return msl_::ballot(b) != 0; }
MSL_FN bool simd_all(bool b) { return msl_::ballot(!b) == 0; }

// ---- shuffles

template <class A, class T = msl_::handed_t<A>, MSL_REST> MSL_FN T simd_shuffle(A x, ushort lane, Rest...) {
    MSL_NO_REST(simd_shuffle);
    return msl_::from_lane(T(x), lane);
}
template <class A, class T = msl_::handed_t<A>, MSL_REST> MSL_FN T simd_broadcast(A x, ushort lane, Rest...) {
    MSL_NO_REST(simd_broadcast);
    return msl_::from_lane(T(x), lane);
}
template <class A, class T = msl_::handed_t<A>, MSL_REST> MSL_FN T simd_broadcast_first(A x, Rest...) {
    MSL_NO_REST(simd_broadcast_first);
    return msl_::from_lane(T(x), msl_::first_lane(msl_::active()));
}
template <class A, class T = msl_::handed_t<A>, MSL_REST> MSL_FN T simd_shuffle_xor(A x, ushort mask, Rest...) {
    MSL_NO_REST(simd_shuffle_xor);
    return msl_::from_xor(T(x), mask);
}
template <class A, class T = msl_::handed_t<A>, MSL_REST> MSL_FN T simd_shuffle_up(A x, ushort delta, Rest...) {
    MSL_NO_REST(simd_shuffle_up);
    return msl_::from_lane(T(x), msl_::lane() - delta);
}
template <class A, class T = msl_::handed_t<A>, MSL_REST> MSL_FN T simd_shuffle_down(A x, ushort delta, Rest...) {
    MSL_NO_REST(simd_shuffle_down);
    return msl_::from_lane(T(x), msl_::lane() + delta);
}
template <class A, class T = msl_::handed_t<A>, MSL_REST> MSL_FN T simd_shuffle_rotate_up(A x, ushort delta, Rest...) {
    MSL_NO_REST(simd_shuffle_rotate_up);
    return msl_::from_lane(T(x), (msl_::lane() - delta) & 31u);
}
template <class A, class T = msl_::handed_t<A>, MSL_REST>
MSL_FN T simd_shuffle_rotate_down(A x, ushort delta, Rest...) {
    MSL_NO_REST(simd_shuffle_rotate_down);
    return msl_::from_lane(T(x), (msl_::lane() + delta) & 31u);
}
// Within each `modulo` lanes, what is shifted out of `filling` at one end is shifted in at the other.
template <class A, class T = msl_::handed_t<A>>
MSL_FN T simd_shuffle_and_fill_up(A x, msl_::same<A> filling, ushort delta, ushort modulo = 32) {
    uint lane = msl_::lane(), in = lane % modulo, base = lane - in;
    T shifted = msl_::from_lane(T(x), lane - delta);
    T filled = msl_::from_lane(T(filling), base + (in + modulo - delta) % modulo);
    return in >= delta ? shifted : filled;
}
template <class A, class T = msl_::handed_t<A>>
MSL_FN T simd_shuffle_and_fill_down(A x, msl_::same<A> filling, ushort delta, ushort modulo = 32) {
    uint lane = msl_::lane(), in = lane % modulo, base = lane - in;
    T shifted = msl_::from_lane(T(x), lane + delta);
    T filled = msl_::from_lane(T(filling), base + (in + delta) % modulo);
    return in + delta < modulo ? shifted : filled;
}

// ---- reductions

#define MSL_EACH_REDUCTION(one)                                                                                 \
    one(sum, sum_f) one(product, product_f) one(min, min_of_f) one(max, max_of_f) one(and, and_f) one(or, or_f) \
        one(xor, xor_f)
#define MSL_REDUCTION(name, operation)                                                             \
    template <class A, class T = msl_::number_t<A>, MSL_REST> MSL_FN T simd_##name(A x, Rest...) { \
        MSL_NO_REST(simd_##name);                                                                  \
        return msl_::reduce<32>(T(x), msl_::operation());                                          \
    }                                                                                              \
    template <class A, class T = msl_::number_t<A>, MSL_REST> MSL_FN T quad_##name(A x, Rest...) { \
        MSL_NO_REST(quad_##name);                                                                  \
        return msl_::reduce<4>(T(x), msl_::operation());                                           \
    }
MSL_EACH_REDUCTION(MSL_REDUCTION)
#undef MSL_REDUCTION
template <class A, class T = msl_::number_t<A>, MSL_REST> MSL_FN T simd_prefix_inclusive_sum(A x, Rest...) {
    MSL_NO_REST(simd_prefix_inclusive_sum);
    return msl_::prefix<true>(T(x), msl_::sum_f(), T(make_scalar_t<T>(0)));
}
template <class A, class T = msl_::number_t<A>, MSL_REST> MSL_FN T simd_prefix_exclusive_sum(A x, Rest...) {
    MSL_NO_REST(simd_prefix_exclusive_sum);
    return msl_::prefix<false>(T(x), msl_::sum_f(), T(make_scalar_t<T>(0)));
}
template <class A, class T = msl_::number_t<A>, MSL_REST> MSL_FN T simd_prefix_inclusive_product(A x, Rest...) {
    MSL_NO_REST(simd_prefix_inclusive_product);
    return msl_::prefix<true>(T(x), msl_::product_f(), T(make_scalar_t<T>(1)));
}
template <class A, class T = msl_::number_t<A>, MSL_REST> MSL_FN T simd_prefix_exclusive_product(A x, Rest...) {
    MSL_NO_REST(simd_prefix_exclusive_product);
    return msl_::prefix<false>(T(x), msl_::product_f(), T(make_scalar_t<T>(1)));
}

// ---- quads: lanes 4 q to 4 q + 3

MSL_FN quad_vote quad_active_threads_mask() { return quad_vote(msl_::active() >> (msl_::lane() & ~3u) & 15u); }
MSL_FN bool quad_is_first() {
    return (msl_::lane() & 3u) == msl_::first_lane(msl_::active() >> (msl_::lane() & ~3u) & 15u);
}
MSL_FN bool quad_is_helper_thread() { return false; }
MSL_FN quad_vote quad_ballot(bool b) { return quad_vote(msl_::ballot(b) >> (msl_::lane() & ~3u) & 15u); }
MSL_FN bool quad_any(bool b) { return quad_ballot(b).lanes != 0; }
MSL_FN bool quad_all(bool b) { return quad_ballot(!b).lanes == 0; }
template <class A, class T = msl_::handed_t<A>, MSL_REST> MSL_FN T quad_shuffle(A x, ushort lane, Rest...) {
    MSL_NO_REST(quad_shuffle);
    return msl_::from_lane(T(x), (msl_::lane() & ~3u) + (lane & 3u));
}
template <class A, class T = msl_::handed_t<A>, MSL_REST> MSL_FN T quad_broadcast(A x, ushort lane, Rest...) {
    MSL_NO_REST(quad_broadcast);
    return quad_shuffle(x, lane);
}
template <class A, class T = msl_::handed_t<A>, MSL_REST> MSL_FN T quad_broadcast_first(A x, Rest...) {
    MSL_NO_REST(quad_broadcast_first);
    uint base = msl_::lane() & ~3u;
    return msl_::from_lane(T(x), base + msl_::first_lane(msl_::active() >> base & 15u));
}
template <class A, class T = msl_::handed_t<A>, MSL_REST> MSL_FN T quad_shuffle_xor(A x, ushort mask, Rest...) {
    MSL_NO_REST(quad_shuffle_xor);
    return msl_::from_xor(T(x), mask & 3u);
}
template <class A, class T = msl_::handed_t<A>, MSL_REST> MSL_FN T quad_shuffle_up(A x, ushort delta, Rest...) {
    MSL_NO_REST(quad_shuffle_up);
    uint lane = msl_::lane();
    return msl_::from_lane(T(x), (lane & 3u) >= delta ? lane - delta : lane);
}
template <class A, class T = msl_::handed_t<A>, MSL_REST> MSL_FN T quad_shuffle_down(A x, ushort delta, Rest...) {
    MSL_NO_REST(quad_shuffle_down);
    uint lane = msl_::lane();
    return msl_::from_lane(T(x), (lane & 3u) + delta < 4u ? lane + delta : lane);
}
template <class A, class T = msl_::handed_t<A>, MSL_REST> MSL_FN T quad_shuffle_rotate_up(A x, ushort delta, Rest...) {
    MSL_NO_REST(quad_shuffle_rotate_up);
    uint lane = msl_::lane();
    return msl_::from_lane(T(x), (lane & ~3u) + ((lane - delta) & 3u));
}
template <class A, class T = msl_::handed_t<A>, MSL_REST>
MSL_FN T quad_shuffle_rotate_down(A x, ushort delta, Rest...) {
    MSL_NO_REST(quad_shuffle_rotate_down);
    uint lane = msl_::lane();
    return msl_::from_lane(T(x), (lane & ~3u) + ((lane + delta) & 3u));
}
template <class A, class T = msl_::handed_t<A>>
MSL_FN T quad_shuffle_and_fill_up(A x, msl_::same<A> filling, ushort delta, ushort modulo = 4) {
    return simd_shuffle_and_fill_up(x, filling, delta, modulo);
}
template <class A, class T = msl_::handed_t<A>>
MSL_FN T quad_shuffle_and_fill_down(A x, msl_::same<A> filling, ushort delta, ushort modulo = 4) {
    return simd_shuffle_and_fill_down(x, filling, delta, modulo);
}
template <class A, class T = msl_::number_t<A>, MSL_REST> MSL_FN T quad_prefix_inclusive_sum(A x, Rest...) {
    MSL_NO_REST(quad_prefix_inclusive_sum);
    T sum(x);
    for (ushort step = 1; step < 4; step *= 2) {
        T y = quad_shuffle_up(sum, step);
        if ((msl_::lane() & 3u) >= step) sum = T(sum + y);
    }
    return sum;
}
template <class A, class T = msl_::number_t<A>, MSL_REST> MSL_FN T quad_prefix_exclusive_sum(A x, Rest...) {
    MSL_NO_REST(quad_prefix_exclusive_sum);
    T y = quad_shuffle_up(quad_prefix_inclusive_sum(x), 1);
    return (msl_::lane() & 3u) == 0 ? T(make_scalar_t<T>(0)) : y;
}
template <class A, class T = msl_::number_t<A>, MSL_REST> MSL_FN T quad_prefix_inclusive_product(A x, Rest...) {
    MSL_NO_REST(quad_prefix_inclusive_product);
    T product(x);
    for (ushort step = 1; step < 4; step *= 2) {
        T y = quad_shuffle_up(product, step);
        if ((msl_::lane() & 3u) >= step) product = T(product * y);
    }
    return product;
}
template <class A, class T = msl_::number_t<A>, MSL_REST> MSL_FN T quad_prefix_exclusive_product(A x, Rest...) {
    MSL_NO_REST(quad_prefix_exclusive_product);
    T y = quad_shuffle_up(quad_prefix_inclusive_product(x), 1);
    return (msl_::lane() & 3u) == 0 ? T(make_scalar_t<T>(1)) : y;
}

// ---- barriers

MSL_FN void threadgroup_barrier(mem_flags, thread_scope = thread_scope_threadgroup) {
#if MSL_GPU
    ::__syncthreads();
#else
    __mtl_threadgroup_barrier();
#endif
}
MSL_FN void simdgroup_barrier(mem_flags, thread_scope = thread_scope_simdgroup) {
#if MSL_GPU
    ::__syncwarp(msl_::active());
#else
    __mtl_simdgroup_barrier();
#endif
}

} // namespace metal
