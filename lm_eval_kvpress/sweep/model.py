"""One set of weights for all cells of a sweep: a session per cell, and each context prefilled once.

lm-eval evaluates the cells one after the other. When the first of them asks for answers, all cells of the same protocol
are answered together (`answering`), and each later cell finds its answers on disk; so does a sweep that was killed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lm_eval_kvpress.engine.shared_prefill import SharedPrefills
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.answering import Answering, BatchLimits, SessionAnswering
from lm_eval_kvpress.harness.arguments import parse_arguments
from lm_eval_kvpress.harness.model import KVPress, PythiaKVPress
from lm_eval_kvpress.harness.session import Session
from lm_eval_kvpress.harness.settings import Settings
from lm_eval_kvpress.records.log_file import ThroughputLog
from lm_eval_kvpress.sweep.answering import CellAnswering
from lm_eval_kvpress.sweep.cell_run import CellRun
from lm_eval_kvpress.sweep.cell_store import CellStore
from lm_eval_kvpress.sweep.cells import Cell
from lm_eval_kvpress.sweep.settings import SweepSettings
from lm_eval_kvpress.sweep.stream_answering import StreamAnswering, StreamCell
from lm_eval_kvpress.sweep.workers.jobs import Workers

MODELS: Mapping[str, type[KVPress]] = {"pythia-kvpress": PythiaKVPress, "kvpress": KVPress}


class SweepModel:
    """The loaded model and what its cells share.

    Args:
        pretrained, arguments: model arguments of all cells.

    Attributes:
        lm: the lm-eval model, which answers under one cell after the other.
    """

    def __init__(self, pretrained: str | None = None, **arguments: Any) -> None:
        # Cells that stream have a budget each; the model itself is loaded under the default protocol and packs nothing.
        own = {
            name: value
            for name, value in arguments.items()
            if name != "rolling" and not name.startswith(("stream_", "question_", "kv_"))
        }
        self.lm = KVPress(pretrained, **own)
        self._shared_arguments = arguments
        self._shared_prefills = SharedPrefills(self.lm.press_model)
        self._full_side = self.lm.new_full_side(self._shared_prefills)
        self._attention_at_load = self.lm.model.config._attn_implementation

    @property
    def num_tokens_shared(self) -> int:
        """Tokens that were prefilled for all cells that share, each once."""
        return self._shared_prefills.num_tokens

    def open(self, cell: Cell, store: CellStore) -> CellRun:
        """A cell ready to be run, with what an earlier call answered.

        Raises:
            UsageError: if the cell does not fit the model, naming it.
        """
        settings = self._settings(cell)
        if settings.rolling == "stream":
            settings = replace(settings, stream_output=str(store.folder / "stream"))
        store.folder.mkdir(parents=True, exist_ok=True)
        if store.answers.file.exists():
            store.answers.take_back_log()
        log = ThroughputLog(store.throughput)
        session = self.lm.open_session(settings, [log], self._prefills_of(settings), self._full_side)
        meter = session.runner.meter
        meter.restore(log.records())
        return CellRun(cell, session, store, log, store.answers.keys(), len(meter.records.batches))

    def open_session(self, cell: Cell) -> Session:
        """A session in which a worker answers under the cell; nothing of it is stored."""
        settings = self._settings(cell)
        return self.lm.open_session(settings, [], self._prefills_of(settings), self._full_side)

    def _settings(self, cell: Cell) -> Settings:
        settings, _ = parse_arguments({**self._shared_arguments, **cell.arguments})
        try:
            self.lm.check_settings(settings)
        except UsageError as error:
            raise UsageError(f"cell {cell.name}: {error}") from error
        return settings

    def _prefills_of(self, settings: Settings) -> SharedPrefills | None:
        shares = settings.shares_prefill
        return self._shared_prefills if shares else None

    def turn_to(self, run: CellRun, peers: Sequence[CellRun], workers: Workers) -> None:
        """Make ``run`` the cell that answers; ``peers`` are it and the unfinished cells that share its prefills."""
        limits = self._limits(workers)
        answering: Answering = CellAnswering(run, peers, limits, workers)
        if run.session.settings.rolling == "stream":  # its documents are in loss files
            one_by_one = SessionAnswering(run.session, limits)  # saves each as it ends, while others of its batch go on
            streams = one_by_one if workers.is_here else StreamAnswering(run, limits, workers)
            answering = StreamCell(run.session, streams, answering)
        self.lm.use(run.session, answering)
        self.set_attention(run.session)

    def _limits(self, workers: Workers) -> BatchLimits:
        """Sizes of batches that fit the memory of every worker."""
        if not workers.facts:
            return self.lm.batch_limits
        free = [facts.free_bytes for facts in workers.facts if facts.free_bytes is not None]
        return functools.partial(self.lm.batch_limits_within, min(free, default=None))

    def set_attention(self, session: Session) -> None:
        """Give the model the attention implementation that the session's press needs, and free what only others use."""
        if not session.runner.compressor.shares and not session.settings.fidelity:
            self._shared_prefills.forget()
        needed = session.settings.attn_implementation or self._attention_at_load
        if self.lm.model.config._attn_implementation != needed:
            self.lm.model.set_attn_implementation(needed)


def load_model(settings: SweepSettings) -> SweepModel:
    """Load the weights that all cells share."""
    arguments = dict(settings.model_args)
    pretrained = arguments.pop("pretrained", None)
    if pretrained is None:
        pretrained = MODELS[settings.model].DEFAULT_PRETRAINED
    if settings.device is not None:
        arguments["device"] = settings.device
    if settings.trust_remote_code:
        arguments["trust_remote_code"] = True
    model = SweepModel(pretrained, batch_size=settings.batch_size, max_batch_size=settings.max_batch_size, **arguments)
    if settings.apply_chat_template and not getattr(model.lm.tokenizer, "chat_template", None):
        raise UsageError(f"apply_chat_template: the tokenizer of {model.lm.pretrained_name} has no chat template")
    return model
