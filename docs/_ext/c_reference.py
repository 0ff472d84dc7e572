"""The C reference's list, from the header: its sections, and what each declares, in its order."""

import re
from pathlib import Path

HEADER = Path(__file__).resolve().parents[2] / "include" / "metalloid" / "metalloid.h"

SECTION = re.compile(r"^/\* ---- (.+?) -{3,} \*/$", flags=re.MULTILINE)
DECLARATION = re.compile(
    r"^METALLOID_API [^;]*?\b(?P<function>metalloid_\w+)\("
    r"|^typedef enum (?P<enum>metalloid_\w+) \{"
    r"|^typedef struct (?P<struct>metalloid_\w+) \{"
    r"|^#define (?P<define>METALLOID_\w+)",
    flags=re.MULTILINE,
)


def listing(header):
    """Markdown with a directive for each declaration."""
    parts = SECTION.split(header)
    lines = []
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        lines += [f"## {title[0].upper()}{title[1:]}", "", "```{eval-rst}"]
        for found in DECLARATION.finditer(body):
            lines.append(f".. doxygen{found.lastgroup}:: {found[found.lastgroup]}")
            if found.lastgroup == "struct":
                lines.append("   :members:")
        lines += ["```", ""]
    return "\n".join(lines)


def read(app, name, source):
    if name == "reference/c":
        source[0] += "\n" + listing(HEADER.read_text(encoding="utf-8"))


def setup(app):
    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
