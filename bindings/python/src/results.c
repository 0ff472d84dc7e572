/* Memory for the results of calls without `out`. SPDX-License-Identifier: MIT
 *
 * malloc gives large blocks back to the system once they are freed, and the next result is a page fault every 4 KiB: several times
 * what its kernel costs. The last few blocks are therefore kept, for results of the same size: in a model's step they have those
 * of the step before. Pages of the large ones the system may take when it needs them (MADV_FREE).
 *
 * A block begins with a page that holds its size, since NumPy tells realloc none. */
#include "results.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { BLOCKS = 4, MOST_BYTES = 256 << 20, LARGE = 32 << 20, PAGE = 4096, GRAIN = 64 << 10, HUGE_PAGE = 2 << 20 };

static struct {
    char *block;
    size_t size; /* of all of it */
} kept[BLOCKS];  /* the last freed first; NULL behind them */

static size_t whole_size(size_t size) { return size > SIZE_MAX / 2 ? 0 : (size + PAGE + GRAIN - 1) / GRAIN * GRAIN; }

static char *take(size_t size) {
    for (int i = 0; i < BLOCKS && kept[i].block; i++) {
        if (kept[i].size != size) continue;
        char *block = kept[i].block;
        memmove(kept + i, kept + i + 1, sizeof *kept * (size_t)(BLOCKS - 1 - i));
        kept[BLOCKS - 1].block = NULL;
        return block;
    }
    void *block;
    size_t alignment = size >= 2 * HUGE_PAGE ? HUGE_PAGE : PAGE;
    if (posix_memalign(&block, alignment, size) != 0) return NULL;
#ifdef MADV_HUGEPAGE
    if (alignment == HUGE_PAGE) madvise(block, size, MADV_HUGEPAGE); /* as NumPy does; a refusal does no harm */
#endif
    return block;
}

/* Gives how large it was. */
static size_t drop_last(void) {
    int last = BLOCKS - 1;
    while (!kept[last].block) last--;
    free(kept[last].block);
    kept[last].block = NULL;
    return kept[last].size;
}

static void give(char *block, size_t size) {
    if (size > MOST_BYTES) {
        free(block);
        return;
    }
    size_t bytes = size;
    if (kept[BLOCKS - 1].block) drop_last();
    for (int i = 0; i < BLOCKS && kept[i].block; i++) bytes += kept[i].size;
    while (bytes > MOST_BYTES) bytes -= drop_last(); /* this one alone is no larger */
    memmove(kept + 1, kept, sizeof *kept * (BLOCKS - 1));
    kept[0].block = block;
    kept[0].size = size;
#ifdef MADV_FREE
    if (size >= LARGE) madvise(block, size, MADV_FREE); /* of smaller ones it would cost as much as their kernel */
#endif
}

void *results_malloc(void *unused, size_t size) {
    (void)unused;
    size_t whole = whole_size(size);
    char *block = whole ? take(whole) : NULL;
    if (!block) return NULL;
    memcpy(block, &whole, sizeof whole);
    return block + PAGE;
}

void *results_calloc(void *unused, size_t count, size_t size) {
    if (size && count > SIZE_MAX / size) return NULL;
    void *memory = results_malloc(unused, count * size);
    if (memory) memset(memory, 0, count * size);
    return memory;
}

static size_t size_of(const void *memory) {
    size_t whole;
    memcpy(&whole, (const char *)memory - PAGE, sizeof whole);
    return whole;
}

void *results_realloc(void *unused, void *memory, size_t size) {
    if (!memory) return results_malloc(unused, size);
    size_t room = size_of(memory) - PAGE;
    void *moved = results_malloc(unused, size);
    if (!moved) return NULL;
    memcpy(moved, memory, size < room ? size : room);
    results_free(unused, memory, 0);
    return moved;
}

void results_free(void *unused, void *memory, size_t size) {
    (void)unused, (void)size;
    if (memory) give((char *)memory - PAGE, size_of(memory));
}
