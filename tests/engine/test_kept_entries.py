"""Which tokens were kept, read off caches: held to what presses choose, and to repeated tokens and masked entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import references
import torch
from references import distinct_tokens

from lm_eval_kvpress.cache.compressed import LayerKV
from lm_eval_kvpress.engine.kept_entries import copied_entries, kept_entries
from lm_eval_kvpress.engine.prefill import prefill
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.parse import parse_press

REPEATED = [5, 9, 5, 7, 9, 5, 5, 7, 11, 5] * 6


def kept_of(model: PressableModel, tokens: list[int], name: str, **arguments: Any) -> torch.Tensor:
    """``(L, H, P)``."""
    spec = parse_press(name, {"compression_ratio": 0.5, **arguments})
    with copied_entries(model.attentions) as full:
        cache = prefill(model, torch.tensor([tokens]), spec.build(len(tokens)), rerotates=spec.rerotates)
    layers = enumerate(cache.layers)
    return torch.stack([kept_entries(full[index], layer, in_order=spec.rerotates) for index, layer in layers])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("snapkv", {"window_size": 8}),
        ("adakv:snapkv", {"window_size": 8}),
        ("pyramidkv", {"window_size": 4}),
        ("key_rerotation:knorm", {}),
    ],
)
def test_kept_tokens_are_those_of_kvpress_in_its_own_way(
    make_pressable: Callable[..., PressableModel],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    arguments: dict[str, Any],
) -> None:
    tokens, spec = distinct_tokens(60, 211, 2), parse_press(name, {"compression_ratio": 0.5, **arguments})
    monkeypatch.setitem(references.PRESSES, "asked", lambda: spec.build(60))
    monkeypatch.setattr(references, "REROTATES", {"asked"} if spec.rerotates else set())
    evicted = references.kept_by_press(make_pressable(), tokens, "asked").hidden
    assert torch.equal(kept_of(make_pressable(), tokens, name, **arguments), ~evicted)


@pytest.mark.parametrize("rerotated", [False, True])
def test_sinks_and_newest_are_found_among_repeated_tokens(
    make_pressable_llama: Callable[..., PressableModel], rerotated: bool
) -> None:
    name = "key_rerotation:streaming_llm" if rerotated else "streaming_llm"
    found = kept_of(make_pressable_llama(), REPEATED, name)
    expected = torch.tensor([place < 4 or place >= 34 for place in range(60)])
    assert found.shape == (3, 2, 60) and found[1:].eq(expected).all()
    if not rerotated:  # rotated to its new place, the first layer's entry of a token is the same wherever it stood
        assert found[0].eq(expected).all()
    assert found.sum(-1).eq(30).all()


def test_channels_that_a_press_empties_hide_no_token(make_pressable: Callable[..., PressableModel]) -> None:
    found = kept_of(make_pressable(), REPEATED, "composed:streaming_llm+think", key_channel_compression_ratio=0.5)
    assert found.sum(-1).eq(30).all() and found[:, :, :4].all() and found[:, :, 34:].all()


def test_masked_entries_are_not_kept() -> None:
    entries = torch.arange(24.0).reshape(1, 2, 4, 3)
    hidden = torch.tensor([[[False, True, True, False], [True, False, False, False]]])
    found = kept_entries(LayerKV(entries, entries), LayerKV(entries, entries, hidden))
    assert found.tolist() == [[True, False, False, True], [False, True, True, True]]


def test_entries_that_were_rewritten_are_refused() -> None:
    entries = torch.arange(24.0).reshape(1, 2, 4, 3)
    averaged = (entries[:, :, :2] + entries[:, :, 1:3]) / 2
    with pytest.raises(UsageError, match="rewrites entries"):
        kept_entries(LayerKV(entries, entries), LayerKV(averaged, averaged))
