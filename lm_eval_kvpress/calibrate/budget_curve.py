"""How many entries each head should keep under a press, for LU-KV: where one more entry is worth most to later tokens.

The first half of a window is the context. Its entries stand in the order in which the press would keep them. An entry's
utility is the attention that the second half pays it, times the size of its value behind the output projection. Each
head's utility as a function of its budget is replaced by its concave hull, so that taking the largest gains of all
heads together spends any budget best (arXiv 2602.08585: convex-hull relaxation, greedy by marginal utility). What is
pruned of each head at 1 to 99 percent is averaged over windows. The paper says so much; details are ours.

Letters in shape comments: L layers, H query heads, K key-value heads, G query heads per key-value head, P tokens of the
context, Q later tokens, D head_dim, E hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from lm_eval_kvpress.calibrate.attended import AttendedLayer, look_at_layers
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.spec import PressSpec
from lm_eval_kvpress.presses.statistics import NUM_PERCENTS


def lukv(
    model: PressableModel, windows: Sequence[Sequence[int]], press: PressSpec, *, sink: int = 4, window: int = 1
) -> dict[str, torch.Tensor]:
    """The share of its entries that each head loses, ``(99, L, K)``.

    Args:
        press: scores the tokens.
        sink, window: first and newest entries that LU-KV protects; here they come first.
    """
    pruned = [prune_shares(gains(model, tokens, press, sink=sink, window=window)) for tokens in windows]
    return {"budget_curve": torch.from_numpy(np.mean(pruned, axis=0)).float()}


def gains(
    model: PressableModel, tokens: Sequence[int], press: PressSpec, *, sink: int = 4, window: int = 1
) -> np.ndarray[Any, Any]:
    """The utility of each entry of the tokens' first half, in the order in which the press keeps them, ``(L, K, P)``.

    Args:
        press, sink, window: as of `lukv`.
    """
    num_context = len(tokens) // 2
    scores, utilities = dict[int, torch.Tensor](), dict[int, torch.Tensor]()
    scorer: Any = press.build(num_context, shrink=True)

    def score(layer: AttendedLayer) -> None:
        hidden, states = layer.arguments["hidden_states"], (layer.keys[None], layer.values[None])
        scores[layer.index] = scorer.score(layer.module, hidden, *states, layer.output[1], layer.arguments)[0]

    def use(layer: AttendedLayer) -> None:
        utilities[layer.index] = utility(layer, num_context)

    cache = DynamicCache()
    with model.in_use(), model.presented():
        scorer.post_init_from_model(model.model)
        look_at_layers(model, tokens[:num_context], score, cache)
        look_at_layers(model, tokens[num_context:], use, cache)
    layers = range(len(model.attentions))
    return np.stack([_in_order(scores[layer], utilities[layer], sink, window) for layer in layers])


def utility(layer: AttendedLayer, num_context: int) -> torch.Tensor:
    """What the tokens behind the context gain from each of its entries, ``(K, P)``."""
    weights = layer.weights(layer.keys.shape[1] - num_context)[..., :num_context].sum(dim=2)  # (K, G, P)
    num_kv_heads, num_groups, _ = weights.shape
    output: Any = layer.module.o_proj
    by_head = output.weight.float().view(-1, num_kv_heads, num_groups, layer.values.shape[-1])  # (E, K, G, D)
    written = torch.einsum("ekgd,kpd->kgpe", by_head, layer.values[:, :num_context].float()).norm(dim=-1)
    return (weights * written).sum(dim=1)


def _in_order(scores: torch.Tensor, utilities: torch.Tensor, sink: int, window: int) -> np.ndarray[Any, Any]:
    scores = scores.float().clone()
    highest = scores.max() + 1
    scores[:, :sink] = highest
    scores[:, scores.shape[1] - window :] = highest
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return utilities.gather(1, order).double().cpu().numpy()


def prune_shares(utilities: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The share that each head loses at 1 to 99 percent of all entries removed, ``(99, L, K)``.

    Args:
        utilities: ``(L, K, P)``, in the order in which entries are kept.
    """
    num_layers, num_heads, num_entries = utilities.shape
    slopes = np.array([concave(head) for head in utilities.reshape(-1, num_entries)])  # (L * K, P), descending
    total = slopes.size
    order = np.argsort(-slopes, axis=None, kind="stable")
    found = []
    for percent in range(1, NUM_PERCENTS + 1):
        kept = order[: round(total * (1 - percent / 100))] // num_entries
        counts = np.bincount(kept, minlength=num_layers * num_heads)
        found.append(1 - counts.reshape(num_layers, num_heads) / num_entries)
    return np.array(found)


def concave(gains_in_order: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The slopes of the concave hull of the summed gains, ``(P,)``: gains that rise are pooled with those before."""
    pools = list[tuple[float, int]]()  # sum and count
    for gain in gains_in_order:
        total, count = float(gain), 1
        while pools and pools[-1][0] * count <= total * pools[-1][1]:
            before, size = pools.pop()
            total, count = total + before, count + size
        pools.append((total, count))
    return np.concatenate([np.full(count, total / count) for total, count in pools])
