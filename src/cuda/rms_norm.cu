// rms_norm and add_rms_norm. SPDX-License-Identifier: MIT
#include "cuda/norm.cuh"

NORM_IMAGE(rms_norm, false)
