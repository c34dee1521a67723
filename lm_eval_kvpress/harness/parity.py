"""The parity certificate: at ratio 0 our path gives stock lm-eval's answers, for all three request types.

Knows lm-eval's requests and two models that answer them. Does not know how ours computes its answers.

The reference is lm-eval's own ``HFLM`` on the weights that were just loaded, asked *before* the change of basis: no
second copy in memory, no second load, and no line of ours between the checkpoint and its answers. Ours answers
afterwards, on the same weights in their new basis, under the press with ratio 0.

All differences are in nats per token, so that one tolerance serves: the rounding of the largest logit, so many times
as `ROUNDINGS` says. Generated texts are compared token by token; where they part, the difference is how much lower the
other token's score is, which is nothing at a tie.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from lm_eval_kvpress.harness.parity_requests import (
    MAX_LENGTH,
    generation_requests,
    loglikelihood_requests,
    rolling_requests,
)
from lm_eval_kvpress.harness.text_gap import text_gap
from lm_eval_kvpress.presses.spec import PressSpec

logger = logging.getLogger("lm_eval_kvpress")

ROUNDINGS = {torch.float32: 128, torch.float16: 2, torch.bfloat16: 2}
"""How many roundings of the largest number two correct computations may differ by. Sums of many terms err by more
roundings where these are small; in 16 bit the last rounding, that of the logit itself, outweighs them."""


@dataclass(frozen=True)
class Answers:
    """What a model answered to the requests of the certificate.

    Attributes:
        loglikelihood: sum of log-probabilities and whether it is the greedy continuation, per request.
        rolling: log-likelihood per document.
        texts: generated texts.
    """

    loglikelihood: tuple[tuple[float, bool], ...]
    rolling: tuple[float, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class ParityCertificate:
    """Largest differences between our answers at ratio 0 and stock ``HFLM``'s, in nats per token.

    Attributes:
        press: the press that ran with ratio 0.
        loglikelihood, loglikelihood_rolling, generate_until: per request type.
        greedy_disagreements: requests whose ``is_greedy`` differs; counts against the certificate in float32 only,
            since ties within the rounding of 16 bits fall either way.
        tolerance: for each of the three.
        num_requests: answered by both.
        dtype: of the weights.
    """

    press: str
    loglikelihood: float
    loglikelihood_rolling: float
    generate_until: float
    greedy_disagreements: int
    tolerance: float
    num_requests: int
    dtype: str

    @property
    def passed(self) -> bool:
        differences = (self.loglikelihood, self.loglikelihood_rolling, self.generate_until)
        exact = self.dtype != "float32" or self.greedy_disagreements == 0
        return exact and all(difference <= self.tolerance for difference in differences)

    def in_words(self) -> str:
        """The verdict in one line."""
        differences = (self.loglikelihood, self.loglikelihood_rolling, self.generate_until)
        verdict = "ratio 0 gives stock HFLM's answers" if self.passed else "ratio 0 does NOT give stock HFLM's answers"
        return (
            f"{verdict} to {self.num_requests} requests (press={self.press}, largest difference "
            f"{max(differences):.2g} nats per token, tolerance {self.tolerance:.2g})"
        )

    def summary(self) -> dict[str, Any]:
        """Everything above and the verdict, ready for JSON."""
        return {**asdict(self), "passed": self.passed}


def shared_arguments(lm: HFLM, max_length: int) -> dict[str, Any]:
    """Arguments with which another ``HFLM`` on the same loaded model reads requests as ``lm`` does."""
    return {
        "tokenizer": lm.tokenizer,
        "max_length": max_length,
        "add_bos_token": lm.add_bos_token,
        "prefix_token_id": lm.custom_prefix_token_id,
        "mixed_precision_dtype": lm.mixed_precision_dtype,
        "think_end_token": lm.think_end_token,
    }


def certificate_length(lm: HFLM) -> int:
    """The ``max_length`` at which both sides answer."""
    return min(MAX_LENGTH, lm.max_length)


class StockHFLM(HFLM):
    """lm-eval's ``HFLM`` without the progress bars that it draws inside a rolling request."""

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        scores: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, True, override_bs)
        return scores


@contextmanager
def quiet_loader() -> Iterator[None]:
    """Without lm-eval's warning, at each model that is handed over loaded, that loading arguments are ignored."""
    loader = logging.getLogger(HFLM.__module__)
    level = loader.level
    loader.setLevel(logging.ERROR)
    try:
        yield
    finally:
        loader.setLevel(level)


def at_ratio_zero(press: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Model arguments for a press that removes nothing: every ratio it has is 0; ``none`` if it has none."""
    zero: dict[str, Any] = {name: 0.0 for name in arguments if name.endswith("compression_ratio")}
    zero |= {name: [0.0] * len(value) for name, value in arguments.items() if name.endswith("compression_ratios")}
    if "kv_budget" in arguments:
        zero["compression_ratio"] = 0.0
    if not zero:
        return {"press": "none"}
    kept = {name: value for name, value in arguments.items() if name != "kv_budget"}
    return {"press": press, **kept, **zero}


def stock_answers(lm: HFLM) -> Answers:
    """Stock ``HFLM``'s answers on the weights of ``lm`` as they are now; call it before they change their basis."""
    with quiet_loader():
        stock = StockHFLM(pretrained=lm.model, batch_size=2, **shared_arguments(lm, certificate_length(lm)))
    return answers(stock)


def answers(lm: HFLM) -> Answers:
    """What a model answers to the requests of the certificate."""
    return Answers(
        tuple(lm.loglikelihood(loglikelihood_requests(), disable_tqdm=True)),
        tuple(float(score) for score in lm.loglikelihood_rolling(rolling_requests(), disable_tqdm=True)),
        tuple(lm.generate_until(generation_requests(lm.max_length), disable_tqdm=True)),
    )


def certify(lm: HFLM, stock: Answers, press: PressSpec, build: Callable[..., HFLM]) -> ParityCertificate:
    """Compare our answers at ratio 0 with stock's; a difference is a warning.

    Args:
        lm: our model, whose weights have changed their basis since ``stock`` answered.
        stock: stock ``HFLM``'s answers on the same weights.
        press: what runs with ratio 0; no press if it takes no ratio, or reads questions, which the requests have not.
        build: builds our model on loaded weights from model arguments.
    """
    arguments = {"press": "none"} if press.reads_question else at_ratio_zero(press.name, press.arguments)
    shared = shared_arguments(lm, certificate_length(lm))
    with quiet_loader():
        ours = build(pretrained=lm.model, rolling="one_pass", batch_size=3, **arguments, **shared)
    certificate = compare(stock, ours, arguments["press"])
    if not certificate.passed:
        logger.warning("parity with stock HFLM at ratio 0 is off: %s", certificate)
    return certificate


def compare(stock: Answers, lm: HFLM, press: str) -> ParityCertificate:
    """Our answers against stock's.

    Args:
        lm: our model at ratio 0 with ``rolling=one_pass``, the protocol of stock ``HFLM``.
    """
    ours = answers(lm)
    pairs = zip(stock.loglikelihood, ours.loglikelihood, loglikelihood_requests(), strict=True)
    by_request = [abs(a - b) / _num_tokens(lm, request.args[1]) for (a, _), (b, _), request in pairs]
    documents = zip(stock.rolling, ours.rolling, rolling_requests(), strict=True)
    by_document = [abs(a - b) / _num_tokens(lm, request.args[0]) for a, b, request in documents]
    texts = zip(generation_requests(lm.max_length), stock.texts, ours.texts, strict=True)
    by_text = [text_gap(lm, request.args[0], text, other, request.args[1]) for request, text, other in texts]
    flags = zip(stock.loglikelihood, ours.loglikelihood, strict=True)
    return ParityCertificate(
        press=press,
        loglikelihood=worst(by_request),
        loglikelihood_rolling=worst(by_document),
        generate_until=worst(by_text),
        greedy_disagreements=sum(a != b for (_, a), (_, b) in flags),
        tolerance=rounding(lm.model.dtype) * largest_logit(lm),
        num_requests=len(by_request) + len(by_document) + len(by_text),
        dtype=str(lm.model.dtype).removeprefix("torch."),
    )


def worst(differences: Sequence[float]) -> float:
    """The largest; not a number if one of them is not (which `max` would hide)."""
    return torch.tensor(list(differences), dtype=torch.float64).max().item()


def rounding(dtype: torch.dtype) -> float:
    """The relative difference that two correct computations may show."""
    return ROUNDINGS[dtype] * torch.finfo(dtype).eps


@torch.inference_mode()
def largest_logit(lm: HFLM) -> float:
    """The largest logit, by amount, on the longest document."""
    tokens = lm.tok_encode(rolling_requests()[0].args[0])[: lm.max_length]
    return lm.model(torch.tensor([tokens], device=lm.device)).logits.abs().max().item()


def _num_tokens(lm: HFLM, text: str) -> int:
    return max(1, len(lm.tok_encode(text, add_special_tokens=False)))
