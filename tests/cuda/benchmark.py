"""usage: python tests/cuda/benchmark.py [--compile] [--only TEXT]

Times every operation on the GPU beside PyTorch, eager and, with --compile, compiled. A case's calls are captured in
a CUDA graph over several sets of inputs, larger together than the second-level cache; the median of its replays counts.
"""

import argparse
import ctypes
import math
import statistics

import torch
import torch.nn.functional as F
from library import CrossEntropyOptions, attention_options, call, context, rope_options, tensor

CODES = {
    torch.float32: (2, 32),
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
    torch.int64: (0, 64),
    torch.int32: (0, 32),
    torch.bool: (6, 8),
}
BF16 = torch.bfloat16


def view(t):
    return tensor(t.data_ptr(), CODES[t.dtype], t.shape, t.stride(), t.device.index)


def run(op, *arguments):
    """A call on PyTorch's current stream."""
    sent = [view(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    call(op, run.contexts[torch.cuda.current_stream().cuda_stream], *sent)


class Contexts(dict):
    def __missing__(self, stream):
        self[stream] = context(stream)
        return self[stream]


run.contexts = Contexts()


def seconds(functions, replays=20):
    """Of one call: `functions` are the same call on different inputs."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for f in functions:
            f()
            f()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for f in functions:
                f()
        graph.replay()
        graph.replay()
        stream.synchronize()
        times = []
        for _ in range(replays):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / len(functions))
    return statistics.median(times)


def randn(*shape, dtype=BF16):
    return torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)


CASES = []


def case(name, work, unit, sets=4):
    """work: bytes or operations of a call; the function makes one set: (ours, {peer: theirs})."""

    def keep(make):
        CASES.append((name, work, unit, sets, make))
        return make

    return keep


def copy_case():
    x = randn(1 << 29)
    y = torch.empty_like(x)
    return (lambda: y.copy_(x)), {}


case("copy of 1 GiB", 2 << 30, "GB/s", 1)(copy_case)


def norm_case(rows, length, layer, added=False):
    def make():
        x, w, b = randn(rows, length), randn(length), randn(length)
        r, s, y = randn(rows, length), torch.empty(rows, length, device="cuda", dtype=BF16), None
        y = torch.empty_like(x)
        if added:
            if layer:
                return lambda: run("add_layer_norm", x, r, w, b, 1e-5, s, y), {}
            return lambda: run("add_rms_norm", x, r, w, 1e-5, s, y), {
                "torch": lambda: F.rms_norm(x + r, (length,), w, 1e-5)
            }
        if layer:
            return lambda: run("layer_norm", x, w, b, 1e-5, y), {
                "torch": lambda: F.layer_norm(x, (length,), w, b, 1e-5)
            }
        return lambda: run("rms_norm", x, w, 1e-5, y), {"torch": lambda: F.rms_norm(x, (length,), w, 1e-5)}

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
    def make():
        x = randn(4, 32, 4096, 128)
        y = torch.empty_like(x)
        options = rope_options(traditional=traditional, base=10000.0)
        angle = torch.arange(4096, device="cuda")[:, None] * 10000.0 ** (-torch.arange(0, 128, 2, device="cuda") / 128)
        cos, sin = (torch.cat((f(angle),) * 2, -1).to(BF16) for f in (torch.cos, torch.sin))
        return lambda: run("rope", x, 128, options, y), {} if traditional else {
            "torch": lambda: torch_rope(x, cos, sin)
        }

    case(f"rope B4 N32 T4096 D128{' traditional' * traditional}", 2 * 4 * 32 * 4096 * 128 * 2, "GB/s", 2)(make)


rope_case(False)
rope_case(True)


@case("qk_norm_rope B4 T4096 N32/8 D128, {B,T,N,D}", 2 * 4 * 40 * 4096 * 128 * 2, "GB/s", 2)
def _():
    q, k, w = randn(4, 4096, 32, 128), randn(4, 4096, 8, 128), randn(128)
    y, z = torch.empty_like(q), torch.empty_like(k)
    options = rope_options(traditional=False, base=1e6, time_axis=1)
    return lambda: run("qk_norm_rope", q, k, w, w, 1e-6, 128, options, y, z), {}


@case("swiglu 16384x14336", 3 * 16384 * 14336 * 2, "GB/s", 1)
def _():
    g, u = randn(16384, 14336), randn(16384, 14336)
    y = torch.empty_like(g)
    return lambda: run("swiglu", g, u, y), {"torch": lambda: F.silu(g) * u}


@case("geglu 16384x14336", 3 * 16384 * 14336 * 2, "GB/s", 1)
def _():
    g, u = randn(16384, 14336), randn(16384, 14336)
    y = torch.empty_like(g)
    return lambda: run("geglu", g, u, 0, y), {"torch": lambda: F.gelu(g) * u}


@case("geglu tanh 16384x14336", 3 * 16384 * 14336 * 2, "GB/s", 1)
def _():
    g, u = randn(16384, 14336), randn(16384, 14336)
    y = torch.empty_like(g)
    return lambda: run("geglu", g, u, 1, y), {"torch": lambda: F.gelu(g, approximate="tanh") * u}


def entropy_case(rows, classes):
    @case(f"cross_entropy {rows}x{classes}", rows * classes * 2, "GB/s", 1)
    def _():
        logits = randn(rows, classes)
        targets = torch.randint(classes, (rows,), device="cuda")
        loss = torch.empty(rows, device="cuda")
        options = CrossEntropyOptions(ctypes.sizeof(CrossEntropyOptions), False, 0)
        return lambda: run("cross_entropy", logits, targets, options, loss), {
            "torch": lambda: F.cross_entropy(logits.float(), targets, reduction="none")
        }


entropy_case(8192, 128256)
entropy_case(8192, 32000)


def delta_case(batch, time, heads=32, dim=128):
    decode = time == 1
    name = f"gated_delta {'decode' if decode else 'prefill'} B{batch} T{time} H{heads} D{dim}"

    @case(name, 2 * batch * heads * dim * dim * 4 if decode else 1, "GB/s" if decode else "us", 2 if decode else 1)
    def _():
        q, k, v = (randn(batch, time, heads, dim) for _ in range(3))
        k = F.normalize(k.float(), dim=-1).to(BF16)
        gamma = torch.rand(batch, time, heads, device="cuda") * 0.1 + 0.9
        beta = torch.rand(batch, time, heads, device="cuda")
        state = randn(batch, heads, dim, dim, dtype=torch.float32)
        out, after = torch.empty_like(v), torch.empty_like(state)
        return lambda: run("gated_delta_update", q, k, v, gamma, beta, state, None, out, after), {}


delta_case(64, 1)
delta_case(1, 8192)


def attention_case(batch, heads, kv_heads, queries, keys, dim, *, causal=False, mask=False, decode=False, sets=1):
    if decode:
        work, unit = 2 * batch * kv_heads * keys * dim * 2, "GB/s"
        name = f"decode GQA {heads}/{kv_heads} D{dim} B{batch} T{keys}"
    else:
        work = 4 * batch * heads * queries * keys * dim / (2 if causal else 1)
        unit = "TFLOP/s"
        name = f"attention B{batch} H{heads}/{kv_heads} S{queries} D{dim}{' causal' * causal}{' bool mask' * mask}"

    @case(name, work, unit, sets)
    def _():
        q = randn(batch, heads, queries, dim)
        k, v = randn(batch, kv_heads, keys, dim), randn(batch, kv_heads, keys, dim)
        out = torch.empty_like(q)
        allowed = None
        if mask:
            allowed = torch.rand(queries, keys, device="cuda") < 0.9
        options = attention_options(causal=causal, mask=None if allowed is None else view(allowed))
        scale = 1 / math.sqrt(dim)

        def theirs():
            F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=causal, enable_gqa=heads != kv_heads)

        return lambda: run("scaled_dot_product_attention", q, k, v, scale, options, out), {"torch": theirs}


for causal in (False, True):
    attention_case(2, 32, 32, 16384, 16384, 64, causal=causal)
    attention_case(4, 16, 16, 4096, 4096, 128, causal=causal)
    attention_case(1, 16, 16, 16384, 16384, 128, causal=causal)
    attention_case(1, 8, 8, 16384, 16384, 256, causal=causal)
attention_case(4, 16, 16, 4096, 4096, 128, mask=True)
attention_case(4, 32, 8, 4096, 4096, 128, causal=True)
attention_case(1, 32, 8, 1, 8192, 128, decode=True, sets=8)
attention_case(1, 32, 8, 1, 65536, 128, decode=True, sets=2)
attention_case(8, 32, 8, 1, 8192, 128, decode=True, sets=2)
attention_case(64, 32, 8, 1, 8192, 128, decode=True, sets=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true", help="time torch.compile too")
    parser.add_argument("--only", default="", help="cases whose name has one of these, separated by commas")
    parser.add_argument("--no-peers", action="store_true")
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), "PyTorch", torch.__version__)
    for name, work, unit, sets, make in CASES:
        if not any(part in name for part in options.only.split(",")):
            continue
        torch.manual_seed(0)
        made = [make() for _ in range(sets)]
        timed = {"ours": [ours for ours, _ in made]}
        if not options.no_peers:
            for peer in made[0][1]:
                timed[peer] = [peers[peer] for _, peers in made]
                if options.compile:
                    timed[peer + " compiled"] = [torch.compile(f) for f in timed[peer]]
        words = []
        for who, functions in timed.items():
            try:
                t = seconds(functions)
            except Exception as error:  # a peer may not serve a case
                words.append(f"{who}: {type(error).__name__} {str(error).splitlines()[0][:90]}")
                continue
            value = t * 1e6 if unit == "us" else work / t / (1e12 if unit == "TFLOP/s" else 1e9)
            words.append(f"{who} {value:.1f} {unit} ({t * 1e6:.1f} us)")
        print(f"{name:48s}", "; ".join(words), flush=True)
        del made, timed
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
