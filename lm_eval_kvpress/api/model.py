"""A loaded model for notebooks and programs: prefill, score and generate under one press after the other.

Each call is a session of the lm-eval model, so its figures are those of an evaluation. Does not know how a cache is
compressed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy
from lm_eval.api.instance import Instance
from transformers import PreTrainedModel

from lm_eval_kvpress.engine.compression import CompressedBatch
from lm_eval_kvpress.engine.contexts import Context
from lm_eval_kvpress.engine.kept_entries import copied_entries, kept_entries
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness import splitting
from lm_eval_kvpress.harness.arguments import ARGUMENTS, parse_arguments
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.harness.session import Session
from lm_eval_kvpress.harness.tokenization import encode_prompts, text_of_each
from lm_eval_kvpress.presses.arguments import BUDGET, RATIO
from lm_eval_kvpress.records.totals import KeptTotals, new_totals
from lm_eval_kvpress.report.kept_tokens import KeptTokens

OF_CALLS = (
    *("query_tokens", "query_aware", "question_pattern", "question_field", "short_context"),
    *("kv_quant", "kv_group", "kv_residual", "kv_layout", "kv_scales", "target_size", "compression_interval"),
    *("target_compression_ratio", "merge_budget", "decode_scoring"),
)
"""Settings that a call may have, beside the press and its arguments."""

OF_THE_PRESS = frozenset(
    {
        *("target_size", "compression_interval", "target_compression_ratio", "merge_budget", "decode_scoring"),
        *("rolling", "stream_budget", "stream_chunk", "stream_positions"),
    }
)
"""Settings that belong to one press: of those given to `load_model`, a call that names another has none."""

DEFAULTS_OF_CALLS = frozenset({*OF_CALLS, *OF_THE_PRESS, "press", "allow_extrapolation"})
"""Settings given to `load_model` that calls have as well; the others say what an evaluation measures and writes."""

ALTERNATIVES = ({RATIO, BUDGET}, {"question_pattern", "question_field"})
"""Arguments of which only one may be given."""


@dataclass(frozen=True)
class Score:
    """How likely a continuation is.

    Attributes:
        continuation: the text.
        logprob: its log-likelihood in nats, over the compressed cache.
        is_greedy: whether each of its tokens is the most likely one.
        kept_share: fraction of the context's entries that could be attended, 1 if no press acted.
    """

    continuation: str
    logprob: float
    is_greedy: bool
    kept_share: float


@dataclass(frozen=True)
class Generation:
    """A generated text.

    Attributes:
        text: without the prompt.
        kept_share: as of `Score`, of the prompt.
    """

    text: str
    kept_share: float


class LoadedModel:
    """A model in memory; every method takes a press by name, and its arguments, as ``--model_args`` does.

    What was given to `load_model` is the default of every call: its press with its arguments where a call names none,
    and in any case how contexts are split and stored. A call leaves nothing behind in ``lm``.

    Args:
        lm: the lm-eval model, which `lm_eval.simple_evaluate` takes as well.

    Attributes:
        lm: as given.
    """

    def __init__(self, lm: KVPress) -> None:
        self.lm = lm

    def prefill(self, context: str, *, press: str | None = None, **arguments: Any) -> KeptTokens:
        """Prefill a context under a press, and say which of its tokens each layer and head kept.

        Args:
            context: at most ``max_length`` tokens; the last ``query_tokens`` of them are fed after compression.
            press: its name; by default the one given to `load_model`, or ``none``.
            **arguments: of the press, ``compression_ratio`` among them, and the protocol's: ``query_tokens``,
                ``query_aware``, ``short_context``. The protocol's have those given to `load_model` as defaults.

        Raises:
            UsageError: for a press or an argument that does not exist, or a press that rewrites what it keeps.
        """
        with self._session(press, {**arguments, "kv_quant": "none"}) as session:
            session.settings.check_likelihoods(0, "contexts")
            parts = self._split(context, session)
            model = self.lm.press_model
            with model.in_use(), copied_entries(model.attentions) as full:
                batch = session.runner.compress([parts])
            (record,) = batch.records
            in_order, is_pressed = session.settings.press.rerotates, record.pressed
            shape = len(model.attentions), model.num_key_value_heads, len(parts.compressed)
            try:
                kept = _kept(batch, full, in_order) if is_pressed else numpy.ones(shape, dtype=bool)
            except UsageError as error:
                raise UsageError(f"press={session.settings.press_name}: {error}") from error
            texts = text_of_each(self.lm, context, parts.tokens)
        num_tokens = len(parts.compressed)
        return KeptTokens(_described(session), tuple(texts[:num_tokens]), tuple(texts[num_tokens:]), kept, record.notes)

    def score(
        self, context: str, continuations: Sequence[str], *, press: str | None = None, **arguments: Any
    ) -> list[Score]:
        """Score continuations of a context, each through its compressed cache, as lm-eval's ``loglikelihood`` does.

        Args:
            continuations: as lm-eval writes them, with the space before a word.
            press, **arguments: as for `prefill`, and ``kv_quant`` with its own.

        Raises:
            UsageError: as `prefill`.
        """
        requests = [
            Instance("loglikelihood", {}, (context, continuation), index, ("", 0, 1))
            for index, continuation in enumerate(continuations)
        ]
        with self._session(press, arguments) as session:
            answers = self.lm.loglikelihood(requests, disable_tqdm=True)
            share = _kept_share(session)
        return [
            Score(continuation, logprob, is_greedy, share)
            for continuation, (logprob, is_greedy) in zip(continuations, answers, strict=True)
        ]

    def generate(
        self,
        prompt: str,
        *,
        press: str | None = None,
        max_new_tokens: int = 64,
        until: Sequence[str] = (),
        **arguments: Any,
    ) -> Generation:
        """Continue a prompt from its compressed cache, greedily, as lm-eval's ``generate_until`` does.

        Args:
            max_new_tokens: at most.
            until: strings at which the text ends; without any, at the end of the text.
            press, **arguments: as for `score`; ``press=decoding:NAME`` compresses while text is generated.

        Raises:
            UsageError: as `prefill`.
        """
        gen_kwargs = {"max_gen_toks": max_new_tokens, "until": list(until), "do_sample": False}
        with self._session(press, arguments) as session:
            request = Instance("generate_until", {}, (prompt, gen_kwargs), 0, ("", 0, 1))
            (text,) = self.lm.generate_until([request], disable_tqdm=True)
            return Generation(text, _kept_share(session))

    @contextmanager
    def _session(self, press: str | None, arguments: Mapping[str, Any]) -> Iterator[Session]:
        """Answer under a press, with the attention implementation that it needs, until the context ends."""
        own = arguments if press is None else {"press": press, **arguments}
        settings, others = parse_arguments({**_defaults(self.lm.given, own), **own})
        for name in arguments:
            if name in others or name in ARGUMENTS and name not in OF_CALLS:
                raise UsageError(f"{name} is no argument of a call: give it to load_model, or to an evaluation")
        model, at_load = self.lm.model, self.lm.model.config._attn_implementation
        session = self.lm.open_session(settings)
        needed = settings.attn_implementation or at_load
        with self.lm.used_for_now(session):
            try:
                if needed != at_load:
                    model.set_attn_implementation(needed)
                yield session
            finally:
                if needed != at_load:
                    model.set_attn_implementation(at_load)

    def _split(self, context: str, session: Session) -> Context:
        """The context's tokens in two parts."""
        (tokens,) = encode_prompts(self.lm, [context])
        if not 0 < len(tokens) <= self.lm.max_length:
            raise UsageError(f"the context has {len(tokens)} tokens: give it 1 to max_length={self.lm.max_length}")
        request = Instance("generate_until", {}, (context, {}), 0, ("", 0, 1))
        prompt = splitting.Prompt(request, context, tuple(tokens))
        (parts,) = splitting.split_all(self.lm, session, [prompt], new_totals())
        return parts


def load_model(pretrained: str | PreTrainedModel = "builtin", **arguments: Any) -> LoadedModel:
    """Load a model once, for any number of presses.

    Args:
        pretrained: folder, hub name, ``builtin`` (the small model that ships with the package), or a loaded model.
        **arguments: that lm-eval's ``hf`` model takes, such as ``device``, ``dtype`` and ``batch_size``. A press, its
            arguments and the fields of `Settings` are those of evaluations, and the defaults of calls.

    Raises:
        UsageError: if it cannot be loaded, or evaluated.
    """
    for name in (RATIO, BUDGET):
        if "press" not in arguments and arguments.get(name):
            raise UsageError(f"{name}={arguments[name]} belongs to a press: add press=NAME, or give it to each call")
    return LoadedModel(KVPress(pretrained, **arguments))


def _defaults(at_load: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """What a call with arguments of its own has of those given at load time."""
    replaced = {name for names in ALTERNATIVES if names & own.keys() for name in names}
    found = {name: value for name, value in at_load.items() if name not in replaced}
    if "press" in own:
        found = {name: found[name] for name in DEFAULTS_OF_CALLS - OF_THE_PRESS - {"press"} if name in found}
    if found.keys() & {"question_pattern", "question_field"}:
        found.setdefault("query_aware", True)  # said, so that a press which reads no question may leave them unused
    return {name: value for name, value in found.items() if name in DEFAULTS_OF_CALLS or name not in ARGUMENTS}


def _kept(batch: CompressedBatch, full: Mapping[int, Any], in_order: bool) -> numpy.ndarray[Any, Any]:
    """What each layer and head kept, ``(L, H, P)``."""
    layers = enumerate(batch.cache.layers)
    kept: list[Any] = [kept_entries(full[index], layer, in_order=in_order).numpy() for index, layer in layers]
    return numpy.stack(kept)


def _kept_share(session: Session) -> float:
    """Of all contexts of the session so far."""
    totals = KeptTotals()
    for task in session.totals.values():
        for contexts in (task.pressed, task.unpressed):
            totals.merge(replace(contexts))
    share = totals.summary()["kept_share"]
    return 1.0 if share is None else float(share)


def _described(session: Session) -> str:
    """The press and how much it was asked to keep, in one line."""
    arguments = session.settings.press.arguments
    sizes = [f"{name}={arguments[name]}" for name in (RATIO, BUDGET) if name in arguments]
    return ", ".join([session.settings.press_name, *sizes])
