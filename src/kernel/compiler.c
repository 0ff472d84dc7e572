/* The C++ compiler of the machine, run as a child process. SPDX-License-Identifier: MIT
 *
 * No shell is involved: words are passed as they are. */
#include "kernel/compiler.h"
#include "core/environment.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MOST_OUTPUT = 1 << 20, MOST_ARGUMENTS = 64 };

static bool is_program(const char *path) {
    struct stat status;
    return stat(path, &status) == 0 && S_ISREG(status.st_mode) && access(path, X_OK) == 0;
}

/* The absolute path of a program: `name` itself where it has a slash, else the first of that name in PATH. */
static bool find_program(char path[PATH_MAX], const char *name, size_t length) {
    if (length == 0 || length >= PATH_MAX) return false;
    char own[PATH_MAX];
    memcpy(own, name, length);
    own[length] = '\0';
    if (strchr(own, '/')) return realpath(own, path) && is_program(path);
    for (const char *from = getenv("PATH"); from && *from;) {
        size_t folder = strcspn(from, ":");
        if (folder > 0 && *from == '/' && folder + 1 + length < PATH_MAX) { /* an empty or relative entry is no place to
                                                                             * run programs from */
            memcpy(path, from, folder);
            path[folder] = '/';
            memcpy(path + folder + 1, own, length + 1);
            if (is_program(path)) return true;
        }
        from += folder;
        if (*from == ':') from++;
    }
    return false;
}

/* The program of the file, or `name` as words separated by blanks. */
static bool take(mtl_compiler *compiler, const char *name) {
    char path[PATH_MAX];
    size_t offset[MTL_COMPILER_WORDS] = {0};
    const char *rest = "";
    if (!find_program(path, name, strlen(name))) { /* not one name with blanks in it */
        name += strspn(name, " \t");
        size_t length = strcspn(name, " \t");
        if (!find_program(path, name, length)) return false;
        rest = name + length;
    }
    *compiler = (mtl_compiler){.words = 1};
    mtl_text_add(&compiler->command, path, strlen(path) + 1);
    while (*(rest += strspn(rest, " \t"))) {
        if (compiler->words == MTL_COMPILER_WORDS) break;
        size_t length = strcspn(rest, " \t");
        offset[compiler->words++] = compiler->command.length;
        mtl_text_add(&compiler->command, rest, length);
        mtl_text_add(&compiler->command, "", 1);
        rest += length;
    }
    char real[PATH_MAX];
    struct stat status;
    if (realpath(path, real) && stat(real, &status) == 0) {
        mtl_text_format(&compiler->identity, "%s %llu %lld %lld.%09ld", real, (unsigned long long)status.st_ino,
                        (long long)status.st_size, (long long)status.st_mtim.tv_sec, status.st_mtim.tv_nsec);
    }
    if (compiler->command.failed || compiler->identity.failed || compiler->identity.length == 0) {
        mtl_compiler_free(compiler);
        return false;
    }
    for (int i = 0; i < compiler->words; i++) compiler->word[i] = compiler->command.data + offset[i];
    return true;
}

bool mtl_compiler_find(mtl_compiler *compiler, const char *fallback) {
    static const char *const names[] = {"clang++",    "clang",      "clang++-20", "clang++-19", "clang++-18",
                                        "clang++-17", "clang++-16", "clang++-15", "clang++-14"};
    *compiler = (mtl_compiler){0};
    const char *wanted = mtl_setting("METALLOID_CXX");
    if (wanted) return take(compiler, wanted);
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        if (take(compiler, names[i])) return true;
    }
    return fallback && take(compiler, fallback);
}

void mtl_compiler_free(mtl_compiler *compiler) {
    mtl_text_free(&compiler->command);
    mtl_text_free(&compiler->identity);
    compiler->words = 0;
}

static void read_output(int from, mtl_text *output) {
    char buffer[4096];
    for (;;) {
        ssize_t count = read(from, buffer, sizeof buffer);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return;
        if (output->length < MOST_OUTPUT)
            mtl_text_add(output, buffer, (size_t)count); /* the rest is read all the same */
    }
}

bool mtl_compiler_run(const mtl_compiler *compiler, const char *const *arguments, const char *directory,
                      mtl_text *output) {
    char *words[MTL_COMPILER_WORDS + MOST_ARGUMENTS + 1];
    int count = 0;
    for (int i = 0; i < compiler->words; i++) words[count++] = (char *)(uintptr_t)compiler->word[i];
    for (int i = 0; arguments[i] && i < MOST_ARGUMENTS; i++) words[count++] = (char *)(uintptr_t)arguments[i];
    words[count] = NULL;
    if (!words[0]) return false;

    int pipe_ends[2];
    if (pipe2(pipe_ends, O_CLOEXEC) != 0) {
        mtl_text_format(output, "no pipe: %s", strerror(errno));
        return false;
    }
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    pid_t child = 0;
    int error = posix_spawn_file_actions_init(&actions);
    if (!error) {
        error = posix_spawnattr_init(&attributes);
        if (!error) {
            /* The caller may have blocked or ignored signals, which a child would inherit. */
            sigset_t none, all;
            sigemptyset(&none);
            sigfillset(&all);
            posix_spawnattr_setsigmask(&attributes, &none);
            posix_spawnattr_setsigdefault(&attributes, &all);
            posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
            posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
            posix_spawn_file_actions_adddup2(&actions, pipe_ends[1], 1);
            posix_spawn_file_actions_adddup2(&actions, pipe_ends[1], 2);
            posix_spawn_file_actions_addchdir_np(&actions, directory);
            error = posix_spawn(&child, words[0], &actions, &attributes, words, environ);
            posix_spawnattr_destroy(&attributes);
        }
        posix_spawn_file_actions_destroy(&actions);
    }
    close(pipe_ends[1]);
    if (error) {
        close(pipe_ends[0]);
        mtl_text_format(output, "%s cannot be run: %s", words[0], strerror(error));
        return false;
    }
    read_output(pipe_ends[0], output);
    close(pipe_ends[0]);
    int status;
    pid_t waited;
    do waited = waitpid(child, &status, 0);
    while (waited < 0 && errno == EINTR);
    /* A program that ignores SIGCHLD has no status of its children; whether there is a result shows. */
    if (waited < 0) return true;
    if (WIFSIGNALED(status)) mtl_text_format(output, "%s was ended by signal %d", words[0], WTERMSIG(status));
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}
