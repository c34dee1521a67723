"""Speeds of a results file that rest on enough to be shown.

A rate over one batch of 29 tokens is the noise of a machine, not the speed of a press, and all requests of a batch wait
together. A rate is shown if it has `MIN_BATCHES` batches and `MIN_TOKENS` tokens after warm-up, a median if it has
`MIN_VALUES` requests of as many batches, and either only with its interval and the name of the machine. Batches of a
run that had nothing but warm-up are none. Knows the record's parts alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm_eval_kvpress.report.cell import Speed
from lm_eval_kvpress.report.metric_values import number

MIN_BATCHES = 5
MIN_TOKENS = 200
MIN_VALUES = 5
PHASES = {"prefill_tokens_per_sec": "prefill", "score_tokens_per_sec": "score", "decode_tokens_per_sec": "decode"}
LATENCIES = {"ttft_sec": "prefill", "tpot_sec": "decode"}
"""Median -> the phase whose batches it was taken from."""


def parse_speed(throughput: Mapping[str, Any], machine: Mapping[str, Any] | None) -> Speed:
    """The speeds of a run; what rests on too little is None, and named in ``withheld``."""
    rates = {name: throughput.get(phase) or {} for name, phase in PHASES.items()}
    medians = {name: throughput.get(name) or {} for name in LATENCIES}
    enough = {name: _is_enough(part, num_batches=MIN_BATCHES, num_tokens=MIN_TOKENS) for name, part in rates.items()}
    enough |= {
        name: _is_enough(medians[name], num_values=MIN_VALUES)
        and _is_enough(throughput.get(phase) or {}, num_batches=MIN_BATCHES)
        for name, phase in LATENCIES.items()
    }
    found = {name: _with_bounds(part, "tokens_per_sec") for name, part in rates.items()}
    found |= {name: _with_bounds(part, "p50") for name, part in medians.items()}
    warm = set(throughput.get("includes_warmup") or ())
    enough = {name: one and not warm & {name, PHASES.get(name)} for name, one in enough.items()}
    shown = {name: one for name, one in found.items() if one is not None and enough[name] and machine}
    return Speed(
        **{name: value for name, (value, _) in shown.items()},
        peak_memory_bytes=number(throughput.get("peak_memory_bytes")),
        bounds=tuple((name, bounds) for name, (_, bounds) in shown.items()),
        withheld=tuple(name for name in found if name not in shown and (rates | medians)[name]),
        machine=_described(machine) if machine else None,
    )


def _is_enough(part: Mapping[str, Any], **least: int) -> bool:
    return all((number(part.get(name)) or 0) >= count for name, count in least.items())


def _with_bounds(part: Mapping[str, Any], name: str) -> tuple[float, tuple[float, float]] | None:
    values = [number(part.get(key)) for key in (name, f"{name}_low", f"{name}_high")]
    value, low, high = values
    return None if value is None or low is None or high is None else (value, (low, high))


def _described(machine: Mapping[str, Any]) -> str:
    """Processor, threads, memory and device in one line."""
    memory = number(machine.get("memory_bytes"))
    size = "" if memory is None else f", {memory / 2**30:.0f} GiB"
    processor = f"{machine.get('num_threads', 'unknown')} threads of {machine.get('cpu') or 'an unknown CPU'}{size}"
    return "; ".join(str(part) for part in (machine.get("gpu"), processor) if part)
