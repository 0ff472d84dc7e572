/* NVIDIA's run-time compiler, opened at run time. SPDX-License-Identifier: MIT */
#ifndef METALLOID_CUDA_NVRTC_H
#define METALLOID_CUDA_NVRTC_H

#include "kernel/text.h"

/* Whether there is one; else `why` says what to install. */
bool mtl_nvrtc_available(const char **why);

/* Its version, and where it was found, as text that changes when the compiler does. */
const char *mtl_nvrtc_identity(void);

/* Machine code for compute capability `arch` (90), or PTX for the newest one that the compiler knows where that is older; the
 * caller frees it. `options` are `count` more. `include` asks for the path to CUDA's headers. NULL: `log` has the reason. */
char *mtl_nvrtc_compile(const char *unit, int arch, const char *const *options, int count, bool include, size_t *length,
                        mtl_text *log);

#endif
