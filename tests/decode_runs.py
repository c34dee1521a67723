"""Texts generated under a decoding press, as tests of the engine run it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from decode_references import Distinct
from references import PRESSES
from transformers import LogitsProcessorList

from lm_eval_kvpress.cache.compressed import stack
from lm_eval_kvpress.cache.packed import pack
from lm_eval_kvpress.cache.quantized import Quantization
from lm_eval_kvpress.engine import decoding
from lm_eval_kvpress.engine import prefill as engine_prefill
from lm_eval_kvpress.engine.decode_budget import BudgetKeeper
from lm_eval_kvpress.engine.sampling import Sampler
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.decoding import DecodingSizes, DecodingSpec, parse_decoding
from lm_eval_kvpress.presses.parse import parse_press

NUM_NEW, INTERVAL, TARGET = 40, 6, 20


def spec_of(name: str, arguments: dict[str, Any], **sizes: Any) -> DecodingSpec:
    if name.startswith("compression_ratio_decoding:"):
        sizes = {"target_compression_ratio": 0.5, **sizes}
    else:
        sizes = {"target_size": TARGET, **sizes}
    return parse_decoding(parse_press("none"), name, arguments, DecodingSizes(compression_interval=INTERVAL, **sizes))


def decoded(
    model: PressableModel,
    contexts: Sequence[Sequence[int]],
    spec: DecodingSpec,
    held: int,
    prefill: str = "none",
    seeds: Sequence[int] = range(99),
    num_new: int = NUM_NEW,
    distinct: bool = True,
    packing: Quantization | None = None,
) -> tuple[list[list[int]], BudgetKeeper]:
    keeper = BudgetKeeper(model, spec, seeds)
    caches = [engine_prefill.prefill(model, torch.tensor([c[: len(c) - held]]), PRESSES[prefill]()) for c in contexts]
    if packing is not None:
        caches = [pack(cache, packing) for cache in caches]
    rows = decoding.decode(
        model,
        stack(caches),
        contexts,
        num_held_back=[held] * len(contexts),
        max_new_tokens=num_new,
        sampler=Sampler(LogitsProcessorList([Distinct()] if distinct else [])),
        stop_ids=frozenset(),
        stopped=lambda new: [False] * len(new),
        keeper=keeper,
    )
    return rows, keeper
