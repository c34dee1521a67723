"""The settings of a run: the press, how it is measured, and where records go.

The fields that a user types carry all that their check needs: the type is the annotation, the range of a number or the
endings of a file name stand in the field's metadata. Knows presses. Does not know models, lm-eval or how values are
typed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from lm_eval_kvpress.cache.quantized import Quantization
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.presses.decoding import DecodingSpec
from lm_eval_kvpress.presses.spec import PressSpec
from lm_eval_kvpress.presses.values import Range

POSITIVE = {"range": Range(low=1)}

MAX_WINDOW = 1_024
"""Default tokens of context and of a block under ``rolling=prefix``, at most. Half of 32,768 positions is longer than
every page of WikiText-2, and a press would act on none of them."""


@dataclass(frozen=True)
class Settings:
    """How to compress and how to score.

    Attributes:
        press: what compresses the cache, with all its arguments.
        query_tokens: last tokens of a context that are held back and fed after compression. 0 predicts the first
            continuation token from the full cache, as most scripts do.
        query_aware: whether contexts are compressed with the question in them. If not, it is held back with all that
            follows it, and ``query_tokens`` are those of documents and of prompts without a question.
        question_pattern, question_field: where the question begins: at the last match of this regular expression, or
            where this field of the document stands last. Without both, the rule of the task (`questions`).
        rolling: protocol of ``loglikelihood_rolling``.
        rolling_context, rolling_score: tokens prefilled and scored per window of ``prefix``; None is half of
            ``max_length`` and `MAX_WINDOW` at most, or what the other one leaves if that is less.
        short_context: what happens to contexts shorter than the press needs.
        allow_extrapolation: whether positions may exceed those that the model was trained on.
        parity: whether the record gets the parity certificate (`parity`): our answers at ratio 0 against stock
            ``HFLM``'s, on the same weights.
        fidelity: whether log-likelihoods are predicted over the full cache as well, and compared token by token.
        fast: whether forwards may be made quicker (`models.fast`); if not, transformers' modules and PyTorch compute
            everything.
        stream_budget: entries that every layer keeps under ``rolling=stream``.
        stream_chunk: tokens scored per step of a stream; 1 is the strict protocol of the papers.
        stream_positions: ``cache`` rotates kept keys by their place in the cache, ``original`` by their place in the
            document.
        stream_output: folder for the losses by token position; a run that was killed continues from it.
        throughput_log: ``FILE.jsonl`` for a record per batch and request, or ``FILE.csv`` for requests only.
        metrics_port: port on 127.0.0.1 that serves the figures to Prometheus while the run lasts.
        target_size, compression_interval: with ``press=decoding:PRESS`` or ``prefill_decoding:PREFILL+PRESS``, entries
            that every layer keeps while text is generated, and tokens produced between two compressions.
        target_compression_ratio: with ``press=compression_ratio_decoding:PRESS``, the share of all tokens seen that is
            evicted, in place of ``target_size``.
        merge_budget: with ``press=cam:PRESS``, kept entries among which an evicted value is shared out.
        decode_scoring: whether that press acts on continuations that are scored as well, as if they were generated.
        decoding: the press that acts while text is generated, made of these four; None without one.
        kv_quant: how the kept entries of a context are stored: ``none`` in the dtype of the model, as
            integers, or as floats of 8 bits, which have no groups.
        kv_group: numbers that share a scale.
        kv_residual: newest entries of a context that stay in the dtype of the model.
        kv_layout: ``kivi`` groups keys by channel and values by token, ``token`` both by token.
        kv_scales: ``compact`` stores scale and zero of a group in 24 bits (16 with int2), ``float`` both in the dtype
            of the model.
    """

    press: PressSpec
    query_tokens: int = field(default=1, metadata={"range": Range(low=0)})
    query_aware: bool = True
    question_pattern: str | None = None
    question_field: str | None = None
    rolling: Literal["prefix", "one_pass", "stream"] = "prefix"
    rolling_context: int | None = field(default=None, metadata=POSITIVE)
    rolling_score: int | None = field(default=None, metadata=POSITIVE)
    short_context: Literal["keep", "shrink", "error"] = "keep"
    allow_extrapolation: bool = False
    parity: bool = False
    fidelity: bool = False
    fast: bool = True
    stream_budget: int | None = field(default=None, metadata=POSITIVE)
    stream_chunk: int = field(default=64, metadata=POSITIVE)
    stream_positions: Literal["cache", "original"] = "cache"
    stream_output: str | None = None
    throughput_log: str | None = field(default=None, metadata={"endings": (".jsonl", ".csv")})
    metrics_port: int | None = field(default=None, metadata={"range": Range(low=1, high=65_535)})
    target_size: int | None = field(default=None, metadata=POSITIVE)
    compression_interval: int | None = field(default=None, metadata=POSITIVE)
    target_compression_ratio: float | None = field(
        default=None, metadata={"range": Range(low=0, high=1, excludes_high=True)}
    )
    merge_budget: int | None = field(default=None, metadata=POSITIVE)
    decode_scoring: bool = False
    decoding: DecodingSpec | None = None
    kv_quant: Literal["none", "int8", "int4", "int2", "fp8"] = "none"
    kv_group: int = field(default=64, metadata={"range": Range(low=8)})
    kv_residual: int = field(default=0, metadata={"range": Range(low=0)})
    kv_layout: Literal["kivi", "token"] = "kivi"
    kv_scales: Literal["compact", "float"] = "compact"

    @property
    def quantization(self) -> Quantization | None:
        """How kept entries are packed; None if they are not."""
        if self.kv_quant == "none":
            return None
        return Quantization(self.kv_quant, self.kv_group, self.kv_residual, self.kv_layout, self.kv_scales)

    @property
    def press_name(self) -> str:
        """As the user would type it, the press that acts while decoding included."""
        if self.decoding is None:
            return self.press.name
        if self.press.is_none:
            return self.decoding.full_name
        return f"prefill_decoding:{self.press.name}+{self.decoding.name}"

    @property
    def all_presses(self) -> tuple[PressSpec, ...]:
        """The press of the prefill, and the one that acts while decoding, if there is one."""
        return (self.press,) if self.decoding is None else (self.press, self.decoding.press)

    def describe_press(self) -> dict[str, Any]:
        """Name and arguments of the press, for the record; ready for JSON."""
        facts = self.press.describe()
        if self.decoding is None:
            return facts
        decoding = {f"decoding.{key}": value for key, value in self.decoding.describe().items()}
        statistics = self.decoding.press.statistics
        read = {} if statistics is None else {"decoding_statistics": statistics.describe()}
        scoring = {"decode_scoring": True} if self.decode_scoring else {}
        return {**facts, "name": self.press_name, "arguments": {**facts["arguments"], **decoding, **scoring}, **read}

    @property
    def num_before_decoding(self) -> int:
        """New tokens of a text or continuation that are predicted before the press that acts while decoding acts.

        As kvpress's ``DecodingPress``, it counts forwards after the prefill. The first of them feeds what was held back
        and predicts the first new token; if nothing was, the prefill predicts that token, and the press acts one later.
        """
        assert self.decoding is not None
        return self.decoding.interval + (self.query_tokens == 0)

    @property
    def acts_on_rolling(self) -> bool:
        """Whether a press can act on documents of ``loglikelihood_rolling``."""
        return self.rolling != "one_pass" and not (self.press.is_none and not self.decode_scoring)

    @property
    def shares_prefill(self) -> bool:
        """Whether one prefill, by the attention that most presses run on, serves this press beside others."""
        return self.press.shares_prefill and self.attn_implementation != "eager" and self.rolling != "stream"

    @property
    def attn_implementation(self) -> str | None:
        """The attention implementation that its presses need, or None if any will do."""
        of_decoding = None if self.decoding is None else self.decoding.attn_implementation
        return self.press.attn_implementation or of_decoding

    def rolling_window(self, max_length: int) -> tuple[int, int]:
        """``(context, score)`` tokens per window of the ``prefix`` protocol.

        Raises:
            UsageError: if they do not fit into ``max_length``.
        """
        window = min(max_length // 2, MAX_WINDOW)
        least = self.query_tokens + 1
        context = self.rolling_context or min(max(window, least), max_length - (self.rolling_score or 1))
        score = self.rolling_score or min(window, max_length - context)
        if context < 1 or score < 1 or context + score > max_length:
            raise UsageError(
                f"rolling_context={context} + rolling_score={score} exceed max_length={max_length}: "
                "make one of them smaller, or raise max_length if the model has the positions"
            )
        if context <= self.query_tokens:
            raise UsageError(
                f"rolling_context={context} leaves nothing to compress after query_tokens={self.query_tokens} are "
                "held back: raise rolling_context or lower query_tokens"
            )
        return context, score

    @property
    def is_question_known(self) -> bool:
        """Whether the user said where the question begins."""
        return self.question_pattern is not None or self.question_field is not None

    @property
    def question_needed_by(self) -> str:
        """The argument because of which it must be known where questions begin; empty if none needs that."""
        if not self.query_aware:
            return "query_aware=false"
        return f"press={self.press_name}" if self.press.reads_question else ""

    def check_question(self) -> None:
        """Refuse what does not say where the question begins, leaves no token to hold back, or hides the question from
        a press that reads it.

        Raises:
            UsageError: in one line.
        """
        if self.question_pattern is not None and self.question_field is not None:
            raise UsageError("question_pattern and question_field both say where the question begins: give one")
        if self.question_pattern is not None:
            _check_pattern(self.question_pattern)
        if not self.query_aware and self.query_tokens == 0:
            raise UsageError(
                "query_tokens=0 feeds nothing after compression, and query_aware=false all of the question: leave one "
                "of them out"
            )
        if not self.query_aware and self.press.reads_question:
            raise UsageError(
                f"press={self.press_name} scores the context by the question, which query_aware=false holds back: "
                "leave query_aware out, or take snapkv"
            )

    def check_has_questions(self, what: str) -> None:
        """Refuse to run a press that reads questions on what has none.

        Args:
            what: is asked for, in the plural.

        Raises:
            UsageError: naming what to choose instead.
        """
        if self.press.reads_question:
            raise UsageError(
                f"press={self.press_name} scores a context by the question behind it, and {what} have none: choose "
                "tasks that ask, or take snapkv, whose window is the last tokens"
            )

    def check_decode_scoring(self) -> None:
        """Refuse to compress while scoring without a press that does, or under a protocol in which none can.

        Raises:
            UsageError: in one line.
        """
        if self.decode_scoring and self.decoding is None:
            raise UsageError(
                f"decode_scoring=true lets a decoding press act on what is scored, and press={self.press_name} is "
                "none: use press=decoding:PRESS,target_size=N, or leave decode_scoring out"
            )
        if self.decode_scoring and self.rolling == "one_pass":
            raise UsageError(
                "rolling=one_pass scores a document in one forward, in which no press can act: leave rolling or "
                "decode_scoring out"
            )

    def check_likelihoods(self, num_tokens: int, what: str) -> None:
        """Refuse to score under a press that acts only while text is generated, if nothing would be compressed.

        Args:
            num_tokens: of the longest continuation.
            what: is scored, in the plural.

        Raises:
            UsageError: naming what to choose instead.
        """
        if self.decoding is None or not self.press.is_none:
            return
        if not self.decode_scoring:
            raise UsageError(
                f"press={self.press_name} acts while text is generated and cannot change a log-likelihood: choose "
                "tasks that generate, or press=none, or prefill_decoding:PREFILL+PRESS, or pass decode_scoring=true"
            )
        if num_tokens <= self.num_before_decoding:
            raise UsageError(
                f"press={self.press_name} acts after {self.num_before_decoding} tokens and the longest of the {what} "
                f"has {num_tokens}: no score would change; lower compression_interval, or choose tasks with longer ones"
            )

    def check_stream(self, positions: int) -> None:
        """Refuse a stream that would score with positions the model was not trained on.

        Args:
            positions: the model's trained positions.

        Raises:
            UsageError: naming what to change.
        """
        if self.rolling != "stream" or self.allow_extrapolation:
            return
        assert self.stream_budget is not None
        if self.stream_positions == "original":
            raise UsageError(
                f"stream_positions=original leaves the {positions} trained positions behind in a longer document: use "
                "stream_positions=cache, or pass allow_extrapolation=true to measure what happens"
            )
        if self.stream_budget + self.stream_chunk > positions:
            raise UsageError(
                f"stream_budget={self.stream_budget} + stream_chunk={self.stream_chunk} exceed the {positions} "
                "positions that the model was trained on: make one of them smaller"
            )


def _check_pattern(pattern: str) -> None:
    """Refuse what is no regular expression, or is found everywhere: its last match would be the end of each prompt."""
    try:
        matches_nothing = re.search(pattern, "") is not None
    except re.error as error:
        raise UsageError(f"question_pattern={pattern} is no regular expression: {error}") from error
    if matches_nothing:
        raise UsageError(
            f"question_pattern={pattern} is found everywhere, also where there is no text: give one that the question "
            "begins with"
        )
