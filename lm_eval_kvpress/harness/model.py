"""The lm-eval models ``pythia-kvpress`` and ``kvpress``: requests in, scores and texts out, facts for the record.

A thin subclass of lm-eval's ``HFLM``, which loads models and tokenizes. The three request types are answered here by
`work` on a `runner`; this room knows nothing of attention, of caches or of how they are compressed.
"""

from __future__ import annotations

import functools
import itertools
import logging
import tempfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm
from transformers import PreTrainedModel

from lm_eval_kvpress.engine import batch_size, windows
from lm_eval_kvpress.engine.batching import batches, in_halves
from lm_eval_kvpress.engine.compression import Compressor
from lm_eval_kvpress.engine.cuda_graph import GraphRecorder
from lm_eval_kvpress.engine.generation_batches import GenerationBatches
from lm_eval_kvpress.engine.likelihood_batches import LikelihoodBatches
from lm_eval_kvpress.engine.outcomes import GenerationSettings, Prompt
from lm_eval_kvpress.engine.request_batches import RequestBatches
from lm_eval_kvpress.engine.rolling_batches import RollingBatches
from lm_eval_kvpress.engine.runner import Runner
from lm_eval_kvpress.engine.sampling import sampler_for
from lm_eval_kvpress.engine.shared_prefill import SharedPrefills
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness import answer_cache, identity, messages, parity, ranks, run_record
from lm_eval_kvpress.harness.arguments import (
    Settings,
    parse_arguments,
    resolve_pretrained,
)
from lm_eval_kvpress.harness.command_line import share_log_handlers
from lm_eval_kvpress.harness.generation_arguments import StopStrings
from lm_eval_kvpress.harness.loading import CheckedHFLM
from lm_eval_kvpress.harness.stream_requests import StreamedDocument, StreamRun
from lm_eval_kvpress.harness.tokenization import encode_all, encode_pairs
from lm_eval_kvpress.models import gpt_neox, llama_like
from lm_eval_kvpress.models.fast import gpt_neox_forward, grouped_attention, heap, onednn_linear, trial
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.spec import PressSpec
from lm_eval_kvpress.records.clock import Clock
from lm_eval_kvpress.records.log_file import ThroughputLog
from lm_eval_kvpress.records.loss_files import StreamStore
from lm_eval_kvpress.records.meter import Meter, Recorder, RequestId
from lm_eval_kvpress.records.totals import new_totals

logger = logging.getLogger("lm_eval_kvpress")

Answering = TypeVar("Answering", bound=Callable[..., list[Any]])


def of_own_requests(answer: Answering) -> Answering:
    """Makes a request type answer the copies by which lm-eval pads a rank's share with what the originals got."""

    @functools.wraps(answer)
    def run(lm: KVPress, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        lm._of_all_ranks = None
        if lm.world_size == 1:
            return answer(lm, requests, disable_tqdm)
        own, answered_by = ranks.without_padding(requests)
        answers = answer(lm, own, disable_tqdm)
        return [answers[place] for place in answered_by]

    return cast(Answering, run)


class KVPress(CheckedHFLM):
    """Any architecture that kvpress or this package presents to it, evaluated through its compressed cache.

    Args:
        pretrained: folder, hub name, ``builtin``, or a loaded model.
        **arguments: the press and its arguments, the settings of `arguments.Settings`, and everything that
            ``HFLM`` takes.

    Raises:
        UsageError: for any mistake in the arguments, before weights are read where that can be known.
    """

    DEFAULT_PRETRAINED: str | None = None
    _of_all_ranks: ranks.RankFacts | None

    def __init__(self, pretrained: str | PreTrainedModel | None = None, **arguments: Any) -> None:
        share_log_handlers("lm_eval")
        pretrained = self.DEFAULT_PRETRAINED if pretrained is None else pretrained
        if pretrained is None or pretrained == "":
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
        if self._settings.stream_output is not None:
            _check_folder("stream_output", Path(self._settings.stream_output))
        self._asked_max_length = of_hflm.get("max_length")
        is_one_for_all = isinstance(pretrained, str) and not {"parallelize", "device_map"} & of_hflm.keys()
        self._asked_device = of_hflm.get("device") if is_one_for_all else None
        self._arguments_of_answers = identity.arguments_of_answers(of_hflm)
        super().__init__(pretrained=pretrained, **of_hflm)
        stock = parity.stock_answers(self) if self._settings.parity else None  # before the change of basis
        self._press_model = self._presentable()
        self._settle_on_device()
        self._graphs = GraphRecorder(self._press_model)
        self._rolling_window = self._settings.rolling_window(self.max_length)
        # Documents are cut into windows here; the tokenizer's warning that they are longer than a window would mislead.
        self.tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        self._parity = None if stock is None else self._certificate(stock)
        self._totals, self._of_all_ranks = new_totals(), None
        self._runner = self._new_runner(self._settings, list(self._recorders()))
        if self._settings.press.attn_implementation:
            logger.info(
                "press=%s runs on %s attention", self._settings.press.name, self.model.config._attn_implementation
            )

    # -------------------------------------------------------------------------------------------------- loading

    def _presentable(self) -> PressableModel:
        """The loaded model, its basis changed if it is a GPTNeoX, with the way kvpress can hook it."""
        if hasattr(self.model, "merge_and_unload"):  # an adapter's rows would not follow the change of basis
            self._model = self.model.merge_and_unload()
        model = self.model
        if model.config.model_type != "gpt_neox":
            attentions, presented = llama_like.attention_modules(model), functools.partial(llama_like.presented, model)
            grouped = functools.partial(grouped_attention.lent, attentions)
            return PressableModel(model, attentions, presented, grouped, made_of=grouped_attention.made_of)
        gpt_neox.prepare(model)
        presented, quickened = (
            functools.partial(lend, model) for lend in (gpt_neox.presented, gpt_neox_forward.in_place)
        )
        return PressableModel(model, gpt_neox.attention_modules(model), presented, quickened, trial.StepMaker(model))

    def _settle_on_device(self) -> None:
        """CUDA's events and graphs belong to the current device, which stays the first one under ``device=cuda:1``.
        On a CPU freed blocks are kept, and a slow dtype is named."""
        if self._press_model.device.type == "cuda":
            torch.cuda.set_device(self._press_model.device)
        elif self._press_model.device.type == "cpu":
            heap.keep_freed_memory()
            onednn_linear.warn_of_slow_dtype(self.mixed_precision_dtype or self.model.dtype)

    @property
    def press_model(self) -> PressableModel:
        """The loaded model as the engine takes it, for those who bring token ids (`scripts/benchmarks/presses.py`)."""
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

    def _refuse_decoding_alone(self) -> None:
        """A press that acts while text is generated changes no likelihood: figures would be the uncompressed ones."""
        if self._settings.decoding is not None and self._settings.press.is_none:
            raise UsageError(
                f"press={self._settings.press_name} acts while text is generated and cannot change a log-likelihood: "
                "choose tasks that generate, or press=none, or prefill_decoding:PREFILL+PRESS"
            )

    @of_own_requests
    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._refuse_decoding_alone()
        if self.enable_thinking:
            raise UsageError("enable_thinking=True generates text; loglikelihood tasks cannot use it")
        pairs = encode_pairs(self, [request.args for request in requests])
        ids = _request_ids(requests)
        return self._answer([LikelihoodBatches(self._truncated(pairs, ids), ids)], disable_tqdm, requests)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        ids = [RequestId("", None, index) for index in range(len(pairs))]
        return self._answer([LikelihoodBatches(self._truncated(pairs, ids), ids)], disable_tqdm)

    def _encoded(self, requests: Sequence[Instance]) -> list[list[int]]:
        texts = encode_all(self, [request.args[0] for request in requests])
        self._check_ids(texts)
        return texts

    def _check_ids(self, texts: Iterable[Sequence[int]]) -> None:
        known, highest = self.model.get_input_embeddings().num_embeddings, max(map(max, filter(None, texts)), default=0)
        if highest >= known:
            raise UsageError(
                f"token id {highest} is beyond the {known} embeddings of the model: the tokenizer has tokens that the "
                "checkpoint does not know; use the one that belongs to it"
            )

    def _truncated(
        self, pairs: Sequence[tuple[list[int], list[int]]], ids: Sequence[RequestId]
    ) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        self._check_ids(itertools.chain.from_iterable(pairs))
        truncated, cut = [], set()
        for index, (context, continuation) in enumerate(pairs):
            if not context or not continuation or len(continuation) > self.max_length:
                raise UsageError(
                    f"request {index} of task '{ids[index].task}' has {len(context)} context and {len(continuation)} "
                    f"continuation tokens; each needs at least 1, and a continuation at most {self.max_length}"
                )
            kept = windows.truncate_left(context, continuation, self.max_length)
            truncated.append((kept, tuple(continuation)))
            if len(kept) < len(context):
                cut.add((ids[index].task, tuple(context)))
        if cut:
            logger.warning("%d contexts were cut from the left to fit max_length=%d", len(cut), self.max_length)
        for task, _ in cut:
            self._totals[task].num_cut_contexts += 1
        return truncated

    @of_own_requests
    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        self._refuse_decoding_alone()
        if self._settings.rolling == "stream":
            return self._stream(requests, disable_tqdm)
        windows = [list(self._windows(tokens)) for tokens in self._encoded(requests)]
        return self._answer([RollingBatches(windows, _request_ids(requests))], disable_tqdm, requests)

    def _stream(self, requests: list[Instance], disable_tqdm: bool) -> list[float]:
        documents = [
            StreamedDocument(id, tokens)
            for id, tokens in zip(_request_ids(requests), self._encoded(requests), strict=True)
        ]
        run = StreamRun(
            self._press_model,
            self._settings,
            prefix_token=self.prefix_token_id,
            clock=self._runner.clock,
            meter=self._runner.meter,
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
        return StreamStore(Path(self._settings.stream_output), self._identity())

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        super().set_cache_hook(cache_hook)
        if cache_hook.dbdict is None:
            return
        answer_cache.claim(cache_hook.dbdict, self._identity())
        logger.warning("use_cache: what was kept and how long it took is measured for new answers only")

    def _identity(self) -> dict[str, Any]:
        """Everything that an answer depends on besides its request."""
        facts = self.describe()
        keys = ("pretrained", "press", "protocol", "attn_implementation", "dtype", "versions")
        return {key: facts[key] for key in keys} | {
            **self._arguments_of_answers,
            "revision": self.revision,
            "weights": identity.weights_fingerprint(self.model),
            "prefix_token": self.prefix_token_id,
            "seed": torch.initial_seed(),
        }

    def _windows(self, tokens: Sequence[int]) -> Iterator[windows.Window]:
        if self._settings.rolling == "one_pass":
            return windows.one_pass_windows(tokens, self.prefix_token_id, self.max_length)
        return windows.prefix_windows(tokens, self.prefix_token_id, *self._rolling_window)

    @of_own_requests
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts = self._prompts(requests)
        alike: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            alike[repr(sorted(request.args[1].items()))].append(index)
        works = [
            self._generation_batches(requests[indices[0]].args[1], {index: prompts[index] for index in indices})
            for indices in alike.values()
        ]
        return self._answer(works, disable_tqdm, requests)

    def _prompts(self, requests: Sequence[Instance]) -> list[Prompt]:
        """Prompts with their seeds: a prompt that comes again draws other tokens, in any order and batch."""
        occurrences: Counter[tuple[int, ...]] = Counter()
        found = []
        for tokens, id in zip(self._encoded(requests), _request_ids(requests), strict=True):
            context = tuple(tokens or [self.prefix_token_id])
            seed = zlib.crc32(repr((torch.initial_seed(), occurrences[context], context)).encode())
            occurrences[context] += 1
            found.append(Prompt(context, seed, id))
        return found

    def _generation_batches(self, gen_kwargs: dict[str, Any], prompts: Mapping[int, Prompt]) -> GenerationBatches:
        options = normalize_gen_kwargs(gen_kwargs, self.max_gen_toks)
        eos = self.tok_decode([self.eot_token_id], skip_special_tokens=False)
        until = handle_stop_sequences(options.pop("until", None), eos=eos)
        max_new_tokens = options.pop("max_gen_toks")
        room = self.max_length - max_new_tokens
        if max_new_tokens < 1 or room < 1:
            raise UsageError(
                f"max_gen_toks={max_new_tokens} must be at least 1 and leave room for a prompt within the "
                f"{self.max_length} tokens of max_length"
            )
        sampler_for(options, [0], 1)  # refuses before the first prefill
        eos_ids = self.model.generation_config.eos_token_id
        stop_ids = frozenset([self.eot_token_id, *(eos_ids if isinstance(eos_ids, list) else [eos_ids])])
        settings = GenerationSettings(options, max_new_tokens, stop_ids, StopStrings(self.tokenizer, until))
        too_long = [prompt for prompt in prompts.values() if len(prompt.context) > room]
        if too_long:
            logger.warning(
                "%d prompts were cut from the left to %d tokens: max_length=%d less max_gen_toks=%d",
                *(len(too_long), room, self.max_length, max_new_tokens),
            )
        for prompt in too_long:
            self._totals[prompt.id.task].num_cut_contexts += 1
        cut = {index: replace(prompt, context=prompt.context[-room:]) for index, prompt in prompts.items()}
        return GenerationBatches(cut, settings, lambda ids: self._text(list(ids), until))

    def _text(self, ids: list[int], until: list[str]) -> str:
        """The answer in generated ids: thinking and what follows a stop string cut off, as stock ``HFLM`` does."""
        end = self.think_end_token
        if isinstance(end, int):
            after = len(ids) - ids[::-1].index(end) if end in ids else 0
            text = self.tok_decode(ids[after:]).lstrip()
        else:
            text = self.tok_decode(ids)
        return postprocess_generated_text(text, stop=until, think_end_token=end if isinstance(end, str) else None)

    # ---------------------------------------------------------------------------------------------------- running

    def _answer(
        self, works: Sequence[RequestBatches[Any]], disable_tqdm: bool, requests: Sequence[Instance] = ()
    ) -> list[Any]:
        """One answer per request, in request order; ``requests`` are for lm-eval's cache, told as answers come."""
        for work in works:
            self._check_lengths(work)
        answers: dict[int, Any] = {}
        total = sum(len(segment) for work in works for segment in work.segments())
        with self._progress(works[0].request_type if works else "", total, disable_tqdm) as bar:
            for work in works:
                for request, answer in self._run(work, bar):
                    answers[request] = answer
                    if requests:
                        self.cache_hook.add_partial(work.request_type, requests[request].args, answer)
        return [answers[index] for index in range(len(answers))]

    def _check_lengths(self, work: RequestBatches[Any]) -> None:
        self._check_lengths_for(self._runner, work)

    @staticmethod
    def _check_lengths_for(runner: Runner, work: RequestBatches[Any]) -> None:
        for segment in work.segments():
            runner.compressor.check_lengths(work.contexts(segment))

    def _run(self, work: RequestBatches[Any], bar: tqdm[Any]) -> Iterator[tuple[int, Any]]:
        """Requests and their answers, as they come; the totals are recorded at the end."""
        meter, outcomes = self._runner.meter, dict[int, Any]()
        for items in batches(work, *self._batch_limits(self._settings.press, work)):
            done = dict(zip(items, in_halves(functools.partial(work.run, self._runner), items), strict=True))
            outcomes |= done
            bar.update(len(items))
            bar.set_postfix(meter.live(), refresh=False)
            if not work.splits_requests:
                meter.finish(work.request_type)
                yield from work.answers(done).items()
        meter.finish(work.request_type)
        work.record_totals(outcomes, self._totals)
        if work.splits_requests:
            yield from work.answers(outcomes).items()

    def _batch_limits(self, press: PressSpec, work: RequestBatches[Any]) -> tuple[int, int | None]:
        """Items and tokens per batch, at most; with ``batch_size=auto`` as many tokens as there is room for."""
        if self.batch_size != "auto":
            return int(self.batch_size), None
        free, decodes = batch_size.free_bytes(self._press_model.device), work.request_type == "generate_until"
        return self.max_batch_size, batch_size.tokens_per_batch(self._press_model, press, free, decodes=decodes)

    def _autocast(self) -> Any:
        if self.mixed_precision_dtype is None:
            return nullcontext()
        return torch.autocast(device_type=self.device.type, dtype=self.mixed_precision_dtype)

    def _progress(self, what: str, total: int, disable_tqdm: bool) -> tqdm[Any]:
        label = f"{what} (press={self._settings.press_name})"
        return tqdm(total=total, desc=label, disable=disable_tqdm or self.rank != 0)

    def _new_runner(
        self, settings: Settings, recorders: Sequence[Recorder], shared: SharedPrefills | None = None
    ) -> Runner:
        labels = {
            "device": str(self.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "press": settings.press_name,
            "protocol": f"query_tokens={settings.query_tokens} rolling={settings.rolling}",
        }
        clock = Clock(self.device)
        compressor = Compressor(
            self._press_model,
            settings.press,
            query_tokens=settings.query_tokens,
            short_context=settings.short_context,
            clock=clock,
            shared=shared,
        )
        return Runner(
            self._press_model,
            compressor,
            clock,
            Meter(clock, labels, recorders),
            self._autocast,
            settings.decoding,
            self._graphs,
        )

    def _recorders(self) -> Iterator[Recorder]:
        """Where records go: a file, the metrics endpoint, both or neither. Both last as long as the process."""
        if self._settings.throughput_log is not None:
            path = Path(self._settings.throughput_log)
            yield ThroughputLog(path.with_stem(f"{path.stem}.rank{self.rank}") if self.rank else path)
        port = self._settings.metrics_port
        if port is not None:
            try:
                from lm_eval_kvpress.records.prometheus import MetricsServer  # needs an extra

                yield MetricsServer(port + self.rank)
            except ImportError as error:
                raise UsageError(
                    "metrics_port needs prometheus-client: pip install 'lm-eval-kvpress[metrics]'"
                ) from error
            except OSError as error:
                raise UsageError(f"metrics_port={port + self.rank} cannot be opened: {error.strerror}") from error

    # ----------------------------------------------------------------------------------------------------- record

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """lm-eval gathers what tasks made of the answers once all are there; with it goes what the record needs."""
        gathered: list[Any] | None = super().gather_object((obj, self._own_facts()), dst)
        if gathered is None:
            return None
        self._of_all_ranks = ranks.together([facts for _, facts in gathered])
        return [own for own, _ in gathered]

    def _own_facts(self) -> ranks.RankFacts:
        return ranks.RankFacts(self._totals, self._runner.meter.records)

    def _facts(self) -> ranks.RankFacts:
        """What was done: by all ranks, once lm-eval has gathered it."""
        return self._of_all_ranks or self._own_facts()

    def get_model_info(self) -> dict[str, Any]:
        """``HFLM``'s facts, and under ``kvpress`` what was asked, what was measured, and with which versions."""
        share_log_handlers("lm_eval")  # again: --verbosity comes into force after the requests
        messages.log_kept_shares(self._settings, self._facts().totals)
        return {**super().get_model_info(), "kvpress": self.describe()}

    def describe(self) -> dict[str, Any]:
        """The record of this run: press, protocol, measured kept shares per task, versions."""
        head = self.model.get_output_embeddings().weight
        return {
            "pretrained": self._pretrained_name,
            **run_record.asked(self._settings, self.max_length),
            "attn_implementation": self.model.config._attn_implementation,
            "device": str(self.device),
            "linear_layers": "oneDNN" if onednn_linear.uses_onednn(head) else "torch",
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "batch_size": self.batch_size,
            "parity": None if self._parity is None else self._parity.summary(),
            **run_record.measured(self._facts()),
            "versions": run_record.versions(),
        }


def _check_folder(argument: str, folder: Path) -> None:
    """Makes a folder, or says before any work why it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"{argument}={folder} cannot be written: {error.strerror}") from error


def _request_ids(requests: Sequence[Instance]) -> list[RequestId]:
    """lm-eval passes a request with ``repeats: N`` on N times."""
    seen: Counter[RequestId] = Counter()
    ids = []
    for request in requests:
        first = RequestId(request.task_name or "", request.doc_id, request.idx)
        ids.append(replace(first, repeat=seen[first]))
        seen[first] += 1
    return ids


class PythiaKVPress(KVPress):
    """`KVPress` whose default checkpoint is Pythia-2.8B."""

    DEFAULT_PRETRAINED = "EleutherAI/pythia-2.8b"
