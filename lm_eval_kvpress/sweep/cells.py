"""What a sweep is asked to do: settings from the command line or a YAML file to cells, every mistake found first.

A cell is one press at one ratio (or budget) under one protocol. Knows model arguments. Does not know models or tasks.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from lm_eval.utils import simple_parse_args_string

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.arguments import parse_arguments
from lm_eval_kvpress.presses.arguments import BUDGET, RATIO
from lm_eval_kvpress.presses.decoding import split_name
from lm_eval_kvpress.presses.parse import parse_press, press_argument_names
from lm_eval_kvpress.presses.suggest import near

SWEPT = {"press": "presses", RATIO: "ratios", BUDGET: "budgets", "stream_budget": "budgets"}
"""Model arguments that the cells differ in, and the setting that lists them."""

WRITTEN = ("throughput_log", "stream_output", "metrics_port")
"""Model arguments that name files or ports: every cell writes into its own folder."""


@dataclass(frozen=True)
class Cell:
    """One press at one size under one protocol.

    Attributes:
        name: also of its folder.
        arguments: its own model arguments.
    """

    name: str
    arguments: Mapping[str, Any]

    @property
    def protocol(self) -> tuple[tuple[str, Any], ...]:
        """Cells of one protocol ask for the same windows of the same contexts."""
        return tuple((key, self.arguments[key]) for key in ("rolling", "query_tokens") if key in self.arguments)


@dataclass(frozen=True)
class SweepSettings:
    """A sweep. The YAML file has the same keys, and the command line the same names.

    Attributes:
        tasks: names of tasks and groups.
        output_path: folder of the sweep; a killed sweep goes on from it.
        model: ``pythia-kvpress`` or ``kvpress``.
        model_args: what all cells share, such as ``pretrained`` and ``dtype``.
        presses: names, or mappings of ``press`` and its arguments.
        ratios: fractions removed; presses that take none have one cell.
        budgets: tokens kept, instead of ratios; with ``rolling=stream`` the budget of the stream.
        rolling, query_tokens: protocols; one cell for each. Empty is what `model_args` or the defaults say.
        batch_size, max_batch_size, device, num_fewshot, limit, gen_kwargs, metadata, include_path, seed: as lm-eval's.
        launcher: where cells run; ``local`` is this process.
    """

    tasks: list[str]
    output_path: str
    presses: list[Any]
    model: str = "pythia-kvpress"
    model_args: dict[str, Any] = field(default_factory=dict)
    ratios: list[float] = field(default_factory=list)
    budgets: list[int] = field(default_factory=list)
    rolling: list[str] = field(default_factory=list)
    query_tokens: list[int] = field(default_factory=list)
    batch_size: int | str = 1
    max_batch_size: int = 64
    device: str | None = None
    num_fewshot: int | None = None
    limit: float | None = None
    gen_kwargs: dict[str, Any] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    include_path: str | None = None
    seed: int = 1234
    launcher: str = "local"

    @property
    def shared(self) -> dict[str, Any]:
        """The settings that may not change between two calls in one folder. More cells may be added."""
        varies = ("presses", "ratios", "budgets", "rolling", "query_tokens", "output_path", "launcher")
        own = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in varies}
        return own | {"batch_size": None, "max_batch_size": None}  # which change no result

    def cells(self) -> list[Cell]:
        """The product of presses, sizes and protocols.

        Raises:
            UsageError: for a cell that cannot be run, naming it.
        """
        cells = dict[str, Cell]()
        protocols = itertools.product(
            [{"rolling": value} for value in self.rolling] or [{}],
            [{"query_tokens": value} for value in self.query_tokens] or [{}],
        )
        for rolling, query in protocols:
            for press in self.presses:
                for arguments in self._of_press(press, {**rolling, **query}):
                    cell = Cell(_name(arguments), arguments)
                    self._check(cell)
                    cells[cell.name] = cell
        if not cells:
            raise UsageError("nothing to run: rolling=stream needs a press, and none is the only one in presses")
        return list(cells.values())

    def _of_press(self, press: Any, protocol: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        own = {"press": press} if isinstance(press, str) else dict(press)
        if "press" not in own:
            raise UsageError(f"presses: {json.dumps(press)} has no key 'press'")
        name = str(own["press"])
        try:
            prefill, decoding = split_name(name)
            press_arguments = press_argument_names(prefill) & own.keys()
            spec = parse_press(prefill, {key: own[key] for key in press_arguments})
        except UsageError as error:
            raise UsageError(f"presses: {error}") from error
        sizes: list[dict[str, Any]]
        streams = protocol.get("rolling", self.model_args.get("rolling")) == "stream"
        if streams and spec.is_none and decoding is None:
            return  # a stream without a press has no budget
        if streams:
            sizes = [{"stream_budget": budget} for budget in self.budgets]
            if not sizes:
                raise UsageError("rolling=stream keeps a budget: give --budgets")
        else:
            sizes = [{RATIO: ratio} for ratio in self.ratios] + [{BUDGET: budget} for budget in self.budgets]
        is_sized = bool({RATIO, BUDGET} & own.keys()) or RATIO not in spec.arguments
        for size in [{}] if is_sized and not streams else sizes or [{}]:
            yield {**own, **size, **protocol}

    def _check(self, cell: Cell) -> None:
        try:
            parse_arguments({**self.of_model, **cell.arguments})
        except UsageError as error:
            raise UsageError(f"cell {cell.name}: {error}") from error

    def as_typed(self) -> dict[str, Any]:
        """All settings, ready for JSON and for ``--config``."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @property
    def of_model(self) -> dict[str, Any]:
        """The model arguments that all cells share, but ``pretrained``."""
        return {key: value for key, value in self.model_args.items() if key != "pretrained"}


def _name(arguments: Mapping[str, Any]) -> str:
    parts = [str(arguments["press"]), *(f"{key}={value}" for key, value in arguments.items() if key != "press")]
    return "_".join(parts).replace(":", ".").replace("/", ".")


def parse_settings(argv: Sequence[str]) -> SweepSettings:
    """Settings from the command line, over those of ``--config FILE.yaml``.

    Raises:
        UsageError: for an unknown key, a missing one, or a value of the wrong kind.
    """
    given = {key: value for key, value in vars(_parser().parse_args(argv)).items() if value is not None}
    file = given.pop("config", None)
    merged = {**(_read(Path(file)) if file else {}), **given}
    known = [item.name for item in fields(SweepSettings)]
    for key in merged:
        if key not in known:
            raise UsageError(f"unknown setting '{key}': {near(key, known)}settings are {', '.join(known)}")
    missing = [key for key in ("tasks", "presses", "output_path") if not merged.get(key)]
    if missing:
        raise UsageError(f"a sweep needs {', '.join(missing)}: see lm-eval-kvpress sweep --help")
    settings = SweepSettings(**{key: _converted(key, value) for key, value in merged.items() if value is not None})
    if settings.include_path is not None and not Path(settings.include_path).is_dir():
        raise UsageError(f"include_path={settings.include_path}: there is no such folder")
    for key in settings.model_args:
        if key in SWEPT:
            raise UsageError(f"model_args: {key} is what a sweep varies: give it under {SWEPT[key]}")
        if key in WRITTEN:
            raise UsageError(f"model_args: leave {key} out; every cell of a sweep writes into its own folder")
    return settings


def _read(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text())
    except OSError as error:
        raise UsageError(f"--config {file}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"--config {file} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UsageError(f"--config {file} must hold settings by name, such as 'presses: [none, snapkv]'")
    return content


def _converted(key: str, value: Any) -> Any:
    """A value as typed, or as YAML has it, to the kind that the setting has."""
    if key in ("model_args", "gen_kwargs", "metadata"):
        return _mapping(key, value)
    if key in ("tasks", "presses", "ratios", "budgets", "rolling", "query_tokens"):
        items = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
        if isinstance(value, str) and not any(items):  # an empty variable of a shell; a file may say []
            raise UsageError(f"{key}: {value!r} names none: leave it out for the default")
        kinds = {"ratios": float, "budgets": int, "query_tokens": int}
        return [_number(key, item, kinds[key]) if key in kinds else item for item in items if item != ""]
    if key == "launcher" and value not in LAUNCHERS:
        raise UsageError(f"launcher={value} is not known: choose one of {', '.join(LAUNCHERS)}")
    if key == "batch_size":
        return value if value == "auto" else _number(key, value, int)
    kinds = {"num_fewshot": int, "limit": float, "seed": int, "max_batch_size": int}
    return _number(key, value, kinds[key]) if key in kinds else value


LAUNCHERS = ("local",)


def _number(key: str, value: Any, kind: type) -> Any:
    try:
        number = kind(value)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{key}: {value!r} is no {'whole ' if kind is int else ''}number") from error
    if isinstance(value, bool) or number != float(value):
        raise UsageError(f"{key}: {value!r} is no {'whole ' if kind is int else ''}number")
    return number


def _mapping(key: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    try:
        parsed = json.loads(value) if str(value).lstrip().startswith("{") else simple_parse_args_string(str(value))
    except ValueError as error:
        raise UsageError(f"{key}: give NAME=VALUE,... or a JSON object, not {value!r}") from error
    assert isinstance(parsed, dict)
    return parsed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lm-eval-kvpress sweep",
        description="Evaluate many presses and ratios in one run, from one prefill, resumably.",
        epilog="A killed sweep goes on with the same command. Then: lm-eval-kvpress report DIR -o report.html",
    )
    lists = "comma-separated"
    parser.add_argument("--config", metavar="FILE.yaml", help="settings by these names; the command line comes first")
    parser.add_argument("--model", help="pythia-kvpress (default) or kvpress")
    parser.add_argument("--model_args", help="what all cells share: pretrained=...,dtype=...")
    parser.add_argument("--presses", help=f"{lists}; include none, the baseline")
    parser.add_argument("--ratios", help=f"{lists} fractions removed")
    parser.add_argument("--budgets", help=f"{lists} tokens kept, instead of ratios; what rolling=stream needs")
    parser.add_argument("--rolling", help=f"{lists} protocols of perplexity tasks: prefix, one_pass, stream")
    parser.add_argument("--query_tokens", help=f"{lists} numbers of held-back tokens")
    parser.add_argument("--tasks", help=lists)
    parser.add_argument("--output_path", metavar="DIR", help="folder of the sweep")
    for name in ("batch_size", "max_batch_size", "device", "num_fewshot", "limit", "gen_kwargs", "metadata"):
        parser.add_argument(f"--{name}", help="as lm-eval's")
    parser.add_argument("--include_path", metavar="DIR", help="more tasks, as lm-eval's")
    parser.add_argument("--seed", help="of torch, as lm-eval's third (default 1234)")
    parser.add_argument("--launcher", help=f"where cells run: {', '.join(LAUNCHERS)}")
    return parser
