"""Presses that act while text is generated: ``decoding:PRESS`` and ``prefill_decoding:PREFILL+PRESS``.

Knows press names and arguments. Does not know models or text. The engine's `decode_budget` does what is specified here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.presses.arguments import BUDGET, RATIO
from lm_eval_kvpress.presses.names import DECODING, NONE, PREFILL_DECODING
from lm_eval_kvpress.presses.parse import parse_press
from lm_eval_kvpress.presses.spec import PressSpec

DECODING_PRESSES = ("knorm", "keydiff", "tova", "streaming_llm", "snapkv")
"""Presses that can choose again and again on a cache whose tokens were fed long ago, from the newest tokens' hidden
states. Not among them: expected_attention, which takes the number of hidden states for a position; lagkv, which falls
back below its partitions; random, whose draws would depend on the batch."""

DEFAULT_INTERVAL = 128
"""Tokens produced between two compressions."""


@dataclass(frozen=True)
class DecodingSpec:
    """A press that holds a budget while tokens are produced.

    Attributes:
        press: what scores the entries, set to keep ``target_size``.
        target_size: entries that every layer of every row keeps.
        interval: tokens produced between two compressions.
    """

    press: PressSpec
    target_size: int
    interval: int

    def describe(self) -> dict[str, Any]:
        """Return its arguments, for the record; JSON can hold it."""
        arguments = {name: value for name, value in self.press.arguments.items() if name != BUDGET}
        return {**arguments, "target_size": self.target_size, "compression_interval": self.interval}


def split_name(name: str) -> tuple[str, str | None]:
    """Split a name into the press of the prefill and the one that acts while decoding, if there is one.

    Raises:
        UsageError: one line, for half a name.
    """
    first, _, rest = name.partition(":")
    if first == DECODING:
        if not rest:
            raise UsageError("press=decoding wraps another press, as in decoding:knorm")
        return NONE, rest
    if first != PREFILL_DECODING:
        return name, None
    prefill, plus, decoding = rest.rpartition("+")
    if not (prefill and plus and decoding):
        raise UsageError(f"press={name}: give two presses, as in prefill_decoding:snapkv+knorm")
    return prefill, decoding


def split_arguments(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split arguments into those of the prefill's press and of the decoding one, written ``decoding.n_sink=8``."""
    prefix = f"{DECODING}."
    decoding = {key.removeprefix(prefix): value for key, value in arguments.items() if key.startswith(prefix)}
    return {key: value for key, value in arguments.items() if not key.startswith(prefix)}, decoding


def parse_decoding(
    prefill: PressSpec, name: str, arguments: Mapping[str, Any], target_size: int | None, interval: int | None
) -> DecodingSpec:
    """Check a decoding press.

    Args:
        prefill: the press of the prefill.
        name, arguments: the decoding press.
        target_size: entries that every layer keeps.
        interval: tokens produced between two compressions; None is the default.

    Raises:
        UsageError: one line that says what is wrong and what to do.
    """
    if target_size is None:
        raise UsageError(f"press=decoding:{name} needs target_size=N, the entries that every layer keeps")
    if {RATIO, BUDGET} & arguments.keys():
        raise UsageError("a decoding press keeps target_size entries: leave decoding.compression_ratio out")
    if prefill.masks:
        raise UsageError(
            f"press={prefill.name} hides entries head by head, which a decoding press cannot evict: use another one"
        )
    interval = interval or DEFAULT_INTERVAL
    spec = parse_press(name, {**arguments, BUDGET: target_size})
    if spec.name not in DECODING_PRESSES:
        raise UsageError(
            f"press=decoding:{spec.name} cannot compress one cache again and again: use one of "
            f"{', '.join(DECODING_PRESSES)}"
        )
    _check_sizes(spec, target_size, interval)
    return DecodingSpec(spec, target_size, interval)


def _check_sizes(spec: PressSpec, target_size: int, interval: int) -> None:
    """Refuse a budget that leaves nothing to choose, and an interval that is shorter than the press's window."""
    window, sinks = spec.arguments.get("window_size", 0), spec.arguments.get("n_sink", 0)
    if interval <= window:
        raise UsageError(
            f"compression_interval={interval} must exceed the window_size={window} of decoding:{spec.name}: raise it, "
            f"or pass decoding.window_size={max(1, interval - 1)}"
        )
    if target_size <= window + sinks:
        raise UsageError(
            f"target_size={target_size} is all that decoding:{spec.name} always keeps ({window + sinks}): raise it"
        )
