/* Compiled kernels, kept from one process to the next. SPDX-License-Identifier: MIT
 *
 * A directory of the user's alone (0700) holds one file for each key, the shared object with a trailer: magic, key, digest of
 * all before it. A file is run where it is the user's, nobody else could have written it, and the trailer fits; else it is
 * made anew. It comes there by a rename from a directory of its own, so that nobody sees half of one, and processes that
 * compile the same kernel at once all succeed. Whoever adds an entry removes those that were not used for longest,
 * as many as are beyond a size. A process that has one open keeps it; one that is about to open it makes it anew. */
#include "kernel/cache.h"
#include "core/environment.h"

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

enum {
    LARGEST_OBJECT = 64 << 20,
    FEW_BYTES = 4 << 20,         /* less space than this may be why a compiler failed */
    OLD_BUILD_SECONDS = 60 * 60, /* a build directory that was left behind */
    USED_SECONDS = 60 * 60,      /* uses of an entry are noted so far apart */
    MOST_MEBIBYTES = 256,        /* of all entries, where METALLOID_CACHE_MIB says nothing else */
};

static const char magic[8] = "mtlkern1";

typedef struct trailer {
    char magic[sizeof magic];
    mtl_digest key, contents;
} trailer;

/* ---- files ---------------------------------------------------------------------------------------------------------------- */

/* Beyond the limit on the size of files a write raises SIGXFSZ, which would end a program that is not prepared. */
typedef struct size_guard {
    sigset_t before;
    bool was_pending;
} size_guard;

static void guard_begin(size_guard *guard) {
    sigset_t signal, pending;
    sigemptyset(&signal);
    sigaddset(&signal, SIGXFSZ);
    sigpending(&pending);
    guard->was_pending = sigismember(&pending, SIGXFSZ) == 1;
    pthread_sigmask(SIG_BLOCK, &signal, &guard->before);
}

static void guard_end(const size_guard *guard) {
    if (!guard->was_pending) {
        sigset_t signal;
        sigemptyset(&signal);
        sigaddset(&signal, SIGXFSZ);
        const struct timespec now = {0, 0};
        int saved = errno;
        while (sigtimedwait(&signal, NULL, &now) < 0 && errno == EINTR) continue;
        errno = saved;
    }
    pthread_sigmask(SIG_SETMASK, &guard->before, NULL);
}

static bool write_all(int file, const char *bytes, size_t count) {
    size_guard guard;
    guard_begin(&guard);
    bool done = true;
    while (count > 0 && done) {
        ssize_t written = write(file, bytes, count);
        if (written < 0 && errno == EINTR) continue;
        done = written > 0;
        if (done) {
            bytes += written;
            count -= (size_t)written;
        }
    }
    guard_end(&guard);
    return done;
}

static bool write_file(const char *path, const char *bytes, size_t count) {
    int file = open(path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (file < 0) return false;
    bool written = write_all(file, bytes, count);
    return close(file) == 0 && written;
}

/* The whole file, which the caller frees; NULL where it cannot be read. */
static char *read_all(int file, size_t size) {
    char *bytes = malloc(size);
    for (size_t done = 0; bytes && done < size;) {
        ssize_t count = pread(file, bytes + done, size - done, (off_t)done);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) {
            free(bytes);
            return NULL;
        }
        done += (size_t)count;
    }
    return bytes;
}

static mtl_digest digest_of(const char *bytes, size_t count) {
    mtl_sha256 hash;
    mtl_sha256_begin(&hash);
    mtl_sha256_add(&hash, bytes, count);
    return mtl_sha256_end(&hash);
}

static void key_in_hex(char hex[65], const mtl_digest *key) {
    for (int i = 0; i < 32; i++) snprintf(hex + 2 * i, 3, "%02x", key->bytes[i]);
}

/* ---- directories ------------------------------------------------------------------------------------------------------------- */

/* Makes the directory, its parents too, and sees that nobody but the user writes there. */
static bool prepare_directory(const char *path) {
    char made[PATH_MAX];
    size_t length = strlen(path);
    if (length >= sizeof made) return false;
    memcpy(made, path, length + 1);
    for (size_t i = 1; i <= length; i++) {
        if (made[i] != '/' && made[i] != '\0') continue;
        char kept = made[i];
        made[i] = '\0';
        mkdir(made, 0700);
        made[i] = kept;
    }
    int directory = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (directory < 0) return false;
    struct stat status;
    bool ours = fstat(directory, &status) == 0 && status.st_uid == geteuid();
    if (ours && status.st_mode & S_ISVTX) ours = false; /* root's /tmp and its like stay everybody's */
    if (ours && status.st_mode & 022) ours = fchmod(directory, 0700) == 0;
    close(directory);
    return ours;
}

/* Where entries are, ready for them; false where there is no such place. */
static bool open_directory(mtl_text *path) {
    const char *given = mtl_setting("METALLOID_CACHE"), *cache = secure_getenv("XDG_CACHE_HOME");
    const char *home = secure_getenv("HOME");
    if (given) mtl_text_add_string(path, given);
    else if (cache && *cache == '/') mtl_text_format(path, "%s/metalloid", cache);
    else if (home && *home == '/') mtl_text_format(path, "%s/.cache/metalloid", home);
    else return false;
    if (path->failed) return false;
    if (*path->data == '/' && path->length < PATH_MAX - 128 && prepare_directory(path->data)) return true;
    if (given)
        mtl_setting_ignored("METALLOID_CACHE", given,
                            "it must be the absolute path of a directory that only this user may write to, or that can "
                            "be made; compiled kernels are not kept");
    return false;
}

/* All files of a directory that has no others below, and the directory. */
static void remove_directory(const char *path) {
    DIR *directory = opendir(path);
    if (directory) {
        for (struct dirent *entry; (entry = readdir(directory));) {
            if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
                unlinkat(dirfd(directory), entry->d_name, 0);
        }
        closedir(directory);
    }
    rmdir(path);
}

/* No name of anybody else's: the directory may have been there before, with a user's own in it. */
static const char build_prefix[] = ".metalloid-build-";

/* Build directories of processes that did not come to their end. */
static void remove_old_builds(const char *path) {
    DIR *directory = opendir(path);
    if (!directory) return;
    for (struct dirent *entry; (entry = readdir(directory));) {
        struct stat status;
        if (strncmp(entry->d_name, build_prefix, sizeof build_prefix - 1) != 0) continue;
        if (fstatat(dirfd(directory), entry->d_name, &status, AT_SYMLINK_NOFOLLOW) != 0) continue;
        if (!S_ISDIR(status.st_mode) || time(NULL) - status.st_mtim.tv_sec < OLD_BUILD_SECONDS) continue;
        mtl_text old = {0};
        mtl_text_format(&old, "%s/%s", path, entry->d_name);
        if (!old.failed) remove_directory(old.data);
        mtl_text_free(&old);
    }
    closedir(directory);
}

/* ---- the size of all --------------------------------------------------------------------------------------------- */

typedef struct kept_entry {
    char name[65 + sizeof ".bin"];
    double used;
    off_t size;
} kept_entry;

/* A digest in hexadecimal and .so or .bin. */
static bool is_entry(const char *name) {
    size_t digits = strspn(name, "0123456789abcdef");
    return digits == 64 && (strcmp(name + digits, ".so") == 0 || strcmp(name + digits, ".bin") == 0);
}

static double seconds_of(const struct timespec *time) { return (double)time->tv_sec + 1e-9 * (double)time->tv_nsec; }

/* When an entry was made, or used: its time of access, which this file sets itself, since file systems may not. */
static double last_use(const struct stat *status) {
    double made = seconds_of(&status->st_mtim), used = seconds_of(&status->st_atim);
    return made > used ? made : used;
}

static int compare_use(const void *a, const void *b) {
    double left = ((const kept_entry *)a)->used, right = ((const kept_entry *)b)->used;
    return (left > right) - (left < right);
}

static double most_bytes(void) {
    static const char name[] = "METALLOID_CACHE_MIB";
    const char *given = mtl_setting(name);
    char *end = NULL;
    double mebibytes = given ? strtod(given, &end) : MOST_MEBIBYTES;
    if (end && (end == given || *end || !(mebibytes >= 0))) {
        mtl_setting_ignored(name, given, "it must be a number of MiB, 0 or more; %d are kept instead",
                            (int)MOST_MEBIBYTES);
        mebibytes = MOST_MEBIBYTES;
    }
    return mebibytes * (1 << 20);
}

/* Removes entries, and what was kept for a debugger beside them, but for `newest`. */
static void remove_unused(const char *path, const char *newest) {
    DIR *directory = opendir(path);
    if (!directory) return;
    kept_entry *entries = NULL;
    size_t count = 0;
    double total = 0, most = most_bytes();
    for (struct dirent *at; (at = readdir(directory));) {
        struct stat status;
        if (!is_entry(at->d_name) || fstatat(dirfd(directory), at->d_name, &status, AT_SYMLINK_NOFOLLOW) != 0) continue;
        total += (double)status.st_size;
        if (newest && strcmp(at->d_name, newest) == 0) continue;
        kept_entry *grown = realloc(entries, (count + 1) * sizeof *grown);
        if (!grown) break;
        entries = grown;
        entries[count] = (kept_entry){.used = last_use(&status), .size = status.st_size};
        strcpy(entries[count++].name, at->d_name); // NOLINT: is_entry says how long it is
    }
    if (total > most && count > 0) qsort(entries, count, sizeof *entries, compare_use);
    for (size_t i = 0; i < count && total > most; i++) {
        unlinkat(dirfd(directory), entries[i].name, 0);
        total -= (double)entries[i].size;
        mtl_text debug = {0};
        mtl_text_format(&debug, "%s/%.64s.debug", path, entries[i].name);
        if (!debug.failed) remove_directory(debug.data);
        mtl_text_free(&debug);
    }
    free(entries);
    closedir(directory);
}

/* ---- entries -------------------------------------------------------------------------------------------------------------------- */

/* Whether the file is an entry that was written whole, for this key, by this user. */
static bool is_sound(const char *path, const mtl_digest *key) {
    /* Opening a FIFO would else wait for a writer. */
    int file = open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (file < 0) return false;
    struct stat status;
    bool sound = fstat(file, &status) == 0 && S_ISREG(status.st_mode) && status.st_uid == geteuid() &&
                 !(status.st_mode & 022) && status.st_size > (off_t)sizeof(trailer) && status.st_size <= LARGEST_OBJECT;
    if (sound) {
        size_t size = (size_t)status.st_size;
        char *bytes = read_all(file, size);
        trailer end;
        if (bytes) memcpy(&end, bytes + size - sizeof end, sizeof end);
        sound = bytes && memcmp(end.magic, magic, sizeof magic) == 0 && memcmp(&end.key, key, sizeof *key) == 0;
        if (sound) {
            mtl_digest contents = digest_of(bytes, size - sizeof end);
            sound = memcmp(&end.contents, &contents, sizeof contents) == 0;
        }
        free(bytes);
        if (sound && (double)time(NULL) - last_use(&status) > USED_SECONDS) {
            const struct timespec times[] = {{.tv_nsec = UTIME_NOW}, {.tv_nsec = UTIME_OMIT}};
            futimens(file, times);
        }
    }
    close(file);
    return sound;
}

static bool add_trailer(const char *path, const mtl_digest *key) {
    int file = open(path, O_RDWR | O_APPEND | O_NOFOLLOW | O_CLOEXEC);
    if (file < 0) return false;
    struct stat status;
    bool done =
        fstat(file, &status) == 0 && fchmod(file, 0600) == 0 && status.st_size > 0 && status.st_size < LARGEST_OBJECT;
    char *bytes = done ? read_all(file, (size_t)status.st_size) : NULL;
    if (bytes) {
        trailer end = {.key = *key, .contents = digest_of(bytes, (size_t)status.st_size)};
        memcpy(end.magic, magic, sizeof magic);
        done = write_all(file, (const char *)&end, sizeof end);
        free(bytes);
    }
    return close(file) == 0 && bytes && done;
}

static void *load(const char *path, mtl_text *log) {
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!handle && log) mtl_text_format(log, "the compiled object cannot be loaded: %s", dlerror());
    return handle;
}

typedef enum outcome { BUILT, REFUSED, NO_ROOM } outcome;

/* Compiles in a directory of its own below `base`, and moves the result to `entry`, where one is given. */
static outcome build_in(const char *base, const char *entry, const char *debug, const mtl_build *build, void **handle,
                        mtl_text *log) {
    enum { MOST_WORDS = 64 };
    mtl_text directory = {0}, unit = {0}, object = {0}, compilation = {0};
    outcome result = NO_ROOM;
    *handle = NULL;
    mtl_text_format(&directory, "%s/%sXXXXXX", base, build_prefix);
    if (directory.failed || !mkdtemp(directory.data)) {
        mtl_text_format(log, "%s: %s\n", base, strerror(errno));
        mtl_text_free(&directory);
        return NO_ROOM;
    }
    mtl_text_format(&unit, "%s/unit.cc", directory.data);
    mtl_text_format(&object, "%s/object.so", directory.data);
    mtl_text_format(&compilation, "-fdebug-compilation-dir=%s", debug ? debug : "");
    if (unit.failed || object.failed || compilation.failed || !write_file(unit.data, build->unit, build->unit_length)) {
        mtl_text_format(log, "%s: %s\n", base, strerror(errno));
    } else {
        const char *words[MOST_WORDS];
        int count = 0;
        for (int i = 0; build->arguments[i] && count < MOST_WORDS - 5; i++) words[count++] = build->arguments[i];
        if (debug) words[count++] = compilation.data;
        words[count++] = "-o";
        words[count++] = "object.so";
        words[count++] = "unit.cc";
        words[count] = NULL;
        struct stat status;
        mtl_text said = {0};
        bool compiled = mtl_compiler_run(build->compiler, words, directory.data, &said) &&
                        stat(object.data, &status) == 0 && status.st_size > 0;
        struct statvfs space;
        bool is_full = statvfs(base, &space) == 0 && (double)space.f_bavail * (double)space.f_frsize < FEW_BYTES;
        if (!compiled) result = is_full ? NO_ROOM : REFUSED;
        if (!compiled) mtl_text_add(log, mtl_text_string(&said), said.length);
        if (!compiled && said.length == 0)
            mtl_text_format(log, "%s made nothing of it, without a word\n", build->compiler->word[0]);
        mtl_text_free(&said);
        if (compiled) {
            const char *path = object.data;
            if (entry && add_trailer(path, &build->key) && rename(path, entry) == 0) {
                path = entry;
                remove_unused(base, strrchr(entry, '/') + 1);
            }
            *handle = load(path, log);
            result = *handle ? BUILT : REFUSED;
        }
    }
    remove_directory(directory.data);
    mtl_text_free(&directory);
    mtl_text_free(&unit);
    mtl_text_free(&object);
    mtl_text_free(&compilation);
    return result;
}

/* The texts that a debugger shows, in a directory beside the entry; an older one of this key has the same. */
static void keep_sources(const char *directory, const mtl_build *build) {
    static const char *const names[] = {"source", "header", "unit.cc"};
    const char *const texts[] = {build->source, build->header, build->unit};
    if (mkdir(directory, 0700) != 0) return;
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        mtl_text path = {0};
        mtl_text_format(&path, "%s/%s", directory, names[i]);
        if (!path.failed) write_file(path.data, texts[i], strlen(texts[i]));
        mtl_text_free(&path);
    }
}

void *mtl_cache_get(const mtl_build *build, mtl_text *log) {
    char hex[65];
    key_in_hex(hex, &build->key);
    mtl_text path = {0}, entry = {0}, debug = {0};
    void *handle = NULL;
    outcome result = NO_ROOM;
    if (open_directory(&path)) {
        mtl_text_format(&entry, "%s/%s.so", path.data, hex);
        mtl_text_format(&debug, "%s/%s.debug", path.data, hex);
        if (!entry.failed && !debug.failed) {
            if (is_sound(entry.data, &build->key)) handle = load(entry.data, NULL);
            if (!handle) {
                remove_old_builds(path.data);
                if (build->source) keep_sources(debug.data, build);
                result = build_in(path.data, entry.data, build->source ? debug.data : NULL, build, &handle, log);
            }
        }
    }
    if (!handle && result == NO_ROOM) {
        const char *temporary = secure_getenv("TMPDIR");
        if (!temporary || *temporary != '/') temporary = "/tmp";
        mtl_text kept = *log;
        *log = (mtl_text){0};
        result = build_in(temporary, NULL, NULL, build, &handle, log);
        if (!handle && result == NO_ROOM) { /* both reasons */
            mtl_text_add(&kept, mtl_text_string(log), log->length);
            mtl_text_free(log);
            *log = kept;
        } else {
            mtl_text_free(&kept);
        }
    }
    mtl_text_free(&path);
    mtl_text_free(&entry);
    mtl_text_free(&debug);
    return handle;
}

/* ---- bytes ------------------------------------------------------------------------------------------------------------------------- */

static bool bytes_path(const mtl_digest *key, mtl_text *directory, mtl_text *entry) {
    char hex[65];
    key_in_hex(hex, key);
    if (!open_directory(directory)) return false;
    mtl_text_format(entry, "%s/%s.bin", directory->data, hex);
    return !entry->failed;
}

bool mtl_cache_load(const mtl_digest *key, char **bytes, size_t *length) {
    mtl_text directory = {0}, entry = {0};
    *bytes = NULL;
    if (bytes_path(key, &directory, &entry) && is_sound(entry.data, key)) {
        int file = open(entry.data, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
        struct stat status;
        if (file >= 0 && fstat(file, &status) == 0 && status.st_size > (off_t)sizeof(trailer)) {
            *length = (size_t)status.st_size - sizeof(trailer);
            *bytes = read_all(file, *length);
        }
        if (file >= 0) close(file);
    }
    mtl_text_free(&directory);
    mtl_text_free(&entry);
    return *bytes != NULL;
}

void mtl_cache_store(const mtl_digest *key, const char *bytes, size_t length) {
    mtl_text directory = {0}, entry = {0}, made = {0}, file = {0};
    if (bytes_path(key, &directory, &entry)) {
        remove_old_builds(directory.data);
        mtl_text_format(&made, "%s/%sXXXXXX", directory.data, build_prefix);
        if (!made.failed && mkdtemp(made.data)) {
            mtl_text_format(&file, "%s/bytes", made.data);
            if (!file.failed && write_file(file.data, bytes, length) && add_trailer(file.data, key) &&
                rename(file.data, entry.data) == 0)
                remove_unused(directory.data, strrchr(entry.data, '/') + 1);
            remove_directory(made.data);
        }
    }
    mtl_text_free(&directory);
    mtl_text_free(&entry);
    mtl_text_free(&made);
    mtl_text_free(&file);
}
