"""The requests that `evaluation` times: pieces of the stories, as lm-eval hands them to a model.

Every model is given the built-in tokenizer, whose 4,096 ids every vocabulary here has, so all sides tokenize real text,
and the same text. Does not know models or presses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lm_eval.api.instance import Instance

from scripts.benchmarks.texts import Text

NUM_CHOICES = 4
CHOICE_TOKENS = 16


@dataclass(frozen=True)
class Workload:
    """Requests of one kind.

    Attributes:
        request_type: lm-eval's name of the kind.
        instances: the requests.
        num_prompts: contexts, documents or prompts among them.
        num_new_tokens: tokens to generate per prompt; 0 where nothing is generated.
    """

    request_type: str
    instances: tuple[Instance, ...]
    num_prompts: int
    num_new_tokens: int = 0


def choice(text: Text, lengths: Sequence[int], choice_tokens: Sequence[int]) -> Workload:
    """Contexts of the given lengths, each with four continuations, the n-th of ``choice_tokens[n]`` tokens."""

    def pairs() -> Iterator[tuple[str, str]]:
        for number, length in enumerate(lengths):
            context = text.piece(number, length)
            for place, num_tokens in enumerate(choice_tokens):
                yield context, text.piece(1_000 + number * len(choice_tokens) + place, num_tokens)

    return _workload("loglikelihood", list(pairs()), len(lengths))


def rolling(text: Text, num_documents: int, num_tokens: int) -> Workload:
    documents = [(text.piece(number, num_tokens),) for number in range(num_documents)]
    return _workload("loglikelihood_rolling", documents, num_documents)


def generation(text: Text, num_prompts: int, num_new_tokens: int) -> Workload:
    """Prompts of 100 to 400 tokens, no two of one length; a single one has 250."""
    step = 300 / max(1, num_prompts - 1)
    lengths = [250] if num_prompts == 1 else [100 + int(step * (7 * n % num_prompts)) for n in range(num_prompts)]
    options = {"until": [], "max_gen_toks": num_new_tokens, "do_sample": False, "temperature": 0.0}
    prompts = [(text.piece(number, length), options) for number, length in enumerate(lengths)]
    return _workload("generate_until", prompts, num_prompts, num_new_tokens)


def _workload(request_type: Any, arguments: Sequence[tuple[Any, ...]], num_prompts: int, new: int = 0) -> Workload:
    instances = (Instance(request_type, {}, args, 0, ("bench", doc, 1)) for doc, args in enumerate(arguments))
    return Workload(request_type, tuple(instances), num_prompts, new)


WORKLOADS: dict[str, Callable[[Text], Workload]] = {
    **{
        f"choice-{length}": partial(choice, lengths=[length] * 4, choice_tokens=[CHOICE_TOKENS] * NUM_CHOICES)
        for length in (200, 800, 1600)
    },
    "qa-short": partial(choice, lengths=[26 + 3 * (5 * n % 13) for n in range(32)], choice_tokens=(2, 4, 8, 14)),
    "rolling": partial(rolling, num_documents=1, num_tokens=8_000),
    **{f"generate-64x{size}": partial(generation, num_prompts=size, num_new_tokens=64) for size in (1, 4, 8, 16)},
    "generate-128x16": partial(generation, num_prompts=16, num_new_tokens=128),
    "tiny-choice": partial(choice, lengths=[40, 90], choice_tokens=(2, 3)),
    "tiny-rolling": partial(rolling, num_documents=1, num_tokens=300),
    "tiny-generate": partial(generation, num_prompts=2, num_new_tokens=4),
}
"""Name to maker. ``tiny-*`` are for ``--quick``."""
