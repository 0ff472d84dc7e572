"""The Python examples of README.md run; its C example is built and run by the C test installed_package."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_readme_has_a_python_example():
    assert BLOCKS


@pytest.mark.parametrize("block", BLOCKS)
def test_python_example_runs(block):
    for library in ("torch", "transformers", "jax", "mlx"):
        if f"metalloid.{library}" in block:
            pytest.importorskip(library)
    run = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    firsts = (
        "(1, 8, 256, 64) float32 ",
        "torch.Size([1, 8, 256, 64]) torch.float32",
        "5 norms, 1 rotary embeddings, ",
        "(1, 8, 256, 64) bfloat16",
        "primitive ",
        "evaluating ",
    )
    assert run.stdout.startswith(firsts)


def test_files_that_the_readme_links_to_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
