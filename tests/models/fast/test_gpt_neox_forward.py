"""Forwards lent to GPTNeoX give the untouched model's numbers, only where nobody is watching what they overwrite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import randomized
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, GPTNeoXForCausalLM
from transformers.models.gpt_neox import modeling_gpt_neox

from lm_eval_kvpress.models import gpt_neox
from lm_eval_kvpress.models.fast import gpt_neox_forward
from lm_eval_kvpress.models.fast.gpt_neox_forward import in_place

MakeNeox = Callable[..., GPTNeoXForCausalLM]
CONTEXT = torch.randint(1, 90, (2, 23), generator=torch.Generator().manual_seed(5))
POSITIONS = torch.stack([torch.arange(3, 26), torch.arange(40, 63)])  # each row at its own
SHAPES: list[dict[str, Any]] = [
    *({"attn": attn, "dtype": dtype} for attn in ("sdpa", "eager") for dtype in (torch.float32, torch.bfloat16)),
    {"rotary_pct": 0.5},
    {"rotary_pct": 1.0},
    {"parallel": False, "attention_bias": False},
]


@torch.inference_mode()
def everything(model: GPTNeoXForCausalLM) -> list[Tensor]:
    """What two forwards make, the second of one token over the cache of the first: logits, weights, keys, values."""
    cache = DynamicCache()
    weights = model.config._attn_implementation == "eager"
    first = model(CONTEXT[:, :-1], position_ids=POSITIONS[:, :-1], past_key_values=cache, output_attentions=weights)
    last = model(CONTEXT[:, -1:], position_ids=POSITIONS[:, -1:], past_key_values=cache, output_attentions=weights)
    made = [first.logits, last.logits, *(first.attentions or ()), *(last.attentions or ())]
    return [*made, *(part for layer in cache.layers for part in (layer.keys, layer.values))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_numbers_are_those_of_transformers(
    make_neox: MakeNeox, shape: dict[str, Any], prepared: bool, autocast: bool
) -> None:
    model = make_neox(**shape)
    if prepared:
        gpt_neox.present(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = everything(model)
        with in_place(model):
            found = everything(model)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype is theirs.dtype and torch.equal(mine, theirs)


def test_whole_heads_are_not_rotated_and_gelu_makes_no_tensor(make_neox: MakeNeox) -> None:
    """Fails when a new transformers no longer has the forward that is stood in for: then ours must follow."""
    model = gpt_neox.present(make_neox()).model

    class Operators(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.called: list[Any] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.called.append(func)
            return func(*args, **(kwargs or {}))

    with Operators() as theirs:
        everything(model)
    with Operators() as ours, in_place(model):
        everything(model)
    aten = torch.ops.aten
    for operator, num_theirs, num_ours in [
        (aten.neg.default, 12, 0),
        (aten.gelu.default, 6, 0),
        (aten.gelu_.default, 0, 6),
    ]:
        assert (theirs.called.count(operator), ours.called.count(operator)) == (num_theirs, num_ours)


def test_who_watches_a_linear_layer_sees_what_it_made(make_neox: MakeNeox) -> None:
    model, seen = gpt_neox.present(make_neox()).model, dict[str, tuple[Tensor, Tensor]]()
    attention, mlp = model.gpt_neox.layers[1].attention, model.gpt_neox.layers[1].mlp

    def keep(name: str) -> Callable[..., None]:
        return lambda _, args, output: seen.__setitem__(name, (output, output.clone()))

    with (
        attention.query_key_value.register_forward_hook(keep("query_key_value")),
        mlp.dense_h_to_4h.register_forward_hook(keep("dense_h_to_4h")),
        in_place(model),
    ):
        lent = ["forward" in layer.mlp.__dict__ for layer in model.gpt_neox.layers]
        everything(model)
    assert lent == [True, False, True]
    assert all(torch.equal(held, copied) for held, copied in seen.values()) and len(seen) == 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_who_watches_every_module_sees_what_each_made(make_neox: MakeNeox, when: str) -> None:
    model, seen = gpt_neox.present(make_neox()).model, list[tuple[str, Tensor, Tensor]]()

    def keep(module: nn.Module, *tensors: Any) -> None:
        tensor = tensors[-1][0] if when == "before" else tensors[-1]
        if isinstance(tensor, Tensor):
            seen.append((type(module).__name__, tensor, tensor.clone()))

    register = {"before": register_module_forward_pre_hook, "after": register_module_forward_hook}[when]
    with register(keep), in_place(model):
        everything(model)
    assert all(torch.equal(held, copied) for _, held, copied in seen)
    assert sum(name == "GELUActivation" for name, _, _ in seen) == 2 * 3
    with in_place(model):
        assert "forward" in model.gpt_neox.layers[0].mlp.__dict__


def test_hooks_on_the_activation_run(make_neox: MakeNeox) -> None:
    model, calls = make_neox(), list[int]()
    first, second, _ = (layer.mlp.act for layer in model.gpt_neox.layers)
    with (
        first.register_forward_hook(lambda *_: calls.append(0)),
        second.register_forward_pre_hook(lambda *_: calls.append(1)),
        in_place(model),
    ):
        everything(model)
    assert calls == [0, 1] * 2


def test_hooks_run_and_replaced_forwards_stay(make_neox: MakeNeox) -> None:
    model, calls = gpt_neox.present(make_neox()).model, list[str]()
    first, second, third = model.gpt_neox.layers
    own = second.attention.__dict__["forward"] = second.attention.forward
    with (
        first.attention.register_forward_hook(lambda *_: calls.append("attention")),
        third.mlp.register_forward_hook(lambda *_: calls.append("feed-forward")),
        pytest.raises(RuntimeError, match="stop"),
        in_place(model),
    ):
        with in_place(model):  # what the outer one lent the inner one leaves
            everything(model)
        assert "forward" in first.attention.__dict__
        raise RuntimeError("stop")
    assert calls == ["attention", "feed-forward"] * 2
    left = [
        module.__dict__.get("forward") for layer in model.gpt_neox.layers for module in (layer.attention, layer.mlp)
    ]
    assert left == [None, None, own, None, None, None]


def test_other_layers_keep_their_forwards(make_neox: MakeNeox) -> None:
    class Watched(modeling_gpt_neox.GPTNeoXAttention):
        pass

    model = gpt_neox.present(make_neox()).model
    model.gpt_neox.layers[0].attention.__class__ = Watched
    model.gpt_neox.layers[1].mlp.act = nn.Tanh()
    model.gpt_neox.layers[2].mlp.act = type(model.gpt_neox.layers[2].mlp.act)(use_gelu_python=True)
    expected = everything(model)
    with in_place(model):
        lent = [
            ["forward" in module.__dict__ for module in (layer.attention, layer.mlp)] for layer in model.gpt_neox.layers
        ]
        found = everything(model)
    assert lent == [[False, True], [True, False], [True, False]]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


def test_another_signature_keeps_transformers_forward(make_neox: MakeNeox, monkeypatch: pytest.MonkeyPatch) -> None:
    def older(
        self: Any, hidden_states: Any, attention_mask: Any, head_mask: Any = None, layer_past: Any = None
    ) -> None:
        raise NotImplementedError

    model = make_neox()
    gpt_neox_forward._has_known_arguments.cache_clear()
    monkeypatch.setattr(modeling_gpt_neox.GPTNeoXAttention, "forward", older)
    with in_place(model):
        assert not any("forward" in layer.attention.__dict__ for layer in model.gpt_neox.layers)
    gpt_neox_forward._has_known_arguments.cache_clear()


def test_training_keeps_transformers_forward(make_neox: MakeNeox) -> None:
    model = make_neox().train()
    with in_place(model):
        assert not any("forward" in layer.attention.__dict__ for layer in model.gpt_neox.layers)


def test_gradients_are_those_of_transformers(make_neox: MakeNeox) -> None:
    def gradients(model: GPTNeoXForCausalLM) -> list[Tensor]:
        model.zero_grad()
        model(CONTEXT, labels=CONTEXT).loss.backward()
        return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]

    model = gpt_neox.present(randomized(make_neox(), 3)).model
    expected = gradients(model)
    with in_place(model):
        found = gradients(model)
    assert expected and all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
