"""A context in two parts: what a press compresses, and the end that is fed after it.

Knows token ids. Does not know text, presses or why the end begins where it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Context:
    """The tokens before what is scored or generated.

    Attributes:
        tokens: all of them.
        num_held_back: how many of the last ones are fed after compression. Without any, the first scored or generated
            token is predicted from the full cache.
        num_question: how many tokens of the question end the compressed part, where a press reads them there.
        is_shared: whether contexts with the same compressed part are prefilled and compressed once.
    """

    tokens: Tokens
    num_held_back: int
    # Answers are kept by the repr, each press's apart: what its protocol and the tokens determine is left out.
    num_question: int = field(default=0, repr=False)
    is_shared: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        assert 0 <= self.num_held_back <= len(self.tokens), f"{self.num_held_back} of {len(self.tokens)} held back"
        num_compressed = len(self.tokens) - self.num_held_back
        assert 0 <= self.num_question <= num_compressed, f"a question of {self.num_question} in {num_compressed}"

    @property
    def compressed(self) -> Tokens:
        """What is prefilled under the press."""
        return self.tokens[: len(self.tokens) - self.num_held_back]

    @property
    def held_back(self) -> Tokens:
        """What is fed after compression."""
        return self.tokens[len(self.tokens) - self.num_held_back :]

    def __len__(self) -> int:
        return len(self.tokens)

    def last(self, num_tokens: int) -> Context:
        """The context without its beginning: at most so many tokens, at least one of them held back if any was."""
        tokens = self.tokens[max(0, len(self.tokens) - num_tokens) :]
        num_held_back = min(self.num_held_back, len(tokens))
        num_question = min(self.num_question, len(tokens) - num_held_back)
        return replace(self, tokens=tokens, num_held_back=num_held_back, num_question=num_question)


def without_repeats(contexts: Sequence[Context]) -> tuple[list[Context], list[int]]:
    """Leave out shared contexts whose compressed part stands in one before.

    Returns:
        the contexts that must be compressed, and for each given context the place of its compressed part among them.
    """
    kept, places, seen = list[Context](), list[int](), dict[Tokens, int]()
    for context in contexts:
        place = seen.get(context.compressed, len(kept)) if context.is_shared else len(kept)
        if place == len(kept):
            kept.append(context)
        if context.is_shared:
            seen[context.compressed] = place
        places.append(place)
    return kept, places


def in_order(contexts: Sequence[Context]) -> list[int]:
    """Indices of contexts, the longest first; those that share a compressed part stand behind each other."""
    groups: dict[object, list[int]] = {}
    for index, context in enumerate(contexts):
        groups.setdefault(context.compressed if context.is_shared else index, []).append(index)
    by_length = [sorted(group, key=lambda index: -len(contexts[index])) for group in groups.values()]
    return [index for group in sorted(by_length, key=lambda group: -len(contexts[group[0]])) for index in group]


def is_first(context: Context, task: str, seen: set[tuple[str, Tokens]]) -> bool:
    """Whether no context of the task before had the same compressed part and shared it; adds this one to ``seen``."""
    key = task, context.compressed
    found = not context.is_shared or key not in seen
    seen.add(key)
    return found
