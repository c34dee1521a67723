"""The list of presses, made of the catalog: what ``lm-eval-kvpress presses`` and docs/presses.md show of each."""

from __future__ import annotations

from typing import Any

from lm_eval_kvpress.press_list import PressInfo
from lm_eval_kvpress.presses.arguments import BUDGET, DEFAULT_RATIO, RATIO, arguments_of
from lm_eval_kvpress.presses.catalog import REQUIRED, ROWS, Row
from lm_eval_kvpress.presses.decoding import DECODING_PRESSES, DEFAULT_INTERVAL
from lm_eval_kvpress.presses.names import DECODING, NONE, PREFILL_DECODING, ParsedName, why_not_wrapped
from lm_eval_kvpress.presses.statistics import STATISTICS
from lm_eval_kvpress.presses.unsupported import UNSUPPORTED


def list_presses() -> list[PressInfo]:
    """List every press of kvpress: those that run here, then those that do not, with the reason."""
    none = PressInfo(NONE, {}, "", "", True)
    decoding = [_decoding_info(f"{DECODING}:PRESS"), _decoding_info(f"{PREFILL_DECODING}:PREFILL+PRESS")]
    unsupported = [
        PressInfo(name, {}, press.reason, press.paper, False)
        for name, press in UNSUPPORTED.items()
        if name not in (DECODING, PREFILL_DECODING)
    ]
    return [none, *map(_info, ROWS.values()), *decoding, *unsupported]


def _decoding_info(name: str) -> PressInfo:
    arguments = {"target_size": REQUIRED, "compression_interval": DEFAULT_INTERVAL}
    needs = f"acts while text is generated; PRESS is one of {', '.join(DECODING_PRESSES)}"
    return PressInfo(name, arguments, needs, "", True)


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
