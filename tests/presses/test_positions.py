"""Presses expect queries where the text goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kvpress
import pytest
import torch
from statistics_files import NEOX, statistics_file

from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.calibrated import CalibratedExpectedAttentionPress
from lm_eval_kvpress.presses.positions import expect_from

STATISTICS = statistics_file("expected_attention_stats", NEOX)
PRESSES: dict[str, Callable[[], Any]] = {
    "expected_attention": lambda: kvpress.ExpectedAttentionPress(n_future_positions=30),
    "expected_attention_stats": lambda: CalibratedExpectedAttentionPress(n_future_positions=30, statistics=STATISTICS),
    "cap": lambda: kvpress.CapPress(n_future_positions=30),
    "criticalkv": lambda: kvpress.CriticalKVPress(kvpress.ExpectedAttentionPress(n_future_positions=30)),
}


@pytest.mark.parametrize("name", PRESSES)
def test_scores_are_those_at_that_many_hidden_states(make_pressable: Callable[..., PressableModel], name: str) -> None:
    """kvpress takes the number of hidden states for the position; the mean of equal ones does not depend on it."""
    model, generator = make_pressable(), torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, 1, 4, 40, 16, generator=generator)
    some = torch.randn(1, 1, 64, generator=generator)
    press, at_place = PRESSES[name](), PRESSES[name]()
    expect_from(at_place, 60)
    with model.presented():
        for one in (press, at_place):
            one.post_init_from_model(model.model)
        long, short, elsewhere = (
            one.score(model.attentions[0], some.expand(1, length, -1), keys, values, None, {})
            for one, length in ((press, 60), (at_place, 10), (press, 10))
        )
    assert (long - short).abs().max() < 1e-5
    assert (long - elsewhere).abs().max() > 1e-4, "the position must matter"
