"""`lm-eval-kvpress presses`: every press that runs here, then those of kvpress that do not and why; or one of them.

The list is data (`press_list`): kvpress is not imported.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.press_list import FILE, PressInfo, aliases, press_list
from lm_eval_kvpress.presses.suggest import near
from lm_eval_kvpress.tables import markdown_table, print_table

WIDE = 150
"""Columns of a terminal from which arguments stand beside the names."""


def main(argv: Sequence[str]) -> int:
    """Print the list of presses, or all about one."""
    parser = argparse.ArgumentParser(
        prog="lm-eval-kvpress presses", description="List the presses that --model_args press=NAME takes."
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="all about this press, such as adakv:snapkv")
    parser.add_argument("--json", action="store_true", help="print the list, or the press, for programs")
    parser.add_argument("--markdown", action="store_true", help="print the two tables of docs/presses.md")
    arguments = parser.parse_args(argv)
    if arguments.name is not None:
        infos = _named(arguments.name)
        print(_as_json(infos) if arguments.json else "\n\n".join("\n".join(_lines(info)) for info in infos))
    elif arguments.json:
        sys.stdout.write(FILE.read_text(encoding="utf-8"))
    elif arguments.markdown:
        print(markdown(press_list()))
    else:
        _print_tables(press_list())
    return 0


def _named(name: str) -> list[PressInfo]:
    """The lines of each press of a name.

    Raises:
        UsageError: for a part that is no press, with a near one.
    """
    known = {info.own_name: info for info in press_list()}
    parts = re.split(r"[:+]", aliases().get(name, name))
    for part in parts:
        if part not in known:
            hint = near(part, [*known, *aliases()])
            raise UsageError(f"unknown press {part!r}: {hint}`lm-eval-kvpress presses` lists all")
    return [known[part] for part in parts]


def _as_json(infos: Sequence[PressInfo]) -> str:
    return json.dumps([asdict(info) for info in infos], indent=1, ensure_ascii=False)


def _lines(info: PressInfo) -> Iterator[str]:
    """All about one press, fitted to the terminal."""
    width = shutil.get_terminal_size().columns
    yield info.name if info.supported else f"{info.name}: does not run here"
    facts = {"paper": info.paper, "needs" if info.supported else "because": info.needs}
    for what, text in facts.items():
        if text:
            yield textwrap.fill(text, width, initial_indent=f"  {what:8} ", subsequent_indent=" " * 11)
    for name, default in info.arguments.items():
        yield f"  {name}={default}"


def _print_tables(listed: Sequence[PressInfo]) -> None:
    """Arguments stand beside the names where they fit, and in files."""
    is_narrow = sys.stdout.isatty() and shutil.get_terminal_size().columns < WIDE
    runs, others = [], []
    for press in listed:
        paper = press.paper.rpartition("/")[2] if is_narrow else press.paper
        if press.supported:
            defaults = " ".join(f"{name}={value}" for name, value in press.arguments.items())
            row = (press.name, press.needs or "-", paper or "-", defaults or "-")
            runs.append(row[:3] if is_narrow else row)
        else:
            others.append((press.name, paper or "-", press.needs))
    header = ("press", "needs", "paper", "arguments and defaults")
    print_table(header[:3] if is_narrow else header, runs)
    print()
    print_table(("does not run here", "paper", "because it"), others)
    if is_narrow:
        print("\nlm-eval-kvpress presses NAME shows the arguments of one, with their defaults")


def markdown(listed: Sequence[PressInfo]) -> str:
    """Write the list as the two tables of docs/presses.md."""
    runs, others = [], []
    for press in listed:
        paper = f"[{press.paper.split('/')[-1]}]({press.paper})" if press.paper else ""
        if press.supported:
            defaults = ", ".join(f"`{name}={default}`" for name, default in press.arguments.items())
            runs.append((f"`{press.name}`", defaults, press.needs, paper))
        else:
            others.append((f"`{press.name}`", press.needs, paper))
    supported = markdown_table(("`press=`", "arguments and defaults", "needs", "paper"), runs)
    unsupported = markdown_table(("not supported", "because", "paper"), others)
    return f"{supported}\n\n{unsupported}"
