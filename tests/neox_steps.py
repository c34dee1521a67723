"""A few ragged prompts decoded by GPTNeoX's step in few kernels, or by the modules that it stands for.

On a CPU the kernels run in Triton's interpreter, block by block in Python: generations are short here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from references import PRESSES, REROTATES, distinct_tokens
from transformers import LogitsProcessorList

from lm_eval_kvpress.cache.compressed import stack
from lm_eval_kvpress.engine import cuda_graph, decoding
from lm_eval_kvpress.engine.prefill import prefill
from lm_eval_kvpress.engine.sampling import Sampler
from lm_eval_kvpress.models.pressable import PressableModel

CONTEXTS = [distinct_tokens(length, 211, length) for length in (50, 29, 41)]
HELD = [1, 3, 2]
NUM_NEW = 4


def as_it_is(step: Callable[[], None]) -> Callable[[], None]:
    return step


def decoded(
    model: PressableModel,
    name: str = "snapkv",
    rows: int = 3,
    *,
    few_kernels: bool = True,
    record: cuda_graph.Recorder = as_it_is,
    num_new: int = NUM_NEW,
) -> list[list[int]]:
    """The new tokens of the first ``rows`` prompts under a press of `PRESSES`."""
    caches = [
        prefill(model, torch.tensor([context[: len(context) - held]]), PRESSES[name](), rerotates=name in REROTATES)
        for context, held in zip(CONTEXTS[:rows], HELD, strict=False)
    ]
    return decoding.decode(
        model,
        stack(caches),
        CONTEXTS[:rows],
        num_held_back=HELD[:rows],
        max_new_tokens=num_new,
        sampler=Sampler(LogitsProcessorList()),
        stop_ids=frozenset(),
        stopped=lambda new: [False] * len(new),
        record=record if few_kernels else None,
    )


def kernels_after_trial(model: PressableModel, rows: int = 3) -> str:
    """What the steps of a batch are computed with once the first one has been tried."""
    made: list[str] = []

    def note(step: Callable[[], None]) -> Callable[[], None]:
        made.append(step.kernels)  # type: ignore[attr-defined]
        return step

    decoded(model, rows=rows, record=note)
    (kernels,) = made
    return kernels
