"""The Python examples of the documentation run, a page at a time; its C reference leaves nothing of the header out."""

import re
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
