"""The driver of ``metalloid bench``: processes, rounds, progress."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import select
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from metalloid.bench import cases, report
from metalloid.bench.cases import Case
from metalloid.bench.peers import PEERS

ROUND = 0.02  # seconds that one implementation gets in a round, at least one call
PAUSE = 0.005  # between two implementations
SETTLING = 0.5  # seconds that one's threads may go on spinning after its calls, before the next gets its turn
SLOW = 20  # times Metalloid's time: such a peer is measured once
LONG_CALL = 0.05  # seconds: above it a call from Python takes what one from C takes, and is not measured again
OWN = ("ceiling", "bare", "plain", "C", "metalloid", "metalloid.new")
SMALL = 16e6  # bytes: a case below it is held to the ceiling of large buffers
PATIENCE = 180  # seconds until a process that does not answer is given up


class Failure(Exception):
    """Ends the program with one line."""


# ---- processes -------------------------------------------------------------------------------------------------------


class Process:
    """An implementation in a process of its own; see cli/bench.c for what it is asked."""

    def __init__(self, command: list[str], threads: int):
        self.command = command
        limits = ("METALLOID_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        self.environment = os.environ | dict.fromkeys(limits, str(threads))
        self.start()

    def start(self) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(self.command, env=self.environment, text=True, bufsize=1, **pipes)
        self.opened = ""

    def ask(self, request: str) -> dict:
        try:
            with suppress(BrokenPipeError):  # one that ended may have said why
                self.process.stdin.write(request + "\n")
                self.process.stdin.flush()
            if select.select([self.process.stdout], [], [], PATIENCE)[0]:
                return json.loads(self.process.stdout.readline())
            problem = f"no answer in {PATIENCE} s"
        except (OSError, ValueError):
            problem = "its process ended"
        self.stop()
        self.start()
        return {"error": problem}

    def open(self, request: str) -> dict:
        if request == self.opened:
            return {}
        answer = self.ask(f"open {request}")
        self.opened = "" if "error" in answer else request
        return answer

    def time(self, calls: int) -> float:
        answer = self.ask(f"time {calls}")
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["seconds"]

    def traffic(self, calls: int, how: str) -> tuple[float, float]:
        """Seconds and bytes of moving the open case's own tensors."""
        answer = self.ask(f"traffic {calls} {how}")
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["seconds"], answer["bytes"]

    def settle(self) -> None:
        """Waits until its threads sleep: onnxruntime's spin for a while in case another call comes."""
        end, before = monotonic() + SETTLING, None
        while monotonic() < end:
            used = self.processor_time()
            if used is None or used == before:
                break
            before = used
            sleep(PAUSE)

    def processor_time(self) -> int | None:
        """Of all its threads, in ns; None where the system does not tell."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")
        try:
            return sum(int(task.read_text().split()[0]) for task in tasks)
        except (OSError, ValueError, IndexError):
            return None

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


class Processes:
    """The C command and the libraries, started when first needed."""

    def __init__(self, command: str, threads: int, peers: tuple[str, ...]):
        self.command, self.threads = command, threads
        self.running: dict[str, Process] = {}
        self.versions: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        started = {name: self[name] for name in peers}  # all of them before the first is asked: imports take a while
        for name, process in started.items():
            answer = process.ask("info")
            if "version" in answer:
                self.versions[name] = answer["version"]
            else:
                self.left_out[name] = answer["error"]
                self.running.pop(name).stop()

    def __getitem__(self, name: str) -> Process:
        if name not in self.running:
            if name in OWN[:4]:
                command = [self.command, "bench", "--worker"]
            else:
                command = [sys.executable, "-m", "metalloid.bench.worker", name, str(self.threads)]
            self.running[name] = Process(command, self.threads)
        return self.running[name]

    def stop(self) -> None:
        for process in self.running.values():
            process.stop()


# ---- the machine -----------------------------------------------------------------------------------------------------


def cache_size() -> int:
    """Of the last level, in bytes; 32 MiB where the system does not say."""
    sizes = [32 << 20]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1:], 0))
    return max(sizes)


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


class Ceilings:
    """What the machine can do, as requests to the C worker; of the copies, the one that is fastest at the start."""

    def __init__(self, processes: Processes, cache_bytes: int, rounds: int):
        process, size = processes["ceiling"], max(2 * cache_bytes, 256 << 20)
        self.requests = {"read": (f"read bytes={size}", size)}
        copies = [(f"copy bytes={size} stores={stores}", 2 * size) for stores in range(3)]
        for dtype in ("float32", "float64", "bfloat16"):
            request = f"arithmetic dtype={dtype}"
            answer = process.open(request)
            if "flops" in answer:
                self.requests[dtype] = (request, answer["flops"])
        self.rates = {name: self.rate(process, *request, rounds) for name, request in self.requests.items()}
        rates = {request: self.rate(process, *request, rounds) for request in copies}
        self.requests["copy"] = max(rates, key=rates.get)
        self.rates["copy"] = rates[self.requests["copy"]]
        self.copies = dict(zip(("cached stores", "streamed stores", "memcpy"), rates.values(), strict=True))
        self.stores = list(rates).index(self.requests["copy"])

    @staticmethod
    def rate(process: Process, request: str, work: float, rounds: int) -> float:
        answer = process.open(request)
        if "error" in answer:
            raise Failure(f"{request}: {answer['error']}")
        return work / statistics.median(process.time(3) for _ in range(rounds))

    def traffic(self, case: Case) -> str | None:
        """How the case's own tensors are moved, where that is its ceiling; not those of a state updated in place, nor
        tensors so small that waking the threads would be a part of it."""
        if case.op == "gated_delta_update" or case.work < SMALL:
            return None
        return {"copy": str(self.stores), "read": "read"}.get(case.ceiling)

    def of(self, case: Case) -> tuple[str, float] | None:
        """The request and its work. float16 is multiplied as float32, as bfloat16 is where it has no instruction."""
        name = case.ceiling if case.ceiling != "arithmetic" else case.dtype
        return self.requests.get(name, self.requests["float32"] if case.ceiling == "arithmetic" else None)


def blas(processes: Processes, rounds: int) -> dict[str, float]:
    """The rate of large matrix products by NumPy's BLAS and by PyTorch's."""
    found = {}
    for name, label in (("metalloid", "NumPy"), ("torch", "PyTorch")):
        for dtype in ("float32", "bfloat16") if name == "torch" else ("float32",):
            if name != "metalloid" and name not in processes.versions:
                continue
            if "error" not in processes[name].open(f"matmul dtype={dtype} size=2048"):
                seconds = statistics.median(processes[name].time(1) for _ in range(rounds))
                found[f"{label} {dtype}"] = 2 * 2048**3 / seconds
            processes[name].open("close")
    return found


# ---- measuring -------------------------------------------------------------------------------------------------------


class Bench:
    def __init__(self, processes: Processes, ceilings: Ceilings, cache_bytes: int, rounds: int, seconds: float):
        self.processes, self.ceilings = processes, ceilings
        self.cache_bytes, self.rounds, self.seconds = cache_bytes, rounds, seconds

    def measure(self, case: Case) -> dict:
        request = case.request(self.cache_bytes)
        began, notes, allocating = monotonic(), {}, []
        times: dict[str, list[float]] = {}
        calls: dict[str, int] = {}

        def add(name: str, wanted: str = request) -> None:
            """Opens the case in a process and finds how many calls make a round."""
            process = self.processes[name]
            answer = process.open(wanted)
            if "error" in answer:
                notes[name] = answer["error"]
                if name in OWN:
                    raise Failure(f"{case.name}: {name}: {answer['error']}")
                return
            if answer.get("takes_out") is False:
                allocating.append(name)
            if name not in OWN and answer["seconds"] > max(SLOW * own, 0.5):
                times[name], calls[name] = [answer["seconds"]], 1
                return
            try:
                seconds = process.time(1)
                if seconds < 0.002:
                    seconds = process.time(max(1, int(0.002 / seconds)))
            except ValueError as error:
                notes[name] = str(error)
                return
            times[name] = []
            # A ceiling is sampled for as long as a call takes (or a while), since what disturbs one shall disturb both.
            lasting = min(max(own, ROUND), 10 * ROUND) if name == "ceiling" else ROUND
            calls[name] = max(1, math.ceil(lasting / seconds))
            if seconds > ROUND:
                times[name].append(seconds)  # a call so long is a measurement already

        own = 0.0
        add("C")
        own = times["C"][0] if times["C"] else ROUND / calls["C"]
        ceiling, traffic = self.ceilings.of(case), self.ceilings.traffic(case)
        if traffic:  # in the process that has the tensors
            seconds, moved = self.processes["C"].traffic(1, traffic)
            ceiling = traffic, moved
            times["ceiling"], calls["ceiling"] = [], max(1, math.ceil(min(max(own, ROUND), 10 * ROUND) / seconds))
        elif ceiling:
            add("ceiling", ceiling[0])
        if case.ceiling == "bare":
            add("bare", f"{request} by=bare")
        for name in case.also:
            add(name, f"{request} by={name}")
        if own < LONG_CALL:
            add("metalloid")
            add("metalloid.new")
        for name in self.processes.versions:
            add(name)

        once = {name for name, seen in times.items() if name != "C" and seen and seen[0] > SLOW * own}
        order = list(times)
        for turn in range(self.rounds):
            if turn and monotonic() - began > self.seconds:
                break
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                if name in once or len(times[name]) > turn:
                    continue
                sleep(PAUSE)
                own_tensors = name == "ceiling" and traffic
                process = self.processes["C" if own_tensors else name]
                try:
                    if own_tensors:
                        times[name].append(process.traffic(calls[name], traffic)[0])
                    else:
                        times[name].append(process.time(calls[name]))
                    process.settle()
                except ValueError as error:  # a library that breaks is noted; Metalloid's own calls must not
                    if name in OWN:
                        raise Failure(f"{case.name}: {error}") from None
                    notes[name] = str(error)
                    once.add(name)
        for name, process in self.processes.running.items():
            if name != "ceiling" and process.opened:
                process.ask("close")
                process.opened = ""
        medians = {name: statistics.median(seen) for name, seen in times.items() if seen}
        return {
            "name": case.name,
            "label": case.label,
            "section": case.section,
            "model": case.model,
            "operation": case.op,
            "dtype": case.dtype,
            "parameters": case.parameters,
            "cached": case.cached,
            "work": case.work,
            "unit": case.unit,
            "ceiling": case.ceiling,
            "ceiling_rate": ceiling[1] / medians["ceiling"] if ceiling and "ceiling" in medians else None,
            "seconds": medians,
            "rounds": {name: seen for name, seen in times.items() if seen},
            "allocating": allocating,
            "notes": notes,
        }


# ---- the program -----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    def number(least: float, kind: Callable) -> Callable:
        def parse(text: str):
            try:
                value = kind(text)
            except ValueError:
                value = None
            if value is None or not least <= value < float("inf"):
                raise argparse.ArgumentTypeError(f"must be a number, {least} or more, got {text!r}")
            return value

        return parse

    def slice_of(text: str) -> tuple[int, int]:
        first, _, of = text.partition("/")
        if not (first.isdecimal() and of.isdecimal() and 1 <= int(first) <= int(of)):
            raise argparse.ArgumentTypeError(f"must be K/N with 1 <= K <= N, got {text!r}")
        return int(first), int(of)

    made = argparse.ArgumentParser(
        prog="metalloid bench",
        description="Times every operation on the shapes of models, in turn with the machine's ceilings (memory, "
        "multiply-adds) and the libraries that are installed: PyTorch, torch.compile, MLX and onnxruntime. The targets "
        "that a case misses stand in its last column.",
        epilog="Exit codes: 0 done, 1 failed, 2 usage. METALLOID_PYTHON names the interpreter that runs this.",
    )
    made.add_argument("--quick", action="store_true", help="a few cases of every kind, less than a minute")
    made.add_argument("--filter", metavar="WORDS", default="", help="only cases whose line has all these words")
    made.add_argument(
        "--threads", metavar="N", type=number(1, int), help="of every implementation (default: what the library uses)"
    )
    made.add_argument(
        "--rounds", metavar="N", type=number(1, int), help="medians are over so many (default: 5, quick: 3)"
    )
    made.add_argument(
        "--seconds",
        metavar="S",
        type=number(0, float),
        default=15,
        help="after so many a case starts no more rounds (default: %(default)s)",
    )
    made.add_argument(
        "--slice", metavar="K/N", type=slice_of, default=(1, 1), help="only every Nth case from the Kth on; see --merge"
    )
    made.add_argument(
        "--merge", metavar="FILE", nargs="+", help="measure nothing: one table, --json and --plot of what runs wrote"
    )
    made.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: on a GPU, beside PyTorch (no threads, no plot)"
    )
    made.add_argument(
        "--kernels", action="store_true", help="only what custom kernels cost on the CPU; takes no other option"
    )
    made.add_argument("--no-peers", action="store_true", help="only Metalloid and the ceilings")
    made.add_argument("--list", action="store_true", help="name the cases and do nothing")
    made.add_argument("--json", metavar="FILE", help="write everything measured")
    made.add_argument("--plot", metavar="FILE.png", help="draw what was measured")
    made.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    return made


def chosen(options: argparse.Namespace) -> list[Case]:
    words = options.filter.lower().split()
    everything = cases.tiny() if options.tiny else cases.suite()

    def wanted(case: Case) -> bool:
        line = f"{case.section} {case.model} {case.name} {case.dtype}".lower()
        return all(word in line for word in words) and (case.quick or options.tiny or not options.quick)

    found = [case for case in everything if wanted(case)]
    sections = list(dict.fromkeys(case.section for case in found))
    first, of = options.slice
    return sorted(found, key=lambda case: sections.index(case.section))[first - 1 :: of]


def find_command() -> str:
    command = os.environ.get("METALLOID_COMMAND") or shutil.which("metalloid")
    if not command or not shutil.which(command):
        raise Failure(
            "the metalloid command is not in PATH; `make install` puts it there, or METALLOID_COMMAND names it"
        )
    return command


@contextmanager
def processes_of(*arguments) -> Iterator[Processes]:
    found = Processes(*arguments)
    try:
        yield found
    finally:
        found.stop()


def merged(options: argparse.Namespace) -> dict:
    """What several runs wrote, as if one had measured it: cases in the suite's order, medians of the ceilings."""
    runs = []
    for path in options.merge:
        try:
            runs.append(json.loads(Path(path).read_text()))
            _ = [(row["section"], row["model"], row["name"]) for row in runs[-1]["cases"]]
        except (ValueError, KeyError, TypeError):
            raise Failure(f"{path}: not what --json wrote") from None
    for key in ("metalloid", "processor", "threads", "peers"):
        for path, each in zip(options.merge, runs, strict=True):
            if each.get(key) != runs[0].get(key):
                raise Failure(f"{path}: another {key} than in {options.merge[0]}")
    measured = {(row["section"], row["model"], row["name"]): row for each in runs for row in each["cases"]}
    everything = {
        (case.section, case.model, case.name): case for case in (cases.tiny() if options.tiny else cases.suite())
    }
    unknown = [path for path in measured if path not in everything]
    if unknown:
        raise Failure(f"no such case: {' '.join(filter(None, unknown[0]))}")
    sections = list(dict.fromkeys(case.section for case in everything.values()))
    order = sorted(everything, key=lambda key: sections.index(key[0]))
    result = runs[0] | {"rounds": min(each["rounds"] for each in runs), "load": max(each["load"] for each in runs)}
    for part in ("ceilings", "blas"):
        result[part] = {
            name: median_of([each[part][name] for each in runs if name in each[part]]) for name in runs[0][part]
        }
    result["cases"] = []
    for key in order:
        if key in measured:
            result["cases"].append(report.judged(measured[key], everything[key], result["cases"]))
    return result


def median_of(values: list) -> float | dict:
    if isinstance(values[0], dict):
        return {name: statistics.median(each[name] for each in values) for name in values[0]}
    return statistics.median(values)


def run(options: argparse.Namespace) -> None:
    wanted = chosen(options)
    if not wanted:
        raise Failure(f"no case has all the words of {options.filter!r}; --list names them")
    if options.list:
        for case in wanted:
            print(" ".join(filter(None, (f"{case.section}:", case.model, case.name))))
        return
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        if options.plot:
            import matplotlib  # noqa: F401
    except ImportError as error:
        raise Failure(f"{error.name} is missing; pip install '.[bench]' in a checkout") from None
    for path in filter(None, (options.json, options.plot)):
        if not Path(path).absolute().parent.is_dir():
            raise Failure(f"{path}: no such folder")
    if options.plot and not options.plot.lower().endswith(".png"):
        raise Failure(f"{options.plot}: the picture is a PNG, so its name must end in .png")

    table, bar = Console(width=None if sys.stdout.isatty() else 180), Console(stderr=True)
    if options.merge:
        result = merged(options)
        report.print_machine(table, result)
        for section in dict.fromkeys(row["section"] for row in result["cases"]):
            report.print_section(table, result, section)
        finish(options, table, result)
        return

    import metalloid

    command = find_command()
    threads = options.threads or metalloid.get_num_threads()
    rounds = options.rounds or (1 if options.tiny else 3 if options.quick else 5)
    cache_bytes = 1 << 20 if options.tiny else min(max(4 * cache_size(), 128 << 20), 1 << 30)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    busy = os.getloadavg()[0]
    with (
        processes_of(command, threads, () if options.no_peers else PEERS) as processes,
        Progress(*columns, console=bar) as progress,
    ):
        task = progress.add_task("ceilings", total=len(wanted))
        if busy > 0.5:
            progress.console.print(f"other programs keep {busy:.1f} processors busy: the figures will be worth less")
        version = processes["C"].ask("info")
        ceilings = Ceilings(processes, cache_bytes, rounds)
        result = {
            "metalloid": version,
            "processor": processor_name(),
            "threads": threads,
            "cache_bytes": cache_size(),
            "rounds": rounds,
            "load": busy,
            "ceilings": {**ceilings.rates, "copies": ceilings.copies},
            "blas": blas(processes, rounds),
            "peers": processes.versions,
            "left_out": processes.left_out,
            "cases": [],
        }
        bench = Bench(processes, ceilings, cache_bytes, rounds, options.seconds)
        for i, case in enumerate(wanted):
            progress.update(task, description=f"{case.model} {case.label}".strip())
            result["cases"].append(report.judged(bench.measure(case), case, result["cases"]))
            progress.advance(task)
            if i + 1 == len(wanted) or wanted[i + 1].section != case.section:
                progress.stop()
                if len({row["section"] for row in result["cases"]}) == 1:
                    report.print_machine(table, result)
                report.print_section(table, result, case.section)
                progress.start()
    finish(options, table, result)


def finish(options: argparse.Namespace, table: Any, result: dict) -> None:
    report.print_shortfalls(table, result)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    if options.plot:
        from metalloid.bench import plot

        plot.draw(result, options.plot)


def run_on_gpu(options: argparse.Namespace) -> None:
    try:
        import torch
    except ImportError:
        raise Failure("--device cuda needs PyTorch, whose tensors it times") from None
    if not torch.cuda.is_available():
        raise Failure("--device cuda: PyTorch sees no GPU")
    import metalloid
    from metalloid.bench import gpu

    words = options.filter.lower().split()

    def chosen(name: str) -> bool:
        return all(word in name.lower() for word in words)

    if options.list:
        print(*(name for name, *_ in gpu.CASES if chosen(name)), sep="\n")
        return
    rows = gpu.main(metalloid, chosen, not options.no_peers)
    if options.json:
        cases_of_json = [{"case": name, "unit": unit, "values": values} for name, unit, values in rows]
        Path(options.json).write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "cases": cases_of_json}))


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        if options.kernels:
            return subprocess.run([find_command(), "bench", "--kernels"], check=False).returncode
        run_on_gpu(options) if options.device == "cuda" else run(options)
        sys.stdout.flush()
    except Failure as failure:
        print(f"metalloid bench: {failure}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader has gone: nothing is left to flush to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"metalloid bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("metalloid bench: interrupted", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
