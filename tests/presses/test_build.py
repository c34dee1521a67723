"""Presses are built anew with the arguments of their spec, and shrink on contexts too short for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import kvpress
import pytest
from press_cases import PRESSES, fitting, run, spec_for, tokens

from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.parse import parse_press


@pytest.mark.parametrize("name", PRESSES)
def test_shrunk_presses_run_on_every_short_context(models: dict[str, PressableModel], name: str) -> None:
    spec = spec_for(name)
    model_name, model = next(fitting(models, spec))
    for length in range(1, spec.min_context()):
        press = spec.build(length, shrink=True)
        (kept,) = run(model, spec, tokens(1, length), shrink=True).kept()
        assert all(1 <= count <= length for count in kept), (length, kept)
        if press is not None and spec.compression_ratio and length > 1 and not name.startswith(("chunk", "composed")):
            assert min(kept) < length, (length, kept)


def test_shrinking_leaves_room_beside_the_window() -> None:
    spec = parse_press("snapkv", {"window_size": 64})
    sizes = [spec.build(length, shrink=True).window_size for length in (2, 7, 8, 40, 64, 65, 100)]  # type: ignore[union-attr]
    assert sizes == [1, 1, 2, 10, 16, 64, 64]
    press = parse_press("compactor").build(12, shrink=True)
    assert (press.sink_size_start, press.sink_size_end) == (2, 1)  # type: ignore[union-attr]


def objects_within(press: Any) -> Iterator[Any]:
    yield press
    for value in vars(press).values():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, kvpress.BasePress):
                yield from objects_within(item)


@pytest.mark.parametrize("name", PRESSES)
def test_two_builds_share_no_state(name: str) -> None:
    spec = spec_for(name)
    first, second = spec.build(100), spec.build(100)
    assert not {id(item) for item in objects_within(first)} & {id(item) for item in objects_within(second)}
    mutable = [
        {id(value) for item in objects_within(press) for value in vars(item).values() if isinstance(value, list | dict)}
        for press in (first, second)
    ]
    assert not mutable[0] & mutable[1]
