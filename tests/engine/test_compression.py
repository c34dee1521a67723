"""Contexts to compressed batches: how many run side by side changes how long it takes, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from references import distinct_tokens

from lm_eval_kvpress.cache.compressed import CompressedCache, LayerKV
from lm_eval_kvpress.engine import grouped_prefill
from lm_eval_kvpress.engine.compression import CompressedBatch, Compressor
from lm_eval_kvpress.engine.contexts import Context
from lm_eval_kvpress.engine.prefill import prefill
from lm_eval_kvpress.engine.shared_prefill import SharedPrefills
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.parse import parse_press
from lm_eval_kvpress.records.clock import Clock

LENGTHS = (90, 41, 41, 30, 41, 0, 41, 5, 30)  # the first alone is more than what is allowed below
CONTEXTS = [tuple(distinct_tokens(length, 211, seed)) + (7,) for seed, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def model(make_pressable: Callable[..., PressableModel]) -> PressableModel:
    return make_pressable()


def compressed(
    model: PressableModel, press: str, *, shared: bool = False
) -> tuple[CompressedBatch, list[tuple[int, ...]]]:
    """The batch, and the shape of each forward's tokens."""
    shapes: list[tuple[int, ...]] = []
    prefills = SharedPrefills(model) if shared else None
    compressor = Compressor(model, parse_press(press), short_context="keep", clock=Clock(model.device), shared=prefills)
    embeddings = model.model.get_input_embeddings()
    with embeddings.register_forward_hook(lambda _, args, output: shapes.append(tuple(args[0].shape))):
        batch = compressor.compress([Context(tokens, 1) for tokens in CONTEXTS])
    return batch, shapes


@pytest.mark.parametrize(
    ("press", "expected"),
    [
        ("knorm", [(1, 90), (2, 41), (2, 41), (2, 30), (1, 5)]),
        ("none", [(1, 90), (2, 41), (2, 41), (2, 41), (1, 30)]),
        ("random", [(1, 90), (1, 41), (1, 41), (1, 41), (1, 41), (1, 30), (1, 30), (1, 5)]),
    ],
)
def test_a_cpu_runs_so_many_tokens_side_by_side(
    model: PressableModel, monkeypatch: pytest.MonkeyPatch, press: str, expected: list[tuple[int, int]]
) -> None:
    monkeypatch.setattr(grouped_prefill, "FORWARD_TOKENS", {"cpu": 89})
    few, shapes = compressed(model, press)
    assert shapes == expected
    monkeypatch.setattr(grouped_prefill, "FORWARD_TOKENS", {})
    many, _ = compressed(model, press)
    assert few.records == many.records and few.cache.num_seen == many.cache.num_seen
    for one, other in zip(few.cache.layers, many.cache.layers, strict=True):
        for row, length in enumerate(LENGTHS):
            kept, standing = entries(one, row), entries(other, row)
            assert (kept.shape[1] > 0) == (length > 0)
            torch.testing.assert_close(kept, standing, rtol=0, atol=1e-5)


def entries(layer: LayerKV, row: int) -> torch.Tensor:
    """The keys that can be attended, ``(H, T, D)``."""
    keys: torch.Tensor = layer.keys[row]
    return keys if layer.hidden is None else keys[:, ~layer.hidden[row, 0]]


@pytest.mark.parametrize("shared", [False, True], ids=["own prefills", "shared prefills"])
def test_a_random_press_draws_anew_for_each_context_and_alike_for_the_same(model: PressableModel, shared: bool) -> None:
    batch, _ = compressed(model, "random", shared=shared)
    again, _ = compressed(model, "random", shared=shared)
    rows = [row for row, length in enumerate(LENGTHS) if length == 41]
    cache, places = SharedPrefills(model), dict[int, set[int]]()
    for row in rows:
        cache.run([CONTEXTS[row][:-1]])
        full = cache.compress([CONTEXTS[row][:-1]], None).layers[0].keys[0]
        kept = entries(batch.cache.layers[0], row)
        places[row] = set(torch.cdist(kept[0], full[0]).argmin(dim=-1).tolist())
        torch.testing.assert_close(kept, entries(again.cache.layers[0], row), rtol=0, atol=0)
    assert all(places[a] != places[b] for a in rows for b in rows if a < b), places


def test_clones_of_shared_prefills_are_taken_together(model: PressableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, compress = list[int](), SharedPrefills.compress

    def counted(
        self: SharedPrefills, contexts: Sequence[tuple[int, ...]], press: Any, **kwargs: Any
    ) -> CompressedCache:
        taken.append(len(contexts))
        return compress(self, contexts, press, **kwargs)

    monkeypatch.setattr(SharedPrefills, "compress", counted)
    monkeypatch.setattr(grouped_prefill, "FORWARD_TOKENS", {"cpu": 1})
    compressed(model, "knorm", shared=True)
    assert sorted(taken) == [1, 1, 2, 4]


@pytest.mark.parametrize("shared", [False, True], ids=["own prefills", "shared prefills"])
def test_questions_of_other_lengths_are_pressed_apart(model: PressableModel, shared: bool) -> None:
    """Contexts of one length, by a press that reads their questions; without one nothing is compressed."""
    asked = (5, 0, 8, 5)
    contexts = [Context(CONTEXTS[1 + row], 1, num_question=asked[row]) for row in (0, 1)]
    contexts += [Context(CONTEXTS[4 + 2 * row], 1, num_question=asked[2 + row]) for row in (0, 1)]
    press = parse_press("finch")

    def compress(some: Sequence[Context]) -> CompressedBatch:
        prefills = SharedPrefills(model) if shared else None
        return Compressor(model, press, short_context="keep", clock=Clock(model.device), shared=prefills).compress(some)

    batch = compress(contexts)
    assert batch.pressed == [True, False, True, True]
    assert [record.is_short for record in batch.records] == [False, True, False, False]
    assert [record.kept_per_layer[0] for record in batch.records] == [20, 41, 20, 20]
    for row, context in enumerate(contexts):
        alone = compress([context])
        own = press.for_question(context.num_question).build(41) if context.num_question else None
        apart = prefill(model, torch.tensor([context.compressed]), own, rerotates=True)
        for one, other, third in zip(batch.cache.layers, alone.cache.layers, apart.layers, strict=True):
            torch.testing.assert_close(entries(one, row), entries(other, 0), rtol=0, atol=1e-5)
            torch.testing.assert_close(entries(one, row), third.keys[0], rtol=0, atol=1e-5)


def test_a_context_without_a_question_is_refused_where_short_ones_are(model: PressableModel) -> None:
    compressor = Compressor(model, parse_press("finch"), short_context="error", clock=Clock(model.device))
    compressor.check_lengths([Context(CONTEXTS[1], 1, num_question=5)])
    with pytest.raises(grouped_prefill.ShortContextError, match="41 prefilled tokens does not end with a question"):
        compressor.check_lengths([Context(CONTEXTS[1], 1)])
