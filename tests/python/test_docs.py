"""The Python examples of the documentation run, a page at a time; its C reference leaves nothing of the header out."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def blocks_of(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


PAGES = [page for page in sorted(DOCS.rglob("*.md")) if blocks_of(page)]


def test_there_are_examples():
    assert len(PAGES) > 15


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_examples_run(page):
    code = "\n".join(blocks_of(page))
    for library in ("torch", "transformers", "jax", "mlx.core", "ml_dtypes"):
        if re.search(rf"^\s*(import|from) {library}\b", code, flags=re.MULTILINE) or (
            f"metalloid.{library.partition('.')[0]}" in code
        ):
            pytest.importorskip(library)
    try:
        exec(compile(code, str(page), "exec"), {"__name__": "__main__"})
    finally:
        if "metalloid.mlx" in sys.modules:
            sys.modules["metalloid.mlx"].uninstall()


def test_debugging_sessions(tmp_path):
    """The commands of the page on custom kernels say what stands below them, `...` aside, among other things."""
    if not all(map(shutil.which, ("gdb", "clang"))):
        pytest.skip("no gdb, or no clang")
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("gcc's AddressSanitizer is in this process")
    page = DOCS / "custom-kernels.md"
    (program,) = (block for block in blocks_of(page) if block.startswith("# program.py\n"))
    (tmp_path / "program.py").write_text(program)
    sessions = re.findall(r"^```console\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    # gdb names the thread of a process that has several: NumPy's, here.
    environment = dict(os.environ, METALLOID_CACHE=str(tmp_path / "cache"), DEBUGINFOD_URLS="", OMP_NUM_THREADS="2")
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    assert len(sessions) == 2
    for command, expected in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", "".join(sessions), flags=re.MULTILINE):
        if "asan-x86_64" in command and os.uname().machine != "x86_64":
            continue
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        said, at = done.stdout + done.stderr, 0
        for line in expected.splitlines():
            found = re.compile(".*".join(map(re.escape, line.split("...")))).search(said, at)
            assert found, f"{command}\n{line!r} is not in\n{said}"
            at = found.end()


def test_the_c_reference_has_every_public_function_and_struct(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))
    from c_reference import listing

    header = (ROOT / "include/metalloid/metalloid.h").read_text(encoding="utf-8")
    code = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    functions = re.findall(r"\b(metalloid_\w+)\([^()]*\)\s*;", code)
    types = re.findall(r"^typedef (?:struct|enum) (metalloid_\w+) \{", code, flags=re.MULTILINE)
    assert len(functions) > 20
    assert len(types) > 5
    listed = re.findall(r"^\.\. doxygen\w+:: (\w+)", listing(header), flags=re.MULTILINE)
    assert sorted({*functions, *types} - set(listed)) == []
    assert len(listed) == len(set(listed))


def test_every_operation_has_a_page_with_a_formula():
    from metalloid import _operations

    for name in _operations.NAMES:
        page = (DOCS / "operations" / f"{name}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {name}\n")
        assert "$$" in page
