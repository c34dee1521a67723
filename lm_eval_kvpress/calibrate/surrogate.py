"""A linear surrogate of KVzip's scores, for KVzap: fitted to the texts by least squares, without a gradient.

KVzip replays every context behind itself. KVzap (arXiv 2601.07891) predicts the logarithm of what that replay would
find, in KVzip+'s normalization, from the hidden state that goes into each attention. Sums of products are all that the
fit needs, so no hidden state is kept. Knows a presented model and our KVzip. Does not know text or files.

Letters in shape comments: L layers, K key-value heads, T tokens of a window, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.replay import ReplayedKVzipPress

ROUNDING = 1e-5
"""Singular values below this share of the largest are taken for rounding, ``rcond`` of ``numpy.linalg.lstsq``: hidden
states after a LayerNorm lie in a plane, and across it float32 leaves some 1e-8."""
FLOOR = 1e-10
"""Scores below it count as this: to the logarithm of what underflowed, rounding alone gives a size."""


class ReplayScores(ReplayedKVzipPress):
    """KVzip+ that marks nothing and keeps what the replay found, ``(L, K, T)``, as ``found``."""

    def __init__(self) -> None:
        super().__init__(0.5, kvzip_plus_normalization=True)

    def compress_post(self, model: Any) -> None:
        self.found = self.score_val[:, 0].clone()


def kvzap(model: PressableModel, windows: Sequence[Sequence[int]], *, num_skipped: int) -> dict[str, torch.Tensor]:
    """Weights ``(L, K, E)`` and biases ``(L, K)`` that predict the logarithm of each entry's score.

    Args:
        num_skipped: first tokens of each window that do not count; KVzip keeps its sinks whatever they score.
    """
    sums = _Sums(len(model.attentions))
    with model.in_use(), model.presented():
        for window in windows:
            hidden, scores = replayed(model, window)
            for layer, (inputs, found) in enumerate(zip(hidden, scores, strict=True)):
                sums.add(layer, inputs[num_skipped:].double(), found[:, num_skipped:].T.double().clamp(min=FLOOR).log())
    solved = torch.stack([sums.solve(layer) for layer in range(len(model.attentions))])  # (L, E + 1, K)
    return {"weight": solved[:, :-1].transpose(1, 2).float().contiguous(), "bias": solved[:, -1].float().contiguous()}


@torch.inference_mode()
def replayed(model: PressableModel, window: Sequence[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The hidden states ``(T, E)`` that go into each attention, and what a replay scores each entry, ``(L, K, T)``."""
    hidden, press = dict[int, torch.Tensor](), ReplayScores()

    def hook_for(layer: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden.setdefault(layer, kwargs["hidden_states"][0])  # the replay comes after the window

        return keep

    tokens = torch.tensor([list(window)], device=model.device)
    with ExitStack() as hooks:
        for layer, attention in enumerate(model.attentions):
            hooks.callback(attention.register_forward_pre_hook(hook_for(layer), with_kwargs=True).remove)
        with press(model.model):
            model.hidden_states(tokens, past_key_values=DynamicCache(), use_cache=True)
    return [hidden[layer] for layer in range(len(model.attentions))], press.found


class _Sums:
    """Sums of products of inputs, each with a one behind it, and of inputs with targets; a layer at a time."""

    def __init__(self, num_layers: int) -> None:
        self._inputs: list[torch.Tensor | float] = [0.0] * num_layers
        self._targets: list[torch.Tensor | float] = [0.0] * num_layers

    def add(self, layer: int, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Add tokens: ``(T, E)`` and ``(T, K)`` in float64."""
        extended = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)
        self._inputs[layer] = self._inputs[layer] + extended.T @ extended
        self._targets[layer] = self._targets[layer] + extended.T @ targets

    def solve(self, layer: int) -> torch.Tensor:
        """Weights with the bias behind them, ``(E + 1, K)``, on the CPU."""
        products, targets = (torch.as_tensor(sums[layer]).cpu() for sums in (self._inputs, self._targets))
        squares, directions = torch.linalg.eigh(products)  # of the singular values, ascending
        large = squares > ROUNDING**2 * squares[-1]
        solved: torch.Tensor = directions[:, large] @ (directions[:, large].T @ targets / squares[large, None])
        return solved
