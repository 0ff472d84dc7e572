/* Any operation on tensors whose shapes, dtypes, layouts and aliases may be wrong, but whose memory is always there: no read or write
 * beyond it, no undefined behaviour, nothing written by a call that fails. SPDX-License-Identifier: MIT */
#include "calls.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t count);

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t count) {
    source from = {bytes, count};
    call c;
    call_make(&c, &from, HOSTILE);
    call_expect_sane(&c, call_run(&c));
    call_free(&c);
    return 0;
}
