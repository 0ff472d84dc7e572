/* Metalloid: fused transformer kernels.
 *
 * SPDX-License-Identifier: MIT
 *
 * Tensors are DLPack views (https://dmlc.github.io/dlpack): the library never owns, allocates or keeps one. NULL strides
 * mean row-major contiguous; any strides are legal on inputs (transposed, sliced, broadcast, negative); outputs may be
 * strided too, but must not overlap themselves. Every call checks all its arguments before it writes anything; a failed
 * call leaves its outputs as they were, returns a status and keeps a one-line message for metalloid_last_error().
 *
 * dtypes: "floating" stands for float16, bfloat16, float32 and float64; "integer" for signed and unsigned integers of 8 to
 * 64 bits. Floating operands of one call may differ in dtype. Arithmetic is float32 inside (float64 as soon as one of the
 * floating operands is float64) and is rounded once, to nearest even, to the dtype of the output.
 *
 * Tensors live on the CPU (CUDA's pinned memory included) or, in a build with CUDA kernels, on an NVIDIA GPU, all of a
 * call on one device. There float64 is refused, and values that only the device can see, such as positions and targets,
 * are not checked: one that the CPU refuses gives NaN.
 *
 * Notation: B batch, N_q / N_kv query and key/value heads, T_q / T_kv lengths, D head dimension, H length of the last axis.
 */
#ifndef METALLOID_METALLOID_H
#define METALLOID_METALLOID_H

#include <dlpack/dlpack.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define METALLOID_VERSION_MAJOR 0
#define METALLOID_VERSION_MINOR 1
#define METALLOID_VERSION_PATCH 0

/* DLPack's type codes for complex numbers and bool, which older headers cannot name. */
#define METALLOID_DL_COMPLEX 5
#define METALLOID_DL_BOOL    6

#if defined(METALLOID_STATIC)
#define METALLOID_API
#elif defined(_WIN32)
#define METALLOID_API __declspec(dllimport)
#else
#define METALLOID_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- status ------------------------------------------------------------------------------------------------------- */

typedef enum metalloid_status {
    METALLOID_OK = 0,
    METALLOID_INVALID_ARGUMENT =
        1, /* a null pointer, dtype, rank, shape, stride, overlap or value that the call refuses */
    METALLOID_OUT_OF_MEMORY = 2,  /* the workspace could not be allocated; nothing was written */
    METALLOID_UNSUPPORTED = 3,    /* no backend of this build serves the tensors' device, or the device is too old */
    METALLOID_DEVICE_FAILURE = 4, /* the device or its driver refused the work; the message has its words */
    METALLOID_COMPILE_FAILED =
        5,                       /* a custom kernel's source does not compile, or there is nothing to compile it with */
    METALLOID_KERNEL_FAILED = 6, /* a custom kernel was stopped: a barrier that only a part of the threads reach, a loop
                                   * that goes on; its outputs hold whatever it wrote */
} metalloid_status;

/* The status in words; never NULL. */
METALLOID_API const char *metalloid_status_string(metalloid_status status);

/* One line about the last failed call of this thread ("rope: dims must be even, got 7"); "" before the first failure. Behind
 * METALLOID_COMPILE_FAILED's first line stands what the compiler said. Valid until the next failing call of the same thread. */
METALLOID_API const char *metalloid_last_error(void);

/* "major.minor.patch" of the library that is loaded, which may be newer than the header. */
METALLOID_API const char *metalloid_version(void);

/* The CPU kernels that calls without a context run: "plain", or the instruction set picked from the processor's flags.
 * The environment variable METALLOID_CPU_ISA, read once, overrides the choice downwards. */
METALLOID_API const char *metalloid_cpu_isa(void);

/* ---- context ------------------------------------------------------------------------------------------------------ */

/* What a call needs beside its arguments. NULL is the default context: the process-wide thread count, malloc and free.
 * A context is used by one thread at a time; any number of contexts and threads at once is fine. */
typedef struct metalloid_context metalloid_context;

/* Workspace allocator: `allocate` returns memory aligned to at least 64 bytes or NULL; `release` gets its pointer. */
typedef struct metalloid_allocator {
    void *(*allocate)(void *user, size_t bytes);
    void (*release)(void *user, void *pointer);
    void *user;
} metalloid_allocator;

METALLOID_API metalloid_status metalloid_context_create(metalloid_context **context);
METALLOID_API void metalloid_context_destroy(metalloid_context *context); /* NULL is fine */

/* At most `threads` threads, the caller included, run a call; 0 returns to the process-wide count. */
METALLOID_API metalloid_status metalloid_context_set_threads(metalloid_context *context, int threads);

/* The CUDA stream (cudaStream_t or CUstream) on which calls on CUDA tensors queue their work, in the device's primary
 * context; NULL is the legacy default stream. Such a call returns before the work is done, and can be captured in a
 * CUDA graph. */
METALLOID_API metalloid_status metalloid_context_set_stream(metalloid_context *context, void *stream);

/* NULL returns to the default allocator. */
METALLOID_API metalloid_status metalloid_context_set_allocator(metalloid_context *context,
                                                               const metalloid_allocator *allocator);

/* The process-wide thread count: METALLOID_NUM_THREADS where set, else the CPUs of the affinity mask. 0 returns to that. */
METALLOID_API metalloid_status metalloid_set_num_threads(int threads);
METALLOID_API int metalloid_get_num_threads(void);

/* ---- norms -------------------------------------------------------------------------------------------------------- */

/* y = x / sqrt(mean(x^2, last axis) + eps) * weight                        (Zhang & Sennrich 2019, arXiv:1910.07467)
 * x, out: floating, same shape, rank >= 1. weight: floating {H} or NULL. eps: finite, >= 0. out may be x. */
METALLOID_API metalloid_status metalloid_rms_norm(metalloid_context *context, const DLTensor *x, const DLTensor *weight,
                                                  double eps, DLTensor *out);

/* y = (x - mean) / sqrt(var + eps) * weight + bias, biased variance, over the last axis (Ba et al. 2016, arXiv:1607.06450)
 * x, out: floating, same shape, rank >= 1. weight, bias: floating {H}, each may be NULL. eps: finite, >= 0. out may be x. */
METALLOID_API metalloid_status metalloid_layer_norm(metalloid_context *context, const DLTensor *x,
                                                    const DLTensor *weight, const DLTensor *bias, double eps,
                                                    DLTensor *out);

/* sum = x + residual; out = rms_norm(sum, weight, eps), the norm taken from the unrounded sum. Each of sum and out may be x or
 * residual, but not the same one. */
METALLOID_API metalloid_status metalloid_add_rms_norm(metalloid_context *context, const DLTensor *x,
                                                      const DLTensor *residual, const DLTensor *weight, double eps,
                                                      DLTensor *sum, DLTensor *out);

/* sum = x + residual; out = layer_norm(sum, weight, bias, eps), the norm taken from the unrounded sum. Aliases as above. */
METALLOID_API metalloid_status metalloid_add_layer_norm(metalloid_context *context, const DLTensor *x,
                                                        const DLTensor *residual, const DLTensor *weight,
                                                        const DLTensor *bias, double eps, DLTensor *sum, DLTensor *out);

/* ---- rotary position embedding ------------------------------------------------------------------------------------ */

/* The second to last axis ({B, ..., T, D}, as MLX has it) or axis 1 ({B, T, ..., D}, as Bumblebee has it). */
typedef enum metalloid_time_axis {
    METALLOID_TIME_SECOND_TO_LAST = 0,
    METALLOID_TIME_AXIS_1 = 1,
} metalloid_time_axis;

typedef struct metalloid_rope_options {
    size_t size;      /* sizeof(metalloid_rope_options) of the caller; the initializer sets it */
    bool traditional; /* pairs (x[2i], x[2i+1]) instead of (x[i], x[i + dims/2]) */
    metalloid_time_axis time_axis;
    double scale; /* multiplies positions; finite */

    /* Frequencies, exactly one of: */
    double base; /* inv_freq[i] = base^(-2i/dims); finite and > 0, or 0 for none */
    const DLTensor *
        freqs; /* {dims/2} real: inv_freq[i] = 1 / freqs[i] (MLX); +inf leaves its pair unrotated, 0 has no angle: NaN */
    const DLTensor *inv_freqs; /* {dims/2} real (floating or integer), used as given */

    /* Positions, one of (offset is 0 where a tensor is given). Each position lies in int32's range. */
    int64_t offset;               /* position of time step t is offset + t */
    const DLTensor *offsets;      /* {}, {1} or {B}, integer: a start for the batch or for each row of it */
    const DLTensor *position_ids; /* {B, T}, integer: a position for each token, in any order */
} metalloid_rope_options;

#define METALLOID_ROPE_OPTIONS_INIT \
    { sizeof(metalloid_rope_options), false, METALLOID_TIME_SECOND_TO_LAST, 1.0, 10000.0, NULL, NULL, 0, NULL, NULL }

/* Rotates the first `dims` features of the last axis, pair i by the angle position * scale * inv_freq[i]:
 * (x1 cos - x2 sin, x1 sin + x2 cos); the rest passes through.                    (Su et al. 2021, arXiv:2104.09864)
 * x, out: floating, same shape, rank >= 3, batch first. dims: even, 2 <= dims <= D. options NULL: the defaults. out may be x.
 * The angle is formed and reduced in float64, so large positions keep their accuracy. */
METALLOID_API metalloid_status metalloid_rope(metalloid_context *context, const DLTensor *x, int64_t dims,
                                              const metalloid_rope_options *options, DLTensor *out);

/* rms_norm of each head of q and k over D, then rope, in one pass (Qwen3).
 * q, q_out {B, N_q, T, D} and k, k_out {B, N_kv, T, D} (or, by options->time_axis, {B, T, N, D}), floating.
 * q_weight, k_weight: floating {D} or NULL. q_out may be q, k_out may be k. */
METALLOID_API metalloid_status metalloid_qk_norm_rope(metalloid_context *context, const DLTensor *q, const DLTensor *k,
                                                      const DLTensor *q_weight, const DLTensor *k_weight, double eps,
                                                      int64_t dims, const metalloid_rope_options *options,
                                                      DLTensor *q_out, DLTensor *k_out);

/* ---- gated activations -------------------------------------------------------------------------------------------- */

/* silu(gate) * up, silu(x) = x / (1 + exp(-x)).                                        (Shazeer 2020, arXiv:2002.05202)
 * gate, up, out: floating, same shape, any rank. Finite for finite input. out may be gate or up. */
METALLOID_API metalloid_status metalloid_swiglu(metalloid_context *context, const DLTensor *gate, const DLTensor *up,
                                                DLTensor *out);

typedef enum metalloid_gelu {
    METALLOID_GELU_ERF = 0,  /* x/2 (1 + erf(x / sqrt 2)) */
    METALLOID_GELU_TANH = 1, /* x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) */
} metalloid_gelu;

/* gelu(gate) * up (Hendrycks & Gimpel 2016, arXiv:1606.08415; Shazeer 2020). Shapes, dtypes and aliases as for swiglu. */
METALLOID_API metalloid_status metalloid_geglu(metalloid_context *context, const DLTensor *gate, const DLTensor *up,
                                               metalloid_gelu approximate, DLTensor *out);

/* ---- attention ---------------------------------------------------------------------------------------------------- */

#define METALLOID_CAUSAL_OFFSET_DEFAULT INT64_MIN /* T_kv - T_q: the last query sees the last key */

typedef struct metalloid_attention_options {
    size_t size; /* sizeof(metalloid_attention_options) of the caller; the initializer sets it */

    bool causal;           /* query i sees key j when j <= i + causal_offset */
    int64_t causal_offset; /* for causal and window */
    int64_t window; /* w >= 1: query i sees key j only when i + causal_offset - w < j <= i + causal_offset; 0: none */
    double softcap; /* c > 0: scores become c tanh(scores / c) before the mask; 0: none */

    /* Rank <= 4, broadcasts to {B, N_q, T_q, T_kv} without being materialized. bool: false hides. Floating: added to the scaled
     * scores, -inf hides; its dtype promotes to that of q, k, v. Integer: converted and added. */
    const DLTensor *mask;
    const DLTensor *key_mask; /* {B, T_kv}, bool or integer: 0 hides */
    const DLTensor *sinks;    /* {N_q} floating, promotes to the dtype of q, k, v: a logit a head without a value */

    DLTensor
        *logsumexp; /* output {B, N_q, T_q}, float32 (float64 for float64): natural log, over masked scores and sink */
} metalloid_attention_options;

#define METALLOID_ATTENTION_OPTIONS_INIT \
    { sizeof(metalloid_attention_options), false, METALLOID_CAUSAL_OFFSET_DEFAULT, 0, 0.0, NULL, NULL, NULL, NULL }

/* O = softmax(scale Q K^T + mask) V, blocked with an online softmax: no score matrix is stored.
 *                                               (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135)
 * q {B, N_q, T_q, D}, k {B, N_kv, T_kv, D}, v {B, N_kv, T_kv, D_v}, out {B, N_q, T_q, D_v}, floating; N_q a multiple of N_kv:
 * query head h reads key head h / (N_q / N_kv). {B, T, N, D} layouts are the same call with other strides. scale: finite.
 * K and V of a hidden key never affect the result; a query that sees no key gives zeros and logsumexp -inf (or its sink). */
METALLOID_API metalloid_status metalloid_scaled_dot_product_attention(metalloid_context *context, const DLTensor *q,
                                                                      const DLTensor *k, const DLTensor *v,
                                                                      double scale,
                                                                      const metalloid_attention_options *options,
                                                                      DLTensor *out);

/* A decode step: writes new_k, new_v {B, T_q, N_kv, D} into k_cache, v_cache {B, T_max, N_kv, D} at time `offset`, then attends
 * with q {B, T_q, N_q, D} over the caches under key_mask {B, T_max}, bool or integer; out {B, N_q, T_q, D_v}.
 * T_q = 1: every key that key_mask allows; T_q > 1: causal too, with causal_offset = offset. key_mask NULL hides nothing: a
 * single query then sees all T_max keys, also those that are not filled yet. 0 <= offset <= T_max - T_q. new_k and new_v have the caches' dtypes. v may have a head dimension D_v of its own. */
METALLOID_API metalloid_status metalloid_kv_cache_sdpa_update(metalloid_context *context, const DLTensor *q,
                                                              const DLTensor *new_k, const DLTensor *new_v,
                                                              DLTensor *k_cache, DLTensor *v_cache, int64_t offset,
                                                              const DLTensor *key_mask, double scale, DLTensor *out);

/* ---- loss --------------------------------------------------------------------------------------------------------- */

typedef struct metalloid_cross_entropy_options {
    size_t size; /* sizeof(metalloid_cross_entropy_options) of the caller; the initializer sets it */
    bool has_ignore_index;
    int64_t ignore_index; /* rows of this target have loss 0 */
} metalloid_cross_entropy_options;

#define METALLOID_CROSS_ENTROPY_OPTIONS_INIT \
    { sizeof(metalloid_cross_entropy_options), false, 0 }

/* loss = logsumexp(logits, last axis) - logits[..., target].
 * logits {..., V} floating, rank >= 1; targets {...} integer in [0, V); loss {...} floating (float32 in the bindings). One
 * read of the logits. V = 0 with rows to do is an error. options NULL: the defaults. */
METALLOID_API metalloid_status metalloid_cross_entropy(metalloid_context *context, const DLTensor *logits,
                                                       const DLTensor *targets,
                                                       const metalloid_cross_entropy_options *options, DLTensor *loss);

/* ---- gated delta rule --------------------------------------------------------------------------------------------- */

/* For t in order (Yang et al. 2024, arXiv:2412.06464):
 *   S <- S gamma_t;  S <- S + beta_t (v_t - S k_t) k_t^T;  out_t = S q_t
 * q, k {B, T, H_k, D_k}; v, out {B, T, H_v, D_v}; gamma (the decay itself, not its log) {B, T, H_v} or a channel's own
 * {B, T, H_v, D_k}; beta {B, T, H_v}; floating. H_v is a multiple of H_k: value head h reads q/k head h / (H_v / H_k).
 * initial_state {B, H_v, D_v, D_k} floating or NULL (zeros); state {B, H_v, D_v, D_k} float32 or float64, may be
 * initial_state. mask {B, T} bool or integer or NULL: a step of mask 0 leaves S as it was and gives 0. */
METALLOID_API metalloid_status metalloid_gated_delta_update(metalloid_context *context, const DLTensor *q,
                                                            const DLTensor *k, const DLTensor *v, const DLTensor *gamma,
                                                            const DLTensor *beta, const DLTensor *initial_state,
                                                            const DLTensor *mask, DLTensor *out, DLTensor *state);

/* ---- custom kernels ----------------------------------------------------------------------------------------------- */

/* A kernel of the caller's own, written in the Metal Shading Language as for mlx.core.fast.metal_kernel: the body of a function
 * whose signature follows from the arguments of a call. It is compiled for the types of each first call, on the CPU by clang
 * (METALLOID_CXX, else clang++ or clang of PATH), and kept in a private directory of the user's: METALLOID_CACHE, else
 * metalloid in XDG_CACHE_HOME or ~/.cache. A kernel serves any number of threads at once. */
typedef struct metalloid_kernel metalloid_kernel;

typedef enum metalloid_kernel_language {
    METALLOID_KERNEL_METAL = 0,
    METALLOID_KERNEL_CUDA = 1, /* CUDA C++ as for mlx.core.fast.cuda_kernel, on NVIDIA GPUs alone */

    /* PTX or a cubin, as for mlx.core.fast.precompiled_cuda_kernel: `source` is that image and the kernel's name its symbol, whose
     * parameters are a pointer for each input and each output, then the scalars of the call. The names of inputs and outputs are for
     * messages; ensure_row_contiguous, shared_memory and source_length are the options that count. */
    METALLOID_KERNEL_PRECOMPILED = 2,
} metalloid_kernel_language;

typedef enum metalloid_math_mode {
    METALLOID_MATH_SAFE = 0,    /* IEEE: exp(-inf) = 0, NaN stays NaN */
    METALLOID_MATH_RELAXED = 1, /* may reassociate; infinities and NaN still count */
    METALLOID_MATH_FAST = 2,    /* may assume that there are none */
} metalloid_math_mode;

typedef struct metalloid_kernel_options {
    size_t size; /* sizeof(metalloid_kernel_options) of the caller; the initializer sets it */
    metalloid_kernel_language language;
    const char *header;         /* stands before the function; NULL: nothing */
    bool ensure_row_contiguous; /* inputs that are not are copied; else the kernel sees their strides */
    bool atomic_outputs;        /* outputs are `device atomic<T> *` */
    metalloid_math_mode math_mode;

    /* On the CPU: */
    const char *fallback_compiler; /* a C++ compiler where neither METALLOID_CXX nor PATH names one; NULL: none */
    bool debug;              /* -g, no optimization, the generated source kept beside the object: for a debugger */
    bool address_sanitizer;  /* reports accesses out of bounds; its run-time has to be in the process (LD_PRELOAD) */
    int64_t most_iterations; /* all loops of a thread together; a kernel with one more is stopped. 0: no limit */

    int shared_memory;    /* METALLOID_KERNEL_CUDA, _PRECOMPILED: bytes of dynamic shared memory of a block */
    size_t source_length; /* METALLOID_KERNEL_PRECOMPILED: bytes of the image; 0: it is PTX that ends with NUL */
} metalloid_kernel_options;

#define METALLOID_KERNEL_OPTIONS_INIT                                                                                  \
    {                                                                                                                  \
        sizeof(metalloid_kernel_options), METALLOID_KERNEL_METAL, NULL, true, false, METALLOID_MATH_SAFE, NULL, false, \
            false, 0, 0, 0                                                                                             \
    }

/* Names are identifiers of C, none of them twice; at least one output. Nothing is compiled yet. The strings are copied. */
METALLOID_API metalloid_status metalloid_kernel_create(const char *name, const char *const *input_names,
                                                       int input_count, const char *const *output_names,
                                                       int output_count, const char *source,
                                                       const metalloid_kernel_options *options,
                                                       metalloid_kernel **kernel);
METALLOID_API void metalloid_kernel_destroy(metalloid_kernel *kernel); /* NULL is fine; no launch may be under way */

typedef enum metalloid_template_kind {
    METALLOID_TEMPLATE_INT = 0,
    METALLOID_TEMPLATE_BOOL = 1,
    METALLOID_TEMPLATE_DTYPE = 2,
} metalloid_template_kind;

typedef struct metalloid_template_argument {
    const char *name; /* an identifier, and no input's or output's */
    metalloid_template_kind kind;
    int64_t value; /* of an int (in its range) or a bool */
    DLDataType dtype;
} metalloid_template_argument;

typedef enum metalloid_scalar_kind {
    METALLOID_SCALAR_INT = 0,   /* bool too; as wide as the kernel's parameter, in whose range it is */
    METALLOID_SCALAR_FLOAT = 1, /* float, or double where the kernel's parameter is one */
} metalloid_scalar_kind;

typedef struct metalloid_kernel_scalar {
    metalloid_scalar_kind kind;
    int64_t integer;
    double real;
} metalloid_kernel_scalar;

typedef struct metalloid_kernel_call {
    size_t size;                   /* sizeof(metalloid_kernel_call) of the caller; the initializer sets it */
    int input_count, output_count; /* as many as the kernel has names */

    /* bool, integer, floating or complex64, any rank; one of rank 0 is a reference in the kernel. Outputs are row-contiguous and
     * overlap nothing; any shape. */
    const DLTensor *const *inputs;
    DLTensor *const *outputs;

    /* Threads in all and in a threadgroup, along x, y, z: at least 1. A threadgroup is cut to the grid, then has at most 1024
     * threads; those at the edges are smaller where the grid is no multiple. In CUDA C++ and precompiled all are whole, have at
     * most 64 threads along z, and are at most 65535 along y and along z. */
    int64_t grid[3], threadgroup[3];

    int template_count;
    const metalloid_template_argument *template_arguments; /* in the order of the template's parameters */
    bool has_init_value;
    double init_value; /* outputs are filled with it first */

    const metalloid_kernel_scalar *scalars; /* METALLOID_KERNEL_PRECOMPILED */
    int64_t scalar_count;

    /* On the CPU, or NULL: once it is no longer 0, which a signal's handler may see to, the call ends with METALLOID_KERNEL_FAILED at
     * the next threadgroup or the next place where threads meet; at any loop of a kernel with most_iterations. */
    const volatile int *interrupted;
} metalloid_kernel_call;

#define METALLOID_KERNEL_CALL_INIT \
    { sizeof(metalloid_kernel_call), 0, 0, NULL, NULL, {1, 1, 1}, {1, 1, 1}, 0, NULL, false, 0.0, NULL, 0, NULL }

/* Compiles where this is the first call with such types, and runs. Nothing is written by a call that fails before the kernel
 * runs: every status but METALLOID_KERNEL_FAILED. */
METALLOID_API metalloid_status metalloid_kernel_launch(metalloid_context *context, metalloid_kernel *kernel,
                                                       const metalloid_kernel_call *call);

/* The Metal source of such a call with its generated signature, as MLX makes it; or, `translated`, the C++ that is compiled. Writes
 * at most `capacity` bytes, the last one NUL, to `text` (which may be NULL for a capacity of 0) and the length without NUL to
 * `length`. Outputs and inputs are looked at for their types alone. */
METALLOID_API metalloid_status metalloid_kernel_source(metalloid_kernel *kernel, const metalloid_kernel_call *call,
                                                       bool translated, char *text, size_t capacity, size_t *length);

#ifdef __cplusplus
}
#endif

#endif
