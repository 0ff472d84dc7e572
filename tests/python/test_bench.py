"""The benchmark: what it writes, how it fails, and that the libraries it compares compute the same."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from metalloid.bench import cases, peers, report
from metalloid.bench.__main__ import Process

ROOT = Path(__file__).parents[2]
COMMAND = os.environ.get("METALLOID_COMMAND") or shutil.which("metalloid")

with_command = pytest.mark.skipif(not COMMAND, reason="METALLOID_COMMAND names no metalloid command")


@pytest.fixture(autouse=True)
def gradients_stay_on():
    """A peer turns PyTorch's gradients off, in what is a process of its own but for these tests."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_grad_enabled(True)


def run(*arguments, **environment):
    environment = os.environ | {"METALLOID_PYTHON": sys.executable} | environment
    return subprocess.run(
        [COMMAND, "bench", *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("bench")
    done = run("--tiny", "--no-peers", "--json", str(folder / "out.json"), "--plot", str(folder / "out.png"))
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "out.json").read_text()), (folder / "out.png").read_bytes()


@with_command
def test_json_has_every_case_with_medians_ratios_and_targets(tiny):
    _, result, _ = tiny
    assert [row["name"] for row in result["cases"]] == [case.name for case in by_section(cases.tiny())]
    assert result["ceilings"].keys() >= {"read", "copy", "float32", "float64", "copies"}
    assert all(rate > 0 for name, rate in result["ceilings"].items() if name != "copies")
    assert result["ceilings"]["copy"] == max(result["ceilings"]["copies"].values())
    assert result["blas"]["NumPy float32"] > 0
    for row in result["cases"]:
        assert row["seconds"].keys() >= {"C", "metalloid", "metalloid.new"}
        assert row["seconds"].keys() == row["rounds"].keys()
        assert all(seconds > 0 for seen in row["rounds"].values() for seconds in seen)
        assert (row["of_ceiling"] is not None) == (row["ceiling"] in ("copy", "read", "arithmetic")), row["name"]
        assert ("bare" in row["seconds"]) == (row["ceiling"] == "bare")
        assert row["best_peer"] is None
        assert "metalloid.new" in row["allocating"]
        assert "metalloid" not in row["allocating"]


@with_command
def test_slices_merge_into_what_one_run_writes(tiny, tmp_path):
    _, whole, _ = tiny
    files = [str(tmp_path / f"{k}.json") for k in (1, 2)]
    for k, file in enumerate(files, 1):
        done = run("--tiny", "--no-peers", "--slice", f"{k}/2", "--json", file)
        assert done.returncode == 0, done.stderr
    out, picture = tmp_path / "all.json", tmp_path / "all.png"
    done = run("--tiny", "--merge", *files, "--json", str(out), "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    merged = json.loads(out.read_text())
    assert merged.keys() == whole.keys()
    assert [row["name"] for row in merged["cases"]] == [row["name"] for row in whole["cases"]]
    for row, other in zip(merged["cases"], whole["cases"], strict=True):  # targets that look at another case too
        assert [target["text"].split()[0] for target in row["targets"]] == [
            target["text"].split()[0] for target in other["targets"]
        ]
    assert f"of {len(whole['cases'])} cases" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    wrong = json.loads(Path(files[1]).read_text()) | {"threads": 77}
    Path(files[1]).write_text(json.dumps(wrong))
    done = run("--tiny", "--merge", *files)
    assert done.returncode == 1
    assert "another threads than in" in done.stderr
    Path(files[1]).write_text("[]")
    assert "not what --json wrote" in run("--tiny", "--merge", *files).stderr


@with_command
def test_case_that_misses_its_target_says_so_in_the_table(tiny):
    table, result, _ = tiny
    missed = [row for row in result["cases"] if not all(target["met"] for target in row["targets"])]
    assert {"attention T=32 f32 causal window 8 bool mask"} <= {row["label"] for row in missed}
    assert "'attention T=32 f32'" in " ".join(table.split())
    assert f"{len(missed)} of {len(result['cases'])} cases fall short" in table


@with_command
def test_plot_is_a_png_for_a_slide(tiny):
    image = tiny[2]
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(image[at : at + 4], "big") for at in (16, 20))
    assert width >= 1600
    assert height >= 900
    assert len(image) > 20_000


def by_section(found):
    found = list(found)
    sections = list(dict.fromkeys(case.section for case in found))
    return sorted(found, key=lambda case: sections.index(case.section))


@with_command
@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--rounds", "0"), 2, "--rounds"),
        (("--threads", "many"), 2, "--threads"),
        (("--no-such-option",), 2, "--no-such-option"),
        (("--filter", "no such case"), 1, "no such case"),
        (("--slice", "3/2"), 2, "must be K/N"),
        (("--merge", "no-such-file"), 1, "no-such-file"),
        (("--tiny", "--plot", "picture.jpg"), 1, "PNG"),
        (("--tiny", "--json", "/no/such/folder/out.json"), 1, "/no/such/folder"),
    ],
)
def test_bad_usage_is_refused_before_anything_is_measured(arguments, code, says):
    done = run(*arguments)
    assert done.returncode == code
    assert says in done.stderr
    assert done.stdout == ""


@with_command
def test_interpreter_without_the_package_is_named_in_one_line(tmp_path):
    done = run(METALLOID_PYTHON=str(tmp_path / "no-python"))
    assert done.returncode == 1
    assert "METALLOID_PYTHON" in done.stderr
    assert done.stderr.count("\n") == 1


@with_command
def test_help_and_list_need_nothing_but_the_package():
    assert "--filter" in run("--help").stdout
    listed = run("--list", "--filter", "decode llama bf16").stdout.splitlines()
    assert len(listed) >= 4
    assert all("bf16" in line and "Llama-3-8B" in line for line in listed)


@with_command
def test_a_gpu_that_is_not_there_is_said_in_one_line():
    done = run("--device", "cuda", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert done.stderr.startswith("metalloid bench: --device cuda")
    assert done.stderr.count("\n") == 1


@with_command
def test_reader_of_the_list_may_go():
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | {"METALLOID_PYTHON": sys.executable}
    command = [COMMAND, "bench", "--list"]
    done = subprocess.run(command, env=environment, stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize(
    ("last_words", "error"), [("""print('{"error": "not installed"}')""", "not installed"), ("", "its process ended")]
)
def test_process_that_ended_is_asked_for_its_last_words(last_words, error):
    process = Process([sys.executable, "-c", last_words], 1)
    process.process.wait()
    assert process.ask("info") == {"error": error}
    process.stop()


def test_names_of_cases_are_unique_and_targets_refer_to_cases_before_them():
    everything = list(cases.suite())
    assert len({(case.section, case.model, case.name) for case in everything}) == len(everything)
    for i, case in enumerate(everything):
        for target in case.targets:
            others = [j for j, other in enumerate(everything) if other.name == target.other]
            assert not target.other or (len(others) == 1 and others[0] < i), case.name


@pytest.mark.parametrize(
    ("q_len", "kv_len", "causal", "window"), [(5, 5, 0, 0), (5, 5, 1, 0), (5, 9, 1, 0), (9, 9, 1, 3), (1, 7, 1, 0)]
)
def test_work_of_attention_counts_visible_pairs(q_len, kv_len, causal, window):
    query, key = np.ogrid[:q_len, :kv_len]
    last = query + kv_len - q_len
    visible = ((key <= last) | (not causal)) & ((key > last - window) | (not window))
    assert cases.visible_pairs(q_len, kv_len, causal, window) == visible.sum()


def row_of(**seconds):
    row = {"seconds": seconds, "allocating": [], "work": 8.0, "ceiling_rate": 10.0, "label": "x", "name": "x"}
    return row | {"rounds": {}}


def test_peer_that_allocates_is_compared_with_the_call_that_allocates():
    row = row_of(C=1.0, metalloid=1.0, **{"metalloid.new": 2.0, "torch": 3.0, "mlx": 3.0})
    row["allocating"] = ["torch", "metalloid.new"]
    assert report.best_peer(row) == ("torch", 1.5)
    assert report.ratio_to(row, "mlx") == 3.0


def test_target_that_is_missed_and_one_that_is_kept():
    case = cases.row_wise("", "", "rms_norm", 1, 1, targets=(cases.Target("of_ceiling", 0.9),))
    row = report.judged(row_of(C=1.0, torch=1.5), case, [])
    assert [(target["text"], target["met"]) for target in row["targets"]] == [
        ("ceiling 80% < 90%", False),
        ("peer 1.50 >= 1x", True),
    ]


# ---- the peers compute what Metalloid computes -----------------------------------------------------------------------

SMALL = [
    case for case in cases.tiny() if case.cached or case.op in ("attention", "cross_entropy", "gated_delta_update")
]
SMALL.append(cases.gated_delta(1, 128, heads=1, dim=16))
RESULTS = {
    "qk_norm_rope": ("q_out", "k_out"),
    "gated_delta_update": ("out", "state"),
    "add_rms_norm": ("sum", "out"),
    "add_layer_norm": ("sum", "out"),
}
MODULES = {"torch": "torch", "torch.compile": "torch", "mlx": "mlx", "onnxruntime": "onnxruntime"}


def values(array):
    if type(array).__module__.startswith("mlx"):
        array = array.astype(importlib.import_module("mlx.core").float32)
    elif hasattr(array, "detach"):
        array = array.detach().float()
    return np.asarray(array).astype(np.float64)


@pytest.mark.parametrize("name", ["torch", "mlx", "onnxruntime"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_peer_agrees_with_metalloid(name, case, monkeypatch):
    if importlib.util.find_spec(MODULES[name]) is None:
        pytest.skip(f"{name} is not installed")
    library, reference = peers.LIBRARIES[name](1), peers.Metalloid(1)
    method = getattr(library, case.op, None)
    if method is None:
        pytest.skip(f"{name} has no {case.op}")
    names = RESULTS.get(case.op, ("out",))
    expected = peers.operands(reference, case.op, case.dtype, case.parameters)
    getattr(reference, case.op)(expected, case.parameters)[0][0]()

    evaluated = []  # what MLX is asked to compute
    if name == "mlx":
        monkeypatch.setattr(
            library.mx, "eval", lambda *arrays, eval=library.mx.eval: (evaluated.append(arrays), eval(*arrays))
        )
    operands = peers.operands(library, case.op, case.dtype, case.parameters)
    try:
        ways = method(operands, case.parameters)
    except Exception as refusal:
        if "NOT_IMPLEMENTED" in str(refusal) or isinstance(refusal, NotImplementedError):
            pytest.skip(f"{name} refuses {case.name}")
        raise
    for way in range(len(ways)):
        operands = peers.operands(library, case.op, case.dtype, case.parameters)
        evaluated.clear()
        call, takes_out = method(operands, case.parameters)[way]
        returned = call()
        if name == "mlx":
            returned = evaluated[-1][0]
        if takes_out:
            returned = tuple(getattr(operands, result) for result in names)
        elif not isinstance(returned, (tuple, list)):
            returned = (returned,)
        tolerance = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 5e-2}[case.dtype]
        for result, out in zip(names, returned, strict=True):
            wanted = values(getattr(expected, result))
            np.testing.assert_allclose(values(out).reshape(wanted.shape), wanted, atol=tolerance, rtol=tolerance)
