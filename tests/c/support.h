/* What the C tests share: tensors of every layout between guard bytes, random numbers, exact rounding, tolerances, and the table of
 * bad arguments that every operation must refuse. SPDX-License-Identifier: MIT */
#ifndef METALLOID_TESTS_SUPPORT_H
#define METALLOID_TESTS_SUPPORT_H

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <metalloid/metalloid.h>

/* ---- random numbers and the amount of work -------------------------------------------------------------------------- */

void seed(uint64_t value);
uint64_t random_bits(void);
bool one_in(int n);
int64_t random_int(int64_t low, int64_t high); /* both inclusive */
double random_uniform(double low, double high);
double random_normal(void);

/* `count` random cases, times the environment's METALLOID_TEST_SCALE (sanitizer builds set a fraction), but at least one. */
int scaled(int count);
/* Says how many distinct calls have run, so that a test that skipped its work can be seen. */
void report(const char *what, int count);
/* The case at hand, for the message of a failure. */
#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
void describe(const char *format, ...);

/* ---- element types -------------------------------------------------------------------------------------------------- */

typedef enum element_type { F32, F16, BF16, F64, BOOL, I8, I16, I32, I64, U8, U16, U32, U64, DTYPES } element_type;

int64_t dtype_size(element_type type);
const char *dtype_name(element_type type);
DLDataType dtype_code(element_type type);
element_type random_floating(void);
element_type random_float_below_64(void);
element_type random_integer(void);

/* The nearest value of a floating type, ties to even, by exact scaling: shares nothing with the library's bit tricks. */
double nearest(element_type type, double value);
double half_ulp(element_type type, double value); /* the largest error of that rounding */
uint16_t encode_16(element_type type, double value);
double decode_16(element_type type, uint16_t bits);

/* ---- tensors -------------------------------------------------------------------------------------------------------- */

enum { MAX_RANK = 6 };

typedef enum layout {
    CONTIGUOUS, /* NULL strides or spelled out, at random */
    STRIDED,    /* axes in any order in memory, steps, gaps, negative strides */
    ROWS,       /* the last axis contiguous, the others as in STRIDED */
    INPUT,      /* any of these, perhaps broadcast along some axes */
    OUTPUT,     /* any of the first three */
} layout;

/* A DLTensor over a block of its own: guard bytes, the elements and the gaps of their layout, guard bytes. byte_offset, data and
 * device type (CPU or pinned host memory) vary at random. Lives until release_all(). */
typedef struct tensor {
    DLTensor dl;
    element_type type;
    int rank;
    int64_t shape[MAX_RANK], stride[MAX_RANK];
    int64_t elements;
    char *first;          /* element {0, ..., 0} */
    char *block, *before; /* the block's bytes now and as snapshot() found them */
    size_t bytes;
    bool output, has_before;
    struct tensor *next;
} tensor;

#define SHAPE(...) \
    (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), (int64_t[]) { __VA_ARGS__ }

tensor *new_tensor(element_type type, layout how, int rank, const int64_t *shape);
tensor *new_output(element_type type, layout how, int rank, const int64_t *shape);
tensor *new_normal(element_type type, layout how, int rank, const int64_t *shape); /* filled with normal numbers */
void random_shape(int64_t *shape, int rank, int64_t most);                         /* extents 1 to `most` */

const tensor *tensor_of(const DLTensor *given); /* the one of which this is `dl`, or NULL */

/* Whether each element has a place of its own, so that the tensor can be an output. */
bool writable(const tensor *t);

/* Elements by their row-major number. */
char *element(const tensor *t, int64_t index);
double get(const tensor *t, int64_t index);
void set(tensor *t, int64_t index, double value); /* rounds to nearest */
double *values(const tensor *t);                  /* all, row-major; lives until release_all() */

void fill(tensor *t, double value);
void fill_normal(tensor *t, double mean, double deviation);
void fill_uniform(tensor *t, double low, double high);
void fill_integers(tensor *t, int64_t low, int64_t high);

static inline DLTensor *dl(tensor *t) { return t ? &t->dl : NULL; }

/* NULL, or a context with 1 to 4 threads and any of the instruction sets that this machine has. Lives until release_all(). */
metalloid_context *random_context(void);
double *new_doubles(int64_t count); /* zeros; live until release_all() */
void release_all(void);

/* ---- what a call may and must do ------------------------------------------------------------------------------------- */

/* Around a call: every byte of every tensor but the elements of outputs must stay. */
void snapshot(void);
void expect_only_outputs_written(void);
void expect_nothing_written(void);

/* operations.md section 4: |out - ref| <= rtol (|ref| + m). */
typedef enum accuracy { NORM, ROPE, GATED, ATTENTION, CROSS_ENTROPY, GATED_DELTA, LARGE_MEAN, ACCURACIES } accuracy;

double tolerance(accuracy of, element_type type, double reference, double m);

/* Compares with the reference (row-major). m[i / span] is the m of element i. */
void expect_close(const char *what, accuracy of, const tensor *out, const double *reference, const double *m,
                  int64_t span);
void expect_close_with_slack(const char *what, accuracy of, const tensor *out, const double *reference, const double *m,
                             int64_t span, const double *slack);
/* m is max |ref| over each row of `span` elements. */
void expect_close_by_row(const char *what, accuracy of, const tensor *out, const double *reference, int64_t span);
double largest(const double *value, int64_t count); /* max |value|, of the finite ones */
#define expect_ok(call) expect_ok_at((call), __FILE__, __LINE__)
void expect_ok_at(metalloid_status status, const char *file, int line);

/* The last call of this thread gave this output, which has to be so near the exact result: see record.c. */
void record_output(const tensor *out, const double *exact, const double *bound);

/* ---- bad arguments --------------------------------------------------------------------------------------------------- */

enum {
    MAX_ARGUMENTS = 10,
    REQUIRED = 1,
    WRITTEN = 2,
    TAKES_FLOATING = 4,
    TAKES_INTEGER = 8,
    TAKES_BOOL = 16,
    RANK_MAY_DROP = 32, /* the call also takes the tensor without its last axis */
};

/* One call with all that it takes. given[i] is what the call gets for argument[i]. */
typedef struct operation {
    const char *name;
    metalloid_status (*call)(const struct operation *op);
    metalloid_context *context;
    int count;
    struct {
        const char *name;
        tensor *tensor;
        unsigned flags;
        unsigned free_axes;    /* bit a: the extent of axis a is no other argument's business */
        unsigned may_be_input; /* bit i: this output may be argument i itself */
    } argument[MAX_ARGUMENTS];
    DLTensor *given[MAX_ARGUMENTS];

    double eps, scale;
    int64_t dims, offset;
    metalloid_gelu gelu;
    bool no_options; /* pass NULL for the option struct */
    metalloid_rope_options rope;
    metalloid_attention_options attention;
    metalloid_cross_entropy_options cross_entropy;
} operation;

/* Adds an argument; NULL stands for an optional one that is not given. */
int takes(operation *op, const char *name, tensor *t, unsigned flags);

/* The call is refused with this status, the message is one line, starts with the operation and names the argument, and no byte of any
 * tensor has changed. `argument` NULL: the message names any of the operation's arguments. */
void expect_status(const operation *op, metalloid_status status, const char *argument, const char *what);
static inline void expect_refused(const operation *op, const char *argument, const char *what) {
    expect_status(op, METALLOID_INVALID_ARGUMENT, argument, what);
}

/* Everything that can be wrong with a tensor, for each argument in turn: NULL, element_type, rank, extents, sizes, alignment, device,
 * overlap. The call as given must succeed. Returns how many calls were refused. */
int expect_bad_tensors_refused(const operation *op);

#endif
