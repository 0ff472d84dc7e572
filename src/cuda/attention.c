/* Attention on CUDA: the cache, which kernel, and how keys are split. SPDX-License-Identifier: MIT */
#include "cuda/driver.h"

enum {
    VECTOR = 16,
    WARP = 32,
    DIMS = 3, /* classes of head dimensions */
    MOST_DIM = 256,
    FEW_ROWS = 32,   /* for which a block is a warp of 16 rows */
    MANY_ROWS = 128, /* of any other block */
    MOST_SPLITS = 256,
    MERGE_COLUMNS = 64,
    MERGE_GROUPS = 8,
};

#define NAMES(dtype)                                                                      \
    "attention_" #dtype "_64", "attention_" #dtype "_64_few", "attention_" #dtype "_128", \
        "attention_" #dtype "_128_few", "attention_" #dtype "_256", "attention_" #dtype "_256_few"
static const char *const names[] = {NAMES(f16), NAMES(bf16), "attention_any", "attention_merge", "attention_append"};
enum { ANY = 12, MERGE, APPEND };

static mtl_cuda_kernel kernel_of(int index) { return (mtl_cuda_kernel){MTL_CUDA_IMAGE_attention, index, names[index]}; }

/* A block of attention.cu, by its dimension and whether its rows are few. */
typedef struct tile {
    int dim, rows, keys, blocks; /* blocks that a multiprocessor holds */
} tile;
static const tile tiles[DIMS][2] = {{{64, MANY_ROWS, 64, 2}, {64, 16, 64, 6}},
                                    {{128, MANY_ROWS, 64, 1}, {128, 16, 32, 6}},
                                    {{256, MANY_ROWS, 32, 1}, {256, 16, 32, 3}}};

static mtl_cuda_strided strided(mtl_attention_operand operand) {
    return (mtl_cuda_strided){
        operand.data, (int)operand.dtype, {operand.stride[0], operand.stride[1], operand.stride[2], operand.stride[3]}};
}

static bool aligned(mtl_attention_operand operand) {
    int64_t odd = (int64_t)((uintptr_t)operand.data % VECTOR);
    for (int axis = 0; axis < 3; axis++) odd |= operand.stride[axis] % VECTOR;
    return odd == 0 && operand.stride[3] == mtl_dtype_size(operand.dtype);
}

static bool tensor_cores_serve(const mtl_attention_args *args) {
    mtl_dtype dtype = args->q.dtype;
    return (dtype == MTL_F16 || dtype == MTL_BF16) && args->k.dtype == dtype && args->v.dtype == dtype &&
           aligned(args->q) && aligned(args->k) && aligned(args->v) && args->head_dim % 8 == 0 &&
           args->value_dim % 8 == 0 && args->head_dim > 0 && args->value_dim > 0 && args->head_dim <= MOST_DIM &&
           args->value_dim <= MOST_DIM && args->kv_len > 0 && args->batch * args->kv_heads <= 65535;
}

static metalloid_status append(const mtl_cuda_call *call, const mtl_attention_args *args,
                               const mtl_attention_operand *from, const mtl_attention_operand *cache,
                               int64_t features) {
    mtl_cuda_append_args arguments = {.from = strided(*from),
                                      .to = strided(*cache),
                                      .heads = args->kv_heads,
                                      .time = args->q_len,
                                      .features = features,
                                      .count = args->batch * args->q_len * args->kv_heads * features,
                                      .size = (int)mtl_dtype_size(cache->dtype)};
    arguments.to.data += args->append.offset * cache->stride[2];
    mtl_cuda_grid grid = {.blocks = (arguments.count + 255) / 256, .threads = 256};
    if (grid.blocks > 65536) grid.blocks = 65536;
    return mtl_cuda_launch(call, kernel_of(APPEND), grid, &arguments);
}

/* Many queries on Hopper: a block is 128 of one head. *done is false where attention.cu has to serve. */
static metalloid_status attend_hopper(const mtl_cuda_call *call, const mtl_attention_args *args,
                                      const mtl_cuda_attention_args *attention, bool *done) {
    enum { ROWS = 128, STAGES = 2, GROUPS = 3, ALIGNMENT = 1024, ELEMENT = 2 };
#define FORMS(dims)                                                     \
    {                                                                   \
        {"attention_f16_" dims, "attention_bf16_" dims}, {              \
            "attention_masked_f16_" dims, "attention_masked_bf16_" dims \
        }                                                               \
    }
    static const struct {
        int key_dim, value_dim, keys;
        const char *name[2][2]; /* with a mask or not; float16, bfloat16 */
    } kernels[] = {{64, 64, 128, FORMS("64_64")},
                   {128, 128, 128, FORMS("128_128")},
                   {192, 128, 128, FORMS("192_128")},
                   {256, 256, 64, FORMS("256_256")}};
    int64_t blocks = (args->q_len + ROWS - 1) / ROWS, heads = args->batch * args->q_heads;
    *done = false;
    if (args->q_len < ROWS / 2 || blocks * heads * 2 < call->device->multiprocessors || heads > 65535 ||
        args->q_len > INT32_MAX - ROWS || args->kv_len > INT32_MAX - ROWS)
        return METALLOID_OK;
    int at = 0;
    while (kernels[at].key_dim < args->head_dim || kernels[at].value_dim < args->value_dim) at++;
    int keys = kernels[at].keys, key_dim = kernels[at].key_dim, value_dim = kernels[at].value_dim;

    mtl_cuda_attention_hopper_args hopper = {.attention = *attention};
    if (!mtl_cuda_describe(call, hopper.q_map, &args->q, args->head_dim, args->q_len, args->q_heads, args->batch,
                           ROWS) ||
        !mtl_cuda_describe(call, hopper.k_map, &args->k, args->head_dim, args->kv_len, args->kv_heads, args->batch,
                           keys) ||
        !mtl_cuda_describe(call, hopper.v_map, &args->v, args->value_dim, args->kv_len, args->kv_heads, args->batch,
                           keys))
        return METALLOID_OK;
    *done = true;
    bool bf16 = args->q.dtype == MTL_BF16;
    bool masked = args->mask.data || args->key_mask.data || attention->softcap > 0 || !(attention->scale > 0);
    mtl_cuda_grid grid = {.blocks = blocks, .y = (int)heads, .threads = GROUPS * 4 * WARP};
    grid.shared_memory = (ROWS * key_dim + STAGES * keys * (key_dim + value_dim)) * ELEMENT + ALIGNMENT;
    mtl_cuda_kernel kernel = {masked ? MTL_CUDA_IMAGE_attention_hopper_masked : MTL_CUDA_IMAGE_attention_hopper,
                              2 * at + bf16, kernels[at].name[masked][bf16]};
    return mtl_cuda_launch(call, kernel, grid, &hopper);
}

static metalloid_status attend(const mtl_cuda_call *call, const mtl_attention_args *args,
                               mtl_cuda_attention_args *attention) {
    if (!tensor_cores_serve(args)) {
        int64_t rows = args->batch * args->q_heads * args->q_len, blocks = (rows + 3) / 4;
        mtl_cuda_grid grid = {.blocks = blocks < 1 << 20 ? blocks : 1 << 20, .threads = WARP, .rows = 4};
        return mtl_cuda_launch(call, kernel_of(ANY), grid, attention);
    }
    bool done;
    metalloid_status in_groups = attend_hopper(call, args, attention, &done);
    if (done) return in_groups;
    int64_t dim = args->head_dim > args->value_dim ? args->head_dim : args->value_dim;
    int64_t rows = attention->group * args->q_len, heads = args->batch * args->kv_heads;
    int class = dim <= 64 ? 0 : dim <= 128 ? 1 : 2, few = rows <= FEW_ROWS;
    const tile chosen = tiles[class][few];
    mtl_cuda_grid grid = {
        .blocks = (rows + chosen.rows - 1) / chosen.rows, .y = (int)heads, .threads = chosen.rows * 2};
    grid.shared_memory = (chosen.rows + 4 * chosen.keys) * chosen.dim * 2;

    /* One range of keys for each place that would stay empty, but none of less than two tiles. */
    int64_t places = (int64_t)call->device->multiprocessors * chosen.blocks, splits = places / (grid.blocks * heads);
    int64_t most = args->kv_len / (2 * chosen.keys);
    splits = splits < most ? splits : most;
    splits = splits < 1 ? 1 : splits > MOST_SPLITS ? MOST_SPLITS : splits;
    attention->split_keys = ((args->kv_len + splits - 1) / splits + chosen.keys - 1) / chosen.keys * chosen.keys;
    splits = (args->kv_len + attention->split_keys - 1) / attention->split_keys;
    attention->splits = grid.z = (int)splits;

    CUdeviceptr memory = 0;
    int64_t all = heads * rows;
    if (splits > 1) {
        size_t bytes = (size_t)(splits * all * (args->value_dim + 1)) * sizeof(float);
        MTL_TRY(mtl_cuda_allocate(call, bytes, &memory));
        attention->parts = (float *)memory;
        attention->part_logs = attention->parts + splits * all * args->value_dim;
    }
    int index = (args->q.dtype == MTL_BF16 ? 2 * DIMS : 0) + class * 2 + few;
    metalloid_status status = mtl_cuda_launch(call, kernel_of(index), grid, attention);
    if (splits > 1) {
        mtl_cuda_grid merge = {.blocks = all, .threads = MERGE_COLUMNS, .rows = MERGE_GROUPS};
        if (status == METALLOID_OK) status = mtl_cuda_launch(call, kernel_of(MERGE), merge, attention);
        mtl_cuda_release(call, memory);
    }
    return status;
}

metalloid_status mtl_cuda_attention(const metalloid_context *context, const char *op, const mtl_attention_args *args) {
    mtl_cuda_call call;
    MTL_TRY(mtl_cuda_begin(&call, context, op, args->device, args->in_double));
    metalloid_status status = METALLOID_OK;
    if (args->append.k.data) {
        status = append(&call, args, &args->append.k, &args->k, args->head_dim);
        if (status == METALLOID_OK) status = append(&call, args, &args->append.v, &args->v, args->value_dim);
    }
    bool attends = args->batch && args->q_heads && args->q_len && (args->value_dim || args->logsumexp.data);
    if (!attends || status != METALLOID_OK) return mtl_cuda_end(&call, status);
    mtl_cuda_attention_args attention = {
        .batch = args->batch,
        .q_heads = args->q_heads,
        .kv_heads = args->kv_heads,
        .q_len = args->q_len,
        .kv_len = args->kv_len,
        .head_dim = args->head_dim,
        .value_dim = args->value_dim,
        .group = args->q_heads / args->kv_heads,
        .q = strided(args->q),
        .k = strided(args->k),
        .v = strided(args->v),
        .out = strided(args->out),
        .mask = strided(args->mask),
        .key_mask = {(char *)(uintptr_t)args->key_mask.data,
                     (int)args->key_mask.dtype,
                     {args->key_mask.stride[0], args->key_mask.stride[1]}},
        .sinks = mtl_cuda_row_of(args->sinks),
        .logsumexp = {args->logsumexp.data,
                      (int)args->logsumexp.dtype,
                      {args->logsumexp.stride[0], args->logsumexp.stride[1], args->logsumexp.stride[2]}},
        .scale = (float)args->scale,
        .softcap = (float)args->softcap,
        .first_visible = args->first_visible,
        .last_visible = args->last_visible,
        .splits = 1};
    return mtl_cuda_end(&call, attend(&call, args, &attention));
}
