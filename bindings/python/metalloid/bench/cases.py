"""What is measured: operations on the shapes of models, the work of each, its ceiling and its targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

ITEM_SIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
SHORT_DTYPE = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f64"}


@dataclass(frozen=True)
class Model:
    name: str
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    dim: int
    vocabulary: int
    gate: str = "swiglu"
    window: int = 0


LLAMA = Model("Llama-3-8B", 4096, 14336, 32, 8, 128, 128256)
QWEN = Model("Qwen3-0.6B", 1024, 3072, 16, 8, 128, 151936)
GEMMA = Model("Gemma-3-270M", 640, 2048, 4, 1, 256, 262144, gate="geglu", window=512)
SMOLLM = Model("SmolLM2-135M", 576, 1536, 9, 3, 64, 49152)
MODELS = (LLAMA, QWEN, GEMMA, SMOLLM)


@dataclass(frozen=True)
class Target:
    """`measure` (see report.measures) must be at least or at most `limit`."""

    measure: str
    limit: float
    at_least: bool = True
    other: str = ""  # the case that the time is compared with


@dataclass(frozen=True)
class Case:
    section: str
    model: str
    op: str
    dtype: str
    parameters: dict[str, int]
    ceiling: str  # "copy", "read", "arithmetic", "bare" (the loop without checks), or "" for none
    work: float  # bytes, or floating-point operations
    cached: bool = True  # the same tensors again and again, else more of them than the cache holds
    targets: tuple[Target, ...] = ()
    quick: bool = False
    also: tuple[str, ...] = field(default=())  # further implementations: "plain"

    @property
    def label(self) -> str:
        """What tells the case from others of its model."""
        p, dtype = self.parameters, SHORT_DTYPE[self.dtype]
        if "length" in p:
            return f"{self.op} {p['rows']}x{p['length']} {dtype}"
        if "classes" in p:
            return f"{self.op} {p['rows']}x{p['classes']} {dtype}"
        if self.op == "gated_delta_update":
            return f"{self.op} B={p['batch']} T={p['time']} {dtype}"
        if self.op != "attention":
            return f"{self.op} T={p['time']} {dtype}"
        extras = ("causal" if p.get("causal") else "", f"window {p['window']}" if p.get("window") else "")
        length = f"T_kv={p['kv_len']}" if p["q_len"] == 1 else f"T={p['q_len']}"
        return " ".join(filter(None, (self.op, length, dtype, *extras, "bool mask" if p.get("mask") else "")))

    @property
    def name(self) -> str:
        """Unique in a suite."""
        p, cached = self.parameters, "" if self.cached else " out of cache"
        heads = f" {p['heads']}/{p['kv_heads']} heads of {p['dim']}" if "kv_heads" in p else ""
        return f"{self.label}{heads}{cached}"

    @property
    def unit(self) -> str:
        compute = self.ceiling == "arithmetic" or (self.op == "gated_delta_update" and self.parameters["time"] > 1)
        return "FLOP" if compute else "B"

    def request(self, cache_bytes: int) -> str:
        copies = 1 if self.cached else max(1, -(-cache_bytes // int(self.work)))
        words = [f"{key}={value}" for key, value in self.parameters.items()]
        return " ".join([self.op, f"dtype={self.dtype}", f"copies={copies}", *words])


# ---- one case of each operation --------------------------------------------------------------------------------------

TENSORS_OF = {"rms_norm": 2, "layer_norm": 2, "swiglu": 3, "geglu": 3, "add_rms_norm": 4, "add_layer_norm": 4}
BARE = ("rms_norm", "add_rms_norm", "layer_norm", "swiglu")


def row_wise(section: str, model: str, op: str, rows: int, length: int, dtype: str = "float32", **how) -> Case:
    work = TENSORS_OF[op] * rows * length * ITEM_SIZE[dtype]
    ceiling = how.pop("ceiling", "" if how.get("cached", True) else "copy")
    return Case(section, model, op, dtype, {"rows": rows, "length": length}, ceiling, work, **how)


def rope(section: str, model: Model, time: int, dtype: str, op: str = "rope", **how) -> Case:
    parameters = {"heads": model.heads, "time": time, "dim": model.dim}
    if op == "qk_norm_rope":
        parameters["kv_heads"] = model.kv_heads
    heads = model.heads + parameters.get("kv_heads", 0)
    work = 2 * heads * time * model.dim * ITEM_SIZE[dtype]
    ceiling = "" if how.get("cached", True) else "copy"
    return Case(section, model.name, op, dtype, parameters, ceiling, work, **how)


def visible_pairs(q_len: int, kv_len: int, causal: int, window: int) -> int:
    """Queries see the last key last: query i sees those up to i + kv_len - q_len, at most `window` of them."""
    if not causal:
        return q_len * kv_len
    most = [i + kv_len - q_len + 1 for i in range(q_len)]
    return sum(min(each, window) for each in most) if window else sum(most)


def attention(section: str, model: Model, q_len: int, kv_len: int, dtype: str, **how) -> Case:
    options = {key: how.pop(key) for key in ("causal", "window", "mask") if key in how}
    parameters = {
        "heads": how.pop("heads", model.heads),
        "kv_heads": how.pop("kv_heads", model.kv_heads),
        "q_len": q_len,
        "kv_len": kv_len,
        "dim": model.dim,
        **options,
    }
    if q_len == 1:
        work = 2 * parameters["kv_heads"] * kv_len * model.dim * ITEM_SIZE[dtype]
        return Case(section, model.name, "attention", dtype, parameters, "read", work, cached=False, **how)
    pairs = visible_pairs(q_len, kv_len, options.get("causal", 0), options.get("window", 0))
    work = 4 * parameters["heads"] * pairs * model.dim
    return Case(section, model.name, "attention", dtype, parameters, "arithmetic", work, **how)


def loss(model: Model, rows: int, dtype: str, **how) -> Case:
    work = rows * model.vocabulary * ITEM_SIZE[dtype]
    parameters = {"rows": rows, "classes": model.vocabulary}
    targets = (Target("of_ceiling", 0.85),)
    return Case(
        "Loss", model.name, "cross_entropy", dtype, parameters, "read", work, cached=False, targets=targets, **how
    )


def gated_delta(batch: int, time: int, dtype: str = "float32", heads: int = 16, dim: int = 128, **how) -> Case:
    parameters = {"batch": batch, "time": time, "k_heads": heads, "v_heads": 2 * heads, "dim": dim}
    state = batch * 2 * heads * dim * dim
    if time == 1:
        how |= {"ceiling": "copy", "work": 2 * state * ITEM_SIZE["float32"], "cached": False}
    else:  # decay, S k, the update and S q: seven operations for an element of the state and step
        how |= {"ceiling": "", "work": 7 * state * time}
    return Case("Gated delta rule", "Qwen3-Next", "gated_delta_update", dtype, parameters, **how)


# ---- the suite -------------------------------------------------------------------------------------------------------

ONE_ROW = "One row (decode), in cache"
IN_CACHE = "In cache"
OUT_OF_CACHE = "Out of cache"
PREFILL = "Attention, prefill"
DECODE = "Attention, decode"


def suite() -> Iterator[Case]:
    """Every case; all are held to the target that no peer is faster (see report.targets)."""
    at_call = (Target("over_bare", 0.3e-6, at_least=False), Target("numpy_over_bare", 2e-6, at_least=False))
    for op in BARE:
        for length in (2048, 4096, 8192):
            quick = length == 4096 and op != "layer_norm"
            yield row_wise(ONE_ROW, "", op, 1, length, ceiling="bare", targets=at_call, quick=quick)
    for model in MODELS:
        yield row_wise(ONE_ROW, model.name, "rms_norm", 1, model.hidden, "bfloat16")
        yield rope(ONE_ROW, model, 1, "float32")
    yield row_wise(ONE_ROW, LLAMA.name, "swiglu", 1, LLAMA.ffn, "bfloat16")
    yield row_wise(ONE_ROW, GEMMA.name, "geglu", 1, GEMMA.ffn)
    yield rope(ONE_ROW, QWEN, 1, "float32", "qk_norm_rope")

    half_again = (Target("vs_peer", 1.5),)
    for model in MODELS:
        for dtype in ("float32", "bfloat16", "float16"):
            how = {"dtype": dtype, "targets": half_again}
            quick = model is QWEN and dtype == "float32"
            yield row_wise(IN_CACHE, model.name, "rms_norm", 128, model.hidden, quick=quick, **how)
            yield row_wise(IN_CACHE, model.name, "add_rms_norm", 128, model.hidden, **how)
            yield row_wise(IN_CACHE, model.name, model.gate, 128, model.ffn, quick=quick, **how)
            yield rope(IN_CACHE, model, 128, quick=quick, **how)
    for dtype in ("float32", "bfloat16", "float16"):
        yield row_wise(IN_CACHE, "", "layer_norm", 128, 1024, dtype, targets=half_again)
        yield row_wise(IN_CACHE, "", "add_layer_norm", 128, 1024, dtype, targets=half_again)
        yield rope(IN_CACHE, QWEN, 128, dtype, "qk_norm_rope", targets=half_again)

    for model in MODELS:
        for dtype in ("float32", "bfloat16", "float16"):
            how = {"dtype": dtype, "targets": (Target("of_ceiling", 0.9),), "cached": False}
            quick = model is LLAMA and dtype == "float32"
            yield row_wise(OUT_OF_CACHE, model.name, "rms_norm", 8192, model.hidden, quick=quick, **how)
            yield row_wise(OUT_OF_CACHE, model.name, "add_rms_norm", 8192, model.hidden, **how)
            yield row_wise(OUT_OF_CACHE, model.name, model.gate, 2048, model.ffn, quick=quick, **how)
            yield rope(OUT_OF_CACHE, model, 8192, quick=quick, **how)
    for dtype in ("float32", "bfloat16", "float16"):
        how = {"dtype": dtype, "targets": (Target("of_ceiling", 0.9),), "cached": False}
        yield row_wise(OUT_OF_CACHE, "", "layer_norm", 8192, 4096, **how)
        yield row_wise(OUT_OF_CACHE, "", "add_layer_norm", 8192, 1024, **how)
        yield rope(OUT_OF_CACHE, QWEN, 8192, op="qk_norm_rope", **how)

    yield from prefill()

    for model in MODELS:
        for length in (1024, 4096, 8192, 32768):
            for dtype in ("float32", "bfloat16", "float16"):
                case = attention(DECODE, model, 1, length, dtype)
                targets = (Target("of_ceiling", 0.85),) if case.work >= 16e6 else ()
                quick = {"float32": (1024, 8192), "bfloat16": (8192,), "float16": ()}[dtype] if model is LLAMA else ()
                yield replace(case, targets=targets, quick=length in quick)
    yield attention(DECODE, LLAMA, 1, 8192, "float64", targets=(Target("of_ceiling", 0.85),))

    for model in MODELS:
        yield loss(model, 64, "float32", quick=model is LLAMA)
        yield loss(model, 64, "bfloat16")
        yield loss(model, 64, "float16")
    yield loss(LLAMA, 1, "float32")

    for batch in (1, 8):
        for dtype in ("float32", "bfloat16"):
            yield gated_delta(
                batch, 1, dtype, targets=(Target("of_ceiling", 0.85),), quick=batch == 1 and dtype == "float32"
            )
    for time in (128, 1024, 4096):
        targets = (Target("vs_plain", 10),)
        yield gated_delta(1, time, also=("plain",), targets=targets, quick=time == 128)


def prefill() -> Iterator[Case]:
    of_fma = Target("of_ceiling", 0.75)
    over_torch = {
        "float32": (of_fma,),
        "bfloat16": (Target("vs_torch", 2),),
        "float16": (Target("vs_torch", 1.5),),
    }
    for dtype in ("float32", "bfloat16", "float16"):
        for length in (128, 512, 1024, 2048):
            full = attention(PREFILL, LLAMA, length, length, dtype, targets=over_torch[dtype])
            yield replace(full, quick=(length == 512 and dtype != "float16") or (length == 128 and dtype == "float32"))
            if length < 1024:
                continue
            no_more = Target("vs_case", 0.6, at_least=False, other=full.name)
            causal = (*over_torch[dtype], no_more)
            yield attention(PREFILL, LLAMA, length, length, dtype, causal=1, targets=causal)
        masked = Target("vs_case", 1.15, False, attention(PREFILL, LLAMA, 1024, 1024, dtype).name)
        yield attention(PREFILL, LLAMA, 1024, 1024, dtype, mask=1, targets=(masked,))
        yield attention(PREFILL, LLAMA, 4096, 4096, dtype, causal=1, targets=over_torch[dtype])
    yield attention(PREFILL, LLAMA, 8192, 8192, "float32", causal=1, targets=(of_fma,))
    for model in (QWEN, GEMMA, SMOLLM):
        for length in (128, 512, 1024, 2048, 4096, 8192):
            for dtype in ("float32", "bfloat16", "float16") if length == 2048 else ("float32", "bfloat16"):
                targets = over_torch[dtype]
                yield attention(PREFILL, model, length, length, dtype, causal=1, targets=targets)
    yield attention(PREFILL, GEMMA, 8192, 8192, "float32", causal=1, window=GEMMA.window, targets=(of_fma,))
    one_group = {"heads": 3, "kv_heads": 1}
    short = attention(PREFILL, SMOLLM, 4096, 4096, "float32", **one_group, targets=(of_fma,))
    yield short
    same_rate = (of_fma, Target("rate_vs_case", 0.9, other=short.name))
    yield attention(PREFILL, SMOLLM, 32768, 32768, "float32", **one_group, targets=same_rate)


def tiny() -> Iterator[Case]:
    """One small case of every operation: the benchmark's own test."""
    model = Model("tiny", 64, 96, 4, 2, 16, 100)
    for op in TENSORS_OF:
        yield row_wise(ONE_ROW, "tiny", op, 1, 64, ceiling="bare" if op in BARE else "")
        yield row_wise(OUT_OF_CACHE, "tiny", op, 256, 64, cached=False, targets=(Target("of_ceiling", 1e-9),))
    yield row_wise(OUT_OF_CACHE, "tiny", "rms_norm", 1 << 14, 128, cached=False)  # moves its own tensors
    yield rope(IN_CACHE, model, 8, "float32")
    yield rope(IN_CACHE, model, 8, "bfloat16", "qk_norm_rope")
    for length in (32, 64):
        full = attention(PREFILL, model, length, length, "float32")
        yield full
        never = Target("vs_case", 1e-9, False, full.name)  # falls short, so that a test sees how that is reported
        yield attention(PREFILL, model, length, length, "float32", causal=1, window=8, mask=1, targets=(never,))
        yield attention(DECODE, model, 1, length, "float16")
    yield loss(model, 4, "float32")
    yield gated_delta(1, 1, heads=1, dim=16)
    yield gated_delta(1, 8, heads=1, dim=16, also=("plain",))
