/* Bytes of the fuzzer become a call of any operation. SPDX-License-Identifier: MIT */
#include "calls.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- the fuzzer's bytes ----------------------------------------------------------------------------------------------- */

uint8_t take(source *from) {
    if (from->left == 0) return 0;
    from->left--;
    return *from->bytes++;
}

uint64_t take_bits(source *from) {
    uint64_t bits = 0;
    for (int i = 0; i < 8; i++) bits = bits << 8 | take(from);
    return bits;
}

int take_below(source *from, int limit) { return take(from) % limit; }

bool rarely(source *from) { return take(from) % 32 == 31; }

double take_double(source *from) {
    static const double special[] = {0,      -0.0,     1,         -1,  1e-300, 1e300,        -1e300,
                                     5e-324, INFINITY, -INFINITY, NAN, 0.5,    2147483648.0, 1e-8};
    int which = take_below(from, 20);
    if (which < 14) return special[which];
    uint64_t bits = take_bits(from);
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* ---- the operations: axes of each argument by letter ------------------------------------------------------------------
 * B batch, T queries or tokens, S keys, M longest cache, N query or value heads, K key heads, D head dimension, E that of values,
 * P pairs of rope, H features, V classes. */

enum {
    FLOATING = 1,
    INTEGER = 2,
    BOOL = 4,
    OPTIONAL = 8,
    OUTPUT = 16,
    WIDE = 32 /* float32, or float64 if the others are */
};

typedef struct parameter {
    const char *axes;
    int flags;
} parameter;

enum {
    RMS_NORM,
    LAYER_NORM,
    ADD_RMS_NORM,
    ADD_LAYER_NORM,
    ROPE,
    QK_NORM_ROPE,
    SWIGLU,
    GEGLU,
    ATTENTION,
    KV_CACHE,
    CROSS_ENTROPY,
    GATED_DELTA,
    OPERATIONS
};

#define POSITIONS                                                                                            \
    {"P", FLOATING | INTEGER | OPTIONAL}, {"P", FLOATING | INTEGER | OPTIONAL}, {"B", INTEGER | OPTIONAL}, { \
        "BT", INTEGER | OPTIONAL                                                                             \
    }

static const struct {
    const char *name;
    parameter parameter[MAX_ARGUMENTS];
} operations[OPERATIONS] = {
    [RMS_NORM] = {"rms_norm", {{"BTH", FLOATING}, {"H", FLOATING | OPTIONAL}, {"BTH", FLOATING | OUTPUT}}},
    [LAYER_NORM] =
        {"layer_norm",
         {{"BTH", FLOATING}, {"H", FLOATING | OPTIONAL}, {"H", FLOATING | OPTIONAL}, {"BTH", FLOATING | OUTPUT}}},
    [ADD_RMS_NORM] = {"add_rms_norm",
                      {{"BTH", FLOATING},
                       {"BTH", FLOATING},
                       {"H", FLOATING | OPTIONAL},
                       {"BTH", FLOATING | OUTPUT},
                       {"BTH", FLOATING | OUTPUT}}},
    [ADD_LAYER_NORM] = {"add_layer_norm",
                        {{"BTH", FLOATING},
                         {"BTH", FLOATING},
                         {"H", FLOATING | OPTIONAL},
                         {"H", FLOATING | OPTIONAL},
                         {"BTH", FLOATING | OUTPUT},
                         {"BTH", FLOATING | OUTPUT}}},
    [ROPE] = {"rope", {{"BNTD", FLOATING}, POSITIONS, {"BNTD", FLOATING | OUTPUT}}},
    [QK_NORM_ROPE] = {"qk_norm_rope",
                      {{"BNTD", FLOATING},
                       {"BKTD", FLOATING},
                       {"D", FLOATING | OPTIONAL},
                       {"D", FLOATING | OPTIONAL},
                       POSITIONS,
                       {"BNTD", FLOATING | OUTPUT},
                       {"BKTD", FLOATING | OUTPUT}}},
    [SWIGLU] = {"swiglu", {{"BTH", FLOATING}, {"BTH", FLOATING}, {"BTH", FLOATING | OUTPUT}}},
    [GEGLU] = {"geglu", {{"BTH", FLOATING}, {"BTH", FLOATING}, {"BTH", FLOATING | OUTPUT}}},
    [ATTENTION] = {"scaled_dot_product_attention",
                   {{"BNTD", FLOATING},
                    {"BKSD", FLOATING},
                    {"BKSE", FLOATING},
                    {"BNTS", FLOATING | INTEGER | BOOL | OPTIONAL},
                    {"BS", INTEGER | BOOL | OPTIONAL},
                    {"N", FLOATING | OPTIONAL},
                    {"BNT", FLOATING | WIDE | OPTIONAL | OUTPUT},
                    {"BNTE", FLOATING | OUTPUT}}},
    [KV_CACHE] = {"kv_cache_sdpa_update",
                  {{"BTND", FLOATING},
                   {"BTKD", FLOATING},
                   {"BTKE", FLOATING},
                   {"BMKD", FLOATING | OUTPUT},
                   {"BMKE", FLOATING | OUTPUT},
                   {"BM", INTEGER | BOOL | OPTIONAL},
                   {"BNTE", FLOATING | OUTPUT}}},
    [CROSS_ENTROPY] = {"cross_entropy", {{"BTV", FLOATING}, {"BT", INTEGER}, {"BT", FLOATING | OUTPUT}}},
    [GATED_DELTA] = {"gated_delta_update",
                     {{"BTKD", FLOATING},
                      {"BTKD", FLOATING},
                      {"BTNE", FLOATING},
                      {"BTN", FLOATING},
                      {"BTN", FLOATING},
                      {"BNED", FLOATING | OPTIONAL},
                      {"BT", INTEGER | BOOL | OPTIONAL},
                      {"BTNE", FLOATING | OUTPUT},
                      {"BNED", FLOATING | WIDE | OUTPUT}}},
};

/* ---- tensors ------------------------------------------------------------------------------------------------------------ */

static const DLDataType dtypes[] = {
    {kDLFloat, 32, 1}, {kDLFloat, 16, 1}, {kDLBfloat, 16, 1},        {kDLFloat, 64, 1}, {kDLInt, 8, 1},
    {kDLInt, 16, 1},   {kDLInt, 32, 1},   {kDLInt, 64, 1},           {kDLUInt, 8, 1},   {kDLUInt, 16, 1},
    {kDLUInt, 32, 1},  {kDLUInt, 64, 1},  {METALLOID_DL_BOOL, 8, 1},
};

/* Operations whose floating arguments have to go together get one floating dtype, `common`. */
static DLDataType take_dtype(source *from, int flags, int common, hostility how) {
    if (how == HOSTILE && rarely(from)) return dtypes[take_below(from, 13)];
    if (flags & BOOL && take(from) & 1) return dtypes[12];
    if (flags & INTEGER && (!(flags & FLOATING) || take(from) & 1)) return dtypes[4 + take_below(from, 8)];
    if (flags & WIDE) return dtypes[common == 3 ? 3 : 0];
    return dtypes[common >= 0 ? common : take_below(from, 4)];
}

static uint64_t next_random(uint64_t *state) { /* splitmix64 */
    uint64_t z = *state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

/* Small numbers, or any bits at all. */
static void fill(argument *a, source *from, hostility how) {
    uint64_t state = take(from);
    size_t size = a->tensor.dtype.bits / 8u;
    bool floating = a->tensor.dtype.code == kDLFloat || a->tensor.dtype.code == kDLBfloat;
    bool wild = (how == HOSTILE || floating) && take_below(from, 4) == 3;
    for (size_t i = 0; i < a->bytes; i += size) {
        uint64_t bits = next_random(&state);
        float f = (float)((double)(bits >> 11) * 0x1p-52 - 1);
        double d = f;
        if (!wild && !floating) bits %= 2; /* a flag, a position, a class */
        if (!wild && floating && size == 8) memcpy(&bits, &d, 8);
        if (!wild && floating && size == 4) memcpy(&bits, &f, 4);
        if (!wild && floating && size == 2) {
            uint32_t half;
            memcpy(&half, &f, 4);
            bits = a->tensor.dtype.code == kDLBfloat ? half >> 16 : (0x3800u | (bits & 0x83ff));
        }
        memcpy(a->block + i, &bits, size); /* little-endian: the low bytes */
    }
}

/* Strides in elements; false for "none are given". */
static bool take_strides(argument *a, source *from, bool may_overlap) {
    int rank = a->tensor.ndim, how = take_below(from, may_overlap ? 6 : 4);
    int order[MAX_AXES];
    for (int i = 0; i < rank; i++) order[i] = i;
    for (int i = rank - 1; how >= 2 && i > 0; i--) {
        int j = take_below(from, i + 1), swap = order[i];
        order[i] = order[j];
        order[j] = swap;
    }
    int64_t step = 1;
    for (int i = rank - 1; i >= 0; i--) {
        int axis = order[i];
        if (how >= 2) step *= 1 + take_below(from, 8) / 7;
        a->strides[axis] = how == 3 && take(from) & 1 ? -step : step;
        if (how == 4 && take(from) & 1) a->strides[axis] = 0;
        if (how == 5) a->strides[axis] = take_below(from, 25) - 12;
        step *= a->shape[axis] > 0 ? a->shape[axis] : 1;
    }
    return how != 0;
}

/* Allocates exactly what the tensor reaches, so that AddressSanitizer sees a step beyond it; or lays it into an earlier block. */
static void place(call *c, int i, source *from, hostility how) {
    argument *a = &c->argument[i];
    int64_t low = 0, high = 0;
    a->elements = 1;
    for (int axis = 0; axis < a->tensor.ndim; axis++) {
        int64_t reach = (a->shape[axis] - 1) * a->strides[axis];
        a->elements *= a->shape[axis];
        if (reach < 0) low += reach;
        if (reach > 0) high += reach;
    }
    int64_t size = a->tensor.dtype.bits / 8;
    if (a->elements == 0) low = 0, high = -1;
    a->bytes = (size_t)((high - low + 1) * size);
    int other = how == HOSTILE && a->is_output && take_below(from, 4) == 0 ? take_below(from, i) : i;
    argument *host = &c->argument[other];
    if (other < i && host->owned && host->bytes >= a->bytes) {
        size_t room = (host->bytes - a->bytes) / (size_t)size;
        size_t shift = take(from) & 1 ? (size_t)take(from) % (room + 1) : 0;
        a->block = host->block + shift * (size_t)size;
        a->shared = host->shared = true;
    } else {
        a->block = malloc(a->bytes ? a->bytes : 1);
        a->owned = true;
        fill(a, from, how);
    }
    uint64_t byte_offset = rarely(from) ? (uint64_t)(take(from) * size) : 0;
    a->tensor.byte_offset = byte_offset;
    a->tensor.data = (void *)((uintptr_t)a->block + (uintptr_t)(-low * size) - (uintptr_t)byte_offset);
    if (a->elements == 0 && take(from) & 1) a->tensor.data = NULL;
}

static void make_argument(call *c, int i, source *from, hostility how, const int64_t *extent, int common) {
    const parameter *p = &operations[c->operation].parameter[i];
    argument *a = &c->argument[i];
    bool of_rope = c->operation == ROPE || c->operation == QK_NORM_ROPE;
    a->is_output = (p->flags & OUTPUT) != 0;
    a->tensor.device.device_type = rarely(from) ? kDLCUDAHost : kDLCPU;
    a->tensor.dtype = take_dtype(from, p->flags, common, how);
    int rank = (int)strlen(p->axes);
    for (int axis = 0; axis < rank; axis++) {
        int from_axis = of_rope && rank == 4 && c->rope.time_axis == METALLOID_TIME_AXIS_1 && (axis == 1 || axis == 2)
                            ? 3 - axis
                            : axis;
        a->shape[axis] = extent[(unsigned char)p->axes[from_axis]];
        if (how == HOSTILE && rarely(from)) a->shape[axis] = take_below(from, 10);
    }
    if (c->operation == GATED_DELTA && i == 3 && c->rope.traditional)
        a->shape[rank++] = extent['D']; /* a channel's own decay */
    if (how == HOSTILE && rarely(from)) rank = take_below(from, MAX_AXES + 1);
    for (int axis = (int)strlen(p->axes); axis < rank; axis++) {
        if (a->shape[axis] == 0) a->shape[axis] = 1;
    }
    a->tensor.ndim = rank;
    a->tensor.shape = a->shape;
    a->tensor.strides = take_strides(a, from, !a->is_output || (how == HOSTILE && rarely(from))) ? a->strides : NULL;
    place(c, i, from, how);
}

void call_make(call *c, source *from, hostility how) {
    memset(c, 0, sizeof *c);
    c->operation = take_below(from, OPERATIONS);
    c->name = operations[c->operation].name;
    bool wild = how == HOSTILE;
    bool empty = wild && rarely(from);

    int64_t extent[256] = {0};
    for (const char *letter = "BTSKDEHV"; *letter; letter++)
        extent[(unsigned char)*letter] = 1 + take_below(from, *letter == 'B' ? 3 : 20);
    extent['K'] = 1 + extent['K'] % 3;
    extent['N'] = extent['K'] * (1 + take_below(from, 4));
    extent['V'] += 1; /* targets are 0 and 1 */
    extent['D'] += 1;
    extent['M'] = extent['T'] + take_below(from, 20);
    if (empty) extent[(unsigned char)"BTSKNDEHVM"[take_below(from, 10)]] = 0;
    c->dims = 2 * (1 + take_below(from, 10));
    if (c->dims > extent['D'] && extent['D'] >= 2) c->dims = extent['D'] / 2 * 2;
    extent['P'] = c->dims / 2;
    if (wild && rarely(from)) c->dims = (int64_t)take_bits(from);
    c->offset = c->operation == KV_CACHE
                    ? take_below(from, (int)(extent['M'] - extent['T']) > 0 ? (int)(extent['M'] - extent['T']) + 1 : 1)
                    : 0;
    if (wild && rarely(from)) c->offset = (int64_t)take_bits(from);
    c->eps = wild && rarely(from) ? take_double(from) : 1e-5;
    c->scale = wild && rarely(from) ? take_double(from) : 0.25;
    c->gelu = wild && rarely(from) ? (metalloid_gelu)take(from) : (metalloid_gelu)take_below(from, 2);

    c->rope = (metalloid_rope_options)METALLOID_ROPE_OPTIONS_INIT;
    c->rope.traditional = take(from) & 1;
    c->rope.time_axis = (metalloid_time_axis)take_below(from, 2);
    if (wild && rarely(from)) c->rope.time_axis = (metalloid_time_axis)take(from);
    if (wild && rarely(from)) c->rope.scale = take_double(from);
    if (wild && rarely(from)) c->rope.base = take_double(from);
    c->attention = (metalloid_attention_options)METALLOID_ATTENTION_OPTIONS_INIT;
    c->attention.causal = take(from) & 1;
    if (take(from) & 1) c->attention.causal_offset = take_below(from, 40) - 20;
    if (wild && rarely(from)) c->attention.causal_offset = (int64_t)take_bits(from);
    if (take(from) & 1) c->attention.window = 1 + take_below(from, 20);
    if (wild && rarely(from)) c->attention.window = (int64_t)take_bits(from);
    if (take(from) & 1) c->attention.softcap = 20;
    if (wild && rarely(from)) c->attention.softcap = take_double(from);
    c->cross_entropy = (metalloid_cross_entropy_options)METALLOID_CROSS_ENTROPY_OPTIONS_INIT;
    c->cross_entropy.has_ignore_index = take(from) & 1;
    c->cross_entropy.ignore_index = take_below(from, 4) - 1;

    const parameter *parameters = operations[c->operation].parameter;
    while (c->count < MAX_ARGUMENTS && parameters[c->count].axes) c->count++;
    int first_position = c->operation == ROPE ? 1 : c->operation == QK_NORM_ROPE ? 4 : MAX_ARGUMENTS;
    bool together = c->operation == ATTENTION || c->operation == KV_CACHE || c->operation == GATED_DELTA;
    int common = together ? take_below(from, 4) : -1;
    int frequencies = take_below(from, 3), positions = take_below(from, 3); /* 2: a number, not a tensor */
    for (int i = 0; i < c->count; i++) {
        argument *a = &c->argument[i];
        a->present = !(parameters[i].flags & OPTIONAL) || take(from) & 1;
        if (i >= first_position && i < first_position + 4) {
            int which = i - first_position;
            a->present = which < 2 ? frequencies == which : positions == which - 2;
        }
        if (wild && rarely(from)) a->present = !a->present;
        make_argument(c, i, from, how, extent, common);
    }
    if (frequencies < 2 && c->rope.base == 10000.0) c->rope.base = 0;
    for (int i = 0; i < c->count; i++) {
        argument *a = &c->argument[i];
        a->before = malloc(a->bytes ? a->bytes : 1);
        memcpy(a->before, a->block, a->bytes);
    }
}

void call_free(call *c) {
    for (int i = 0; i < c->count; i++) {
        if (c->argument[i].owned) free(c->argument[i].block);
        free(c->argument[i].before);
    }
}

metalloid_status call_run(const call *c) {
    DLTensor tensors[MAX_ARGUMENTS], *t[MAX_ARGUMENTS];
    for (int i = 0; i < MAX_ARGUMENTS; i++) {
        tensors[i] = c->argument[i].tensor;
        t[i] = c->argument[i].present ? &tensors[i] : NULL;
    }
    metalloid_rope_options rope = c->rope;
    int first = c->operation == ROPE ? 1 : 4;
    if (c->operation == ROPE || c->operation == QK_NORM_ROPE) {
        rope.freqs = t[first];
        rope.inv_freqs = t[first + 1];
        rope.offsets = t[first + 2];
        rope.position_ids = t[first + 3];
    }
    metalloid_attention_options attention = c->attention;
    attention.mask = t[3];
    attention.key_mask = t[4];
    attention.sinks = t[5];
    attention.logsumexp = t[6];
    switch (c->operation) {
    case RMS_NORM: return metalloid_rms_norm(NULL, t[0], t[1], c->eps, t[2]);
    case LAYER_NORM: return metalloid_layer_norm(NULL, t[0], t[1], t[2], c->eps, t[3]);
    case ADD_RMS_NORM: return metalloid_add_rms_norm(NULL, t[0], t[1], t[2], c->eps, t[3], t[4]);
    case ADD_LAYER_NORM: return metalloid_add_layer_norm(NULL, t[0], t[1], t[2], t[3], c->eps, t[4], t[5]);
    case ROPE: return metalloid_rope(NULL, t[0], c->dims, c->options ? c->options : &rope, t[5]);
    case QK_NORM_ROPE:
        return metalloid_qk_norm_rope(NULL, t[0], t[1], t[2], t[3], c->eps, c->dims, c->options ? c->options : &rope,
                                      t[8], t[9]);
    case SWIGLU: return metalloid_swiglu(NULL, t[0], t[1], t[2]);
    case GEGLU: return metalloid_geglu(NULL, t[0], t[1], c->gelu, t[2]);
    case ATTENTION:
        return metalloid_scaled_dot_product_attention(NULL, t[0], t[1], t[2], c->scale,
                                                      c->options ? c->options : &attention, t[7]);
    case KV_CACHE:
        return metalloid_kv_cache_sdpa_update(NULL, t[0], t[1], t[2], t[3], t[4], c->offset, t[5], c->scale, t[6]);
    case CROSS_ENTROPY:
        return metalloid_cross_entropy(NULL, t[0], t[1], c->options ? c->options : &c->cross_entropy, t[2]);
    default: return metalloid_gated_delta_update(NULL, t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8]);
    }
}

static void complain(const call *c, metalloid_status status, const char *what) {
    fprintf(stderr, "%s: %s; status %d, message: %s\n", c->name, what, (int)status, metalloid_last_error());
    abort();
}

void call_expect_sane(const call *c, metalloid_status status) {
    if ((int)status < METALLOID_OK || status > METALLOID_UNSUPPORTED) complain(c, status, "an unknown status");
    if (status != METALLOID_OK) {
        size_t length = strlen(c->name);
        const char *message = metalloid_last_error();
        if (strncmp(message, c->name, length) != 0 || message[length] != ':' || strchr(message, '\n'))
            complain(c, status, "an odd message");
    }
    for (int i = 0; i < c->count; i++) {
        const argument *a = &c->argument[i];
        bool may_change = status == METALLOID_OK && ((a->is_output && a->present) || a->shared);
        if (!may_change && memcmp(a->before, a->block, a->bytes) != 0) complain(c, status, "wrote where it must not");
    }
}
