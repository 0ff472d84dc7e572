// metal_atomic: device and threadgroup memory, relaxed order. Every type of 1, 2, 4 or 8 bytes; what the hardware has no
// instruction for is done by compare and exchange.
namespace metal {

enum memory_order {
    memory_order_relaxed = 0,
    memory_order_acquire = 2,
    memory_order_release = 3,
    memory_order_acq_rel = 4,
    memory_order_seq_cst = 5
};
enum class mem_flags : uint {
    mem_none = 0,
    mem_device = 1,
    mem_threadgroup = 2,
    mem_texture = 4,
    mem_threadgroup_imageblock = 8,
    mem_object_data = 16,
    mem_device_and_threadgroup = 3
};
MSL_FN constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }
MSL_FN constexpr mem_flags operator&(mem_flags a, mem_flags b) { return mem_flags(uint(a) & uint(b)); }
enum thread_scope {
    thread_scope_thread = 0,
    thread_scope_threadgroup = 1,
    thread_scope_device = 2,
    thread_scope_simdgroup = 3
};

template <class T> struct atomic { T __s; };
template <class T> using _atomic = atomic<T>; // by which Metal's own header calls it
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<bool> atomic_bool;
typedef atomic<float> atomic_float;
typedef atomic<ulong> atomic_ulong;
typedef atomic<long> atomic_long;

namespace msl_ {
template <class T> using raw_t = typename sized<sizeof(T)>::u;
template <class T> MSL_FN raw_t<T> *raw(volatile atomic<T> *p) { return (raw_t<T> *)p; }

#if MSL_GPU
template <class T> MSL_FN raw_t<T> load_raw(volatile atomic<T> *p) { return *(volatile raw_t<T> *)raw(p); }
template <class T> MSL_FN void store_raw(volatile atomic<T> *p, raw_t<T> v) { *(volatile raw_t<T> *)raw(p) = v; }
// Bytes are exchanged within their aligned word.
MSL_FN uchar compare_exchange_raw(uchar *p, uchar expected, uchar v) {
    uint *word = (uint *)((ulong)p & ~3ul);
    uint shift = uint((ulong)p & 3) * 8, old = *(volatile uint *)word;
    for (;;) {
        uchar now = uchar(old >> shift);
        if (now != expected) return now;
        uint seen = ::atomicCAS(word, old, (old & ~(255u << shift)) | uint(v) << shift);
        if (seen == old) return expected;
        old = seen;
    }
}
MSL_FN ushort compare_exchange_raw(ushort *p, ushort expected, ushort v) { return ::atomicCAS(p, expected, v); }
MSL_FN uint compare_exchange_raw(uint *p, uint expected, uint v) { return ::atomicCAS(p, expected, v); }
MSL_FN ulong compare_exchange_raw(ulong *p, ulong expected, ulong v) {
    return ::atomicCAS((unsigned long long *)p, (unsigned long long)expected, (unsigned long long)v);
}
#else
template <class T> MSL_FN raw_t<T> load_raw(volatile atomic<T> *p) { return __atomic_load_n(raw(p), __ATOMIC_RELAXED); }
template <class T> MSL_FN void store_raw(volatile atomic<T> *p, raw_t<T> v) {
    __atomic_store_n(raw(p), v, __ATOMIC_RELAXED);
}
template <class R> MSL_FN R compare_exchange_raw(R *p, R expected, R v) {
    __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
}
#endif

template <class T, class F> MSL_FN T update(volatile atomic<T> *p, F f) {
    raw_t<T> old = load_raw(p);
    for (;;) {
        raw_t<T> seen = compare_exchange_raw(raw(p), old, as_type<raw_t<T>>(T(f(as_type<T>(old)))));
        if (seen == old) return as_type<T>(old);
        old = seen;
    }
}
template <class T> struct identity { using type = T; };
// The value's type does not take part in deduction: atomic_fetch_add_explicit(&count, 1, ...) on an atomic_uint.
template <class T> using same = typename identity<T>::type;
template <class T> constexpr bool is_word = scalar<T>::kind == 2 && sizeof(T) >= 4;
#if MSL_GPU
template <class T>
using hardware_t = conditional_t<sizeof(T) == 8, conditional_t<scalar<T>::is_signed, long long, unsigned long long>,
                                 conditional_t<scalar<T>::is_signed, int, unsigned>>;
#endif
} // namespace msl_

template <class T> MSL_FN T atomic_load_explicit(const volatile atomic<T> *p, memory_order) {
    return as_type<T>(msl_::load_raw(const_cast<volatile atomic<T> *>(p)));
}
template <class T> MSL_FN void atomic_store_explicit(volatile atomic<T> *p, msl_::same<T> v, memory_order) {
    msl_::store_raw(p, as_type<msl_::raw_t<T>>(v));
}
template <class T> MSL_FN T atomic_exchange_explicit(volatile atomic<T> *p, msl_::same<T> v, memory_order) {
#if MSL_GPU
    if constexpr (sizeof(T) == 4) return as_type<T>(::atomicExch(msl_::raw(p), as_type<uint>(v)));
#else
    if constexpr (true)
        return as_type<T>(__atomic_exchange_n(msl_::raw(p), as_type<msl_::raw_t<T>>(v), __ATOMIC_RELAXED));
#endif
    else return msl_::update(p, [=](T) { return v; });
}
template <class T>
MSL_FN bool atomic_compare_exchange_weak_explicit(volatile atomic<T> *p, T *expected, msl_::same<T> v, memory_order,
                                                  memory_order) {
    auto old = as_type<msl_::raw_t<T>>(*expected);
    auto seen = msl_::compare_exchange_raw(msl_::raw(p), old, as_type<msl_::raw_t<T>>(v));
    if (seen == old) return true;
    *expected = as_type<T>(seen);
    return false;
}
template <class T>
MSL_FN bool atomic_compare_exchange_strong_explicit(volatile atomic<T> *p, T *expected, msl_::same<T> v, memory_order a,
                                                    memory_order b) {
    return atomic_compare_exchange_weak_explicit(p, expected, v, a, b);
}
#if MSL_GPU
#define MSL_ATOMIC(name, when, gpu, cpu, expression)                                                                   \
    template <class T> MSL_FN T atomic_fetch_##name##_explicit(volatile atomic<T> *p, msl_::same<T> v, memory_order) { \
        if constexpr (when) {                                                                                          \
            using H = msl_::hardware_t<T>;                                                                             \
            return T(gpu);                                                                                             \
        } else {                                                                                                       \
            return msl_::update(p, [=](T x) { return T(expression); });                                                \
        }                                                                                                              \
    }
#else
#define MSL_ATOMIC(name, when, gpu, cpu, expression)                                                                   \
    template <class T> MSL_FN T atomic_fetch_##name##_explicit(volatile atomic<T> *p, msl_::same<T> v, memory_order) { \
        if constexpr (msl_::scalar<T>::kind == 2) return T(cpu);                                                       \
        else return msl_::update(p, [=](T x) { return T(expression); });                                               \
    }
#endif
// An unsigned sum is the signed one; a float has an instruction of its own.
namespace msl_ {
#if MSL_GPU
template <class T> MSL_FN T hardware_add(volatile atomic<T> *p, T v) {
    if constexpr (is_same_v<T, float>) return ::atomicAdd((float *)p, v);
    else if constexpr (sizeof(T) == 8) return T(::atomicAdd((unsigned long long *)p, (unsigned long long)v));
    else return T(::atomicAdd((unsigned *)p, unsigned(v)));
}
#endif
} // namespace msl_
MSL_ATOMIC(add, msl_::is_word<T> || (is_same_v<T, float>), msl_::hardware_add(p, v),
           __atomic_fetch_add((T *)p, v, __ATOMIC_RELAXED), x + v)
MSL_ATOMIC(sub, msl_::is_word<T> || (is_same_v<T, float>), msl_::hardware_add(p, T(-v)),
           __atomic_fetch_sub((T *)p, v, __ATOMIC_RELAXED), x - v)
MSL_ATOMIC(min, msl_::is_word<T>, ::atomicMin((H *)p, H(v)), msl_::update(p, [=](T x) { return v < x ? v : x; }),
           msl_::min_of(x, v))
MSL_ATOMIC(max, msl_::is_word<T>, ::atomicMax((H *)p, H(v)), msl_::update(p, [=](T x) { return v > x ? v : x; }),
           msl_::max_of(x, v))
MSL_ATOMIC(and, msl_::is_word<T>, ::atomicAnd((H *)p, H(v)), __atomic_fetch_and((T *)p, v, __ATOMIC_RELAXED), x &v)
MSL_ATOMIC(or, msl_::is_word<T>, ::atomicOr((H *)p, H(v)), __atomic_fetch_or((T *)p, v, __ATOMIC_RELAXED), x | v)
MSL_ATOMIC(xor, msl_::is_word<T>, ::atomicXor((H *)p, H(v)), __atomic_fetch_xor((T *)p, v, __ATOMIC_RELAXED), x ^ v)
#undef MSL_ATOMIC
template <class T> MSL_FN void atomic_min_explicit(volatile atomic<T> *p, msl_::same<T> v, memory_order order) {
    atomic_fetch_min_explicit(p, v, order);
}
template <class T> MSL_FN void atomic_max_explicit(volatile atomic<T> *p, msl_::same<T> v, memory_order order) {
    atomic_fetch_max_explicit(p, v, order);
}
MSL_FN void atomic_thread_fence(mem_flags, memory_order = memory_order_seq_cst, thread_scope = thread_scope_device) {
#if MSL_GPU
    ::__threadfence();
#else
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

} // namespace metal
