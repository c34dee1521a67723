"""Which heads retrieve, for DuoAttention: how much of a repeated needle's attention goes to the needle itself.

A needle is a span of tokens drawn from the texts, which stands once in the first half of a window and again at its end,
so that each of its tokens can be predicted by finding it. A head that follows the first and the newest tokens pays the
old needle next to nothing; no training is needed to see it. DuoAttention (arXiv 2410.10819) learns its heads by
gradients on passkeys instead, and kvpress's own method without training looks at mean queries and keys.

Letters in shape comments: L layers, K key-value heads, G query heads per key-value head, N tokens of the needle,
T tokens of the window.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache

from lm_eval_kvpress.calibrate.attended import AttendedLayer, look_at_layers
from lm_eval_kvpress.models.pressable import PressableModel

NEEDLE = 16
"""Tokens of a needle, in windows that are long enough."""
SEED = 0
"""Of needles and places, so that the same texts give the same patterns."""
SINK_SIZE, RECENT_SIZE = 128, 256
"""What heads that do not retrieve keep, unless a run says otherwise: kvpress's sizes for patterns of its own."""


def duo_attention(model: PressableModel, windows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """The share of attention that each key-value head's repeated needle pays the old one, ``(L, K)``.

    Heads that share keys count by the one that retrieves most: cutting their keys would cut it off.
    """
    generator = torch.Generator().manual_seed(SEED)
    words = sorted({token for window in windows for token in window})
    total = torch.zeros(len(model.attentions), model.num_key_value_heads, dtype=torch.float64)
    with model.in_use(), model.presented():
        for window in windows:
            tokens, place, size = with_needle(window, words, generator)

            def add(layer: AttendedLayer, place: int = place, size: int = size) -> None:
                weights = layer.weights(size)[..., place : place + size]  # (K, G, N, N)
                found = weights.sum(dim=-1).mean(dim=-1).amax(dim=1)
                total[layer.index] += found.double().cpu()

            look_at_layers(model, tokens, add, DynamicCache())
    return {
        "full_attention_heads": (total / len(windows)).float(),
        "sink_size": torch.tensor(float(SINK_SIZE)),
        "recent_size": torch.tensor(float(RECENT_SIZE)),
    }


def with_needle(window: Sequence[int], words: Sequence[int], generator: torch.Generator) -> tuple[list[int], int, int]:
    """A window of the same length with a needle in its first half and at its end; the needle's place, and its size."""
    size = min(NEEDLE, len(window) // 4)
    hay = list(window[: len(window) - 2 * size])
    picks = torch.randint(len(words), (size,), generator=generator).tolist()
    place = int(torch.randint(1, 1 + len(hay) // 2, (), generator=generator))
    needle = [words[pick] for pick in picks]
    return [*hay[:place], *needle, *hay[place:], *needle], place, size
