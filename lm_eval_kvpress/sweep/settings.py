"""The settings of a sweep, from a YAML file and the command line: every value gets the type of its field.

Does not know presses, models or tasks: `cells` checks what the cells are made of.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from lm_eval.utils import simple_parse_args_string

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.chosen_documents import in_order
from lm_eval_kvpress.presses.arguments import BUDGET, RATIO
from lm_eval_kvpress.presses.suggest import near
from lm_eval_kvpress.presses.values import parse_value

SWEPT = {"press": "presses", RATIO: "ratios", BUDGET: "budgets", "stream_budget": "budgets"}
"""Model arguments in which the cells differ -> the setting that lists them."""

WRITTEN = ("throughput_log", "stream_output", "metrics_port")
"""Model arguments that name files or ports: every cell writes into its own folder."""


OF_LMEVAL = ("batch_size", "max_batch_size", "device")
"""Settings that lm-eval's model takes as arguments too."""


OF_LAUNCH = ("launcher", "workers", "ray_address", "gpus_per_worker", "slurm")
"""Settings that say who answers, and change no answer."""


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
        rolling, query_tokens, query_aware: protocols; one cell for each. Empty is what `model_args` or the defaults
            say.
        kv_quant: how kept entries are stored; one cell for each, from the same prefills.
        fidelity: whether the full cache's predictions are computed as well, once for all cells, and compared.
        batch_size, max_batch_size, device, num_fewshot, limit, samples, gen_kwargs, metadata, include_path, seed: as
            lm-eval's, and so are the six below. ``wandb_args`` make a run of Weights & Biases per cell.
        launcher: who answers; ``local`` is this process, or with several workers processes of this machine, ``ray``
            actors of a Ray cluster, and ``submitit`` jobs of Slurm.
        workers: how many processes answer side by side, or how many shards are submitted.
        ray_address: of the Ray cluster; without it one is started on this machine.
        gpus_per_worker: that each actor of Ray gets; by default one if the cluster has any.
        slurm: parameters of the jobs, by submitit's names.
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
    query_aware: list[bool] = field(default_factory=list)
    kv_quant: list[str] = field(default_factory=list)
    fidelity: bool = False
    batch_size: int | Literal["auto"] = 1
    max_batch_size: int = 64
    device: str | None = None
    num_fewshot: int | None = None
    limit: float | None = None
    gen_kwargs: dict[str, Any] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    include_path: str | None = None
    seed: int = 1234
    samples: dict[str, Any] | None = None
    apply_chat_template: Literal[False, True] | str = False
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None
    predict_only: bool = False
    trust_remote_code: bool = False
    wandb_args: dict[str, Any] | None = None
    launcher: Literal["local", "ray", "submitit"] = "local"
    workers: int = 1
    ray_address: str | None = None
    gpus_per_worker: float | None = None
    slurm: dict[str, Any] | None = None

    @property
    def has_workers(self) -> bool:
        """Whether other processes answer, and this one asks and stores."""
        return self.workers > 1 or self.launcher != "local"

    @property
    def chats_in_turns(self) -> bool:
        """Whether few-shot examples are turns of a conversation, by lm-eval's rule."""
        return bool(self.apply_chat_template) if self.fewshot_as_multiturn is None else self.fewshot_as_multiturn

    @property
    def shared(self) -> dict[str, Any]:
        """The settings that may not change between two calls in one folder. More cells may be added."""
        protocols = ("rolling", "query_tokens", "query_aware")
        varying = (
            "presses",
            "ratios",
            "budgets",
            *protocols,
            "kv_quant",
            "output_path",
            "wandb_args",
            "fidelity",
            *OF_LAUNCH,
        )
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
    text = _read_text("--config", file)
    try:
        content = yaml.safe_load(text)
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
            raise UsageError(f"unknown setting '{key}': {near(str(key), types)}settings are {', '.join(types)}")
    missing = [key for key in ("tasks", "presses", "output_path") if not given.get(key)]
    if missing:
        raise UsageError(f"a sweep needs {', '.join(missing)}: see lm-eval-kvpress sweep --help")
    values = {key: _parse(key, types[key], value) for key, value in given.items() if value is not None}
    settings = SweepSettings(**values)
    if settings.fidelity:
        settings = replace(settings, model_args={**settings.model_args, "fidelity": True})
    _check(settings)
    if settings.samples is not None:
        settings = replace(settings, samples={task: in_order(chosen) for task, chosen in settings.samples.items()})
    return settings


def _check(settings: SweepSettings) -> None:
    if "\0" in settings.output_path:
        raise UsageError(f"output_path={settings.output_path!r} is no name of a folder")
    if settings.include_path is not None and not os.path.isdir(settings.include_path):
        raise UsageError(f"include_path={settings.include_path}: there is no such folder")
    if settings.samples is not None:
        _check_samples(settings)
    _check_launch(settings)
    if settings.fewshot_as_multiturn and not settings.apply_chat_template:
        raise UsageError("fewshot_as_multiturn needs a chat template: give --apply_chat_template too")
    if settings.wandb_args is not None and find_spec("wandb") is None:
        raise UsageError("wandb_args needs wandb: pip install wandb")
    for key in settings.model_args:
        if key in SWEPT:
            raise UsageError(f"model_args: {key} is what a sweep varies: give it under {SWEPT[key]}")
        if key in OF_LMEVAL:
            raise UsageError(f"model_args: {key} is a setting of its own, as for lm-eval's command: give it as --{key}")
        if key in WRITTEN:
            raise UsageError(f"model_args: leave {key} out; every cell of a sweep writes into its own folder")


def _check_launch(settings: SweepSettings) -> None:
    if settings.workers < 1:
        raise UsageError(f"workers={settings.workers} must be at least 1")
    for name, launcher in (("ray_address", "ray"), ("gpus_per_worker", "ray"), ("slurm", "submitit")):
        if getattr(settings, name) is not None and settings.launcher != launcher:
            raise UsageError(f"{name} is for --launcher {launcher}, and the launcher is {settings.launcher}")
    extra = {"ray": "ray", "submitit": "slurm"}.get(settings.launcher)
    if extra is not None and find_spec(settings.launcher) is None:
        raise UsageError(
            f"launcher={settings.launcher} needs {settings.launcher}: pip install 'lm-eval-kvpress[{extra}]'"
        )


def _check_samples(settings: SweepSettings) -> None:
    if settings.limit is not None:
        raise UsageError("samples and limit both choose documents: give one of them")
    for task, indices in (settings.samples or {}).items():
        places = indices if isinstance(indices, list) else [None]
        if not places or not all(type(place) is int and place >= 0 for place in places):
            raise UsageError(f"samples: {task} needs a list of whole numbers from 0 on, the documents to take")


def _read_text(argument: str, file: Path) -> str:
    """Read a file; not a pipe by name, at which reading would wait. What a shell makes of ``<(...)`` is read."""
    try:
        if file.is_fifo() and not file.is_relative_to("/dev/fd") and not file.is_relative_to("/proc"):
            raise UsageError(f"{argument} {file} is a pipe: name a file")
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{argument} {file} is no text: {error.reason}") from error
    except OSError as error:
        raise UsageError(f"{argument} {file} cannot be read: {error.strerror}") from error


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
    items = [item.strip() if isinstance(item, str) else item for item in items]
    if isinstance(value, str) and not any(items):  # an empty variable of a shell
        raise UsageError(f"{key}: {value!r} names none: leave it out for the default")
    items = [item for item in items if item != ""]
    return list(parse_value(key, kind, items)) if items else []


def _parse_mapping(key: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        value = _mapping_of_text(key, value)
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise UsageError(f"{key}={value} must be values by name")
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{key}={value} must be what JSON can hold, such as text in place of a date") from error
    return value


def _mapping_of_text(key: str, text: str) -> Any:
    """What is typed: as lm-eval has it, a JSON object or ``NAME=VALUE,...``, for samples a file with JSON too."""
    is_object = text.lstrip().startswith("{")
    if key == "samples" and not is_object:
        text, is_object = _read_text("--samples", Path(text.replace("\0", ""))), True
    try:
        return json.loads(text) if is_object else simple_parse_args_string(text)
    except ValueError as error:
        raise UsageError(f"{key}: give NAME=VALUE,... or a JSON object, not {text[:200]!r}") from error
