"""Ratios, targets and the table."""

from __future__ import annotations

from typing import Any

from metalloid.bench.cases import Case, Target
from metalloid.bench.peers import PEERS

NOISE = 0.98  # a peer counts as faster from 2 % on: medians do not tell less apart


def ours(row: dict, allocating: bool) -> float:
    """Metalloid's time, called as the peer is: from Python, with a given output or not. Long calls are C's alone."""
    seconds = row["seconds"]
    return seconds.get("metalloid.new" if allocating else "metalloid", seconds["C"])


def ratio_to(row: dict, peer: str) -> float | None:
    """How many times as long the peer takes."""
    if peer not in row["seconds"]:
        return None
    return row["seconds"][peer] / ours(row, peer in row["allocating"])


def best_peer(row: dict) -> tuple[str, float] | None:
    ratios = {peer: ratio for peer in PEERS if (ratio := ratio_to(row, peer)) is not None}
    return min(ratios.items(), key=lambda item: item[1]) if ratios else None


def rate(row: dict) -> float:
    return row["work"] / row["seconds"]["C"]


def named(name: str, rows: list[dict]) -> dict | None:
    return next((row for row in rows if row["name"] == name), None)


def measured(row: dict, target: Target, rows: list[dict]) -> float | None:
    """The value that a target speaks of; None where it cannot be had, as without peers."""
    seconds = row["seconds"]
    other = named(target.other, rows)
    if target.measure == "of_ceiling":
        return row["of_ceiling"]
    if target.measure == "vs_peer":
        return row["vs_best_peer"]
    if target.measure == "vs_torch":
        return ratio_to(row, "torch")
    if target.measure == "vs_plain":
        return seconds["plain"] / seconds["C"] if "plain" in seconds else None
    if target.measure in ("over_bare", "numpy_over_bare"):
        name = "C" if target.measure == "over_bare" else "metalloid"
        return seconds[name] - seconds["bare"] if name in seconds and "bare" in seconds else None
    if target.measure == "vs_case":
        return seconds["C"] / other["seconds"]["C"] if other else None
    assert target.measure == "rate_vs_case", target.measure
    return rate(row) / rate(other) if other else None


WORDS = {
    "of_ceiling": "ceiling",
    "vs_peer": "peer",
    "vs_torch": "torch",
    "vs_plain": "plain",
    "over_bare": "C over bare",
    "numpy_over_bare": "NumPy over bare",
    "vs_case": "time of",
    "rate_vs_case": "rate of",
}


def said(target: Target, value: float, other: dict | None) -> str:
    """For example "ceiling 71% < 90%"."""
    if target.measure.endswith("over_bare"):
        text, limit = f"{value * 1e6:.2f}", f"{target.limit * 1e6:.1f} µs"
    elif target.measure in ("vs_peer", "vs_torch", "vs_plain"):
        text, limit = f"{value:.2f}", f"{target.limit:g}x"
    else:
        text, limit = f"{value:.0%}", f"{target.limit:.0%}"
    what = WORDS[target.measure] + (f" '{other['label']}'" if other else "")
    kept = value >= target.limit if target.at_least else value <= target.limit
    sign = (">=" if kept else "<") if target.at_least else ("<=" if kept else ">")
    return f"{what} {text} {sign} {limit}"


def judged(row: dict, case: Case, before: list[dict]) -> dict:
    """The row with its ratios and what became of its targets."""
    best = best_peer(row)
    row["of_ceiling"] = rate(row) / row["ceiling_rate"] if row["ceiling_rate"] else None
    row["best_peer"], row["vs_best_peer"] = best or (None, None)
    targets = list(case.targets)
    if not any(target.measure == "vs_peer" for target in targets):
        targets.append(Target("vs_peer", 1))
    row["targets"] = []
    for target in targets:
        value = measured(row, target, before)
        if value is None:
            continue
        limit = target.limit * (NOISE if target == Target("vs_peer", 1) else 1)
        met = value >= limit if target.at_least else value <= limit
        row["targets"].append(
            {
                "text": said(target, value, named(target.other, before)),
                "value": value,
                "limit": target.limit,
                "met": met,
            }
        )
    return row


# ---- the table -------------------------------------------------------------------------------------------------------


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1, 1e3, "ms")):
        if seconds < limit:
            value = seconds * factor
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{seconds:.2f} s"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def rounds(count: int) -> str:
    return f"medians of {count} rounds in turn" if count > 1 else "one round"


def print_machine(console: Any, result: dict) -> None:
    version, ceilings = result["metalloid"], result["ceilings"]
    console.print(
        f"\n[bold]Metalloid {version['version']}[/] ({version['isa']}) on {result['processor']}, "
        f"{result['threads']} threads, {result['cache_bytes'] >> 20} MiB of cache, {rounds(result['rounds'])}"
    )
    memory = f"read {ceilings['read'] / 1e9:.1f} GB/s, copy {ceilings['copy'] / 1e9:.1f} GB/s"
    copies = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in ceilings["copies"].items())
    rates = [
        f"{dtype} {ceilings[dtype] / 1e9:.0f}" for dtype in ("float32", "float64", "bfloat16") if dtype in ceilings
    ]
    console.print(f"ceilings  {memory} ({copies}); multiply-adds in GFLOP/s: {', '.join(rates)}", highlight=False)
    if result["blas"]:
        products = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in result["blas"].items())
        console.print(f"BLAS      matrix products of 2048 in GFLOP/s: {products}", highlight=False)
    for name, version in result["peers"].items():
        console.print(f"peer      {name} {version}", highlight=False)
    for name, reason in result["left_out"].items():
        console.print(f"left out  {name}: {reason}", highlight=False)


def print_section(console: Any, result: dict, section: str) -> None:
    from rich.table import Table

    rows = [row for row in result["cases"] if row["section"] == section]
    seen = {name for row in rows for name in row["seconds"]}
    peers = [peer for peer in result["peers"] if peer in seen]
    extra = [name for name in ("bare", "plain") if name in seen]
    table = Table(
        title=section, title_justify="left", title_style="bold", header_style="bold", box=None, padding=(0, 1)
    )
    table.add_column("model")
    table.add_column("operation", no_wrap=True)
    columns = ("rate", "of ceiling", *extra, "from C", "NumPy, out=", "NumPy", *peers, "best peer")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=name not in ("of ceiling", "NumPy, out=", "best peer"))
    table.add_column("falls short", overflow="fold")
    for row in rows:
        seconds = row["seconds"]
        unit = "GFLOP/s" if row["unit"] == "FLOP" else "GB/s"
        cells = [row["model"], row["label"], f"{rate(row) / 1e9:.1f} {unit}", percent(row["of_ceiling"])]
        cells += [duration(seconds.get(name)) for name in (*extra, "C", "metalloid", "metalloid.new")]
        for peer in peers:
            cells.append(duration(seconds.get(peer)) + ("*" if peer in row["allocating"] else ""))
        ratio = row["vs_best_peer"]
        cells.append("-" if ratio is None else f"[{'green' if ratio >= 1 else 'red'}]{ratio:.2f}x[/]")
        short = "; ".join(target["text"] for target in row["targets"] if not target["met"])
        table.add_row(*cells, f"[red]{short}[/]")
    console.print()
    console.print(table)


def print_shortfalls(console: Any, result: dict) -> None:
    rows, all_targets = result["cases"], [target for row in result["cases"] for target in row["targets"]]
    missed = sum(not target["met"] for target in all_targets)
    short = sum(any(not target["met"] for target in row["targets"]) for row in rows)
    if any(row["allocating"] for row in rows):
        console.print(
            "\n* allocates its result: compared with the call from NumPy that does too; the others are given arrays",
            highlight=False,
        )
    console.print(
        f"\n{len(all_targets) - missed} of {len(all_targets)} targets met, {short} of {len(rows)} cases fall short",
        highlight=False,
    )
