"""The documents that lm-eval's ``--samples`` chooses.

lm-eval asks them in the order of the data set, whatever the order of the list, and looks their ids up by the list's: of
a list that is not sorted, or repeats a document, its samples name others than were asked. Imports nothing.
"""

from __future__ import annotations

from collections.abc import Iterable


def in_order(samples: Iterable[int]) -> list[int]:
    """The chosen documents, each once, in the order in which lm-eval asks them."""
    return sorted(set(samples))
