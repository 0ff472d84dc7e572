"""Metalloid from Python, and the libraries that it is compared with: each operation as their users write it.

A method takes the tensors of a case and returns ways to do it, ``(function, takes_out)``; the worker picks the fastest
that works, so that nobody is judged by an unlucky choice. A missing method: the library has no such operation.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np

EPS = 1e-5
PEERS = ("torch", "torch.compile", "mlx", "onnxruntime")
MOST_SCORES = 1 << 30  # bytes: from there on, a library that may store the scores of attention is left out


def stores_scores(p: dict[str, int], item_size: int = 4) -> bool:
    return p["heads"] * p["q_len"] * p["kv_len"] * item_size >= MOST_SCORES


class TooLarge(Exception):
    def __init__(self):
        super().__init__("left out: the scores might be stored, a GiB of them or more")


# ---- tensors ---------------------------------------------------------------------------------------------------------


def numpy_dtype(name: str) -> np.dtype:
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def tensors(op: str, dtype_name: str, p: dict[str, int]) -> dict[str, np.ndarray]:
    """The operands of a case, outputs among them, as NumPy arrays."""
    dtype = numpy_dtype(dtype_name)
    rng = np.random.default_rng(0)

    def filled(block: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return np.resize(block.astype(dtype), shape)

    def values(*shape: int, scale: float = 1.0) -> np.ndarray:
        return filled(scale * rng.standard_normal(min(int(np.prod(shape)), 65521)), shape)

    def decays(*shape: int) -> np.ndarray:
        return filled(rng.uniform(0.8, 1, min(int(np.prod(shape)), 65521)), shape)

    def out(*shape: int, of: Any = dtype) -> np.ndarray:
        array = np.empty(shape, of)
        array[...] = 0
        return array

    def turns(time: int, dim: int) -> dict[str, np.ndarray]:
        angles = np.arange(time)[:, None] * 10000.0 ** (-np.arange(0, dim, 2) / dim)
        return {"cos": np.cos(angles).astype(dtype), "sin": np.sin(angles).astype(dtype)}

    if "length" in p:
        rows, length = p["rows"], p["length"]
        names = {"swiglu": "gate up", "geglu": "gate up", "add_rms_norm": "x residual", "add_layer_norm": "x residual"}
        found = {name: values(rows, length) for name in names.get(op, "x").split()}
        found |= {"weight": values(length), "bias": values(length), "out": out(rows, length)}
        if op.startswith("add"):
            found["sum"] = out(rows, length)
        return found
    if op == "rope":
        shape = (1, p["heads"], p["time"], p["dim"])
        return {"x": values(*shape), "out": out(*shape)} | turns(p["time"], p["dim"])
    if op == "qk_norm_rope":
        q, k = ((1, p[heads], p["time"], p["dim"]) for heads in ("heads", "kv_heads"))
        found = {"q": values(*q), "k": values(*k), "q_weight": values(p["dim"]), "k_weight": values(p["dim"])}
        return found | {"q_out": out(*q), "k_out": out(*k)} | turns(p["time"], p["dim"])
    if op == "attention":
        q, k = (1, p["heads"], p["q_len"], p["dim"]), (1, p["kv_heads"], p["kv_len"], p["dim"])
        found = {"q": values(*q), "k": values(*k), "v": values(*k), "out": out(*q)}
        if p.get("mask"):
            found["mask"] = rng.random((p["q_len"], p["kv_len"])) > 1 / 8
        return found
    if op == "cross_entropy":
        targets = rng.integers(0, p["classes"], p["rows"])
        return {"logits": values(p["rows"], p["classes"]), "targets": targets, "out": out(p["rows"], of=np.float32)}
    assert op == "gated_delta_update", op
    b, t, k_heads, v_heads, dim = (p[key] for key in ("batch", "time", "k_heads", "v_heads", "dim"))
    found = {name: values(b, t, k_heads, dim, scale=dim**-0.5) for name in ("q", "k")}
    found |= {"v": values(b, t, v_heads, dim), "gamma": decays(b, t, v_heads), "beta": decays(b, t, v_heads)}
    return found | {"out": out(b, t, v_heads, dim), "state": out(b, v_heads, dim, dim, of=np.float32)}


def bits(array: np.ndarray) -> np.ndarray:
    """bfloat16, which other libraries do not know as NumPy's, as integers."""
    return array.view(np.int16) if array.dtype.name == "bfloat16" else array


# ---- Metalloid -------------------------------------------------------------------------------------------------------


class Library:
    """`programs` are what a library made of a case for all its sets of tensors."""

    def __init__(self):
        self.programs: dict[Any, Any] = {}

    def fresh(self) -> None:
        self.programs.clear()

    def array(self, array: np.ndarray) -> Any:
        return array


class Metalloid(Library):
    """The package on NumPy arrays, results written into arrays given with out=."""

    takes_out = True

    def __init__(self, threads: int):
        super().__init__()
        import metalloid

        metalloid.set_num_threads(threads)
        self.library = metalloid
        self.version = metalloid.__version__

    def ways(self, function, *arguments, out, **options):
        if self.takes_out:
            options["out"] = out
        return [(functools.partial(function, *arguments, **options), self.takes_out)]

    def matmul(self, t, p):
        return [(lambda: np.matmul(t.a, t.b, out=t.out), True)]

    def rms_norm(self, t, p):
        return self.ways(self.library.rms_norm, t.x, t.weight, EPS, out=t.out)

    def layer_norm(self, t, p):
        return self.ways(self.library.layer_norm, t.x, t.weight, t.bias, EPS, out=t.out)

    def add_rms_norm(self, t, p):
        return self.ways(self.library.add_rms_norm, t.x, t.residual, t.weight, EPS, out=(t.sum, t.out))

    def add_layer_norm(self, t, p):
        return self.ways(self.library.add_layer_norm, t.x, t.residual, t.weight, t.bias, EPS, out=(t.sum, t.out))

    def swiglu(self, t, p):
        return self.ways(self.library.swiglu, t.gate, t.up, out=t.out)

    def geglu(self, t, p):
        return self.ways(self.library.geglu, t.gate, t.up, approximate="tanh", out=t.out)

    def rope(self, t, p):
        options = {"traditional": False, "base": 10000.0, "scale": 1.0, "offset": 0}
        return self.ways(self.library.rope, t.x, p["dim"], out=t.out, **options)

    def qk_norm_rope(self, t, p):
        function, out = self.library.qk_norm_rope, (t.q_out, t.k_out)
        options = {"traditional": False, "base": 10000.0, "scale": 1.0, "offset": 0}
        return self.ways(function, t.q, t.k, t.q_weight, t.k_weight, EPS, p["dim"], out=out, **options)

    def attention(self, t, p):
        options = {"scale": p["dim"] ** -0.5, "causal": bool(p.get("causal"))}
        options |= {"mask": t.mask} if p.get("mask") else {}
        options |= {"window": p["window"]} if p.get("window") else {}
        return self.ways(self.library.scaled_dot_product_attention, t.q, t.k, t.v, out=t.out, **options)

    def cross_entropy(self, t, p):
        return self.ways(self.library.cross_entropy, t.logits, t.targets, out=t.out)

    def gated_delta_update(self, t, p):
        operands = (t.q, t.k, t.v, t.gamma, t.beta, t.state)
        return self.ways(self.library.gated_delta_update, *operands, out=(t.out, t.state))


class MetalloidAllocating(Metalloid):
    takes_out = False


# ---- PyTorch ---------------------------------------------------------------------------------------------------------


class Torch(Library):
    def __init__(self, threads: int):
        super().__init__()
        import torch

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch, self.F, self.aten = torch, torch.nn.functional, torch.ops.aten
        self.version = torch.__version__

    def array(self, array: np.ndarray) -> Any:
        tensor = self.torch.from_numpy(bits(array))
        return tensor.view(self.torch.bfloat16) if array.dtype.name == "bfloat16" else tensor

    def matmul(self, t, p):
        return [(lambda: self.torch.mm(t.a, t.b, out=t.out), True)]

    # What a model's code computes, in its own words.

    def rms(self, x, weight):
        return self.F.rms_norm(x, x.shape[-1:], weight, EPS)

    def rms_by_hand(self, x, weight):
        x32 = x.float()
        return weight * (x32 * self.torch.rsqrt(x32.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)

    def rotated(self, x, cos, sin):
        x1, x2 = x.chunk(2, -1)
        return self.torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)

    def rms_norm(self, t, p):
        return [(lambda: self.rms(t.x, t.weight), False), (lambda: self.rms_by_hand(t.x, t.weight), False)]

    def layer_norm(self, t, p):
        length = t.x.shape[-1:]
        mean, deviation = (self.torch.empty(*t.x.shape[:-1], 1, dtype=t.x.dtype) for _ in range(2))
        into = {"out0": t.out, "out1": mean, "out2": deviation}
        return [
            (lambda: self.aten.native_layer_norm.out(t.x, length, t.weight, t.bias, EPS, **into), True),
            (lambda: self.F.layer_norm(t.x, length, t.weight, t.bias, EPS), False),
        ]

    def add_rms_norm(self, t, p):
        def step():
            total = t.x + t.residual
            return total, self.rms(total, t.weight)

        return [(step, False)]

    def add_layer_norm(self, t, p):
        def step():
            total = t.x + t.residual
            return total, self.F.layer_norm(total, total.shape[-1:], t.weight, t.bias, EPS)

        return [(step, False)]

    def swiglu(self, t, p):
        def into():
            self.aten.silu.out(t.gate, out=t.out)
            return t.out.mul_(t.up)

        return [(into, True), (lambda: self.F.silu(t.gate) * t.up, False)]

    def geglu(self, t, p):
        def into():
            self.aten.gelu.out(t.gate, approximate="tanh", out=t.out)
            return t.out.mul_(t.up)

        return [(into, True), (lambda: self.F.gelu(t.gate, approximate="tanh") * t.up, False)]

    def rope(self, t, p):
        return [(lambda: self.rotated(t.x, t.cos, t.sin), False)]

    def qk_norm_rope(self, t, p):
        def step():
            q, k = self.rms(t.q, t.q_weight), self.rms(t.k, t.k_weight)
            return self.rotated(q, t.cos, t.sin), self.rotated(k, t.cos, t.sin)

        return [(step, False)]

    def attention(self, t, p):
        attend = self.F.scaled_dot_product_attention
        options: dict[str, Any] = {"scale": p["dim"] ** -0.5}
        if p.get("window") or (p.get("causal") and p["q_len"] != p["kv_len"]) or p.get("mask"):
            last = self.torch.arange(p["q_len"])[:, None] + p["kv_len"] - p["q_len"]
            key = self.torch.arange(p["kv_len"])[None]
            mask = t.mask if p.get("mask") else self.torch.ones(1, 1, dtype=self.torch.bool)
            if p.get("causal"):
                mask = mask & (key <= last)
            if p.get("window"):
                mask = mask & (key > last - p["window"])
            options["attn_mask"] = mask
        elif p.get("causal"):
            options["is_causal"] = True
        ways = [(lambda: attend(t.q, t.k, t.v, enable_gqa=True, **options), False)]
        group = p["heads"] // p["kv_heads"]
        if group > 1:  # views of the same keys, as code that predates enable_gqa has them, without a copy
            k, v = (x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for x in (t.k, t.v))
            if p["q_len"] > 1:
                ways.append((lambda: attend(t.q, k, v, **options), False))
        if p["q_len"] == 1 and not options.get("attn_mask"):  # the heads of a group as queries of one head
            q = t.q.view(1, p["kv_heads"], group, p["dim"])
            ways.append((lambda: attend(q, t.k, t.v, scale=options["scale"]).view_as(t.q), False))
        return ways

    def cross_entropy(self, t, p):
        loss = self.F.cross_entropy
        return [
            (lambda: loss(t.logits, t.targets, reduction="none"), False),
            (lambda: loss(t.logits.float(), t.targets, reduction="none"), False),
        ]

    def gated_delta_update(self, t, p):
        group = p["v_heads"] // p["k_heads"]

        def operands():
            """Heads before time, in float32, as the model's own code begins."""
            q, k = (x.repeat_interleave(group, 2).transpose(1, 2).float() for x in (t.q, t.k))
            return q, k, *(x.transpose(1, 2).float() for x in (t.v, t.gamma, t.beta))

        def recurrent():
            q, k, v, gamma, beta = operands()
            state, out = t.state, []
            for i in range(p["time"]):
                state = state * gamma[:, :, i, None, None]
                error = (v[:, :, i] - (state @ k[:, :, i, :, None])[..., 0]) * beta[:, :, i, None]
                state = state + error[..., None] * k[:, :, i, None, :]
                out.append((state @ q[:, :, i, :, None])[..., 0])
            return self.torch.stack(out, 1).to(t.v.dtype), state

        def chunked(chunk: int = 64):
            """The rule in chunks, as matrix products (Yang et al. 2024, section 3.3)."""
            q, k, v, gamma, beta = (x.unflatten(2, (-1, chunk)) for x in operands())
            decay = gamma.log().cumsum(-1)
            between = (decay[..., :, None] - decay[..., None, :]).exp().tril()  # from step j to step i of a chunk
            overlaps = self.torch.tril(k @ k.mT * between * beta[..., None], -1)
            unit = self.torch.eye(chunk)
            inverse = self.torch.linalg.solve_triangular(unit + overlaps, unit.expand_as(overlaps), upper=False)
            values = inverse @ (v * beta[..., None])
            keys = inverse @ (k * (beta * decay.exp())[..., None])
            scores = q @ k.mT * between
            state, out = t.state.mT, []
            for i in range(q.shape[2]):
                fresh = values[:, :, i] - keys[:, :, i] @ state
                out.append(q[:, :, i] * decay[:, :, i, :, None].exp() @ state + scores[:, :, i] @ fresh)
                last = decay[:, :, i, -1, None]
                to_end = (last - decay[:, :, i]).exp()[..., None]
                state = state * last[..., None].exp() + (k[:, :, i] * to_end).mT @ fresh
            return self.torch.cat(out, 2).transpose(1, 2).to(t.v.dtype), state.mT

        return [(chunked, False)] if p["time"] % 64 == 0 else [(recurrent, False)]


class TorchCompile(Torch):
    """Operations that torch.compile can fuse, each for its shape, the results written into given tensors."""

    def compiled(self, function, inputs, outputs):
        def into(inputs, outputs):
            results = function(*inputs)
            for out, result in zip(outputs, results if isinstance(results, tuple) else (results,), strict=True):
                out.copy_(result)

        if not self.programs:
            self.torch._dynamo.reset()
            self.programs["it"] = self.torch.compile(into, fullgraph=True, dynamic=False)
        compiled = self.programs["it"]
        return [(lambda: compiled(inputs, outputs), True)]

    def rms_norm(self, t, p):
        return self.compiled(self.rms, (t.x, t.weight), (t.out,))

    def layer_norm(self, t, p):
        def norm(x, weight, bias):
            return self.F.layer_norm(x, x.shape[-1:], weight, bias, EPS)

        return self.compiled(norm, (t.x, t.weight, t.bias), (t.out,))

    def add_rms_norm(self, t, p):
        def step(x, residual, weight):
            total = x + residual
            return total, self.rms(total, weight)

        return self.compiled(step, (t.x, t.residual, t.weight), (t.sum, t.out))

    def add_layer_norm(self, t, p):
        def step(x, residual, weight, bias):
            total = x + residual
            return total, self.F.layer_norm(total, total.shape[-1:], weight, bias, EPS)

        return self.compiled(step, (t.x, t.residual, t.weight, t.bias), (t.sum, t.out))

    def swiglu(self, t, p):
        return self.compiled(lambda gate, up: self.F.silu(gate) * up, (t.gate, t.up), (t.out,))

    def geglu(self, t, p):
        return self.compiled(lambda g, up: self.F.gelu(g, approximate="tanh") * up, (t.gate, t.up), (t.out,))

    def rope(self, t, p):
        return self.compiled(self.rotated, (t.x, t.cos, t.sin), (t.out,))

    def qk_norm_rope(self, t, p):
        def step(q, k, q_weight, k_weight, cos, sin):
            q, k = self.rms(q, q_weight), self.rms(k, k_weight)
            return self.rotated(q, cos, sin), self.rotated(k, cos, sin)

        return self.compiled(step, (t.q, t.k, t.q_weight, t.k_weight, t.cos, t.sin), (t.q_out, t.k_out))

    def cross_entropy(self, t, p):
        def loss(logits, targets):
            return self.F.cross_entropy(logits.float(), targets, reduction="none")

        return self.compiled(loss, (t.logits, t.targets), (t.out,))

    attention = gated_delta_update = matmul = (
        None  # the same kernels as without compilation, or a graph of thousands of steps
    )


# ---- MLX -------------------------------------------------------------------------------------------------------------


class Mlx(Library):
    def __init__(self, threads: int):
        super().__init__()
        from importlib.metadata import version

        import mlx.core as mx

        mx.set_default_device(mx.cpu)
        self.mx, self.fast, self.version = mx, mx.fast, version("mlx")

    def array(self, array: np.ndarray) -> Any:
        made = self.mx.array(bits(array))
        made = made.view(self.mx.bfloat16) if array.dtype.name == "bfloat16" else made
        self.mx.eval(made)
        return made

    def ways(self, *functions):
        return [(lambda function=function: self.mx.eval(function()), False) for function in functions]

    def rms_norm(self, t, p):
        return self.ways(lambda: self.fast.rms_norm(t.x, t.weight, EPS))

    def layer_norm(self, t, p):
        return self.ways(lambda: self.fast.layer_norm(t.x, t.weight, t.bias, EPS))

    def add_rms_norm(self, t, p):
        def step():
            total = t.x + t.residual
            return total, self.fast.rms_norm(total, t.weight, EPS)

        return self.ways(step)

    def add_layer_norm(self, t, p):
        def step():
            total = t.x + t.residual
            return total, self.fast.layer_norm(total, t.weight, t.bias, EPS)

        return self.ways(step)

    def swiglu(self, t, p):
        def gated(gate, up):
            return gate * self.mx.sigmoid(gate) * up

        compiled = self.mx.compile(gated)
        return self.ways(lambda: gated(t.gate, t.up), lambda: compiled(t.gate, t.up))

    def geglu(self, t, p):
        def gated(gate, up):
            inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
            return 0.5 * gate * (1 + self.mx.tanh(inner)) * up

        compiled = self.mx.compile(gated)
        return self.ways(lambda: gated(t.gate, t.up), lambda: compiled(t.gate, t.up))

    def rotated(self, x, p):
        return self.fast.rope(x, p["dim"], traditional=False, base=10000.0, scale=1.0, offset=0)

    def rope(self, t, p):
        return self.ways(lambda: self.rotated(t.x, p))

    def qk_norm_rope(self, t, p):
        def step():
            q, k = self.fast.rms_norm(t.q, t.q_weight, EPS), self.fast.rms_norm(t.k, t.k_weight, EPS)
            return self.rotated(q, p), self.rotated(k, p)

        return self.ways(step)

    def attention(self, t, p):
        if stores_scores(p):
            raise TooLarge
        mask = t.mask if p.get("mask") else "causal" if p.get("causal") else None
        if p.get("window") or (p.get("mask") and p.get("causal")):
            last = self.mx.arange(p["q_len"])[:, None] + p["kv_len"] - p["q_len"]
            key = self.mx.arange(p["kv_len"])[None]
            mask = (key <= last) & (key > last - p.get("window", p["kv_len"]))
            mask = mask & t.mask if p.get("mask") else mask
        attend = functools.partial(self.fast.scaled_dot_product_attention, scale=p["dim"] ** -0.5, mask=mask)
        return self.ways(lambda: attend(t.q, t.k, t.v))

    def cross_entropy(self, t, p):
        return self.ways(lambda: self.fast.cross_entropy(t.logits, t.targets))

    def gated_delta_update(self, t, p):
        if p["time"] > 1024:
            raise NotImplementedError("left out: a graph of thousands of steps")
        update = self.fast.gated_delta_update
        return self.ways(lambda: update(t.q, t.k, t.v, t.gamma, t.beta, t.state))


# ---- onnxruntime -----------------------------------------------------------------------------------------------------


class OnnxRuntime(Library):
    """Models of one operation, their inputs and outputs bound to NumPy's memory."""

    def __init__(self, threads: int):
        super().__init__()
        import onnx
        import onnxruntime

        onnxruntime.set_default_logger_severity(4)
        self.ort, self.onnx, self.version, self.threads = onnxruntime, onnx, onnxruntime.__version__, threads

    def model(self, nodes: list, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]):
        """`nodes` are (operator, inputs, outputs, attributes); a domain stands before the operator."""
        helper, mapping = self.onnx.helper, self.onnx.TensorProto

        def kind(array: np.ndarray) -> int:
            return getattr(
                mapping, {"float32": "FLOAT", "float64": "DOUBLE"}.get(name := array.dtype.name, name.upper())
            )

        def described(tensors):
            return [helper.make_tensor_value_info(name, kind(x), x.shape) for name, x in tensors.items()]

        if (key := repr(nodes)) not in self.programs:
            self.programs[key] = self.session(nodes, described(inputs), described(outputs))
        session = self.programs[key]
        binding = session.io_binding()
        for tensors, bind in ((inputs, binding.bind_input), (outputs, binding.bind_output)):
            for name, x in tensors.items():
                bind(name, "cpu", 0, kind(x), x.shape, x.ctypes.data)

        def run(_memory=(inputs, outputs)):  # which the binding does not keep
            session.run_with_iobinding(binding)

        return run, True

    def session(self, nodes: list, inputs: list, outputs: list):
        helper, made = self.onnx.helper, []
        for operator, given, results, attributes in nodes:
            domain, _, operator = operator.rpartition(".")
            made.append(helper.make_node(operator, given, results, domain=domain, **attributes))
        graph = helper.make_graph(made, "case", inputs, outputs)
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = self.ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        return self.ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def ways(self, *models):
        """The models that onnxruntime accepts; what it says where it accepts none."""
        accepted, refusal = [], None
        for nodes, inputs, outputs in models:
            try:
                accepted.append(self.model(nodes, inputs, outputs))
            except Exception as error:
                refusal = error
        if not accepted and refusal:
            raise refusal
        return accepted

    def rms_norm(self, t, p):
        inputs, outputs, eps = {"x": t.x, "weight": t.weight}, {"out": t.out}, {"epsilon": EPS}
        return self.ways(
            *(
                ([(operator, ["x", "weight"], ["out"], {"axis": -1, **eps})], inputs, outputs)
                for operator in ("RMSNormalization", "SimplifiedLayerNormalization")
            )
        )

    def layer_norm(self, t, p):
        nodes = [("LayerNormalization", ["x", "weight", "bias"], ["out"], {"axis": -1, "epsilon": EPS})]
        return self.ways((nodes, {"x": t.x, "weight": t.weight, "bias": t.bias}, {"out": t.out}))

    def add_norm(self, operator, t, names):
        node = (f"com.microsoft.{operator}", ["x", "residual", *names], ["out", "", "", "sum"], {"epsilon": EPS})
        inputs = {name: getattr(t, name) for name in ("x", "residual", *names)}
        # These take a batch of sequences.
        inputs |= {name: inputs[name][None] for name in ("x", "residual")}
        return self.ways(([node], inputs, {"out": t.out[None], "sum": t.sum[None]}))

    def add_rms_norm(self, t, p):
        return self.add_norm("SkipSimplifiedLayerNormalization", t, ("weight",))

    def add_layer_norm(self, t, p):
        return self.add_norm("SkipLayerNormalization", t, ("weight", "bias"))

    def swiglu(self, t, p):
        nodes = [
            ("Sigmoid", ["gate"], ["s"], {}),
            ("Mul", ["gate", "s"], ["silu"], {}),
            ("Mul", ["silu", "up"], ["out"], {}),
        ]
        return self.ways((nodes, {"gate": t.gate, "up": t.up}, {"out": t.out}))

    def geglu(self, t, p):
        nodes = [("Gelu", ["gate"], ["g"], {"approximate": "tanh"}), ("Mul", ["g", "up"], ["out"], {})]
        return self.ways((nodes, {"gate": t.gate, "up": t.up}, {"out": t.out}))

    def rope(self, t, p):
        inputs = {"x": t.x, "cos": t.cos[None], "sin": t.sin[None]}
        return self.ways(([("RotaryEmbedding", ["x", "cos", "sin"], ["out"], {})], inputs, {"out": t.out}))

    def qk_norm_rope(self, t, p):
        nodes = []
        for x in ("q", "k"):
            nodes.append(
                ("SimplifiedLayerNormalization", [x, f"{x}_weight"], [f"{x}_norm"], {"axis": -1, "epsilon": EPS})
            )
            nodes.append(("RotaryEmbedding", [f"{x}_norm", "cos", "sin"], [f"{x}_out"], {}))
        inputs = {"q": t.q, "k": t.k, "q_weight": t.q_weight, "k_weight": t.k_weight}
        inputs |= {"cos": t.cos[None], "sin": t.sin[None]}
        return self.ways((nodes, inputs, {"q_out": t.q_out, "k_out": t.k_out}))

    def attention(self, t, p):
        if stores_scores(p):
            raise TooLarge
        if p.get("window"):
            raise NotImplementedError("no window")
        inputs, outputs = {"q": t.q, "k": t.k, "v": t.v}, {"out": t.out}
        attributes = {"scale": p["dim"] ** -0.5, "is_causal": p.get("causal", 0)}
        names = ["q", "k", "v"]
        if p.get("mask"):
            inputs["mask"] = t.mask
            names.append("mask")
        return self.ways(([("Attention", names, ["out"], attributes)], inputs, outputs))

    def cross_entropy(self, t, p):
        nodes = [
            ("LogSoftmax", ["logits"], ["log"], {"axis": -1}),
            ("GatherElements", ["log", "column"], ["picked"], {"axis": 1}),
            ("Neg", ["picked"], ["out"], {}),
        ]
        inputs = {"logits": t.logits, "column": t.targets[:, None]}
        return self.ways((nodes, inputs, {"out": t.out[:, None]}))


LIBRARIES = {
    "metalloid": Metalloid,
    "metalloid.new": MetalloidAllocating,
    "torch": Torch,
    "torch.compile": TorchCompile,
    "mlx": Mlx,
    "onnxruntime": OnnxRuntime,
}


def operands(library: Any, op: str, dtype: str, p: dict[str, int]) -> SimpleNamespace:
    if op == "matmul":
        square = np.random.default_rng(0).standard_normal((p["size"], p["size"])).astype(numpy_dtype(dtype))
        arrays = {"a": square, "b": square.copy(), "out": np.zeros_like(square)}
    else:
        arrays = tensors(op, dtype, p)
    return SimpleNamespace(**{name: library.array(array) for name, array in arrays.items()})
