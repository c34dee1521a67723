"""The cells of a sweep: one press at one ratio (or budget) under one protocol each, every mistake found first.

Knows model arguments. Does not know models or tasks.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.arguments import parse_arguments
from lm_eval_kvpress.presses.arguments import BUDGET, RATIO
from lm_eval_kvpress.presses.decoding import split_name
from lm_eval_kvpress.presses.parse import parse_press, press_argument_names
from lm_eval_kvpress.presses.spec import PressSpec
from lm_eval_kvpress.sweep.settings import SweepSettings

Arguments = Mapping[str, Any]

LONGEST_NAME = 200
"""Bytes of a cell's folder."""

PROTOCOLS = ("rolling", "query_tokens", "query_aware")
LISTED = (*PROTOCOLS, "kv_quant")
"""Arguments of which a sweep lists the values, one cell of each press for each combination."""

PROTOCOL = (*PROTOCOLS, "question_pattern", "question_field", "rolling_context", "rolling_score")
"""Arguments of a cell on which the windows of a document, or the tokens of a context that are prefilled, depend."""

OF_THE_MODEL = ("parity", "fast", "throughput_log", "stream_output", "metrics_port")
"""Settings that a cell cannot have for itself: the loaded model has them, or the sweep gives every cell its own."""


@dataclass(frozen=True)
class Cell:
    """One press at one size under one protocol.

    Attributes:
        name: says all that tells it from the others.
        arguments: its own model arguments.
    """

    name: str
    arguments: Arguments

    @property
    def folder(self) -> str:
        """Its name as that of a folder, of which file systems take 255 bytes: a hash replaces what is beyond."""
        if len(self.name.encode()) <= LONGEST_NAME:
            return self.name
        start = self.name.encode()[: LONGEST_NAME - 17].decode(errors="ignore")
        return f"{start}-{_hash(self.name)}"

    @property
    def protocol(self) -> tuple[tuple[str, Any], ...]:
        """Cells of one protocol ask for the same windows of the same contexts."""
        return tuple((key, self.arguments[key]) for key in PROTOCOL if key in self.arguments)


def cells_of(settings: SweepSettings) -> list[Cell]:
    """Return the product of presses, sizes and protocols.

    Raises:
        UsageError: for a cell that cannot be run, naming it.
    """
    cells: dict[str, Cell] = {}
    for protocol in _protocols(settings):
        for press in settings.presses:
            own = _press_arguments(press)
            _refuse_two_values(own, protocol)
            for size in _sizes(settings, own, protocol):
                cell = _cell({**own, **size, **protocol})
                _check(settings, cell)
                if cells.setdefault(cell.name, cell) != cell:
                    raise UsageError(f"two cells are named {cell.name}: leave one of them out of the presses")
    if not cells:
        raise UsageError("nothing to run: rolling=stream needs a press, and none is the only one in presses")
    _refuse_unused_sizes(settings, cells.values())
    return list(cells.values())


def presses_of(settings: SweepSettings, cells: Iterable[Cell]) -> list[PressSpec]:
    """Return every press of the cells, those that act while decoding included."""
    shared = {key: value for key, value in settings.model_args.items() if key != "pretrained"}
    return [press for cell in cells for press in parse_arguments({**shared, **cell.arguments})[0].all_presses]


def _refuse_unused_sizes(settings: SweepSettings, cells: Iterable[Cell]) -> None:
    """Refuse ratios or budgets of which no cell makes use. Beside other presses, none has one cell without any."""
    for setting, names in (("ratios", {RATIO}), ("budgets", {BUDGET, "stream_budget"})):
        sizes = getattr(settings, setting)
        if sizes and not any(cell.arguments.get(name) in sizes for cell in cells for name in names):
            raise UsageError(
                f"{setting}={', '.join(map(str, sizes))}: no press of this sweep takes one; name presses that do, such "
                f"as snapkv, or leave {setting} out"
            )


def _protocols(settings: SweepSettings) -> Iterator[Arguments]:
    lists = ([{name: value} for value in getattr(settings, name)] or [{}] for name in LISTED)
    for parts in itertools.product(*lists):
        yield {key: value for part in parts for key, value in part.items()}


def _press_arguments(press: Any) -> dict[str, Any]:
    """An item of the setting ``presses`` as model arguments."""
    own = {"press": press} if isinstance(press, str) else press
    if not isinstance(own, dict) or not isinstance(own.get("press"), str):
        raise UsageError(f"presses: {json.dumps(press, default=str)} has no key 'press' that names a press")
    if unnamed := [key for key in own if not isinstance(key, str)]:
        raise UsageError(f"presses: {own['press']} has an argument {unnamed[0]!r}, which is no name")
    return own


def _refuse_two_values(own: Arguments, protocol: Arguments) -> None:
    for key in own.keys() & protocol.keys():
        raise UsageError(f"presses: {own['press']} has its own {key}, and the sweep lists some: give it in one place")


def _sizes(settings: SweepSettings, own: Arguments, protocol: Arguments) -> Sequence[Arguments]:
    """The ratios and budgets of a press; one empty size if the press has none, or its own."""
    try:
        prefill, decoding = split_name(str(own["press"]))
        spec = parse_press(prefill, {key: own[key] for key in press_argument_names(prefill) & own.keys()})
    except UsageError as error:
        raise UsageError(f"presses: {error}") from error
    if {**settings.model_args, **own, **protocol}.get("rolling") == "stream":
        has_press = not spec.is_none or decoding is not None
        return _stream_sizes(settings, own) if has_press else []  # a stream without a press has no budget
    is_sized = bool({RATIO, BUDGET} & own.keys()) or RATIO not in spec.arguments
    sizes = [{RATIO: ratio} for ratio in settings.ratios] + [{BUDGET: budget} for budget in settings.budgets]
    return [{}] if is_sized or not sizes else sizes


def _stream_sizes(settings: SweepSettings, own: Arguments) -> Sequence[Arguments]:
    if "stream_budget" in own:
        return [{}]
    if not settings.budgets:
        raise UsageError("rolling=stream keeps a budget: give --budgets")
    return [{"stream_budget": budget} for budget in settings.budgets]


def _cell(arguments: Arguments) -> Cell:
    """A cell whose name no other arguments have: a hash of them ends it if a value has more than letters and digits."""
    values = {key: str(value) for key, value in arguments.items() if key != "press"}
    exact = "_".join([str(arguments["press"]), *(f"{key}={value}" for key, value in values.items())])
    name = re.sub(r"[:/\\\x00-\x1f]", ".", exact)
    is_plain = all(re.fullmatch(r"[\w.,+ -]*", value) for value in values.values())
    return Cell(name if is_plain else f"{name}-{_hash(exact)}", arguments)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check(settings: SweepSettings, cell: Cell) -> None:
    """Refuse a cell that cannot be run, or whose own arguments would be recorded as used and change nothing."""
    shared = {key: value for key, value in settings.model_args.items() if key != "pretrained"}
    try:
        _, of_loading = parse_arguments({**shared, **cell.arguments})
    except UsageError as error:
        raise UsageError(f"cell {cell.name}: {error}") from error
    for key in cell.arguments:
        if key in {*OF_THE_MODEL, *of_loading}:
            raise UsageError(
                f"cell {cell.name}: {key} is of the loaded model, which all cells share: give it under model_args, or "
                "give this press a sweep of its own"
            )
