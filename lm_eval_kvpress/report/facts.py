"""What all runs of a table ran on, in one line: size of the model, device, attention and versions."""

from __future__ import annotations

from collections.abc import Iterator

from lm_eval_kvpress.report.tables import Table

VERSIONS = ("lm-eval-kvpress", "kvpress", "transformers", "torch", "lm_eval")
"""Of which libraries, in this order."""


def model_facts(table: Table) -> str:
    """The facts that files name, separated by semicolons; of several values, all."""
    return "; ".join(_facts(table))


def _facts(table: Table) -> Iterator[str]:
    cells = table.cells
    sizes = dict.fromkeys(cell.num_parameters for cell in cells if cell.num_parameters)
    yield from (f"{format_parameters(size)} parameters" for size in sizes)
    yield from _each("on", [cell.device for cell in cells])
    if not table.setting.is_stock:
        yield from _each("attention", [cell.attention for cell in cells])
    versions = [dict(cell.versions) for cell in cells]
    for name in VERSIONS:
        yield from _each(name, [one[name] for one in versions if name in one])


def _each(what: str, values: list[str]) -> Iterator[str]:
    """A fact with every value that a run has; nothing where no run says it."""
    known = [value for value in dict.fromkeys(values) if value != "unknown"]
    if known:
        yield f"{what} {', '.join(known)}"


def format_parameters(number: float) -> str:
    """A number of parameters with its unit: ``5.1 M``, ``2.78 B``."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"
