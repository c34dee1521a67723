"""What a reader of the figures must know about a press on a context of some length. `fallbacks` has the largest part.

The wording of a note does not depend on the length of the context, so that contexts can be counted by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Notes = Callable[[Mapping[str, Any], float, int, int], Iterator[str]]
"""From a press's arguments, the ratio removed, the tokens of context and the number of layers to its notes."""


def think(arguments: Mapping[str, Any], ratio: float, context_tokens: int, num_layers: int) -> Iterator[str]:
    """ThinK zeroes key channels in place."""
    changes = think_changes(arguments) or "nothing, since key_channel_compression_ratio is 0"
    yield f"think keeps every token and frees no memory; what it changes: {changes}"


def think_changes(arguments: Mapping[str, Any]) -> str:
    """What ThinK does to the entries that it keeps, all of them."""
    share = arguments["key_channel_compression_ratio"]
    return f"{share:.0%} of the key channels of every head are zeroed" if share else ""


def random(arguments: Mapping[str, Any], ratio: float, context_tokens: int, num_layers: int) -> Iterator[str]:
    """``RandomPress.score`` seeds its generator anew at every call."""
    if arguments["seed"] is not None and ratio > 0:
        yield "random with a seed keeps the same places in every layer and in every context of the same length"


def protected(
    press: str, arguments: Mapping[str, Any], names: Sequence[str], num_kept: int, context_tokens: int
) -> Iterator[str]:
    """Say that no more tokens are kept than the press protects, all of which have one score.

    Args:
        press: its name.
        names: the arguments that count the protected tokens.
        num_kept: tokens kept, at least 1.
    """
    num_protected, sizes = sum(arguments[name] for name in names), " + ".join(names)
    if num_kept < num_protected:
        yield f"{press} keeps fewer tokens than {sizes}: which of these is arbitrary"
    elif num_kept == num_protected < context_tokens:
        yield f"{press} keeps its {sizes} and no other token: none was chosen by its score"


def budget(kv_budget: int | None, context_tokens: int) -> Iterator[str]:
    """Say that the budget covers the context."""
    if kv_budget is not None and kv_budget >= context_tokens:
        yield f"kv_budget={kv_budget} covers the whole context: nothing is removed"
