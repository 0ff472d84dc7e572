/* metalloid info: what a bug report needs. SPDX-License-Identifier: MIT */
#include "cli.h"
#include "core/context.h"
#include "core/environment.h"
#include "core/threads.h"
#include "cpu/features.h"
#include "cpu/kernels.h"
#if MTL_WITH_CUDA
#include "cuda/kernels.h"
#include "cuda/nvrtc.h"
#endif
#include "kernel/compiler.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What compiles custom kernels: for the CPU as the library would find it, for GPUs NVRTC. */
static void print_compilers(void) {
    const char *named = mtl_setting("METALLOID_CXX");
    mtl_compiler compiler;
    if (mtl_compiler_find(&compiler, NULL)) {
        static const char *const arguments[] = {"--version", NULL};
        mtl_text output = {0};
        bool runs = mtl_compiler_run(&compiler, arguments, "/", &output);
        const char *line = mtl_text_string(&output);
        printf("compiler      ");
        for (int i = 0; i < compiler.words; i++) printf("%s%s", i ? " " : "", compiler.word[i]);
        printf(": %.*s%s\n", (int)strcspn(line, "\n"), line, runs ? "" : " (--version failed)");
        mtl_text_free(&output);
        mtl_compiler_free(&compiler);
    } else if (named) {
        printf("compiler      none: METALLOID_CXX=%s is no program that can be run\n", named);
    } else {
        printf("compiler      none found: clang, or the program that METALLOID_CXX names, \"zig c++\" say; from Python "
               "ziglang's too\n");
    }
#if MTL_WITH_CUDA
    const char *why = "";
    printf("nvrtc         %s\n", mtl_nvrtc_available(&why) ? mtl_nvrtc_identity() : why);
#endif
}

static void print_gpus(void) {
#if MTL_WITH_CUDA
    const char *why;
    int count = mtl_cuda_device_count(&why);
    if (count == 0) printf("\ngpus          none: %s\n", why);
    for (int i = 0; i < count; i++) {
        char words[256];
        mtl_cuda_device_in_words(i, words, sizeof words);
        printf("%s %s\n", i ? "             " : "\ngpus         ", words);
    }
#else
    printf("\ngpus          none: this build has no GPU backend\n");
#endif
}

int metalloid_cli_info(int count, char **arguments) {
    if (count > 0) {
        bool help = strcmp(arguments[0], "--help") == 0 || strcmp(arguments[0], "-h") == 0;
        if (!help) fprintf(stderr, "metalloid info: takes no argument, got '%s'\n\n", arguments[0]);
        fprintf(help ? stdout : stderr,
                "usage: metalloid info\n\nPrints the version, the CPU features in use, the thread count, GPUs and the "
                "compilers found for custom kernels.\n\nenvironment:\n"
                "  METALLOID_CPU_ISA      the instruction set to use instead of the best one\n"
                "  METALLOID_NUM_THREADS  the threads of a call, the caller included\n"
                "  METALLOID_CXX          the C++ compiler of custom kernels, instead of clang\n");
        return help ? EXIT_OK : EXIT_USAGE;
    }
    printf("metalloid     %s\n", metalloid_version());

    char features[256];
    mtl_cpu_features_in_words(mtl_cpu_features(), features, sizeof features);
    printf("cpu features  %s\n", *features ? features : "none that kernels use");
    const mtl_cpu_isa *const *isas;
    int isa_count = mtl_cpu_isas(&isas);
    printf("cpu kernels   %s (of", metalloid_cpu_isa());
    for (int i = 0; i < isa_count; i++) printf("%s %s", i ? "," : "", isas[i]->name);
    printf(")");
    const char *wanted = mtl_setting("METALLOID_CPU_ISA");
    if (wanted)
        printf(", METALLOID_CPU_ISA=%s%s", wanted, strcmp(wanted, metalloid_cpu_isa()) == 0 ? "" : " is ignored");
    printf("\nthreads       %d", metalloid_get_num_threads());
    const char *threads = mtl_setting("METALLOID_NUM_THREADS");
    if (threads) printf(", METALLOID_NUM_THREADS=%s%s", threads, mtl_environment_threads() ? "" : " is ignored");
    print_gpus();

    print_compilers();
    return EXIT_OK;
}
