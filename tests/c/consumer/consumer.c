/* A user's program, C and C++ alike: rms_norm of {3, 4}. SPDX-License-Identifier: MIT */
#include <metalloid/metalloid.h>
#include <stdio.h>
#include <string.h>

int main(void) {
    float values[2] = {3, 4};
    int64_t shape[1] = {2};
    DLTensor x;
    memset(&x, 0, sizeof x);
    x.data = values;
    x.device.device_type = kDLCPU;
    x.ndim = 1;
    x.dtype.code = kDLFloat;
    x.dtype.bits = 32;
    x.dtype.lanes = 1;
    x.shape = shape;
    if (metalloid_rms_norm(NULL, &x, NULL, 0.0, &x) != METALLOID_OK) {
        fprintf(stderr, "%s\n", metalloid_last_error());
        return 1;
    }
    printf("%g\n", (double)values[0]);
    return 0;
}
