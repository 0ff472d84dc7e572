"""The demo: a real language model, with Metalloid's operations and with plain NumPy ones."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "generate"
sys.path.insert(0, str(EXAMPLE))

import checkpoint as checkpoints  # noqa: E402
from chat import Chat  # noqa: E402
from model import CHUNK, Llama, choose  # noqa: E402
from operations import Metalloid, PlainNumPy  # noqa: E402

PROMPTS = ["Why is the sky blue?", "Write a haiku about 42 whales.", "def fibonacci(n):"]


@pytest.fixture(scope="module")
def checkpoint():
    return checkpoints.load(checkpoints.default_path())


@pytest.fixture(scope="module")
def chat(checkpoint):
    return Chat(checkpoint.metadata)


def greedy(checkpoint, prompt, ops, count):
    model, generator, tokens = Llama(checkpoint, ops, len(prompt) + count), np.random.default_rng(0), list(prompt)
    hidden = model.read(prompt)
    for _ in range(count):
        tokens.append(choose(model.logits(hidden[-1:])[0], 0.0, generator))
        hidden = model.forward(tokens[-1:])
    return tokens[len(prompt) :]


def test_logits_of_64_positions_are_those_of_the_plain_model(checkpoint, chat):
    tokens = chat.tokenizer.encode("The history of the printing press begins long before Gutenberg. " * 8).ids[:64]
    assert len(tokens) == 64
    fast, plain = (Llama(checkpoint, ops, 64) for ops in (Metalloid(), PlainNumPy()))
    difference = np.abs(fast.logits(fast.forward(tokens)) - plain.logits(plain.forward(tokens)))
    assert difference.max() < 1e-3


def plain_logits(path, tokens):
    """The model by its definition, from the file and NumPy alone: no cache, no fused matrix, head after head."""
    reader = checkpoints.Reader(path)
    tensors = {t.name.removesuffix(".weight"): gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    meta = {name.removeprefix("llama."): f.contents() for name, f in reader.fields.items() if name.startswith("llama.")}
    heads, kv_heads = meta["attention.head_count"], meta["attention.head_count_kv"]
    eps, dim = np.float32(meta["attention.layer_norm_rms_epsilon"]), meta["rope.dimension_count"]
    angles = np.outer(np.arange(len(tokens)), meta["rope.freq_base"] ** (-np.arange(0, dim, 2) / dim))
    turn = np.exp(1j * angles).astype(np.complex64)

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * tensors[name]

    def turned(x):  # pairs of neighbours are complex numbers
        return (np.ascontiguousarray(x).view(np.complex64) * turn).view(np.float32)

    x = tensors["token_embd"][tokens]
    for block in range(meta["block_count"]):
        at = f"blk.{block}."
        y = norm(x, at + "attn_norm")
        q, k, v = (y @ tensors[at + name].T for name in ("attn_q", "attn_k", "attn_v"))
        attended = []
        for head in range(heads):
            own = slice(head * dim, (head + 1) * dim)
            shared = slice(head // (heads // kv_heads) * dim, (head // (heads // kv_heads) + 1) * dim)
            scores = turned(q[:, own]) @ turned(k[:, shared]).T * np.float32(dim**-0.5)
            weights = np.tril(np.exp(scores - scores.max(-1, keepdims=True)))
            attended.append(weights / weights.sum(-1, keepdims=True) @ v[:, shared])
        x = x + np.concatenate(attended, axis=-1) @ tensors[at + "attn_output"].T
        y = norm(x, at + "ffn_norm")
        gate, up = (y @ tensors[at + name].T for name in ("ffn_gate", "ffn_up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ tensors[at + "ffn_down"].T
    return norm(x, "output_norm") @ tensors["token_embd"].T


def test_logits_of_64_positions_are_those_of_the_definition(checkpoint, chat):
    tokens = chat.tokenizer.encode("The history of the printing press begins long before Gutenberg. " * 8).ids[:64]
    expected = plain_logits(checkpoints.default_path(), tokens)
    for ops in Metalloid(), PlainNumPy():
        model = Llama(checkpoint, ops, 64)
        assert np.abs(model.logits(model.forward(tokens)) - expected).max() < 1e-3


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_same_32_greedy_tokens(checkpoint, chat, prompt):
    tokens = chat.encode(prompt)
    assert greedy(checkpoint, tokens, Metalloid(), 32) == greedy(checkpoint, tokens, PlainNumPy(), 32)


def test_decoding_with_the_cache_is_the_whole_forward_pass(checkpoint, chat):
    tokens = chat.encode(PROMPTS[0])
    whole, stepwise = Llama(checkpoint, Metalloid(), len(tokens)), Llama(checkpoint, Metalloid(), len(tokens))
    expected = whole.logits(whole.forward(tokens)[-1:])
    stepwise.forward(tokens[:-3])
    for token in tokens[-3:]:
        hidden = stepwise.forward([token])
    assert np.abs(stepwise.logits(hidden) - expected).max() < 1e-3
    with pytest.raises(ValueError, match="cache holds"):
        stepwise.forward([0])


def test_a_prompt_in_chunks_is_the_prompt_in_one_piece(checkpoint, chat, monkeypatch):
    tokens = chat.encode(PROMPTS[0])
    assert 16 < len(tokens) < CHUNK
    whole, parts = Llama(checkpoint, Metalloid(), len(tokens)), Llama(checkpoint, Metalloid(), len(tokens))
    expected = whole.logits(whole.read(tokens))
    monkeypatch.setattr("model.CHUNK", 7)
    assert np.abs(parts.logits(parts.read(tokens)) - expected).max() < 1e-3


@pytest.mark.parametrize(
    "text", ["Hello, world!", "naïve café — 日本語 🦀👩‍👩‍👧", "1234567890", "  spaces\n\nand\ttabs ", "it's we'll I'D"]
)
def test_tokens_give_their_text_back(chat, text):
    ids = chat.tokenizer.encode(text).ids
    assert chat.tokenizer.decode(ids) == text
    stream = chat.stream()
    assert "".join(stream.step(chat.tokenizer, i) or "" for i in ids) == text


def test_digits_are_tokens_of_their_own(chat):
    assert len(chat.tokenizer.encode("2024").ids) == 4


def test_the_template_marks_the_roles(chat):
    ids = chat.encode("Hi")
    text = chat.tokenizer.decode(ids, skip_special_tokens=False)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert (
        ids.count(chat.tokenizer.token_to_id("<|im_start|>")) == 3
    )  # system, user, assistant: none is split into bytes


def test_a_temperature_draws_by_the_seed_and_0_takes_the_likeliest():
    logits = np.array([0.0, 3.0, 1.0], dtype=np.float32)
    assert choose(logits, 0.0, np.random.default_rng(1)) == 1
    draws = [
        [choose(logits, 5.0, generator) for _ in range(50)]
        for generator in (np.random.default_rng(7), np.random.default_rng(7))
    ]
    assert draws[0] == draws[1]
    assert set(draws[0]) == {0, 1, 2}


def run(*arguments):
    return subprocess.run(
        [sys.executable, str(EXAMPLE), *arguments], check=False, capture_output=True, text=True, timeout=240
    )


def one_line_and_exit_code_1(result):
    errors = result.stderr.splitlines()
    assert result.returncode == 1, result.stderr
    assert len(errors) == 1, result.stderr
    assert errors[0].startswith("generate: "), result.stderr
    return errors[0]


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "no such file" in one_line_and_exit_code_1(run("--model", str(tmp_path / "missing.gguf")))
    assert "not a file" in one_line_and_exit_code_1(run("--model", str(tmp_path)))


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(checkpoints.CheckpointError, match="not finite"):
        choose(np.array([0.0, np.nan], np.float32), 0.0, np.random.default_rng(0))


def test_the_tiniest_temperature_is_greedy():
    logits = np.array([0.0, 3.0, -1e30], np.float32)
    assert choose(logits, 5e-324, np.random.default_rng(0)) == 1


@pytest.mark.parametrize("shift", range(4))
def test_tensors_may_start_at_any_byte_of_the_file(tmp_path, shift):
    path = tmp_path / "unaligned.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(1)
    writer.add_string("shift", "x" * shift)
    for name in ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "context_length"):
        writer.add_uint32(f"llama.{name}", {"embedding_length": 4, "context_length": 8}.get(name, 1))
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    shapes = {"token_embd": (2, 4), "output_norm": (4,), "blk.0.attn_norm": (4,), "blk.0.ffn_norm": (4,)}
    shapes |= {f"blk.0.{name}": (4, 4) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {"blk.0.ffn_gate": (1, 4), "blk.0.ffn_up": (1, 4), "blk.0.ffn_down": (4, 1)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = Llama(checkpoints.load(path), Metalloid(), 2)
    assert model.logits(model.forward([0, 1])).shape == (2, 2)


@pytest.mark.parametrize("kept", [0, 3, 4, 8, 23, 24, 100, 5_000, 1_000_000, 3_000_000, 60_000_000, -1])
def test_a_truncated_file_is_refused(tmp_path, kept):
    cut = tmp_path / "cut.gguf"
    with checkpoints.default_path().open("rb") as whole:
        content = whole.read(kept)
    if kept == -1:  # all but the last byte of the last tensor
        content = content[
            : max(t.data_offset + t.n_bytes for t in checkpoints.Reader(checkpoints.default_path()).tensors) - 1
        ]
    cut.write_bytes(content)
    with pytest.raises(checkpoints.CheckpointError, match="not a complete GGUF file"):
        checkpoints.load(cut)
    if kept == 100:
        one_line_and_exit_code_1(run("--model", str(cut)))


@pytest.mark.parametrize("kind", [0, 4, 8, 9])  # arrays of uint8, uint32, string and array
def test_a_count_beyond_the_file_is_refused_at_once(tmp_path, kind):
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, kind, 2**60) + b"\0" * 64)
    with pytest.raises(checkpoints.CheckpointError, match="not a complete GGUF file"):
        checkpoints.load(damaged)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("tokenizer.ggml.tokens", None, "vocabulary is damaged"),
        ("tokenizer.ggml.merges", None, "vocabulary is damaged"),
        ("tokenizer.ggml.merges", ["no-such tokens"], "vocabulary is damaged"),
        ("tokenizer.ggml.token_type", [1], "vocabulary is damaged"),
        ("tokenizer.ggml.eos_token_id", 10**6, "not one of 49152 tokens"),
        ("tokenizer.ggml.pre", "unheard-of", "not supported"),
        ("tokenizer.ggml.model", "llama", "not supported"),
        ("tokenizer.chat_template", "{% for %}", "chat template fails"),
        ("tokenizer.chat_template", "{{ raise_exception('no') }}", "chat template fails: no"),
        ("tokenizer.chat_template", "{{ 1 + messages }}", "chat template fails"),
    ],
)
def test_a_damaged_tokenizer_is_refused(checkpoint, key, value, says):
    with pytest.raises(checkpoints.CheckpointError, match=says):
        Chat({**checkpoint.metadata, key: value}).encode("Hi")


def test_without_a_template_the_prompt_stands_alone(checkpoint):
    metadata = {**checkpoint.metadata, "tokenizer.chat_template": None}
    plain = Chat(metadata)
    assert plain.tokenizer.decode(plain.encode("Hi there")) == "Hi there"
    assert Chat({**metadata, "tokenizer.ggml.add_bos_token": True}).encode("Hi")[0] == 1
    with pytest.raises(checkpoints.CheckpointError, match="empty"):
        plain.encode("")


def test_a_prompt_that_is_not_utf_8_is_refused(chat):
    with pytest.raises(checkpoints.CheckpointError, match="UTF-8"):
        chat.encode("\udcff")


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    noise = tmp_path / "noise.gguf"
    noise.write_bytes(np.random.default_rng(0).bytes(10_000))
    with pytest.raises(checkpoints.CheckpointError, match="not a complete GGUF file"):
        checkpoints.load(noise)


def test_another_architecture_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "bert")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert "must be llama, got bert" in one_line_and_exit_code_1(run("--model", str(tmp_path / "other.gguf")))


def test_a_prompt_longer_than_the_context_is_refused():
    assert "the context of the model only 8192" in one_line_and_exit_code_1(run("--prompt", "word " * 9000))


@pytest.mark.parametrize(
    "arguments",
    [["--max-tokens", "0"], ["--temperature", "-1"], ["--threads", "0"], ["--seed", "x"], ["--temperature", "nan"]],
)
def test_bad_options_are_usage_errors(arguments):
    result = run(*arguments)
    assert result.returncode == 2
    assert arguments[0] in result.stderr
    assert "Traceback" not in result.stderr


def test_the_command_answers_and_tells_speeds_and_share():
    result = run("--prompt", "What is the capital of France?", "--max-tokens", "12", "--compare", "--threads", "2")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("> What is the capital of France?\n\n")
    assert "Paris" in result.stdout
    last = result.stdout.splitlines()[-1]
    assert "prompt" in last
    assert "tokens/s" in last
    assert "% of the time in Metalloid" in last
    assert "the same answer" in result.stdout
