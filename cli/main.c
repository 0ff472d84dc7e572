/* The `metalloid` command. SPDX-License-Identifier: MIT */
#include "cli.h"

#include <metalloid/metalloid.h>
#include <stdio.h>
#include <string.h>

static const struct {
    const char *name, *summary;
    int (*run)(int count, char **arguments);
} commands[] = {
    {"info", "version, CPU features in use, threads, GPUs, compilers for custom kernels", metalloid_cli_info},
    {"check", "compare each optimized kernel with the plain C one, on this machine", metalloid_cli_check},
    {"bench", "time every operation against the machine's ceilings and the libraries that are installed",
     metalloid_cli_bench},
};

enum { COMMANDS = sizeof commands / sizeof *commands };

static void usage(FILE *to) {
    fprintf(to, "usage: metalloid <command> [options]\n\ncommands:\n");
    for (int i = 0; i < COMMANDS; i++) fprintf(to, "  %-8s %s\n", commands[i].name, commands[i].summary);
    fprintf(to, "\n'metalloid <command> --help' tells a command's options; 'metalloid --version' the version.\n"
                "Exit codes: 0 done, 1 failed, 2 usage.\n");
}

static int run(int count, char **arguments) {
    if (count < 2) {
        usage(stderr);
        return EXIT_USAGE;
    }
    if (strcmp(arguments[1], "--help") == 0 || strcmp(arguments[1], "-h") == 0) {
        usage(stdout);
        return EXIT_OK;
    }
    if (strcmp(arguments[1], "--version") == 0) {
        printf("metalloid %s\n", metalloid_version());
        return EXIT_OK;
    }
    for (int i = 0; i < COMMANDS; i++) {
        if (strcmp(arguments[1], commands[i].name) == 0) return commands[i].run(count - 2, arguments + 2);
    }
    fprintf(stderr, "metalloid: no command '%s'; 'metalloid --help' lists them\n", arguments[1]);
    return EXIT_USAGE;
}

int main(int count, char **arguments) {
    int code = run(count, arguments);
    if (fflush(stdout) == 0 && !ferror(stdout)) return code;
    perror("metalloid: standard output"); /* a full disk, say: what was asked for has not arrived */
    return code == EXIT_OK ? EXIT_FAILED : code;
}
