/* From a CUDA C++ kernel's body to what NVRTC compiles. SPDX-License-Identifier: MIT */
#ifndef METALLOID_KERNEL_CUDA_SOURCE_H
#define METALLOID_KERNEL_CUDA_SOURCE_H

#include "kernel/source.h"

enum { MTL_CUDA_NDIM = 10 }; /* axes of an input whose shape or strides a kernel reads, as in MLX */

/* The unit: names that MLX has in scope, the user's header, the kernel `mtl_kernel`. `include` says whether CUDA's headers are
 * needed, which takes time. */
void mtl_cuda_unit(mtl_text *out, const mtl_definition *definition, const mtl_mentions *mentions,
                   const mtl_types *types, bool *include);

#endif
