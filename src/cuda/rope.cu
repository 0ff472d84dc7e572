// Pair i turns by position * scale * inv_freq[i]; with qk_norm_rope after rms_norm of the head.
// SPDX-License-Identifier: MIT
//
//   (x1, x2) -> (x1 cos - x2 sin, x1 sin + x2 cos)
//
// The angle is formed and reduced to [-pi/4, pi/4] in double: at position 1e6 float's angle would be off by 3e-2. What
// is left is so small that float polynomials do for cosine and sine.
//
// In the fast kernel `dims / (2 N)` threads turn a head, N = 16 bytes of each half a thread. A thread makes the cosines
// and sines of its pairs once and uses them for `heads_a_block` heads, so that they cost little beside the one read and
// one write of x.
#include "cuda/device.cuh"

enum { X, OUT }; // operands of the loop over heads

// Of angles for which the reduction by two pieces of pi/2 would run out of digits: rare, and long.
__device__ __noinline__ float2 turn_far(double angle) {
    double c, s;
    sincos(angle, &s, &c);
    return make_float2((float)c, (float)s);
}

// Cosine and sine of any angle, to float's accuracy.
__device__ inline void turn(double angle, float &cosine, float &sine) {
    if (fabs(angle) > 1e9) {
        float2 both = turn_far(angle);
        cosine = both.x, sine = both.y;
        return;
    }
    double quarters = rint(angle * 0.63661977236758134308); // 2/pi
    double rest = fma(quarters, -1.57079632679489655800, angle);
    float r = (float)fma(quarters, -6.12323399573676603587e-17, rest), square = r * r;
    // Cephes' sinf and cosf (Moshier).
    float s = fmaf(fmaf(fmaf(-1.9515295891e-4f, square, 8.3321608736e-3f), square, -1.6666654611e-1f), square * r, r);
    float c = fmaf(fmaf(fmaf(2.443315711809948e-5f, square, -1.388731625493765e-3f), square, 4.166664568298827e-2f),
                   square * square, fmaf(-0.5f, square, 1));
    int quarter = (int)quarters;
    cosine = quarter & 1 ? s : c;
    sine = quarter & 1 ? c : s;
    if ((quarter + 1) & 2) cosine = -cosine;
    if (quarter & 2) sine = -sine;
}

__device__ inline double inv_freq(const mtl_cuda_rope_args &p, int64_t pair) {
    if (!p.freqs.data) return exp2(-(double)(2 * pair) / (double)p.dims * p.log2_base);
    double freq = load_double(p.freqs.data + pair * p.freqs.stride, p.freqs.dtype);
    return p.inverse ? freq : 1 / freq;
}

// position * scale; NaN outside of int32.
__device__ inline double scaled_position(const mtl_cuda_rope_args &p, int64_t batch, int64_t time) {
    if (!p.positions) return (double)(p.offset + time) * p.scale;
    const char *at = p.positions + batch * p.position_batch_stride;
    int64_t position;
    if (p.each_token) {
        position = load_integer(at + time * p.position_time_stride, p.positions_dtype);
    } else {
        position = load_integer(at, p.positions_dtype);
        if (position >= INT32_MIN && position <= INT32_MAX) position += time;
    }
    return position >= INT32_MIN && position <= INT32_MAX ? (double)position * p.scale : (double)NAN;
}

__device__ inline void turn_pair(float &x1, float &x2, float cosine, float sine) {
    float y = x1 * cosine - x2 * sine;
    x2 = x1 * sine + x2 * cosine;
    x1 = y;
}

// As norm.cuh has it, for a head that `lanes` lanes hold together.
template <int N> __device__ inline void norm_head(float (&x)[2][N], const mtl_cuda_rope_args &p, int lanes) {
    float squares = 0, eps = (float)p.eps, length = (float)p.head_dim;
#pragma unroll
    for (int j = 0; j < N; j++) squares += x[0][j] * x[0][j] + x[1][j] * x[1][j];
    squares = over_warp<float, add<float>>(squares, lanes);
    float variance = squares / length + eps;
    bool uncomfortable = !(variance > 1e-25f && variance < 1e30f);
    if (__any_sync(ALL_LANES, uncomfortable)) { // all lanes shuffle, those of other heads by a scale of 1
        float largest = 0;
#pragma unroll
        for (int j = 0; j < N; j++) largest = larger(fabsf(x[0][j]), larger(fabsf(x[1][j]), largest));
        largest = over_warp<float, larger>(largest, lanes);
        float scale = uncomfortable ? comfortable_scale(largest, p.eps) : 1;
        squares = 0;
#pragma unroll
        for (int j = 0; j < N; j++) {
            x[0][j] *= scale, x[1][j] *= scale;
            squares += x[0][j] * x[0][j] + x[1][j] * x[1][j];
        }
        squares = over_warp<float, add<float>>(squares, lanes);
        variance = squares / length + (float)(p.eps * scale * scale);
    }
    float inverse = 1 / sqrtf(variance);
#pragma unroll
    for (int j = 0; j < N; j++) x[0][j] *= inverse, x[1][j] *= inverse;
}

template <typename T, bool TRADITIONAL, bool NORMED> __device__ inline void rope_rows(const mtl_cuda_rope_args &p) {
    constexpr int N = LANES<T>, SIZE = sizeof(T);
    int chunk = threadIdx.x, turning = (int)(p.dims / (2 * N)), lanes = blockDim.x;
    int64_t chunks0 = (p.side[0].heads.count + p.heads_a_block - 1) / p.heads_a_block;
    int64_t chunks1 = p.sides > 1 ? (p.side[1].heads.count + p.heads_a_block - 1) / p.heads_a_block : 0;
    int64_t items = p.batch * (chunks0 + chunks1) * p.time, item = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    __shared__ double inv_freqs[256]; // a power of two takes long: each is made once a block
    if (p.freqs.data) wait_for_earlier();
    for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < p.dims / 2; i += blockDim.x * blockDim.y)
        inv_freqs[i] = inv_freq(p, i);
    __syncthreads();
    wait_for_earlier();
    let_next_start();
    bool live = item < items;
    if (!live) {
        if (!NORMED) return;
        item = items - 1; // its lanes still take part in the warp's sums
    }
    int64_t time, head_chunk, batch = divide(divide(item, p.time, time), chunks0 + chunks1, head_chunk);
    const mtl_cuda_rope_side &side = p.side[head_chunk >= chunks0];
    int head = (int)((head_chunk >= chunks0 ? head_chunk - chunks0 : head_chunk) * p.heads_a_block);
    int last = head + p.heads_a_block, end = last < side.heads.count ? last : (int)side.heads.count;

    // The thread's two vectors of a head, by their first elements: one of each half of what turns, or of what passes
    // through.
    bool turns = chunk < turning;
    int first = turns ? chunk * N : (int)p.dims + (chunk - turning) * N;
    int second = first + (turns ? (int)p.dims / 2 : (int)(p.head_dim - p.dims) / 2);
    const char *x = side.x.data + batch * side.x_batch_stride + time * side.x_time_stride;
    char *out = side.out.data + batch * side.out_batch_stride + time * side.out_time_stride;

    // Heads are in flight while those before them turn. Every lane of a warp makes the same number of turns, as sums
    // over lanes need; past its last head a lane repeats that one.
    constexpr int AHEAD = NORMED ? 2 : 4;
    uint4 raw[AHEAD][2];
    int64_t to[AHEAD];
    auto fetch = [&](int j, int h) {
        Offsets at = offsets_at(side.heads, h < end ? h : end - 1);
        raw[j][0] = load_16_bytes(x + at.of[X] + first * SIZE);
        raw[j][1] = load_16_bytes(x + at.of[X] + second * SIZE);
        to[j] = at.of[OUT];
    };
#pragma unroll
    for (int j = 0; j < AHEAD; j++) fetch(j, head + j);
    bool typed = NORMED && side.weight.data && side.weight.dtype == Element<T>::dtype;
    uint4 weights[2];
    if (typed) {
        weights[0] = *(const uint4 *)(side.weight.data + first * SIZE);
        weights[1] = *(const uint4 *)(side.weight.data + second * SIZE);
    }

    float cosine[N], sine[N];
    bool unrotated = false; // some pair: an infinite partner has no say in it
    if (turns) {
        double position = scaled_position(p, batch, time);
#pragma unroll
        for (int j = 0; j < N; j++) {
            int pair = TRADITIONAL ? (j < N / 2 ? first / 2 + j : second / 2 + j - N / 2) : first + j;
            turn(position * inv_freqs[pair], cosine[j], sine[j]);
            unrotated |= sine[j] == 0;
        }
    }

    for (int now = head; now < last; now += AHEAD) {
        if (!NORMED && now >= end) return;
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            bool keeps = live && now + j < end;
            char *there = out + to[j];
            float v[2][N];
            if (!NORMED && !turns) { // passes through with its bits
                if (keeps)
                    store_16_bytes(there + first * SIZE, raw[j][0]), store_16_bytes(there + second * SIZE, raw[j][1]);
            } else {
                widen(v[0], raw[j][0], T());
                widen(v[1], raw[j][1], T());
            }
            if (now + j + AHEAD < last) fetch(j, now + j + AHEAD);
            if (!NORMED && !turns) continue;
            if constexpr (NORMED) {
                norm_head<N>(v, p, lanes);
                if (side.weight.data) {
                    float weight[2][N];
                    if (typed) {
                        widen(weight[0], weights[0], T());
                        widen(weight[1], weights[1], T());
                    } else {
                        load_vector<T>(weight[0], side.weight, first);
                        load_vector<T>(weight[1], side.weight, second);
                    }
#pragma unroll
                    for (int i = 0; i < N; i++) v[0][i] *= weight[0][i], v[1][i] *= weight[1][i];
                }
            }
            if (turns) {
#pragma unroll
                for (int i = 0; i < N; i++) {
                    float *x1 = TRADITIONAL ? &v[2 * i / N][2 * i % N] : &v[0][i],
                          *x2 = TRADITIONAL ? x1 + 1 : &v[1][i];
                    if (!unrotated || sine[i] != 0) turn_pair(*x1, *x2, cosine[i], sine[i]);
                }
            }
            if (!keeps) continue;
            store_16_bytes(there + first * SIZE, narrow(v[0], T()));
            store_16_bytes(there + second * SIZE, narrow(v[1], T()));
        }
    }
}

// Any strides, dtypes and head dimensions: a warp to a head.
extern "C" __global__ void __launch_bounds__(256) rope_any(const __grid_constant__ mtl_cuda_rope_args p) {
    int64_t heads = p.side[0].heads.count + (p.sides > 1 ? p.side[1].heads.count : 0);
    int64_t items = p.batch * heads * p.time, stride = (int64_t)gridDim.x * blockDim.y;
    int lane = threadIdx.x;
    wait_for_earlier();
    let_next_start();
    for (int64_t item = (int64_t)blockIdx.x * blockDim.y + threadIdx.y; item < items; item += stride) {
        int64_t head = item % heads, rest = item / heads, time = rest % p.time, batch = rest / p.time;
        const mtl_cuda_rope_side &side = p.side[head >= p.side[0].heads.count];
        if (head >= p.side[0].heads.count) head -= p.side[0].heads.count;
        Offsets at = offsets_at(side.heads, head);
        const char *x = side.x.data + batch * side.x_batch_stride + time * side.x_time_stride + at.of[X];
        char *out = side.out.data + batch * side.out_batch_stride + time * side.out_time_stride + at.of[OUT];
        double inverse = 1;
        if (p.normed) {
            double squares = 0;
            for (int64_t i = lane; i < p.head_dim; i += WARP) {
                double v = load_float(x + i * side.x.stride, side.x.dtype);
                squares += v * v;
            }
            squares = over_warp<double, add<double>>(squares);
            inverse = 1 / sqrt(squares / (double)p.head_dim + p.eps);
        }
        auto element = [&](int64_t i) {
            float v = load_float(x + i * side.x.stride, side.x.dtype);
            if (!p.normed) return v;
            v = (float)(v * inverse);
            return side.weight.data ? v * load_float(side.weight.data + i * side.weight.stride, side.weight.dtype) : v;
        };
        double position = scaled_position(p, batch, time);
        for (int64_t pair = lane; pair < p.dims / 2; pair += WARP) {
            int64_t i1 = p.traditional ? 2 * pair : pair, i2 = p.traditional ? i1 + 1 : i1 + p.dims / 2;
            float x1 = element(i1), x2 = element(i2), cosine, sine;
            turn(position * inv_freq(p, pair), cosine, sine);
            if (sine != 0) turn_pair(x1, x2, cosine, sine); // an infinite partner has no say in an unrotated pair
            store_float(out + i1 * side.out.stride, side.out.dtype, x1);
            store_float(out + i2 * side.out.stride, side.out.dtype, x2);
        }
        for (int64_t i = p.dims + lane; i < p.head_dim; i += WARP) {
            const char *from = x + i * side.x.stride;
            char *to = out + i * side.out.stride;
            if (p.normed || side.x.dtype != side.out.dtype) store_float(to, side.out.dtype, element(i));
            else if (side.x.dtype == F32)
                *(unsigned *)to = *(const unsigned *)from; // keeps its bits, those of a NaN too
            else *(unsigned short *)to = *(const unsigned short *)from;
        }
    }
}

#define ROPE_KERNEL(name, type, traditional, normed)                                                          \
    extern "C" __global__ void __launch_bounds__(256, 2) name(const __grid_constant__ mtl_cuda_rope_args p) { \
        rope_rows<type, traditional, normed>(p);                                                              \
    }
#define ROPE_KERNELS(dtype, type)                              \
    ROPE_KERNEL(rope_##dtype, type, false, false)              \
    ROPE_KERNEL(rope_##dtype##_traditional, type, true, false) \
    ROPE_KERNEL(norm_rope_##dtype, type, false, true)          \
    ROPE_KERNEL(norm_rope_##dtype##_traditional, type, true, true)
ROPE_KERNELS(f32, float)
ROPE_KERNELS(f16, __half)
ROPE_KERNELS(bf16, __nv_bfloat16)
