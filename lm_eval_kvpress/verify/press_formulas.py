"""What presses keep, by their papers' formulas on quantities of the dense reference. Uses no code of kvpress or ours.

Scores are in nats, so that they share the tolerance of log-probabilities: where two entries are closer than rounding,
either may stay.

Letters in shape comments: T tokens, P prefilled tokens, H query heads, G key-value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional


def kept_counts(name: str, arguments: Mapping[str, Any], num_tokens: int, num_layers: int) -> list[int]:
    """Entries that each layer keeps of a context of ``num_tokens``."""
    share = num_tokens * (1 - arguments.get("compression_ratio", 0.0))
    uniform = [max(1, int(share))] * num_layers
    return pyramid_budgets(share, arguments, num_tokens, num_layers) if name == "pyramidkv" else uniform


def pyramid_budgets(share: float, arguments: Mapping[str, Any], num_tokens: int, num_layers: int) -> list[int]:
    """Budgets that fall in a straight line from the first layer to the last, ``share`` on average (arXiv 2406.02069).

    The last layer's budget is ``share / beta``, or more where the first layer would otherwise keep more than there is.
    Where the smallest budget is below the window, every layer keeps ``share``, as SnapKV does.
    """
    window = arguments["window_size"]
    smallest = share / arguments["beta"]
    largest = 2 * share - smallest
    if largest >= num_tokens - window:
        largest = num_tokens - window
        smallest = 2 * share - largest
    if not num_tokens >= largest >= smallest >= window:
        return [max(1, round(share))] * num_layers
    steps = max(1, num_layers - 1)
    return [round(largest - layer * (largest - smallest) / steps) for layer in range(num_layers)]


def scores(name: str, arguments: Mapping[str, Any], weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | None:
    """Importance of each entry in nats, ``(G, P)``; None for a press whose choice is not a formula of these.

    Args:
        weights: ``(H, P, P)``, attention weights of the layer over the context.
        keys: ``(G, P, D)``.
    """
    if name in ("snapkv", "pyramidkv"):
        return _snapkv(arguments["window_size"], arguments["kernel_size"], weights, keys.shape[0])
    if name == "streaming_llm":
        return _streaming_llm(arguments["n_sink"], arguments["compression_ratio"], keys)
    if name == "knorm":  # arXiv 2406.11430: keys of a small norm draw attention
        return -keys.float().norm(dim=-1).log()
    return None


def _snapkv(window: int, kernel: int, weights: torch.Tensor, num_groups: int) -> torch.Tensor:
    """arXiv 2404.14469: what the last ``window`` queries attend to, smoothed over neighbours; the window stays.

    Weights below the smallest normal number are rounding: of two such entries either may stay.
    """
    observed = weights[:, -window:, :-window].float().clamp(min=torch.finfo(weights.dtype).tiny)
    seen = observed.mean(dim=1)  # (H, P - window)
    seen = functional.avg_pool1d(seen[None], kernel, stride=1, padding=kernel // 2)[0]
    by_group = seen.view(num_groups, -1, seen.shape[-1]).mean(dim=1)
    return functional.pad(by_group.log(), (0, window), value=torch.inf)


def _streaming_llm(n_sink: int, removed: float, keys: torch.Tensor) -> torch.Tensor:
    """arXiv 2309.17453: the first ``n_sink`` tokens and the last ones."""
    num_tokens = keys.shape[1]
    num_kept = max(1, int(num_tokens * (1 - removed)))
    places = torch.arange(num_tokens, device=keys.device)
    stays = (places < n_sink) | (places >= num_tokens - (num_kept - n_sink))
    return torch.where(stays, torch.inf, -torch.inf).expand(keys.shape[0], -1)


def regret(scores: torch.Tensor, evicted: torch.Tensor) -> float:
    """How far the best evicted entry scores above the worst kept one, at most of all heads, in nats.

    0 means that the right entries were kept.

    Args:
        scores, evicted: ``(G, P)``.
    """
    worst_kept = scores.masked_fill(evicted, torch.inf).amin(dim=-1)
    best_evicted = scores.masked_fill(~evicted, -torch.inf).amax(dim=-1)
    wrong = best_evicted > worst_kept
    return (best_evicted - worst_kept)[wrong].max().item() if wrong.any() else 0.0
