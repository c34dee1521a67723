"""Which entries stay, against kvpress's own AdaKV and by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import kvpress
import pytest
import torch

from lm_eval_kvpress.engine.decode_choice import best_of_all, best_of_each


class Given(kvpress.KnormPress):
    def score(self, module: Any, hidden_states: Any, keys: torch.Tensor, *_: Any) -> torch.Tensor:
        return keys[..., 0].clone()


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.7, 1.0])
def test_heads_share_what_is_kept_as_in_kvpress(alpha: float) -> None:
    scores = torch.randn(1, 5, 30, generator=torch.Generator().manual_seed(2))
    scores[:, 3] += 2
    module: Any = SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa"))
    press = kvpress.AdaKVPress(Given(1 - 12.001 / 30), alpha_safeguard=alpha)
    press.compress(module, None, scores[..., None], scores[..., None], None, {})
    hidden = torch.zeros(1, 5, 30, dtype=torch.bool)
    hidden[module.masked_key_indices] = True
    found = best_of_all(list(scores[0]), 12, alpha)
    assert [places.tolist() for places in found] == [(~of_head).nonzero()[:, 0].tolist() for of_head in hidden[0]]
    assert sum(map(len, found)) == 60


def test_heads_of_other_lengths_share_what_is_kept() -> None:
    scores = [torch.tensor([3.0, 1.0, 2.0]), torch.tensor([9.0, 8.0, 0.0, 7.0, 6.0, 5.0])]
    assert [places.tolist() for places in best_of_all(scores, 3, 0.4)] == [[0], [0, 1, 3, 4, 5]]
    assert [places.tolist() for places in best_of_all(scores, 3, 0.7)] == [[0, 2], [0, 1, 3, 4]]
    assert [places.tolist() for places in best_of_each(scores, 4)] == [[0, 1, 2], [0, 1, 3, 4]]


def test_of_equal_scores_the_newest_stay() -> None:
    scores = [torch.ones(4), torch.ones(4), torch.ones(4)]
    assert [places.tolist() for places in best_of_all(scores, 2, 0.5)] == [[2, 3]] * 3
