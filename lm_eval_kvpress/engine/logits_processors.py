"""transformers' logits processors by the names of their options, in the order in which ``generate`` applies them.

A processor that looks at the order or the number of tokens, such as a ban of n-grams, gets each row by itself and
without padding, so that no text depends on its batch. The others ask only which ids there are. Knows transformers'
options. Does not know where they come from, models or caches.

Source: ``GenerationMixin._get_logits_processor`` of transformers 5.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from lm_eval_kvpress.errors import UsageError

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """What a processor may need to know of its row.

    Attributes:
        context: token ids of the prompt, all of them.
        max_new_tokens: tokens to be chosen, at most.
        eos_ids: ids that end a text, by transformers' options; empty if there are none.
        options: all options.
        device: of logits and ids.
    """

    context: Sequence[int]
    max_new_tokens: int
    eos_ids: list[int]
    options: Options
    device: torch.device

    @property
    def ids(self) -> torch.Tensor:
        """The context, ``(1, N)``."""
        return torch.tensor([list(self.context)], device=self.device)

    @property
    def begin(self) -> int:
        """Number of tokens before the first one that is free to choose."""
        is_forced = len(self.context) == 1 and self.options.get("forced_bos_token_id") is not None
        return len(self.context) + is_forced


@dataclass(frozen=True)
class Option:
    """An option of ``generate`` that has a processor.

    Attributes:
        make: the processor, of the option's value and the row.
        neutral: the value that changes nothing, besides None.
        by_row: whether the processor looks at the order or the number of a row's tokens.
        of_sampling: whether greedy decoding leaves it out.
        needs_eos: whether it says something of the tokens that end a text.
    """

    make: Callable[[Any, Row], LogitsProcessor]
    neutral: Any = None
    by_row: bool = False
    of_sampling: bool = False
    needs_eos: bool = False

    def acts(self, value: Any) -> bool:
        return value is not None and value != self.neutral


OPTIONS: Mapping[str, Option] = {
    "sequence_bias": Option(lambda bias, row: SequenceBiasLogitsProcessor(bias), by_row=True),
    "encoder_repetition_penalty": Option(
        lambda penalty, row: EncoderRepetitionPenaltyLogitsProcessor(penalty, row.ids), 1.0, by_row=True
    ),
    "repetition_penalty": Option(lambda penalty, row: RepetitionPenaltyLogitsProcessor(penalty), 1.0),
    "no_repeat_ngram_size": Option(lambda size, row: NoRepeatNGramLogitsProcessor(size), 0, by_row=True),
    "encoder_no_repeat_ngram_size": Option(
        lambda size, row: EncoderNoRepeatNGramLogitsProcessor(size, row.ids), 0, by_row=True
    ),
    "bad_words_ids": Option(lambda words, row: NoBadWordsLogitsProcessor(words, row.eos_ids or None), by_row=True),
    "min_length": Option(
        lambda length, row: MinLengthLogitsProcessor(length, row.eos_ids, device=row.device),
        *(0, True),
        needs_eos=True,
    ),
    "min_new_tokens": Option(
        lambda count, row: MinNewTokensLengthLogitsProcessor(len(row.context), count, row.eos_ids, device=row.device),
        *(0, True),
        needs_eos=True,
    ),
    "forced_bos_token_id": Option(lambda id, row: ForcedBOSTokenLogitsProcessor(id), by_row=True),
    "forced_eos_token_id": Option(
        lambda ids, row: ForcedEOSTokenLogitsProcessor(len(row.context) + row.max_new_tokens, ids, device=row.device),
        by_row=True,
    ),
    "remove_invalid_values": Option(lambda _, row: InfNanRemoveLogitsProcessor(), False),
    "exponential_decay_length_penalty": Option(
        lambda decay, row: ExponentialDecayLengthPenalty(decay, row.eos_ids, len(row.context)),
        by_row=True,
        needs_eos=True,
    ),
    "suppress_tokens": Option(lambda ids, row: SuppressTokensLogitsProcessor(ids, device=row.device)),
    "begin_suppress_tokens": Option(
        lambda ids, row: SuppressTokensAtBeginLogitsProcessor(ids, row.begin, device=row.device), by_row=True
    ),
    "temperature": Option(lambda value, row: TemperatureLogitsWarper(value), 1.0, of_sampling=True),
    "top_k": Option(lambda count, row: TopKLogitsWarper(count), 0, of_sampling=True),
    "top_p": Option(lambda mass, row: TopPLogitsWarper(mass), 1.0, of_sampling=True),
    "min_p": Option(lambda share, row: MinPLogitsWarper(share), 0.0, of_sampling=True),
    "typical_p": Option(lambda mass, row: TypicalLogitsWarper(mass), 1.0, of_sampling=True),
    "epsilon_cutoff": Option(lambda least, row: EpsilonLogitsWarper(least), 0.0, of_sampling=True),
    "eta_cutoff": Option(lambda least, row: EtaLogitsWarper(least, device=row.device), 0.0, of_sampling=True),
    "renormalize_logits": Option(lambda _, row: LogitNormalization(), False),
}
"""Every option with a processor, in the order in which transformers applies them."""


def acting(options: Options) -> dict[str, Any]:
    """The options with a processor that change something, in the order in which they are applied."""
    sampling, has_eos = bool(options.get("do_sample")), bool(eos_ids(options))
    return {
        name: options[name]
        for name, option in OPTIONS.items()
        if name in options
        and option.acts(options[name])
        and (sampling or not option.of_sampling)
        and (has_eos or not option.needs_eos)
    }


def eos_ids(options: Options) -> list[int]:
    """The ids that end a text: transformers takes one or several."""
    ids = options.get("eos_token_id")
    return [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [ids]


def looks_at_rows(options: Options) -> bool:
    """Whether a processor must see the tokens of each row by themselves."""
    return any(OPTIONS[name].by_row for name in acting(options))


def processors_for(
    options: Options, context: Sequence[int], max_new_tokens: int, device: torch.device
) -> LogitsProcessorList:
    """Make the processors of one row.

    Raises:
        UsageError: for a value that transformers refuses.
    """
    row = Row(context, max_new_tokens, eos_ids(options), options, device)
    made = LogitsProcessorList()
    for name, value in acting(options).items():
        try:
            made.append(OPTIONS[name].make(value, row))
        except (ValueError, TypeError, IndexError, KeyError) as error:
            raise UsageError(f"{name}={value}: {' '.join(str(error).split())}") from error
    return made
