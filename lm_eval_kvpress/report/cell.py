"""What one results file says: which model and press ran, each task's figures, what was kept and how fast it was.

Frozen values, and what follows from one of them alone. Nothing is invented: what a file does not say is None.
Knows neither JSON nor other runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lm_eval_kvpress.report.fidelity import Fidelity, Figure, Place, pooled, pooled_places

STOCK_PROTOCOL = (("rolling", "stock lm-eval: one forward"),)
DTYPE_BITS = {"float64": 64, "float32": 32, "float16": 16, "bfloat16": 16}
BUDGETS = ("stream_budget", "kv_budget")  # arguments that say how many entries may stay
Pairs = tuple[tuple[str, str], ...]
Identity = tuple[str, ...]


DECODING_ALONE = ("decoding:", "compression_ratio_decoding:", "cam:")
"""Names of presses that begin so act while text is generated, and leave the prefill alone."""


@dataclass(frozen=True)
class Press:
    """What compressed the cache.

    Attributes:
        name: as in ``press=``; ``none`` for the uncompressed cache and for stock lm-eval.
        arguments: sorted, defaults included; ``stream_budget`` among them for streams.
        removed_asked: the fraction that ``compression_ratio`` asks to remove. None under a budget, and for a press
            that leaves the prefill alone.
        changes_entries: what it does to entries that it does not remove; empty for most presses.
        packed_as: how entries are stored, such as ``int4``; empty for the dtype of the model.
    """

    name: str
    arguments: Pairs = ()
    removed_asked: float | None = None
    changes_entries: str = ""
    packed_as: str = ""

    @property
    def is_none(self) -> bool:
        """Whether this is the uncompressed cache: nothing evicts, and nothing is packed."""
        return not self.evicts and not self.packed_as

    @property
    def evicts(self) -> bool:
        """Whether there is a press, and not quantization alone."""
        return self.name != "none"

    @property
    def acts_on_prefill(self) -> bool:
        return self.evicts and not self.name.startswith(DECODING_ALONE)

    @property
    def acts_on_decoding(self) -> bool:
        return self.name.startswith((*DECODING_ALONE, "prefill_decoding:"))

    @property
    def has_stream_budget(self) -> bool:
        return "stream_budget" in dict(self.arguments)


@dataclass(frozen=True)
class Metric:
    """One figure of one task, or of a group of tasks.

    Attributes:
        value: None where the file holds no number.
        higher_is_better: None where nothing says so.
        averaged: the metrics of the same task whose mean it is; empty for a figure of its own.
    """

    name: str
    filter: str
    value: float | None
    stderr: float | None = None
    higher_is_better: bool | None = None
    averaged: tuple[str, ...] = ()

    @property
    def is_length(self) -> bool:
        """Whether it is named by the length of its documents in tokens, as RULER's are."""
        return self.name.isdecimal()


@dataclass(frozen=True)
class Kept:
    """What a press left of a task's contexts: sums over contexts; shares are fractions of the prefilled tokens.

    ``num_texts`` counts generated texts, ``num_texts_at_limit`` those that nothing but their allowed length ended. The
    first is 0 and the second None in files of older versions, which do not say it. So is ``bytes_unpacked``, which the
    allocated entries would take in the dtype of the model.
    """

    num_contexts_pressed: int
    num_contexts_unpressed: int
    num_short_contexts: int
    num_tokens: int
    num_tokens_scored_pressed: int
    num_texts: int
    num_texts_compressed: int
    num_decode_compressions: int
    share: float | None
    share_min_layer: float | None
    share_max_layer: float | None
    bytes_before: int
    bytes_allocated: int
    bytes_effective: int
    max_stream_bytes: int
    bytes_unpacked: int | None = None
    num_tokens_generated: int | None = None
    num_texts_at_limit: int | None = None


@dataclass(frozen=True)
class Task:
    """One task of one run.

    Attributes:
        metrics: empty where answers were logged and not scored (``--predict_only``).
        is_rolling: whether whole texts are scored (lm-eval's ``loglikelihood_rolling``).
        is_chosen: whether only some documents were run, and not the first ones: ``--samples`` named them, and the
            results do not say which.
        fingerprint: lm-eval's hash of the task's documents and prompts; None where no samples were logged.
        loaded: which texts the task says that it loaded (``metadata.loaded``); None where it says nothing.
        few_shots: what the choice and the layout of the examples depend on; None without examples, or where the file
            does not say.
        generation: the arguments of generation, which the hash leaves out; None where the file does not say.
        kept: None where nothing was measured.
        fidelity: None where it was not measured.
        held_back: the least, the median and the most tokens of a prompt that were fed after compression; None where
            the file does not say.
        notes: what the press reported, and for how many contexts.
        num_cut: contexts that lost their beginning because they did not fit.
        num_without_question, num_without_context: prompts in which no question was found, and those with nothing
            before it, where questions are looked for.
    """

    name: str
    metrics: tuple[Metric, ...]
    is_rolling: bool
    num_documents: int | None
    num_documents_available: int | None
    is_chosen: bool
    version: str
    num_fewshot: str
    fingerprint: str | None
    loaded: str | None
    kept: Kept | None
    notes: tuple[tuple[str, int], ...]
    samples: Path | None
    few_shots: str | None = None
    generation: str | None = None
    held_back: tuple[float, float, float] | None = None
    fidelity: Fidelity | None = None
    num_cut: int = 0
    num_without_question: int = 0
    num_without_context: int = 0


@dataclass(frozen=True)
class Group:
    """Averages over tasks; ``members`` are those that ran and count, sorted."""

    name: str
    metrics: tuple[Metric, ...]
    members: tuple[str, ...]


@dataclass(frozen=True)
class Speed:
    """Rates in tokens per second and medians in seconds, measured after warm-up.

    Attributes:
        bounds: the 95 % interval of each that is known, by its name.
        withheld: what the file holds and rests on too little (`speeds`).
        machine: processor, threads, memory and GPU; None where the file does not say.
    """

    prefill_tokens_per_sec: float | None = None
    score_tokens_per_sec: float | None = None
    decode_tokens_per_sec: float | None = None
    ttft_sec: float | None = None
    tpot_sec: float | None = None
    peak_memory_bytes: float | None = None
    bounds: tuple[tuple[str, tuple[float, float]], ...] = ()
    withheld: tuple[str, ...] = ()
    machine: str | None = None


@dataclass(frozen=True)
class Cell:
    """One results file.

    Attributes:
        date: seconds since the epoch.
        seeds: empty in files that say none; the value is "None" for a seed that was not set.
        num_batches: how many batches were timed; None for stock lm-eval.
        parity: whether ratio 0 gave stock lm-eval's answers; None where that was not checked.
        identity: what ran, to find its losses by position; None for stock lm-eval.
        num_parameters: of the model.
    """

    file: Path
    date: float
    model: str
    checkpoint: str
    dtype: str
    device: str
    attention: str
    batch_size: str
    model_settings: Pairs
    protocol: Pairs
    press: Press
    seeds: Pairs
    tasks: tuple[Task, ...]
    speed: Speed
    num_batches: int | None
    parity: bool | None
    versions: Pairs
    identity: Identity | None = None
    groups: tuple[Group, ...] = ()
    num_parameters: float | None = None

    def task(self, name: str) -> Task | None:
        return next((task for task in self.tasks if task.name == name), None)

    def group(self, name: str) -> Group | None:
        return next((group for group in self.groups if group.name == name), None)

    @property
    def is_stock(self) -> bool:
        return self.protocol == STOCK_PROTOCOL

    @property
    def is_query_aware(self) -> bool:
        """Whether questions were compressed with their contexts."""
        return dict(self.protocol).get("query_aware") != "false"

    @property
    def rolling(self) -> str | None:
        return dict(self.protocol).get("rolling")

    @property
    def is_stream(self) -> bool:
        return self.rolling == "stream"

    @property
    def unmeasured_tasks(self) -> tuple[str, ...]:
        """Tasks whose answers came from lm-eval's cache or an earlier run, so that no model computed them here."""
        if self.num_batches is None:
            return ()
        tasks = (task for task in self.tasks if task.num_documents)
        return tuple(task.name for task in tasks if task.kept is None or self.num_batches == 0)

    @property
    def kept(self) -> list[Kept]:
        """What was kept, for each task that measured it."""
        return [task.kept for task in self.tasks if task.kept is not None]

    @property
    def kept_share(self) -> float | None:
        """Kept fraction of the tokens that went through the press, over all tasks; 1 for ``press=none``."""
        known = [kept for kept in self.kept if kept.share is not None]
        num_tokens = sum(kept.num_tokens for kept in known)
        if num_tokens:
            return sum(kept.num_tokens * (kept.share or 0.0) for kept in known) / num_tokens
        return 1.0 if not self.press.evicts and not self.is_stream else None

    @property
    def cache_size(self) -> float | None:
        """Bytes that are held, as a fraction of those of the full cache, over all tasks."""
        before = sum(kept.bytes_before for kept in self.kept)
        return sum(kept.bytes_allocated for kept in self.kept) / before if before and not self.is_stream else None

    @property
    def bits_per_number(self) -> float | None:
        """Bits that each stored number of keys and values takes, scales included; None where the file does not say."""
        unpacked = sum(kept.bytes_unpacked or 0 for kept in self.kept)
        bits = DTYPE_BITS.get(self.dtype)
        if not unpacked or bits is None or "mixed_precision_dtype" in dict(self.model_settings):
            return None
        return bits * sum(kept.bytes_allocated for kept in self.kept if kept.bytes_unpacked) / unpacked

    @property
    def bytes_allocated(self) -> float | None:
        return self._bytes_per_context([kept.bytes_allocated for kept in self.kept])

    @property
    def bytes_effective(self) -> float | None:
        return self._bytes_per_context([kept.bytes_effective for kept in self.kept])

    @property
    def num_uncompressed(self) -> float | None:
        """Contexts that a press of the prefill left whole."""
        if not self.kept or not self.press.acts_on_prefill:
            return None
        return float(sum(kept.num_contexts_unpressed for kept in self.kept))

    @property
    def tokens_per_text(self) -> float | None:
        """Mean length of generated texts."""
        return self._per_text([kept.num_tokens_generated for kept in self.kept])

    @property
    def share_at_limit(self) -> float | None:
        """Fraction of generated texts that nothing but their allowed length ended."""
        return self._per_text([kept.num_texts_at_limit for kept in self.kept])

    @property
    def fidelities(self) -> list[Fidelity]:
        """For each task that measured it."""
        return [task.fidelity for task in self.tasks if task.fidelity is not None]

    @property
    def kl(self) -> Figure | None:
        """KL from the full cache's predictions in nats, mean over the tokens of all tasks that measured it."""
        return self._per_compared_token([fidelity.kl for fidelity in self.fidelities])

    @property
    def agreement(self) -> Figure | None:
        """Share of tokens for which both caches have the same most likely one, over all tasks that measured it."""
        return self._per_compared_token([fidelity.agreement for fidelity in self.fidelities])

    @property
    def kl_places(self) -> tuple[Place, ...]:
        """KL by place after the context, over the tokens of all tasks that measured it."""
        return pooled_places(self.fidelities)

    def _per_compared_token(self, figures: list[Figure]) -> Figure | None:
        return pooled([fidelity.num_tokens for fidelity in self.fidelities], figures)

    def _per_text(self, sums: list[int | None]) -> float | None:
        """Mean over the texts of all tasks that say it."""
        known = [(kept.num_texts, count) for kept, count in zip(self.kept, sums, strict=True) if count is not None]
        num_texts = sum(texts for texts, _ in known)
        return sum(count for _, count in known) / num_texts if num_texts else None

    def _bytes_per_context(self, sums: list[int]) -> float | None:
        """Mean over all contexts, compressed or not. For a stream: the most that its caches took at once."""
        if self.is_stream:
            return float(max((kept.max_stream_bytes for kept in self.kept), default=0)) or None
        num_contexts = sum(kept.num_contexts_pressed + kept.num_contexts_unpressed for kept in self.kept)
        return sum(sums) / num_contexts if num_contexts else None
