/* A stand-in for NVRTC that compiles nothing: its machine code is text, in which libcuda.c finds every kernel that the
 * library asks for. A unit with the word does_not_compile does not. SPDX-License-Identifier: MIT */
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

static const char code[] = "mtl_kernel(*) copy_1(*) copy_2(*) copy_4(*) copy_8(*)", words[] = "unit.cu(1): error";

typedef struct program {
    bool compiles, intermediate;
} program;

enum { INVALID = 3, COMPILATION = 6, NEWEST_ARCH = 90 }; /* newer devices get PTX */

#define DECLARE(function, parameters) \
    EXPORT int function parameters;   \
    EXPORT int function parameters

DECLARE(nvrtcVersion, (int *major, int *minor)) {
    *major = 13, *minor = 0;
    return 0;
}

DECLARE(nvrtcGetNumSupportedArchs, (int *count)) {
    *count = 2;
    return 0;
}

DECLARE(nvrtcGetSupportedArchs, (int *archs)) {
    archs[0] = 80, archs[1] = NEWEST_ARCH;
    return 0;
}

DECLARE(nvrtcCreateProgram, (program * *created, const char *unit, const char *name, int count,
                             const char *const *headers, const char *const *names)) {
    (void)name, (void)headers, (void)names;
    *created = malloc(sizeof **created);
    **created = (program){.compiles = !strstr(unit, "does_not_compile")};
    return count == 0 ? 0 : INVALID;
}

DECLARE(nvrtcDestroyProgram, (program * *created)) {
    free(*created);
    *created = NULL;
    return 0;
}

DECLARE(nvrtcCompileProgram, (program * compiled, int count, const char *const *options)) {
    static const char machine[] = "-arch=sm_", other[] = "-arch=compute_";
    if (count < 1) return INVALID;
    compiled->intermediate = strncmp(options[0], other, sizeof other - 1) == 0;
    if (!compiled->intermediate && strncmp(options[0], machine, sizeof machine - 1) != 0) return INVALID;
    int arch = atoi(strchr(options[0], '_') + 1);
    if (arch < 80 || arch > NEWEST_ARCH) return INVALID;
    return compiled->compiles ? 0 : COMPILATION;
}

static int size_of(size_t *size, bool there) {
    *size = sizeof code;
    return there ? 0 : INVALID;
}

static int copy(char *to, bool there) {
    if (there) memcpy(to, code, sizeof code);
    return there ? 0 : INVALID;
}

DECLARE(nvrtcGetCUBINSize, (program * compiled, size_t *size)) { return size_of(size, !compiled->intermediate); }
DECLARE(nvrtcGetCUBIN, (program * compiled, char *to)) { return copy(to, !compiled->intermediate); }
DECLARE(nvrtcGetPTXSize, (program * compiled, size_t *size)) { return size_of(size, compiled->intermediate); }
DECLARE(nvrtcGetPTX, (program * compiled, char *to)) { return copy(to, compiled->intermediate); }

DECLARE(nvrtcGetProgramLogSize, (program * compiled, size_t *size)) {
    (void)compiled;
    *size = sizeof words;
    return 0;
}

DECLARE(nvrtcGetProgramLog, (program * compiled, char *to)) {
    (void)compiled;
    memcpy(to, words, sizeof words);
    return 0;
}
