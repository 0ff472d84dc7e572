/* The C++ compiler of the machine, run as a child process. SPDX-License-Identifier: MIT */
#ifndef METALLOID_KERNEL_COMPILER_H
#define METALLOID_KERNEL_COMPILER_H

#include "kernel/text.h"

enum { MTL_COMPILER_WORDS = 8 };

typedef struct mtl_compiler {
    mtl_text command;                     /* its words, each with its NUL */
    const char *word[MTL_COMPILER_WORDS]; /* in `command`; the first is an absolute path */
    int words;
    mtl_text identity; /* changes when the program does: path, inode, size, time */
} mtl_compiler;

/* METALLOID_CXX (a program of PATH, or a path; words behind it are arguments), else clang++ or clang of PATH, else `fallback`, which
 * may be NULL. False: there is none, and `compiler` is empty. */
bool mtl_compiler_find(mtl_compiler *compiler, const char *fallback);
void mtl_compiler_free(mtl_compiler *compiler);

/* Runs it with `arguments`, which end with a NULL, in `directory`; what it prints goes to `output`. False where it fails. */
bool mtl_compiler_run(const mtl_compiler *compiler, const char *const *arguments, const char *directory,
                      mtl_text *output);

#endif
