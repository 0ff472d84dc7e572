/* metalloid info: what a bug report needs. SPDX-License-Identifier: MIT */
#include "cli.h"
#include "core/context.h"
#include "core/threads.h"
#include "cpu/features.h"
#include "cpu/kernels.h"
#if MTL_WITH_CUDA
#include "cuda/kernels.h"
#endif

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* The first line that `program --version` prints; false where it cannot be run. No shell sees the name. */
static bool version_of(const char *program, char *line, int size) {
    int pipe_ends[2];
    if (pipe(pipe_ends) != 0) return false;
    pid_t child = fork();
    if (child == 0) {
        dup2(pipe_ends[1], STDOUT_FILENO);
        close(pipe_ends[0]);
        close(pipe_ends[1]);
        if (!freopen("/dev/null", "w", stderr)) _exit(127);
        execlp(program, program, "--version", (char *)NULL);
        _exit(127);
    }
    close(pipe_ends[1]);
    FILE *output = fdopen(pipe_ends[0], "r");
    bool read_line = child > 0 && output && fgets(line, size, output);
    char rest[256];
    while (output && fgets(rest, sizeof rest, output))
        continue; /* so that the program never writes into a closed pipe */
    if (output) fclose(output);
    int status = 1;
    if (child > 0) waitpid(child, &status, 0);
    if (read_line) line[strcspn(line, "\n")] = '\0';
    return read_line && status == 0;
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
                "  METALLOID_CXX          the C++ compiler of custom kernels, which are not in this version\n");
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
    const char *wanted = getenv("METALLOID_CPU_ISA");
    if (wanted)
        printf(", METALLOID_CPU_ISA=%s%s", wanted,
               strcmp(wanted, metalloid_cpu_isa()) == 0 ? "" : " is not among them");
    printf("\nthreads       %d", metalloid_get_num_threads());
    const char *threads = getenv("METALLOID_NUM_THREADS");
    if (threads)
        printf(", METALLOID_NUM_THREADS=%s%s", threads,
               mtl_environment_threads() ? "" : " is ignored: it is not a number from 1 to 1024");
    print_gpus();

    const char *named = getenv("METALLOID_CXX");
    const char *compilers[] = {named && *named ? named : "clang++", "clang"};
    char line[256];
    bool found = false;
    for (int i = 0; i < 2 && !found; i++) {
        found = version_of(compilers[i], line, sizeof line);
        if (found) printf("compiler      %s: %s", compilers[i], line);
    }
    if (!found) printf("compiler      none found: clang++, or the program that METALLOID_CXX names");
    printf(" (for custom kernels, which are not in this version)\n");
    return EXIT_OK;
}
