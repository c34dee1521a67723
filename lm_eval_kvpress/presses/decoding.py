"""Presses that act while text is generated: ``decoding:PRESS`` and ``prefill_decoding:PREFILL+PRESS``.

Knows press names and arguments. Does not know models or text. `decode_press` does what is specified here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.presses.catalog import DEFAULT_INTERVAL, STANDING
from lm_eval_kvpress.presses.names import DECODING, NONE, PREFILL_DECODING
from lm_eval_kvpress.presses.spec import BUDGET, RATIO, PressSpec, parse_press


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
        """For the record; JSON can hold it."""
        arguments = {name: value for name, value in self.press.arguments.items() if name != BUDGET}
        return {**arguments, "target_size": self.target_size, "compression_interval": self.interval}


def split_name(name: str) -> tuple[str, str | None]:
    """The press of the prefill, and the one that acts while decoding, if there is one.

    Raises:
        UsageError: one line, for half a name.
    """
    head, _, rest = name.partition(":")
    if head == DECODING:
        if not rest:
            raise UsageError("press=decoding wraps another press, as in decoding:knorm")
        return NONE, rest
    if head != PREFILL_DECODING:
        return name, None
    prefill, plus, decoding = rest.rpartition("+")
    if not (prefill and plus and decoding):
        raise UsageError(f"press={name}: give two presses, as in prefill_decoding:snapkv+knorm")
    return prefill, decoding


def split_arguments(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the prefill's press and of the decoding one, which are written ``decoding.n_sink=8``."""
    prefix = f"{DECODING}."
    of_decoding = {key.removeprefix(prefix): value for key, value in arguments.items() if key.startswith(prefix)}
    return {key: value for key, value in arguments.items() if not key.startswith(prefix)}, of_decoding


def parse_decoding(
    prefill: PressSpec, name: str, arguments: Mapping[str, Any], target_size: int | None, interval: int | None
) -> DecodingSpec:
    """Checks a decoding press.

    Args:
        prefill: the press that the cache comes from.
        arguments: of the decoding press.

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
    if spec.name not in STANDING:
        raise UsageError(
            f"press=decoding:{spec.name} is not defined on a cache that is compressed again and again: use one of "
            f"{', '.join(STANDING)}"
        )
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
    return DecodingSpec(spec, target_size, interval)
