"""How each press's statistics follow from a model: one function per press, named in `METHODS`.

Tensors come in the checkpoint's own basis, with the names of the files that kvpress published. Does not know text or
files.

Letters: L layers, H query heads, K key-value heads, D head_dim.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval.utils import simple_parse_args_string

from lm_eval_kvpress.calibrate.budget_curve import lukv
from lm_eval_kvpress.calibrate.needles import duo_attention
from lm_eval_kvpress.calibrate.queries import query_moments
from lm_eval_kvpress.calibrate.surrogate import kvzap
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.arguments import BUDGET, RATIO, arguments_of
from lm_eval_kvpress.presses.catalog import ROWS
from lm_eval_kvpress.presses.names import parse_name, resolve_alias
from lm_eval_kvpress.presses.parse import parse_press
from lm_eval_kvpress.presses.statistics import STATISTICS

Windows = Sequence[Sequence[int]]
Tensors = dict[str, torch.Tensor]

NUM_SKIPPED = 4
"""First tokens of every window whose queries do not count, as in kvpress's own statistics."""


def qfilter(model: PressableModel, windows: Windows) -> Tensors:
    """Q-Filters (arXiv 2503.02812): minus the first right singular vector of each head's queries after RoPE.

    It points to where most queries point, by the sum of its left vector; heads that share keys share the mean. The sign
    is that of the published files, which kvpress's score turns round: a key that queries point away from goes first.
    """
    moments = query_moments(model, windows, rotated=True, num_skipped=NUM_SKIPPED)
    leading = torch.linalg.eigh(moments.products).eigenvectors[..., -1]  # (L, H, D)
    towards = torch.where((leading * moments.sums).sum(dim=-1, keepdim=True) < 0, -1.0, 1.0)
    by_group = (-towards * leading).unflatten(1, (model.num_key_value_heads, -1))  # (L, K, H / K, D)
    return {"q_filters": _in_own_basis(model, by_group.mean(dim=2), 1)}


def expected_attention_stats(model: PressableModel, windows: Windows) -> Tensors:
    """Expected attention (arXiv 2510.00636): mean and covariance of each head's queries before RoPE."""
    moments = query_moments(model, windows, rotated=False, num_skipped=NUM_SKIPPED)
    return {
        "query_mean": _in_own_basis(model, moments.mean, 1),
        "query_cov": _in_own_basis(model, moments.covariance, 2),
    }


Method = Callable[[PressableModel, Windows], Tensors]

METHODS: Mapping[str, Method] = types.MappingProxyType(
    {
        "qfilter": qfilter,
        "expected_attention_stats": expected_attention_stats,
        "duo_attention": duo_attention,
        "kvzap": functools.partial(kvzap, num_skipped=NUM_SKIPPED),
    }
)
"""By press; what each returns is what `presses.statistics.TENSORS` asks for."""

CURVE = "lukv"
"""Its statistics belong to the press that it wraps as well, with its arguments: ``lukv:PRESS,ARGUMENT=VALUE,...``."""

REPLAYS = frozenset({"kvzap"})
"""Presses for whose statistics windows are replayed behind themselves, which takes twice their positions."""


@dataclass(frozen=True)
class Calibration:
    """What is to be taken.

    Attributes:
        press: in full, aliases resolved.
        take: how its statistics follow from a model.
        arguments: of the press, which a run must have as well: the statistics depend on them. JSON can hold it.
    """

    press: str
    take: Method
    arguments: Mapping[str, Any] = field(default_factory=dict)


def calibration_of(press: str) -> Calibration:
    """What is taken for a press.

    Args:
        press: ``NAME``, or ``lukv:PRESS,ARGUMENT=VALUE,...``.

    Raises:
        UsageError: in one line, for a press that needs none, or none by this command.
    """
    name, _, arguments = press.partition(",")
    full, defaults = resolve_alias(name)
    first, _, inner = full.partition(":")
    if first == CURVE:
        parse_name(full)  # refuses what cannot be wrapped
        return _curve(full, inner, {**defaults, **simple_parse_args_string(arguments)})
    if name not in METHODS:
        raise UsageError(f"no statistics are taken for '{name}': name one of {', '.join([*METHODS, CURVE])}:PRESS")
    if arguments:
        raise UsageError(f"statistics of {name} depend on no argument: leave '{arguments}' out")
    return Calibration(name, METHODS[name])


def _curve(full: str, inner: str, given: dict[str, Any]) -> Calibration:
    if size := given.keys() & {RATIO, BUDGET}:
        raise UsageError(f"one curve of {full} serves every {RATIO}: leave {min(size)} out")
    protected = {
        name: argument.parse(given.pop(name, argument.default))
        for name, argument in arguments_of(ROWS[CURVE]).items()
        if name != STATISTICS
    }
    press = parse_press(inner, given)
    scoring = {name: value for name, value in press.arguments.items() if name not in (RATIO, BUDGET)}
    return Calibration(full, functools.partial(lukv, press=press, **protected), {**scoring, **protected})


def _in_own_basis(model: PressableModel, tensor: torch.Tensor, num_dims: int) -> torch.Tensor:
    """The last ``num_dims`` dims, which are those of a head, in the order of the checkpoint's weights; fp32."""
    with model.in_use(), model.presented():
        order = getattr(model.model, "head_order", None)
        if order is not None:
            back = order.argsort().to(tensor.device)
            for dim in range(-num_dims, 0):
                tensor = tensor.index_select(dim, back)
    return tensor.float().contiguous()
