"""Statistics of a model belong to its weights and its config: whose they are, and the refusal of those of others.

Knows a press that reads statistics, and the checksums of weights and config. Does not know how statistics are taken.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.identity import config_fingerprint, weights_fingerprint
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.spec import PressSpec
from lm_eval_kvpress.presses.statistics import Statistics, tensors_for

ARGUMENTS = "arguments"
"""Of a file's metadata: those of the press that its statistics depend on, as JSON. Files may lack it."""


def identity_of_model(model: PressableModel) -> dict[str, str]:
    """What tells a model from others: dtype and checksums, in the basis in which it is used."""
    with model.in_use():
        return {
            "dtype": str(model.model.dtype).removeprefix("torch."),
            "weights": weights_fingerprint(model.model),
            "config": config_fingerprint(model.model),
        }


def check_statistics(press: PressSpec, model: PressableModel) -> None:
    """Refuse a press with the statistics of another model. Published ones do not say whose they are: shapes must do.

    The same weights under another RoPE have other queries. A file without its config is not refused for it.

    Raises:
        UsageError: in one line.
    """
    statistics = press.statistics
    if statistics is None:
        return
    with model.in_use(), model.presented():
        tensors_for(statistics.press, statistics.file, model.model)
    if not statistics.metadata:
        return
    made_for = statistics.metadata.get("press", "")
    if ":" in made_for and made_for != press.name:
        raise UsageError(
            f"statistics={statistics.file} are those of press={made_for}, not {press.name}: calibrate {press.name}"
        )
    _check_arguments(press, statistics)
    own = identity_of_model(model)
    if statistics.metadata.get("dtype") != own["dtype"]:
        raise UsageError(
            f"statistics={statistics.file} were taken in {statistics.metadata.get('dtype')}, and this model is in "
            f"{own['dtype']}: calibrate it in that dtype"
        )
    if statistics.metadata.get("weights") != own["weights"]:
        raise UsageError(
            f"statistics={statistics.file} are of other weights ({statistics.metadata.get('model')}, checksum "
            f"{statistics.metadata.get('weights')}) than these (checksum {own['weights']}): calibrate this model"
        )
    if statistics.metadata.get("config", own["config"]) != own["config"]:
        raise UsageError(
            f"statistics={statistics.file} are of these weights under another config.json (checksum "
            f"{statistics.metadata.get('config')}, this one {own['config']}), another RoPE for instance: calibrate "
            "this model"
        )


def _check_arguments(press: PressSpec, statistics: Statistics) -> None:
    """Refuse statistics of the same press with other arguments: under ``lukv``, of other scores."""
    theirs = json.loads(statistics.metadata.get(ARGUMENTS, "{}"))
    ours = {name: press.arguments.get(name, value) for name, value in theirs.items()}
    if differing := [name for name in theirs if ours[name] != theirs[name]]:
        raise UsageError(
            f"statistics={statistics.file} are those of press={press.name} with {_typed(theirs, differing)}, and this "
            f"one has {_typed(ours, differing)}: give it {_typed(theirs, differing)}, or calibrate "
            f"{press.name},{_typed(ours, ours)}"
        )


def _typed(arguments: Mapping[str, Any], names: Iterable[str]) -> str:
    return ",".join(f"{name}={arguments[name]}" for name in names)


def hashes_of_statistics(presses: Iterable[PressSpec]) -> dict[str, str]:
    """By file, the hash of the statistics that presses read."""
    found = (press.statistics for press in presses)
    return {f"statistics {item.file}": item.sha256 for item in found if item is not None}
