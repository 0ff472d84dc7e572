/* loss = logsumexp(logits) - logits[target]. SPDX-License-Identifier: MIT
 *
 * One read: the sum of exp(x - m) is carried with the largest logit m so far and rescaled when a larger one comes
 * (Milakov & Gimelshein 2018, arXiv:1805.02867). The loss is (m - logits[target]) + log(sum): the difference of the two large
 * numbers is taken before the small one is added. The term of m itself is 1 and stays out of the sum, as a confident row's loss is
 * what lies beside that 1. */
#include "cpu/plain/real.h"

void REAL(mtl_plain_cross_entropy)(const void *arguments, int64_t begin, int64_t end, void *scratch) {
    const mtl_cross_entropy_args *args = arguments;
    (void)scratch;
    mtl_cursor at;
    for (int64_t item = begin; item < end; item++) {
        if (item % args->cut.pieces) continue; /* the first piece stands for its row */
        mtl_cursor_seek(&at, &args->rows, item / args->cut.pieces);
        const char *logits = args->logits.data + at.offset[MTL_CROSS_ENTROPY_LOGITS];
        char *loss = args->loss.data + at.offset[MTL_CROSS_ENTROPY_LOSS];
        int64_t target =
            mtl_load_integer(args->targets.data + at.offset[MTL_CROSS_ENTROPY_TARGETS], args->targets.dtype);
        if (args->has_ignore_index && target == args->ignore_index) {
            real_store(loss, args->loss.dtype, 0);
            continue;
        }
        real largest = -(real)INFINITY;
        double rest = 0;
        for (int64_t i = 0; i < args->classes; i++) {
            real x = real_load(logits + i * args->logits.stride, args->logits.dtype);
            if (x > largest) {
                rest = (rest + 1) * exp((double)largest - (double)x);
                largest = x;
            } else if (x == largest) { /* named, since infinity - infinity would be NaN */
                rest += x == -(real)INFINITY ? 0 : 1;
            } else {
                rest += exp((double)x - (double)largest);
            }
        }
        real chosen = real_load(logits + target * args->logits.stride, args->logits.dtype);
        real_store(loss, args->loss.dtype, (real)(((double)largest - (double)chosen) + log1p(rest)));
    }
}
