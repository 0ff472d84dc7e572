"""The Llama forward pass (Touvron et al. 2023, arXiv:2302.13971). Matrix products are NumPy's, the rest is `ops`."""

from __future__ import annotations

import numpy as np
from checkpoint import Checkpoint, CheckpointError

# A prompt passes the layers this many tokens at a time: that bounds the activations and plain NumPy's attention scores.
CHUNK = 512


class Llama:
    """A model and the keys and values of the tokens that it has seen, at most `length` of them."""

    def __init__(self, checkpoint: Checkpoint, ops, length: int):
        config = checkpoint.config
        self.checkpoint, self.config, self.ops = checkpoint, config, ops
        self.length, self.seen = length, 0
        self.keys = np.empty((config.layers, 1, config.kv_heads, length, config.head_dim), dtype=np.float32)
        self.values = np.empty_like(self.keys)

    def forward(self, tokens: list[int]) -> np.ndarray:
        """The hidden state {time, hidden} after the last norm, for a few tokens that follow those seen before."""
        if self.seen + len(tokens) > self.length:
            raise ValueError(f"the cache holds {self.length} tokens, got {self.seen + len(tokens)}")
        config, ops = self.config, self.ops
        x = self.checkpoint.embedding[tokens]
        start, end = self.seen, self.seen + len(tokens)
        for layer, keys, values in zip(self.checkpoint.layers, self.keys, self.values, strict=True):
            qkv = ops.rms_norm(x, layer.attention_norm, config.eps) @ layer.qkv
            heads = qkv.reshape(1, len(tokens), -1, config.head_dim).swapaxes(
                1, 2
            )  # {1, heads, time, head_dim}, a view
            q, k, v = np.split(heads, [config.heads, config.heads + config.kv_heads], axis=1)
            rope = config.rope_dims, config.rope_base, self.checkpoint.rope_freqs, start
            keys[:, :, start:end] = ops.rope(k, *rope)
            values[:, :, start:end] = v
            attended = ops.attention(ops.rope(q, *rope), keys[:, :, :end], values[:, :, :end], config.head_dim**-0.5)
            x = x + attended.swapaxes(1, 2).reshape(len(tokens), -1) @ layer.attention_output
            gate_up = ops.rms_norm(x, layer.mlp_norm, config.eps) @ layer.gate_up
            gate, up = np.split(gate_up, 2, axis=-1)
            x = x + ops.swiglu(gate, up) @ layer.down
        self.seen = end
        return ops.rms_norm(x, self.checkpoint.norm, config.eps)

    def read(self, prompt: list[int]) -> np.ndarray:
        """The last token's hidden state {1, hidden} of a prompt of any length."""
        for start in range(0, len(prompt), CHUNK):
            hidden = self.forward(prompt[start : start + CHUNK])
        return hidden[-1:]

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        return hidden @ self.checkpoint.output


def choose(logits: np.ndarray, temperature: float, generator: np.random.Generator) -> int:
    """The likeliest token at temperature 0, else one drawn from softmax(logits / temperature)."""
    if not np.isfinite(logits).all():
        raise CheckpointError("the model gives logits that are not finite: its weights are damaged")
    if temperature == 0:
        return int(np.argmax(logits))
    with np.errstate(over="ignore"):  # a tiny temperature: -inf, whose weight is 0
        scaled = (logits.astype(np.float64) - logits.max()) / temperature
    weights = np.exp(scaled)
    return int(generator.choice(len(weights), p=weights / weights.sum()))
