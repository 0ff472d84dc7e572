/* The operations as Python functions. SPDX-License-Identifier: MIT
 *
 * Each reads its arguments, allocates the results that the caller did not bring, and calls the C function, which checks everything
 * else. The dtype of a result is MLX's. Parameters of mlx.core.fast keep their names, order and defaults; `stream` and `force_fused`
 * are accepted for its callers: work on a GPU goes to the stream that the arrays' library has current, and every kernel is fused. */
#include "functions.h"

#include "call.h"
#include "route.h"

#define SIGNATURE PyObject *module, PyObject *const *arguments, Py_ssize_t given, PyObject *keywords

#define FUNCTION(name)                                                                     \
    static PyObject *name##_here(SIGNATURE);                                               \
    static PyObject *name(SIGNATURE) {                                                     \
        PyObject *result;                                                                  \
        if (route_call(module, #name, arguments, given, keywords, &result)) return result; \
        return name##_here(module, arguments, given, keywords);                            \
    }                                                                                      \
    static PyObject *name##_here(SIGNATURE)

#define ARRAYS                                                                                                       \
    "Arrays are NumPy's (bfloat16 from ml_dtypes), PyTorch's, or any other library's with __dlpack__; "              \
    "none is\n"                                                                                                      \
    "copied, any strides will do. A floating dtype is float32, float16, bfloat16 or float64; arithmetic is float32 " \
    "inside\n"                                                                                                       \
    "(float64 where an array is) and rounded once. Results come in the library of the first array, unless `out` "    \
    "takes them:\n"                                                                                                  \
    "writable, of the same shape, of any floating dtype.\n"

#define STREAM_IGNORED "`stream` is ignored.\n"

#define ERRORS                                                                                                      \
    "\n"                                                                                                            \
    "Raises ValueError for a dtype, rank, shape or value that is refused, with nothing written; TypeError for "     \
    "arguments that\n"                                                                                              \
    "the signature does not have; MemoryError; RuntimeError for arrays on a device that this build has no kernels " \
    "for.\n"

/* ---- norms ------------------------------------------------------------------------------------------------------------- */

#define RMS_NORM_DOC                                                                                                  \
    "rms_norm($module, x, weight, eps, *, out=None, stream=None)\n--\n\n"                                             \
    "Root mean square norm over the last axis: x / sqrt(mean(x**2) + eps) * weight.\n"                                \
    "\n"                                                                                                              \
    "x: floating, rank 1 or more. weight: floating, {length of the last axis}, or None. eps: finite, not negative.\n" \
    "Returns an array of x's shape, x and weight promoted. `out` may be x.\n"                                         \
    "\n" ARRAYS STREAM_IGNORED ERRORS "\n"                                                                            \
    ">>> import numpy as np\n"                                                                                        \
    ">>> rms_norm(np.array([[3.0, 4.0]], np.float32), None, 0.0)\n"                                                   \
    "array([[0.84852815, 1.1313709 ]], dtype=float32)\n"

FUNCTION(rms_norm) {
    enum { X, WEIGHT, EPS, OUT, STREAM };
    static const mtl_signature signature = {"rms_norm", 3, 3, {"x", "weight", "eps", "out", "stream"}};
    mtl_call call;
    call_begin(&call, module, &signature, arguments, given, keywords);
    const DLTensor *x = call_array(&call, X), *weight = call_optional_array(&call, WEIGHT);
    double eps = call_real(&call, EPS, 0);
    if (call.failed) return call_end(&call);

    DLDataType dtype = weight ? dtype_promote(x->dtype, weight->dtype) : x->dtype;
    DLTensor *out = call_result(&call, OUT, x, dtype, x->ndim, x->shape);
    CALL_RUN(&call, metalloid_rms_norm(call.context, x, weight, eps, out));
    return call_end(&call);
}

static DLDataType layer_norm_dtype(DLDataType dtype, const DLTensor *weight, const DLTensor *bias) {
    if (!weight) return dtype;
    dtype = dtype_promote(dtype, weight->dtype);
    return bias ? dtype_promote(dtype, bias->dtype) : dtype;
}

#define LAYER_NORM_DOC                                                                                           \
    "layer_norm($module, x, weight, bias, eps, *, out=None, stream=None)\n--\n\n"                                \
    "Layer norm over the last axis: (x - mean) / sqrt(variance + eps) * weight + bias, the variance biased.\n"   \
    "\n"                                                                                                         \
    "x: floating, rank 1 or more. weight, bias: floating, {length of the last axis}, or None. eps: finite, not " \
    "negative.\n"                                                                                                \
    "Returns an array of x's shape; x, weight and, where there is a weight, bias promoted. `out` may be x.\n"    \
    "\n" ARRAYS STREAM_IGNORED ERRORS "\n"                                                                       \
    ">>> import numpy as np\n"                                                                                   \
    ">>> layer_norm(np.array([[1.0, 3.0]], np.float32), None, None, 0.0)\n"                                      \
    "array([[-1.,  1.]], dtype=float32)\n"

FUNCTION(layer_norm) {
    enum { X, WEIGHT, BIAS, EPS, OUT, STREAM };
    static const mtl_signature signature = {"layer_norm", 4, 4, {"x", "weight", "bias", "eps", "out", "stream"}};
    mtl_call call;
    call_begin(&call, module, &signature, arguments, given, keywords);
    const DLTensor *x = call_array(&call, X);
    const DLTensor *weight = call_optional_array(&call, WEIGHT), *bias = call_optional_array(&call, BIAS);
    double eps = call_real(&call, EPS, 0);
    if (call.failed) return call_end(&call);

    DLTensor *out = call_result(&call, OUT, x, layer_norm_dtype(x->dtype, weight, bias), x->ndim, x->shape);
    CALL_RUN(&call, metalloid_layer_norm(call.context, x, weight, bias, eps, out));
    return call_end(&call);
}

#define ADD_RMS_NORM_DOC                                                                                            \
    "add_rms_norm($module, x, residual, weight, eps, *, out=None)\n--\n\n"                                          \
    "x + residual and its rms_norm, in one pass; the norm is taken from the unrounded sum.\n"                       \
    "\n"                                                                                                            \
    "x, residual: floating, same shape, rank 1 or more. weight: floating, {length of the last axis}, or None.\n"    \
    "Returns (sum, norm): x and residual promoted, and with weight. `out` is a tuple of the two; each may be x or " \
    "residual.\n"                                                                                                   \
    "\n" ARRAYS ERRORS "\n"                                                                                         \
    ">>> import numpy as np\n"                                                                                      \
    ">>> total, norm = add_rms_norm(np.array([1.0, 1.0]), np.array([2.0, 3.0]), None, 0.0)\n"                       \
    ">>> total\n"                                                                                                   \
    "array([3., 4.])\n"                                                                                             \
    ">>> norm.round(4)\n"                                                                                           \
    "array([0.8485, 1.1314])\n"

FUNCTION(add_rms_norm) {
    enum { X, RESIDUAL, WEIGHT, EPS, OUT };
    static const mtl_signature signature = {"add_rms_norm", 4, 4, {"x", "residual", "weight", "eps", "out"}};
    mtl_call call;
    call_begin(&call, module, &signature, arguments, given, keywords);
    const DLTensor *x = call_array(&call, X), *residual = call_array(&call, RESIDUAL),
                   *weight = call_optional_array(&call, WEIGHT);
    double eps = call_real(&call, EPS, 0);
    if (call.failed) return call_end(&call);

    DLDataType dtype = dtype_promote(x->dtype, residual->dtype);
    DLTensor *sum = call_result_of_two(&call, OUT, 0, x, dtype, x->ndim, x->shape);
    if (weight) dtype = dtype_promote(dtype, weight->dtype);
    DLTensor *out = call_result_of_two(&call, OUT, 1, x, dtype, x->ndim, x->shape);
    CALL_RUN(&call, metalloid_add_rms_norm(call.context, x, residual, weight, eps, sum, out));
    return call_end(&call);
}

#define ADD_LAYER_NORM_DOC                                                                                             \
    "add_layer_norm($module, x, residual, weight, bias, eps, *, out=None)\n--\n\n"                                     \
    "x + residual and its layer_norm, in one pass; the norm is taken from the unrounded sum.\n"                        \
    "\n"                                                                                                               \
    "x, residual: floating, same shape, rank 1 or more. weight, bias: floating, {length of the last axis}, or None.\n" \
    "Returns (sum, norm): x and residual promoted, and as layer_norm does from there. `out` is a tuple of the two; "   \
    "each may be\n"                                                                                                    \
    "x or residual.\n"                                                                                                 \
    "\n" ARRAYS ERRORS "\n"                                                                                            \
    ">>> import numpy as np\n"                                                                                         \
    ">>> add_layer_norm(np.array([1.0, 1.0]), np.array([0.0, 2.0]), None, None, 0.0)\n"                                \
    "(array([1., 3.]), array([-1.,  1.]))\n"

FUNCTION(add_layer_norm) {
    enum { X, RESIDUAL, WEIGHT, BIAS, EPS, OUT };
    static const mtl_signature signature = {"add_layer_norm", 5, 5, {"x", "residual", "weight", "bias", "eps", "out"}};
    mtl_call call;
    call_begin(&call, module, &signature, arguments, given, keywords);
    const DLTensor *x = call_array(&call, X), *residual = call_array(&call, RESIDUAL);
    const DLTensor *weight = call_optional_array(&call, WEIGHT), *bias = call_optional_array(&call, BIAS);
    double eps = call_real(&call, EPS, 0);
    if (call.failed) return call_end(&call);

    DLDataType dtype = dtype_promote(x->dtype, residual->dtype);
    DLTensor *sum = call_result_of_two(&call, OUT, 0, x, dtype, x->ndim, x->shape);
    DLTensor *out = call_result_of_two(&call, OUT, 1, x, layer_norm_dtype(dtype, weight, bias), x->ndim, x->shape);
    CALL_RUN(&call, metalloid_add_layer_norm(call.context, x, residual, weight, bias, eps, sum, out));
    return call_end(&call);
}

/* ---- rotary position embedding ------------------------------------------------------------------------------------------ */

#define ROPE_PARAMETERS \
    "traditional", "base", "scale", "offset", "freqs", "position_ids", "inv_freqs", "time_axis", "out"
enum {
    ROPE_TRADITIONAL,
    ROPE_BASE,
    ROPE_SCALE,
    ROPE_OFFSET,
    ROPE_FREQS,
    ROPE_POSITION_IDS,
    ROPE_INV_FREQS,
    ROPE_TIME_AXIS,
    ROPE_OUT
};

/* The parameters ROPE_PARAMETERS, the first of which stands at `first`. */
static metalloid_rope_options rope_options(mtl_call *call, int first, int rank) {
    metalloid_rope_options options = METALLOID_ROPE_OPTIONS_INIT;
    const char *name = call->signature->name;
    options.traditional = call_bool(call, first + ROPE_TRADITIONAL);
    options.base = call_has(call, first + ROPE_BASE) ? call_real(call, first + ROPE_BASE, 0) : 0;
    options.scale = call_real(call, first + ROPE_SCALE, 1);
    if (!call->failed && call_has(call, first + ROPE_BASE) && options.base == 0) {
        call_fail(call, PyExc_ValueError, "%s: base must be finite and positive, got 0", name);
    }
    if (call_is_integer(call, first + ROPE_OFFSET)) options.offset = call_integer(call, first + ROPE_OFFSET, 0);
    else if (call_is_array(call, first + ROPE_OFFSET)) options.offsets = call_array(call, first + ROPE_OFFSET);
    else call_refuse_type(call, first + ROPE_OFFSET, "an integer or an array of integers");
    options.freqs = call_optional_array(call, first + ROPE_FREQS);
    options.position_ids = call_optional_array(call, first + ROPE_POSITION_IDS);
    options.inv_freqs = call_optional_array(call, first + ROPE_INV_FREQS);

    int64_t axis = call_integer(call, first + ROPE_TIME_AXIS, -2);
    if (call->failed) return options;
    /* Here, since None and an offset that is an array have other names in C. */
    int sources = call_has(call, first + ROPE_BASE) + (options.freqs != NULL) + (options.inv_freqs != NULL);
    if (sources != 1) {
        call_fail(call, PyExc_ValueError,
                  "%s: exactly one of base, freqs and inv_freqs must be given, the others be None, got %d", name,
                  sources);
    } else if (options.position_ids && (options.offset != 0 || options.offsets)) {
        call_fail(call, PyExc_ValueError, "%s: offset must be 0 where position_ids are given", name);
    }
    if (axis == -2 || axis == rank - 2) options.time_axis = METALLOID_TIME_SECOND_TO_LAST;
    else if (axis == 1 || axis == 1 - rank) options.time_axis = METALLOID_TIME_AXIS_1;
    else
        call_fail(call, PyExc_ValueError, "%s: time_axis must be -2, the second to last, or 1, got %lld", name,
                  (long long)axis);
    return options;
}

#define ROPE_ARGUMENTS                                                                                                \
    "traditional: pairs (x[2i], x[2i+1]) instead of (x[i], x[i + dims/2]).\n"                                         \
    "base: of the inverse frequencies base**(-2i/dims), finite and positive; None with freqs or inv_freqs.\n"         \
    "scale: multiplies positions.\n"                                                                                  \
    "offset: position of the first time step, an integer, or an integer array {}, {1} or {B}; 0 with position_ids.\n" \
    "freqs: real, {dims/2}, inverse frequencies are 1/freqs. inv_freqs: real, {dims/2}, used as given.\n"             \
    "position_ids: integer, {B, T}, a position for each token in any order.\n"                                        \
    "time_axis: where time stands, -2 ({B, ..., T, D}) or 1 ({B, T, ..., D}).\n"

#define ROPE_DOC                                                                                                     \
    "rope($module, a, dims, *, traditional, base, scale, offset, freqs=None, position_ids=None, inv_freqs=None, "    \
    "time_axis=-2, out=None, stream=None)\n--\n\n"                                                                   \
    "Rotary position embedding: pair i of the first `dims` features turns by position * scale * inv_freq[i].\n"      \
    "\n"                                                                                                             \
    "a: floating, rank 3 or more, batch first. dims: even, 2 to the length of the last axis; further features pass " \
    "through.\n" ROPE_ARGUMENTS "Returns an array of a's shape and dtype. Angles are float64 inside, so that large " \
    "positions stay exact. `out` may be a.\n"                                                                        \
    "\n" ARRAYS STREAM_IGNORED ERRORS "\n"                                                                           \
    ">>> import numpy as np\n"                                                                                       \
    ">>> x = np.ones((1, 2, 2), np.float32)\n"                                                                       \
    ">>> rope(x, 2, traditional=False, base=10000.0, scale=1.0, offset=0).round(4)\n"                                \
    "array([[[ 1.    ,  1.    ],\n"                                                                                  \
    "        [-0.3012,  1.3818]]], dtype=float32)\n"

FUNCTION(rope) {
    enum { A, DIMS, OPTIONS, OUT = OPTIONS + ROPE_OUT, STREAM };
    static const mtl_signature signature = {
        "rope", 2, OPTIONS + ROPE_OFFSET + 1, {"a", "dims", ROPE_PARAMETERS, "stream"}};
    mtl_call call;
    call_begin(&call, module, &signature, arguments, given, keywords);
    const DLTensor *a = call_array(&call, A);
    int64_t dims = call_integer(&call, DIMS, 0);
    if (call.failed) return call_end(&call);
    metalloid_rope_options options = rope_options(&call, OPTIONS, a->ndim);
    DLTensor *out = call_result(&call, OUT, a, a->dtype, a->ndim, a->shape);
    CALL_RUN(&call, metalloid_rope(call.context, a, dims, &options, out));
    return call_end(&call);
}

#define QK_NORM_ROPE_DOC                                                                                             \
    "qk_norm_rope($module, q, k, q_weight, k_weight, eps, dims, *, traditional, base, scale, offset, freqs=None, "   \
    "position_ids=None, inv_freqs=None, time_axis=-2, out=None)\n--\n\n"                                             \
    "rms_norm of each head of q and k, then rope, in one pass (as in Qwen3).\n"                                      \
    "\n"                                                                                                             \
    "q: floating, {B, N_q, T, D}. k: floating, {B, N_kv, T, D}; {B, T, N, D} with time_axis=1. q_weight, k_weight: " \
    "floating,\n"                                                                                                    \
    "{D}, or None. eps: finite, not negative. dims: even, 2 to D.\n" ROPE_ARGUMENTS                                  \
    "Returns (q, k): each promoted with its weight. `out` is a tuple of the two; they may be q and k.\n"             \
    "\n" ARRAYS ERRORS "\n"                                                                                          \
    ">>> import numpy as np\n"                                                                                       \
    ">>> q, k = np.full((1, 2, 1, 2), 3.0), np.full((1, 1, 1, 2), 5.0)\n"                                            \
    ">>> q, k = qk_norm_rope(q, k, None, None, 0.0, 2, traditional=False, base=10000.0, scale=1.0, offset=0)\n"      \
    ">>> q.ravel(), k.ravel()\n"                                                                                     \
    "(array([1., 1., 1., 1.]), array([1., 1.]))\n"

FUNCTION(qk_norm_rope) {
    enum { Q, K, Q_WEIGHT, K_WEIGHT, EPS, DIMS, OPTIONS, OUT = OPTIONS + ROPE_OUT };
    static const mtl_signature signature = {"qk_norm_rope",
                                            6,
                                            OPTIONS + ROPE_OFFSET + 1,
                                            {"q", "k", "q_weight", "k_weight", "eps", "dims", ROPE_PARAMETERS}};
    mtl_call call;
    call_begin(&call, module, &signature, arguments, given, keywords);
    const DLTensor *q = call_array(&call, Q), *k = call_array(&call, K);
    const DLTensor *q_weight = call_optional_array(&call, Q_WEIGHT), *k_weight = call_optional_array(&call, K_WEIGHT);
    double eps = call_real(&call, EPS, 0);
    int64_t dims = call_integer(&call, DIMS, 0);
    if (call.failed) return call_end(&call);
    metalloid_rope_options options = rope_options(&call, OPTIONS, q->ndim);
    DLDataType q_dtype = q_weight ? dtype_promote(q->dtype, q_weight->dtype) : q->dtype;
    DLDataType k_dtype = k_weight ? dtype_promote(k->dtype, k_weight->dtype) : k->dtype;
    DLTensor *q_out = call_result_of_two(&call, OUT, 0, q, q_dtype, q->ndim, q->shape);
    DLTensor *k_out = call_result_of_two(&call, OUT, 1, k, k_dtype, k->ndim, k->shape);
    CALL_RUN(&call, metalloid_qk_norm_rope(call.context, q, k, q_weight, k_weight, eps, dims, &options, q_out, k_out));
    return call_end(&call);
}

/* ---- gated activations ---------------------------------------------------------------------------------------------------- */

#define SWIGLU_DOC                                                                                                   \
    "swiglu($module, gate, up, *, out=None)\n--\n\n"                                                                 \
    "silu(gate) * up, where silu(x) = x / (1 + exp(-x)).\n"                                                          \
    "\n"                                                                                                             \
    "gate, up: floating, same shape, any rank. Returns an array of that shape, both promoted. `out` may be gate or " \
    "up.\n"                                                                                                          \
    "\n" ARRAYS ERRORS "\n"                                                                                          \
    ">>> import numpy as np\n"                                                                                       \
    ">>> swiglu(np.array([0.0, 1.0]), np.array([5.0, 2.0])).round(4)\n"                                              \
    "array([0.    , 1.4621])\n"

FUNCTION(swiglu) {
    enum { GATE, UP, OUT };
    static const mtl_signature signature = {"swiglu", 2, 2, {"gate", "up", "out"}};
    mtl_call call;
    call_begin(&call, module, &signature, arguments, given, keywords);
    const DLTensor *gate = call_array(&call, GATE), *up = call_array(&call, UP);
    if (call.failed) return call_end(&call);

    DLTensor *out = call_result(&call, OUT, gate, dtype_promote(gate->dtype, up->dtype), gate->ndim, gate->shape);
    CALL_RUN(&call, metalloid_swiglu(call.context, gate, up, out));
    return call_end(&call);
}

#define GEGLU_DOC                                                                                                    \
    "geglu($module, gate, up, *, approximate='none', out=None)\n--\n\n"                                              \
    "gelu(gate) * up; gelu(x) is x/2 (1 + erf(x / sqrt 2)), or with approximate='tanh' that of tanh.\n"              \
    "\n"                                                                                                             \
    "gate, up: floating, same shape, any rank. Returns an array of that shape, both promoted. `out` may be gate or " \
    "up.\n"                                                                                                          \
    "\n" ARRAYS ERRORS "\n"                                                                                          \
    ">>> import numpy as np\n"                                                                                       \
    ">>> geglu(np.array([0.0, 1.0]), np.array([5.0, 2.0])).round(4)\n"                                               \
    "array([0.    , 1.6827])\n"

FUNCTION(geglu) {
    enum { GATE, UP, APPROXIMATE, OUT };
    static const mtl_signature signature = {"geglu", 2, 2, {"gate", "up", "approximate", "out"}};
    mtl_call call;
    call_begin(&call, module, &signature, arguments, given, keywords);
    const DLTensor *gate = call_array(&call, GATE), *up = call_array(&call, UP);
    PyObject *approximate = call.failed ? NULL : call.given[APPROXIMATE];
    metalloid_gelu gelu = METALLOID_GELU_ERF;
    if (approximate && !PyUnicode_Check(approximate)) {
        call_refuse_type(&call, APPROXIMATE, "'none' or 'tanh'");
    } else if (approximate && PyUnicode_CompareWithASCIIString(approximate, "tanh") == 0) {
        gelu = METALLOID_GELU_TANH;
    } else if (approximate && PyUnicode_CompareWithASCIIString(approximate, "none") != 0) {
        call_fail(&call, PyExc_ValueError, "geglu: approximate must be 'none' or 'tanh', got %R", approximate);
    }
    if (call.failed) return call_end(&call);

    DLTensor *out = call_result(&call, OUT, gate, dtype_promote(gate->dtype, up->dtype), gate->ndim, gate->shape);
    CALL_RUN(&call, metalloid_geglu(call.context, gate, up, gelu, out));
    return call_end(&call);
}

/* ---- attention -------------------------------------------------------------------------------------------------------------- */

#define SCALED_DOT_PRODUCT_ATTENTION_DOC                                                                            \
    "scaled_dot_product_attention($module, q, k, v, *, scale, mask=None, sinks=None, force_fused=False, "           \
    "causal=False, "                                                                                                \
    "key_mask=None, window=None, softcap=None, causal_offset=None, return_logsumexp=False, out=None, "              \
    "stream=None)\n--\n\n"                                                                                          \
    "softmax(scale * q @ k.T + mask) @ v, without storing the scores.\n"                                            \
    "\n"                                                                                                            \
    "q: floating, {B, N_q, T_q, D}. k: floating, {B, N_kv, T_kv, D}. v: floating, {B, N_kv, T_kv, D_v}. N_q is a "  \
    "multiple of\n"                                                                                                 \
    "N_kv. What hides keys combines freely; a query that sees none gives zeros.\n"                                  \
    "scale: finite, multiplies the scores.\n"                                                                       \
    "mask: None, 'causal' (as causal=True), or an array that broadcasts to {B, N_q, T_q, T_kv}: bool, where False " \
    "hides, or\n"                                                                                                   \
    "real, added to the scores.\n"                                                                                  \
    "sinks: floating, {N_q}, a logit a head without a value.\n"                                                     \
    "causal: query i sees key j when j <= i + causal_offset, which is T_kv - T_q where not given.\n"                \
    "key_mask: bool or integer, {B, T_kv}, 0 hides.\n"                                                              \
    "window: query i sees only the last `window` keys up to i + causal_offset.\n"                                   \
    "softcap: scores become softcap * tanh(scores / softcap) before the mask.\n"                                    \
    "Returns {B, N_q, T_q, D_v}, q, k and v promoted; with return_logsumexp=True (out, logsumexp), the latter {B, " \
    "N_q, T_q}\n"                                                                                                   \
    "and float32 (float64 for float64), `out` then a tuple of the two. `force_fused` changes nothing.\n"            \
    "\n" ARRAYS STREAM_IGNORED ERRORS "\n"                                                                          \
    ">>> import numpy as np\n"                                                                                      \
    ">>> q = k = np.zeros((1, 1, 2, 4), np.float32)\n"                                                              \
    ">>> v = np.array([[[[1.0], [3.0]]]], np.float32)\n"                                                            \
    ">>> scaled_dot_product_attention(q, k, v, scale=0.5, mask='causal').ravel()\n"                                 \
    "array([1., 2.], dtype=float32)\n"

FUNCTION(scaled_dot_product_attention) {
    enum {
        Q,
        K,
        V,
        SCALE,
        MASK,
        SINKS,
        FORCE_FUSED,
        CAUSAL,
        KEY_MASK,
        WINDOW,
        SOFTCAP,
        CAUSAL_OFFSET,
        RETURN_LOGSUMEXP,
        OUT,
        STREAM
    };
    static const mtl_signature signature = {"scaled_dot_product_attention",
                                            3,
                                            4,
                                            {"q", "k", "v", "scale", "mask", "sinks", "force_fused", "causal",
                                             "key_mask", "window", "softcap", "causal_offset", "return_logsumexp",
                                             "out", "stream"}};
    mtl_call call;
    call_begin(&call, module, &signature, arguments, given, keywords);
    const DLTensor *q = call_array(&call, Q), *k = call_array(&call, K), *v = call_array(&call, V);
    double scale = call_real(&call, SCALE, 0);
    metalloid_attention_options options = METALLOID_ATTENTION_OPTIONS_INIT;
    options.causal = call_bool(&call, CAUSAL);
    if (!call.failed && call_has(&call, MASK) && PyUnicode_Check(call.given[MASK])) {
        options.causal = PyUnicode_CompareWithASCIIString(call.given[MASK], "causal") == 0;
        if (!options.causal) {
            call_fail(&call, PyExc_ValueError, "%s: mask must be 'causal', an array or None, got %R", signature.name,
                      call.given[MASK]);
        }
    } else {
        options.mask = call_optional_array(&call, MASK);
    }
    options.sinks = call_optional_array(&call, SINKS);
    call_bool(&call, FORCE_FUSED);
    options.key_mask = call_optional_array(&call, KEY_MASK);
    options.window = call_integer(&call, WINDOW, 0);
    options.softcap = call_real(&call, SOFTCAP, 0);
    options.causal_offset = call_integer(&call, CAUSAL_OFFSET, METALLOID_CAUSAL_OFFSET_DEFAULT);
    bool with_logsumexp = call_bool(&call, RETURN_LOGSUMEXP);
    if (call.failed) return call_end(&call);
    /* Values that C takes for "none", where None says that here. */
    if (call_has(&call, WINDOW) && options.window == 0) {
        call_fail(&call, PyExc_ValueError, "%s: window must be 1 or more, got 0", signature.name);
    }
    if (call_has(&call, SOFTCAP) && options.softcap == 0) {
        call_fail(&call, PyExc_ValueError, "%s: softcap must be finite and positive, got 0", signature.name);
    }
    if (call_has(&call, CAUSAL_OFFSET) && options.causal_offset == METALLOID_CAUSAL_OFFSET_DEFAULT)
        options.causal_offset++;

    DLDataType dtype = dtype_promote(dtype_promote(q->dtype, k->dtype), v->dtype);
    int64_t shape[MAX_RANK];
    memcpy(shape, q->shape, (size_t)q->ndim * sizeof shape[0]);
    if (q->ndim == 4 && v->ndim == 4) shape[3] = v->shape[3];
    DLTensor *out;
    if (with_logsumexp) {
        out = call_result_of_two(&call, OUT, 0, q, dtype, q->ndim, shape);
        bool in_double = dtype_is_double(q) || dtype_is_double(k) || dtype_is_double(v) || dtype_is_double(out);
        options.logsumexp = call_result_of_two(&call, OUT, 1, q, in_double ? dtype_float64 : dtype_float32,
                                               q->ndim < 3 ? q->ndim : 3, q->shape);
    } else {
        out = call_result(&call, OUT, q, dtype, q->ndim, shape);
    }
    CALL_RUN(&call, metalloid_scaled_dot_product_attention(call.context, q, k, v, scale, &options, out));
    return call_end(&call);
}

/* The only element of an integer array {} or {1}. */
static int64_t single_integer(mtl_call *call, int parameter) {
    const DLTensor *tensor = call_array(call, parameter);
    if (!tensor) return 0;
    bool single = tensor->ndim == 0 || (tensor->ndim == 1 && tensor->shape[0] == 1);
    int bits = tensor->dtype.bits;
    bool integer = (tensor->dtype.code == kDLInt || tensor->dtype.code == kDLUInt) && tensor->dtype.lanes == 1 &&
                   (bits == 8 || bits == 16 || bits == 32 || bits == 64);
    if (!single || !integer || !tensor->data || tensor->device.device_type != kDLCPU) {
        call_fail(call, PyExc_ValueError, "%s: %s must be an integer or an integer array {} or {1} on the CPU",
                  call->signature->name, call->signature->parameters[parameter]);
        return 0;
    }
    const char *element = (const char *)tensor->data + tensor->byte_offset;
    bool is_signed = tensor->dtype.code == kDLInt;
    union {
        int8_t i8;
        int16_t i16;
        int32_t i32;
        int64_t i64;
        uint8_t u8;
        uint16_t u16;
        uint32_t u32;
        uint64_t u64;
    } value;
    memcpy(&value, element, (size_t)bits / 8);
    switch (bits) {
    case 8: return is_signed ? value.i8 : value.u8;
    case 16: return is_signed ? value.i16 : value.u16;
    case 32: return is_signed ? value.i32 : (int64_t)value.u32;
    default: return is_signed || value.u64 <= INT64_MAX ? value.i64 : INT64_MAX;
    }
}

#define KV_CACHE_SDPA_UPDATE_DOC                                                                                      \
    "kv_cache_sdpa_update($module, q, new_k, new_v, k_cache, v_cache, offset, key_mask, scale, *, out=None)\n--\n\n"  \
    "A decode step: writes new_k and new_v into the caches at time `offset`, then attends over the caches.\n"         \
    "\n"                                                                                                              \
    "q: floating, {B, T_q, N_q, D}. new_k: {B, T_q, N_kv, D}, new_v: {B, T_q, N_kv, D_v}, of the caches' dtypes.\n"   \
    "k_cache: floating, {B, T_max, N_kv, D}, v_cache: {B, T_max, N_kv, D_v}: both writable, and updated in place.\n"  \
    "offset: 0 to T_max - T_q, an integer or an integer array {} or {1}.\n"                                           \
    "key_mask: bool or integer, {B, T_max}, 0 hides; None hides nothing, not even what is not filled yet. With more " \
    "than one\n"                                                                                                      \
    "query each sees the keys up to its own only. scale: finite, multiplies the scores.\n"                            \
    "Returns {B, N_q, T_q, D_v}, q and the caches promoted.\n"                                                        \
    "\n" ARRAYS ERRORS "\n"                                                                                           \
    ">>> import numpy as np\n"                                                                                        \
    ">>> q = new_k = np.zeros((1, 1, 1, 2), np.float32)\n"                                                            \
    ">>> k_cache, v_cache = np.zeros((1, 4, 1, 2), np.float32), np.full((1, 4, 1, 2), 3.0, np.float32)\n"             \
    ">>> visible = np.array([[True, True, False, False]])\n"                                                          \
    ">>> kv_cache_sdpa_update(q, new_k, np.full_like(new_k, 5.0), k_cache, v_cache, 1, visible, 1.0).ravel()\n"       \
    "array([4., 4.], dtype=float32)\n"                                                                                \
    ">>> v_cache[0, :, 0, 0]\n"                                                                                       \
    "array([3., 5., 3., 3.], dtype=float32)\n"

FUNCTION(kv_cache_sdpa_update) {
    enum { Q, NEW_K, NEW_V, K_CACHE, V_CACHE, OFFSET, KEY_MASK, SCALE, OUT };
    static const mtl_signature signature = {
        "kv_cache_sdpa_update",
        8,
        8,
        {"q", "new_k", "new_v", "k_cache", "v_cache", "offset", "key_mask", "scale", "out"}};
    mtl_call call;
    call_begin(&call, module, &signature, arguments, given, keywords);
    const DLTensor *q = call_array(&call, Q), *new_k = call_array(&call, NEW_K), *new_v = call_array(&call, NEW_V);
    DLTensor *k_cache = call_writable_array(&call, K_CACHE), *v_cache = call_writable_array(&call, V_CACHE);
    int64_t offset = 0;
    if (call_is_integer(&call, OFFSET)) offset = call_integer(&call, OFFSET, 0);
    else if (call_is_array(&call, OFFSET)) offset = single_integer(&call, OFFSET);
    else call_refuse_type(&call, OFFSET, "an integer or an integer array");
    const DLTensor *key_mask = call_optional_array(&call, KEY_MASK);
    double scale = call_real(&call, SCALE, 0);
    if (call.failed) return call_end(&call);

    int64_t shape[MAX_RANK];
    memcpy(shape, q->shape, (size_t)q->ndim * sizeof shape[0]);
    if (q->ndim == 4 && v_cache->ndim == 4) {
        shape[1] = q->shape[2];
        shape[2] = q->shape[1];
        shape[3] = v_cache->shape[3];
    }
    DLDataType dtype = dtype_promote(dtype_promote(q->dtype, k_cache->dtype), v_cache->dtype);
    DLTensor *out = call_result(&call, OUT, q, dtype, q->ndim, shape);
    CALL_RUN(&call, metalloid_kv_cache_sdpa_update(call.context, q, new_k, new_v, k_cache, v_cache, offset, key_mask,
                                                   scale, out));
    return call_end(&call);
}

/* ---- loss ----------------------------------------------------------------------------------------------------------------- */

#define CROSS_ENTROPY_DOC                                                                                           \
    "cross_entropy($module, logits, targets, *, ignore_index=None, out=None, stream=None)\n--\n\n"                  \
    "logsumexp(logits, last axis) - logits[..., target], reading the logits once.\n"                                \
    "\n"                                                                                                            \
    "logits: floating, {..., V}, rank 1 or more. targets: integer, {...}, each 0 to V - 1, or ignore_index, which " \
    "gives 0.\n"                                                                                                    \
    "Returns float32 of the shape of targets, whatever the logits' dtype.\n"                                        \
    "\n" ARRAYS STREAM_IGNORED ERRORS "\n"                                                                          \
    ">>> import numpy as np\n"                                                                                      \
    ">>> cross_entropy(np.zeros((2, 4), np.float16), np.array([3, -100]), ignore_index=-100).round(4)\n"            \
    "array([1.3863, 0.    ], dtype=float32)\n"

FUNCTION(cross_entropy) {
    enum { LOGITS, TARGETS, IGNORE_INDEX, OUT, STREAM };
    static const mtl_signature signature = {
        "cross_entropy", 2, 2, {"logits", "targets", "ignore_index", "out", "stream"}};
    mtl_call call;
    call_begin(&call, module, &signature, arguments, given, keywords);
    const DLTensor *logits = call_array(&call, LOGITS), *targets = call_array(&call, TARGETS);
    metalloid_cross_entropy_options options = METALLOID_CROSS_ENTROPY_OPTIONS_INIT;
    options.ignore_index = call_integer(&call, IGNORE_INDEX, 0);
    if (call.failed) return call_end(&call);

    options.has_ignore_index = call_has(&call, IGNORE_INDEX);
    DLTensor *loss = call_result(&call, OUT, logits, dtype_float32, targets->ndim, targets->shape);
    CALL_RUN(&call, metalloid_cross_entropy(call.context, logits, targets, &options, loss));
    return call_end(&call);
}

/* ---- gated delta rule ------------------------------------------------------------------------------------------------------- */

#define GATED_DELTA_UPDATE_DOC                                                                                      \
    "gated_delta_update($module, q, k, v, gamma, beta, initial_state=None, mask=None, stream=None, *, "             \
    "out=None)\n--\n\n"                                                                                             \
    "The gated delta rule: at each step S = S * gamma; S = S + beta (v - S k) k.T; the output is S q.\n"            \
    "\n"                                                                                                            \
    "q, k: floating, {B, T, H_k, D_k}. v: floating, {B, T, H_v, D_v}, H_v a multiple of H_k. gamma: floating, the " \
    "decay itself,\n"                                                                                               \
    "{B, T, H_v}, or a channel's own, {B, T, H_v, D_k}. beta: floating, {B, T, H_v}.\n"                             \
    "initial_state: floating, {B, H_v, D_v, D_k}, or None for zeros.\n"                                             \
    "mask: bool or integer, {B, T}; a step of mask 0 leaves the state as it was and gives 0.\n"                     \
    "Returns the list [out, state]: {B, T, H_v, D_v}, q and k promoted, and {B, H_v, D_v, D_k}, float32 (float64 "  \
    "where an array\n"                                                                                              \
    "is). `out` is a tuple of the two; the state may be initial_state.\n"                                           \
    "\n" ARRAYS STREAM_IGNORED ERRORS "\n"                                                                          \
    ">>> import numpy as np\n"                                                                                      \
    ">>> q = k = np.ones((1, 2, 1, 1), np.float32)\n"                                                               \
    ">>> gamma = beta = np.full((1, 2, 1), 0.5, np.float32)\n"                                                      \
    ">>> out, state = gated_delta_update(q, k, 4 * q, gamma, beta)\n"                                               \
    ">>> out.ravel(), state.ravel()\n"                                                                              \
    "(array([2. , 2.5], dtype=float32), array([2.5], dtype=float32))\n"

FUNCTION(gated_delta_update) {
    enum { Q, K, V, GAMMA, BETA, INITIAL_STATE, MASK, STREAM, OUT };
    static const mtl_signature signature = {
        "gated_delta_update", 8, 5, {"q", "k", "v", "gamma", "beta", "initial_state", "mask", "stream", "out"}};
    mtl_call call;
    call_begin(&call, module, &signature, arguments, given, keywords);
    const DLTensor *q = call_array(&call, Q), *k = call_array(&call, K), *v = call_array(&call, V);
    const DLTensor *gamma = call_array(&call, GAMMA), *beta = call_array(&call, BETA);
    const DLTensor *initial_state = call_optional_array(&call, INITIAL_STATE), *mask = call_optional_array(&call, MASK);
    if (call.failed) return call_end(&call);

    DLTensor *out = call_result_of_two(&call, OUT, 0, q, dtype_promote(q->dtype, k->dtype), v->ndim, v->shape);
    bool in_double = dtype_is_double(q) || dtype_is_double(k) || dtype_is_double(v) || dtype_is_double(gamma) ||
                     dtype_is_double(beta) || dtype_is_double(initial_state);
    int64_t shape[4] = {0, 0, 0, 0};
    if (v->ndim == 4 && q->ndim == 4) {
        shape[0] = v->shape[0];
        shape[1] = v->shape[2];
        shape[2] = v->shape[3];
        shape[3] = q->shape[3];
    }
    DLTensor *state = call_result_of_two(&call, OUT, 1, q, in_double ? dtype_float64 : dtype_float32, 4, shape);
    CALL_RUN(&call, metalloid_gated_delta_update(call.context, q, k, v, gamma, beta, initial_state, mask, out, state));
    PyObject *pair = call_end(&call);
    PyObject *list = pair ? PySequence_List(pair) : NULL; /* as MLX returns it */
    Py_XDECREF(pair);
    return list;
}

/* ---- the process ------------------------------------------------------------------------------------------------------------ */

#define SET_NUM_THREADS_DOC                                                                                        \
    "set_num_threads($module, threads, /)\n--\n\n"                                                                 \
    "At most so many threads, the caller's included, work on one call; 0 returns to METALLOID_NUM_THREADS or the " \
    "CPUs that\n"                                                                                                  \
    "the process may use. ValueError for a negative number.\n"                                                     \
    "\n"                                                                                                           \
    ">>> set_num_threads(2)\n"                                                                                     \
    ">>> get_num_threads()\n"                                                                                      \
    "2\n"                                                                                                          \
    ">>> set_num_threads(0)\n"

static PyObject *set_num_threads(PyObject *module, PyObject *threads) {
    (void)module;
    if (PyBool_Check(threads) || !PyIndex_Check(threads)) {
        return PyErr_Format(PyExc_TypeError, "set_num_threads: threads must be an integer, got %.200s",
                            Py_TYPE(threads)->tp_name);
    }
    PyObject *number = PyNumber_Index(threads);
    if (!number) return NULL;
    int overflow;
    long count = PyLong_AsLongAndOverflow(number, &overflow);
    Py_DECREF(number);
    if (overflow || count > INT_MAX || count < INT_MIN) {
        return PyErr_Format(PyExc_ValueError, "set_num_threads: threads must fit in 32 bits, got %S", threads);
    }
    if (metalloid_set_num_threads((int)count) != METALLOID_OK)
        return PyErr_Format(PyExc_ValueError, "%s", metalloid_last_error());
    Py_RETURN_NONE;
}

#define GET_NUM_THREADS_DOC                                            \
    "get_num_threads($module, /)\n--\n\n"                              \
    "How many threads, the caller's included, may work on one call.\n" \
    "\n"                                                               \
    ">>> get_num_threads() >= 1\n"                                     \
    "True\n"

static PyObject *get_num_threads(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyLong_FromLong(metalloid_get_num_threads());
}

#define CPU_ISA_DOC                                                                                               \
    "cpu_isa($module, /)\n--\n\n"                                                                                 \
    "The CPU kernels in use: 'plain', or the instruction set picked from the processor's flags. The environment " \
    "variable\n"                                                                                                  \
    "METALLOID_CPU_ISA overrides the choice downwards.\n"                                                         \
    "\n"                                                                                                          \
    ">>> isinstance(cpu_isa(), str)\n"                                                                            \
    "True\n"

static PyObject *cpu_isa(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyUnicode_FromString(metalloid_cpu_isa());
}

#define OPERATION(name, doc) \
    { #name, (PyCFunction)(void (*)(void))name, METH_FASTCALL | METH_KEYWORDS, doc }

PyMethodDef functions[] = {
    OPERATION(rms_norm, RMS_NORM_DOC),
    OPERATION(layer_norm, LAYER_NORM_DOC),
    OPERATION(add_rms_norm, ADD_RMS_NORM_DOC),
    OPERATION(add_layer_norm, ADD_LAYER_NORM_DOC),
    OPERATION(rope, ROPE_DOC),
    OPERATION(qk_norm_rope, QK_NORM_ROPE_DOC),
    OPERATION(swiglu, SWIGLU_DOC),
    OPERATION(geglu, GEGLU_DOC),
    OPERATION(scaled_dot_product_attention, SCALED_DOT_PRODUCT_ATTENTION_DOC),
    OPERATION(kv_cache_sdpa_update, KV_CACHE_SDPA_UPDATE_DOC),
    OPERATION(cross_entropy, CROSS_ENTROPY_DOC),
    OPERATION(gated_delta_update, GATED_DELTA_UPDATE_DOC),
    {"set_num_threads", set_num_threads, METH_O, SET_NUM_THREADS_DOC},
    {"get_num_threads", get_num_threads, METH_NOARGS, GET_NUM_THREADS_DOC},
    {"cpu_isa", cpu_isa, METH_NOARGS, CPU_ISA_DOC},
    {NULL, NULL, 0, NULL},
};
