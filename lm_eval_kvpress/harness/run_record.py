"""The facts of a run for lm-eval's results file: what was asked, what was measured, with which versions.

Knows settings and sums; of a model only where and in what it computes. Does not know requests or lm-eval.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from lm_eval_kvpress.harness.machine import machine, machine_name
from lm_eval_kvpress.harness.ranks import RankFacts
from lm_eval_kvpress.harness.settings import Settings
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.records.timings import RunLabels

_QUESTION = ("question_pattern", "question_field")


def asked(settings: Settings, max_length: int) -> dict[str, Any]:
    """The press and the protocol that the user asked for."""
    context, score_tokens = settings.rolling_window(max_length) if settings.rolling == "prefix" else (None, None)
    of_streams = ("stream_budget", "stream_chunk", "stream_positions") if settings.rolling == "stream" else ()
    return {
        "press": settings.describe_press(),
        "quantization": None if settings.quantization is None else settings.quantization.describe(),
        "protocol": {
            "query_tokens": settings.query_tokens,
            "query_aware": settings.query_aware,
            **{name: getattr(settings, name) for name in _QUESTION if getattr(settings, name) is not None},
            "rolling": settings.rolling,
            "rolling_context": context,
            "rolling_score": score_tokens,
            "short_context": settings.short_context,
            **{name: getattr(settings, name) for name in of_streams},
            "max_length": max_length,
            "press_acts_on_rolling": settings.acts_on_rolling,
        },
    }


def labels(settings: Settings, max_length: int, name: str, model: PressableModel) -> RunLabels:
    """Name a new run, for each of its throughput records.

    Args:
        name: of the checkpoint.
        model: loaded from it.
    """
    facts = asked(settings, max_length)
    return RunLabels(
        run=uuid.uuid4().hex[:12],
        model=name,
        press=facts["press"]["name"],
        arguments=_as_typed({**facts["press"]["arguments"], **(facts["quantization"] or {})}),
        protocol=_as_typed(facts["protocol"]),
        device=str(model.device),
        dtype=str(model.model.dtype).removeprefix("torch."),
        machine=machine_name(machine(model.device), model.device),
    )


def _as_typed(arguments: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in arguments.items() if value is not None)


def measured(facts: RankFacts, machine_name: str) -> dict[str, Any]:
    """What was kept, scored and timed, and by how many processes.

    Args:
        machine_name: whose times the speeds are made of.
    """
    return {
        "num_ranks": facts.num_ranks,
        "decoding_steps": facts.records.decoding_steps() or None,
        "tasks": {task: totals.summary() for task, totals in facts.totals.items()},
        "throughput": facts.records.on(machine_name).summary(),
    }


def versions() -> dict[str, str]:
    """Of this package and of those on which answers depend."""
    return {name: version(name) for name in ("lm-eval-kvpress", "torch", "transformers", "kvpress", "lm_eval")}
