/* The choice of a backend, by the device that a call's tensors are on. SPDX-License-Identifier: MIT */
#ifndef METALLOID_API_BACKEND_H
#define METALLOID_API_BACKEND_H

#include "core/tensor.h"
#include "cpu/kernels.h"

#if MTL_WITH_CUDA
#include "cuda/kernels.h"
#define MTL_BACKEND(kernel, context, op, args)                                          \
    ((args)->device.device_type == kDLCUDA ? mtl_cuda_##kernel((context), (op), (args)) \
                                           : mtl_cpu_##kernel((context), (op), (args)))
#else
#define MTL_BACKEND(kernel, context, op, args) mtl_cpu_##kernel((context), (op), (args))
#endif

#define MTL_RUN(kernel, context, op, args) \
    ((int)(args)->device.device_type == MTL_NO_DEVICE ? METALLOID_OK : MTL_BACKEND(kernel, context, op, args))

#endif
