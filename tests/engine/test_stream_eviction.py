"""The entries that stay are those of the highest scores."""

from __future__ import annotations

import math

import torch

from lm_eval_kvpress.engine.stream_eviction import highest


def test_the_highest_scores_stay_and_of_equal_ones_the_newest() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 2.0, 2.0, 0.5, 9.0])
    for factor in (1.0, -1.0):
        rounded = scores * (1 + factor * 1e-7 * torch.tensor([0.0, 1, 1, 0, -1, 0, 1]))
        assert highest(rounded[None, None], 4).tolist() == [[[0, 3, 4, 6]]]
    assert highest(torch.full((1, 1, 5), math.inf), 2).tolist() == [[[3, 4]]]
    distinct = torch.rand(2, 3, 200, generator=torch.Generator().manual_seed(0))
    assert highest(distinct, 50).equal(distinct.topk(50).indices.sort().values)
