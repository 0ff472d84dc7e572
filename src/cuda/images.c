/* The kernels as nvcc made them, one image a .cu file, put into the library as they are. SPDX-License-Identifier: MIT
 *
 * MTL_CUDA_IMAGE_DIR is where the build leaves <name>.fatbin. */
#include "cuda/driver.h"

#define IMAGE(name)                                                 \
    __asm__(".pushsection .rodata, \"a\"\n"                         \
            ".balign 64\n"                                          \
            ".globl mtl_cuda_image_" #name "\n"                     \
            ".hidden mtl_cuda_image_" #name "\n"                    \
            "mtl_cuda_image_" #name ":\n"                           \
            ".incbin \"" MTL_CUDA_IMAGE_DIR "/" #name ".fatbin\"\n" \
            ".byte 0\n"                                             \
            ".popsection\n");
MTL_CUDA_IMAGES(IMAGE)
