"""The picture: what a slide needs to say about a machine, and no more."""

from __future__ import annotations

from statistics import median
from typing import Any

from metalloid.bench.report import rate, rounds

COLORS = {
    "Metalloid": "#d9480f",
    "torch": "#4263eb",
    "torch.compile": "#15aabf",
    "mlx": "#868e96",
    "onnxruntime": "#7048e8",
}
INK, FAINT = "#212529", "#ced4da"
PEERS = tuple(COLORS)[1:]


def rates(row: dict) -> dict[str, float]:
    """Bytes or operations a second of each implementation."""
    found = {"Metalloid": rate(row)}
    return found | {peer: row["work"] / row["seconds"][peer] for peer in PEERS if peer in row["seconds"]}


def bars(axes: Any, result: dict) -> bool:
    """Memory-bound operations out of cache: the share of the ceiling that each implementation reaches."""
    rows = [row for row in result["cases"] if row["section"] in ("Out of cache", "Loss") and row["of_ceiling"]]
    best: dict[tuple[str, str], dict] = {}
    for row in rows:  # the largest of each operation and dtype
        key = (row["operation"], row["dtype"])
        if row["dtype"] in ("float32", "bfloat16") and row["work"] > best.get(key, {"work": 0})["work"]:
            best[key] = row
    rows = sorted(best.values(), key=lambda row: (row["dtype"] != "float32", row["section"], row["operation"]))[:14]
    if not rows:
        return False
    for y, row in enumerate(rows):
        shares = {name: 100 * each / row["ceiling_rate"] for name, each in rates(row).items()}
        own = shares.pop("Metalloid")
        axes.barh(y, min(own, 100), 0.6, color=COLORS["Metalloid"])
        axes.text(102, y, f"{own:.0f} %", va="center", ha="left", color=COLORS["Metalloid"], fontweight="bold")
        for name, share in shares.items():
            axes.plot(min(share, 100), y, "o", color=COLORS[name], markersize=8, markeredgecolor="white")
    names = [f"{row['operation']}  {'bf16' if row['dtype'] == 'bfloat16' else 'f32'}" for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.tick_params(axis="y", length=0)
    axes.axvline(100, color=INK, linewidth=1.2)
    axes.text(99, -0.5, "ceiling", ha="right", va="bottom", fontsize=9, color=INK)
    axes.set(xlim=(0, 114), ylim=(max(len(rows), 6) - 0.4, -0.9), xlabel="% of the memory ceiling")
    axes.set_xticks(range(0, 101, 20))
    axes.set_title("Out of cache", loc="left")
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    return True


def curves(axes: Any, rows: list[dict], title: str, xlabel: str, ylabel: str, ceiling: str) -> bool:
    x = "kv_len"
    rows = sorted(rows, key=lambda row: row["parameters"][x])
    if not rows:
        return False
    names = [name for name in COLORS if any(name in rates(row) for row in rows)]
    for name in sorted(names, key=lambda name: name == "Metalloid"):  # on top
        points = [(row["parameters"][x], rates(row)[name] / 1e9) for row in rows if name in rates(row)]
        style = {"linewidth": 3, "markersize": 8, "zorder": 3} if name == "Metalloid" else {"linewidth": 1.8}
        axes.plot(*zip(*points, strict=True), "o-", color=COLORS[name], **style)
    highest = median(row["ceiling_rate"] for row in rows) / 1e9
    axes.axhline(highest, color=INK, linewidth=1.2)
    axes.annotate(
        ceiling, (rows[0]["parameters"][x], highest), (0, 4), textcoords="offset points", fontsize=9, color=INK
    )
    axes.set_xscale("log", base=2)
    ticks = [row["parameters"][x] for row in rows]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    top = max(highest, *(each / 1e9 for row in rows for each in rates(row).values()))
    axes.set(ylim=(0, 1.12 * top), xlabel=xlabel, ylabel=ylabel)
    axes.margins(x=0.08)
    axes.set_title(title, loc="left")
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    return True


def attention_of(result: dict, section: str, causal: int) -> list[dict]:
    """float32 rows of the model that has most of them."""
    rows = [
        row
        for row in result["cases"]
        if row["section"] == section
        and row["dtype"] == "float32"
        and row["ceiling_rate"]
        and row["parameters"].get("causal", 0) == causal
        and not row["parameters"].get("mask")
        and not row["parameters"].get("window")
    ]
    models = [row["model"] for row in rows]
    return [row for row in rows if row["model"] == max(models, key=models.count)]


def draw(result: dict, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    style = {
        "font.size": 11,
        "axes.titlesize": 13,
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": FAINT,
        "text.color": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.axisbelow": True,
    }
    causal = attention_of(result, "Attention, prefill", 1)
    full = attention_of(result, "Attention, prefill", 0)
    prefill = causal if len(causal) > len(full) else full
    decode = attention_of(result, "Attention, decode", 0)
    panels = [
        lambda axes: bars(axes, result),
        lambda axes: curves(axes, prefill, of("Prefill", prefill), "tokens", "GFLOP/s", "multiply-add rate"),
        lambda axes: curves(
            axes, decode, of("Decode", decode), "keys in the cache", "GB/s of keys and values", "read ceiling"
        ),
    ]
    with plt.rc_context(style):
        figure, grid = plt.subplots(1, 3, figsize=(16, 9), width_ratios=(1.15, 1, 1))
        for axes, panel in zip(grid, panels, strict=True):
            if not panel(axes):
                axes.axis("off")
                axes.text(0.5, 0.5, "not measured in this run", ha="center", color="#868e96")
        version = result["metalloid"]
        figure.text(0.03, 0.94, "Metalloid against the machine and its peers", fontsize=24, fontweight="bold")
        about = f"Metalloid {version['version']} ({version['isa']}), {result['processor']}, {result['threads']} threads"
        peers = ", ".join(f"{name} {number}" for name, number in result["peers"].items())
        figure.text(0.03, 0.905, f"{about}, {rounds(result['rounds'])}", fontsize=12)
        handles = [
            Line2D([], [], color=color, marker="o", linewidth=3 if name == "Metalloid" else 1.8, label=name)
            for name, color in COLORS.items()
            if name == "Metalloid" or name in result["peers"]
        ]
        figure.legend(
            handles=handles, loc="upper left", ncols=5, frameon=False, bbox_to_anchor=(0.022, 0.893), borderpad=0
        )
        figure.text(
            0.03,
            0.02,
            f"Higher is better everywhere. {'Peers: ' + peers if peers else ''}",
            fontsize=9,
            color="#868e96",
        )
        figure.subplots_adjust(left=0.13, right=0.98, top=0.79, bottom=0.11, wspace=0.3)
        figure.savefig(path, dpi=120, facecolor="white")
        plt.close(figure)


def of(what: str, rows: list[dict]) -> str:
    if not rows:
        return f"{what} attention"
    causal = "causal " if rows[0]["parameters"].get("causal") else ""
    return f"{what}: {causal}attention, {rows[0]['model']} f32"
