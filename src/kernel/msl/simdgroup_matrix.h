// simdgroup_matrix<T, 8, 8>: a matrix spread over the 32 lanes of a simdgroup, two neighbours of a row in each.
//
// Metal's layout, which kernels that touch thread_elements() rely on: lane l holds row (l / 16) * 4 + l / 2 % 4 and the columns
// from (l / 8 % 2) * 4 + l % 2 * 2 on. On the GPU matrices lie as the tensor cores have them (row l / 4, columns from l % 4 * 2 on)
// unless the source mentions thread_elements (MSL_THREAD_ELEMENTS).
//
// GPU products: of half and of bfloat, one mma.m16n8k8 of that type; of float, the left factor is split into two numbers of tf32,
// high and low, which are the upper and the lower 8 rows of one mma.m16n8k8.tf32, and so is the right one, which makes two of
// them. What is lost is what tf32 does not keep of the low parts: 2^-22 of a factor, where float's own rounding is 2^-24. Tensor cores cut
// off sums where float rounds them: they add 8 products, and the running sum is added to outside.
namespace metal {

namespace msl_ {
MSL_FN uint matrix_row(uint l) {
#if MSL_GPU && !defined(MSL_THREAD_ELEMENTS)
    return l >> 2;
#else
    return (l >> 4) * 4 + (l >> 1 & 3);
#endif
}
MSL_FN uint matrix_column(uint l) {
#if MSL_GPU && !defined(MSL_THREAD_ELEMENTS)
    return (l & 3) * 2;
#else
    return (l >> 3 & 1) * 4 + (l & 1) * 2;
#endif
}
} // namespace msl_

template <class T, int Columns, int Rows> struct simdgroup_matrix {
    static_assert(Columns == 8 && Rows == 8, "simdgroup_matrix is of 8 by 8");
    typedef vec<T, 2> storage_type;
    storage_type e;
#if MSL_GPU
    // The tensor cores take the right factor by columns: lane l has rows l % 4 * 2 and the next of column l / 4. A load
    // brings it along (and the compiler drops it where it is not used); else lanes exchange it.
    T down[2];
    bool has_down;
    MSL_FN simdgroup_matrix() : has_down(false) {}
    MSL_FN explicit simdgroup_matrix(T diagonal) : has_down(false) { fill_diagonal(diagonal); }
    MSL_FN storage_type &thread_elements() {
        has_down = false;
        return e;
    }
#else
    simdgroup_matrix() = default;
    MSL_FN explicit simdgroup_matrix(T diagonal) { fill_diagonal(diagonal); }
    MSL_FN storage_type &thread_elements() { return e; }
#endif
    MSL_FN const storage_type &thread_elements() const { return e; }
    MSL_FN void fill_diagonal(T d) {
        uint l = msl_::lane(), r = msl_::matrix_row(l), c = msl_::matrix_column(l);
        e = storage_type(r == c ? d : T(0), r == c + 1 ? d : T(0));
    }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int C, int R = C> MSL_FN simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(T value) {
    simdgroup_matrix<T, C, R> m;
    m.e = vec<T, 2>(value, value);
    return m;
}
template <class T, int C, int R = C> MSL_FN simdgroup_matrix<T, C, R> make_diagonal_simdgroup_matrix(T value) {
    return simdgroup_matrix<T, C, R>(value);
}

// Element (row, column) is at source[(origin.y + row) * elements_per_row + origin.x + column]; with `transpose` rows and columns
// change roles behind the origin, which stays that of memory.
template <class T, class U, int C, int R>
MSL_FN void simdgroup_load(simdgroup_matrix<T, C, R> &d, const U *source, ulong elements_per_row = C,
                           ulong2 origin = ulong2(0ul), bool transpose = false) {
    uint l = msl_::lane(), r = msl_::matrix_row(l), c = msl_::matrix_column(l);
    source += origin.y * elements_per_row + origin.x;
    ulong along = transpose ? elements_per_row : 1, down = transpose ? 1 : elements_per_row;
    d.e = vec<T, 2>(T(source[r * down + c * along]), T(source[r * down + (c + 1) * along]));
#if MSL_GPU
    uint k = (l & 3) * 2, n = l >> 2;
    d.down[0] = T(source[k * down + n * along]);
    d.down[1] = T(source[(k + 1) * down + n * along]);
    d.has_down = true;
#endif
}
template <class T, class U, int C, int R>
MSL_FN void simdgroup_store(const simdgroup_matrix<T, C, R> &a, U *destination, ulong elements_per_row = C,
                            ulong2 origin = ulong2(0ul), bool transpose = false) {
    uint l = msl_::lane(), r = msl_::matrix_row(l), c = msl_::matrix_column(l);
    destination += origin.y * elements_per_row + origin.x;
    ulong along = transpose ? elements_per_row : 1, down = transpose ? 1 : elements_per_row;
    destination[r * down + c * along] = U(a.e.x);
    destination[r * down + (c + 1) * along] = U(a.e.y);
}

#if MSL_GPU
namespace msl_ {
#ifdef MSL_THREAD_ELEMENTS
// Between Metal's lanes and the tensor cores': the permutation of the lane's bits that rows and columns are made of.
MSL_FN uint core_to_metal(uint l) { // the lane of Metal's layout that holds what core lane l holds
    uint row = l >> 2, pair = l & 3;
    return (row >> 2) * 16 + (pair >> 1) * 8 + (row & 3) * 2 + (pair & 1);
}
MSL_FN uint metal_to_core(uint l) { return matrix_row(l) * 4 + (matrix_column(l) >> 1); }
template <class T> MSL_FN vec<T, 2> to_core(vec<T, 2> v) { return from_lane(v, core_to_metal(lane())); }
template <class T> MSL_FN vec<T, 2> from_core(vec<T, 2> v) { return from_lane(v, metal_to_core(lane())); }
#else
template <class T> MSL_FN vec<T, 2> to_core(vec<T, 2> v) { return v; }
template <class T> MSL_FN vec<T, 2> from_core(vec<T, 2> v) { return v; }
#endif
// The two elements of the right factor's column, from the lanes that hold their rows.
template <class T> MSL_FN void columns_of(const simdgroup_matrix<T, 8, 8> &m, T (&out)[2]) {
    if (m.has_down) {
        out[0] = m.down[0];
        out[1] = m.down[1];
        return;
    }
    vec<T, 2> e = to_core(m.e);
    uint l = lane(), n = l >> 2, k = (l & 3) * 2;
    vec<T, 2> a = from_lane(e, k * 4 + (n >> 1)), b = from_lane(e, (k + 1) * 4 + (n >> 1));
    out[0] = n & 1 ? a.y : a.x;
    out[1] = n & 1 ? b.y : b.x;
}
MSL_FN uint pair_bits(ushort low, ushort high) { return uint(low) | uint(high) << 16; }
// A float as two numbers of tf32, of which the tensor cores read the upper 19 bits: high is what they read of it, low the rest, rounded
// to nearest by the half of its last place. Infinity is (infinity, -0).
struct tf32_pair {
    uint high, low;
};
MSL_FN tf32_pair split(float x) {
    uint high = bits(x) & 0xffffe000u;
    return {high, bits(x - float_of(high)) + 0x1000u};
}
#define MSL_MMA_16(T, name)                                                                    \
    MSL_FN vec<float, 2> product(vec<T, 2> a, const T(&b)[2], vec<float, 2> c) {               \
        uint a0 = pair_bits(a.x.bits, a.y.bits), b0 = pair_bits(b[0].bits, b[1].bits);         \
        float d0, d1, d2, d3;                                                                  \
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." name "." name                     \
                     ".f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"                      \
                     : "=f"(d0), "=f"(d1), "=f"(d2), "=f"(d3)                                  \
                     : "r"(a0), "r"(0u), "r"(b0), "f"(0.0f), "f"(0.0f), "f"(0.0f), "f"(0.0f)); \
        return vec<float, 2>(c.x + d0, c.y + d1);                                              \
    }
#if __CUDA_ARCH__ >= 800
MSL_MMA_16(half, "f16")
MSL_MMA_16(bfloat, "bf16")
#endif
#undef MSL_MMA_16
MSL_FN vec<float, 2> product(vec<float, 2> a, const float (&b)[2], vec<float, 2> c) {
#if __CUDA_ARCH__ >= 800
    tf32_pair a0 = split(a.x), a1 = split(a.y), b0 = split(b[0]), b1 = split(b[1]);
    // Lanes have neighbouring columns of the left factor and neighbouring rows of the right: one order of k for both.
    float d0 = 0.0f, d1 = 0.0f, d2 = 0.0f, d3 = 0.0f;
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
        : "r"(a0.high), "r"(a0.low), "r"(a1.high), "r"(a1.low), "r"(b0.low), "r"(b1.low));
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
        : "r"(a0.high), "r"(a0.low), "r"(a1.high), "r"(a1.low), "r"(b0.high), "r"(b1.high));
    return vec<float, 2>(c.x + (d0 + d2), c.y + (d1 + d3));
#else
    // Without tf32: lane l's row of the left factor against its two columns of the right, by shuffles.
    uint l = lane();
    float x = c.x, y = c.y;
    for (uint k = 0; k < 8; ++k) {
        float left = from_lane(k & 1 ? a.y : a.x, (l & ~3u) + (k >> 1));
        vec<float, 2> column(from_lane(b[k & 1], (l & 3) * 8 + (k >> 1)),
                             from_lane(b[k & 1], (l & 3) * 8 + 4 + (k >> 1)));
        x = fma(left, column.x, x);
        y = fma(left, column.y, y);
    }
    return vec<float, 2>(x, y);
#endif
}
template <class A, class B> struct multiplied_as { using type = float; };
#if __CUDA_ARCH__ >= 800
template <> struct multiplied_as<half, half> { using type = half; };
template <> struct multiplied_as<bfloat, bfloat> { using type = bfloat; };
#endif
} // namespace msl_
template <class D, class A, class B, class C>
MSL_FN void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8> &d, const simdgroup_matrix<A, 8, 8> &a,
                                          const simdgroup_matrix<B, 8, 8> &b, const simdgroup_matrix<C, 8, 8> &c) {
    using M = typename msl_::multiplied_as<A, B>::type;
    B columns[2];
    msl_::columns_of(b, columns);
    M right[2] = {M(columns[0]), M(columns[1])};
    vec<float, 2> sum = msl_::product(vec<M, 2>(msl_::to_core(a.e)), right, vec<float, 2>(msl_::to_core(c.e)));
    d.e = msl_::from_core(vec<D, 2>(sum));
    d.has_down = false;
}
#else
// One lane multiplies for all: products are added in float, in the order of k.
template <class D, class A, class B, class C>
MSL_FN void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8> &d, const simdgroup_matrix<A, 8, 8> &a,
                                          const simdgroup_matrix<B, 8, 8> &b, const simdgroup_matrix<C, 8, 8> &c) {
    struct argument {
        float a0, a1, b0, b1, c0, c1;
    };
    struct result {
        float d0, d1;
    };
    result r = __mtl_collective<result>(
        argument{float(a.e.x), float(a.e.y), float(b.e.x), float(b.e.y), float(c.e.x), float(c.e.y)},
        [](const argument(&in)[32], result(&out)[32], uint) {
            float left[8][8], right[8][8], sum[8][8];
            for (uint l = 0; l < 32; ++l) {
                uint row = msl_::matrix_row(l), column = msl_::matrix_column(l);
                left[row][column] = in[l].a0, left[row][column + 1] = in[l].a1;
                right[row][column] = in[l].b0, right[row][column + 1] = in[l].b1;
                sum[row][column] = in[l].c0, sum[row][column + 1] = in[l].c1;
            }
            for (int i = 0; i < 8; ++i)
                for (int k = 0; k < 8; ++k)
                    for (int j = 0; j < 8; ++j) sum[i][j] += left[i][k] * right[k][j];
            for (uint l = 0; l < 32; ++l) {
                uint row = msl_::matrix_row(l), column = msl_::matrix_column(l);
                out[l] = {sum[row][column], sum[row][column + 1]};
            }
        });
    d.e = vec<D, 2>(D(r.d0), D(r.d1));
}
#endif
template <class D, class A, class B>
MSL_FN void simdgroup_multiply(simdgroup_matrix<D, 8, 8> &d, const simdgroup_matrix<A, 8, 8> &a,
                               const simdgroup_matrix<B, 8, 8> &b) {
    simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<float, 8, 8>(0.0f));
}
template <class T>
MSL_FN simdgroup_matrix<T, 8, 8> operator*(const simdgroup_matrix<T, 8, 8> &a, const simdgroup_matrix<T, 8, 8> &b) {
    simdgroup_matrix<T, 8, 8> d;
    simdgroup_multiply(d, a, b);
    return d;
}

} // namespace metal
