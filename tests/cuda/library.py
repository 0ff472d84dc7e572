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
