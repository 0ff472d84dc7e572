"""Docstrings of the extension module, which are written for `help()`, as reStructuredText: arguments become a list."""

import re

NAMES = r"(?:[a-z_]+, )*[a-z_]+: "
ARGUMENT = re.compile(rf"^({NAMES})(.*)$")


def escaped(text):
    """With what stands in backquotes as code."""
    parts = text.split("`")
    return "``".join(part if i % 2 else re.sub(r"([*_|\\])", r"\\\1", part) for i, part in enumerate(parts))


def rewrite(app, what, name, obj, options, lines):
    if getattr(obj, "__module__", None) != "metalloid._native":
        return
    blocks, examples = [[]], []
    for line in lines:
        if examples or line.startswith(">>>"):
            examples.append(line)
        elif not line.strip():
            blocks.append([])
        elif ARGUMENT.match(line) or not blocks[-1]:
            blocks[-1].append(line)
        else:  # the docstring's own wrapping
            starts_anew = line.startswith(("Returns ", "Raises ", "Arrays are "))
            blocks[-1].append(line) if starts_anew else blocks[-1].__setitem__(-1, f"{blocks[-1][-1]} {line}")
    lines[:] = []
    for block in blocks:
        for paragraph in (part for whole in block for part in re.split(rf"(?<=\.) (?={NAMES})", whole)):
            argument = ARGUMENT.match(paragraph)
            if argument:
                lines.append(f"- **{escaped(argument[1][:-2])}**: {escaped(argument[2])}")
            else:
                lines.extend(["", escaped(paragraph), ""])
        lines.append("")
    lines.extend(examples)


def setup(app):
    app.connect("autodoc-process-docstring", rewrite)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
