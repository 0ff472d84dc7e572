"""The benchmark of NVIDIA GPUs: ``metalloid bench --device cuda``.

Times every operation beside PyTorch, eager and compiled, its cuDNN attention, MLX's CUDA backend and
flash-linear-attention, on CUDA tensors of PyTorch. A case's calls are captured in a CUDA graph over several sets of
inputs, larger together than the second-level cache; the median of its replays counts. MLX makes graphs of its own: its
calls are evaluated together. A peer that is not there or does not serve a case is named as such.

The module imports nothing of the package: ``main`` is given the operations, so that tests/cuda can run it on a machine
that has the C library alone.
"""

import ctypes
import importlib.util
import math
import statistics
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

BF16 = torch.bfloat16
WARM_UP = 0.1  # seconds
TOGETHER = 0.002  # seconds of calls that one graph holds at least: what starts and ends a graph is no call's


def seconds(functions, replays=20):
    """Of one call: `functions` are the same call on different inputs."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for f in functions:
            f()
            f()
        stream.synchronize()
        repeats = 1 + min(15, int(TOGETHER / replayed(stream, captured(stream, functions))))
        functions = functions * repeats
        graph = captured(stream, functions)
        # A case's first tens of milliseconds can be a sixth slower than all that follow.
        warm = time.monotonic() + WARM_UP
        while time.monotonic() < warm:
            graph.replay()
            stream.synchronize()
        return statistics.median(replayed(stream, graph) for _ in range(replays)) / len(functions)


def captured(stream, functions):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for f in functions:
            f()
    graph.replay()  # the first one also takes it to the GPU
    return graph


def replayed(stream, graph):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(stream)
    graph.replay()
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def find_mlx():
    if not importlib.util.find_spec("mlx"):
        return None
    import mlx.core

    return mlx.core if mlx.core.cuda.is_available() else None


MLX = None  # until peers are asked for
MLX_TOGETHER = 0.02  # seconds of MLX's calls that are evaluated together, at least


def seconds_of_mlx(functions, rounds=10):
    """Of one call: its results are kept until the last of them is there, so that nothing waits between the calls."""

    def evaluated(repeats):
        outputs = [f() for _ in range(repeats) for f in functions]
        start = time.perf_counter()
        MLX.eval(outputs)
        return (time.perf_counter() - start) / len(outputs)

    evaluated(1)  # compiles
    repeats = 1 + min(63, int(MLX_TOGETHER / (evaluated(1) * len(functions))))
    evaluated(repeats)  # records the graph
    return statistics.median(evaluated(repeats) for _ in range(rounds))


def mlx_peer(make, *tensors):
    """{"MLX": a call}: make(mx, arrays of the tensors) gives it. They are copied when it is first called."""
    if MLX is None:
        return {}
    return {"MLX": MlxCall(make, tensors)}


class MlxCall:
    def __init__(self, make, tensors):
        self.make, self.tensors, self.call = make, tensors, None

    def __call__(self):
        self.call = self.call or self.make(MLX, *(self.array(t) for t in self.tensors))
        return self.call()

    @staticmethod
    def array(t):
        if t.dtype == BF16:
            return MLX.array(t.view(torch.int16).cpu().numpy()).view(MLX.bfloat16)
        return MLX.array(t.cpu().numpy())


def randn(*shape, dtype=BF16):
    return torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)


CASES = []


def case(name, work, unit, sets=4):
    """work: bytes or operations of a call; the function makes one set from the operations: (ours, {peer: theirs})."""

    def keep(make):
        CASES.append((name, work, unit, sets, make))
        return make

    return keep


def copy_case(_):
    """PyTorch's own copying kernel is slower than memory."""
    x = randn(1 << 26)
    y, stream = torch.empty_like(x), lambda: torch.cuda.current_stream().cuda_stream
    copy = ctypes.CDLL("libcuda.so.1").cuMemcpyDtoDAsync_v2
    copy.argtypes = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p)

    def copied():
        if error := copy(y.data_ptr(), x.data_ptr(), x.nbytes, stream()):
            raise RuntimeError(f"cuMemcpyDtoDAsync: error {error}")

    return copied, {"torch": lambda: y.copy_(x)}


case("copy of 128 MiB, the driver's", 2 << 27, "GB/s")(copy_case)


def torch_add_rms_norm(x, residual, weight):
    total = x + residual
    return total, F.rms_norm(total, weight.shape, weight, 1e-5)


def norm_case(rows, length, layer, added=False):
    def make(ops):
        x, w, b = randn(rows, length), randn(length), randn(length)
        r, s, y = randn(rows, length), torch.empty(rows, length, device="cuda", dtype=BF16), None
        y = torch.empty_like(x)
        if added:
            if layer:
                return lambda: ops.add_layer_norm(x, r, w, b, 1e-5, out=(s, y)), {}
            return lambda: ops.add_rms_norm(x, r, w, 1e-5, out=(s, y)), {"torch": lambda: torch_add_rms_norm(x, r, w)}
        if layer:
            return lambda: ops.layer_norm(x, w, b, 1e-5, out=y), {
                "torch": lambda: F.layer_norm(x, (length,), w, b, 1e-5),
                **mlx_peer(lambda mx, x, w, b: lambda: mx.fast.layer_norm(x, w, b, 1e-5), x, w, b),
            }
        return lambda: ops.rms_norm(x, w, 1e-5, out=y), {
            "torch": lambda: F.rms_norm(x, (length,), w, 1e-5),
            **mlx_peer(lambda mx, x, w: lambda: mx.fast.rms_norm(x, w, 1e-5), x, w),
        }

    name = ("add_" if added else "") + ("layer_norm" if layer else "rms_norm")
    small = rows * length < 1 << 20
    passes = 4 if added else 2
    case(
        f"{name} {rows}x{length}",
        1 if small else passes * rows * length * 2,
        "us" if small else "GB/s",
        16 if small else 4,
    )(make)


norm_case(16384, 4096, False)
norm_case(65536, 1024, False)
norm_case(64, 4096, False)
norm_case(16384, 4096, True)
norm_case(16384, 4096, False, True)
norm_case(16384, 4096, True, True)


def torch_rope(x, cos, sin):
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


def rope_case(traditional):
    def make(ops):
        x = randn(4, 32, 4096, 128)
        y = torch.empty_like(x)
        options = {"traditional": traditional, "base": 10000.0, "scale": 1.0, "offset": 0}
        angle = torch.arange(4096, device="cuda")[:, None] * 10000.0 ** (-torch.arange(0, 128, 2, device="cuda") / 128)
        cos, sin = (torch.cat((f(angle),) * 2, -1).to(BF16) for f in (torch.cos, torch.sin))
        peers = {} if traditional else {"torch": lambda: torch_rope(x, cos, sin)}
        peers |= mlx_peer(lambda mx, x: lambda: mx.fast.rope(x, 128, **options), x)
        return lambda: ops.rope(x, 128, out=y, **options), peers

    case(f"rope B4 N32 T4096 D128{' traditional' * traditional}", 2 * 4 * 32 * 4096 * 128 * 2, "GB/s", 2)(make)


rope_case(False)
rope_case(True)


@case("qk_norm_rope B4 T4096 N32/8 D128, {B,T,N,D}", 2 * 4 * 40 * 4096 * 128 * 2, "GB/s", 2)
def _(ops):
    q, k, w = randn(4, 4096, 32, 128), randn(4, 4096, 8, 128), randn(128)
    y, z = torch.empty_like(q), torch.empty_like(k)
    options = {"traditional": False, "base": 1e6, "scale": 1.0, "offset": 0, "time_axis": 1}
    return lambda: ops.qk_norm_rope(q, k, w, w, 1e-6, 128, out=(y, z), **options), {}


def mlx_gate(name, gate, up):
    def make(mx, g, u):
        import mlx.nn

        product = mx.compile(lambda g, u: getattr(mlx.nn, name)(g) * u)
        return lambda: product(g, u)

    return mlx_peer(make, gate, up)


@case("swiglu 16384x14336", 3 * 16384 * 14336 * 2, "GB/s", 1)
def _(ops):
    g, u = randn(16384, 14336), randn(16384, 14336)
    y = torch.empty_like(g)
    return lambda: ops.swiglu(g, u, out=y), {"torch": lambda: F.silu(g) * u, **mlx_gate("silu", g, u)}


@case("geglu 16384x14336", 3 * 16384 * 14336 * 2, "GB/s", 1)
def _(ops):
    g, u = randn(16384, 14336), randn(16384, 14336)
    y = torch.empty_like(g)
    return lambda: ops.geglu(g, u, out=y), {"torch": lambda: F.gelu(g) * u, **mlx_gate("gelu", g, u)}


@case("geglu tanh 16384x14336", 3 * 16384 * 14336 * 2, "GB/s", 1)
def _(ops):
    g, u = randn(16384, 14336), randn(16384, 14336)
    y = torch.empty_like(g)
    return lambda: ops.geglu(g, u, approximate="tanh", out=y), {
        "torch": lambda: F.gelu(g, approximate="tanh") * u,
        **mlx_gate("gelu_approx", g, u),
    }


def entropy_case(rows, classes):
    @case(f"cross_entropy {rows}x{classes}", rows * classes * 2, "GB/s", 1)
    def _(ops):
        logits = randn(rows, classes)
        targets = torch.randint(classes, (rows,), device="cuda")
        loss = torch.empty(rows, device="cuda")

        def mlx(mx, logits, targets):
            from mlx.nn.losses import cross_entropy

            return lambda: cross_entropy(logits.astype(mx.float32), targets)

        return lambda: ops.cross_entropy(logits, targets, out=loss), {
            "torch": lambda: F.cross_entropy(logits.float(), targets, reduction="none"),
            **mlx_peer(mlx, logits, targets),
        }


entropy_case(8192, 128256)
entropy_case(8192, 32000)


def delta_case(batch, time, heads=32, dim=128):
    decode = time == 1
    name = f"gated_delta {'decode' if decode else 'prefill'} B{batch} T{time} H{heads} D{dim}"

    @case(name, 2 * batch * heads * dim * dim * 4 if decode else 1, "GB/s" if decode else "us", 2 if decode else 1)
    def _(ops):
        q, k, v = (randn(batch, time, heads, dim) for _ in range(3))
        k = F.normalize(k.float(), dim=-1).to(BF16)
        gamma = torch.rand(batch, time, heads, device="cuda") * 0.1 + 0.9
        beta = torch.rand(batch, time, heads, device="cuda")
        state = randn(batch, heads, dim, dim, dtype=torch.float32)
        out, after = torch.empty_like(v), torch.empty_like(state)
        peers = {}
        if importlib.util.find_spec("fla"):
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

            step = fused_recurrent_gated_delta_rule if decode else chunk_gated_delta_rule
            given = {"initial_state": state.mT.contiguous(), "output_final_state": True, "scale": 1.0}
            peers["fla"] = lambda: step(q, k, v, gamma.log(), beta, **given)
        return lambda: ops.gated_delta_update(q, k, v, gamma, beta, state, out=(out, after)), peers


delta_case(64, 1)
delta_case(1, 8192)


def attention_case(
    batch, heads, kv_heads, queries, keys, dim, *, causal=False, mask=None, decode=False, sets=1, dtype=BF16
):
    """mask: "bool" or "additive", of all keys for all queries alike in decoding."""
    if decode:
        work, unit = 2 * batch * kv_heads * keys * dim * dtype.itemsize, "GB/s"
        name = f"decode GQA {heads}/{kv_heads} D{dim} B{batch} T{keys}"
    else:
        work = 4 * batch * heads * queries * keys * dim / (2 if causal else 1)
        unit = "TFLOP/s"
        name = f"attention B{batch} H{heads}/{kv_heads} S{queries} D{dim}{' causal' * causal}"
    name += (f" {mask} mask" if mask else "") + " float32" * (dtype == torch.float32)

    @case(name, work, unit, sets)
    def _(ops):
        q = randn(batch, heads, queries, dim, dtype=dtype)
        k, v = (randn(batch, kv_heads, keys, dim, dtype=dtype) for _ in range(2))
        out = torch.empty_like(q)
        allowed = None
        if mask:
            allowed = torch.rand((batch, 1, 1, keys) if decode else (queries, keys), device="cuda") < 0.9
            if mask == "additive":
                allowed = torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, -math.inf)
        options = {"causal": causal, "mask": allowed}
        scale = 1 / math.sqrt(dim)

        def theirs():
            F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=causal, enable_gqa=heads != kv_heads)

        def cudnn():
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                theirs()

        def ours():
            ops.scaled_dot_product_attention(q, k, v, scale=scale, out=out, **options)

        def mlx(mx, q, k, v, *mask):
            given = {"scale": scale, "mask": "causal" if causal else mask[0] if mask else None}
            return lambda: mx.fast.scaled_dot_product_attention(q, k, v, **given)

        tensors = (q, k, v) if allowed is None else (q, k, v, allowed)
        return ours, {"torch": theirs, "torch cuDNN": cudnn, **mlx_peer(mlx, *tensors)}


for causal in (False, True):
    attention_case(2, 32, 32, 16384, 16384, 64, causal=causal)
    attention_case(4, 16, 16, 4096, 4096, 128, causal=causal)
    attention_case(1, 16, 16, 16384, 16384, 128, causal=causal)
    attention_case(1, 8, 8, 16384, 16384, 256, causal=causal)
attention_case(4, 16, 16, 4096, 4096, 128, mask="bool")
attention_case(4, 16, 16, 4096, 4096, 128, mask="additive")
attention_case(4, 32, 8, 4096, 4096, 128, causal=True)
for queries in (256, 512, 1024):
    attention_case(1, 32, 8, queries, queries, 128, causal=True, sets=4)
for queries in (128, 512):
    attention_case(32, 12, 12, queries, queries, 64, sets=4)
attention_case(1, 12, 12, 128, 128, 64, sets=16)
attention_case(8, 16, 16, 577, 577, 64, sets=4)
attention_case(1, 32, 8, 1, 8192, 128, decode=True, sets=8)
attention_case(1, 32, 8, 1, 65536, 128, decode=True, sets=2)
attention_case(8, 32, 8, 1, 8192, 128, decode=True, sets=2)
for mask in ("bool", "additive"):
    attention_case(1, 32, 8, 1, 8192, 128, decode=True, sets=8, mask=mask)
    attention_case(8, 32, 8, 1, 8192, 128, decode=True, sets=2, mask=mask)
attention_case(64, 32, 8, 1, 8192, 128, decode=True, sets=1)
attention_case(64, 32, 8, 1, 1024, 128, decode=True, sets=2)
attention_case(32, 32, 8, 1, 8192, 64, decode=True, sets=2)
attention_case(32, 8, 1, 1, 8192, 256, decode=True, sets=2)
for causal in (False, True):
    attention_case(1, 8, 8, 4096, 4096, 512, causal=causal)
    attention_case(1, 16, 16, 4096, 4096, 64, causal=causal, dtype=torch.float32)
    attention_case(1, 16, 16, 4096, 4096, 128, causal=causal, dtype=torch.float32)
attention_case(8, 16, 2, 1, 8192, 512, decode=True, sets=2)
attention_case(1, 32, 8, 1, 8192, 128, decode=True, sets=4, dtype=torch.float32)
attention_case(8, 32, 8, 1, 8192, 128, decode=True, sets=1, dtype=torch.float32)


def time_row(ops, name, work, unit, sets, make, peers):
    """{who: value} of a case, printed too."""
    torch.manual_seed(0)
    made = [make(ops) for _ in range(sets)]
    timed = {"Metalloid": [ours for ours, _ in made]}
    for peer in made[0][1] if peers else ():
        timed[peer] = [theirs[peer] for _, theirs in made]
        if peer == "torch" and "attention" not in name and "decode" not in name:
            torch._dynamo.reset()
            timed["torch.compile"] = [torch.compile(f) for f in timed[peer]]
    values, words = {}, []
    for who, functions in timed.items():
        try:
            torch.cuda.empty_cache()
            t = (seconds_of_mlx if who == "MLX" else seconds)(functions)
        except Exception as error:  # a peer may not serve a case
            if who == "Metalloid":
                raise
            words.append(f"{who}: {type(error).__name__} {str(error).splitlines()[0][:60]}")
            continue
        values[who] = t * 1e6 if unit == "us" else work / t / (1e12 if unit == "TFLOP/s" else 1e9)
        words.append(f"{who} {values[who]:.1f} {unit}" + ("" if unit == "us" else f" ({t * 1e6:.1f} us)"))
    print(f"{name:48s}", "; ".join(words), flush=True)
    return values


def main(ops, chosen, peers=True):
    """chosen: whether a case of this name is wanted. Returns [(case, unit, {who: value})]."""
    global MLX  # noqa: PLW0603 (one a process)
    MLX = find_mlx() if peers else None
    print(torch.cuda.get_device_name(), "PyTorch", torch.__version__)
    if peers and not importlib.util.find_spec("fla"):
        print("flash-linear-attention is not installed: gated_delta_update has no peer")
    if peers and not MLX:
        print("MLX is not installed, or not with CUDA (PyPI: mlx[cuda])")
    rows = []
    for name, work, unit, sets, make in CASES:
        if not chosen(name):
            continue
        rows.append((name, unit, time_row(ops, name, work, unit, sets, make, peers)))
        torch.cuda.empty_cache()
        if MLX:
            MLX.clear_cache()
    return rows
