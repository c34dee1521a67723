"""The "did you mean" of every message about an unknown name. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def near(name: str, choices: Iterable[str]) -> str:
    """Suggest the choice that is most like a name.

    Returns:
        ``"did you mean 'snapkv'? "``, ready to be followed by what is allowed; empty if no choice is like the name.
    """
    matches = get_close_matches(name, list(choices), n=1)
    return f"did you mean '{matches[0]}'? " if matches else ""
