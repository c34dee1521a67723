"""The "did you mean" of every message about an unknown name. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

SAME_THING = {
    "h2o": "observed_attention",
    "heavyhitter": "observed_attention",
    "attentionsink": "streaming_llm",
    "sinks": "streaming_llm",
    "budget": "kv_budget",
    "ratio": "compression_ratio",
    "nopress": "none",
    "full": "none",
}
"""Names of papers and of other programs, plain -> ours."""

LEAST_PART = 4
"""Letters of a name that is looked for inside of others."""


def near(name: str, choices: Iterable[str]) -> str:
    """Suggest the choice that is most like a name, whether it is misspelt, a class of kvpress, or a part of it.

    Returns:
        ``"did you mean 'snapkv'? "``, ready to be followed by what is allowed; empty if no choice is like the name.
    """
    choices = list(choices)
    by_plain = {_plain(choice): choice for choice in reversed(choices)}
    plain = _plain(name).removesuffix("press") or _plain(name)
    match = SAME_THING.get(plain)
    if match not in choices:
        found = get_close_matches(plain, by_plain, n=1)
        inside = [choice for choice in choices if len(plain) >= LEAST_PART and plain in _plain(choice)]
        match = by_plain[found[0]] if found else min(inside, key=len, default=None)
    return f"did you mean '{match}'? " if match else ""


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
