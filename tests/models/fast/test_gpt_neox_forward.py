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
        gpt_neox.prepare(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = everything(model)
        with in_place(model):
            found = everything(model)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype is theirs.dtype and torch.equal(mine, theirs)


def test_whole_heads_are_not_rotated_and_gelu_makes_no_tensor(make_neox: MakeNeox) -> None:
    """Fails when a new transformers no longer has the forward that is stood in for: then ours must follow."""
    model = gpt_neox.prepare(make_neox())

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
    model, seen = gpt_neox.prepare(make_neox()), dict[str, tuple[Tensor, Tensor]]()
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
    model, seen = gpt_neox.prepare(make_neox()), list[tuple[str, Tensor, Tensor]]()

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
    model, calls = gpt_neox.prepare(make_neox()), list[str]()
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

    model = gpt_neox.prepare(make_neox())
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

    model = gpt_neox.prepare(randomized(make_neox(), 3))
    expected = gradients(model)
    with in_place(model):
        found = gradients(model)
    assert expected and all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


# ------------------------------------------------------------------------------------- rows of the first layer


@pytest.fixture
def few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt_neox_forward, "LEAST_TOKENS", 2)


REPEATED = torch.randint(1, 12, (2, 23), generator=torch.Generator().manual_seed(6))
DISTINCT = len(REPEATED.unique())


def rows_and_logits(model: GPTNeoXForCausalLM, ids: Tensor = REPEATED, **kwargs: Any) -> tuple[list[int], Tensor]:
    """How many rows each product was given: of queries, keys and values, and of the feed-forward, layer by layer."""
    rows: list[int] = []
    weights = {id(part.weight) for layer in model.gpt_neox.layers for part in products(layer)}
    linear = nn.functional.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if id(weight) in weights:
            rows.append(x.numel() // x.shape[-1])
        return linear(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(nn.functional, "linear", counted)
        logits = model(ids, **kwargs).logits
    return rows, logits


def products(layer: Any) -> tuple[nn.Linear, nn.Linear]:
    return layer.attention.query_key_value, layer.mlp.dense_h_to_4h


@pytest.mark.usefixtures("few_are_enough")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_first_layer_computes_a_row_for_each_distinct_token(make_neox: MakeNeox, shape: dict[str, Any]) -> None:
    model = gpt_neox.prepare(make_neox(**shape))
    every, expected = rows_and_logits(model, position_ids=POSITIONS)
    with in_place(model):
        rows, logits = rows_and_logits(model, position_ids=POSITIONS)
        again, others = rows_and_logits(model, REPEATED[:, :20], position_ids=POSITIONS[:, :20])
    feed_forward = DISTINCT if shape.get("parallel", True) else REPEATED.numel()  # else it comes after attention
    assert every == [46] * 6 and rows == [DISTINCT, feed_forward, 46, 46, 46, 46]
    assert again[0] == len(REPEATED[:, :20].unique()) and again[2:] == [40] * 4
    exact = {"atol": 0, "rtol": 0} if model.dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(logits, expected, **exact)
    torch.testing.assert_close(
        others, expected[:, :20], atol=1e-5, rtol=1e-2 if model.dtype == torch.bfloat16 else 1e-5
    )


@pytest.mark.usefixtures("few_are_enough")
def test_rows_that_somebody_made_differ_are_all_computed(make_neox: MakeNeox) -> None:
    """A hook that adds to the embeddings what depends on the place, and one behind a norm."""
    model = gpt_neox.prepare(make_neox())
    noise = torch.randn(2, 23, 64, generator=torch.Generator().manual_seed(7))
    for module in (model.gpt_neox.embed_in, model.gpt_neox.layers[0].post_attention_layernorm):
        with module.register_forward_hook(lambda _, args, output: output + noise):
            _, expected = rows_and_logits(model)
            with in_place(model):
                rows, logits = rows_and_logits(model)
        norm_only = module is not model.gpt_neox.embed_in
        assert rows[:2] == [DISTINCT if norm_only else 46, 46]
        torch.testing.assert_close(logits, expected)


@pytest.mark.usefixtures("few_are_enough")
@pytest.mark.parametrize("name", ["attention.query_key_value", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"])
def test_who_watches_a_product_sees_all_rows(make_neox: MakeNeox, name: str) -> None:
    model, seen = gpt_neox.prepare(make_neox()), list[torch.Size]()
    product = model.gpt_neox.layers[0].get_submodule(name)
    for register in (product.register_forward_hook, product.register_forward_pre_hook):
        with register(lambda _, args, *output: seen.append(args[0].shape[:-1])), in_place(model):
            model(REPEATED)
    assert seen == [REPEATED.shape] * 2


NEARLY_DISTINCT = torch.cat([torch.arange(170), torch.arange(30)])[None]


@pytest.mark.parametrize("ids", [REPEATED, NEARLY_DISTINCT], ids=["few tokens", "nearly all distinct"])
def test_all_rows_are_computed_where_that_saves_nothing(make_neox: MakeNeox, ids: Tensor) -> None:
    model = gpt_neox.prepare(make_neox())
    with in_place(model), pytest.MonkeyPatch.context() as patch:
        if ids is not REPEATED:
            patch.setattr(gpt_neox_forward, "LEAST_TOKENS", 2)
        rows, _ = rows_and_logits(model, ids)
    assert rows == [ids.numel()] * 6


@pytest.mark.usefixtures("few_are_enough")
@pytest.mark.parametrize("change", ["wrapped", "its forward replaced"])
def test_a_product_that_is_not_plain_is_given_all_rows(make_neox: MakeNeox, change: str) -> None:
    """As adapters wrap it and accelerate replaces its forward: what they do may depend on the place of a row."""
    model, seen = gpt_neox.prepare(make_neox()), list[torch.Size]()
    attention = model.gpt_neox.layers[0].attention
    inner = attention.query_key_value

    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.shape[:-1])
            return nn.functional.linear(x, inner.weight, inner.bias)

    if change == "wrapped":
        attention.query_key_value = Wrapped()
    else:
        inner.__dict__["forward"] = Wrapped().forward
    with torch.inference_mode(), in_place(model):
        model(REPEATED)
    assert seen == [REPEATED.shape]


@pytest.mark.usefixtures("few_are_enough")
def test_tokens_of_32_bits_and_by_name(make_neox: MakeNeox) -> None:
    model = gpt_neox.prepare(make_neox())
    expected = rows_and_logits(model)[1]
    with in_place(model), torch.inference_mode():
        torch.testing.assert_close(rows_and_logits(model, REPEATED.int())[1], expected)
        assert model.gpt_neox.embed_in(input=REPEATED).shape == (2, 23, 64)


@pytest.mark.usefixtures("few_are_enough")
def test_where_gradients_are_asked_for_all_rows_are_computed(make_neox: MakeNeox) -> None:
    model = gpt_neox.prepare(make_neox())
    embeddings = torch.randn(2, 23, 64, generator=torch.Generator().manual_seed(9), requires_grad=True)
    with in_place(model):
        with torch.inference_mode():
            model(REPEATED)
        model(inputs_embeds=embeddings).logits.sum().backward()
    assert embeddings.grad is not None and embeddings.grad.isfinite().all()


@pytest.mark.usefixtures("few_are_enough")
def test_embeddings_instead_of_tokens_after_a_forward_of_tokens(make_neox: MakeNeox) -> None:
    """Nothing is left of the forward before, whose tokens would be taken for these rows'."""
    model = gpt_neox.prepare(make_neox())
    embeddings = torch.randn(2, 23, 64, generator=torch.Generator().manual_seed(8))
    expected = model(inputs_embeds=embeddings).logits
    with in_place(model):
        model(REPEATED)
        torch.testing.assert_close(model(inputs_embeds=embeddings).logits, expected)
        torch.testing.assert_close(model(inputs_embeds=embeddings[:, :9]).logits, expected[:, :9])
