"""The papers' formulas, by hand."""

from __future__ import annotations

import pytest
import torch

from lm_eval_kvpress.verify import press_formulas


@pytest.mark.parametrize(
    ("num_tokens", "arguments", "budgets"),
    [
        # share 128: smallest 128 / 20, largest cut to 256 - 8 = 248, smallest then 256 - 248 = 8
        (256, {"compression_ratio": 0.5, "window_size": 8, "beta": 20}, [248, 168, 88, 8]),
        # share 25.6: smallest 1.28 is below the window
        (256, {"compression_ratio": 0.9, "window_size": 8, "beta": 20}, [26, 26, 26, 26]),
        # share 100, beta 2: 50 to 150
        (400, {"compression_ratio": 0.75, "window_size": 8, "beta": 2}, [150, 117, 83, 50]),
    ],
)
def test_pyramid_budgets_by_hand(num_tokens: int, arguments: dict[str, float], budgets: list[int]) -> None:
    assert press_formulas.kept_counts("pyramidkv", arguments, num_tokens, 4) == budgets


def test_regret_is_zero_for_the_best_choice_and_the_gap_for_another() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0]])
    assert press_formulas.regret(scores, torch.tensor([[False, True, False], [True, False, False]])) == 0
    assert press_formulas.regret(scores, torch.tensor([[True, False, False], [True, False, False]])) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_entries_whose_attention_underflows_may_stay_or_go(dtype: torch.dtype) -> None:
    weights = torch.zeros(1, 12, 12, dtype=dtype)
    weights[0, -2:, 0] = 1
    weights[0, -2:, 7] = torch.finfo(dtype).smallest_normal / 4  # one computation keeps it, another rounds it to zero
    arguments = {"window_size": 2, "kernel_size": 1}
    scores = press_formulas.scores("snapkv", arguments, weights, torch.zeros(1, 12, 4))
    assert scores is not None
    evicted = torch.zeros(1, 12, dtype=torch.bool)
    evicted[0, 4:8] = True
    assert press_formulas.regret(scores, evicted) == 0
    evicted[0, 0] = True
    assert press_formulas.regret(scores, evicted) > 5
