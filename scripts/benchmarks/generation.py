"""Prefill, compression and decoding of one batch, timed apart: what the benchmarks of generation share.

Runs the engine itself on token ids. Knows no task and no text but the stories that prompts are cut from.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from lm_eval_kvpress.engine.compression import Compressor
from lm_eval_kvpress.engine.contexts import Context
from lm_eval_kvpress.engine.cuda_graph import GraphRecorder
from lm_eval_kvpress.engine.outcomes import GenerationSettings, Prompt
from lm_eval_kvpress.engine.runner import Runner
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.presses.parse import parse_press
from lm_eval_kvpress.records.clock import Clock
from lm_eval_kvpress.records.meter import Meter, RequestId
from lm_eval_kvpress.records.timings import BatchRecord, RequestRecord, RunLabels
from scripts.benchmarks.texts import story_text

QUERY_TOKENS = 1
UNLABELLED = RunLabels(run="", model="", press="", arguments="", protocol="", device="", dtype="", machine="")


@dataclass(frozen=True)
class Case:
    """One setting of a benchmark."""

    press: str
    batch_size: int
    num_prompt_tokens: int
    num_new_tokens: int


@dataclass(frozen=True)
class Measurement:
    """One run of a case.

    Attributes:
        prefill_tokens_per_sec: over the time of prefill and press together, as a user waits for both.
        press_sec: the press's own time.
        ttft_sec: time to the first token, prefill and press included.
        tpot_sec: all time of decoding after the first token, per token; None for a single new token.
        itl_sec: the median time between two tokens.
        kept_share: entries that can be attended, of those prefilled.
        kv_bytes_before, kv_bytes_allocated, kv_bytes_effective: of the whole batch's cache, before the press, in
            memory after it, and of the entries that can be attended.
        peak_memory_bytes: the most that was allocated on a CUDA device; None elsewhere.
    """

    prefill_tokens_per_sec: float
    press_sec: float
    decode_tokens_per_sec: float
    ttft_sec: float
    tpot_sec: float | None
    itl_sec: float | None
    kept_share: float
    kv_bytes_before: int
    kv_bytes_allocated: int
    kv_bytes_effective: int
    peak_memory_bytes: int | None


class Bench:
    """One model whose generation is timed under several presses.

    Args:
        lm: the loaded model, under no press.
        presses: names for ``press=``.
        ratio: the fraction that each of them removes.

    Raises:
        ValueError: for an unknown press, or one that needs another attention than the model has.
    """

    def __init__(self, lm: KVPress, presses: Sequence[str], ratio: float) -> None:
        self._model = lm.press_model
        self._clock, self._graphs = Clock(lm.device), GraphRecorder(lm.press_model)
        arguments = {press: {} if press == "none" else {"compression_ratio": ratio} for press in presses}
        specs = {press: parse_press(press, arguments[press]) for press in presses}
        for press, spec in specs.items():
            if spec.attn_implementation not in (None, lm.model.config._attn_implementation):
                raise ValueError(
                    f"press={press} needs {spec.attn_implementation} attention, which no other one here has"
                )
            spec.check_layers(lm.model.config.num_hidden_layers)
        self._compressors = {
            press: Compressor(
                self._model,
                spec,
                short_context="error",
                clock=self._clock,
            )
            for press, spec in specs.items()
        }

    def check(self, case: Case) -> None:
        """Refuse, before any work, a prompt that is too long for the model or too short for the press."""
        positions = self._model.model.config.max_position_embeddings
        if case.num_prompt_tokens + case.num_new_tokens > positions:
            asked = f"--prompt-tokens {case.num_prompt_tokens} and --new-tokens {case.num_new_tokens}"
            raise ValueError(f"{asked} exceed the {positions} positions that the model was trained on")
        self._compressors[case.press].check_lengths([Context((0,) * case.num_prompt_tokens, QUERY_TOKENS)])

    def notes(self, case: Case) -> list[str]:
        """What the press says about itself in this case, such as that it does the same as another press."""
        press = self._compressors[case.press].press
        return sorted(press.notes(case.num_prompt_tokens - QUERY_TOKENS, len(self._model.attentions)))

    def measure(self, case: Case, prompts: Sequence[tuple[int, ...]]) -> Measurement:
        """Prefill, compress and decode one batch."""
        records: list[BatchRecord | RequestRecord] = []
        meter = Meter(self._clock, UNLABELLED, [_Collector(records)])
        compressor = self._compressors[case.press]
        runner = Runner(self._model, compressor, self._clock, meter, nullcontext, graphs=self._graphs)
        contexts = [Context(prompt, QUERY_TOKENS) for prompt in prompts]
        jobs = [Prompt(context, seed=0, id=RequestId("", None, row)) for row, context in enumerate(contexts)]
        runner.generate(jobs, GenerationSettings({}, case.num_new_tokens, frozenset(), lambda new: [False] * len(new)))
        meter.finish("generate_until")
        return _measurement(records)


@dataclass(frozen=True)
class _Collector:
    records: list[BatchRecord | RequestRecord]

    def add(self, record: BatchRecord | RequestRecord) -> None:
        self.records.append(record)


def _measurement(records: Sequence[BatchRecord | RequestRecord]) -> Measurement:
    (batch,) = (record for record in records if isinstance(record, BatchRecord))
    requests = [record for record in records if isinstance(record, RequestRecord)]
    before, allocated, effective = (
        sum(getattr(request, f"kv_bytes_{state}") for request in requests)
        for state in ("before", "allocated", "effective")
    )
    peaks = (batch.prefill_peak_memory_bytes, batch.decode_peak_memory_bytes)
    first = requests[0]
    assert first.ttft_sec is not None, "every row decodes at least one token"
    return Measurement(
        prefill_tokens_per_sec=batch.num_prefill_tokens / (batch.prefill_sec + batch.press_sec),
        press_sec=batch.press_sec,
        decode_tokens_per_sec=batch.num_output_tokens / batch.decode_sec,
        ttft_sec=first.ttft_sec,
        tpot_sec=first.tpot_sec,
        itl_sec=first.itl_p50_sec,
        kept_share=effective / before,
        kv_bytes_before=before,
        kv_bytes_allocated=allocated,
        kv_bytes_effective=effective,
        peak_memory_bytes=max(filter(None, peaks), default=None),
    )


def random_prompts(lm: KVPress, case: Case) -> list[tuple[int, ...]]:
    """Random token ids, the same for every press."""
    generator, shape = torch.Generator().manual_seed(0), (case.batch_size, case.num_prompt_tokens)
    return [tuple(row) for row in torch.randint(lm.model.config.vocab_size, shape, generator=generator).tolist()]


def story_prompts(lm: KVPress, case: Case) -> list[tuple[int, ...]]:
    """Pieces of the stories as token ids, the same for every press."""
    length = case.num_prompt_tokens
    ids = lm.tok_encode(story_text())
    ids = list(itertools.islice(itertools.cycle(ids), len(ids) + length))
    step = (len(ids) - length) // case.batch_size
    return [tuple(ids[row * step : row * step + length]) for row in range(case.batch_size)]
