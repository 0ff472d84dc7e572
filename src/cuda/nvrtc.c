/* NVIDIA's run-time compiler, opened at run time. SPDX-License-Identifier: MIT
 *
 * It comes with a CUDA installation, or from PyPI as nvidia-cuda-nvrtc, which frameworks bring along. Its errors, and the library
 * that lists its built-in names, are its own affair: five functions are all that is called. */
#include "cuda/nvrtc.h"
#include "core/environment.h"

#include <dlfcn.h>
#include <limits.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct program *program; /* nvrtcProgram */

#define NVRTC_FUNCTIONS(X)                                                                                          \
    X(Version, int (*)(int *, int *))                                                                               \
    X(GetNumSupportedArchs, int (*)(int *))                                                                         \
    X(GetSupportedArchs, int (*)(int *))                                                                            \
    X(CreateProgram, int (*)(program *, const char *, const char *, int, const char *const *, const char *const *)) \
    X(DestroyProgram, int (*)(program *))                                                                           \
    X(CompileProgram, int (*)(program, int, const char *const *))                                                   \
    X(GetProgramLogSize, int (*)(program, size_t *))                                                                \
    X(GetProgramLog, int (*)(program, char *))                                                                      \
    X(GetCUBINSize, int (*)(program, size_t *))                                                                     \
    X(GetCUBIN, int (*)(program, char *))                                                                           \
    X(GetPTXSize, int (*)(program, size_t *))                                                                       \
    X(GetPTX, int (*)(program, char *))

#define NVRTC_FIELD(name, type) __typeof__((type)NULL) name; // NOLINT: a declaration
static struct { NVRTC_FUNCTIONS(NVRTC_FIELD) } nvrtc;

static pthread_once_t opened = PTHREAD_ONCE_INIT;
static char why_closed[512];
static char identity[PATH_MAX + 64], include_option[PATH_MAX + 32], cccl_option[PATH_MAX + 64];
static int newest_arch;

static void *open_in(const char *directory) {
    static const char *const names[] = {"libnvrtc.so.13", "libnvrtc.so.12"};
    char path[PATH_MAX];
    void *library = NULL;
    for (size_t i = 0; i < sizeof names / sizeof names[0] && !library; i++) {
        int length = directory ? snprintf(path, sizeof path, "%s/%s", directory, names[i])
                               : snprintf(path, sizeof path, "%s", names[i]);
        if (length > 0 && (size_t)length < sizeof path) library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    }
    return library;
}

/* The wheels' folders beside the one that this library is in: site-packages/nvidia/cu13/lib, nvidia/cuda_nvrtc/lib. */
static void *open_beside(void) {
    Dl_info info;
    if (!dladdr((void *)(uintptr_t)&open_beside, &info) || !info.dli_fname) return NULL;
    char path[PATH_MAX];
    if (!realpath(info.dli_fname, path)) return NULL;
    for (int up = 0; up < 2; up++) {
        char *slash = strrchr(path, '/');
        if (!slash) return NULL;
        *slash = '\0';
        static const char *const folders[] = {"nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"};
        for (size_t i = 0; i < sizeof folders / sizeof folders[0]; i++) {
            char folder[PATH_MAX];
            int length = snprintf(folder, sizeof folder, "%s/%s", path, folders[i]);
            void *library = length > 0 && (size_t)length < sizeof folder ? open_in(folder) : NULL;
            if (library) return library;
        }
    }
    return NULL;
}

static void *open_anywhere(void) {
    void *library = open_in(NULL); /* also one that a framework has loaded */
    static const char *const variables[] = {"CUDA_HOME", "CUDA_PATH"};
    for (size_t i = 0; i < 2 && !library; i++) {
        const char *home = secure_getenv(variables[i]);
        char path[PATH_MAX];
        if (home && *home && snprintf(path, sizeof path, "%s/lib64", home) < (int)sizeof path) library = open_in(path);
    }
    if (!library) library = open_beside();
    if (!library) library = open_in("/usr/local/cuda/lib64");
    return library ? library : open_in("/usr/local/cuda/lib");
}

/* CUDA's headers: beside the compiler in an installation and in the wheels, of which those of nvidia-cuda-cccl may be missing. */
static bool take_include(const char *folder) {
    char path[PATH_MAX + 64];
    static const char *const markers[] = {"cccl/nv/target", "nv/target"};
    for (size_t i = 0; i < 2; i++) {
        snprintf(path, sizeof path, "%.*s/%s", PATH_MAX, folder, markers[i]);
        if (access(path, R_OK) != 0) continue;
        snprintf(path, sizeof path, "%.*s/cuda_fp16.h", PATH_MAX, folder);
        if (access(path, R_OK) != 0) return false;
        snprintf(include_option, sizeof include_option, "-I%.*s", PATH_MAX, folder);
        snprintf(cccl_option, sizeof cccl_option, "-I%.*s/cccl", PATH_MAX, folder); /* cuda/std, since CUDA 13 */
        return true;
    }
    return false;
}

static void find_include(void *function) {
    Dl_info info;
    char library[PATH_MAX], folder[PATH_MAX];
    static const char *const places[] = {"../include", "../../include", "../../cuda_runtime/include",
                                         "../targets/x86_64-linux/include"};
    if (dladdr(function, &info) && info.dli_fname && realpath(info.dli_fname, library)) {
        snprintf(identity + strlen(identity), sizeof identity - strlen(identity), " %s", library);
        char *slash = strrchr(library, '/');
        if (slash) *slash = '\0';
        for (size_t i = 0; i < sizeof places / sizeof places[0]; i++) {
            int length = snprintf(folder, sizeof folder, "%s/%s", library, places[i]);
            if (length > 0 && (size_t)length < sizeof folder && take_include(folder)) return;
        }
    }
    const char *home = secure_getenv("CUDA_HOME");
    if (home && *home && snprintf(folder, sizeof folder, "%s/include", home) < (int)sizeof folder &&
        take_include(folder))
        return;
    take_include("/usr/local/cuda/include");
}

static void open_nvrtc(void) {
    const char *given = mtl_setting("METALLOID_NVRTC");
    void *library = given ? dlopen(given, RTLD_NOW | RTLD_LOCAL) : open_anywhere();
    if (!library && given) {
        snprintf(why_closed, sizeof why_closed, "METALLOID_NVRTC=%.200s cannot be opened: %s", given, dlerror());
        return;
    }
    if (!library) {
        snprintf(
            why_closed, sizeof why_closed,
            "there is no NVRTC to compile it with: install the CUDA toolkit, or the PyPI package nvidia-cuda-nvrtc, or "
            "name libnvrtc.so.13 or .12 in METALLOID_NVRTC");
        return;
    }
#define NVRTC_FIND(name, type)                                                                                 \
    *(void **)(void *)&nvrtc.name = dlsym(library, "nvrtc" #name);                                             \
    if (!nvrtc.name) {                                                                                         \
        snprintf(why_closed, sizeof why_closed, "NVRTC has no nvrtc" #name ": version 12 or later is needed"); \
        return;                                                                                                \
    }
    NVRTC_FUNCTIONS(NVRTC_FIND)
    int major = 0, minor = 0, count = 0;
    nvrtc.Version(&major, &minor);
    snprintf(identity, sizeof identity, "nvrtc %d.%d", major, minor);
    int archs[256];
    if (nvrtc.GetNumSupportedArchs(&count) == 0 && count > 0 && count <= 256 && nvrtc.GetSupportedArchs(archs) == 0)
        newest_arch = archs[count - 1];
    void *function = NULL;
    memcpy(&function, &nvrtc.Version, sizeof function);
    find_include(function);
}

bool mtl_nvrtc_available(const char **why) {
    pthread_once(&opened, open_nvrtc);
    *why = why_closed;
    return !why_closed[0];
}

const char *mtl_nvrtc_identity(void) { return identity; }

static char *result_of(program compiled, bool machine_code, size_t *length) {
    int result = machine_code ? nvrtc.GetCUBINSize(compiled, length) : nvrtc.GetPTXSize(compiled, length);
    char *bytes = result == 0 ? malloc(*length) : NULL;
    if (bytes && (machine_code ? nvrtc.GetCUBIN(compiled, bytes) : nvrtc.GetPTX(compiled, bytes)) != 0) {
        free(bytes);
        return NULL;
    }
    return bytes;
}

char *mtl_nvrtc_compile(const char *unit, int arch, const char *const *options, int count, bool include, size_t *length,
                        mtl_text *log) {
    enum { MOST_OPTIONS = 32 };
    const char *all[MOST_OPTIONS];
    char target[48];
    bool machine_code = newest_arch == 0 || arch <= newest_arch;
    snprintf(target, sizeof target, "-arch=%s_%d", machine_code ? "sm" : "compute", machine_code ? arch : newest_arch);
    int used = 0;
    all[used++] = target;
    if (include && include_option[0]) {
        all[used++] = include_option;
        all[used++] = cccl_option;
    }
    for (int i = 0; i < count && used < MOST_OPTIONS; i++) all[used++] = options[i];
    program unit_program = NULL;
    char *bytes = NULL;
    if (nvrtc.CreateProgram(&unit_program, unit, "unit.cu", 0, NULL, NULL) != 0) {
        mtl_text_add_string(log, "NVRTC does not start");
        return NULL;
    }
    if (nvrtc.CompileProgram(unit_program, used, all) == 0) bytes = result_of(unit_program, machine_code, length);
    size_t said = 0;
    if (!bytes && nvrtc.GetProgramLogSize(unit_program, &said) == 0 && said > 1) {
        char *words = malloc(said);
        if (words && nvrtc.GetProgramLog(unit_program, words) == 0) mtl_text_add_string(log, words);
        free(words);
    }
    nvrtc.DestroyProgram(&unit_program);
    return bytes;
}
