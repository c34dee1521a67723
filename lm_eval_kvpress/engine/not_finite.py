"""The error that ends a run whose scores, losses or logits are not finite: a figure made of them would look right.

The most likely token of logits that hold NaN is the first of these, often the end of text: an empty answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.models.pressable import PressableModel


def check_finite(
    logprobs: Sequence[float], what: str, model: PressableModel, press: str, *, num_before: int = 0
) -> None:
    """Refuse log-probabilities, or losses, that are not finite.

    Args:
        what: the request that they belong to.
        num_before: tokens of the request that were scored before these.

    Raises:
        UsageError: naming the request and the first such token.
    """
    for place, logprob in enumerate(logprobs):
        if not math.isfinite(logprob):
            raise not_finite(f"{what} has a log-likelihood after {num_before + place} tokens", model, press)


def not_finite(what: str, model: PressableModel, press: str) -> UsageError:
    """An error that says what is not finite, and the likely cause.

    Args:
        what: the subject and its verb, such as "request 3 of task 'x' has a log-likelihood".
        model: whose weights are looked through.
        press: the name of the press.
    """
    return UsageError(f"{what} that is not finite (dtype {model.model.dtype}, press={press}): {_cause(model)}")


def _cause(model: PressableModel) -> str:
    for name, weight in model.model.named_parameters():
        if weight.device.type != "meta" and not weight.isfinite().all():
            return f"the checkpoint's weight {name} holds NaN or inf"
    if model.model.dtype == torch.float16 or torch.is_autocast_enabled(model.device.type):
        return "overflow in float16 is the usual cause; try dtype=float32"
    return "the weights are finite; try dtype=float32, and press=none to see whether the press is the cause"
