// The gated delta rule (Yang et al. 2024, arXiv:2412.06464), a step at a time. SPDX-License-Identifier: MIT
//
//   S <- S gamma_t;  S <- S + beta_t (v_t - S k_t) k_t^T;  out_t = S q_t
//
// The rows of S do not depend on each other. In the fast kernels eight lanes hold a row in registers over all steps, so
// that a warp's loads of the state are whole 128-byte lines and a sum over a row takes three steps. One read and one
// write of the state: at T = 1 that is all the traffic there is. For more steps the block stages what they read in
// shared memory, as float, a chunk of steps ahead: the chain from one step to the next then waits for arithmetic alone.
//
// The general kernel gives a warp to a row and keeps it where the resulting state lies.
#include "cuda/device.cuh"

constexpr int LANES_OF_ROW = 8, THREADS = 128, GROUPS = THREADS / LANES_OF_ROW;

__device__ inline const char *place(const mtl_cuda_strided &operand, int64_t i, int64_t j, int64_t k) {
    return operand.data + i * operand.stride[0] + j * operand.stride[1] + k * operand.stride[2];
}

__device__ inline float over_row_lanes(float x) { return over_warp<float, add<float>>(x, LANES_OF_ROW); }

// A lane's part of a row: columns 4 (8 i + lane) to + 3 for each i.
template <int KEY_DIM> struct Part {
    static constexpr int FOURS = KEY_DIM / (4 * LANES_OF_ROW);
    float x[FOURS][4];

    __device__ void read(const float *row, int lane) {
#pragma unroll
        for (int i = 0; i < FOURS; i++) *(float4 *)x[i] = *(const float4 *)(row + (i * LANES_OF_ROW + lane) * 4);
    }

    template <typename T> __device__ void read(const char *row, int lane, T t) {
#pragma unroll
        for (int i = 0; i < FOURS; i++) {
            const char *at = row + (i * LANES_OF_ROW + lane) * 4 * sizeof(T);
            if constexpr (sizeof(T) == 4) {
                widen(x[i], load_16_bytes(at), t);
            } else {
                uint2 raw = *(const uint2 *)at;
                float eight[8];
                widen(eight, make_uint4(raw.x, raw.y, 0, 0), t);
#pragma unroll
                for (int j = 0; j < 4; j++) x[i][j] = eight[j];
            }
        }
    }

    __device__ void write(char *row, int lane) const {
#pragma unroll
        for (int i = 0; i < FOURS; i++) store_16_bytes(row + (i * LANES_OF_ROW + lane) * 16, narrow(x[i], 0.0f));
    }

    __device__ void decay(float gamma) {
#pragma unroll
        for (int i = 0; i < FOURS; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) x[i][j] *= gamma;
        }
    }

    __device__ void decay(const Part &gamma) {
#pragma unroll
        for (int i = 0; i < FOURS; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) x[i][j] *= gamma.x[i][j];
        }
    }

    // By fours, for chains of additions that do not wait for each other.
    __device__ float dot(const Part &other) const {
        float sum[4] = {};
#pragma unroll
        for (int i = 0; i < FOURS; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) sum[j] = fmaf(x[i][j], other.x[i][j], sum[j]);
        }
        return (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }

    __device__ void add_multiple(float factor, const Part &other) {
#pragma unroll
        for (int i = 0; i < FOURS; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) x[i][j] = fmaf(factor, other.x[i][j], x[i][j]);
        }
    }
};

// ---- one step

// A lane has 64 bytes of the state in flight, of 256 features 128: with twice as many an H200 was slower, by 3 %.
template <typename T, int KEY_DIM> __device__ inline void gated_delta_step(const mtl_cuda_gated_delta_args &p) {
    constexpr int ROWS = KEY_DIM < 128 ? 2 : 1; // of a group of lanes, as in gated_delta.c
    int lane = threadIdx.x % LANES_OF_ROW, group = threadIdx.x / LANES_OF_ROW;
    unsigned head = blockIdx.y, batch = blockIdx.z, k_head = head / ((unsigned)p.v_heads / (unsigned)p.k_heads);
    int64_t row[ROWS];
    Part<KEY_DIM> state[ROWS] = {}, q, k;
    wait_for_earlier();
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        row[r] = ((int64_t)blockIdx.x * ROWS + r) * GROUPS + group;
        if (p.initial_state.data && row[r] < p.value_dim)
            state[r].read(place(p.initial_state, batch, head, row[r]), lane, 0.0f);
    }
    let_next_start();
    bool live = !p.mask.data || load_integer(place(p.mask, batch, 0, 0), p.mask.dtype) != 0;
    float out[ROWS] = {};
    if (live) { // a masked step is not read at all
        k.read(place(p.k, batch, 0, k_head), lane, T());
        q.read(place(p.q, batch, 0, k_head), lane, T());
        const char *gamma = place(p.gamma, batch, 0, head), *v = place(p.v, batch, 0, head);
        float beta = load_float(place(p.beta, batch, 0, head), p.beta.dtype);
        if (p.gamma.stride[3] == 0) {
            float decay = load_float(gamma, p.gamma.dtype);
#pragma unroll
            for (int r = 0; r < ROWS; r++) state[r].decay(decay);
        } else {
            Part<KEY_DIM> decay;
#pragma unroll
            for (int i = 0; i < decay.FOURS; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++)
                    decay.x[i][j] =
                        load_float(gamma + ((i * LANES_OF_ROW + lane) * 4 + j) * p.gamma.stride[3], p.gamma.dtype);
            }
#pragma unroll
            for (int r = 0; r < ROWS; r++) state[r].decay(decay);
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float value = row[r] < p.value_dim ? load_float(v + row[r] * p.v.stride[3], p.v.dtype) : 0;
            state[r].add_multiple(beta * (value - over_row_lanes(state[r].dot(k))), k);
            out[r] = over_row_lanes(state[r].dot(q));
        }
    }
    char *to = (char *)place(p.out, batch, 0, head);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (row[r] >= p.value_dim) continue;
        state[r].write((char *)place(p.state, batch, head, row[r]), lane);
        if (lane == 0) store_float(to + row[r] * p.out.stride[3], p.out.dtype, out[r]);
    }
}

// ---- many steps

// What CHUNK steps read, as float.
template <int KEY_DIM, bool PER_CHANNEL> struct Chunk {
    static constexpr int STEPS = KEY_DIM > 128 ? 8 : 16;
    float q[STEPS][KEY_DIM], k[STEPS][KEY_DIM], gamma[STEPS][PER_CHANNEL ? KEY_DIM : 1];
    float v[STEPS][GROUPS], beta[STEPS], live[STEPS];
};

// On its way there: global memory is read early, and written to shared memory when the chunk before has been used up.
template <typename T, int KEY_DIM, bool PER_CHANNEL> struct Staged {
    using To = Chunk<KEY_DIM, PER_CHANNEL>;
    static constexpr int N = LANES<T>, VECTORS = To::STEPS * KEY_DIM / N / THREADS,
                         VALUES = To::STEPS * GROUPS / THREADS;
    static constexpr int GAMMAS = PER_CHANNEL ? To::STEPS * KEY_DIM / THREADS : 1;
    uint4 q[VECTORS], k[VECTORS];
    float gamma[GAMMAS], v[VALUES], beta, live;

    __device__ void fetch(const mtl_cuda_gated_delta_args &p, int64_t batch, int64_t head, int64_t k_head,
                          int64_t first) {
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            int at = i * THREADS + threadIdx.x, step = at / (KEY_DIM / N), vector = at % (KEY_DIM / N);
            q[i] = k[i] = make_uint4(0, 0, 0, 0);
            if (first + step >= p.time) continue;
            q[i] = *(const uint4 *)(place(p.q, batch, first + step, k_head) + vector * 16);
            k[i] = *(const uint4 *)(place(p.k, batch, first + step, k_head) + vector * 16);
        }
#pragma unroll
        for (int i = 0; i < VALUES; i++) {
            int at = i * THREADS + threadIdx.x, step = at / GROUPS;
            int64_t row = (int64_t)blockIdx.y * GROUPS + at % GROUPS;
            v[i] = 0;
            if (first + step < p.time && row < p.value_dim)
                v[i] = load_float(place(p.v, batch, first + step, head) + row * p.v.stride[3], p.v.dtype);
        }
        if constexpr (PER_CHANNEL) {
#pragma unroll
            for (int i = 0; i < GAMMAS; i++) {
                int at = i * THREADS + threadIdx.x, step = at / KEY_DIM;
                if (first + step < p.time)
                    gamma[i] = load_float(place(p.gamma, batch, first + step, head) + at % KEY_DIM * p.gamma.stride[3],
                                          p.gamma.dtype);
            }
        }
        int64_t time = first + threadIdx.x;
        if (threadIdx.x < To::STEPS && time < p.time) {
            if (!PER_CHANNEL) gamma[0] = load_float(place(p.gamma, batch, time, head), p.gamma.dtype);
            beta = load_float(place(p.beta, batch, time, head), p.beta.dtype);
            live = !p.mask.data || load_integer(place(p.mask, batch, time, 0), p.mask.dtype) != 0;
        }
    }

    __device__ void keep(To &to) const {
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            float x[N];
            widen(x, q[i], T());
#pragma unroll
            for (int j = 0; j < N; j += 4)
                ((float4 *)to.q)[((i * THREADS + threadIdx.x) * N + j) / 4] =
                    make_float4(x[j], x[j + 1], x[j + 2], x[j + 3]);
            widen(x, k[i], T());
#pragma unroll
            for (int j = 0; j < N; j += 4)
                ((float4 *)to.k)[((i * THREADS + threadIdx.x) * N + j) / 4] =
                    make_float4(x[j], x[j + 1], x[j + 2], x[j + 3]);
        }
#pragma unroll
        for (int i = 0; i < VALUES; i++) (&to.v[0][0])[i * THREADS + threadIdx.x] = v[i];
        if constexpr (PER_CHANNEL) {
#pragma unroll
            for (int i = 0; i < GAMMAS; i++) (&to.gamma[0][0])[i * THREADS + threadIdx.x] = gamma[i];
        }
        if (threadIdx.x < To::STEPS) {
            if (!PER_CHANNEL) to.gamma[threadIdx.x][0] = gamma[0];
            to.beta[threadIdx.x] = beta;
            to.live[threadIdx.x] = live;
        }
    }
};

template <typename T, int KEY_DIM, bool PER_CHANNEL>
__device__ inline void gated_delta_steps(const mtl_cuda_gated_delta_args &p) {
    using To = Chunk<KEY_DIM, PER_CHANNEL>;
    extern __shared__ float4 shared[];
    To *chunk = (To *)shared; // two: one in use, one being filled
    int lane = threadIdx.x % LANES_OF_ROW, group = threadIdx.x / LANES_OF_ROW;
    int64_t head, batch = divide(blockIdx.x, p.v_heads, head), k_head = head / (p.v_heads / p.k_heads);
    int64_t row = (int64_t)blockIdx.y * GROUPS + group;
    Part<KEY_DIM> state = {};
    if (p.initial_state.data && row < p.value_dim) state.read(place(p.initial_state, batch, head, row), lane, 0.0f);

    Staged<T, KEY_DIM, PER_CHANNEL> staged;
    staged.fetch(p, batch, head, k_head, 0);
    staged.keep(chunk[0]);
    __syncthreads();
    for (int64_t first = 0, turn = 0; first < p.time; first += To::STEPS, turn ^= 1) {
        bool more = first + To::STEPS < p.time;
        if (more) staged.fetch(p, batch, head, k_head, first + To::STEPS);
        int steps = (int)(p.time - first < To::STEPS ? p.time - first : To::STEPS);
        for (int step = 0; step < steps; step++) {
            float out = 0;
            if (chunk[turn].live[step] != 0) {
                Part<KEY_DIM> q, k;
                k.read(chunk[turn].k[step], lane);
                q.read(chunk[turn].q[step], lane);
                if constexpr (PER_CHANNEL) {
                    Part<KEY_DIM> gamma;
                    gamma.read(chunk[turn].gamma[step], lane);
                    state.decay(gamma);
                } else {
                    state.decay(chunk[turn].gamma[step][0]);
                }
                state.add_multiple(chunk[turn].beta[step] * (chunk[turn].v[step][group] - over_row_lanes(state.dot(k))),
                                   k);
                out = over_row_lanes(state.dot(q));
            }
            if (lane == 0 && row < p.value_dim)
                store_float((char *)place(p.out, batch, first + step, head) + row * p.out.stride[3], p.out.dtype, out);
        }
        if (more) staged.keep(chunk[turn ^ 1]);
        __syncthreads();
    }
    if (row < p.value_dim) state.write((char *)place(p.state, batch, head, row), lane);
}

// ---- any key dimension, strides and dtypes. A block is {32, rows}.

extern "C" __global__ void __launch_bounds__(THREADS)
    gated_delta_any(const __grid_constant__ mtl_cuda_gated_delta_args p) {
    int64_t head = blockIdx.x % p.v_heads, batch = blockIdx.x / p.v_heads, k_head = head / (p.v_heads / p.k_heads);
    int lane = threadIdx.x;
    for (int64_t row = (int64_t)blockIdx.y * blockDim.y + threadIdx.y; row < p.value_dim;
         row += (int64_t)gridDim.y * blockDim.y) {
        char *state = (char *)place(p.state, batch, head, row);
        for (int64_t i = lane; i < p.key_dim; i += WARP) {
            float s = 0;
            if (p.initial_state.data)
                s = load_float(place(p.initial_state, batch, head, row) + i * p.initial_state.stride[3],
                               p.initial_state.dtype);
            *(float *)(state + i * p.state.stride[3]) = s;
        }
        for (int64_t time = 0; time < p.time; time++) {
            float out = 0;
            if (!p.mask.data || load_integer(place(p.mask, batch, time, 0), p.mask.dtype) != 0) {
                const char *q = place(p.q, batch, time, k_head), *k = place(p.k, batch, time, k_head);
                const char *gamma = place(p.gamma, batch, time, head);
                float beta = load_float(place(p.beta, batch, time, head), p.beta.dtype), predicted = 0;
                float v = load_float(place(p.v, batch, time, head) + row * p.v.stride[3], p.v.dtype);
                for (int64_t i = lane; i < p.key_dim; i += WARP) {
                    float *s = (float *)(state + i * p.state.stride[3]);
                    *s *= load_float(gamma + i * p.gamma.stride[3], p.gamma.dtype);
                    predicted = fmaf(*s, load_float(k + i * p.k.stride[3], p.k.dtype), predicted);
                }
                float delta = beta * (v - over_warp<float, add<float>>(predicted));
                for (int64_t i = lane; i < p.key_dim; i += WARP) {
                    float *s = (float *)(state + i * p.state.stride[3]);
                    *s = fmaf(delta, load_float(k + i * p.k.stride[3], p.k.dtype), *s);
                    out = fmaf(*s, load_float(q + i * p.q.stride[3], p.q.dtype), out);
                }
                out = over_warp<float, add<float>>(out);
            }
            if (lane == 0)
                store_float((char *)place(p.out, batch, time, head) + row * p.out.stride[3], p.out.dtype, out);
        }
    }
}

#define GATED_DELTA_KERNEL(name, body)                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS) name(const __grid_constant__ mtl_cuda_gated_delta_args p) { \
        body(p);                                                                                                      \
    }
#define GATED_DELTA_KERNELS(dtype, type, dim)                                                    \
    GATED_DELTA_KERNEL(gated_delta_step_##dtype##_##dim, (gated_delta_step<type, dim>))          \
    GATED_DELTA_KERNEL(gated_delta_steps_##dtype##_##dim, (gated_delta_steps<type, dim, false>)) \
    GATED_DELTA_KERNEL(gated_delta_steps_##dtype##_##dim##_channels, (gated_delta_steps<type, dim, true>))
#define GATED_DELTA_DTYPE(dtype, type)    \
    GATED_DELTA_KERNELS(dtype, type, 64)  \
    GATED_DELTA_KERNELS(dtype, type, 128) \
    GATED_DELTA_KERNELS(dtype, type, 256)
GATED_DELTA_DTYPE(f32, float)
GATED_DELTA_DTYPE(f16, __half)
GATED_DELTA_DTYPE(bf16, __nv_bfloat16)
