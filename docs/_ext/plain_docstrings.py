"""Docstrings of the extension module, which are written for `help()`, as reStructuredText: arguments become a list."""

import re

ARGUMENT = re.compile(r"^((?:[a-z_]+, )*[a-z_]+): (.*)$")


def escaped(text):
    return re.sub(r"([*`_|\\])", r"\\\1", text)


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
        for paragraph in block:
            argument = ARGUMENT.match(paragraph)
            if argument:
                lines.append(f"- **{escaped(argument[1])}**: {escaped(argument[2])}")
            else:
                lines.extend(["", escaped(paragraph), ""])
        lines.append("")
    lines.extend(examples)


def setup(app):
    app.connect("autodoc-process-docstring", rewrite)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
