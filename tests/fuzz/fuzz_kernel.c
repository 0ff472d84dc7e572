/* Custom kernels up to the compiler: any text as source and header, and calls whose arguments may be wrong. Tokens cover the text and
 * the translation keeps its lines; a kernel that is made gives its source, whatever it is made of. SPDX-License-Identifier: MIT */
#include "calls.h"

#include "kernel/messages.h"
#include "kernel/source.h"
#include "kernel/tokenizer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void expect(bool condition, const char *what) {
    if (condition) return;
    fprintf(stderr, "%s\n", what);
    abort();
}

static size_t lines_of(const char *text) {
    size_t count = 0;
    for (; *text; text++) count += *text == '\n';
    return count;
}

static void translate_in_lockstep(const char *text) {
    static const char *const inputs[] = {"x"}, *const outputs[] = {"y"};
    const mtl_definition definition = {"k", 1, 1, inputs, outputs, text, "", false};
    const mtl_unit_options options = {.arms = true};
    mtl_mentions mentions;
    expect(mtl_find_mentions(&mentions, &definition), "no memory");
    mtl_text out = {0};
    mtl_translate_in_lockstep(&out, &definition, &mentions, &options);
    expect(!out.failed, "no memory");
    mtl_text_free(&out);
}

static void translate_for_a_gpu(const char *text) {
    const mtl_template_value value = {.name = "N", .kind = METALLOID_TEMPLATE_INT, .integer = 100};
    const mtl_types types = {.template_count = 1, .template_values = &value};
    const mtl_unit_options options = {.target = MTL_TARGET_CUDA, .line = 32, .types = &types};
    mtl_text out = {0};
    mtl_translate(&out, text, MTL_REGION_BODY, &options);
    expect(!out.failed, "no memory");
    mtl_text_free(&out);
}

/* The text as what a compiler says, and as what it speaks of. */
static void explain(const char *text) {
    static const char *const outputs[] = {"y"};
    const mtl_definition definition = {
        .name = "k", .output_names = outputs, .output_count = 1, .source = text, .header = text};
    mtl_text log = {0}, out = {0};
    mtl_text_format(&log, "%s\nsource:1:3: error: no\n%s\n  ^\nheader(2): error: no\n  %s\n   ^\n", text, text, text);
    mtl_explain(&out, &definition, mtl_text_string(&log));
    expect(!log.failed && !out.failed, "no memory");
    mtl_text_free(&log);
    mtl_text_free(&out);
}

static void translate(const char *text, mtl_region region, bool count_iterations) {
    const mtl_definition definition = {.name = "k",
                                       .source = region == MTL_REGION_BODY ? text : "",
                                       .header = region == MTL_REGION_HEADER ? text : ""};
    mtl_names meeting = {0};
    expect(mtl_find_meeting_functions(&meeting, &definition), "no memory");
    const mtl_unit_options options = {.count_iterations = count_iterations, .arms = true, .meeting = &meeting};
    mtl_text out = {0};
    mtl_translate(&out, text, region, &options);
    expect(!out.failed, "no memory");
    expect(lines_of(mtl_text_string(&out)) == lines_of(text), "the translation has other lines");
    mtl_text_free(&out);
    free(meeting.name);
    if (region == MTL_REGION_BODY) translate_in_lockstep(text);
    if (region == MTL_REGION_BODY) translate_for_a_gpu(text);
    if (region == MTL_REGION_BODY) explain(text);

    mtl_tokens tokens;
    expect(mtl_tokenize(&tokens, text, strlen(text)), "no memory");
    const char *at = text;
    for (size_t i = 0; i < tokens.count; i++) {
        expect(tokens.token[i].text == at && tokens.token[i].length > 0, "tokens leave a gap");
        at += tokens.token[i].length;
    }
    expect(*at == '\0', "tokens end early");
    mtl_tokens_free(&tokens);
}

/* Up to the next NUL; what is left over when there is none. */
static char *take_text(source *from) {
    size_t length = 0;
    while (length < from->left && from->bytes[length]) length++;
    char *text = malloc(length + 1);
    memcpy(text, from->bytes, length);
    text[length] = '\0';
    size_t used = length < from->left ? length + 1 : length;
    from->bytes += used;
    from->left -= used;
    return text;
}

static void ask_for_source(metalloid_kernel *kernel, source *from) {
    int64_t shape[2] = {take(from) % 4, (int8_t)take(from)}, strides[2] = {(int8_t)take(from), 1};
    float memory[256] = {0};
    const uint8_t bits[] = {32, 16, 8, 64, 5};
    DLTensor tensor = {memory,
                       {kDLCPU, 0},
                       rarely(from) ? -1 : take(from) % 3,
                       {(uint8_t)(take(from) % 8), bits[take(from) % 5], 1},
                       shape,
                       take(from) % 2 ? strides : NULL,
                       0};
    const DLTensor *inputs[] = {rarely(from) ? NULL : &tensor};
    DLTensor *outputs[] = {&tensor};
    const char *names[] = {"T", "int", "", "a b", NULL, "__mtl_x"};
    metalloid_template_argument argument = {
        names[take(from) % 6], (metalloid_template_kind)(take(from) % 4), (int64_t)take_bits(from), {kDLFloat, 16, 1}};
    metalloid_kernel_call given = METALLOID_KERNEL_CALL_INIT;
    if (rarely(from)) given.size = (size_t)take_bits(from);
    given.input_count = take(from) % 3;
    given.output_count = take(from) % 3;
    given.inputs = inputs;
    given.outputs = outputs;
    given.template_count = take(from) % 3 == 0;
    given.template_arguments = &argument;
    for (int axis = 0; axis < 3; axis++) {
        given.grid[axis] = rarely(from) ? (int64_t)take_bits(from) : take(from);
        given.threadgroup[axis] = rarely(from) ? (int64_t)take_bits(from) : take(from);
    }
    size_t length;
    char text[64];
    metalloid_status status = metalloid_kernel_source(kernel, &given, take(from) % 2, text, sizeof text, &length);
    expect(status == METALLOID_OK || status == METALLOID_INVALID_ARGUMENT || status == METALLOID_UNSUPPORTED,
           "an unknown status");
    expect(status == METALLOID_OK || metalloid_last_error()[0], "a failure without a message");
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t count);

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t count) {
    source from = {bytes, count};
    uint8_t how = take(&from);
    char *body = take_text(&from), *header = take_text(&from), *name = take_text(&from);
    translate(body, MTL_REGION_BODY, how & 1);
    translate(header, MTL_REGION_HEADER, how & 1);

    metalloid_kernel_options options = METALLOID_KERNEL_OPTIONS_INIT;
    options.header = header;
    options.atomic_outputs = how & 2;
    options.most_iterations = how & 4 ? 10 : 0;
    const char *inputs[] = {how & 8 ? name : "x"}, *outputs[] = {"y"};
    metalloid_kernel *kernel = NULL;
    metalloid_status status =
        metalloid_kernel_create(how & 16 ? name : "k", inputs, 1, outputs, 1, body, &options, &kernel);
    expect((status == METALLOID_OK) == (kernel != NULL), "a kernel that was not made");
    if (kernel) ask_for_source(kernel, &from);
    metalloid_kernel_destroy(kernel);
    free(body);
    free(header);
    free(name);
    return 0;
}
