/* Cases for tests in other languages, which make the same calls and hold their results to the same bounds.
 * SPDX-License-Identifier: MIT
 *
 * Where the environment's METALLOID_TEST_CASES names a folder, the small calls whose results a test compares are
 * written there, to a file of the program's name. Lines of words:
 *   call OPERATION NAME=VALUE...
 *   input NAME DTYPE EXTENTS ELEMENTS       EXTENTS: 2x3, - at rank 0. ELEMENTS: row-major, little-endian bytes in
 * hexadecimal output NAME DTYPE EXTENTS EXACT BOUND   float64: the exact result, and how far from it the output may be
 * The linker's --wrap leads every call of a test through here. */
#include "support.h"

#include <errno.h> /* program_invocation_short_name */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_TENSORS = 12, MOST_ELEMENTS = 400, MOST_OF_ATTENTION = 3000 };

static _Thread_local struct {
    int count;
    struct {
        const char *name;
        const DLTensor *given;
        bool read;
    } tensor[MOST_TENSORS];
    char line[1024];
    bool written; /* its line and its inputs are in the file */
} last;

static FILE *file;

static bool records(void) {
    static _Thread_local const char *folder = "";
    if (folder && !*folder) folder = getenv("METALLOID_TEST_CASES");
    return folder && *folder;
}

static void begin(const char *name) {
    last.count = 0;
    last.written = false;
    if (records()) snprintf(last.line, sizeof last.line, "call %s", name);
}

static void takes_tensor(const char *name, const DLTensor *given, bool read) {
    last.tensor[last.count].name = name;
    last.tensor[last.count].given = given;
    last.tensor[last.count++].read = read;
}

#define READS(tensor)  takes_tensor(#tensor, tensor, true)
#define WRITES(tensor) takes_tensor(#tensor, tensor, false)

__attribute__((format(printf, 1, 2))) static void says(const char *format, ...) {
    if (!records()) return;
    size_t length = strlen(last.line);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last.line + length, sizeof last.line - length, format, arguments);
    va_end(arguments);
}

static void says_number(const char *name, double value) { says(" %s=%.17e", name, value); }
static void says_integer(const char *name, int64_t value) { says(" %s=%lld", name, (long long)value); }

/* ---- the file -------------------------------------------------------------------------------- */

static void write_bytes(const void *bytes, size_t count) {
    for (size_t i = 0; i < count; i++) fprintf(file, "%02x", ((const unsigned char *)bytes)[i]);
}

static void write_tensor(const char *kind, const char *name, const tensor *t) {
    fprintf(file, "%s %s %s ", kind, name, dtype_name(t->type));
    for (int axis = 0; axis < t->rank; axis++) fprintf(file, axis ? "x%lld" : "%lld", (long long)t->shape[axis]);
    fputs(t->rank ? " " : "- ", file);
}

/* Whether the call is small and the elements that it read are known: it may have written over them. */
static bool can_be_told(void) {
    int64_t elements = 0;
    for (int i = 0; i < last.count; i++) {
        const tensor *t = tensor_of(last.tensor[i].given);
        if (last.tensor[i].given && (!t || !t->has_before)) return false;
        if (t) elements += t->elements;
    }
    bool attends = strcmp(last.tensor[0].name, "q") == 0; /* or is the gated delta rule */
    return elements <= (attends ? MOST_OF_ATTENTION : MOST_ELEMENTS);
}

static void open_file(void) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s.cases", getenv("METALLOID_TEST_CASES"), program_invocation_short_name);
    file = fopen(path, "w");
    if (!file) fail_msg("%s cannot be written", path);
}

void record_output(const tensor *out, const double *exact, const double *bound) {
    int which = 0;
    while (which < last.count && (last.tensor[which].read || last.tensor[which].given != &out->dl)) which++;
    if (which == last.count || !records() || !can_be_told()) return;
    if (!file) open_file();
    if (!last.written) {
        fprintf(file, "%s\n", last.line);
        for (int i = 0; i < last.count; i++) {
            const tensor *t = tensor_of(last.tensor[i].given);
            if (!t || !last.tensor[i].read) continue;
            write_tensor("input", last.tensor[i].name, t);
            for (int64_t j = 0; j < t->elements; j++)
                write_bytes(t->before + (element(t, j) - t->block), (size_t)dtype_size(t->type));
            fputs("\n", file);
        }
        last.written = true;
    }
    write_tensor("output", last.tensor[which].name, out);
    write_bytes(exact, (size_t)out->elements * sizeof *exact);
    fputs(" ", file);
    write_bytes(bound, (size_t)out->elements * sizeof *bound);
    fputs("\n", file);
    fflush(file);
}

/* ---- the calls ------------------------------------------------------------------------------- */

/* The linker's names of a call as a test writes it and as the library has it. */
#define CALL(operation, parameters, ...)                           \
    metalloid_status __real_metalloid_##operation parameters;      \
    metalloid_status __wrap_metalloid_##operation parameters;      \
    metalloid_status __wrap_metalloid_##operation parameters {     \
        begin(#operation);                                         \
        record_##operation(__VA_ARGS__);                           \
        return __real_metalloid_##operation(context, __VA_ARGS__); \
    }

static void record_rms_norm(const DLTensor *x, const DLTensor *weight, double eps, DLTensor *out) {
    READS(x), READS(weight), WRITES(out);
    says_number("eps", eps);
}
CALL(rms_norm, (metalloid_context * context, const DLTensor *x, const DLTensor *weight, double eps, DLTensor *out), x,
     weight, eps, out)

static void record_layer_norm(const DLTensor *x, const DLTensor *weight, const DLTensor *bias, double eps,
                              DLTensor *out) {
    READS(x), READS(weight), READS(bias), WRITES(out);
    says_number("eps", eps);
}
CALL(layer_norm,
     (metalloid_context * context, const DLTensor *x, const DLTensor *weight, const DLTensor *bias, double eps,
      DLTensor *out),
     x, weight, bias, eps, out)

static void record_add_rms_norm(const DLTensor *x, const DLTensor *residual, const DLTensor *weight, double eps,
                                DLTensor *sum, DLTensor *out) {
    READS(x), READS(residual), READS(weight), WRITES(sum), WRITES(out);
    says_number("eps", eps);
}
CALL(add_rms_norm,
     (metalloid_context * context, const DLTensor *x, const DLTensor *residual, const DLTensor *weight, double eps,
      DLTensor *sum, DLTensor *out),
     x, residual, weight, eps, sum, out)

static void record_add_layer_norm(const DLTensor *x, const DLTensor *residual, const DLTensor *weight,
                                  const DLTensor *bias, double eps, DLTensor *sum, DLTensor *out) {
    READS(x), READS(residual), READS(weight), READS(bias), WRITES(sum), WRITES(out);
    says_number("eps", eps);
}
CALL(add_layer_norm,
     (metalloid_context * context, const DLTensor *x, const DLTensor *residual, const DLTensor *weight,
      const DLTensor *bias, double eps, DLTensor *sum, DLTensor *out),
     x, residual, weight, bias, eps, sum, out)

static void record_swiglu(const DLTensor *gate, const DLTensor *up, DLTensor *out) {
    READS(gate), READS(up), WRITES(out);
}
CALL(swiglu, (metalloid_context * context, const DLTensor *gate, const DLTensor *up, DLTensor *out), gate, up, out)

static void record_geglu(const DLTensor *gate, const DLTensor *up, metalloid_gelu approximate, DLTensor *out) {
    READS(gate), READS(up), WRITES(out);
    says(" approximate=%s", approximate == METALLOID_GELU_TANH ? "tanh" : "none");
}
CALL(geglu,
     (metalloid_context * context, const DLTensor *gate, const DLTensor *up, metalloid_gelu approximate, DLTensor *out),
     gate, up, approximate, out)

static void record_rope_options(const metalloid_rope_options *options) {
    const metalloid_rope_options defaults = METALLOID_ROPE_OPTIONS_INIT;
    if (!options) options = &defaults;
    const DLTensor *freqs = options->freqs, *inv_freqs = options->inv_freqs, *offsets = options->offsets;
    const DLTensor *position_ids = options->position_ids;
    READS(freqs), READS(inv_freqs), READS(offsets), READS(position_ids);
    says_integer("traditional", options->traditional);
    says(" time_axis=%s", options->time_axis == METALLOID_TIME_AXIS_1 ? "1" : "-2");
    says_number("scale", options->scale);
    says_number("base", options->base);
    says_integer("offset", options->offset);
}

static void record_rope(const DLTensor *x, int64_t dims, const metalloid_rope_options *options, DLTensor *out) {
    READS(x), WRITES(out);
    says_integer("dims", dims);
    record_rope_options(options);
}
CALL(rope,
     (metalloid_context * context, const DLTensor *x, int64_t dims, const metalloid_rope_options *options,
      DLTensor *out),
     x, dims, options, out)

static void record_qk_norm_rope(const DLTensor *q, const DLTensor *k, const DLTensor *q_weight,
                                const DLTensor *k_weight, double eps, int64_t dims,
                                const metalloid_rope_options *options, DLTensor *q_out, DLTensor *k_out) {
    READS(q), READS(k), READS(q_weight), READS(k_weight), WRITES(q_out), WRITES(k_out);
    says_number("eps", eps);
    says_integer("dims", dims);
    record_rope_options(options);
}
CALL(qk_norm_rope,
     (metalloid_context * context, const DLTensor *q, const DLTensor *k, const DLTensor *q_weight,
      const DLTensor *k_weight, double eps, int64_t dims, const metalloid_rope_options *options, DLTensor *q_out,
      DLTensor *k_out),
     q, k, q_weight, k_weight, eps, dims, options, q_out, k_out)

static void record_scaled_dot_product_attention(const DLTensor *q, const DLTensor *k, const DLTensor *v, double scale,
                                                const metalloid_attention_options *options, DLTensor *out) {
    const metalloid_attention_options defaults = METALLOID_ATTENTION_OPTIONS_INIT;
    if (!options) options = &defaults;
    const DLTensor *mask = options->mask, *key_mask = options->key_mask, *sinks = options->sinks;
    DLTensor *logsumexp = options->logsumexp;
    READS(q), READS(k), READS(v), READS(mask), READS(key_mask), READS(sinks), WRITES(logsumexp), WRITES(out);
    says_number("scale", scale);
    says_integer("causal", options->causal);
    if (options->causal_offset != METALLOID_CAUSAL_OFFSET_DEFAULT)
        says_integer("causal_offset", options->causal_offset);
    if (options->window) says_integer("window", options->window);
    if (options->softcap > 0) says_number("softcap", options->softcap);
}
CALL(scaled_dot_product_attention,
     (metalloid_context * context, const DLTensor *q, const DLTensor *k, const DLTensor *v, double scale,
      const metalloid_attention_options *options, DLTensor *out),
     q, k, v, scale, options, out)

static void record_kv_cache_sdpa_update(const DLTensor *q, const DLTensor *new_k, const DLTensor *new_v,
                                        DLTensor *k_cache, DLTensor *v_cache, int64_t offset, const DLTensor *key_mask,
                                        double scale, DLTensor *out) {
    READS(q), READS(new_k), READS(new_v), READS(k_cache), READS(v_cache), READS(key_mask), WRITES(out);
    says_integer("offset", offset);
    says_number("scale", scale);
}
CALL(kv_cache_sdpa_update,
     (metalloid_context * context, const DLTensor *q, const DLTensor *new_k, const DLTensor *new_v, DLTensor *k_cache,
      DLTensor *v_cache, int64_t offset, const DLTensor *key_mask, double scale, DLTensor *out),
     q, new_k, new_v, k_cache, v_cache, offset, key_mask, scale, out)

static void record_cross_entropy(const DLTensor *logits, const DLTensor *targets,
                                 const metalloid_cross_entropy_options *options, DLTensor *loss) {
    READS(logits), READS(targets), WRITES(loss);
    if (options && options->has_ignore_index) says_integer("ignore_index", options->ignore_index);
}
CALL(cross_entropy,
     (metalloid_context * context, const DLTensor *logits, const DLTensor *targets,
      const metalloid_cross_entropy_options *options, DLTensor *loss),
     logits, targets, options, loss)

static void record_gated_delta_update(const DLTensor *q, const DLTensor *k, const DLTensor *v, const DLTensor *gamma,
                                      const DLTensor *beta, const DLTensor *initial_state, const DLTensor *mask,
                                      DLTensor *out, DLTensor *state) {
    READS(q), READS(k), READS(v), READS(gamma), READS(beta), READS(initial_state), READS(mask);
    WRITES(out), WRITES(state);
}
CALL(gated_delta_update,
     (metalloid_context * context, const DLTensor *q, const DLTensor *k, const DLTensor *v, const DLTensor *gamma,
      const DLTensor *beta, const DLTensor *initial_state, const DLTensor *mask, DLTensor *out, DLTensor *state),
     q, k, v, gamma, beta, initial_state, mask, out, state)
