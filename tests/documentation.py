"""Commands and code blocks of the README and the documentation, for tests that run them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

PROGRAMS = ("accelerate", "lm_eval", "lm-eval-kvpress", "make")


def commands(page: Path) -> list[list[str]]:
    """The command lines of indented and of console blocks, continuations joined, comments dropped."""
    text = page.read_text(encoding="utf-8")
    lines = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    for block in re.findall(r"```(?:bash|console)\n(.*?)```", text, re.DOTALL):
        lines += [line.removeprefix("$ ") for line in block.splitlines()]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in joined if line.startswith(PROGRAMS) and "..." not in line]


def titled_blocks(page: Path) -> dict[str, str]:
    """The code blocks of a page that have a title, by title."""
    text = page.read_text(encoding="utf-8")
    return dict(re.findall(r'```\w+ title="([^"]+)"\n(.*?)```', text, re.DOTALL))


def first_program(page: Path) -> str:
    """The first Python block of a page without a title."""
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)[0]
