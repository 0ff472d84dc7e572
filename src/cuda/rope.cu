// Pair i turns by position * scale * inv_freq[i]; with qk_norm_rope after rms_norm of the head.
// SPDX-License-Identifier: MIT
//
//   (x1, x2) -> (x1 cos - x2 sin, x1 sin + x2 cos)
//
// The angle is formed and reduced to [-pi/4, pi/4] in double: at position 1e6 float's angle would be off by 3e-2. What
// is left is so small that float polynomials do for cosine and sine.
//
// In the fast kernel a block has a few time steps of a few heads, `head_dim / (2 N)` threads to each, N = 16 bytes of
// each half a thread. It asks for its part of x, makes the cosines and sines of its time steps in shared memory while
// that is on its way, and turns. So a head costs little beside the one read and one write of x, and blocks are many and
// small, as what the last of them leave idle is time lost.
#include "cuda/device.cuh"

enum { X, OUT, FIRST_HEAD }; // operands of the loop over heads, or over groups of heads; the last: in its row

constexpr int HEADS = 2, TABLE = 1024, THREADS = 128; // as in rope.c

// Of angles for which the reduction by two pieces of pi/2 would run out of digits: rare, and long.
__device__ __noinline__ float2 turn_far(double angle) {
    double c, s;
    sincos(angle, &s, &c);
    return make_float2((float)c, (float)s);
}

__device__ inline bool is_far(double angle) { return fabs(angle) > 1e9; }

// Cosine and sine of an angle that is not far, to float's accuracy.
__device__ inline float2 turn(double angle) {
    // Adding 1.5 x 2^52 rounds to an integer, which then lies in the low bits.
    const double to_integer = 6755399441055744.0;
    double shifted = fma(angle, 0.63661977236758134308 /* 2/pi */, to_integer), quarters = shifted - to_integer;
    double rest = fma(quarters, -1.57079632679489655800, angle);
    float r = (float)fma(quarters, -6.12323399573676603587e-17, rest), square = r * r;
    // Cephes' sinf and cosf (Moshier).
    float s = fmaf(fmaf(fmaf(-1.9515295891e-4f, square, 8.3321608736e-3f), square, -1.6666654611e-1f), square * r, r);
    float c = fmaf(fmaf(fmaf(2.443315711809948e-5f, square, -1.388731625493765e-3f), square, 4.166664568298827e-2f),
                   square * square, fmaf(-0.5f, square, 1));
    int quarter = __double2loint(shifted);
    float cosine = quarter & 1 ? s : c, sine = quarter & 1 ? c : s;
    return make_float2((quarter + 1) & 2 ? -cosine : cosine, quarter & 2 ? -sine : sine);
}

__device__ inline double inv_freq(const mtl_cuda_rope_args &p, int64_t pair) {
    if (!p.freqs.data) return exp2((double)pair * p.log2_ratio);
    double freq = load_double(p.freqs.data + pair * p.freqs.stride, p.freqs.dtype);
    return p.inverse ? freq : 1 / freq;
}

// position * scale; NaN outside of int32.
__device__ inline double scaled_position(const mtl_cuda_rope_args &p, int64_t batch, int64_t time) {
    if (!p.positions) return (double)(p.offset + time) * p.scale;
    const char *at = p.positions + batch * p.position_batch_stride;
    int64_t position = load_integer(p.each_token ? at + time * p.position_time_stride : at, p.positions_dtype);
    if (!p.each_token && position <= INT32_MAX) position += time; // that cannot overflow; from below it may come inside
    return position >= INT32_MIN && position <= INT32_MAX ? (double)position * p.scale : (double)NAN;
}

__device__ inline void turn_pair(float &x1, float &x2, float cosine, float sine) {
    float y = x1 * cosine - x2 * sine;
    x2 = x1 * sine + x2 * cosine;
    x1 = y;
}

// As norm.cuh has it, for a head that `lanes` lanes hold together.
template <int N> __device__ inline void norm_head(float (&x)[2][N], const mtl_cuda_rope_args &p, int lanes) {
    float squares = 0;
#pragma unroll
    for (int j = 0; j < N; j++) squares += x[0][j] * x[0][j] + x[1][j] * x[1][j];
    squares = over_warp<float, add<float>>(squares, lanes);
    float variance = squares * p.per_head_dim + p.eps_in_float;
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
        variance = squares * p.per_head_dim + (float)(p.eps * scale * scale);
    }
    float inverse = rsqrtf(variance);
#pragma unroll
    for (int j = 0; j < N; j++) x[0][j] *= inverse, x[1][j] *= inverse;
}

template <typename T, bool TRADITIONAL, bool NORMED> __device__ inline void rope_rows(const mtl_cuda_rope_args &p) {
    constexpr int N = LANES<T>, SIZE = sizeof(T);
    int chunk = threadIdx.x, turning = (int)(p.dims / (2 * N));
    int step = threadIdx.y & ((1 << p.log2_steps) - 1), place = threadIdx.y >> p.log2_steps;
    int places = blockDim.y >> p.log2_steps;
    int64_t time = ((int64_t)blockIdx.x << p.log2_steps) + step, batch = p.first_batch + blockIdx.z;
    int64_t group = p.first_group + blockIdx.y, groups0 = p.side[0].heads.count;
    const mtl_cuda_rope_side &side = p.side[group >= groups0];
    Offsets at = offsets_at(side.heads, group >= groups0 ? group - groups0 : group);
    int heads = time < p.time ? side.heads_in_row - (int)at.of[FIRST_HEAD] - place : 0; // from the thread's first on

    // The thread's two vectors of a head: one of each half of what turns, or of what passes through.
    bool turns = chunk < turning;
    int first = turns ? chunk * N : (int)p.dims + (chunk - turning) * N;
    int second = first + (turns ? (int)p.dims / 2 : (int)(p.head_dim - p.dims) / 2);
    const char *x = side.x.data + batch * side.x_batch_stride + time * side.x_time_stride + at.of[X];
    char *out = side.out.data + batch * side.out_batch_stride + time * side.out_time_stride + at.of[OUT];
    wait_for_earlier();
    uint4 raw[HEADS][2];
    auto fetch = [&] {
#pragma unroll
        for (int j = 0; j < HEADS; j++) {
            const char *from = x + (place + j * places) * side.x_step;
            bool there = j < p.heads_a_thread && j * places < heads;
            raw[j][0] = there ? load_16_bytes(from + first * SIZE) : make_uint4(0, 0, 0, 0);
            raw[j][1] = there ? load_16_bytes(from + second * SIZE) : make_uint4(0, 0, 0, 0);
        }
    };
    fetch();
    let_next_start();

    // The places of a time step share in its pairs.
    __shared__ __align__(16) float2 table[TABLE]; // by time step, two pairs of a thread, thread, pair
    float2 *of_step = table + step * turning * N;
    auto entry = [&](int j) { return (j / 2 * turning + chunk) * 2 + j % 2; };
    bool unrotated = false, far = false; // some pair
    auto make_table = [&](auto make) {
        if (!turns || time >= p.time) return;
        double position = scaled_position(p, batch, time);
#pragma unroll 1
        for (int j = place; j < N; j += places) {
            int pair = TRADITIONAL ? (j < N / 2 ? first / 2 + j : second / 2 + j - N / 2) : first + j;
            double angle = position * inv_freq(p, pair);
            float2 turn = make(angle);
            of_step[entry(j)] = turn;
            unrotated |= turn.y == 0;
            far |= is_far(angle);
        }
    };
    make_table([](double angle) { return turn(angle); });
    bool some = __syncthreads_or(unrotated || far);
    if (some && __syncthreads_or(far)) {
        make_table([](double angle) { return is_far(angle) ? turn_far(angle) : turn(angle); });
        fetch(); // again, so that nothing has to be kept over those calls
        __syncthreads();
    }

    bool typed = NORMED && side.weight.data && side.weight.dtype == Element<T>::dtype;
    uint4 weights[2];
    if (typed) {
        weights[0] = *(const uint4 *)(side.weight.data + first * SIZE);
        weights[1] = *(const uint4 *)(side.weight.data + second * SIZE);
    }
#pragma unroll
    for (int j = 0; j < HEADS; j++) {
        if (j >= p.heads_a_thread) break; // for all alike, as sums over lanes need
        if (!NORMED && j * places >= heads) return;
        if (NORMED || turns) { // else it passes through with its bits
            float v[2][N];
            widen(v[0], raw[j][0], T());
            widen(v[1], raw[j][1], T());
            if constexpr (NORMED) {
                norm_head<N>(v, p, blockDim.x);
                if (side.weight.data) {
                    float weight[2][N];
                    if (typed) {
                        widen(weight[0], weights[0], T());
                        widen(weight[1], weights[1], T());
                    } else {
                        load_vector<T>(weight[0], side.weight, first, 1);
                        load_vector<T>(weight[1], side.weight, second, 1);
                    }
#pragma unroll
                    for (int i = 0; i < N; i++) v[0][i] *= weight[0][i], v[1][i] *= weight[1][i];
                }
            }
            auto turn_pairs = [&](auto turn_one) {
#pragma unroll
                for (int i = 0; i < N; i += 2) {
                    float4 two = *(const float4 *)&of_step[entry(i)];
                    float *x1 = TRADITIONAL ? &v[2 * i / N][2 * i % N] : &v[0][i];
                    float *x2 = TRADITIONAL ? x1 + 1 : &v[1][i];
                    turn_one(x1[0], x2[0], two.x, two.y);
                    turn_one(x1[TRADITIONAL ? 2 : 1], x2[TRADITIONAL ? 2 : 1], two.z, two.w);
                }
            };
            if (turns && !some) turn_pairs(turn_pair);
            if (turns && some) {
                turn_pairs([](float &x1, float &x2, float cosine, float sine) {
                    if (sine != 0) turn_pair(x1, x2, cosine, sine); // else an infinite partner has no say
                });
            }
            raw[j][0] = narrow(v[0], T()), raw[j][1] = narrow(v[1], T());
        }
        if (j * places >= heads) continue;
        char *to = out + (place + j * places) * side.out_step;
        store_16_bytes(to + first * SIZE, raw[j][0]);
        store_16_bytes(to + second * SIZE, raw[j][1]);
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
            float x1 = element(i1), x2 = element(i2);
            double angle = position * inv_freq(p, pair);
            float2 by = is_far(angle) ? turn_far(angle) : turn(angle);
            if (by.y != 0) turn_pair(x1, x2, by.x, by.y); // an infinite partner has no say in an unrotated pair
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

#define ROPE_KERNEL(name, type, traditional, normed)                      \
    extern "C" __global__ void __launch_bounds__(THREADS, normed ? 6 : 8) \
        name(const __grid_constant__ mtl_cuda_rope_args p) {              \
        rope_rows<type, traditional, normed>(p);                          \
    }
#define ROPE_KERNELS(dtype, type)                              \
    ROPE_KERNEL(rope_##dtype, type, false, false)              \
    ROPE_KERNEL(rope_##dtype##_traditional, type, true, false) \
    ROPE_KERNEL(norm_rope_##dtype, type, false, true)          \
    ROPE_KERNEL(norm_rope_##dtype##_traditional, type, true, true)
ROPE_KERNELS(f32, float)
ROPE_KERNELS(f16, __half)
ROPE_KERNELS(bf16, __nv_bfloat16)
