"""The C library by ctypes, so that a machine with PyTorch and nothing to build with can test and time it.

METALLOID_LIBRARY names libmetalloid.so; by default build/cuda has it.
"""

import ctypes
import os
import pathlib
from ctypes import POINTER, Structure, byref, c_bool, c_double, c_int, c_int32, c_int64, c_size_t, c_uint8, c_void_p

ROOT = pathlib.Path(__file__).resolve().parents[2]
CUDA = 2  # kDLCUDA
CAUSAL_OFFSET_DEFAULT = -(2**63)


class Device(Structure):
    _fields_ = [("type", c_int32), ("id", c_int32)]


class DType(Structure):
    _fields_ = [("code", c_uint8), ("bits", c_uint8), ("lanes", ctypes.c_uint16)]


class DLTensor(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("device", Device),
        ("ndim", c_int32),
        ("dtype", DType),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


Tensor = POINTER(DLTensor)


class RopeOptions(Structure):
    _fields_ = [
        ("size", c_size_t),
        ("traditional", c_bool),
        ("time_axis", c_int),
        ("scale", c_double),
        ("base", c_double),
        ("freqs", Tensor),
        ("inv_freqs", Tensor),
        ("offset", c_int64),
        ("offsets", Tensor),
        ("position_ids", Tensor),
    ]


class AttentionOptions(Structure):
    _fields_ = [
        ("size", c_size_t),
        ("causal", c_bool),
        ("causal_offset", c_int64),
        ("window", c_int64),
        ("softcap", c_double),
        ("mask", Tensor),
        ("key_mask", Tensor),
        ("sinks", Tensor),
        ("logsumexp", Tensor),
    ]


class CrossEntropyOptions(Structure):
    _fields_ = [("size", c_size_t), ("has_ignore_index", c_bool), ("ignore_index", c_int64)]


class KernelOptions(Structure):
    _fields_ = [
        ("size", c_size_t),
        ("language", c_int),
        ("header", ctypes.c_char_p),
        ("ensure_row_contiguous", c_bool),
        ("atomic_outputs", c_bool),
        ("math_mode", c_int),
        ("fallback_compiler", ctypes.c_char_p),
        ("debug", c_bool),
        ("address_sanitizer", c_bool),
        ("most_iterations", c_int64),
        ("shared_memory", c_int),
        ("source_length", c_size_t),
    ]


class TemplateArgument(Structure):
    _fields_ = [("name", ctypes.c_char_p), ("kind", c_int), ("value", c_int64), ("dtype", DType)]


class KernelCall(Structure):
    _fields_ = [
        ("size", c_size_t),
        ("input_count", c_int),
        ("output_count", c_int),
        ("inputs", POINTER(Tensor)),
        ("outputs", POINTER(Tensor)),
        ("grid", c_int64 * 3),
        ("threadgroup", c_int64 * 3),
        ("template_count", c_int),
        ("template_arguments", POINTER(TemplateArgument)),
        ("has_init_value", c_bool),
        ("init_value", c_double),
        ("scalars", c_void_p),
        ("scalar_count", c_int64),
    ]


SIGNATURES = {
    "rms_norm": [Tensor, Tensor, c_double, Tensor],
    "layer_norm": [Tensor, Tensor, Tensor, c_double, Tensor],
    "add_rms_norm": [Tensor, Tensor, Tensor, c_double, Tensor, Tensor],
    "add_layer_norm": [Tensor, Tensor, Tensor, Tensor, c_double, Tensor, Tensor],
    "rope": [Tensor, c_int64, POINTER(RopeOptions), Tensor],
    "qk_norm_rope": [Tensor] * 4 + [c_double, c_int64, POINTER(RopeOptions), Tensor, Tensor],
    "swiglu": [Tensor, Tensor, Tensor],
    "geglu": [Tensor, Tensor, c_int, Tensor],
    "scaled_dot_product_attention": [Tensor, Tensor, Tensor, c_double, POINTER(AttentionOptions), Tensor],
    "kv_cache_sdpa_update": [Tensor] * 5 + [c_int64, Tensor, c_double, Tensor],
    "cross_entropy": [Tensor, Tensor, POINTER(CrossEntropyOptions), Tensor],
    "gated_delta_update": [Tensor] * 9,
}


def load():
    library = ctypes.CDLL(os.environ.get("METALLOID_LIBRARY", str(ROOT / "build/cuda/libmetalloid.so")))
    library.metalloid_last_error.restype = ctypes.c_char_p
    library.metalloid_context_create.argtypes = [POINTER(c_void_p)]
    library.metalloid_context_set_stream.argtypes = [c_void_p, c_void_p]
    for name, arguments in SIGNATURES.items():
        getattr(library, f"metalloid_{name}").argtypes = [c_void_p, *arguments]
    library.metalloid_kernel_launch.argtypes = [c_void_p, c_void_p, POINTER(KernelCall)]
    strings = POINTER(ctypes.c_char_p)
    library.metalloid_kernel_create.argtypes = [
        *(ctypes.c_char_p, strings, c_int, strings, c_int, ctypes.c_char_p),
        *(POINTER(KernelOptions), POINTER(c_void_p)),
    ]
    return library


library = load()
ERRORS = {1: ValueError, 2: MemoryError, 3: RuntimeError, 4: RuntimeError}


def tensor(data, dtype, shape, strides, device=0):
    """dtype: (code, bits); strides in elements."""
    rank = len(shape)
    extents = (c_int64 * max(rank, 1))(*shape)
    steps = (c_int64 * max(rank, 1))(*strides)
    made = DLTensor(data, Device(CUDA, device), rank, DType(*dtype, 1), extents, steps, 0)
    made.kept = (extents, steps)
    return made


def context(stream):
    made = c_void_p()
    library.metalloid_context_create(byref(made))
    library.metalloid_context_set_stream(made, stream)
    return made


def call(op, context, *arguments):
    """Tensors and options as they are, or None."""
    pointers = [byref(a) if isinstance(a, Structure) else a for a in arguments]
    status = getattr(library, f"metalloid_{op}")(context, *pointers)
    if status:
        raise ERRORS[status](library.metalloid_last_error().decode())


def check(status):
    if status:
        raise ERRORS.get(status, RuntimeError)(library.metalloid_last_error().decode())


def kernel(source, inputs, outputs, *, header="", language=0):
    """A custom kernel; language: 0 for Metal, 1 for CUDA."""
    made, options = c_void_p(), KernelOptions(ctypes.sizeof(KernelOptions), language, header.encode(), True)
    names = [(ctypes.c_char_p * len(n))(*(name.encode() for name in n)) for n in (inputs, outputs)]
    check(
        library.metalloid_kernel_create(
            b"kernel", names[0], len(inputs), names[1], len(outputs), source.encode(), byref(options), byref(made)
        )
    )
    return made


def kernel_call(inputs, outputs, grid, threadgroup, template=()):
    """Tensors are DLTensors; template: (name, value), value an int or a dtype (code, bits)."""
    sides = [(Tensor * len(side))(*(ctypes.pointer(t) for t in side)) for side in (inputs, outputs)]
    made = KernelCall(ctypes.sizeof(KernelCall), len(inputs), len(outputs), *sides)
    made.grid[:], made.threadgroup[:] = grid, threadgroup
    arguments = (TemplateArgument * max(len(template), 1))()
    for argument, (name, value) in zip(arguments, template, strict=False):
        argument.name = name.encode()
        if isinstance(value, tuple):
            argument.kind, argument.dtype = 2, DType(*value, 1)
        else:
            argument.kind, argument.value = 0, value
    made.template_count, made.template_arguments = len(template), arguments
    made.kept = (inputs, outputs)
    return made


def rope_options(
    *, traditional, base, scale=1.0, offset=0, freqs=None, position_ids=None, inv_freqs=None, time_axis=-2
):
    """A tensor is a DLTensor; offset may be one."""
    options = RopeOptions(ctypes.sizeof(RopeOptions), traditional, int(time_axis == 1), scale, base or 0)
    tensors = {"freqs": freqs, "inv_freqs": inv_freqs, "position_ids": position_ids}
    if isinstance(offset, DLTensor):
        tensors["offsets"] = offset
    else:
        options.offset = offset
    return point(options, tensors)


def attention_options(
    *,
    causal=False,
    causal_offset=None,
    window=None,
    softcap=None,
    mask=None,
    key_mask=None,
    sinks=None,
    logsumexp=None,
):
    offset = CAUSAL_OFFSET_DEFAULT if causal_offset is None else causal_offset
    options = AttentionOptions(ctypes.sizeof(AttentionOptions), causal, offset, window or 0, softcap or 0)
    return point(options, {"mask": mask, "key_mask": key_mask, "sinks": sinks, "logsumexp": logsumexp})


def point(options, tensors):
    options.kept = tensors
    for name, value in tensors.items():
        if value is not None:
            setattr(options, name, ctypes.pointer(value))
    return options
