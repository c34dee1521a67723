"""lm-eval's generation arguments to what the engine needs, and generated token ids to the answer.

Knows ``HFLM``, its tokenizer and its generation config. Does not know caches or presses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from transformers import PreTrainedTokenizerBase

from lm_eval_kvpress.engine.outcomes import GenerationSettings
from lm_eval_kvpress.engine.sampling import check_options
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.generation_config import effective_options
from lm_eval_kvpress.presses.values import parse_value

logger = logging.getLogger("lm_eval_kvpress")


def generation_settings(
    lm: HFLM, gen_kwargs: dict[str, Any]
) -> tuple[GenerationSettings, Callable[[Sequence[int]], str]]:
    """How to continue prompts, and what makes the answer of the new tokens.

    Under ``ignore_eos`` nothing but ``max_gen_toks`` ends a text; its answer is cut where it would have ended.

    Args:
        gen_kwargs: of one request, as lm-eval passes them on.

    Raises:
        UsageError: for an argument that is not supported, or so many new tokens that no prompt fits.
    """
    given = dict(normalize_gen_kwargs(gen_kwargs, lm.max_gen_toks))
    ignores_eos = parse_value("ignore_eos", bool, given.pop("ignore_eos", False))
    if lm.eot_token_id is None:
        raise UsageError("the tokenizer has no EOS, at which texts would end: choose tasks that score, or another one")
    eos = lm.tok_decode([lm.eot_token_id], skip_special_tokens=False)
    until: list[str] = handle_stop_sequences(given.pop("until", None), eos=eos)
    asked = given.pop("max_gen_toks")
    options = effective_options(lm.model.generation_config, given)
    max_new_tokens = options.pop("max_new_tokens", asked)
    if max_new_tokens != asked:
        logger.warning(
            "the checkpoint's generation_config.json says max_new_tokens=%d, which transformers puts before "
            "max_gen_toks=%d: texts end there",
            *(max_new_tokens, asked),
        )
    if not 1 <= max_new_tokens < lm.max_length:
        raise UsageError(
            f"max_gen_toks={max_new_tokens} must be at least 1 and leave room for a prompt within the "
            f"{lm.max_length} tokens of max_length"
        )
    check_options(options, lm.model.config.vocab_size)
    stop_ids, stopped = frozenset([lm.eot_token_id, *options["eos_token_id"]]), StopStrings(lm.tokenizer, until)
    if not ignores_eos:
        settings = GenerationSettings(options, max_new_tokens, stop_ids, stopped, tuple(until))
        return settings, lambda ids: answer_text(lm, ids, until)
    settings = GenerationSettings(options, max_new_tokens, frozenset(), StopStrings(lm.tokenizer, ()))
    return settings, lambda ids: answer_text(lm, ids[: num_until_end(ids, stop_ids, stopped)], until)


def num_until_end(ids: Sequence[int], stop_ids: frozenset[int], stopped: StopStrings) -> int:
    """How many of the new tokens there would be if a text ended at a token id or a stop string."""
    whole = torch.tensor([list(ids)])
    ends = (num for num in range(1, len(ids) + 1) if ids[num - 1] in stop_ids or stopped(whole[:, :num])[0])
    return next(ends, len(ids))


def answer_text(lm: HFLM, ids: Sequence[int], until: list[str]) -> str:
    """The text of generated ids, without thinking and without what follows a stop string, as stock ``HFLM`` cuts it."""
    ids, end = list(ids), lm.think_end_token
    if isinstance(end, int):
        after = len(ids) - ids[::-1].index(end) if end in ids else 0
        text = lm.tok_decode(ids[after:]).lstrip()
    else:
        text = lm.tok_decode(ids)
    return postprocess_generated_text(text, stop=until, think_end_token=end if isinstance(end, str) else None)


class StopStrings:
    """Whether the text of the newest tokens holds a stop string; decodes the batch once for all of them.

    Looks back two tokens more than the longest stop string encodes to, since a string can come out in another
    tokenization than its own (as lm-eval's ``MultiTokenEOSCriteria`` does).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, until: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._until = [stop for stop in until if stop]
        lengths = [len(tokenizer.encode(stop, add_special_tokens=False)) for stop in self._until]
        self._num_back = max(lengths, default=0) + 2

    def __call__(self, new_tokens: torch.Tensor) -> list[bool]:
        if not self._until:
            return [False] * len(new_tokens)
        texts = self._tokenizer.batch_decode(new_tokens[:, -self._num_back :])
        return [any(stop in text for stop in self._until) for text in texts]
