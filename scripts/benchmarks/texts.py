"""Real text for the benchmarks: the stories of the demo tasks. Knows no model and no press."""

from __future__ import annotations

import itertools

from transformers import PreTrainedTokenizerBase

from scripts.machine import ROOT

STORIES = ROOT / "tasks" / "demo" / "stories"


def story_text() -> str:
    """All stories, one after the other."""
    return "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(STORIES.glob("*.txt")))


class Text:
    """The stories as one ring of tokens from which pieces of a wanted length are cut, each beginning with a word."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._ids = tokenizer, tokenizer.encode(story_text())
        tokens = tokenizer.convert_ids_to_tokens(self._ids)
        self._starts = [place for place, token in enumerate(tokens) if token.startswith("Ġ")]

    def piece(self, number: int, num_tokens: int) -> str:
        """The ``number``-th piece; it begins with a space and encodes to ``num_tokens``, give or take a cut word."""
        start = self._starts[number * 997 % len(self._starts)]
        return self._tokenizer.decode(list(itertools.islice(itertools.cycle(self._ids), start, start + num_tokens)))
