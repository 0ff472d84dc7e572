/* From a kernel's body to a translation unit. SPDX-License-Identifier: MIT */
#ifndef METALLOID_KERNEL_SOURCE_H
#define METALLOID_KERNEL_SOURCE_H

#include "core/dtype.h"
#include "kernel/text.h"
#include "kernel/tokenizer.h"

enum {
    MTL_MOST_BUFFERS = 64,   /* inputs, and outputs, of a kernel; Metal has 31 in all */
    MTL_MOST_TEMPLATES = 64, /* template arguments */
    MTL_MOST_SCALARS = 64,   /* of a precompiled kernel */
    MTL_LONGEST_NAME = 255,
    MTL_POINTERS_OF_INPUT =
        4, /* of mtl_dispatch.pointers: data, shape (int), strides (int64_t), rank (int); an output has one */
};

/* What a kernel was made from. Names are identifiers. */
typedef struct mtl_definition {
    const char *name;
    int input_count, output_count;
    const char *const *input_names, *const *output_names;
    const char *source, *header;
    bool atomic_outputs;
} mtl_definition;

/* What the source mentions, found once. */
enum { MTL_MENTIONS_SHAPE = 1, MTL_MENTIONS_STRIDES = 2, MTL_MENTIONS_RANK = 4 };

typedef struct mtl_mentions {
    unsigned attributes;                                                  /* bit i: attribute i of mtl_attributes */
    unsigned char input[MTL_MOST_BUFFERS];                                /* MTL_MENTIONS_* of it */
    bool lanes_meet;                                                      /* barriers, or exchanges in a simdgroup */
    bool halves, swizzles, matrices, simdgroup_matrices, thread_elements; /* of these types; the function */
    bool simd_types;                                                      /* simd::float4, simd_float4, vector_float4 */
    bool uniforms;       /* make_uniform; users have functions called uniform */
    bool returns;        /* from the body: threads may leave before the others meet */
    bool relative;       /* anything that depends on the cut into threadgroups */
    int vector_bytes;    /* the alignment of vectors that may be read from and written to buffers; 0: none */
    bool designators;    /* of members, {.x = 1}, which clang reads and NVRTC as C++20 alone */
    bool no_contraction; /* #pragma clang fp contract(off): a product and a sum are rounded each */
} mtl_mentions;

/* What is compiled anew for: the types of one call. */
typedef struct mtl_buffer_type {
    mtl_dtype dtype;
    bool is_scalar; /* rank 0: a reference */
    bool is_small;  /* below 8 elements: Metal's constant address space */
} mtl_buffer_type;

typedef struct mtl_template_value {
    const char *name;
    metalloid_template_kind kind;
    int64_t integer;
    mtl_dtype dtype;
} mtl_template_value;

typedef struct mtl_types {
    const mtl_buffer_type *inputs;
    const mtl_dtype *outputs;
    int template_count;
    const mtl_template_value *template_values;
    /* Both on the CPU alone. */
    bool along_y; /* one thread along x, several along y: what is a loop goes along y */
    bool
        in_line; /* threads meet, in threadgroups along x: compilers see that lanes follow each other, and use vectors */
} mtl_types;

/* Whether Metal hands it to a kernel that mentions it. */
bool mtl_is_attribute(const char *name);

/* False: no memory. */
bool mtl_find_mentions(mtl_mentions *mentions, const mtl_definition *definition);

/* The kernel as Metal would get it: header, signature, body; what verbose= prints. */
void mtl_metal_source(mtl_text *out, const mtl_definition *definition, const mtl_mentions *mentions,
                      const mtl_types *types);

typedef enum mtl_target { MTL_TARGET_CPU, MTL_TARGET_CUDA } mtl_target;

/* Functions of the user's, parts of whose text are their names. */
typedef struct mtl_name {
    const char *text;
    size_t length;
} mtl_name;
typedef struct mtl_names {
    mtl_name *name;
    size_t count;
} mtl_names;

typedef struct mtl_unit_options {
    mtl_target target;
    metalloid_math_mode math_mode;
    int stack_bits;         /* CPU: log2 of a thread's stack */
    bool count_iterations;  /* CPU */
    int most_threads;       /* CUDA: of a threadgroup */
    int line;               /* CUDA: mtl_cuda_line */
    const char *header;     /* what the body may count on */
    const mtl_types *types; /* CUDA: of the call */
    bool arms;              /* those of ?: may have types that C++ finds none in common for: 16-bit floats, swizzles */
    bool lockstep;          /* CPU: lanes that meet in lockstep, where the source allows it */
    const mtl_names *meeting; /* where threads have stacks: the functions at which lanes meet; else NULL */
} mtl_unit_options;

/* CUDA: the struct that a launch passes beside the buffers, as offsets in bytes; 0: not there. Its first 44 bytes are grid,
 * threadgroup and threadgroups (3 x uint32 each), flags, and how many threadgroups prefetch for others; then a scalar's 8
 * bytes of each input, the addresses to prefetch of the first MTL_CUDA_PREFETCHED ones, of each the rank and where in
 * `shapes` and `strides` its own begin, and how much to prefetch of the first ones. All parameters together may have 4 KiB. */
enum {
    MTL_CUDA_EXTENTS = 128,
    MTL_CUDA_PREFETCHED = 8,
    MTL_CUDA_WHOLE = 1, /* flags */
    MTL_CUDA_LINEAR = 2,
    MTL_CUDA_WIDE = 4,
    MTL_CUDA_WIDE_THREADS = 256,
};
typedef struct mtl_cuda_layout {
    int scalars_at, prefetched_at, ints_at, slices_at, strides_at, shapes_at, size;
} mtl_cuda_layout;
mtl_cuda_layout mtl_cuda_layout_of(const mtl_definition *definition, const mtl_mentions *mentions);

/* The threads of a threadgroup where they are a power of two along x and all threadgroups are whole, so that the kernel is compiled
 * for that number: its loops over a threadgroup's share then have a known length and are unrolled. 0: any number. */
int mtl_cuda_line(const mtl_mentions *mentions, const uint32_t grid[3], const uint32_t threadgroup[3]);

/* Whether a block of the kernel that is compiled for this line does several threadgroups along x, one after the other,
 * where the launch has fewer blocks. Blocks of few threads take longer to be launched than to read a row; of 1024 a
 * multiprocessor has two, and the next waits for the last thread of one. Threads that left would stand at the wrong
 * barrier. */
bool mtl_cuda_repeats(const mtl_definition *definition, const mtl_mentions *mentions, int line);

/* How many positions along x a thread does in the kernel's wide form; 0: it has none. Nothing in such a kernel depends on
 * the cut into threadgroups: the form has its own, MTL_CUDA_WIDE_THREADS along x. */
int mtl_cuda_width(const mtl_definition *definition, const mtl_mentions *mentions, const mtl_types *types);

/* The unit that a C++ compiler gets: the Metal header, the user's header and body in C++, and what runs them.
 * Whether lanes are in lockstep in it. */
bool mtl_translation_unit(mtl_text *out, const mtl_definition *definition, const mtl_mentions *mentions,
                          const mtl_types *types, const mtl_unit_options *options);

/* The body as statements of a simdgroup, for lanes in lockstep. False: its threads need a stack each. */
bool mtl_translate_in_lockstep(mtl_text *out, const mtl_definition *definition, const mtl_mentions *mentions,
                               const mtl_unit_options *options);

/* Attributes that lanes of a simdgroup differ in: whether a token names one, and the declarations of those that are
 * mentioned, for the thread `index` (an expression) of the threadgroup. */
bool mtl_is_lane_attribute(const mtl_token *token);
void mtl_lane_attributes(mtl_text *out, const mtl_mentions *mentions, const char *index);

/* The functions of header and body at which lanes meet. False: no memory. */
bool mtl_find_meeting_functions(mtl_names *names, const mtl_definition *definition);

/* Metal source as C++, with as many lines: address spaces, threadgroup variables, literals, attributes, includes. */
typedef enum mtl_region { MTL_REGION_HEADER, MTL_REGION_BODY } mtl_region;
void mtl_translate(mtl_text *out, const char *source, mtl_region region, const mtl_unit_options *options);

/* v.xyz: the components as bits 0 to 3 of `used` and as numbers; how many, or 0 where it is no swizzle. */
int mtl_read_swizzle(const mtl_token *token, int component[4], unsigned *used);

/* Whether a token is the name of a function of Metal's at which the lanes of a simdgroup, or its quads, exchange something. */
bool mtl_is_exchange(const mtl_token *token);

const char *mtl_metal_type(mtl_dtype dtype); /* as MLX spells it: float16_t */

#endif
