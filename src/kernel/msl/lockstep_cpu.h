// The lanes of a simdgroup in lockstep on the CPU, as src/kernel/lockstep.c writes them: each simdgroup has a stack, on
// which it runs one loop over its lanes after the other, and switches to the next simdgroup where lanes meet.

// ---- what each lane has one of

template <class... Types> struct __mtl_types {};
template <int I, class List> struct __mtl_type_of;
template <class First, class... Rest> struct __mtl_type_of<0, __mtl_types<First, Rest...>> { using type = First; };
template <int I, class First, class... Rest>
struct __mtl_type_of<I, __mtl_types<First, Rest...>> : __mtl_type_of<I - 1, __mtl_types<Rest...>> {};
template <int I, class List> using __mtl_type_at = typename __mtl_type_of<I, List>::type;

template <class Type> struct __mtl_lanes {
    using plain = metal::remove_const_t<Type>;
    static_assert(__is_trivially_destructible(plain), "lanes in lockstep keep plain values");
    alignas(64) unsigned char memory[mtl_simd_lanes * sizeof(plain)];
    __mtl_inline_member Type &operator[](unsigned lane) { return ((plain *)memory)[lane]; }
    __mtl_inline_member Type &keep(unsigned lane, const plain &value) {
        __builtin_memcpy(memory + lane * sizeof(plain), (const void *)&value, sizeof(plain));
        return (*this)[lane];
    }
};
template <class Type> struct __mtl_lanes<Type &> {
    Type *place[mtl_simd_lanes];
    __mtl_inline_member Type &operator[](unsigned lane) { return *place[lane]; }
    __mtl_inline_member Type &keep(unsigned lane, Type &value) { return *(place[lane] = &value); }
};

// Where the simdgroup is, in copies that no store of the kernel's can change.
struct __mtl_place {
    mtl_dispatch dispatch;
    unsigned position[3], extent[3], first, lanes; // first: index of lane 0 in the threadgroup
    bool is_line;
    __mtl_inline_member explicit __mtl_place(const mtl_group &group) : dispatch(*group.dispatch) {
        for (int i = 0; i < 3; i++) {
            position[i] = group.position[i];
            extent[i] = group.extent[i];
        }
        unsigned simdgroup = __mtl_this_index();
        first = simdgroup * mtl_simd_lanes;
        lanes = group.simdgroup[simdgroup].alive;
        is_line = extent[1] * extent[2] == 1;
    }
};

// ---- simdgroups take turns

// Goes on when this simdgroup's turn comes again.
__mtl_inline void __mtl_turn(mtl_group &group) {
    if (group.simdgroups == 1 && !group.dispatch->interrupted) return;
    unsigned self = __mtl_this_index();
    int next = group.next_simdgroup(&group, self);
    if (next != (int)self) __mtl_switch(&group.thread[self].stack, next < 0 ? group.home : group.thread[next].stack);
}

// These lanes stand at a barrier of the threadgroup's.
__mtl_inline void __mtl_wait(mtl_group &group, unsigned lanes) {
    unsigned self = __mtl_this_index();
    if (!lanes) return;
    group.simdgroup[self].ready = 0;
    group.simdgroup[self].barrier = lanes;
    int next = group.next_simdgroup(&group, self);
    if (next != (int)self) __mtl_switch(&group.thread[self].stack, next < 0 ? group.home : group.thread[next].stack);
}

__mtl_inline void __mtl_end(mtl_group &group) {
    unsigned self = __mtl_this_index();
    group.simdgroup[self].ready = group.simdgroup[self].barrier = 0;
    int next = group.next_simdgroup(&group, self);
    __mtl_switch(&group.thread[self].stack, next < 0 ? group.home : group.thread[next].stack);
    __builtin_trap(); // nobody switches back to it
}

// As __mtl_run_group; `entry` is the life of a simdgroup.
static bool __mtl_run_simdgroups(mtl_group &group, char *stacks, void (*entry)()) {
    group.threads = group.extent[0] * group.extent[1] * group.extent[2];
    group.simdgroups = (group.threads + mtl_simd_lanes - 1) / mtl_simd_lanes;
    group.finished = 0;
    for (unsigned s = 0; s < group.simdgroups; s++) {
        // Stacks begin at different places, which fall into different sets of the caches.
        unsigned long top = ((unsigned long)(s + 1) << MTL_STACK_BITS) - s * 2112;
        group.thread[s].stack = __mtl_fresh_stack(stacks + top, entry);
        unsigned lanes = group.threads - s * mtl_simd_lanes;
        mtl_simdgroup &simd = group.simdgroup[s];
        simd.alive = simd.ready = lanes >= mtl_simd_lanes ? ~0u : (1u << lanes) - 1;
        simd.barrier = 0;
    }
    __mtl_switch(&group.home, group.thread[0].stack);
    return group.failure == mtl_failure_none;
}

// ---- exchanges: what each lane asks, and what each gets

template <class Request> struct __mtl_meeting {
    typename Request::argument asked[mtl_simd_lanes];
    typename Request::given given[mtl_simd_lanes];
    __mtl_inline_member void ask(unsigned lane, const Request &request) { asked[lane] = request.value; }
    __mtl_inline_member void exchange(unsigned lanes) {
        if (lanes) Request::exchange(asked, given, lanes);
    }
    __mtl_inline_member auto operator[](unsigned lane) const { return Request::result(given[lane]); }
};

namespace metal {
namespace meet {
using namespace msl_;

template <int Width, class T, class F> struct reduction {
    using argument = bytes<T>;
    using given = bytes<T>;
    argument value;
    static MSL_FN void exchange(const argument (&in)[32], given (&out)[32], uint mask) {
        if constexpr (Width == 32) {
            given all = reduce_all<T, F>(in, mask);
            for (uint i = 0; i < 32; ++i) out[i] = all;
        } else {
            reduce_parts<Width, T, F>(in, out, mask);
        }
    }
    static MSL_FN T result(const given &x) { return from_bytes<T>(x); }
};
#define MSL_REDUCTION(name, operation)                                                              \
    template <class A, class T = number_t<A>> MSL_FN reduction<32, T, operation> simd_##name(A x) { \
        return {to_bytes(T(x))};                                                                    \
    }                                                                                               \
    template <class A, class T = number_t<A>> MSL_FN reduction<4, T, operation> quad_##name(A x) {  \
        return {to_bytes(T(x))};                                                                    \
    }
MSL_EACH_REDUCTION(MSL_REDUCTION)
#undef MSL_REDUCTION

template <bool Inclusive, class T, class F> struct prefixes {
    using argument = prefix_argument<T>;
    using given = bytes<T>;
    argument value;
    static MSL_FN void exchange(const argument (&in)[32], given (&out)[32], uint mask) {
        prefix_all<Inclusive, T, F>(in, out, mask);
    }
    static MSL_FN T result(const given &x) { return from_bytes<T>(x); }
};
#define MSL_PREFIX(name, inclusive, operation, identity)                                                         \
    template <class A, class T = number_t<A>> MSL_FN prefixes<inclusive, T, operation> simd_prefix_##name(A x) { \
        return {{to_bytes(T(x)), to_bytes(T(make_scalar_t<T>(identity)))}};                                      \
    }
MSL_PREFIX(inclusive_sum, true, sum_f, 0)
MSL_PREFIX(exclusive_sum, false, sum_f, 0)
MSL_PREFIX(inclusive_product, true, product_f, 1)
MSL_PREFIX(exclusive_product, false, product_f, 1)
#undef MSL_PREFIX

template <class T, class Source> struct shuffle {
    using argument = from<T>;
    using given = bytes<T>;
    argument value;
    static MSL_FN void exchange(const argument (&in)[32], given (&out)[32], uint mask) {
        for (uint i = 0; i < 32; ++i) {
            if (!(mask >> i & 1)) continue;
            uint s = Source::of(i, in[i].lane);
            out[i] = in[s < 32 && mask >> s & 1 ? s : i].value;
        }
    }
    static MSL_FN T result(const given &x) { return from_bytes<T>(x); }
};
// Which lane `i` takes the value of, when it asked for `n`.
#define MSL_SHUFFLE(name, source)                                                                       \
    struct source_of_##name {                                                                           \
        static MSL_FN uint of(uint i, uint n) { return source; }                                        \
    };                                                                                                  \
    template <class A, class T = handed_t<A>> MSL_FN shuffle<T, source_of_##name> name(A x, ushort n) { \
        return {{to_bytes(T(x)), n}};                                                                   \
    }
MSL_SHUFFLE(simd_shuffle, n)
MSL_SHUFFLE(simd_broadcast, n)
MSL_SHUFFLE(simd_shuffle_xor, i ^ n)
MSL_SHUFFLE(simd_shuffle_up, i - n)
MSL_SHUFFLE(simd_shuffle_down, i + n)
MSL_SHUFFLE(simd_shuffle_rotate_up, (i - n) & 31u)
MSL_SHUFFLE(simd_shuffle_rotate_down, (i + n) & 31u)
MSL_SHUFFLE(quad_shuffle, (i & ~3u) + (n & 3u))
MSL_SHUFFLE(quad_broadcast, (i & ~3u) + (n & 3u))
MSL_SHUFFLE(quad_shuffle_xor, i ^ (n & 3u))
MSL_SHUFFLE(quad_shuffle_up, (i & 3u) >= n ? i - n : i)
MSL_SHUFFLE(quad_shuffle_down, (i & 3u) + n < 4u ? i + n : i)
MSL_SHUFFLE(quad_shuffle_rotate_up, (i & ~3u) + ((i - n) & 3u))
MSL_SHUFFLE(quad_shuffle_rotate_down, (i & ~3u) + ((i + n) & 3u))
#undef MSL_SHUFFLE

template <class T> struct broadcast_first {
    using argument = bytes<T>;
    using given = bytes<T>;
    argument value;
    static MSL_FN void exchange(const argument (&in)[32], given (&out)[32], uint mask) {
        given first = in[first_lane(mask)];
        for (uint i = 0; i < 32; ++i) out[i] = first;
    }
    static MSL_FN T result(const given &x) { return from_bytes<T>(x); }
};
template <class A, class T = handed_t<A>> MSL_FN broadcast_first<T> simd_broadcast_first(A x) {
    return {to_bytes(T(x))};
}

// Votes, and questions about who is there: what a lane gets follows from votes, active lanes and its own number.
template <class Answer> struct ballot {
    using argument = bool;
    struct given {
        uint votes, active, lane;
    };
    argument value;
    static MSL_FN void exchange(const argument (&in)[32], given (&out)[32], uint mask) {
        uint votes = votes_of(in, mask);
        for (uint i = 0; i < 32; ++i) out[i] = {votes, mask, i};
    }
    static MSL_FN auto result(const given &x) { return Answer::of(x.votes, x.active, x.lane); }
};
#define MSL_BALLOT(name, parameter, vote, answer)                   \
    struct answer_of_##name {                                       \
        static MSL_FN auto of(uint votes, uint active, uint lane) { \
            uint quad = lane & ~3u;                                 \
            (void)votes, (void)active, (void)quad;                  \
            return answer;                                          \
        }                                                           \
    };                                                              \
    MSL_FN ballot<answer_of_##name> name(parameter) { return {vote}; }
MSL_BALLOT(simd_ballot, bool b, b, simd_vote(votes))
MSL_BALLOT(simd_any, bool b, b, votes != 0)
MSL_BALLOT(simd_all, bool b, !b, votes == 0)
MSL_BALLOT(simd_active_threads_mask, , true, simd_vote(active))
MSL_BALLOT(simd_is_first, , true, lane == first_lane(active))
MSL_BALLOT(quad_ballot, bool b, b, quad_vote(votes >> quad & 15u))
MSL_BALLOT(quad_any, bool b, b, (votes >> quad & 15u) != 0)
MSL_BALLOT(quad_all, bool b, !b, (votes >> quad & 15u) == 0)
MSL_BALLOT(quad_active_threads_mask, , true, quad_vote(active >> quad & 15u))
MSL_BALLOT(quad_is_first, , true, (lane & 3u) == first_lane(active >> quad & 15u))
#undef MSL_BALLOT

} // namespace meet
} // namespace metal
