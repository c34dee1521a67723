"""One forward for many presses: what each press makes of a kept prefill is what it makes of its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from press_cases import PRESSES, one_of_each, spec_for, tokens

from lm_eval_kvpress.cache.compressed import CompressedCache
from lm_eval_kvpress.engine.prefill import prefill
from lm_eval_kvpress.engine.shared_prefill import SharedPrefills
from lm_eval_kvpress.models.pressable import PressableModel


def assert_same(shared: CompressedCache, alone: CompressedCache, atol: float) -> None:
    assert (shared.num_seen, shared.next_position) == (alone.num_seen, alone.next_position)
    for one, other in zip(shared.layers, alone.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, atol=atol, rtol=0)
        torch.testing.assert_close(one.values, other.values, atol=atol, rtol=0)
        assert (one.hidden is None) == (other.hidden is None)
        assert one.hidden is None or torch.equal(one.hidden, other.hidden)
    assert shared.last_hidden is not None and alone.last_hidden is not None
    torch.testing.assert_close(shared.last_hidden, alone.last_hidden, atol=atol, rtol=0)


@pytest.mark.parametrize("name", PRESSES)
def test_every_press_makes_of_a_kept_prefill_what_it_makes_of_its_own(
    models: dict[str, PressableModel],  # noqa: F811
    name: str,
) -> None:
    spec = spec_for(name)
    if not spec.shares_prefill:
        pytest.skip(f"{name} needs its own forward")
    for _, model in one_of_each(models, spec, len(name)):
        contexts = [tuple(row) for row in torch.cat([tokens(1, 97), tokens(2, 97).flip(1)]).tolist()]
        shared = SharedPrefills(model)
        shared.run([*contexts, contexts[0][:50]])
        groups = [contexts] if spec.batches else [[context] for context in contexts]
        for group in groups:
            shared.compress(group, spec.build(97))  # what is done to one clone no later one sees
            with torch.random.fork_rng([]):
                torch.manual_seed(7)
                alone = prefill(model, torch.tensor(group), spec.build(97), rerotates=spec.rerotates)
                torch.manual_seed(7)
                replayed = shared.compress(group, spec.build(97), rerotates=spec.rerotates)
            assert_same(replayed, alone, atol=0 if spec.batches else 1e-5)


class ZeroingPress:
    """Overwrites keys and values where they are, as presses that change entries without removing them do."""

    def __call__(self, model: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def forward_hook(self, attention: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        layer = kwargs["past_key_values"].layers[attention.layer_idx]
        layer.keys.zero_()
        layer.values.zero_()


@pytest.mark.parametrize("rows", [[0, 1], [1]])
def test_a_press_that_writes_in_place_writes_into_a_copy(
    make_pressable: Callable[..., PressableModel], rows: list[int]
) -> None:
    model, press = make_pressable(), spec_for("knorm")
    contexts = [tuple(row) for row in tokens(2, 30).tolist()]
    shared = SharedPrefills(model)
    shared.run(contexts)
    zeroed = shared.compress([contexts[row] for row in rows], ZeroingPress())
    assert not any(layer.keys.any() or layer.values.any() for layer in zeroed.layers)
    alone = prefill(model, torch.tensor(contexts), press.build(30))
    assert_same(shared.compress(contexts, press.build(30)), alone, 1e-5)


def test_contexts_are_run_once_and_forgotten_with_their_batch(make_pressable: Callable[..., PressableModel]) -> None:
    model, forwards = make_pressable(), []
    model.model.base_model.register_forward_hook(lambda *_: forwards.append(1))
    shared = SharedPrefills(model)
    contexts = [tuple(row) for row in tokens(3, 20).tolist()]
    shared.run([*contexts, contexts[0], contexts[1][:7], ()])
    assert (len(forwards), shared.num_tokens) == (2, 3 * 20 + 7)
    shared.run(contexts[:2])
    for ratio in (0.1, 0.5, 0.9):
        shared.compress(contexts, spec_for("knorm", compression_ratio=ratio).build(20))
        shared.compress(contexts[1:2], None)
    assert (len(forwards), shared.num_tokens) == (2, 3 * 20 + 7)
    assert shared.share_of(contexts).num_tokens == 60
    assert shared.share_of(contexts).seconds == pytest.approx(60 * shared.share_of([(1,)]).seconds)
    shared.run([(1, 2, 3)])
    with pytest.raises(KeyError):
        shared.compress(contexts, None)


def test_contexts_are_run_again_by_other_attention(make_pressable: Callable[..., PressableModel]) -> None:
    model = make_pressable()
    shared, contexts = SharedPrefills(model), [tuple(row) for row in tokens(1, 20).tolist()]
    for attention, num_runs in (("sdpa", 1), ("sdpa", 1), ("eager", 2), ("eager", 2), ("sdpa", 3)):
        model.model.set_attn_implementation(attention)
        shared.run(contexts)
        assert shared.num_tokens == 20 * num_runs


@pytest.mark.parametrize("order", [(2, 0, 2), (1, 2, 0), (2, 1, 0), (1,)], ids=str)
def test_rows_in_any_order_and_more_than_once(
    make_pressable: Callable[..., PressableModel], order: tuple[int, ...]
) -> None:
    model = make_pressable()
    contexts = [tuple(row) for row in tokens(3, 30).tolist()]
    shared = SharedPrefills(model)
    shared.run(contexts)
    picked = [contexts[place] for place in order]
    press = spec_for("snapkv")
    assert_same(shared.compress(picked, press.build(30)), prefill(model, torch.tensor(picked), press.build(30)), 1e-5)


def test_presses_with_a_forward_of_their_own_do_not_share() -> None:
    assert not spec_for("observed_attention").shares_prefill
    assert spec_for("adakv:snapkv").shares_prefill and spec_for("random").shares_prefill
