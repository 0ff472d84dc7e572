"""Sphinx's configuration: see `make docs`."""

import re
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs" / "_ext"))

project = "Metalloid"
copyright = "the Metalloid developers"
version = release = re.search(r"project\(metalloid VERSION ([0-9.]+)", (ROOT / "CMakeLists.txt").read_text()).group(1)

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "breathe",
    "c_reference",
    "mathml",
    "plain_docstrings",
]
exclude_patterns = ["_ext", "_static"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 3

breathe_projects = {"metalloid": str(ROOT / "build" / "docs" / "doxygen" / "xml")}
breathe_default_project = "metalloid"
breathe_domain_by_extension = {"h": "c"}

autodoc_typehints = "none"  # they stand in the signatures of the stubs; here they would bury the names
autodoc_member_order = "bysource"
if find_spec("torch"):
    tags.add("torch")  # noqa: F821 (Sphinx's)
if find_spec("torch") and find_spec("transformers"):
    tags.add("transformers")  # noqa: F821

# Types of DLPack and of C's library, which this site does not describe.
nitpick_ignore_regex = [
    (r"c:identifier", r"DL\w+|bool|size_t|u?int\d+_t|metalloid_context|metalloid_kernel"),
    (r"py:class", r".*"),
    (r"py:exc", r".*"),
    (r"py:func", r".*"),
]

html_theme = "furo"
html_title = f"Metalloid {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
