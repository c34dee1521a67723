"""The settings of a sweep, from a YAML file and the command line: every value gets the type of its field.

Does not know presses, models or tasks: `cells` checks what the cells are made of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from lm_eval.utils import simple_parse_args_string

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.presses.arguments import BUDGET, RATIO
from lm_eval_kvpress.presses.suggest import near
from lm_eval_kvpress.presses.values import parse_value

SWEPT = {"press": "presses", RATIO: "ratios", BUDGET: "budgets", "stream_budget": "budgets"}
"""Model arguments in which the cells differ -> the setting that lists them."""

WRITTEN = ("throughput_log", "stream_output", "metrics_port")
"""Model arguments that name files or ports: every cell writes into its own folder."""


OF_LMEVAL = ("batch_size", "max_batch_size", "device")
"""Settings that lm-eval's model takes as arguments too."""


@dataclass(frozen=True)
class SweepSettings:
    """A sweep. The YAML file has the same keys, and the command line the same names.

    Attributes:
        tasks: names of tasks and groups.
        output_path: folder of the sweep; a killed sweep goes on from it.
        model: the lm-eval model.
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
    model: Literal["pythia-kvpress", "kvpress"] = "pythia-kvpress"
    model_args: dict[str, Any] = field(default_factory=dict)
    ratios: list[float] = field(default_factory=list)
    budgets: list[int] = field(default_factory=list)
    rolling: list[str] = field(default_factory=list)
    query_tokens: list[int] = field(default_factory=list)
    batch_size: int | Literal["auto"] = 1
    max_batch_size: int = 64
    device: str | None = None
    num_fewshot: int | None = None
    limit: float | None = None
    gen_kwargs: dict[str, Any] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    include_path: str | None = None
    seed: int = 1234
    launcher: Literal["local"] = "local"

    @property
    def shared(self) -> dict[str, Any]:
        """The settings that may not change between two calls in one folder. More cells may be added."""
        varying = ("presses", "ratios", "budgets", "rolling", "query_tokens", "output_path", "launcher")
        fixed = {key: value for key, value in self.as_typed().items() if key not in varying}
        return fixed | {"batch_size": None, "max_batch_size": None}  # which change no result

    def as_typed(self) -> dict[str, Any]:
        """Return all settings, ready for JSON and for ``--config``."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


def read_settings(file: Path) -> dict[str, Any]:
    """Read the settings of a YAML file, unchecked.

    Raises:
        UsageError: if there is no such file, or it does not hold settings by name.
    """
    try:
        content = yaml.safe_load(file.read_text())
    except OSError as error:
        raise UsageError(f"--config {file}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"--config {file} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UsageError(f"--config {file} must hold settings by name, such as 'presses: [none, snapkv]'")
    return content


def parse_settings(given: Mapping[str, Any]) -> SweepSettings:
    """Check settings by name; None stands for the default.

    Raises:
        UsageError: for an unknown key, a missing one, or a value of the wrong type.
    """
    types = get_type_hints(SweepSettings)
    for key in given:
        if key not in types:
            raise UsageError(f"unknown setting '{key}': {near(key, types)}settings are {', '.join(types)}")
    missing = [key for key in ("tasks", "presses", "output_path") if not given.get(key)]
    if missing:
        raise UsageError(f"a sweep needs {', '.join(missing)}: see lm-eval-kvpress sweep --help")
    values = {key: _parse(key, types[key], value) for key, value in given.items() if value is not None}
    settings = SweepSettings(**values)
    _check(settings)
    return settings


def _check(settings: SweepSettings) -> None:
    if settings.include_path is not None and not Path(settings.include_path).is_dir():
        raise UsageError(f"include_path={settings.include_path}: there is no such folder")
    for key in settings.model_args:
        if key in SWEPT:
            raise UsageError(f"model_args: {key} is what a sweep varies: give it under {SWEPT[key]}")
        if key in OF_LMEVAL:
            raise UsageError(f"model_args: {key} is a setting of its own, as for lm-eval's command: give it as --{key}")
        if key in WRITTEN:
            raise UsageError(f"model_args: leave {key} out; every cell of a sweep writes into its own folder")


def _parse(key: str, kind: Any, value: Any) -> Any:
    """A value as typed, or as YAML has it, to the type of its field."""
    if any(get_origin(part) is dict for part in (kind, *get_args(kind))):
        return _parse_mapping(key, value)
    if get_origin(kind) is list:
        return _parse_list(key, kind, value)
    return parse_value(key, kind, value)


def _parse_list(key: str, kind: Any, value: Any) -> list[Any]:
    """Items are separated by commas; a file may give one value for a list, or an empty list."""
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    if isinstance(value, str) and not any(items):  # an empty variable of a shell
        raise UsageError(f"{key}: {value!r} names none: leave it out for the default")
    items = [item for item in items if item != ""]
    return list(parse_value(key, kind, items)) if items else []


def _parse_mapping(key: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    try:
        parsed = json.loads(value) if str(value).lstrip().startswith("{") else simple_parse_args_string(str(value))
    except ValueError as error:
        raise UsageError(f"{key}: give NAME=VALUE,... or a JSON object, not {value!r}") from error
    assert isinstance(parsed, dict)
    return parsed
