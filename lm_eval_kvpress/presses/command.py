"""`lm-eval-kvpress presses`: every press that runs here, then those of kvpress that do not and why.

kvpress is imported after the arguments are parsed, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lm_eval_kvpress.tables import markdown_table, print_table

if TYPE_CHECKING:
    from lm_eval_kvpress.presses.listing import PressInfo


def main(argv: Sequence[str]) -> int:
    """Print the list of presses."""
    parser = argparse.ArgumentParser(
        prog="lm-eval-kvpress presses", description="List the presses that --model_args press=NAME takes."
    )
    parser.add_argument("--markdown", action="store_true", help="print the two tables of docs/presses.md")
    arguments = parser.parse_args(argv)
    from lm_eval_kvpress.presses.listing import list_presses

    listed = list_presses()
    if arguments.markdown:
        print(markdown(listed))
    else:
        _print_tables(listed)
    return 0


def _print_tables(listed: Sequence[PressInfo]) -> None:
    runs, others = [], []
    for press in listed:
        if press.supported:
            defaults = " ".join(f"{name}={value}" for name, value in press.arguments.items())
            runs.append((press.name, press.needs or "-", press.paper or "-", defaults or "-"))
        else:
            others.append((press.name, press.paper or "-", press.needs))
    print_table(("press", "needs", "paper", "arguments and defaults"), runs)
    print()
    print_table(("does not run here", "paper", "because it"), others)


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
