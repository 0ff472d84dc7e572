"""The demo: a real language model, with Metalloid's operations and with plain NumPy ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "generate"
sys.path.insert(0, str(EXAMPLE))

import checkpoint as checkpoints  # noqa: E402
from chat import Chat  # noqa: E402
from model import Llama, choose  # noqa: E402
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
    hidden = model.forward(prompt)
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
    return subprocess.run([sys.executable, str(EXAMPLE), *arguments], capture_output=True, text=True, timeout=240)


def one_line_and_exit_code_1(result):
    errors = [line for line in result.stderr.splitlines() if "loading" not in line and line.strip()]
    assert result.returncode == 1, result.stderr
    assert len(errors) == 1 and errors[0].startswith("generate: "), result.stderr
    return errors[0]


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "no such file" in one_line_and_exit_code_1(run("--model", str(tmp_path / "missing.gguf")))
    assert "not a file" in one_line_and_exit_code_1(run("--model", str(tmp_path)))


@pytest.mark.parametrize("kept", [0, 3, 100, 5_000, 3_000_000, 60_000_000])
def test_a_truncated_file_is_refused(tmp_path, kept):
    cut = tmp_path / "cut.gguf"
    with checkpoints.default_path().open("rb") as whole:
        cut.write_bytes(whole.read(kept))
    with pytest.raises(checkpoints.CheckpointError, match="not a complete GGUF file"):
        checkpoints.load(cut)
    if kept == 100:
        one_line_and_exit_code_1(run("--model", str(cut)))


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    noise = tmp_path / "noise.gguf"
    noise.write_bytes(np.random.default_rng(0).bytes(10_000))
    with pytest.raises(checkpoints.CheckpointError, match="not a complete GGUF file"):
        checkpoints.load(noise)


def test_another_architecture_is_refused(tmp_path):
    import gguf

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
    assert result.returncode == 2 and arguments[0] in result.stderr and "Traceback" not in result.stderr


def test_the_command_answers_and_tells_speeds_and_share():
    result = run("--prompt", "What is the capital of France?", "--max-tokens", "12", "--compare", "--threads", "2")
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    last = result.stdout.splitlines()[-1]
    assert "prompt" in last and "tokens/s" in last and "% of the time in Metalloid" in last
    assert "the same answer" in result.stdout
