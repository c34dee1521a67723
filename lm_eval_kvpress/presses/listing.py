"""The list of presses, made of the catalog: what ``lm-eval-kvpress presses`` and docs/presses.md show of each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lm_eval_kvpress.press_list import PressInfo
from lm_eval_kvpress.presses.arguments import BUDGET, DEFAULT_RATIO, RATIO, arguments_of
from lm_eval_kvpress.presses.cam import DEFAULT_MERGE_BUDGET
from lm_eval_kvpress.presses.catalog import REQUIRED, ROWS, Row
from lm_eval_kvpress.presses.decodable import ALL_HEADS, AVERAGES_HEADS, DECODING_PRESSES, MEASURED
from lm_eval_kvpress.presses.decoding import DEFAULT_DECODING_RATIO, DEFAULT_INTERVAL
from lm_eval_kvpress.presses.names import (
    ACT_WHILE_DECODING,
    CAM,
    DECODING,
    NONE,
    PREFILL_DECODING,
    RATIO_DECODING,
    ParsedName,
    why_not_wrapped,
)
from lm_eval_kvpress.presses.statistics import STATISTICS
from lm_eval_kvpress.presses.unsupported import UNSUPPORTED


def list_presses() -> list[PressInfo]:
    """List every press of kvpress: those that run here, then those that do not, with the reason."""
    none = PressInfo(NONE, {}, "", "", True)
    unsupported = [
        PressInfo(name, {}, press.reason, press.paper, False)
        for name, press in UNSUPPORTED.items()
        if name not in ACT_WHILE_DECODING
    ]
    return [none, *map(_info, ROWS.values()), *_decoding_infos(), *unsupported]


def _decoding_infos() -> Iterator[PressInfo]:
    budget, ratio = {"target_size": REQUIRED}, {"target_compression_ratio": DEFAULT_DECODING_RATIO}
    alone = f"PRESS is one of {', '.join(DECODING_PRESSES)}"
    alike = ", ".join(name for name in ALL_HEADS if name in DECODING_PRESSES)
    wrapped = (
        f"adakv may wrap them, but not {alike}, and criticalkv those that it wraps, but not {', '.join(AVERAGES_HEADS)}"
    )
    like = f"PRESS as of {DECODING}:PRESS"
    for name, sizes, needs in (
        (f"{DECODING}:PRESS", budget, f"{alone}; {wrapped}; the others: {MEASURED}"),
        (f"{RATIO_DECODING}:PRESS", ratio, f"{like}, but not lagkv"),
        (f"{CAM}:PRESS", {**budget, "merge_budget": DEFAULT_MERGE_BUDGET}, f"eager attention; {like}, but not adakv"),
        (f"{PREFILL_DECODING}:PREFILL+PRESS", budget, f"{like}, or {RATIO_DECODING}:PRESS or {CAM}:PRESS"),
    ):
        arguments = {**sizes, "compression_interval": DEFAULT_INTERVAL}
        paper = UNSUPPORTED[name.partition(":")[0]].paper
        yield PressInfo(name, arguments, f"acts while text is generated; {needs}", paper, True)


def _info(row: Row) -> PressInfo:
    name = {"composed": "composed:PRESS+think"}.get(row.name, row.name if row.wraps is None else f"{row.name}:PRESS")
    sizes: dict[str, Any] = {RATIO: DEFAULT_RATIO, BUDGET: None} if row.takes_ratio else {}
    defaults = {key: argument.default for key, argument in arguments_of(row).items()}
    needs = [f"{row.attention} attention"] if row.attention else []
    if STATISTICS in defaults:
        needs.append(f"statistics of the model, from calibrate {row.name}{'' if row.wraps is None else ':PRESS'}")
    if row.reads_question:
        needs.append("a question behind the context")
    if row.wraps is not None:
        needs.append(f"wraps {_wrapped(row)}")
    if row.name == "composed":
        needs.append("a press that removes tokens, and think")
    return PressInfo(name, {**sizes, **defaults}, "; ".join(needs), row.paper, True)


def _wrapped(row: Row) -> str:
    """What a wrapper wraps: by name, or all but some, whichever is shorter."""
    scoring = [other for other in ROWS.values() if other.scores]
    wrapped = [other.name for other in scoring if not why_not_wrapped(row, ParsedName(other))]
    others = [other.name for other in scoring if other.name not in wrapped]
    if len(wrapped) <= len(others):
        return ", ".join(wrapped)
    return f"any press that scores tokens{' but ' if others else ''}{', '.join(others)}"
