/* Attention on the CPU: the cut of its work, the key/value cache, and the end of every row. SPDX-License-Identifier:
 * MIT
 *
 * All workspace is reserved before the first byte is written, the cache's included. */
#include "cpu/attention.h"

#include "core/threads.h"

enum {
    BLOCK_BYTES = 384 << 10, /* of a block's rows of q, scores and sums: the second-level cache has room for more */
    ITEMS_A_THREAD = 4,      /* where blocks of rows would be fewer, they are made smaller */
    LEAST_ROWS = 48,         /* but not smaller than this */
    ITEMS_WANTED = 64,       /* where blocks of LEAST_ROWS would be fewer, keys are split too */
    KEYS_A_RANGE = 256,      /* at least: then combining the ranges costs next to nothing */
    PARTS_A_THREAD = 64,     /* small parts, since the keys that a row sees differ */
    PRODUCTS_A_THREAD = 256 << 10, /* multiply-adds that are worth waking a thread for */
    CACHE_LINE = 64,
};

static const int64_t longest_row = (int64_t)1
                                   << 40; /* keeps sizes of workspace within int64_t: none so long is to be had */

/* ---- the cut ----------------------------------------------------------------------------------------------------- */

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }
static int64_t quotient_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }

/* The keys that queries `first` to `last` see, by causal and window. */
static void visible_keys(const mtl_attention_args *args, int64_t first, int64_t last, int64_t *begin, int64_t *end) {
    *begin = clamp(first + args->first_visible, 0, args->kv_len);
    *end = clamp(last + args->last_visible + 1, *begin, args->kv_len);
}

/* The most keys that `rows` rows see. */
static int64_t most_keys(const mtl_attention_args *args, int64_t rows) {
    int64_t queries = least(args->q_len, (rows - 1) / args->cut.group + 2);
    return clamp(args->last_visible - args->first_visible + queries, 0, args->kv_len);
}

/* Blocks of rows are made with an eye on the number of threads, as results do not depend on them. They may depend on
 * the ranges of keys, which follow from shapes and options alone. */
static void cut_work(mtl_attention_args *args, int threads) {
    args->cut.group = args->q_heads / args->kv_heads;
    int64_t rows = args->cut.group * args->q_len, heads = args->batch * args->kv_heads;
    int64_t row_bytes = least(args->head_dim, longest_row) + least(args->value_dim, longest_row) + MTL_ATTENTION_KEYS;
    row_bytes *= args->in_double ? (int64_t)sizeof(double) : (int64_t)sizeof(float);
    int64_t most = clamp(BLOCK_BYTES / row_bytes, LEAST_ROWS, MTL_ATTENTION_ROWS);
    int64_t each = (int64_t)((double)rows * (double)heads / (threads * ITEMS_A_THREAD));
    int64_t smallest = least(rows, LEAST_ROWS), items = heads * quotient_up(rows, smallest);
    args->cut.key_ranges = clamp(most_keys(args, smallest) / KEYS_A_RANGE, 1, quotient_up(ITEMS_WANTED, items));
    int64_t wanted = args->cut.key_ranges > 1 ? LEAST_ROWS : clamp(each, LEAST_ROWS, most);
    int64_t block = quotient_up(rows, quotient_up(rows, wanted));
    block = quotient_up(block, MTL_ATTENTION_TILE) * MTL_ATTENTION_TILE;
    args->cut.rows = least(rows, block);
    args->cut.row_blocks = quotient_up(rows, args->cut.rows);
}

static int64_t row_block_count(const mtl_attention_args *args) {
    return args->batch * args->kv_heads * args->cut.row_blocks;
}

mtl_attention_item mtl_attention_item_at(const mtl_attention_args *args, int64_t index) {
    int64_t range = index % args->cut.key_ranges, row_block = index / args->cut.key_ranges;
    int64_t head = row_block / args->cut.row_blocks, block = row_block % args->cut.row_blocks;
    block = args->cut.row_blocks - 1 - block; /* the last rows see the most keys: they go first */

    mtl_attention_item item = {.batch = head / args->kv_heads, .kv_head = head % args->kv_heads};
    item.first_row = block * args->cut.rows;
    item.rows = least(args->cut.rows, args->cut.group * args->q_len - item.first_row);

    int64_t begin, end;
    visible_keys(args, mtl_attention_query(args, item.first_row),
                 mtl_attention_query(args, item.first_row + item.rows - 1), &begin, &end);
    if (!mtl_attention_is_few(args))
        begin -= begin % MTL_ATTENTION_KEYS; /* the same blocks of keys however rows are cut */
    int64_t each = quotient_up(end - begin, args->cut.key_ranges * MTL_ATTENTION_KEYS) * MTL_ATTENTION_KEYS;
    item.first_key = least(begin + range * each, end);
    item.end_key = least(item.first_key + each, end);
    item.states = args->cut.key_ranges > 1 ? mtl_attention_states(args, row_block, range) : NULL;
    return item;
}

/* ---- the key/value cache ----------------------------------------------------------------------------------------- */

static void append_row(const mtl_attention_operand *from, const mtl_attention_operand *cache, int64_t batch,
                       int64_t head, int64_t time, int64_t offset, int64_t length) {
    int64_t size = mtl_dtype_size(cache->dtype);
    const char *source = from->data + batch * from->stride[0] + head * from->stride[1] + time * from->stride[2];
    char *target =
        cache->data + batch * cache->stride[0] + head * cache->stride[1] + (offset + time) * cache->stride[2];
    if (from->stride[3] == size && cache->stride[3] == size) {
        memcpy(target, source, (size_t)(length * size));
        return;
    }
    for (int64_t d = 0; d < length; d++)
        memcpy(target + d * cache->stride[3], source + d * from->stride[3], (size_t)size);
}

/* An item is a time step of one row of the batch. */
static void append_to_cache(const void *arguments, int64_t begin, int64_t end, void *scratch) {
    const mtl_attention_args *args = arguments;
    (void)scratch;
    for (int64_t item = begin; item < end; item++) {
        int64_t batch = item / args->q_len, time = item % args->q_len;
        for (int64_t head = 0; head < args->kv_heads; head++) {
            append_row(&args->append.k, &args->k, batch, head, time, args->append.offset, args->head_dim);
            append_row(&args->append.v, &args->v, batch, head, time, args->append.offset, args->value_dim);
        }
    }
}

/* ---- the call ---------------------------------------------------------------------------------------------------- */

typedef struct {
    mtl_kernel kernel;
    const mtl_attention_args *args;
    int64_t items;
    int parts;
    char *scratch;
    size_t scratch_size; /* of a thread */
} job;

static void run_part(void *argument, int part, int worker) {
    const job *j = argument;
    int64_t each = j->items / j->parts, more = j->items % j->parts; /* the first `more` parts have one item more */
    int64_t begin = each * part + least(part, more), end = begin + each + (part < more);
    j->kernel(j->args, begin, end, j->scratch + (size_t)worker * j->scratch_size);
}

/* Enough for any kernel: rows of q; keys and values of a block; a row's sums; scores; states. */
static size_t scratch_of_thread(const mtl_attention_args *args) {
    int64_t real = args->in_double ? (int64_t)sizeof(double) : (int64_t)sizeof(float), keys = MTL_ATTENTION_KEYS;
    int64_t padded = mtl_attention_padded(args->head_dim), value_padded = mtl_attention_padded(args->value_dim);
    int64_t reals = args->cut.rows * padded + keys * padded + keys * value_padded;
    int64_t doubles = args->cut.rows * (keys + MTL_STATE_VALUES + value_padded);
    return (size_t)((reals * real + doubles * (int64_t)sizeof(double) + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE);
}

static int threads_worth(const metalloid_context *context, const mtl_attention_args *args, int64_t items) {
    double products = (double)args->batch * (double)args->q_heads * (double)args->q_len *
                      (double)most_keys(args, args->cut.rows) * (double)(args->head_dim + args->value_dim);
    double worth = products / PRODUCTS_A_THREAD;
    int64_t threads = least(mtl_threads(context), items);
    return worth < (double)threads ? (worth < 1 ? 1 : (int)worth) : (int)threads;
}

/* The plain kernels keep scale and softcap in double: they serve where those leave float32's range. And they count
 * the keys of calls without features, of which there can be any number. */
static const mtl_cpu_kernels *kernels_for(const metalloid_context *context, const mtl_attention_args *args) {
    double scale = fabs(args->scale);
    bool fits =
        (scale == 0 || scale >= (double)FLT_MIN) && scale <= (double)FLT_MAX && args->softcap <= (double)FLT_MAX;
    if ((args->in_double || fits) && !mtl_attention_is_counting(args))
        return mtl_cpu_kernels_for(context, args->in_double);
    const mtl_cpu_isa *const *isas;
    mtl_cpu_isas(&isas);
    return args->in_double ? &isas[0]->in_double : &isas[0]->in_float;
}

metalloid_status mtl_cpu_attention(const metalloid_context *context, const char *op, const mtl_attention_args *given) {
    mtl_attention_args args = *given;
    int64_t new_rows = args.append.k.data ? args.batch * args.q_len : 0,
            item_bytes = args.kv_heads * (args.head_dim + args.value_dim) * 4;
    bool attends = args.batch && args.q_heads && args.q_len && (args.value_dim || args.logsumexp.data);
    if (!attends)
        return mtl_cpu_run(context, op, append_to_cache, &args, new_rows, item_bytes, 0); /* no scratch: cannot fail */

    cut_work(&args, mtl_threads(context));
    int64_t row_blocks = row_block_count(&args), items = row_blocks * args.cut.key_ranges;
    int threads = threads_worth(context, &args, items);
    bool too_long = args.head_dim > longest_row || args.value_dim > longest_row;
    size_t scratch = too_long ? SIZE_MAX : scratch_of_thread(&args);
    size_t states = 0;
    if (!too_long && args.cut.key_ranges > 1) {
        states = (size_t)(items * args.cut.rows * mtl_attention_state_length(&args)) * sizeof(double);
        states = (states + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
    }
    char *workspace = too_long ? NULL : mtl_allocate(context, states + scratch * (size_t)threads);
    if (!workspace)
        return mtl_fail(METALLOID_OUT_OF_MEMORY, "%s: no %zu bytes of workspace", op,
                        too_long ? SIZE_MAX : states + scratch * (size_t)threads);
    args.cut.states = (double *)(void *)workspace;

    /* Without scratch mtl_cpu_run allocates nothing and cannot fail. */
    mtl_cpu_run(context, op, append_to_cache, &args, new_rows, item_bytes, 0);
    const mtl_cpu_kernels *kernels = kernels_for(context, &args);
    job j = {kernels->attention, &args, items, 0, workspace + states, scratch};
    j.parts = (int)least(items, (int64_t)threads * PARTS_A_THREAD);
    mtl_parallel_run(threads, j.parts, run_part, &j);
    if (args.cut.key_ranges > 1) {
        int64_t cost =
            args.cut.key_ranges * args.cut.rows * mtl_attention_state_length(&args) * (int64_t)sizeof(double);
        mtl_cpu_run(context, op, kernels->attention_merge, &args, row_blocks, cost, 0);
    }
    mtl_release(context, workspace);
    return METALLOID_OK;
}
