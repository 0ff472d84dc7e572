/* The operations as NIFs of Metalloid.NIF. SPDX-License-Identifier: MIT
 *
 * Each reads its arguments, allocates the results, and calls the C function, which checks everything else. What takes
 * more than a few microseconds runs on a dirty scheduler: attention, the gated delta rule and cross entropy always, the
 * others where they are not short. */
#include "call.h"
#include "kernel.h"

#define COUNT(array) (int)(sizeof(array) / sizeof *(array))
#define NIF(name)    static ERL_NIF_TERM name(ErlNifEnv *env, int argc, const ERL_NIF_TERM *argv)

/* Bytes of tensors up to which a call takes a few microseconds; the change of schedulers takes more. A sine and
 * a cosine take rope as long as many elements take a norm. */
enum { SHORT = 16384, SHORT_ROPE = 4096 };

/* NAME where it is short, else the same on a dirty scheduler. */
#define SHORT_OR_DIRTY(name, most)                                                           \
    NIF(name##_anywhere) {                                                                   \
        if (bytes_of(env, argc, argv) <= most) return name(env, argc, argv);                 \
        return enif_schedule_nif(env, #name, ERL_NIF_DIRTY_JOB_CPU_BOUND, name, argc, argv); \
    }

/* ---- norms ----------------------------------------------------------------------------------- */

static const char *const type_alone[] = {"type"};

NIF(rms_norm) {
    (void)argc;
    call c;
    call_begin(&c, env, "rms_norm");
    DLTensor *x = input(&c, "x", argv[0]), *weight = optional_input(&c, "weight", argv[1]);
    double eps = number(&c, "eps", argv[2]);
    read_options(&c, argv[3], COUNT(type_alone), type_alone);
    DLDataType type = option_type(&c, 0, x);
    DLTensor *out = c.failed ? NULL : new_result(&c, "the result", type, x->ndim, x->shape);
    return call_end(&c, c.failed ? METALLOID_OK : metalloid_rms_norm(NULL, x, weight, eps, out));
}
SHORT_OR_DIRTY(rms_norm, SHORT)

NIF(layer_norm) {
    (void)argc;
    call c;
    call_begin(&c, env, "layer_norm");
    DLTensor *x = input(&c, "x", argv[0]), *weight = optional_input(&c, "weight", argv[1]);
    DLTensor *bias = optional_input(&c, "bias", argv[2]);
    double eps = number(&c, "eps", argv[3]);
    read_options(&c, argv[4], COUNT(type_alone), type_alone);
    DLDataType type = option_type(&c, 0, x);
    DLTensor *out = c.failed ? NULL : new_result(&c, "the result", type, x->ndim, x->shape);
    return call_end(&c, c.failed ? METALLOID_OK : metalloid_layer_norm(NULL, x, weight, bias, eps, out));
}
SHORT_OR_DIRTY(layer_norm, SHORT)

NIF(add_rms_norm) {
    (void)argc;
    call c;
    call_begin(&c, env, "add_rms_norm");
    DLTensor *x = input(&c, "x", argv[0]), *residual = input(&c, "residual", argv[1]);
    DLTensor *weight = optional_input(&c, "weight", argv[2]);
    double eps = number(&c, "eps", argv[3]);
    read_options(&c, argv[4], COUNT(type_alone), type_alone);
    DLDataType type = option_type(&c, 0, x);
    DLTensor *sum = c.failed ? NULL : new_result(&c, "the sum", type, x->ndim, x->shape);
    DLTensor *out = c.failed ? NULL : new_result(&c, "the norm", type, x->ndim, x->shape);
    return call_end(&c, c.failed ? METALLOID_OK : metalloid_add_rms_norm(NULL, x, residual, weight, eps, sum, out));
}
SHORT_OR_DIRTY(add_rms_norm, SHORT)

NIF(add_layer_norm) {
    (void)argc;
    call c;
    call_begin(&c, env, "add_layer_norm");
    DLTensor *x = input(&c, "x", argv[0]), *residual = input(&c, "residual", argv[1]);
    DLTensor *weight = optional_input(&c, "weight", argv[2]), *bias = optional_input(&c, "bias", argv[3]);
    double eps = number(&c, "eps", argv[4]);
    read_options(&c, argv[5], COUNT(type_alone), type_alone);
    DLDataType type = option_type(&c, 0, x);
    DLTensor *sum = c.failed ? NULL : new_result(&c, "the sum", type, x->ndim, x->shape);
    DLTensor *out = c.failed ? NULL : new_result(&c, "the norm", type, x->ndim, x->shape);
    return call_end(&c,
                    c.failed ? METALLOID_OK : metalloid_add_layer_norm(NULL, x, residual, weight, bias, eps, sum, out));
}
SHORT_OR_DIRTY(add_layer_norm, SHORT)

/* ---- gated activations ----------------------------------------------------------------------- */

NIF(swiglu) {
    (void)argc;
    call c;
    call_begin(&c, env, "swiglu");
    DLTensor *gate = input(&c, "gate", argv[0]), *up = input(&c, "up", argv[1]);
    read_options(&c, argv[2], COUNT(type_alone), type_alone);
    DLDataType type = option_type(&c, 0, gate);
    DLTensor *out = c.failed ? NULL : new_result(&c, "the result", type, gate->ndim, gate->shape);
    return call_end(&c, c.failed ? METALLOID_OK : metalloid_swiglu(NULL, gate, up, out));
}
SHORT_OR_DIRTY(swiglu, SHORT)

NIF(geglu) {
    enum { APPROXIMATE, TYPE };
    static const char *const names[] = {"approximate", "type"};
    static const char *const approximate[] = {"none", "tanh"}; /* as metalloid_gelu numbers them */
    (void)argc;
    call c;
    call_begin(&c, env, "geglu");
    DLTensor *gate = input(&c, "gate", argv[0]), *up = input(&c, "up", argv[1]);
    read_options(&c, argv[2], COUNT(names), names);
    metalloid_gelu gelu = (metalloid_gelu)option_word(&c, APPROXIMATE, 2, approximate);
    DLDataType type = option_type(&c, TYPE, gate);
    DLTensor *out = c.failed ? NULL : new_result(&c, "the result", type, gate->ndim, gate->shape);
    return call_end(&c, c.failed ? METALLOID_OK : metalloid_geglu(NULL, gate, up, gelu, out));
}
SHORT_OR_DIRTY(geglu, SHORT)

/* ---- rope ------------------------------------------------------------------------------------ */

enum { TRADITIONAL, TIME_AXIS, SCALE, BASE, FREQS, INV_FREQS, OFFSET, OFFSETS, POSITION_IDS, ROPE_TYPE };
static const char *const rope_names[] = {"traditional", "time_axis", "scale",   "base",         "freqs",
                                         "inv_freqs",   "offset",    "offsets", "position_ids", "type"};

/* 1, else the second to last: -2, or that axis by its number. */
static bool time_is_axis_1(call *c, int which, int rank) {
    int64_t axis = option_integer(c, which, -2);
    if (axis != 1 && axis != -2 && axis != rank - 2)
        call_refuse(c, "time_axis must be 1 or the second to last axis, got %lld", (long long)axis);
    return axis == 1;
}

static metalloid_rope_options rope_options(call *c, const DLTensor *x) {
    metalloid_rope_options options = METALLOID_ROPE_OPTIONS_INIT;
    options.traditional = option_boolean(c, TRADITIONAL);
    if (x && time_is_axis_1(c, TIME_AXIS, x->ndim)) options.time_axis = METALLOID_TIME_AXIS_1;
    options.scale = option_number(c, SCALE, options.scale);
    options.freqs = option_input(c, FREQS);
    options.inv_freqs = option_input(c, INV_FREQS);
    options.base = option_number(c, BASE, options.freqs || options.inv_freqs ? 0 : options.base);
    options.offset = option_integer(c, OFFSET, options.offset);
    options.offsets = option_input(c, OFFSETS);
    options.position_ids = option_input(c, POSITION_IDS);
    return options;
}

NIF(rope) {
    (void)argc;
    call c;
    call_begin(&c, env, "rope");
    DLTensor *x = input(&c, "x", argv[0]);
    int64_t dims = integer(&c, "dims", argv[1]);
    read_options(&c, argv[2], COUNT(rope_names), rope_names);
    metalloid_rope_options options = rope_options(&c, x);
    DLDataType type = option_type(&c, ROPE_TYPE, x);
    DLTensor *out = c.failed ? NULL : new_result(&c, "the result", type, x->ndim, x->shape);
    return call_end(&c, c.failed ? METALLOID_OK : metalloid_rope(NULL, x, dims, &options, out));
}
SHORT_OR_DIRTY(rope, SHORT_ROPE)

NIF(qk_norm_rope) {
    (void)argc;
    call c;
    call_begin(&c, env, "qk_norm_rope");
    DLTensor *q = input(&c, "q", argv[0]), *k = input(&c, "k", argv[1]);
    DLTensor *q_weight = optional_input(&c, "q_weight", argv[2]), *k_weight = optional_input(&c, "k_weight", argv[3]);
    double eps = number(&c, "eps", argv[4]);
    int64_t dims = integer(&c, "dims", argv[5]);
    read_options(&c, argv[6], COUNT(rope_names), rope_names);
    metalloid_rope_options options = rope_options(&c, q);
    DLTensor *q_out = c.failed ? NULL : new_result(&c, "q", option_type(&c, ROPE_TYPE, q), q->ndim, q->shape);
    DLTensor *k_out = c.failed ? NULL : new_result(&c, "k", option_type(&c, ROPE_TYPE, k), k->ndim, k->shape);
    return call_end(
        &c, c.failed ? METALLOID_OK
                     : metalloid_qk_norm_rope(NULL, q, k, q_weight, k_weight, eps, dims, &options, q_out, k_out));
}
SHORT_OR_DIRTY(qk_norm_rope, SHORT_ROPE)

/* ---- attention ------------------------------------------------------------------------------- */

static bool hides_some(const DLTensor *key_mask) { /* of bool: optional_mask made it so */
    for (int64_t i = 0, elements = elements_of(key_mask); i < elements; i++) {
        if (!((const uint8_t *)key_mask->data)[i]) return true;
    }
    return false;
}

NIF(scaled_dot_product_attention) {
    enum { CAUSAL, CAUSAL_OFFSET, WINDOW, SOFTCAP, MASK, KEY_MASK, SINKS, LOGSUMEXP, TIME, TYPE };
    static const char *const names[] = {"causal",   "causal_offset", "window",    "softcap",   "mask",
                                        "key_mask", "sinks",         "logsumexp", "time_axis", "type"};
    static const char *const causal[] = {"false", "true", "key_masked"};
    (void)argc;
    call c;
    call_begin(&c, env, "scaled_dot_product_attention");
    DLTensor *q = input(&c, "q", argv[0]), *k = input(&c, "k", argv[1]), *v = input(&c, "v", argv[2]);
    double scale = number(&c, "scale", argv[3]);
    read_options(&c, argv[4], COUNT(names), names);

    metalloid_attention_options options = METALLOID_ATTENTION_OPTIONS_INIT;
    int when = option_word(&c, CAUSAL, COUNT(causal), causal);
    options.causal = when != 0;
    options.causal_offset = option_integer(&c, CAUSAL_OFFSET, options.causal_offset);
    if (option_given(&c, CAUSAL_OFFSET) && options.causal_offset == METALLOID_CAUSAL_OFFSET_DEFAULT)
        options.causal_offset++; /* as far from every key */
    options.window = option_integer(&c, WINDOW, 0);
    if (option_given(&c, WINDOW) && options.window < 1)
        call_refuse(&c, "window must be at least 1, got %lld", (long long)options.window);
    options.softcap = option_number(&c, SOFTCAP, 0);
    if (option_given(&c, SOFTCAP) && options.softcap == 0) call_refuse(&c, "softcap must be above 0");
    options.mask = option_mask(&c, MASK);
    options.key_mask = option_mask(&c, KEY_MASK);
    options.sinks = option_input(&c, SINKS);
    bool logsumexp = option_boolean(&c, LOGSUMEXP), time_first = q && time_is_axis_1(&c, TIME, 4);
    DLDataType type = option_type(&c, TYPE, q);

    DLTensor *out = NULL;
    if (!c.failed && q->ndim == 4 && k->ndim == 4 && v->ndim == 4) {
        int64_t shape[] = {q->shape[0], q->shape[1], q->shape[2], v->shape[3]};
        out = new_result(&c, "the result", type, 4, shape);
        if (time_first) {
            exchange_axes(q, 1, 2);
            exchange_axes(k, 1, 2);
            exchange_axes(v, 1, 2);
            if (out) exchange_axes(out, 1, 2);
        }
        bool in_double = q->dtype.bits == 64 || k->dtype.bits == 64 || v->dtype.bits == 64 || type.bits == 64;
        if (logsumexp)
            options.logsumexp =
                new_result(&c, "logsumexp", (DLDataType){kDLFloat, in_double ? 64 : 32, 1}, 3, q->shape);
        /* EMLX's rule for a prompt: query i sees keys up to i where some key is masked, else the last query the last
         * key. */
        if (when == 2 && q->shape[2] != 1 && options.key_mask && hides_some(options.key_mask))
            options.causal_offset = 0;
    }
    /* Where a rank is wrong the library says so before it looks at `out`. */
    return call_end(&c, c.failed
                            ? METALLOID_OK
                            : metalloid_scaled_dot_product_attention(NULL, q, k, v, scale, &options, out ? out : q));
}

NIF(kv_cache_sdpa_update) {
    (void)argc;
    call c;
    call_begin(&c, env, "kv_cache_sdpa_update");
    DLTensor *q = input(&c, "q", argv[0]), *new_k = input(&c, "new_k", argv[1]), *new_v = input(&c, "new_v", argv[2]);
    DLTensor *k_cache = input(&c, "k_cache", argv[3]), *v_cache = input(&c, "v_cache", argv[4]);
    int64_t offset = integer(&c, "offset", argv[5]);
    DLTensor *key_mask = optional_mask(&c, "key_mask", argv[6]);
    double scale = number(&c, "scale", argv[7]);
    read_options(&c, argv[8], COUNT(type_alone), type_alone);
    DLDataType type = option_type(&c, 0, q);

    DLTensor *out = NULL, *k_updated = NULL, *v_updated = NULL;
    if (!c.failed) {
        bool ranks = q->ndim == 4 && v_cache->ndim == 4;
        int64_t shape[] = {ranks ? q->shape[0] : 0, ranks ? q->shape[2] : 0, ranks ? q->shape[1] : 0,
                           ranks ? v_cache->shape[3] : 0};
        out = new_result(&c, "the result", type, 4, shape);
        k_updated = new_copy(&c, "k_cache", k_cache);
        v_updated = new_copy(&c, "v_cache", v_cache);
    }
    return call_end(&c, c.failed ? METALLOID_OK
                                 : metalloid_kv_cache_sdpa_update(NULL, q, new_k, new_v, k_updated, v_updated, offset,
                                                                  key_mask, scale, out));
}

/* ---- loss and gated delta rule --------------------------------------------------------------- */

NIF(cross_entropy) {
    enum { IGNORE_INDEX, TYPE };
    static const char *const names[] = {"ignore_index", "type"};
    (void)argc;
    call c;
    call_begin(&c, env, "cross_entropy");
    DLTensor *logits = input(&c, "logits", argv[0]), *targets = input(&c, "targets", argv[1]);
    read_options(&c, argv[2], COUNT(names), names);
    metalloid_cross_entropy_options options = METALLOID_CROSS_ENTROPY_OPTIONS_INIT;
    options.has_ignore_index = option_given(&c, IGNORE_INDEX);
    options.ignore_index = option_integer(&c, IGNORE_INDEX, 0);
    DLDataType type = option_type(&c, TYPE, NULL);
    DLTensor *loss = c.failed ? NULL : new_result(&c, "the loss", type, targets->ndim, targets->shape);
    return call_end(&c, c.failed ? METALLOID_OK : metalloid_cross_entropy(NULL, logits, targets, &options, loss));
}

NIF(gated_delta_update) {
    (void)argc;
    call c;
    call_begin(&c, env, "gated_delta_update");
    DLTensor *q = input(&c, "q", argv[0]), *k = input(&c, "k", argv[1]), *v = input(&c, "v", argv[2]);
    DLTensor *gamma = input(&c, "gamma", argv[3]), *beta = input(&c, "beta", argv[4]);
    DLTensor *initial_state = optional_input(&c, "initial_state", argv[5]), *mask = optional_mask(&c, "mask", argv[6]);
    read_options(&c, argv[7], COUNT(type_alone), type_alone);
    DLDataType type = option_type(&c, 0, q);

    DLTensor *out = NULL, *state = NULL;
    if (!c.failed) {
        bool ranks = k->ndim == 4 && v->ndim == 4;
        int64_t shape[] = {ranks ? v->shape[0] : 0, ranks ? v->shape[2] : 0, ranks ? v->shape[3] : 0,
                           ranks ? k->shape[3] : 0};
        out = new_result(&c, "the result", type, v->ndim, v->shape);
        state = new_result(&c, "the state", (DLDataType){kDLFloat, type.bits == 64 ? 64 : 32, 1}, 4, shape);
    }
    return call_end(
        &c, c.failed ? METALLOID_OK
                     : metalloid_gated_delta_update(NULL, q, k, v, gamma, beta, initial_state, mask, out, state));
}

/* ---- the library ----------------------------------------------------------------------------- */

NIF(version) {
    (void)argc, (void)argv;
    return enif_make_string(env, metalloid_version(), ERL_NIF_LATIN1);
}

NIF(cpu_isa) {
    (void)argc, (void)argv;
    return enif_make_string(env, metalloid_cpu_isa(), ERL_NIF_LATIN1);
}

NIF(num_threads) {
    (void)argc, (void)argv;
    return enif_make_int(env, metalloid_get_num_threads());
}

NIF(set_num_threads) {
    (void)argc;
    call c;
    call_begin(&c, env, "set_num_threads");
    int64_t threads = integer(&c, "threads", argv[0]);
    if (threads < 0 || threads > INT32_MAX)
        call_refuse(&c, "threads must be from 0 to 2^31 - 1, got %lld", (long long)threads);
    if (c.failed || metalloid_set_num_threads((int)threads) != METALLOID_OK)
        return call_end(&c, METALLOID_INVALID_ARGUMENT);
    return enif_make_atom(env, "ok");
}

static ErlNifFunc nifs[] = {
    {"rms_norm", 4, rms_norm_anywhere, 0},
    {"layer_norm", 5, layer_norm_anywhere, 0},
    {"add_rms_norm", 5, add_rms_norm_anywhere, 0},
    {"add_layer_norm", 6, add_layer_norm_anywhere, 0},
    {"swiglu", 3, swiglu_anywhere, 0},
    {"geglu", 3, geglu_anywhere, 0},
    {"rope", 3, rope_anywhere, 0},
    {"qk_norm_rope", 7, qk_norm_rope_anywhere, 0},
    {"scaled_dot_product_attention", 5, scaled_dot_product_attention, ERL_NIF_DIRTY_JOB_CPU_BOUND},
    {"kv_cache_sdpa_update", 9, kv_cache_sdpa_update, ERL_NIF_DIRTY_JOB_CPU_BOUND},
    {"cross_entropy", 3, cross_entropy, ERL_NIF_DIRTY_JOB_CPU_BOUND},
    {"gated_delta_update", 8, gated_delta_update, ERL_NIF_DIRTY_JOB_CPU_BOUND},
    {"kernel_create", 5, kernel_create, ERL_NIF_DIRTY_JOB_CPU_BOUND},
    {"kernel_launch", 7, kernel_launch, ERL_NIF_DIRTY_JOB_CPU_BOUND},
    {"kernel_source", 7, kernel_source, ERL_NIF_DIRTY_JOB_CPU_BOUND},
    {"version", 0, version, 0},
    {"cpu_isa", 0, cpu_isa, ERL_NIF_DIRTY_JOB_CPU_BOUND},
    {"num_threads", 0, num_threads, 0},
    {"set_num_threads", 1, set_num_threads, ERL_NIF_DIRTY_JOB_CPU_BOUND},
};

static int load(ErlNifEnv *env, void **private_data, ERL_NIF_TERM argument) {
    (void)private_data, (void)argument;
    return call_load(env, false) && kernel_load(env, false) ? 0 : 1;
}

static int upgrade(ErlNifEnv *env, void **private_data, void **old_private_data, ERL_NIF_TERM argument) {
    (void)private_data, (void)old_private_data, (void)argument;
    return call_load(env, true) && kernel_load(env, true) ? 0 : 1;
}

ERL_NIF_INIT(Elixir.Metalloid.NIF, nifs, load, NULL, upgrade, NULL)
