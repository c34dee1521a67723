"""The lm-eval models ``pythia-kvpress`` and ``kvpress``: requests in, scores and texts out, facts for the record.

A subclass of lm-eval's ``HFLM``, which loads checkpoints and tokenizes. It answers all three request types itself:
`requests` makes batches of them, `answering` runs these under a `session`. While a batch runs, the attention modules of
the loaded model are presented to kvpress and some forwards are exchanged for quicker ones (`models`); afterwards they
are the checkpoint's own again. Does not know attention, caches, or how they are compressed.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.utils import simple_parse_args_string
from tqdm import tqdm
from transformers import PreTrainedModel

from lm_eval_kvpress.cache.quantized import Quantization
from lm_eval_kvpress.engine import batch_size
from lm_eval_kvpress.engine.cuda_graph import GraphRecorder
from lm_eval_kvpress.engine.fidelity import FullSide
from lm_eval_kvpress.engine.footprint import Footprint
from lm_eval_kvpress.engine.request_batches import RequestBatches
from lm_eval_kvpress.engine.shared_prefill import SharedPrefills
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness import adapters, identity, messages, parity, ranks, run_record
from lm_eval_kvpress.harness.answered_before import answered_before, on_each_read
from lm_eval_kvpress.harness.answering import Answering, SessionAnswering
from lm_eval_kvpress.harness.arguments import ignored_arguments, parse_arguments
from lm_eval_kvpress.harness.command_line import share_log_handlers, show_usage_errors_in_one_line
from lm_eval_kvpress.harness.document_ids import note_document_ids
from lm_eval_kvpress.harness.generation_config import checkpoint_options
from lm_eval_kvpress.harness.launch import rank_in_run
from lm_eval_kvpress.harness.loading import CheckedHFLM, settle_on_device
from lm_eval_kvpress.harness.machine import machine
from lm_eval_kvpress.harness.requests import (
    RequestType,
    answer_padding,
    generation_batches,
    likelihood_batches,
    likelihood_batches_of_tokens,
    rolling_batches,
    stream_batches,
)
from lm_eval_kvpress.harness.session import Session, new_full_side, new_session
from lm_eval_kvpress.harness.settings import Settings
from lm_eval_kvpress.harness.statistics import check_statistics
from lm_eval_kvpress.harness.task_needs import DEFAULT_CHECKPOINTS
from lm_eval_kvpress.harness.tokenization import lend_tokenizer
from lm_eval_kvpress.harness.unsaved import end_on_unsaved_results
from lm_eval_kvpress.models.architectures import present
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.spec import PressSpec
from lm_eval_kvpress.records.loss_files import LossFiles
from lm_eval_kvpress.records.meter import Recorder, RequestId
from lm_eval_kvpress.records.recorders import open_recorders

logger = logging.getLogger("lm_eval_kvpress")


def of_a_run(answer: RequestType) -> RequestType:
    """Decorate a request type: it begins a run if the one before is over, and ends its run if it fails."""

    @functools.wraps(answer)
    def run(lm: KVPress, *arguments: Any, **named: Any) -> list[Any]:
        lm.begin_run()
        try:
            return answer(lm, *arguments, **named)
        except BaseException:  # also of Ctrl-C, after which a notebook asks again
            lm.end_run()
            raise

    return cast(RequestType, run)


class KVPress(CheckedHFLM):
    """Any architecture that kvpress or this package presents to it, evaluated through its compressed cache.

    Args:
        pretrained: folder, hub name, ``builtin``, or a loaded model.
        **arguments: the press and its arguments, the fields of `Settings`, and everything that ``HFLM`` takes.

    Attributes:
        press_model: the loaded model, presented to kvpress.
        session: the press's run: settings, runner and totals.
        answering: what answers requests, under the session.
        given: the press and the settings as they were given, without what ``HFLM`` takes.

    Raises:
        UsageError: for any mistake in the arguments, before weights are read where that can be known.
    """

    DEFAULT_PRETRAINED: str | None = None
    session: Session
    answering: Answering
    cache_hook: CacheHook

    def __init__(self, pretrained: str | PreTrainedModel | None = None, **arguments: Any) -> None:
        show_usage_errors_in_one_line()  # here too: an lm-eval that scans entry points needs no start-up file
        share_log_handlers("lm_eval")
        end_on_unsaved_results()
        note_document_ids()
        settings, hflm_arguments = parse_arguments(arguments)
        self.given = {name: value for name, value in arguments.items() if name not in hflm_arguments}
        self._ignored = ignored_arguments(arguments)
        self._arguments_of_answers = identity.arguments_of_answers(hflm_arguments)
        self._recorders = _opened(settings)
        super().__init__(self.DEFAULT_PRETRAINED if pretrained is None else pretrained, settings, **hflm_arguments)
        stock = parity.stock_answers(self) if settings.parity else None  # before the change of basis
        self.press_model = self._present(fast=settings.fast)
        settle_on_device(self.press_model, self.mixed_precision_dtype or self.model.dtype)
        self._graphs = GraphRecorder(self.press_model)
        build = functools.partial(KVPress, fast=settings.fast)
        self._parity = None if stock is None else parity.certify(self, stock, settings.press, build)
        if self._parity is not None:
            logger.info("parity: %s", self._parity.in_words())
        self._own_session = self.open_session(settings, self._recorders)
        self.use(self._own_session)
        if settings.attn_implementation:
            logger.info("press=%s runs on %s attention", settings.press_name, self.model.config._attn_implementation)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> KVPress:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> KVPress:
        """lm-eval's command gives its own options here, too: a name in both would be a `TypeError`."""
        options = {name: value for name, value in (additional_config or {}).items() if value is not None}
        for name in sorted(arg_dict.keys() & options.keys()):
            raise UsageError(f"{name} is given twice: leave {name}={arg_dict[name]} out and pass --{name}")
        return cls(**arg_dict, **options)

    # -------------------------------------------------------------------------------------------------- loading

    def _present(self, *, fast: bool) -> PressableModel:
        """The loaded model as the engine takes it; one that was passed in is changed only while it answers."""
        adapters.check_mergeable(self.model)
        is_adapted = adapters.is_adapted(self.model)
        if is_adapted:
            self._model = self.model.get_base_model() if self._is_borrowed else self.model.merge_and_unload()
        pressable = present(self.model, fast=fast, for_good=not self._is_borrowed)
        pressable = lend_tokenizer(pressable, self.tokenizer)
        return adapters.merged_in_use(pressable) if is_adapted and self._is_borrowed else pressable

    # ------------------------------------------------------------------------------------------------- sessions

    def open_session(
        self,
        settings: Settings,
        recorders: Sequence[Recorder] = (),
        shared_prefills: SharedPrefills | None = None,
        full_side: FullSide | None = None,
    ) -> Session:
        """Open a session of the loaded model under any press and protocol; `use` makes it the one that answers.

        Args:
            settings: of the session.
            recorders: get a record of every batch and request.
            shared_prefills: take the place of prefills of the session's own.
            full_side: of `new_full_side`, for several sessions under ``fidelity=true``.

        Raises:
            UsageError: if the settings do not fit the model.
        """
        self.check_settings(settings)
        return new_session(
            self.press_model,
            settings,
            name=self.pretrained_name,
            max_length=self.max_length,
            autocast=self._autocast,
            graphs=self._graphs,
            recorders=recorders,
            shared_prefills=shared_prefills,
            full_side=full_side,
        )

    def check_settings(self, settings: Settings) -> None:
        super().check_settings(settings)
        for press in settings.all_presses:
            check_statistics(press, self.press_model)

    def new_full_side(self, shared_prefills: SharedPrefills) -> FullSide:
        """What the full cache predicts, for sessions that share prefills."""
        return new_full_side(self.press_model, self._autocast, shared_prefills)

    def use(self, session: Session, answering: Answering | None = None) -> None:
        """Answer requests under ``session`` from now on, by ``answering`` if one is given."""
        self.session = session
        self.answering = SessionAnswering(session, self.batch_limits) if answering is None else answering

    @contextmanager
    def used_for_now(self, session: Session) -> Iterator[None]:
        """Answer under ``session`` until the context ends, and tell lm-eval's cache nothing, which is another run's."""
        before = self.session, self.answering, self.cache_hook
        self.use(session)
        self.cache_hook = CacheHook(None)
        try:
            yield
        finally:
            self.session, self.answering, self.cache_hook = before

    def begin_run(self) -> None:
        """Begin a session like the constructor's if that one answers and is over; one given to `use` stays."""
        own = self._own_session
        if self.session is own and own.is_over and isinstance(self.answering, SessionAnswering):
            self._own_session = self.open_session(own.settings, self._recorders)
            self.use(self._own_session)

    def end_run(self) -> None:
        """The next request belongs to another run, and is no business of this one's ``--use_cache``."""
        self.session.is_over = True
        self.cache_hook = CacheHook(None)

    def batch_limits(
        self, press: PressSpec, requests: RequestBatches[Any], quantization: Quantization | None = None, /
    ) -> tuple[int, int | None]:
        """Items and tokens per batch, at most; with ``batch_size=auto`` as many tokens as there is memory for."""
        free = batch_size.free_bytes(self.press_model.device)
        return self.batch_limits_within(free, press, requests, quantization)

    def batch_limits_within(
        self,
        free: int | None,
        press: PressSpec,
        requests: RequestBatches[Any],
        quantization: Quantization | None = None,
        /,
    ) -> tuple[int, int | None]:
        """As `batch_limits`, for a device of so many free bytes; None for a CPU."""
        if self.batch_size != "auto":
            return int(self.batch_size), None
        share = 1.0 if requests.is_cached_whole else batch_size.kept_share(press, self.model.config)
        config, dtype = self.model.config, self.model.get_input_embeddings().weight.dtype
        footprint = Footprint.of(config, dtype, share=share, quantization=quantization)
        copies = requests.num_cache_copies
        return self.max_batch_size, batch_size.tokens_per_batch(footprint, free, num_copies=copies)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.mixed_precision_dtype is None:
            return nullcontext()
        return torch.autocast(device_type=self.device.type, dtype=self.mixed_precision_dtype)

    # ------------------------------------------------------------------------------------------- request types

    @of_a_run
    @answer_padding
    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        if self.enable_thinking:
            raise UsageError("enable_thinking=True generates text; loglikelihood tasks cannot use it")
        batches = likelihood_batches(self, self.session, requests)
        self.session.settings.check_likelihoods(batches.longest_scored, "continuations")
        return self._answer([batches], disable_tqdm, requests)

    @of_a_run
    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        self.session.settings.check_has_questions("token ids")
        pairs = [(context, continuation) for _, context, continuation in requests]
        ids = [RequestId("", None, index) for index in range(len(pairs))]
        return self._answer([likelihood_batches_of_tokens(self, self.session, pairs, ids)], disable_tqdm)

    @of_a_run
    @answer_padding
    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        self.session.settings.check_has_questions("documents of loglikelihood_rolling")
        if self.session.settings.rolling == "stream":
            batches = stream_batches(self, self.session, requests, self._loss_files())
            return self._answer([batches], disable_tqdm, requests)
        windows = rolling_batches(self, self.session, requests)
        self.session.settings.check_likelihoods(windows.longest_scored, "scored parts of documents")
        return self._answer([windows], disable_tqdm, requests)

    @of_a_run
    @answer_padding
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return self._answer(generation_batches(self, self.session, requests), disable_tqdm, requests)

    def _loss_files(self) -> LossFiles | None:
        settings = self.session.settings
        if settings.stream_output is None:
            return None
        compared = {"fidelity": True} if settings.fidelity else {}  # what was not compared is no part of such a run
        return LossFiles(Path(settings.stream_output), self._identity() | compared, self.rank, self.world_size)

    def _answer(
        self, kinds: Sequence[RequestBatches[Any]], disable_tqdm: bool, requests: Sequence[Instance] = ()
    ) -> list[Any]:
        """One answer per request, in request order; lm-eval's cache is told those to ``requests`` as they come."""
        self.session.gathered = None
        request_type, answers = kinds[0].request_type if kinds else "", dict[int, Any]()
        total = sum(batches.progress_total for batches in kinds)
        with self.press_model.in_use(), self._progress(request_type, total, disable_tqdm) as bar:
            for index, answer in self.answering.answers(kinds, bar):
                answers[index] = answer
                if requests:
                    self.cache_hook.add_partial(request_type, requests[index].args, answer)
        return [answers[index] for index in range(len(answers))]

    def _progress(self, what: str, total: int, disable_tqdm: bool) -> tqdm[Any]:
        label = f"{what} (press={self.session.settings.press_name})"
        return tqdm(total=total, desc=label, disable=disable_tqdm or self.rank != 0)

    # ----------------------------------------------------------------------------------------------------- record

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        super().set_cache_hook(cache_hook)
        if cache_hook.dbdict is None:
            return
        identity.check_owner(cache_hook.dbdict, Path(cache_hook.dbdict.filename), self._identity())
        on_each_read(cache_hook.dbdict, self._count_cached)

    def _count_cached(self) -> None:
        self.begin_run()
        self.session.num_from_cache += 1

    def _identity(self) -> dict[str, Any]:
        return identity.run_identity(self, self.describe(), self._arguments_of_answers)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """lm-eval gathers what tasks made of the answers once all are there; with it goes what the record needs.

        Only rank 0 is asked for the record, so a run is over here for every rank.
        """
        gathered: list[Any] | None = super().gather_object((obj, self.session.own_facts), dst)
        self.end_run()
        if gathered is None:
            return None
        self.session.gathered = ranks.merge([facts for _, facts in gathered])
        return [own for own, _ in gathered]

    def get_model_info(self) -> dict[str, Any]:
        """``HFLM``'s facts, and under ``kvpress`` what was asked, what was measured, and with which versions.

        The run is over with it: what is asked next is counted and timed anew.
        """
        share_log_handlers("lm_eval")  # again: --verbosity comes into force after the requests
        messages.log_kept_shares(self.session.settings, self.session.facts.totals)
        messages.log_records(self.session.settings, self.session.facts)
        record = self.describe()
        for note in record["answered_before"]["notes"]:
            logger.warning("%s", note)
        self.end_run()
        return {**super().get_model_info(), "kvpress": record}

    def describe(self) -> dict[str, Any]:
        """The record of this run: press, protocol, measured kept shares per task, versions."""
        facts, labels = self.session.facts, self.session.runner.meter.labels
        return {
            "run": labels.run,
            "pretrained": self.pretrained_name,
            **run_record.asked(self.session.settings, self.max_length),
            "ignored_arguments": self._ignored,
            "attn_implementation": self.model.config._attn_implementation,
            "device": str(self.device),
            "machine": machine(self.device),
            "fast": self.press_model.is_fast,
            "linear_layers": self.press_model.linear_library,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "batch_size": self.batch_size,
            "generation_config": checkpoint_options(self.model.generation_config),
            "parity": None if self._parity is None else self._parity.summary(),
            **run_record.measured(facts, labels.machine),
            "answered_before": answered_before(facts, labels.machine, is_batched=self.batch_size != 1),
            "versions": run_record.versions(),
        }


def _opened(settings: Settings) -> list[Recorder]:
    """What records go to, before weights are read: a file in use or a port that is taken costs no load."""
    log = None if settings.throughput_log is None else Path(settings.throughput_log)
    return list(open_recorders(log, settings.metrics_port, rank_in_run()))


class PythiaKVPress(KVPress):
    """`KVPress` whose default checkpoint is Pythia-2.8B."""

    DEFAULT_PRETRAINED = DEFAULT_CHECKPOINTS["pythia-kvpress"]
