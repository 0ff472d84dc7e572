/* Attention on CUDA: the cache, which kernel, and how keys are split. SPDX-License-Identifier: MIT */
#include "cuda/driver.h"

enum {
    VECTOR = 16,
    WARP = 32,
    DIMS = 3, /* classes of head dimensions */
    MOST_DIM = 256,
    MOST_KEY_DIM = 576, /* of attention_wide */
    MOST_VALUE_DIM = 512,
    FEW_ROWS = 32, /* for which blocks of few rows do */
    MOST_SPLITS = 256,
    MOST_CAP = 1 << 10, /* of scores; times what Hopper's tanh is off by, it does not show */
    MERGE_COLUMNS = 64,
    MERGE_GROUPS = 8,
    MERGE_RANGES = 4,
    CACHE = 32 << 20, /* of the second level: for keys and values in use at a time */
};

#define NAMES(dtype)                                                                      \
    "attention_" #dtype "_64", "attention_" #dtype "_64_few", "attention_" #dtype "_128", \
        "attention_" #dtype "_128_few", "attention_" #dtype "_256", "attention_" #dtype "_256_few"
static const char *const names[] = {NAMES(f16), NAMES(bf16), "attention_any", "attention_merge", "attention_append"};
static const char *const f32_names[] = {NAMES(f32)};
#define WIDE_NAMES(dtype) "attention_wide_" #dtype, "attention_wide_" #dtype "_short", "attention_wide_" #dtype "_few"
static const char *const wide_names[] = {WIDE_NAMES(f16), WIDE_NAMES(bf16)};
enum { ANY = 12, MERGE, APPEND };

static mtl_cuda_kernel kernel_of(int index) { return (mtl_cuda_kernel){MTL_CUDA_IMAGE_attention, index, names[index]}; }

/* A block of a kernel that is not Hopper's own. */
typedef struct tile {
    int rows, keys, threads;
    int blocks; /* that a multiprocessor holds */
    int memory; /* shared, in bytes */
} tile;

/* attention.cu, by its dimension and whether its rows are few: queries and two stages of keys and values. */
#define TILE(dim, rows, keys, blocks) \
    { (rows), (keys), 2 * (rows), (blocks), 2 * (dim) * ((rows) + 4 * (keys)), }
static const tile mma_tiles[DIMS][2] = {{TILE(64, 128, 64, 2), TILE(64, 16, 64, 6)},
                                        {TILE(128, 128, 64, 1), TILE(128, 16, 32, 6)},
                                        {TILE(256, 128, 32, 1), TILE(256, 16, 32, 3)}};

/* attention_f32.cu, likewise: queries, keys, values and weights. */
#define F32_TILE(dim, rows, keys, threads, blocks)                                                 \
    {                                                                                              \
        (rows), (keys), (threads), (blocks),                                                       \
            4 * ((dim) * ((rows) + 2 * (keys)) + (rows) * (keys) + 4 * (keys) * ((threads) > 32)), \
    }
static const tile f32_tiles[DIMS][2] = {{F32_TILE(64, 128, 64, 128, 2), F32_TILE(64, 16, 32, 32, 8)},
                                        {F32_TILE(128, 64, 64, 128, 2), F32_TILE(128, 8, 32, 32, 6)},
                                        {F32_TILE(256, 64, 64, 256, 1), F32_TILE(256, 8, 32, 32, 3)}};

/* attention_wide.cu: for many rows, for many and short tiles of keys, for few. Queries, keys, values, weights of 64
 * keys, four numbers and a flag a row. */
#define WIDE_TILE(rows, keys, threads, blocks)                                                               \
    {                                                                                                        \
        (rows), (keys), (threads), (blocks),                                                                 \
            2 * (MOST_KEY_DIM * ((rows) + (keys)) + MOST_VALUE_DIM * (keys) + 64 * (rows)) + 4 * 5 * (rows), \
    }
enum { WIDE_FORMS = 3 };
static const tile wide_tiles[WIDE_FORMS] = {WIDE_TILE(64, 64, 256, 1), WIDE_TILE(64, 32, 256, 1),
                                            WIDE_TILE(16, 32, 128, 2)};

static mtl_cuda_strided strided(mtl_attention_operand operand) {
    return (mtl_cuda_strided){
        operand.data, (int)operand.dtype, {operand.stride[0], operand.stride[1], operand.stride[2], operand.stride[3]}};
}

/* Within it float32 does: a smaller cap leaves all scores alike too, and a larger one leaves them as they are. */
static float float_cap(double softcap) {
    static const double least = 1e-30, most = 1e37;
    return softcap == 0 ? 0 : (float)(softcap < least ? least : softcap > most ? most : softcap);
}

static double bytes_of_head(const mtl_attention_args *args) { /* its keys and values */
    return (double)args->kv_len * (double)(args->head_dim + args->value_dim) * (double)mtl_dtype_size(args->k.dtype);
}

static bool aligned(mtl_attention_operand operand) {
    int64_t odd = (int64_t)((uintptr_t)operand.data % VECTOR);
    for (int axis = 0; axis < 3; axis++) odd |= operand.stride[axis] % VECTOR;
    return odd == 0 && operand.stride[3] == mtl_dtype_size(operand.dtype);
}

/* Whether there is something to do in tiles, and as much as a grid can count. */
static bool tiles_serve(const mtl_attention_args *args) {
    enum { LEAST_ROWS = 8 /* of a block */ };
    int64_t most = INT32_MAX - 1024, group = args->q_heads / args->kv_heads, heads = args->batch * args->kv_heads;
    return args->head_dim > 0 && args->value_dim > 0 && args->kv_len > 0 && group <= most &&
           args->q_len <= most / group && heads <= most / (group * args->q_len / LEAST_ROWS + 1);
}

static bool tensor_cores_serve(const mtl_attention_args *args) {
    mtl_dtype dtype = args->q.dtype;
    return (dtype == MTL_F16 || dtype == MTL_BF16) && args->k.dtype == dtype && args->v.dtype == dtype &&
           aligned(args->q) && aligned(args->k) && aligned(args->v) && args->head_dim % 8 == 0 &&
           args->value_dim % 8 == 0 && args->head_dim <= MOST_KEY_DIM && args->value_dim <= MOST_VALUE_DIM;
}

static metalloid_status append(const mtl_cuda_call *call, mtl_cuda_append_args args, int64_t batch) {
    enum { THREADS = 256, ROWS = THREADS / WARP, MOST_BLOCKS = 1 << 16 };
    args.rows = batch * args.time * args.heads;
    int64_t blocks = (args.rows + ROWS - 1) / ROWS;
    mtl_cuda_grid grid = {.blocks = blocks < MOST_BLOCKS ? blocks : MOST_BLOCKS, .threads = THREADS};
    return grid.blocks ? mtl_cuda_launch(call, kernel_of(APPEND), grid, &args) : METALLOID_OK;
}

static metalloid_status append_one(const mtl_cuda_call *call, const mtl_attention_args *args,
                                   const mtl_attention_operand *from, const mtl_attention_operand *cache,
                                   int64_t features) {
    mtl_cuda_append_args arguments = {.from = strided(*from),
                                      .to = strided(*cache),
                                      .heads = args->kv_heads,
                                      .time = args->q_len,
                                      .features = features,
                                      .size = (int)mtl_dtype_size(cache->dtype)};
    arguments.to.data += args->append.offset * cache->stride[2];
    return append(call, arguments, args->batch);
}

static metalloid_status append_to_cache(const mtl_cuda_call *call, const mtl_attention_args *args) {
    if (!args->append.k.data) return METALLOID_OK;
    MTL_TRY(append_one(call, args, &args->append.k, &args->k, args->head_dim));
    return append_one(call, args, &args->append.v, &args->v, args->value_dim);
}

/* The kernel that reads keys and values. The cache is written only here, when the call has all the memory that it wants:
 * one that fails for lack of it leaves everything as it was. */
static metalloid_status launch_attention(const mtl_cuda_call *call, const mtl_attention_args *args,
                                         mtl_cuda_kernel kernel, mtl_cuda_grid grid, const void *arguments) {
    MTL_TRY(append_to_cache(call, args));
    return mtl_cuda_launch(call, kernel, grid, arguments);
}

/* Of Hopper's kernels, which are named after the head dimensions that they serve. */
#define FORMS(op, dims) \
    { op "_f16_" dims, op "_bf16_" dims }
enum { HOPPER_DIMS = 5, HOPPER_ALIGNMENT = 1024, ELEMENT = 2, BLOCK = 64 /* features */ };
static const struct {
    int key_dim, value_dim;
} hopper_dims[HOPPER_DIMS] = {{64, 64}, {96, 96}, {128, 128}, {192, 128}, {256, 256}};

/* As a dimension lies in shared memory: in blocks of features. */
static int in_blocks(int dim) { return (dim + BLOCK - 1) / BLOCK * BLOCK; }

static int hopper_dims_of(const mtl_attention_args *args) {
    int at = 0;
    while (hopper_dims[at].key_dim < args->head_dim || hopper_dims[at].value_dim < args->value_dim) at++;
    return at;
}

static bool describe_keys(const mtl_cuda_call *call, const mtl_attention_args *args,
                          mtl_cuda_attention_hopper_args *hopper, int keys) {
    mtl_cuda_box box = {BLOCK, keys};
    return mtl_cuda_describe(call, hopper->k_map, &args->k, args->head_dim, args->kv_len, args->kv_heads, args->batch,
                             box) &&
           mtl_cuda_describe(call, hopper->v_map, &args->v, args->value_dim, args->kv_len, args->kv_heads, args->batch,
                             box);
}

/* One row stands for all where they do not differ. */
static bool describe_mask(const mtl_cuda_call *call, const mtl_attention_args *args,
                          mtl_cuda_attention_hopper_args *hopper, mtl_attention_operand mask, mtl_cuda_box box) {
    if (mask.stride[2] == 0) box.rows = 1;
    return aligned(mask) &&
           mtl_cuda_describe(call, hopper->mask_map, &mask, args->kv_len, args->q_len, args->q_heads, args->batch, box);
}

/* Describes the mask. One that the copy engine cannot read, of odd strides, goes into rows that it can, in *memory, once
 * and not once for each axis that it is broadcast along. *done is false where that cannot be. */
static metalloid_status prepare_mask(const mtl_cuda_call *call, const mtl_attention_args *args,
                                     mtl_cuda_attention_hopper_args *hopper, mtl_cuda_box box, CUdeviceptr *memory,
                                     bool *done) {
    mtl_attention_operand mask = args->mask;
    *done = false;
    if (mask.dtype != MTL_BOOL && mask.dtype != args->q.dtype) return METALLOID_OK; /* integers: seldom */
    *done = describe_mask(call, args, hopper, mask, box);
    if (*done) return METALLOID_OK;
    int64_t size = mtl_dtype_size(mask.dtype), pitch = (args->kv_len * size + VECTOR - 1) / VECTOR * VECTOR;
    int64_t rows = mask.stride[2] ? args->q_len : 1, heads = mask.stride[1] ? args->q_heads : 1,
            batch = mask.stride[0] ? args->batch : 1;
    *done = mtl_cuda_allocate(call, (size_t)(batch * heads * rows * pitch), memory) == METALLOID_OK;
    if (!*done) return METALLOID_OK;
    mask.data = (char *)*memory, mask.stride[3] = size;
    mask.stride[2] = rows > 1 ? pitch : 0, mask.stride[1] = heads > 1 ? rows * pitch : 0;
    mask.stride[0] = batch > 1 ? heads * rows * pitch : 0;
    mtl_cuda_append_args copy = {.from = strided(args->mask),
                                 .to = strided(mask),
                                 .heads = heads,
                                 .time = rows,
                                 .features = args->kv_len,
                                 .size = (int)size};
    *done = describe_mask(call, args, hopper, mask, box);
    return *done ? append(call, copy, batch) : METALLOID_OK;
}

/* Memory for the parts of split keys, `rows` of each split. */
static metalloid_status allocate_parts(const mtl_cuda_call *call, mtl_cuda_attention_args *attention, int64_t rows,
                                       CUdeviceptr *memory) {
    int64_t all = attention->splits * rows;
    MTL_TRY(mtl_cuda_allocate(call, (size_t)(all * (attention->value_dim + 2)) * sizeof(float), memory));
    attention->parts = (float *)*memory;
    attention->part_logs = attention->parts + all * attention->value_dim;
    attention->part_sums = attention->part_logs + all;
    return METALLOID_OK;
}

static metalloid_status merge_parts(const mtl_cuda_call *call, const mtl_cuda_attention_args *attention, int64_t rows,
                                    CUdeviceptr memory, metalloid_status status) {
    int groups = 1; /* of a few ranges each, whose loads are on their way together */
    while (groups < MERGE_GROUPS && groups * MERGE_RANGES < attention->splits) groups *= 2;
    mtl_cuda_grid merge = {.blocks = rows, .threads = MERGE_COLUMNS, .rows = groups, .overlaps = true};
    if (status == METALLOID_OK) status = mtl_cuda_launch(call, kernel_of(MERGE), merge, attention);
    mtl_cuda_release(call, memory);
    return status;
}

/* Few queries on Hopper: a cluster to a key/value head. *done is false where attention.cu has to serve. */
static metalloid_status decode_hopper(const mtl_cuda_call *call, const mtl_attention_args *args,
                                      mtl_cuda_attention_args *attention, bool *done) {
    enum { ROWS = 16, KEYS = 64, TEAM = 4, MOST_BLOCKS = 16, MOST_TILES = 512, LEAST_TILES = 8, LARGE_CLUSTER = 4 };
    enum { FEW_TILES = 32, MOST_STAGES = 12, OWN_MEMORY = 6 << 10, MOST_HEADS = 65535 /* along y */ };
#define MASKED_FORMS(op, dims) \
    { FORMS(op, dims), FORMS(op "_masked", dims) }
#define DECODE_FORMS(dims) \
    { MASKED_FORMS("attention_decode", dims), MASKED_FORMS("attention_decode_small", dims) }
    static const struct {
        int teams;                 /* of warps, in a block that has a multiprocessor for itself */
        int small_stages;          /* of one of two small blocks, of a team each; 0: there are none */
        const char *name[2][2][2]; /* small, masked, bfloat16 */
    } kernels[HOPPER_DIMS] = {{2, 6, DECODE_FORMS("64_64")},
                              {2, 3, DECODE_FORMS("128_128")}, /* 96 lies in two blocks of 64 too */
                              {2, 3, DECODE_FORMS("128_128")},
                              {1, 0, DECODE_FORMS("192_128")},
                              {1, 0, DECODE_FORMS("256_256")}};
    int64_t rows = attention->group * args->q_len, heads = args->batch * args->kv_heads;
    mtl_cuda_attention_hopper_args hopper;
    *done = false;
    if (rows > FEW_ROWS || heads > MOST_HEADS || args->kv_len > INT32_MAX - 2 * KEYS ||
        !describe_keys(call, args, &hopper, KEYS))
        return METALLOID_OK;
    int at = hopper_dims_of(args), bf16 = args->q.dtype == MTL_BF16;
    bool masked = args->mask.data || args->key_mask.data || args->softcap > 0 || !(args->scale > 0);
    mtl_cuda_grid grid = {.y = (int)heads, .z = (int)((rows + ROWS - 1) / ROWS), .cluster = 1, .overlaps = true};
    int64_t multiprocessors = call->device->multiprocessors, items = heads * grid.z;
    int64_t tiles = (args->kv_len + KEYS - 1) / KEYS;
    /* Half the multiprocessors keep the memory busy, and all blocks have to end together. Pairs find their places on
     * any number of multiprocessors; larger clusters do not fill them, as a cluster's blocks share a group of 16 or so,
     * and the groups differ: of those no more than leave room. */
    int64_t roomy = multiprocessors * 3 / 4, places = multiprocessors * (kernels[at].small_stages ? 2 : 1);
    while (grid.cluster < MOST_BLOCKS && grid.cluster * 2 <= tiles &&
           (items * grid.cluster * 2 <= roomy || (grid.cluster == 1 && items * 2 <= places) ||
            (args->key_mask.data && tiles > MOST_TILES * grid.cluster)))
        grid.cluster *= 2;
    /* One block a multiprocessor, of two teams of warps. Small ones where there are more of them, and for few tiles, as
     * to join two teams' parts takes longer than they save; with masks they save more. */
    bool few_tiles = !masked && tiles <= FEW_TILES * grid.cluster;
    bool small = kernels[at].small_stages && (items * grid.cluster > multiprocessors || few_tiles);
    int stage = KEYS * (in_blocks(hopper_dims[at].key_dim) + in_blocks(hopper_dims[at].value_dim)) * ELEMENT;
    int deep = (call->device->shared_memory - HOPPER_ALIGNMENT - OWN_MEMORY) / stage;
    hopper.stages = small ? kernels[at].small_stages : deep < MOST_STAGES ? deep : MOST_STAGES;
    grid.threads = ((small ? 1 : kernels[at].teams) * TEAM + 1) * WARP;
    grid.shared_memory = hopper.stages * stage + HOPPER_ALIGNMENT;
    mtl_cuda_kernel kernel = {MTL_CUDA_IMAGE_attention_decode, ((at * 2 + small) * 2 + masked) * 2 + bf16,
                              kernels[at].name[small][masked][bf16]};
    MTL_TRY(mtl_cuda_fit_cluster(call, kernel, &grid));
    int64_t splits = roomy / (items * grid.cluster), most = tiles / (grid.cluster * LEAST_TILES);
    splits = splits < most ? splits : most;
    attention->splits = splits > 1 ? (int)splits : 1;
    grid.blocks = grid.cluster * attention->splits;
    if (args->key_mask.data && (tiles + grid.blocks - 1) / grid.blocks > MOST_TILES) return METALLOID_OK;
    /* Beside an earlier call's large clusters others find places where they can, two in one group of multiprocessors
     * and none in another: a long call loses more by that than it saves by starting earlier. */
    grid.overlaps = grid.cluster < LARGE_CLUSTER || tiles <= (int64_t)FEW_TILES * grid.blocks;

    *done = true;
    CUdeviceptr memory = 0;
    if (attention->splits > 1) MTL_TRY(allocate_parts(call, attention, heads * rows, &memory));
    hopper.attention = *attention;
    metalloid_status status = launch_attention(call, args, kernel, grid, &hopper);
    return memory ? merge_parts(call, attention, heads * rows, memory, status) : status;
}

/* Many queries on Hopper. *done is false where attention.cu has to serve. */
static metalloid_status attend_hopper(const mtl_cuda_call *call, const mtl_attention_args *args,
                                      const mtl_cuda_attention_args *attention, bool *done) {
    enum { GROUP = 128 /* threads */, GROUP_ROWS = 64, BIT_STAGES = 4, MASK_STAGES = 4 };
    enum { OWN_MEMORY = 1 << 10, RESERVED = 1 << 10 /* for each block */, MOST_LENGTH = (1 << 30) - 4 * GROUP_ROWS };
    enum { FEW_ITEMS = 5, SHORT_KEYS = 1024, DEALT_TILES = 128 /* of a place */ };
    enum { PLAIN, HIDDEN, CHANGED, KINDS };
    enum { LONG, SHORT, HOPPER_FORMS };
    static const int images[KINDS] = {MTL_CUDA_IMAGE_attention_hopper, MTL_CUDA_IMAGE_attention_hopper_masked,
                                      MTL_CUDA_IMAGE_attention_hopper_changed};
#define KINDS_OF(dims) \
    { FORMS("attention", dims), FORMS("attention_masked", dims), FORMS("attention_changed", dims) }
    static const struct {
        int groups, blocks, stages; /* of a block, of 64 rows each; of a multiprocessor; of tiles on their way */
        int keys, keys_masked;      /* of a tile */
        const char *name[KINDS][2]; /* float16, bfloat16 */
    } kernels[HOPPER_DIMS][HOPPER_FORMS] = {
        {{2, 1, 4, 128, 128, KINDS_OF("64_64")}, {1, 2, 2, 128, 128, KINDS_OF("64_64_short")}},
        {{2, 1, 2, 128, 128, KINDS_OF("96_96")}, {1, 2, 2, 64, 64, KINDS_OF("96_96_short")}},
        {{2, 1, 2, 128, 128, KINDS_OF("128_128")}, {1, 2, 2, 64, 64, KINDS_OF("128_128_short")}},
        {{2, 1, 2, 128, 64, KINDS_OF("192_128")}},
        {{2, 1, 2, 64, 64, KINDS_OF("256_256")}},
    };
    bool bf16 = args->q.dtype == MTL_BF16, adds = args->mask.data && args->mask.dtype != MTL_BOOL;
    int kind = adds || attention->softcap > 0 || !(attention->scale > 0) ? CHANGED
               : args->mask.data || args->key_mask.data                  ? HIDDEN
                                                                         : PLAIN;
    int at = hopper_dims_of(args), multiprocessors = call->device->multiprocessors;
    int64_t heads = args->batch * args->q_heads, halves = (args->q_len + GROUP_ROWS - 1) / GROUP_ROWS;
    int64_t small_items = halves * heads, large_items = (halves + 1) / 2 * heads;
    *done = false;
    if (args->q_len < GROUP_ROWS || small_items > INT32_MAX || args->q_len > MOST_LENGTH || args->kv_len > MOST_LENGTH)
        return METALLOID_OK;
    /* Long keys of few items are better split, over multiprocessors that would be idle, though each is slower. */
    if (large_items * FEW_ITEMS < multiprocessors && args->kv_len > SHORT_KEYS) return METALLOID_OK;
    /* Small items where large ones leave multiprocessors idle: if each has one then, or if causal makes them unlike. */
    bool unlike = args->last_visible < args->kv_len - 1;
    int form =
        kernels[at][SHORT].groups && (small_items <= multiprocessors || (unlike && large_items <= multiprocessors));
    int64_t items = form == SHORT ? small_items : large_items;
    int rows = kernels[at][form].groups * GROUP_ROWS, blocks = kernels[at][form].blocks;
    int keys = kind == PLAIN ? kernels[at][form].keys : kernels[at][form].keys_masked;
    /* A counter has to be made and cleared, which short work does not make up for: its items are dealt out. */
    int64_t places = (int64_t)multiprocessors * blocks;
    bool counted = items > places && items * (args->kv_len / keys + 1) > places * DEALT_TILES;
    /* Those of a head one after another, so that its keys stay in the cache; where causal makes them unlike, and the
     * cache holds all heads' keys, those with most to do come first. */
    bool cached = (double)(args->batch * args->kv_heads) * bytes_of_head(args) <= CACHE;
    mtl_cuda_attention_hopper_args hopper = {
        .attention = *attention, .items = (unsigned)items, .by_heads = counted || !unlike || !cached};
    if (!mtl_cuda_describe(call, hopper.q_map, &args->q, args->head_dim, args->q_len, args->q_heads, args->batch,
                           (mtl_cuda_box){BLOCK, rows}) ||
        !describe_keys(call, args, &hopper, keys))
        return METALLOID_OK;
    int key_dim = in_blocks(hopper_dims[at].key_dim), value_dim = in_blocks(hopper_dims[at].value_dim);
    int stages = kernels[at][form].stages; /* half as many of queries */
    int memory = (stages / 2 * rows * key_dim + stages * keys * (key_dim + value_dim)) * ELEMENT + HOPPER_ALIGNMENT;
    if (args->key_mask.data || (args->mask.data && !adds)) memory += BIT_STAGES * (rows + 1) * VECTOR;
    CUdeviceptr mask = 0, next = 0;
    metalloid_status status = METALLOID_OK;
    *done = true;
    if (args->mask.data) {
        int mask_tile = rows * keys * (adds ? ELEMENT : 1);
        int room = ((call->device->shared_memory + RESERVED) / blocks - RESERVED - OWN_MEMORY - memory) / mask_tile;
        hopper.mask_stages = room < MASK_STAGES ? room : MASK_STAGES;
        memory += hopper.mask_stages * mask_tile;
        status = prepare_mask(call, args, &hopper, (mtl_cuda_box){adds ? BLOCK : keys, rows}, &mask, done);
    }
    /* Blocks of a row of the grid are one of each multiprocessor. */
    int64_t rounds = (items + multiprocessors - 1) / multiprocessors;
    mtl_cuda_grid grid = {.blocks = items < multiprocessors ? items : multiprocessors,
                          .y = (int)(rounds < blocks ? rounds : blocks),
                          .threads = (kernels[at][form].groups + 1) * GROUP,
                          .shared_memory = memory,
                          .overlaps = true};
    mtl_cuda_kernel kernel = {images[kind], (HOPPER_FORMS * at + form) * 2 + bf16, kernels[at][form].name[kind][bf16]};
    if (*done && status == METALLOID_OK && counted) {
        status = mtl_cuda_allocate(call, sizeof *hopper.next, &next);
        if (status == METALLOID_OK) status = mtl_cuda_fill(call, next, 1, sizeof *hopper.next, 0);
        hopper.next = (unsigned *)next;
    }
    if (*done && status == METALLOID_OK) status = launch_attention(call, args, kernel, grid, &hopper);
    if (next) mtl_cuda_release(call, next);
    if (mask) mtl_cuda_release(call, mask);
    return status;
}

/* How many heads' blocks are launched together: those whose keys and values the cache holds, or as many as fill the
 * device twice, in turns of about the same size. */
static int heads_a_turn(const mtl_attention_args *args, int64_t heads, int64_t blocks, int64_t places) {
    double cached = CACHE / bytes_of_head(args), filling = 2 * (double)places / (double)blocks;
    double most = cached > filling ? cached : filling;
    if (most >= (double)heads) return (int)heads;
    int64_t turns = (int64_t)((double)heads / (most < 1 ? 1 : most));
    return (int)((heads + turns - 1) / turns);
}

/* Blocks of `chosen` over all rows; where that leaves multiprocessors idle, over ranges of keys too. */
static metalloid_status attend_in_tiles(const mtl_cuda_call *call, const mtl_attention_args *args,
                                        mtl_cuda_attention_args *attention, mtl_cuda_kernel kernel, tile chosen) {
    int64_t rows = attention->group * args->q_len, heads = args->batch * args->kv_heads;
    mtl_cuda_grid grid = {.blocks = (rows + chosen.rows - 1) / chosen.rows * heads,
                          .threads = chosen.threads,
                          .shared_memory = chosen.memory};
    /* One range of keys for each place that would stay empty, but none of less than two tiles. */
    int64_t places = (int64_t)call->device->multiprocessors * chosen.blocks, splits = places / grid.blocks;
    attention->heads_a_turn = heads_a_turn(args, heads, grid.blocks / heads, places);
    int64_t most = args->kv_len / (2 * chosen.keys);
    splits = splits < most ? splits : most;
    splits = splits < 1 ? 1 : splits > MOST_SPLITS ? MOST_SPLITS : splits;
    attention->split_keys = ((args->kv_len + splits - 1) / splits + chosen.keys - 1) / chosen.keys * chosen.keys;
    splits = (args->kv_len + attention->split_keys - 1) / attention->split_keys;
    attention->splits = grid.z = (int)splits;

    CUdeviceptr memory = 0;
    if (splits > 1) MTL_TRY(allocate_parts(call, attention, heads * rows, &memory));
    metalloid_status status = launch_attention(call, args, kernel, grid, attention);
    return memory ? merge_parts(call, attention, heads * rows, memory, status) : status;
}

static metalloid_status attend(const mtl_cuda_call *call, const mtl_attention_args *args,
                               mtl_cuda_attention_args *attention) {
    int64_t dim = args->head_dim > args->value_dim ? args->head_dim : args->value_dim;
    int64_t rows = attention->group * args->q_len;
    int class = dim <= 64 ? 0 : dim <= 128 ? 1 : 2, few = rows <= FEW_ROWS, memory = call->device->shared_memory;
    bool bf16 = args->q.dtype == MTL_BF16, on_tensor_cores = tensor_cores_serve(args);
    if (!tiles_serve(args) || (!on_tensor_cores && dim > MOST_DIM)) {
        int64_t all = args->batch * args->q_heads * args->q_len, blocks = (all + 3) / 4;
        mtl_cuda_grid grid = {.blocks = blocks < 1 << 20 ? blocks : 1 << 20, .threads = WARP, .rows = 4};
        return launch_attention(call, args, kernel_of(ANY), grid, attention);
    }
    if (!on_tensor_cores) {
        few |= f32_tiles[class][0].memory > memory;
        int index = class * 2 + few;
        mtl_cuda_kernel kernel = {MTL_CUDA_IMAGE_attention_f32, index, f32_names[index]};
        return attend_in_tiles(call, args, attention, kernel, f32_tiles[class][few]);
    }
    if (dim > MOST_DIM) {
        int form = few ? 2 : 0;
        while (form < 2 && wide_tiles[form].memory > memory) form++;
        int index = bf16 * WIDE_FORMS + form;
        mtl_cuda_kernel kernel = {MTL_CUDA_IMAGE_attention_wide, index, wide_names[index]};
        return attend_in_tiles(call, args, attention, kernel, wide_tiles[form]);
    }
    if (args->softcap <= MOST_CAP) {
        bool done;
        metalloid_status status = decode_hopper(call, args, attention, &done);
        if (!done && status == METALLOID_OK) status = attend_hopper(call, args, attention, &done);
        if (done || status != METALLOID_OK) return status;
    }
    few |= mma_tiles[class][0].memory > memory;
    return attend_in_tiles(call, args, attention, kernel_of(bf16 * 2 * DIMS + class * 2 + few), mma_tiles[class][few]);
}

/* A mask of booleans, alike for all heads and queries: a key mask, whose tiles without a key are not read. */
static bool hides_keys(const mtl_attention_args *args) {
    const mtl_attention_operand *mask = &args->mask;
    return mask->data && mask->dtype == MTL_BOOL && !args->key_mask.data &&
           (args->q_heads == 1 || mask->stride[1] == 0) && (args->q_len == 1 || mask->stride[2] == 0);
}

metalloid_status mtl_cuda_attention(const metalloid_context *context, const char *op, const mtl_attention_args *args) {
    mtl_cuda_call call;
    mtl_attention_args own;
    if (hides_keys(args)) {
        own = *args;
        own.key_mask.data = args->mask.data, own.key_mask.dtype = args->mask.dtype;
        own.key_mask.stride[0] = args->mask.stride[0], own.key_mask.stride[1] = args->mask.stride[3];
        own.mask.data = NULL;
        args = &own;
    }
    MTL_TRY(mtl_cuda_begin(&call, context, op, args->device, args->in_double));
    bool attends = args->batch && args->q_heads && args->q_len && (args->value_dim || args->logsumexp.data);
    if (!attends) return mtl_cuda_end(&call, append_to_cache(&call, args));
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
        .softcap = float_cap(args->softcap),
        .first_visible = args->first_visible,
        .last_visible = args->last_visible,
        .splits = 1};
    return mtl_cuda_end(&call, attend(&call, args, &attention));
}
