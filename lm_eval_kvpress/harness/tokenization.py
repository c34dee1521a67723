"""Texts to token ids, as lm-eval's ``HFLM`` encodes them one by one, many in one call.

A fast tokenizer spreads a call over cores unless ``TOKENIZERS_PARALLELISM=false``, which the ``lm_eval`` command sets.
Knows an ``HFLM`` and its tokenizer. Does not know presses or requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from lm_eval.models.huggingface import HFLM

from lm_eval_kvpress.models.lend import lend
from lm_eval_kvpress.models.pressable import PressableModel

TEXTS_PER_CALL = 512
"""A fast tokenizer returns spans and masks beside the ids: this bounds how many of them are alive."""


def lend_tokenizer(model: PressableModel, tokenizer: Any) -> PressableModel:
    """A model that is presented with its tokenizer, for presses that replay a context behind a prompt."""

    @contextmanager
    def presented() -> Iterator[Any]:
        with model.presented() as own, lend(model.model, replay_tokenizer=tokenizer):
            yield own

    return replace(model, presented=presented)


def encode_all(lm: HFLM, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, as ``lm.tok_encode`` gives them: contexts and documents.

    A text that begins with the *prefix token* gets no second beginning.
    """
    return _encode(lm, texts, lm.tokenizer.decode(lm.prefix_token_id))


def encode_prompts(lm: HFLM, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt to continue, as ``lm.tok_batch_encode`` gives them to a batch of one.

    A prompt that begins with the *tokenizer's own* BOS, as chat templates write it, gets no second one, whatever the
    prefix token is. In a larger batch stock ``HFLM`` looks at the first prompt alone.
    """
    return _encode(lm, texts, lm.tokenizer.bos_token)


def _encode(lm: HFLM, texts: Sequence[str], beginning: str | None) -> list[list[int]]:
    special = {} if lm.add_bos_token is None else {"add_special_tokens": lm.add_bos_token}
    encoded: list[list[int]] = []
    for start in range(0, len(texts), TEXTS_PER_CALL):
        some = list(texts[start : start + TEXTS_PER_CALL])
        ids: list[list[int]] = lm.tokenizer(some, return_attention_mask=False, **special)["input_ids"]
        for place, text in enumerate(some):
            if beginning is not None and text.startswith(beginning):
                ids[place] = lm.tokenizer.encode(text, add_special_tokens=False)
        encoded += ids
    return encoded


def encode_pairs(lm: HFLM, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Token ids of ``(context, continuation)`` pairs, as ``TemplateLM.loglikelihood`` makes them.

    The continuation's ids are what the ids of both together have beyond those of the context alone; spaces at the end
    of the context go to the continuation.
    """
    contexts = list(dict.fromkeys(context.rstrip() for context, _ in pairs if context))
    ids_of = dict(zip(contexts, encode_all(lm, contexts), strict=True))
    wholes = iter(encode_all(lm, [context + text for context, text in pairs if context]))

    def split(context: str) -> tuple[list[int], list[int]]:
        before = ids_of[context.rstrip()]
        return before, next(wholes)[len(before) :]

    return [split(context) if context else _without_context(lm, text) for context, text in pairs]


def _without_context(lm: HFLM, text: str) -> tuple[list[int], list[int]]:
    """Take the prefix token for the context, unless the text begins with it."""
    ids: list[int] = lm.tok_encode(text, add_special_tokens=False)
    return (ids[:1], ids[1:]) if ids[:1] == [lm.prefix_token_id] else ([lm.prefix_token_id], ids)


@dataclass(frozen=True)
class Cut:
    """Where a place in a text lies among its tokens.

    Attributes:
        num_before: tokens that end at or before it.
        is_inside: whether text before it belongs to the next token.
    """

    num_before: int
    is_inside: bool


def cut_at(lm: HFLM, text: str, tokens: Sequence[int], place: int) -> Cut:
    """Cut the tokens of a text at the last token boundary at or before a place, counted in characters.

    Args:
        tokens: of the whole text, as `encode_all` gives them.
    """
    offsets = _offsets(lm, text, tokens)
    ends = [end for _, end in offsets]
    after = next((index for index, end in enumerate(ends) if end > place), None)
    if after is None or offsets[after][0] > place:  # no offsets, or white space there, which offsets may leave out
        return _cut_by_tokens(lm, text, tokens, place)
    return Cut(after, (ends[after - 1] if after else 0) < place)


def _offsets(lm: HFLM, text: str, tokens: Sequence[int]) -> list[tuple[int, int]]:
    """The first and the last place of each token; empty where the tokenizer has none for just these tokens."""
    for special in _special_tokens(lm) if lm.tokenizer.is_fast else ():
        encoded = lm.tokenizer(text, return_offsets_mapping=True, return_attention_mask=False, **special)
        if encoded["input_ids"] == list(tokens):
            return list(encoded["offset_mapping"])
    return []


def text_of_each(lm: HFLM, text: str, tokens: Sequence[int]) -> list[str]:
    """The part of a text that each of its tokens is; joined they are the text, wherever the tokenizer knows places.

    A character of several tokens is the part of the first of them. Tokens that the text does not hold, such as BOS,
    have their own names.
    """
    offsets = _offsets(lm, text, tokens)
    if not offsets:
        return [lm.tokenizer.decode([token]) for token in tokens]
    parts, done = list[str](), 0
    for token, (_, end) in zip(tokens, offsets, strict=True):
        is_special = token in lm.tokenizer.all_special_ids
        parts.append(lm.tokenizer.decode([token]) if is_special else text[done:end])
        done = max(done, end)
    return parts


def _cut_by_tokens(lm: HFLM, text: str, tokens: Sequence[int], place: int) -> Cut:
    """Cut where the tokens begin to differ from those of the text before the place, which is never too late."""
    before = [lm.tokenizer.encode(text[:place], **special) if place else [] for special in _special_tokens(lm)]
    cuts = [(_num_equal(one, tokens), one) for one in before]
    num_equal, longest = max(cuts, key=lambda cut: cut[0])
    return Cut(num_equal, num_equal < len(longest))


def _special_tokens(lm: HFLM) -> list[dict[str, bool]]:
    """How a text may have been encoded: with the tokens that the tokenizer adds, or without."""
    return [{} if lm.add_bos_token is None else {"add_special_tokens": lm.add_bos_token}, {"add_special_tokens": False}]


def _num_equal(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
