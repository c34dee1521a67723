"""PyramidKV's fall-back to SnapKV is reported exactly where kvpress falls back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from lm_eval_kvpress.presses.parse import parse_press


def test_the_pyramids_fall_back_is_reported_exactly_where_it_happens() -> None:
    reported = set()
    for window in (4, 8, 64):
        for beta in (2, 20):
            for length in (70, 100, 333, 2048):
                for percent in range(1, 100, 2):
                    arguments = {"window_size": window, "beta": beta, "compression_ratio": percent / 100}
                    spec = parse_press("pyramidkv", arguments)
                    press = spec.build(length)
                    budgets = [press.get_layer_budget(layer, length) for layer in layers(9)]  # type: ignore[union-attr]
                    notes = [note for note in spec.notes(length, 9) if "fell back to snapkv" in note]
                    fell_back = set(budgets) == {max(1, round(length * (1 - percent / 100)))}
                    assert bool(notes) == fell_back, (arguments, length, budgets, notes)
                    reported.update(notes)
    assert len(reported) >= 2, "both ways of falling back are met"


def layers(num_layers: int) -> list[Any]:
    config = SimpleNamespace(num_hidden_layers=num_layers)
    return [SimpleNamespace(layer_idx=layer, config=config) for layer in range(num_layers)]
