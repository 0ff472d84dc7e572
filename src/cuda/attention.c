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

/* Of Hopper's kernels, which are named after the head dimensions that they serve. */
#define FORMS(op, dims) \
    { op "_f16_" dims, op "_bf16_" dims }
enum { HOPPER_DIMS = 5, HOPPER_ALIGNMENT = 1024, ELEMENT = 2 };
static const struct {
    int key_dim, value_dim;
} hopper_dims[HOPPER_DIMS] = {{64, 64}, {96, 96}, {128, 128}, {192, 128}, {256, 256}};

/* As a dimension lies in shared memory: in blocks of 64 features. */
static int in_blocks(int dim) { return (dim + 63) / 64 * 64; }

static int hopper_dims_of(const mtl_attention_args *args) {
    int at = 0;
    while (hopper_dims[at].key_dim < args->head_dim || hopper_dims[at].value_dim < args->value_dim) at++;
    return at;
}

static bool describe_keys(const mtl_cuda_call *call, const mtl_attention_args *args,
                          mtl_cuda_attention_hopper_args *hopper, int keys) {
    return mtl_cuda_describe(call, hopper->k_map, &args->k, args->head_dim, args->kv_len, args->kv_heads, args->batch,
                             keys) &&
           mtl_cuda_describe(call, hopper->v_map, &args->v, args->value_dim, args->kv_len, args->kv_heads, args->batch,
                             keys);
}

/* Memory for the parts of split keys, `rows` of each split. */
static metalloid_status allocate_parts(const mtl_cuda_call *call, mtl_cuda_attention_args *attention, int64_t rows,
                                       CUdeviceptr *memory) {
    int64_t all = attention->splits * rows;
    MTL_TRY(mtl_cuda_allocate(call, (size_t)(all * (attention->value_dim + 1)) * sizeof(float), memory));
    attention->parts = (float *)*memory;
    attention->part_logs = attention->parts + all * attention->value_dim;
    return METALLOID_OK;
}

static metalloid_status merge_parts(const mtl_cuda_call *call, const mtl_cuda_attention_args *attention, int64_t rows,
                                    CUdeviceptr memory, metalloid_status status) {
    mtl_cuda_grid merge = {.blocks = rows, .threads = MERGE_COLUMNS, .rows = MERGE_GROUPS, .overlaps = true};
    if (status == METALLOID_OK) status = mtl_cuda_launch(call, kernel_of(MERGE), merge, attention);
    mtl_cuda_release(call, memory);
    return status;
}

/* Few queries on Hopper: a cluster to a key/value head. *done is false where attention.cu has to serve. */
static metalloid_status decode_hopper(const mtl_cuda_call *call, const mtl_attention_args *args,
                                      mtl_cuda_attention_args *attention, bool *done) {
    enum { ROWS = 16, KEYS = 64, THREADS = 160, MOST_BLOCKS = 16, MOST_TILES = 4096, LEAST_TILES = 8 };
    enum { MANY_BLOCKS = 8, MANY_TILES = 16, MOST_STAGES = 12, OWN_MEMORY = 6 << 10 };
    static const struct {
        int blocks; /* that a multiprocessor holds */
        int stages;
        const char *name[2];
    } kernels[HOPPER_DIMS] = {{2, 6, FORMS("attention_decode", "64_64")},
                              {2, 3, FORMS("attention_decode", "128_128")}, /* 96 lies in two blocks of 64 too */
                              {2, 3, FORMS("attention_decode", "128_128")},
                              {1, 4, FORMS("attention_decode", "192_128")},
                              {1, 3, FORMS("attention_decode", "256_256")}};
    int64_t rows = attention->group * args->q_len, heads = args->batch * args->kv_heads;
    mtl_cuda_attention_hopper_args hopper;
    *done = false;
    if (rows > FEW_ROWS || args->kv_len > INT32_MAX - 2 * KEYS || !describe_keys(call, args, &hopper, KEYS))
        return METALLOID_OK;
    int at = hopper_dims_of(args), bf16 = args->q.dtype == MTL_BF16;
    mtl_cuda_kernel kernel = {MTL_CUDA_IMAGE_attention_decode, 2 * at + bf16, kernels[at].name[bf16]};
    mtl_cuda_grid grid = {
        .y = (int)heads, .z = (int)((rows + ROWS - 1) / ROWS), .threads = THREADS, .cluster = 1, .overlaps = true};
    int64_t multiprocessors = call->device->multiprocessors, places = multiprocessors * kernels[at].blocks;
    int64_t items = heads * grid.z, tiles = (args->kv_len + KEYS - 1) / KEYS;
    int stage = KEYS * (in_blocks(hopper_dims[at].key_dim) + in_blocks(hopper_dims[at].value_dim)) * ELEMENT;
    hopper.stages = kernels[at].stages;
    /* Half the multiprocessors keep the memory busy, and all blocks have to end together. Pairs find their places on
     * any number of multiprocessors; larger clusters do not fill them, as a cluster's blocks share a group of 16 or so,
     * and the groups differ: of those no more than leave room. */
    int64_t roomy = multiprocessors * 3 / 4;
    while (grid.cluster < MOST_BLOCKS && grid.cluster * 2 <= tiles &&
           (items * grid.cluster * 2 <= roomy || (grid.cluster == 1 && items * 2 <= places)))
        grid.cluster *= 2;
    /* Where places are taken again and again, long heads go several blocks each: fewer places of memory are read at
     * a time. */
    if (items > places && tiles >= MANY_BLOCKS * MANY_TILES) {
        int deep = (call->device->shared_memory - HOPPER_ALIGNMENT - OWN_MEMORY) / stage;
        grid.cluster = MANY_BLOCKS, hopper.stages = deep < MOST_STAGES ? deep : MOST_STAGES;
    }
    grid.shared_memory = hopper.stages * stage + HOPPER_ALIGNMENT;
    MTL_TRY(mtl_cuda_fit_cluster(call, kernel, &grid));
    int64_t splits = roomy / (items * grid.cluster), most = tiles / (grid.cluster * LEAST_TILES);
    splits = splits < most ? splits : most;
    attention->splits = splits > 1 ? (int)splits : 1;
    grid.blocks = grid.cluster * attention->splits;
    if (args->key_mask.data && (tiles + grid.blocks - 1) / grid.blocks > MOST_TILES) return METALLOID_OK;

    *done = true;
    CUdeviceptr memory = 0;
    if (attention->splits > 1) MTL_TRY(allocate_parts(call, attention, heads * rows, &memory));
    hopper.attention = *attention;
    metalloid_status status = mtl_cuda_launch(call, kernel, grid, &hopper);
    return memory ? merge_parts(call, attention, heads * rows, memory, status) : status;
}

/* Many queries on Hopper. *done is false where attention.cu has to serve. */
static metalloid_status attend_hopper(const mtl_cuda_call *call, const mtl_attention_args *args,
                                      const mtl_cuda_attention_args *attention, bool *done) {
    enum { ROWS = 128, LEAST_ROWS = 64, THREADS = 384, STAGES = 2, MASK_STAGES = 4 };
    enum { MOST_LENGTH = (1 << 30) - 2 * ROWS };
    enum { PLAIN, HIDDEN, CHANGED, KINDS };
    static const int images[KINDS] = {MTL_CUDA_IMAGE_attention_hopper, MTL_CUDA_IMAGE_attention_hopper_masked,
                                      MTL_CUDA_IMAGE_attention_hopper_changed};
#define KINDS_OF(dims) \
    { FORMS("attention", dims), FORMS("attention_masked", dims), FORMS("attention_changed", dims) }
    static const struct {
        int keys;
        const char *name[KINDS][2]; /* float16, bfloat16 */
    } kernels[HOPPER_DIMS] = {{128, KINDS_OF("64_64")},
                              {128, KINDS_OF("96_96")},
                              {128, KINDS_OF("128_128")},
                              {128, KINDS_OF("192_128")},
                              {64, KINDS_OF("256_256")}};
    bool bf16 = args->q.dtype == MTL_BF16, adds = args->mask.data && args->mask.dtype != MTL_BOOL;
    int kind = adds || attention->softcap > 0 || !(attention->scale > 0) ? CHANGED
               : args->mask.data || args->key_mask.data                  ? HIDDEN
                                                                         : PLAIN;
    int at = hopper_dims_of(args), places = call->device->multiprocessors;
    int keys = kind == PLAIN ? kernels[at].keys : kernels[at].keys / 2;
    int64_t items = (args->q_len + ROWS - 1) / ROWS * args->batch * args->q_heads;
    *done = false;
    if (args->q_len < LEAST_ROWS || items * 2 < places || items > INT32_MAX || args->q_len > MOST_LENGTH ||
        args->kv_len > MOST_LENGTH)
        return METALLOID_OK;
    mtl_cuda_attention_hopper_args hopper = {.attention = *attention, .items = (unsigned)items};
    if (!mtl_cuda_describe(call, hopper.q_map, &args->q, args->head_dim, args->q_len, args->q_heads, args->batch,
                           ROWS) ||
        !describe_keys(call, args, &hopper, keys))
        return METALLOID_OK;
    *done = true;
    mtl_cuda_grid grid = {.blocks = items < places ? items : places, .threads = THREADS};
    int key_dim = in_blocks(hopper_dims[at].key_dim), value_dim = in_blocks(hopper_dims[at].value_dim);
    grid.shared_memory = (ROWS * key_dim + STAGES * keys * (key_dim + value_dim)) * ELEMENT + HOPPER_ALIGNMENT;
    if (kind != PLAIN) grid.shared_memory += MASK_STAGES * (ROWS + 1) * VECTOR;
    mtl_cuda_kernel kernel = {images[kind], 2 * at + bf16, kernels[at].name[kind][bf16]};
    if (items == grid.blocks) return mtl_cuda_launch(call, kernel, grid, &hopper);
    CUdeviceptr next;
    MTL_TRY(mtl_cuda_allocate(call, sizeof *hopper.next, &next));
    metalloid_status status = mtl_cuda_fill(call, next, 1, sizeof *hopper.next, 0);
    hopper.next = (unsigned *)next;
    if (status == METALLOID_OK) status = mtl_cuda_launch(call, kernel, grid, &hopper);
    mtl_cuda_release(call, next);
    return status;
}

static metalloid_status attend(const mtl_cuda_call *call, const mtl_attention_args *args,
                               mtl_cuda_attention_args *attention) {
    if (!tensor_cores_serve(args)) {
        int64_t rows = args->batch * args->q_heads * args->q_len, blocks = (rows + 3) / 4;
        mtl_cuda_grid grid = {.blocks = blocks < 1 << 20 ? blocks : 1 << 20, .threads = WARP, .rows = 4};
        return mtl_cuda_launch(call, kernel_of(ANY), grid, attention);
    }
    bool done;
    metalloid_status status = decode_hopper(call, args, attention, &done);
    if (done || status != METALLOID_OK) return status;
    status = attend_hopper(call, args, attention, &done);
    if (done) return status;
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
    if (splits > 1) MTL_TRY(allocate_parts(call, attention, heads * rows, &memory));
    int index = (args->q.dtype == MTL_BF16 ? 2 * DIMS : 0) + class * 2 + few;
    status = mtl_cuda_launch(call, kernel_of(index), grid, attention);
    return memory ? merge_parts(call, attention, heads * rows, memory, status) : status;
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
