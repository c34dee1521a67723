"""The lm-eval models ``pythia-kvpress`` and ``kvpress``: requests in, scores and texts out, facts for the record.

A thin subclass of lm-eval's ``HFLM``, which loads models and tokenizes. The three request types are answered here by
`plan`, `engine`, `scoring` and `decoding`; this room knows nothing of attention or of how a cache is compressed.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import sys
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedModel

from lm_eval_kvpress import native, neox, parity, plan
from lm_eval_kvpress.arguments import (
    UsageError,
    parse_arguments,
    print_usage_errors_in_one_line,
    resolve_pretrained,
)
from lm_eval_kvpress.cache import CompressedCache
from lm_eval_kvpress.compression import Compressor
from lm_eval_kvpress.decoding import decode
from lm_eval_kvpress.engine import PressableModel
from lm_eval_kvpress.generation import StopStrings, sampler_for
from lm_eval_kvpress.scoring import BranchScore, Pack, score
from lm_eval_kvpress.stream_run import StreamedDocument, StreamRun
from lm_eval_kvpress.stream_store import StreamStore
from lm_eval_kvpress.telemetry import Clock, ContextRecord, RollingScore, TaskTotals
from lm_eval_kvpress.throughput import Meter, Recorder, RequestId, RequestShare
from lm_eval_kvpress.throughput_log import LogError, ThroughputLog

logger = logging.getLogger("lm_eval_kvpress")

Item = TypeVar("Item")
Answer = TypeVar("Answer")

AUTO_BATCH_TOKENS = 16_384
"""Padded tokens per batch with ``batch_size=auto``; halved, again and again, where they do not fit into memory."""

PACK_TOKENS = 4_096
"""At most so many continuation tokens are scored in one forward per context."""

COMMANDS = ("lm_eval", "lm-eval", "lm_eval.exe", "lm-eval.exe", "lm-eval-kvpress", "__main__.py")


@dataclass(frozen=True)
class _Job:
    """A prompt to continue."""

    context: tuple[int, ...]
    seed: int
    id: RequestId


class KVPress(HFLM):
    """Any architecture that kvpress or this package presents to it, evaluated through its compressed cache.

    Args:
        pretrained: folder, hub name, ``builtin``, or a loaded model.
        **arguments: the press and its arguments, the settings of `arguments.Settings`, and everything that
            ``HFLM`` takes.

    Raises:
        UsageError: for any mistake in the arguments, before weights are read where that can be known.
    """

    DEFAULT_PRETRAINED: str | None = None

    def __init__(self, pretrained: str | PreTrainedModel | None = None, **arguments: Any) -> None:
        if Path(sys.argv[0]).name in COMMANDS:
            print_usage_errors_in_one_line(LogError)
        pretrained = pretrained or self.DEFAULT_PRETRAINED
        if pretrained is None:
            raise UsageError("pretrained is required: a folder, a hub name, or pretrained=builtin")
        self._settings, of_hflm = parse_arguments(arguments)
        self._pretrained_name = pretrained if isinstance(pretrained, str) else pretrained.name_or_path
        if isinstance(pretrained, str):
            pretrained = resolve_pretrained(pretrained)
            of_hflm.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        else:
            self._check_config(pretrained.config, of_hflm.get("max_length"))
            of_hflm.pop("attn_implementation")
            needed, has = self._settings.press.attn_implementation, pretrained.config._attn_implementation
            if needed and has != needed:
                raise UsageError(
                    f"press={self._settings.press.name} needs {needed} attention and the loaded model has {has}: call "
                    f"model.set_attn_implementation('{needed}') first, or pass the model's name"
                )
        self._asked_max_length = of_hflm.get("max_length")
        super().__init__(pretrained=pretrained, **of_hflm)
        stock = parity.stock_answers(self) if self._settings.parity else None  # before the change of basis
        self._press_model = self._presentable()
        self._rolling_window = self._settings.rolling_window(self.max_length)
        # Documents are cut into windows here; the tokenizer's warning that they are longer than a window would mislead.
        self.tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        self._totals: dict[str, TaskTotals] = defaultdict(TaskTotals)
        self._clock = Clock(self.device)
        self._parity = None if stock is None else self._certificate(stock)
        self._meter = self._new_meter()
        self._compressor = Compressor(
            self._press_model,
            self._settings.press,
            query_tokens=self._settings.query_tokens,
            short_context=self._settings.short_context,
            totals=self._totals,
            clock=self._clock,
        )
        if self._settings.press.attn_implementation:
            logger.info(
                "press=%s runs on %s attention", self._settings.press.name, self.model.config._attn_implementation
            )

    # -------------------------------------------------------------------------------------------------- loading

    def _get_config(self, pretrained: str, **kwargs: Any) -> None:
        try:
            super()._get_config(pretrained, **kwargs)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UsageError(
                f"cannot load pretrained={pretrained}: {reason} Offline, pass the folder of a local checkpoint, or "
                "pretrained=builtin for the small trained model that ships with this package"
            ) from error
        self._check_config(self._config, self._asked_max_length)

    def _check_config(self, config: PretrainedConfig, max_length: int | None) -> None:
        if config.model_type in native.MODEL_TYPES:
            try:
                native.check_config(config)
            except ValueError as error:
                raise UsageError(str(error)) from error
        elif config.model_type != "gpt_neox":
            raise UsageError(
                f"architecture '{config.model_type}' is neither GPTNeoX nor one that kvpress supports "
                f"({', '.join(native.MODEL_TYPES)})"
            )
        positions = config.max_position_embeddings
        if max_length and max_length > positions and not self._settings.allow_extrapolation:
            raise UsageError(
                f"max_length={max_length} exceeds the {positions} positions that the model was trained on: lower it, "
                "or pass allow_extrapolation=true to measure what happens beyond"
            )
        self._settings.rolling_window(max_length or positions)
        self._settings.check_stream(positions)
        try:
            self._settings.press.check_layers(config.num_hidden_layers)
        except ValueError as error:
            raise UsageError(str(error)) from error

    def _presentable(self) -> PressableModel:
        """The loaded model, its basis changed if it is a GPTNeoX, with the way kvpress can hook it."""
        if hasattr(self.model, "merge_and_unload"):  # an adapter's rows would not follow the change of basis
            self._model = self.model.merge_and_unload()
        model = self.model
        room = neox if model.config.model_type == "gpt_neox" else native
        if room is neox:
            try:
                neox.prepare(model)
            except ValueError as error:
                raise UsageError(str(error)) from error
        return PressableModel(model, room.attention_modules(model), functools.partial(room.presented, model))

    @property
    def press_model(self) -> PressableModel:
        """The loaded model as the engine takes it, for those who bring token ids (`scripts/benchmark.py`)."""
        return self._press_model

    def _certificate(self, stock: parity.Answers) -> parity.ParityCertificate:
        """Our answers at ratio 0 against stock's: under this run's press, or without one if it takes no ratio."""
        press = parity.at_ratio_zero(self._settings.press.name, self._settings.press.arguments)
        shared = parity.shared_arguments(self, parity.certificate_length(self))
        with parity.quiet_loader():
            ours = KVPress(pretrained=self.model, rolling="one_pass", batch_size=3, **press, **shared)
        certificate = parity.compare(stock, ours, press["press"])
        if not certificate.passed:
            logger.warning("parity with stock HFLM at ratio 0 is off: %s", certificate)
        return certificate

    # ------------------------------------------------------------------------------------------- request types

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        if self.enable_thinking:
            raise ValueError("enable_thinking=True generates text; loglikelihood tasks cannot use it")
        strings = [request.args for request in requests]
        pairs = self._encode_pairs(strings)
        answers = self._score_pairs(pairs, _request_ids(requests), disable_tqdm)
        for pair, answer in zip(strings, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, answer)
        return answers

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        return self._score_pairs(pairs, [RequestId("", None, index) for index in range(len(pairs))], disable_tqdm)

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Token ids of ``(context, continuation)`` pairs, as ``TemplateLM.loglikelihood`` makes them."""
        encode = functools.lru_cache(maxsize=None)(lambda text: tuple(self.tok_encode(text)))
        encoded = []
        for context, continuation in pairs:
            if context == "":
                ids = self.tok_encode(continuation, add_special_tokens=False)
                starts_with_prefix = bool(ids) and ids[0] == self.prefix_token_id
                encoded.append((ids[:1], ids[1:]) if starts_with_prefix else ([self.prefix_token_id], ids))
                continue
            stripped = context.rstrip()
            continuation = context[len(stripped) :] + continuation
            whole = self.tok_encode(stripped + continuation)
            before = list(encode(stripped))
            encoded.append((before, whole[len(before) :]))
        return encoded

    def _score_pairs(
        self, pairs: Sequence[tuple[list[int], list[int]]], ids: Sequence[RequestId], disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        truncated = self._truncated(pairs, ids)
        self._compressor.check_lengths([context for context, _ in truncated])
        answers: list[tuple[float, bool]] = [(math.nan, False)] * len(pairs)
        with self._progress("loglikelihood", len(pairs), disable_tqdm) as bar:
            groups = plan.group_by_context(truncated)
            for batch in self._batches(groups, lambda group: len(group.context)):
                for group, scores, pressed in self._halving(self._score_groups, batch, ids):
                    for member, branch in zip(group.members, scores, strict=True):
                        self._check_finite(branch, f"request {member} of task '{ids[member].task}'")
                        self._totals[ids[member].task].scored(branch.logprobs, pressed=pressed)
                        answers[member] = (math.fsum(branch.logprobs), branch.is_greedy)
                    bar.update(len(group.members))
                self._show(bar)
                self._meter.finish("loglikelihood")
        return answers

    def _truncated(
        self, pairs: Sequence[tuple[list[int], list[int]]], ids: Sequence[RequestId]
    ) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        truncated = []
        for index, (context, continuation) in enumerate(pairs):
            if not context or not continuation or len(continuation) > self.max_length:
                raise ValueError(
                    f"request {index} of task '{ids[index].task}' has {len(context)} context and {len(continuation)} "
                    f"continuation tokens; each needs at least 1, and a continuation at most {self.max_length}"
                )
            kept = plan.truncate_left(context, continuation, self.max_length)
            truncated.append((kept, tuple(continuation)))
        num_cut = sum(len(kept) < len(context) for (kept, _), (context, _) in zip(truncated, pairs, strict=True))
        if num_cut:
            logger.warning("%d contexts were cut from the left to fit max_length=%d", num_cut, self.max_length)
        return truncated

    def _score_groups(
        self, groups: Sequence[plan.ContextGroup], ids: Sequence[RequestId]
    ) -> list[tuple[plan.ContextGroup, list[BranchScore], bool]]:
        self._meter.start()
        with self._autocast():
            batch = self._compressor.compress(
                [group.context for group in groups], [ids[group.members[0]].task for group in groups]
            )
        split = [list(plan.packs([len(c) for c in group.continuations], PACK_TOKENS)) for group in groups]
        scores: list[list[BranchScore]] = [[] for _ in groups]
        for turn in range(max(len(packs) for packs in split)):
            rows = [row for row, packs in enumerate(split) if turn < len(packs)]
            packs = [
                Pack(batch.queries[row], tuple(groups[row].continuations[index] for index in split[row][turn]))
                for row in rows
            ]
            part = batch.cache if len(rows) == len(groups) else batch.cache.select(rows)
            for row, branches in zip(rows, self._score(part, packs), strict=True):
                scores[row] += branches
        shares = [
            RequestShare(ids[member], len(group.context), len(continuation), context=record)
            for group, record in zip(groups, batch.records, strict=True)
            for member, continuation in zip(group.members, group.continuations, strict=True)
        ]
        self._meter.batch("loglikelihood", len(groups), shares)
        return list(zip(groups, scores, batch.pressed, strict=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        if self._settings.rolling == "stream":
            return self._stream(requests, disable_tqdm)
        windows: list[tuple[int, plan.Window]] = []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            windows += [(index, window) for window in self._windows(tokens)]
        self._compressor.check_lengths([window.context for _, window in windows if window.pressed])
        parts: list[list[tuple[BranchScore, bool]]] = [[] for _ in requests]
        windows.sort(key=lambda item: (item[1].pressed, -len(item[1].context) - len(item[1].targets)))
        ids = _request_ids(requests)
        with self._progress("loglikelihood_rolling", len(windows), disable_tqdm) as bar:
            for _, of_one_kind in itertools.groupby(windows, key=lambda item: item[1].pressed):
                batches = self._batches(list(of_one_kind), lambda item: len(item[1].context) + len(item[1].targets))
                for batch in batches:
                    for index, branch, pressed in self._halving(self._score_windows, batch, ids):
                        self._check_finite(branch, f"document {index} of task '{ids[index].task}'")
                        parts[index].append((branch, pressed))
                    bar.update(len(batch))
                    self._show(bar)
        self._meter.finish("loglikelihood_rolling")
        answers: list[float] = []
        for request, scored in zip(requests, parts, strict=True):
            answers.append(self._rolling_score(request.task_name or "", scored))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answers[-1])
        return answers

    def _stream(self, requests: list[Instance], disable_tqdm: bool) -> list[float]:
        documents = [
            StreamedDocument(id, self.tok_encode(request.args[0]))
            for id, request in zip(_request_ids(requests), requests, strict=True)
        ]
        run = StreamRun(
            self._press_model,
            self._settings,
            prefix_token=self.prefix_token_id,
            clock=self._clock,
            meter=self._meter,
            totals=self._totals,
            store=self._stream_store(),
        )
        batch_size = self.max_batch_size if self.batch_size == "auto" else int(self.batch_size)
        with self._autocast(), self._progress("stream", 0, disable_tqdm) as bar:
            run.run(documents, batch_size, bar)
        answers: list[float] = [run.score(document) for document in documents]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def _stream_store(self) -> StreamStore | None:
        if self._settings.stream_output is None:
            return None
        facts = self.describe()
        keys = ("pretrained", "press", "protocol", "attn_implementation", "dtype", "versions")
        settings = {key: facts[key] for key in keys} | {
            "revision": self.revision,
            "weights": _fingerprint(self.model),
            "prefix_token": self.prefix_token_id,
            "seed": torch.initial_seed(),
        }
        try:
            return StreamStore(Path(self._settings.stream_output), settings)
        except ValueError as error:
            raise UsageError(str(error)) from error

    def _windows(self, tokens: Sequence[int]) -> Iterator[plan.Window]:
        if self._settings.rolling == "one_pass":
            return plan.one_pass_windows(tokens, self.prefix_token_id, self.max_length)
        return plan.prefix_windows(tokens, self.prefix_token_id, *self._rolling_window)

    def _score_windows(
        self, batch: Sequence[tuple[int, plan.Window]], ids: Sequence[RequestId]
    ) -> list[tuple[int, BranchScore, bool]]:
        self._meter.start()
        contexts = [window.context for _, window in batch]
        records: Sequence[ContextRecord | None] = [None] * len(batch)
        with self._autocast():
            if batch[0][1].pressed:
                compressed = self._compressor.compress(contexts, [ids[index].task for index, _ in batch])
                cache, queries, pressed = compressed.cache, compressed.queries, compressed.pressed
                records = compressed.records
            else:  # the whole context is fed with the targets: one plain forward, in which no press can act
                cache = self._press_model.empty_cache(len(batch))
                queries, pressed = contexts, [False] * len(batch)
        packs = [Pack(query, (window.targets,)) for query, (_, window) in zip(queries, batch, strict=True)]
        scores = self._score(cache, packs)
        shares = [
            RequestShare(ids[index], len(window.context), len(window.targets), context=record)
            for (index, window), record in zip(batch, records, strict=True)
        ]
        self._meter.batch("loglikelihood_rolling", len(batch), shares)
        return [(index, branches[0], flag) for (index, _), branches, flag in zip(batch, scores, pressed, strict=True)]

    def _score(self, cache: CompressedCache, packs: Sequence[Pack]) -> list[list[BranchScore]]:
        num_tokens = sum(len(branch) for pack in packs for branch in pack.branches)
        with self._autocast(), self._clock.phase("score", num_tokens=num_tokens):
            return score(self._press_model, cache, packs)

    def _rolling_score(self, task: str, scored: Sequence[tuple[BranchScore, bool]]) -> RollingScore:
        for branch, pressed in scored:
            self._totals[task].scored(branch.logprobs, pressed=pressed)
        everything = [logprob for branch, _ in scored for logprob in branch.logprobs]
        under_press = [logprob for branch, pressed in scored if pressed for logprob in branch.logprobs]
        return RollingScore(math.fsum(everything), len(everything), len(under_press), math.fsum(under_press))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        answers = [""] * len(requests)
        jobs = self._jobs(requests)
        self._compressor.check_lengths([job.context for job in jobs])
        by_kwargs: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            by_kwargs[repr(sorted(request.args[1].items()))].append(index)
        generators = [self._generator(requests[indices[0]].args[1]) for indices in by_kwargs.values()]
        with self._progress("generate_until", len(requests), disable_tqdm) as bar:
            for generate, indices in zip(generators, by_kwargs.values(), strict=True):
                indices.sort(key=lambda index: -len(jobs[index].context))
                for batch in self._batches(indices, lambda index: len(jobs[index].context)):
                    texts = self._halving(generate, [jobs[index] for index in batch])
                    for index, text in zip(batch, texts, strict=True):
                        answers[index] = text
                        self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    bar.update(len(batch))
                    self._show(bar)
                    self._meter.finish("generate_until")
        return answers

    def _jobs(self, requests: Sequence[Instance]) -> list[_Job]:
        """Prompts with their seeds: a prompt that comes again draws other tokens, in any order and batch."""
        occurrences: Counter[tuple[int, ...]] = Counter()
        jobs = []
        for request, id in zip(requests, _request_ids(requests), strict=True):
            context = tuple(self._encode_prompt(request.args[0]))
            seed = zlib.crc32(repr((torch.initial_seed(), occurrences[context], context)).encode())
            occurrences[context] += 1
            jobs.append(_Job(context, seed, id))
        return jobs

    def _generator(self, gen_kwargs: dict[str, Any]) -> Callable[[Sequence[_Job]], list[str]]:
        """What turns batches of jobs into texts under one set of generation arguments."""
        options = normalize_gen_kwargs(gen_kwargs, self.max_gen_toks)
        eos = self.tok_decode([self.eot_token_id], skip_special_tokens=False)
        until = handle_stop_sequences(options.pop("until", None), eos=eos)
        max_new_tokens = options.pop("max_gen_toks")
        room = self.max_length - max_new_tokens
        if room < 1:
            raise ValueError(f"max_gen_toks={max_new_tokens} leaves no room for a prompt in {self.max_length} tokens")
        sampler_for(options, [0], 1)  # unsupported arguments are refused before the first prefill
        eos_ids = self.model.generation_config.eos_token_id
        stop_ids = frozenset([self.eot_token_id, *(eos_ids if isinstance(eos_ids, list) else [eos_ids])])

        def generate(jobs: Sequence[_Job]) -> list[str]:
            self._meter.start()
            contexts = [job.context[-room:] for job in jobs]
            start, times = time.perf_counter(), list[float]()
            with self._autocast():
                batch = self._compressor.compress(contexts, [job.id.task for job in jobs])
                with self._clock.phase("decode") as produced:
                    rows = decode(
                        self._press_model,
                        batch.cache,
                        contexts,
                        num_held_back=[len(query) for query in batch.queries],
                        max_new_tokens=max_new_tokens,
                        sampler=sampler_for(options, [job.seed for job in jobs], max_new_tokens),
                        stop_ids=stop_ids,
                        stopped=StopStrings(self.tokenizer, until),
                        on_token=lambda: times.append(time.perf_counter() - start),
                    )
                    produced["tokens"] += sum(len(row) for row in rows)
            for job, row in zip(jobs, rows, strict=True):
                self._totals[job.id.task].num_tokens_generated += len(row)
            shares = [
                RequestShare(job.id, len(context), len(row), context=record, token_times_sec=tuple(times[: len(row)]))
                for job, context, row, record in zip(jobs, contexts, rows, batch.records, strict=True)
            ]
            self._meter.batch("generate_until", len(jobs), shares)
            return [self._text(row, until) for row in rows]

        return generate

    def _text(self, ids: list[int], until: list[str]) -> str:
        """The answer in generated ids: thinking and what follows a stop string cut off, as stock ``HFLM`` does."""
        end = self.think_end_token
        if isinstance(end, int):
            after = len(ids) - ids[::-1].index(end) if end in ids else 0
            text = self.tok_decode(ids[after:]).lstrip()
        else:
            text = self.tok_decode(ids)
        return postprocess_generated_text(text, stop=until, think_end_token=end if isinstance(end, str) else None)

    def _encode_prompt(self, text: str) -> list[int]:
        ids = self.tok_encode(text)
        return ids or [self.prefix_token_id]

    # ---------------------------------------------------------------------------------------------------- running

    def _batches(self, items: Sequence[Item], length: Callable[[Item], int]) -> Iterator[list[Item]]:
        if self.batch_size == "auto":
            return plan.batches(items, self.max_batch_size, length, AUTO_BATCH_TOKENS)
        return plan.batches(items, int(self.batch_size), length)

    def _halving(self, run: Callable[..., Sequence[Answer]], batch: Sequence[Item], *arguments: Any) -> list[Answer]:
        """Runs a batch; where it does not fit into memory, its halves."""
        try:
            return list(run(batch, *arguments))
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
        torch.cuda.empty_cache()
        middle = (len(batch) + 1) // 2
        logger.warning("out of memory with %d contexts at once; trying %d", len(batch), middle)
        return [*self._halving(run, batch[:middle], *arguments), *self._halving(run, batch[middle:], *arguments)]

    def _autocast(self) -> Any:
        if self.mixed_precision_dtype is None:
            return nullcontext()
        return torch.autocast(device_type=self.device.type, dtype=self.mixed_precision_dtype)

    def _progress(self, what: str, total: int, disable_tqdm: bool) -> tqdm[Any]:
        label = f"{what} (press={self._settings.press.name})"
        return tqdm(total=total, desc=label, disable=disable_tqdm or self.rank != 0)

    def _show(self, bar: tqdm[Any]) -> None:
        bar.set_postfix(self._meter.live(), refresh=False)

    def _new_meter(self) -> Meter:
        settings = self._settings
        labels = {
            "device": str(self.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "press": settings.press.name,
            "protocol": f"query_tokens={settings.query_tokens} rolling={settings.rolling}",
        }
        return Meter(self._clock, labels, list(self._recorders()))

    def _recorders(self) -> Iterator[Recorder]:
        """Where records go: a file, the metrics endpoint, both or neither. Both last as long as the process."""
        if self._settings.throughput_log is not None:
            path = Path(self._settings.throughput_log)
            try:
                yield ThroughputLog(path.with_stem(f"{path.stem}.rank{self.rank}") if self.rank else path)
            except LogError as error:
                raise UsageError(str(error)) from error
        port = self._settings.metrics_port
        if port is not None:
            try:
                from lm_eval_kvpress.metrics import MetricsServer  # needs an extra

                yield MetricsServer(port)
            except ImportError as error:
                raise UsageError(
                    "metrics_port needs prometheus-client: pip install 'lm-eval-kvpress[metrics]'"
                ) from error
            except OSError as error:
                raise UsageError(f"metrics_port={port} cannot be opened: {error.strerror}") from error

    def _check_finite(self, branch: BranchScore, what: str) -> None:
        if not all(math.isfinite(logprob) for logprob in branch.logprobs):
            raise ValueError(
                f"{what} has a log-likelihood that is not finite (dtype {self.model.dtype}, "
                f"press={self._settings.press.name}): overflow in float16 is the usual cause; try dtype=float32"
            )

    # ----------------------------------------------------------------------------------------------------- record

    def get_model_info(self) -> dict[str, Any]:
        """``HFLM``'s facts, and under ``kvpress`` what was asked, what was measured, and with which versions."""
        self._log_summary()
        return {**super().get_model_info(), "kvpress": self.describe()}

    def _log_summary(self) -> None:
        """Says on the screen what was kept, and warns where the press acted on nothing."""
        name = self._settings.press.name
        for task, totals in self._totals.items():
            pressed, unpressed = totals.pressed.summary(), totals.unpressed.num_contexts
            if pressed["num_contexts"]:
                logger.info(
                    "%s: press=%s kept %.1f %% of %d tokens in %d contexts (layers %.1f to %.1f %%); %d contexts "
                    "were left uncompressed",
                    *(task, name, 100 * pressed["kept_share"], pressed["num_tokens"], pressed["num_contexts"]),
                    *(100 * pressed["kept_share_min_layer"], 100 * pressed["kept_share_max_layer"], unpressed),
                )
            elif self._settings.rolling == "stream" and totals.num_tokens_pressed:
                logger.info(
                    "%s: press=%s held every layer to %d entries; %d of %d tokens were scored after an eviction",
                    *(task, name, self._settings.stream_budget, totals.num_tokens_pressed, totals.num_tokens),
                )
            elif not self._settings.press.is_none:
                logger.warning("%s: press=%s compressed nothing; its figures are the uncompressed ones", task, name)
            for note, count in totals.notes.items():
                logger.warning("%s: %s (in %d of %d contexts)", task, note, count, pressed["num_contexts"])

    def _stream_facts(self) -> dict[str, Any]:
        names = ("stream_budget", "stream_chunk", "stream_positions")
        return {name: getattr(self._settings, name) for name in names}

    def describe(self) -> dict[str, Any]:
        """The record of this run: press, protocol, measured kept shares per task, versions."""
        settings = self._settings
        context, score_tokens = self._rolling_window
        return {
            "pretrained": self._pretrained_name,
            "press": settings.press.describe(),
            "protocol": {
                "query_tokens": settings.query_tokens,
                "rolling": settings.rolling,
                "rolling_context": context if settings.rolling == "prefix" else None,
                "rolling_score": score_tokens if settings.rolling == "prefix" else None,
                "short_context": settings.short_context,
                **({} if settings.rolling != "stream" else self._stream_facts()),
                "max_length": self.max_length,
                "press_acts_on_rolling": settings.rolling != "one_pass" and not settings.press.is_none,
            },
            "attn_implementation": self.model.config._attn_implementation,
            "device": str(self.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "batch_size": self.batch_size,
            "parity": None if self._parity is None else self._parity.summary(),
            "tasks": {task: totals.summary() for task, totals in self._totals.items()},
            "throughput": self._meter.summary(),
            "versions": {name: version(name) for name in ("torch", "transformers", "kvpress", "lm_eval")},
        }


def _request_ids(requests: Sequence[Instance]) -> list[RequestId]:
    """lm-eval passes a request with ``repeats: N`` on N times."""
    seen: Counter[RequestId] = Counter()
    ids = []
    for request in requests:
        first = RequestId(request.task_name or "", request.doc_id, request.idx)
        ids.append(replace(first, repeat=seen[first]))
        seen[first] += 1
    return ids


def _fingerprint(model: PreTrainedModel) -> str:
    """Tells checkpoints of one name apart: a checksum of 64 rows of the head, which no training leaves alone."""
    rows = model.get_output_embeddings().weight[:64].detach().float().cpu().contiguous()
    return f"{zlib.crc32(rows.numpy().tobytes()):08x}"


class PythiaKVPress(KVPress):
    """`KVPress` whose default checkpoint is Pythia-2.8B."""

    DEFAULT_PRETRAINED = "EleutherAI/pythia-2.8b"
