"""usage: python tests/cuda/benchmark.py [--only TEXT] [--no-peers]

The benchmark of metalloid.bench.gpu with the C library by ctypes, for machines without the Python package.
"""

import argparse
import ctypes
import sys

import torch
from library import ROOT, CrossEntropyOptions, attention_options, call, context, rope_options, tensor

sys.path.insert(0, str(ROOT / "bindings/python/metalloid/bench"))
import gpu
from gpu import seconds

__all__ = ["run", "seconds", "view"]

CODES = {
    torch.float32: (2, 32),
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
    torch.int64: (0, 64),
    torch.int32: (0, 32),
    torch.int8: (0, 8),
    torch.bool: (6, 8),
}


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


class Operations:
    """The Python package's functions, as far as the benchmark calls them."""

    def __getattr__(self, op):
        def called(*arguments, out, **options):
            outs = out if isinstance(out, tuple) else (out,)
            run(op, *arguments, *self.options_of(op, options), *outs)

        return called

    def options_of(self, op, options):
        if op in ("rope", "qk_norm_rope"):
            return [rope_options(**options)]
        if op == "geglu":
            return [int(options.get("approximate") == "tanh")]
        if op == "cross_entropy":
            return [CrossEntropyOptions(ctypes.sizeof(CrossEntropyOptions), False, 0)]
        if op == "gated_delta_update":
            return [None]  # no mask
        if op == "scaled_dot_product_attention":
            mask = options["mask"]
            return [
                options["scale"],
                attention_options(causal=options["causal"], mask=mask if mask is None else view(mask)),
            ]
        return []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name has one of these, separated by commas")
    parser.add_argument("--no-peers", action="store_true")
    options = parser.parse_args()
    only = options.only.split(",")
    gpu.main(Operations(), lambda name: any(word in name for word in only), not options.no_peers)
