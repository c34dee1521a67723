"""Texts to token ids, as lm-eval's ``HFLM`` encodes them one by one, many in one call.

A fast tokenizer spreads a call over cores unless ``TOKENIZERS_PARALLELISM=false``, which the ``lm_eval`` command sets.
Knows an ``HFLM`` and its tokenizer. Does not know models, presses or requests.
"""

from __future__ import annotations

from collections.abc import Sequence

from lm_eval.models.huggingface import HFLM

TEXTS_PER_CALL = 512
"""A fast tokenizer returns spans and masks beside the ids: this bounds how many of them are alive."""


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
