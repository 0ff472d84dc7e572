"""A language model answers a prompt: every norm, RoPE, attention and SwiGLU by Metalloid, the matrix products by NumPy.

python examples/generate --prompt "Why is the sky blue?"
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter


def parse_arguments() -> argparse.Namespace:
    def whole(least: int):
        def parse(text: str) -> int:
            if not (text.isascii() and text.isdigit()) or int(text) < least:
                raise argparse.ArgumentTypeError(f"must be a whole number, {least} or more, got {text!r}")
            return int(text)

        return parse

    def temperature(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be a finite number, 0 or more, got {text!r}")
        return value

    parser = argparse.ArgumentParser(prog="generate", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, help="a GGUF file of the Llama architecture (default: SmolLM2-135M-Instruct)"
    )
    parser.add_argument("--prompt", default="Explain in three sentences why the sky is blue.")
    parser.add_argument("--max-tokens", type=whole(1), default=128, help="of the answer (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=temperature, default=0.0, help="0 always takes the likeliest token (the default)"
    )
    parser.add_argument("--seed", type=whole(0), default=0, help="of the draws at a temperature above 0")
    parser.add_argument("--threads", type=whole(1), help="for Metalloid and NumPy alike (default: all CPUs)")
    parser.add_argument(
        "--compare", action="store_true", help="give the same answer through plain NumPy operations too"
    )
    return parser.parse_args()


@dataclass
class Run:
    tokens: list[int]
    prompt_tokens: int
    prompt_seconds: float
    seconds: float  # of the answer after its first token
    share: float  # of all time, in Metalloid

    def summary(self) -> str:
        generated = len(self.tokens) - 1
        speed = f"{generated / self.seconds:.1f} tokens/s" if generated and self.seconds else "one token"
        return f"prompt {self.prompt_tokens / self.prompt_seconds:.1f} tokens/s, generation {speed}"


def answer(checkpoint, chat, prompt: list[int], ops, arguments: argparse.Namespace, write) -> Run:
    import numpy as np
    from model import Llama, choose

    limit = min(arguments.max_tokens, checkpoint.config.context - len(prompt))
    model, generator = Llama(checkpoint, ops, len(prompt) + limit), np.random.default_rng(arguments.seed)
    stream = chat.stream()
    start = perf_counter()
    tokens = [choose(model.logits(model.read(prompt))[0], arguments.temperature, generator)]
    first = perf_counter()
    while tokens[-1] not in chat.ends:
        write(stream.step(chat.tokenizer, tokens[-1]) or "")
        if len(tokens) == limit:
            break
        tokens.append(choose(model.logits(model.forward(tokens[-1:]))[0], arguments.temperature, generator))
    end = perf_counter()
    return Run(tokens, len(prompt), first - start, end - first, ops.seconds / (end - start))


def load_with_bar(path: Path):
    from checkpoint import load
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("loading {task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(path.name, total=None)
        return load(path, lambda done, total: progress.update(task, completed=done, total=total))


def run(arguments: argparse.Namespace) -> None:
    import metalloid
    from chat import Chat
    from checkpoint import CheckpointError, default_path
    from operations import Metalloid, PlainNumPy

    if arguments.threads:
        try:
            metalloid.set_num_threads(arguments.threads)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
    checkpoint = load_with_bar(arguments.model or default_path())
    chat = Chat(checkpoint.metadata)
    prompt = chat.encode(arguments.prompt)
    if len(prompt) >= checkpoint.config.context:
        raise CheckpointError(
            f"the prompt has {len(prompt)} tokens, but the context of the model only {checkpoint.config.context}"
        )

    def write(text: str) -> None:
        print(text, end="", flush=True)

    write(f"> {arguments.prompt}\n\n")
    result = answer(checkpoint, chat, prompt, Metalloid(), arguments, write)
    write("\n\n")
    if arguments.compare:
        plain = answer(checkpoint, chat, prompt, PlainNumPy(), arguments, lambda text: None)
        same = "the same answer" if plain.tokens == result.tokens else "another answer"
        print(f"plain NumPy: {plain.summary()}; {same}")
    print(
        f"Metalloid ({metalloid.cpu_isa()}): {result.summary()}, {result.share:.0%} of the time in Metalloid, "
        "the rest mostly in NumPy's matrix products"
    )


def main() -> int:
    arguments = parse_arguments()
    if arguments.threads:  # NumPy's BLAS reads these when it is loaded
        for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[name] = str(arguments.threads)
    from checkpoint import CheckpointError

    try:
        run(arguments)
    except (CheckpointError, MemoryError) as error:
        print(f"generate: {' '.join(str(error).split()) or 'not enough memory'}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of the answer has gone: nothing is left to flush to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
