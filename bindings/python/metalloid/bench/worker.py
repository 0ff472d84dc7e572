"""One library in a process of its own: ``python -m metalloid.bench.worker LIBRARY THREADS``; see cli/bench.c."""

from __future__ import annotations

import gc
import itertools
import json
import os
import sys
from collections.abc import Callable
from time import perf_counter

from metalloid.bench import peers

LONG_CALL = 0.3  # seconds: such a call is not repeated to warm up


class Worker:
    def __init__(self, name: str, threads: int):
        self.library = peers.LIBRARIES[name](threads)
        self.calls: list[Callable] = []
        self.next = 0

    def info(self) -> dict:
        return {"version": self.library.version}

    def open(self, op: str, *words: str) -> dict:
        self.close()
        given = dict(word.split("=", 1) for word in words)
        dtype, copies = given.pop("dtype"), int(given.pop("copies", "1"))
        parameters = {key: int(value) for key, value in given.items()}
        method = getattr(self.library, op, None)
        if method is None:
            return {"error": "no such operation"}
        self.library.fresh()
        sets = (peers.operands(self.library, op, dtype, parameters) for _ in range(copies))
        ways = method(next(sets), parameters)
        which, takes_out, seconds = self.fastest(ways)
        self.calls = [ways[which][0], *(method(operands, parameters)[which][0] for operands in sets)]
        for call in self.calls[1:]:
            seconds = self.seconds_of(call)
        return {"takes_out": takes_out, "seconds": seconds}

    def fastest(self, ways: list[tuple[Callable, bool]]) -> tuple[int, bool, float]:
        """The index of the way to go on with, whether it is given its output, its time. Those that raise are out."""
        best, refusal = None, None
        for i, (call, takes_out) in enumerate(ways):
            try:
                seconds = self.seconds_of(call)  # with what is done once, such as compilation
                if seconds < LONG_CALL or hasattr(self.library, "compiled"):
                    seconds = min(self.seconds_of(call) for _ in range(3))
            except Exception as error:
                refusal = error
                continue
            if best is None or seconds < best[2]:
                best = i, takes_out, seconds
        if best is None:
            raise refusal or NotImplementedError("no such operation")
        return best

    @staticmethod
    def seconds_of(call: Callable) -> float:
        begin = perf_counter()
        call()
        return perf_counter() - begin

    def time(self, count: str) -> dict:
        if not self.calls:
            return {"error": "time: no open case"}
        order = itertools.cycle(self.calls[self.next :] + self.calls[: self.next])
        if int(count) > 1:
            next(order)()
        turns = list(itertools.islice(order, min(int(count), 1 << 16)))
        done = 0
        begin = perf_counter()
        while done < int(count):
            for call in turns[: int(count) - done]:
                call()
            done += len(turns)
        seconds = perf_counter() - begin
        self.next = (self.next + int(count)) % len(self.calls)
        return {"seconds": seconds / int(count)}

    def close(self) -> dict:
        self.calls, self.next = [], 0
        gc.collect()
        return {}


def serve(name: str, threads: int) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is not an answer
    try:
        worker = Worker(name, threads)
    except ImportError as error:
        print(json.dumps({"error": f"not installed ({error})"}), file=answers, flush=True)
        return
    gc.disable()
    for line in sys.stdin:
        request, *words = line.split()
        try:
            answer = getattr(worker, request)(*words)
        except Exception as error:
            text = str(error).strip() or type(error).__name__
            answer = {"error": " ".join(text.split())[:200]}
            worker.close()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
