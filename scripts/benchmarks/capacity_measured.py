"""Memory and speed of one batch, prefilled under a press and decoded, in a process of its own.

Torch never gives all of an earlier peak back, so each batch is measured by another process, which this module is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass

import torch
from transformers import LogitsProcessorList
from transformers.utils.logging import disable_progress_bar

from lm_eval_kvpress.cache.compressed import CompressedCache
from lm_eval_kvpress.engine import decoding, grouped_prefill
from lm_eval_kvpress.engine.compression import Compressor
from lm_eval_kvpress.engine.contexts import Context
from lm_eval_kvpress.engine.sampling import Sampler
from lm_eval_kvpress.models.architectures import present
from lm_eval_kvpress.models.lend import lend
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.records.clock import Clock
from scripts.benchmarks.capacity_cases import Case
from scripts.benchmarks.models import model_named
from scripts.benchmarks.peak_memory import peak_extra_bytes


@dataclass(frozen=True)
class Batch:
    """Contexts of random tokens, of one length.

    Attributes:
        num_new: tokens generated per context; none are decoded if it is 0.
        in_turn: whether contexts are prefilled one after the other.
    """

    num_rows: int
    num_tokens: int
    num_new: int = 0
    in_turn: bool = False

    @property
    def tokens_at_once(self) -> int:
        """Tokens of one prefill."""
        return self.num_tokens if self.in_turn else self.num_rows * self.num_tokens

    @property
    def total_tokens(self) -> int:
        """Of all contexts."""
        return self.num_rows * self.num_tokens

    def contexts(self, vocab_size: int) -> list[Context]:
        """One more than there are rows, the first for warming up; the last token of each is held back."""
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(vocab_size, (self.num_rows + 1, self.num_tokens + 1), generator=generator).tolist()
        return [Context(tuple(row), 1) for row in rows]


@torch.inference_mode()
def measured(shape: str, dtype: str, case: Case, batch: Batch) -> dict[str, float]:
    """Peaks and what is held, in bytes, beside what is reckoned, and tokens per second."""
    model = present(model_named(shape, dtype))
    compressor = Compressor(
        model, case.spec, short_context="keep", clock=Clock(model.device), quantization=case.quantization
    )
    first, *contexts = batch.contexts(model.model.config.vocab_size)
    found = dict[str, float]()

    def run() -> None:
        start = time.perf_counter()
        cache = compressor.compress(contexts).cache
        _synchronize()
        found["prefill_tokens_per_sec"] = batch.total_tokens / (time.perf_counter() - start)
        found["held_bytes"] = sum(layer.num_bytes for layer in cache.layers)
        if batch.num_new:
            found["decode_tokens_per_sec"] = _decode(model, cache, contexts, batch.num_new)

    with _prefilling(batch.tokens_at_once):
        warmed_up = compressor.compress([Context(first.tokens[:257], 1)]).cache
        if batch.num_new:
            _decode(model, warmed_up, [first], 2)
        del warmed_up
        found["peak_bytes"] = peak_extra_bytes(run)
    footprint = case.footprint(model.model.config, getattr(torch, dtype), model.device.type)
    sizes = batch.total_tokens, batch.tokens_at_once
    found["peak_bytes_reckoned"] = footprint.prefilling_bytes(*sizes)
    if batch.num_new:
        found["peak_bytes_reckoned"] = footprint.batch_bytes(sizes[0], 2, sizes[1])
    found["held_bytes_reckoned"] = batch.total_tokens * footprint.held_bytes
    return found


def _prefilling(num_tokens: int) -> AbstractContextManager[None]:
    """A context in which so many tokens are prefilled side by side."""
    limits = dict.fromkeys(("cpu", "cuda"), num_tokens)
    return lend(grouped_prefill, FORWARD_TOKENS=limits, PACKED_FORWARD_TOKENS=num_tokens)


def _decode(model: PressableModel, cache: CompressedCache, contexts: list[Context], num_new: int) -> float:
    """Generated tokens per second, the held-back token's forward included."""
    start = time.perf_counter()
    decoding.decode(
        model,
        cache,
        [context.tokens for context in contexts],
        num_held_back=[1] * len(contexts),
        max_new_tokens=num_new,
        sampler=Sampler(LogitsProcessorList()),
        stop_ids=frozenset(),
        stopped=lambda new: [False] * len(new),
    )
    _synchronize()
    return len(contexts) * num_new / (time.perf_counter() - start)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measured_apart(shape: str, dtype: str, case: Case, batch: Batch) -> dict[str, float]:
    """As `measured`, in a process of its own, whose C library returns to the system what is freed."""
    arguments = json.dumps([shape, dtype, asdict(case), asdict(batch)])
    command = [sys.executable, "-m", "scripts.benchmarks.capacity_measured", arguments]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found: dict[str, float] = json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout
    )
    return found


if __name__ == "__main__":
    disable_progress_bar()
    shape_, dtype_, case_, batch_ = json.loads(sys.argv[1])
    print(json.dumps(measured(shape_, dtype_, Case(**case_), Batch(**batch_))))
