"""The Python package's functions for NumPy arrays, computed on the GPU: what tests/python tests, by way of the device.

Every argument's whole buffer goes there, so that strides, gaps and overlaps are what they are on the CPU, and comes
back, so that a byte written beside an output shows.
"""

import ctypes
import inspect

import numpy as np
import torch
from library import CrossEntropyOptions, attention_options, call, context, rope_options, tensor

__version__ = "on CUDA"
CODES = {"i": 0, "u": 1, "f": 2, "b": 6}
stream = torch.cuda.Stream()
the_context = context(stream.cuda_stream)


def get_num_threads():
    return 1


def set_num_threads(_):
    pass


def cpu_isa():
    return "cuda"


class Trip:
    """Buffers on their way to the device and back."""

    def __init__(self):
        self.buffers = {}

    def send(self, array):
        if array is None:
            return None
        if not isinstance(array, np.ndarray):
            if not isinstance(array, np.generic):
                raise TypeError(f"an array is needed, got {type(array).__name__}")
            array = np.asarray(array)
        root = array
        while isinstance(root.base, np.ndarray):
            root = root.base
        start, end = np.lib.array_utils.byte_bounds(root)
        if start not in self.buffers:
            host = (ctypes.c_uint8 * max(end - start, 1)).from_address(start)
            flat = np.frombuffer(host, np.uint8)
            buffer = torch.empty(len(flat) + 512, dtype=torch.uint8, device="cuda")
            # The distance to a 256-byte boundary, on which fast paths depend, is the host's.
            gap = (start - buffer.data_ptr()) % 256
            device = buffer[gap : gap + len(flat)]
            device.copy_(torch.from_numpy(flat.copy()))
            self.buffers[start] = (flat, device, array.flags.writeable)
        flat, device, _ = self.buffers[start]
        kind = array.dtype.kind
        code = 4 if array.dtype.name == "bfloat16" else CODES.get(kind, 5)
        if array.size and any(s % array.itemsize for s, n in zip(array.strides, array.shape, strict=True) if n > 1):
            raise ValueError("a stride is no multiple of the element size")
        strides = [s // array.itemsize for s in array.strides]
        place = device.data_ptr() + array.ctypes.data - start
        return tensor(place, (code, 8 * array.itemsize), array.shape, strides)

    def receive(self):
        for flat, device, writable in self.buffers.values():
            if writable:
                flat[:] = device.cpu().numpy()


def promoted(*dtypes):
    dtypes = {np.dtype(d) for d in dtypes}
    if len(dtypes) == 1:
        return dtypes.pop()
    return np.dtype(np.float64) if np.dtype(np.float64) in dtypes else np.dtype(np.float32)


def run(op, trip, arguments):
    stream.wait_stream(torch.cuda.current_stream())
    call(op, the_context, *arguments)
    stream.synchronize()
    trip.receive()


def results(out, *wanted):
    """(shape, dtype) each; out: None, an array, or a tuple of them."""
    if out is None:
        return [np.empty(shape, dtype) for shape, dtype in wanted]
    return list(out) if isinstance(out, tuple) else [out]


def rms_norm(x, weight, eps, *, out=None, stream=None):
    trip = Trip()
    (y,) = results(out, (x.shape, promoted(x.dtype, *([] if weight is None else [weight.dtype]))))
    run("rms_norm", trip, [trip.send(x), trip.send(weight), eps, trip.send(y)])
    return y


def layer_norm_dtype(dtype, weight, bias):
    if weight is None:
        return dtype
    return promoted(dtype, weight.dtype, *([] if bias is None else [bias.dtype]))


def layer_norm(x, weight, bias, eps, *, out=None, stream=None):
    trip = Trip()
    (y,) = results(out, (x.shape, layer_norm_dtype(x.dtype, weight, bias)))
    run("layer_norm", trip, [trip.send(x), trip.send(weight), trip.send(bias), eps, trip.send(y)])
    return y


def add_rms_norm(x, residual, weight, eps, *, out=None):
    trip = Trip()
    dtype = promoted(x.dtype, residual.dtype)
    normed = dtype if weight is None else promoted(dtype, weight.dtype)
    total, y = results(out, (x.shape, dtype), (x.shape, normed))
    send = trip.send
    run("add_rms_norm", trip, [send(x), send(residual), send(weight), eps, send(total), send(y)])
    return total, y


def add_layer_norm(x, residual, weight, bias, eps, *, out=None):
    trip = Trip()
    dtype = promoted(x.dtype, residual.dtype)
    total, y = results(out, (x.shape, dtype), (x.shape, layer_norm_dtype(dtype, weight, bias)))
    send = trip.send
    run("add_layer_norm", trip, [send(x), send(residual), send(weight), send(bias), eps, send(total), send(y)])
    return total, y


def options_of_rope(trip, arguments):
    names = ("freqs", "position_ids", "inv_freqs", "offset")
    sent = {
        k: trip.send(v) if k in names and isinstance(v, (np.ndarray, np.generic)) else v for k, v in arguments.items()
    }
    return rope_options(**sent)


def rope(a, dims, *, out=None, stream=None, **arguments):
    trip = Trip()
    (y,) = results(out, (a.shape, a.dtype))
    run("rope", trip, [trip.send(a), dims, options_of_rope(trip, arguments), trip.send(y)])
    return y


def qk_norm_rope(q, k, q_weight, k_weight, eps, dims, *, out=None, **arguments):
    trip = Trip()
    dtypes = [promoted(x.dtype, *([] if w is None else [w.dtype])) for x, w in ((q, q_weight), (k, k_weight))]
    y, z = results(out, (q.shape, dtypes[0]), (k.shape, dtypes[1]))
    send = trip.send
    options = options_of_rope(trip, arguments)
    run("qk_norm_rope", trip, [send(q), send(k), send(q_weight), send(k_weight), eps, dims, options, send(y), send(z)])
    return y, z


def swiglu(gate, up, *, out=None):
    trip = Trip()
    (y,) = results(out, (gate.shape, promoted(gate.dtype, up.dtype)))
    run("swiglu", trip, [trip.send(gate), trip.send(up), trip.send(y)])
    return y


def geglu(gate, up, *, approximate="none", out=None):
    trip = Trip()
    (y,) = results(out, (gate.shape, promoted(gate.dtype, up.dtype)))
    run("geglu", trip, [trip.send(gate), trip.send(up), int(approximate == "tanh"), trip.send(y)])
    return y


def scaled_dot_product_attention(
    q, k, v, *, scale, mask=None, sinks=None, return_logsumexp=False, out=None, stream=None, **options
):
    trip = Trip()
    if isinstance(mask, str):
        options["causal"], mask = True, None
    shape = (*q.shape[:3], v.shape[3])
    outs = results(out, (shape, promoted(q.dtype, k.dtype, v.dtype)), (q.shape[:3], np.float32))
    send = trip.send
    given = attention_options(
        mask=send(mask),
        sinks=send(sinks),
        key_mask=send(options.pop("key_mask", None)),
        logsumexp=send(outs[1]) if return_logsumexp else None,
        **options,
    )
    run("scaled_dot_product_attention", trip, [send(q), send(k), send(v), scale, given, send(outs[0])])
    return (outs[0], outs[1]) if return_logsumexp else outs[0]


def kv_cache_sdpa_update(q, new_k, new_v, k_cache, v_cache, offset, key_mask, scale, *, out=None):
    trip = Trip()
    shape = (q.shape[0], q.shape[2], q.shape[1], v_cache.shape[3])
    (y,) = results(out, (shape, promoted(q.dtype, k_cache.dtype, v_cache.dtype)))
    send = trip.send
    tensors = [send(x) for x in (q, new_k, new_v, k_cache, v_cache)]
    run("kv_cache_sdpa_update", trip, [*tensors, int(np.asarray(offset).item()), send(key_mask), scale, send(y)])
    return y


def cross_entropy(logits, targets, *, ignore_index=None, out=None, stream=None):
    trip = Trip()
    targets = np.asarray(targets)
    (y,) = results(out, (targets.shape, np.float32))
    options = CrossEntropyOptions(ctypes.sizeof(CrossEntropyOptions), ignore_index is not None, ignore_index or 0)
    run("cross_entropy", trip, [trip.send(logits), trip.send(targets), options, trip.send(y)])
    return y


def gated_delta_update(q, k, v, gamma, beta, initial_state=None, mask=None, stream=None, *, out=None):
    trip = Trip()
    state = (v.shape[0], v.shape[2], v.shape[3], q.shape[3])
    y, s = results(out, (v.shape, promoted(q.dtype, k.dtype)), (state, np.float32))
    run("gated_delta_update", trip, [trip.send(x) for x in (q, k, v, gamma, beta, initial_state, mask, y, s)])
    return [y, s]


operations = {name: f for name, f in list(globals().items()) if inspect.isfunction(f)}
