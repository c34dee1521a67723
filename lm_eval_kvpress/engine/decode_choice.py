"""Which entries stay, from their scores: head by head, or heads sharing what is kept.

Of scores that are equal up to rounding the newest entries stay (`stream_eviction.highest`). Knows tensors only.

Letters in shape comments: H key-value heads, n entries of one head, N the most of any.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lm_eval_kvpress.engine.stream_eviction import highest


def best_of_each(scores: Sequence[torch.Tensor], num_kept: int) -> list[torch.Tensor]:
    """Places of the best entries of each head, ascending.

    Args:
        scores: ``(n,)`` of each head; all of a head with no more entries than stay are kept.
        num_kept: entries that stay of a head.
    """
    if len(set(map(len, scores))) == 1:
        return list(highest(torch.stack(list(scores)), min(num_kept, len(scores[0]))))
    return [highest(of_head, min(num_kept, len(of_head))) for of_head in scores]


def best_of_all(scores: Sequence[torch.Tensor], num_kept: int, alpha_safeguard: float) -> list[torch.Tensor]:
    """Places of the best entries of all heads together, ascending: the rule of AdaKV (arXiv 2407.11550).

    Args:
        scores: ``(n,)`` of each head.
        num_kept: entries that stay of a head, on the average of the heads.
        alpha_safeguard: the share of ``num_kept`` that each head has for itself.
    """
    num_safe = max(1, int(num_kept * alpha_safeguard)) if alpha_safeguard > 0 else 0
    longest = max(map(len, scores))
    table = scores[0].new_full((len(scores), longest), -torch.inf)  # (H, N), the newest entries last
    for row, of_head in zip(table, scores, strict=True):
        row[longest - len(of_head) :] = of_head
        if num_safe:
            row[longest - len(of_head) + highest(of_head, min(num_safe, len(of_head)))] = torch.inf
    chosen = highest(table.T.reshape(-1), min(len(scores) * num_kept, sum(map(len, scores))))
    stays = torch.zeros(table.numel(), dtype=torch.bool, device=table.device)
    stays[chosen] = True
    by_head = stays.view(longest, len(scores)).T  # (H, N)
    return [row[longest - len(of_head) :].nonzero()[:, 0] for row, of_head in zip(by_head, scores, strict=True)]
