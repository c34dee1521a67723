"""What is checked: a checkpoint loaded twice, once as ours and once untouched, and tokens to ask it about.

Knows the lm-eval model and transformers' loader. Does not know what is checked.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lm_eval_kvpress import recall
from lm_eval_kvpress.cache.compressed import CompressedCache
from lm_eval_kvpress.engine.contexts import Context
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness import parity
from lm_eval_kvpress.harness.argument_names import LOADING_ARGUMENTS
from lm_eval_kvpress.harness.arguments import ARGUMENTS
from lm_eval_kvpress.harness.checkpoint import resolve_pretrained
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.presses.arguments import BUDGET, RATIO
from lm_eval_kvpress.presses.parse import parse_press
from lm_eval_kvpress.verify import dense_reference

LOADING = LOADING_ARGUMENTS | {"gguf_file", "revision", "subfolder", "trust_remote_code"}
"""Arguments of the loader that the untouched copy gets as well."""

FOLLOWED = {"fast", "allow_extrapolation"}
"""Settings with which every check runs; the checks choose all others themselves."""

REFUSED = {
    *("press", "peft", "delta", "parallelize", "tp_plan", "autogptq", "gptqmodel", RATIO, BUDGET),
    *(name for name in ARGUMENTS if name not in FOLLOWED),
}

MAX_LENGTH = 512
LEAST_LENGTH = 128

PANEL: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "snapkv": {"compression_ratio": 0.6, "window_size": 16},
    "streaming_llm": {"compression_ratio": 0.7},
    "pyramidkv": {"compression_ratio": 0.5, "window_size": 8},
    "knorm": {"compression_ratio": 0.4},
    "random": {"compression_ratio": 0.9},
    "adakv:snapkv": {"compression_ratio": 0.5, "window_size": 16},
}
"""The presses that are checked: windows small enough for contexts of some hundred tokens, and ratios on both sides of a
half, where the fraction removed is not the fraction kept."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A checkpoint under test.

    Attributes:
        lm: our model without a press, its basis changed.
        untouched: the same checkpoint as transformers loads it, with a configuration of its own (models that share one
            share their attention implementation).
        loading: arguments with which it was loaded.
        max_length: of contexts and windows.
        rounding: relative difference that two correct computations may show.
        tolerance: the same for log-probabilities, in nats per token.
    """

    lm: KVPress
    untouched: PreTrainedModel
    loading: Mapping[str, Any]
    max_length: int
    rounding: float
    tolerance: float

    @classmethod
    def load(cls, arguments: Mapping[str, Any]) -> Subject:
        """Load the checkpoint twice.

        Args:
            arguments: model arguments as for lm-eval, without a press; ``dtype`` is float32 unless given, since
                mistakes hide in the rounding of 16 bits.

        Raises:
            UsageError: for an argument that the untouched copy could not follow, or too short a model.
        """
        arguments = {"pretrained": "builtin", "dtype": "float32", **arguments}
        arguments["pretrained"] = str(arguments["pretrained"])  # lm-eval reads a folder named 2024 as a number
        refused = sorted(REFUSED & arguments.keys())
        if refused:
            raise UsageError(
                f"verify compares a checkpoint with itself under its own presses and settings: leave {refused[0]} out"
            )
        lm = KVPress(**arguments)
        length = min(MAX_LENGTH, lm.max_length)
        if length < LEAST_LENGTH:
            raise UsageError(f"verify needs max_length={LEAST_LENGTH} or more, not {length}")
        loading = {name: value for name, value in arguments.items() if name in LOADING}
        loading |= {"pretrained": arguments["pretrained"], "device": str(lm.device)}
        loading["attn_implementation"] = lm.model.config._attn_implementation
        untouched = load_untouched(loading, lm.model.dtype)
        rounding = parity.rounding(lm.model.dtype)
        return cls(lm, untouched, loading, length, rounding, rounding * parity.largest_logit(lm))

    def under(self, press: str, **settings: Any) -> KVPress:
        """Our model with a press of the panel, on the same loaded weights."""
        shared = parity.shared_arguments(self.lm, self.max_length)
        arguments = {"fast": self.lm.session.settings.fast, **shared, **PANEL.get(press, {}), **settings}
        with parity.quiet_loader():
            return KVPress(pretrained=self.lm.model, press=press, **arguments)

    def presses(self, *, none: bool = False, masking: bool = True) -> list[str]:
        """The presses of the panel that run with this model's attention implementation."""
        attention = self.lm.model.config._attn_implementation
        specs = {name: parse_press(name, arguments) for name, arguments in PANEL.items()}
        return [
            name
            for name, spec in specs.items()
            if (none or not spec.is_none)
            and (masking or not spec.masks)
            and spec.attn_implementation in (None, attention)
        ]

    def tokens(self, num_tokens: int, *, seed: int = 0) -> list[int]:
        """The first tokens of a document of facts amid filler."""
        text = recall.recall_document(seed, distance=48 + 2 * num_tokens, kind=recall.KINDS[seed % 4]).context
        tokens: list[int] = self.lm.tok_encode(text)[:num_tokens]
        assert len(tokens) == num_tokens, (len(tokens), num_tokens)
        return tokens

    def different_tokens(self, num_tokens: int, *, seed: int) -> list[int]:
        """Tokens in random order, none twice before all that come back from their text have been used."""
        order = torch.randperm(len(self._whole_words), generator=torch.Generator().manual_seed(seed)).tolist()
        return [self._whole_words[order[place % len(order)]] for place in range(num_tokens)]

    @functools.cached_property
    def _whole_words(self) -> list[int]:
        """Tokens that stay whole beside others: a space and a word; every plain token where these are too few."""
        encode, known = self.lm.tok_encode, self.lm.model.get_input_embeddings().num_embeddings
        special = set(self.lm.tokenizer.all_special_ids)
        plain = [token for token in range(min(len(self.lm.tokenizer), known)) if token not in special]
        words = [
            token
            for token, text in zip(plain, map(self.lm.tokenizer.decode, plain), strict=True)
            if text.startswith(" ") and text[1:].isalpha() and encode(text, add_special_tokens=False) == [token]
        ]
        return words if len(words) >= self.max_length // 2 else plain

    def text(self, num_tokens: int, *, seed: int = 0) -> str:
        """A text of about so many tokens."""
        text: str = self.lm.tok_decode(self.tokens(num_tokens, seed=seed))
        return text

    def log_probabilities(
        self, context: Sequence[int], continuation: Sequence[int], evicted: Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Log-probabilities of a continuation's tokens, ``(n,)``, by the dense reference on the untouched copy.

        Args:
            evicted: as for `dense_reference.log_probabilities`.
        """
        return dense_reference.log_probabilities(self.untouched, [*context, *continuation], evicted)[len(context) - 1 :]

    def distributions(
        self, context: Sequence[int], continuation: Sequence[int], evicted: Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """What the dense reference predicts at the place of each token of a continuation, ``(n, V)``.

        Args:
            evicted: as for `dense_reference.log_probabilities`.
        """
        return dense_reference.distributions(self.untouched, [*context, *continuation], evicted)[len(context) - 1 :]


def load_untouched(loading: Mapping[str, Any], dtype: torch.dtype | str) -> PreTrainedModel:
    """A copy of the checkpoint that transformers loads alone, with a configuration of its own."""
    arguments = dict(loading)
    folder, device = resolve_pretrained(arguments.pop("pretrained")), arguments.pop("device")
    arguments.pop("device_map", None)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **arguments).to(device).eval()


def compress(lm: KVPress, context: Sequence[int]) -> tuple[CompressedCache, tuple[int, ...]]:
    """The compressed cache of one context and its held-back end, made and recorded as for the lm's own requests."""
    num_held_back = min(lm.session.settings.query_tokens, len(context))
    batch = lm.session.runner.compressor.compress([Context(tuple(context), num_held_back)])
    lm.session.totals["verify"].add_context(batch.records[0])
    return batch.cache, batch.queries[0]


def score(lm: KVPress, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[float]:
    """Log-likelihoods of continuations of one context, in nats, as lm-eval's requests get them."""
    return score_pairs(lm, [(context, continuation) for continuation in continuations])


def score_pairs(lm: KVPress, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
    """Log-likelihoods of continuations of contexts, in nats, by the method that lm-eval's `loglikelihood` ends in."""
    requests = [(("", ""), list(context), list(continuation)) for context, continuation in pairs]
    return [score for score, _ in lm._loglikelihood_tokens(requests, disable_tqdm=True)]
