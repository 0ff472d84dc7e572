// layer_norm and add_layer_norm. SPDX-License-Identifier: MIT
#include "cuda/norm.cuh"

NORM_IMAGE(layer_norm, true)
