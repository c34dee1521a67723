"""The change of basis changes no logit; the projection views are the layer's own q, k, v; nothing is left behind."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import kvpress
import pytest
import torch
from references import MASKS, PRESSES, NeoxReference, distinct_tokens
from torch import Tensor, nn
from transformers import GPTNeoXForCausalLM
from transformers.models.gpt_neox import modeling_gpt_neox

from lm_eval_kvpress.engine.prefill import prefill
from lm_eval_kvpress.models import full_width, gpt_neox
from lm_eval_kvpress.models.pressable import PressableModel

MakeNeox = Callable[..., GPTNeoXForCausalLM]
SHAPES = [
    {"rotary_pct": rotary_pct, "attention_bias": bias, "parallel": parallel}
    for rotary_pct in (0.25, 0.5, 1.0)
    for bias in (True, False)
    for parallel in (True, False)
]


def shape_id(shape: dict[str, Any]) -> str:
    return "-".join(f"{name}={value}" for name, value in shape.items())


def tokens(batch: int = 2, length: int = 70) -> Tensor:
    return torch.tensor([distinct_tokens(length, 211, seed) for seed in range(batch)])


@torch.no_grad()
def logits(model: GPTNeoXForCausalLM, ids: Tensor) -> Tensor:
    return model(ids).logits


# ---------------------------------------------------------------------------------------------- change of basis


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_a_change_of_basis_changes_no_logit_and_twice_is_once(
    make_neox: MakeNeox, attn: str, shape: dict[str, Any]
) -> None:
    model = make_neox(attn, **shape)
    names = {name: parameter.shape for name, parameter in model.named_parameters()}
    before = logits(model, tokens())
    weights = [model.gpt_neox.layers[0].attention.query_key_value.weight.clone()]
    for _ in range(2):
        assert gpt_neox.present(model).model is model
        assert gpt_neox.wide_heads(model).are_made
        weights.append(model.gpt_neox.layers[0].attention.query_key_value.weight.clone())
        torch.testing.assert_close(logits(model, tokens()), before, atol=2e-5, rtol=0)
    assert torch.equal(weights[1], weights[2])
    assert torch.equal(weights[0], weights[1]) == (shape["rotary_pct"] == 1.0)
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == names


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_the_dense_reference_is_the_untouched_model(make_neox: MakeNeox, shape: dict[str, Any]) -> None:
    model = make_neox(**shape)
    found = NeoxReference(model).logits(tokens()[0], None, 0)
    torch.testing.assert_close(found, logits(model, tokens())[0].double(), atol=2e-5, rtol=0)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1.0), (torch.float16, 0.125)])
def test_drift_in_half_precision_is_that_of_rounding(make_neox: MakeNeox, dtype: torch.dtype, bound: float) -> None:
    """Half precision rounds sums over another order of dims: no further from exact logits than the model itself is."""
    exact = NeoxReference(make_neox()).logits(tokens()[0], None, 0)
    model = make_neox(dtype=dtype)
    untouched = logits(model, tokens())[0].double()
    prepared = logits(gpt_neox.present(model).model, tokens())[0].double()
    of_model, of_prepared = (untouched - exact).abs().mean(), (prepared - exact).abs().mean()
    drift = (prepared - untouched).abs().mean()
    assert of_prepared < 1.1 * of_model, (of_prepared, of_model)
    assert drift < 1.1 * of_model, (drift, of_model)
    assert (prepared - untouched).abs().max() < bound


def test_a_key_dot_product_depends_on_distance_alone_over_the_full_head(make_neox: MakeNeox) -> None:
    """What presses rely on: full-width cos and sin rotate a prepared head as a whole."""
    model = gpt_neox.present(make_neox()).model
    cos, sin = model.gpt_neox.rotary_emb(torch.zeros(1), torch.arange(40)[None])
    assert cos.shape[-1] == model.config.hidden_size // model.config.num_attention_heads
    q, k = torch.randn(2, 1, 1, 1, cos.shape[-1], generator=torch.Generator().manual_seed(0))
    q, k = q.expand(1, 1, 40, -1), k.expand(1, 1, 40, -1)
    q, k = modeling_gpt_neox.apply_rotary_pos_emb(q, k, cos, sin)
    scores = (q @ k.transpose(2, 3))[0, 0]
    for distance in (0, 1, 7):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=0)
    assert not torch.allclose(scores.diagonal(-1)[0], scores.diagonal(-7)[0], atol=1e-3)


@pytest.mark.parametrize(("head_dim", "rotated"), [(16, 4), (80, 20), (64, 16), (8, 8), (12, 6), (6, 2)])
def test_order_pairs_what_partial_rope_pairs(head_dim: int, rotated: int) -> None:
    order = full_width.full_width_order(head_dim, rotated).tolist()
    assert sorted(order) == list(range(head_dim))
    for pair in range(rotated // 2):
        assert order.index(pair + rotated // 2) - order.index(pair) == head_dim // 2
        assert order.index(pair) == pair, "frequency i must meet pair i"


# ---------------------------------------------------------------------------------------------- refusals


def set_rope(rope_type: str, scaling: float) -> Callable[[GPTNeoXForCausalLM], None]:
    def change(model: GPTNeoXForCausalLM) -> None:
        model.gpt_neox.rotary_emb.rope_type = rope_type
        model.gpt_neox.rotary_emb.attention_scaling = scaling

    return change


def set_weight_dtype(dtype: torch.dtype) -> Callable[[GPTNeoXForCausalLM], None]:
    def change(model: GPTNeoXForCausalLM) -> None:
        projection = model.gpt_neox.layers[1].attention.query_key_value
        projection.weight = nn.Parameter(projection.weight.data.to(dtype), requires_grad=False)

    return change


def offload(model: GPTNeoXForCausalLM) -> None:
    model.gpt_neox.layers[1].attention.query_key_value.to("meta")


def replace_projection(model: GPTNeoXForCausalLM) -> None:
    """As GPTQ and AWQ do: a module without a plain weight."""
    model.gpt_neox.layers[1].attention.query_key_value = nn.Identity()


REFUSED = {
    "dynamic rope": (set_rope("dynamic", 1.0), "rope_type 'dynamic'"),
    "yarn rope": (set_rope("yarn", 1.2), "rope_type 'yarn'"),
    "int8": (set_weight_dtype(torch.int8), "quantised"),
    "uint8": (set_weight_dtype(torch.uint8), "quantised"),
    "float8": (set_weight_dtype(torch.float8_e4m3fn), "quantised"),
    "packed": (replace_projection, "quantised"),
    "offloaded": (offload, "offloaded"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_change_of_basis_refuses_what_would_not_be_exact_and_changes_nothing(make_neox: MakeNeox, case: str) -> None:
    model = make_neox()
    change, says = REFUSED[case]
    change(model)
    first = model.gpt_neox.layers[0].attention.query_key_value.weight.clone()
    with pytest.raises(ValueError, match=says) as caught:
        gpt_neox.present(model)
    assert "\n" not in str(caught.value)
    assert not gpt_neox.wide_heads(model).are_made
    assert torch.equal(model.gpt_neox.layers[0].attention.query_key_value.weight, first)


@pytest.mark.parametrize("case", ["int8", "float8", "packed", "offloaded"])
def test_quantised_weights_are_refused_where_no_basis_change_is_needed_too(make_neox: MakeNeox, case: str) -> None:
    """With rotary_pct=1 nothing is reordered, but the projection views read the same rows."""
    model = make_neox(rotary_pct=1.0)
    REFUSED[case][0](model)
    with pytest.raises(ValueError, match="quantised"):
        gpt_neox.present(model)


def test_a_model_with_partial_heads_cannot_be_presented(make_neox: MakeNeox) -> None:
    model = make_neox()
    with pytest.raises(AssertionError, match="wide first"), gpt_neox.presented(model):
        pass
    assert "model" not in model.__dict__


# ---------------------------------------------------------------------------------------------- projection views


@contextmanager
def captured(model: GPTNeoXForCausalLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[Any]]]:
    """q, k, v of every layer as its own forward makes them: before and after RoPE, and what reaches attention."""
    seen: dict[str, list[Any]] = {"hidden": [], "before": [], "after": [], "v": [], "angles": []}
    rotate = modeling_gpt_neox.apply_rotary_pos_emb

    def rotating(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        seen["before"].append((q, k))
        seen["after"].append(rotate(q, k, cos, sin, *args))
        seen["angles"].append((cos, sin))
        return seen["after"][-1]

    def attending(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen["v"].append(v)
        return eager(module, q, k, v, *args, **kwargs)

    eager = modeling_gpt_neox.eager_attention_forward
    monkeypatch.setattr(modeling_gpt_neox, "apply_rotary_pos_emb", rotating)
    monkeypatch.setattr(modeling_gpt_neox, "eager_attention_forward", attending)
    hooks = [
        layer.attention.register_forward_pre_hook(lambda _, args: seen["hidden"].append(args[0]))
        for layer in model.gpt_neox.layers
    ]
    yield seen
    for hook in hooks:
        hook.remove()
    monkeypatch.undo()


def heads(flat: Tensor, head_dim: int) -> Tensor:
    """``(B, T, H * D)`` to ``(B, H, T, D)``."""
    return flat.view(*flat.shape[:2], -1, head_dim).transpose(1, 2)


def largest_projection_error(
    make_neox: MakeNeox, monkeypatch: pytest.MonkeyPatch, shape: dict[str, Any], seed: int
) -> float:
    """Views of the prepared model against q, k, v of the untouched one, put into the new order of dims."""
    ids, untouched = tokens(), make_neox("eager", seed=seed, **shape)
    with torch.no_grad():
        with captured(untouched, monkeypatch) as seen:
            untouched(ids)
        model = gpt_neox.present(make_neox("eager", seed=seed, **shape)).model
        head_dim = model.config.hidden_size // model.config.num_attention_heads
        order = full_width.full_width_order(head_dim, int(shape["rotary_pct"] * head_dim))
        cos, sin = (angle[:, None] for angle in model.gpt_neox.rotary_emb(torch.zeros(1), torch.arange(70)[None]))
        errors = []
        with gpt_neox.presented(model):
            for layer, hidden in enumerate(seen["hidden"]):
                attention = model.model.layers[layer].self_attn
                parts = (attention.q_proj, attention.k_proj, attention.v_proj)
                q, k, v = (heads(part(hidden), head_dim) for part in parts)
                by_weight = [nn.functional.linear(hidden, part.weight, part.bias) for part in parts]
                errors += [(heads(a, head_dim) - b).abs().max() for a, b in zip(by_weight, (q, k, v), strict=True)]
                q_before, k_before = (part[..., order] for part in seen["before"][layer])
                q_after, k_after = (part[..., order] for part in seen["after"][layer])
                # The Llama rule over the whole head, as presses apply it.
                q_rotated, k_rotated = (
                    part * cos + torch.cat([-part[..., head_dim // 2 :], part[..., : head_dim // 2]], -1) * sin
                    for part in (q, k)
                )
                found = (q, k, v, q_rotated, k_rotated)
                expected = (q_before, k_before, seen["v"][layer], q_after, k_after)
                errors += [(a - b).abs().max() for a, b in zip(found, expected, strict=True)]
    return max(errors).item()


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_projection_views_are_the_q_k_v_of_the_untouched_layer(
    make_neox: MakeNeox, monkeypatch: pytest.MonkeyPatch, shape: dict[str, Any]
) -> None:
    assert largest_projection_error(make_neox, monkeypatch, shape, seed=3) < 1e-5


def contiguous_thirds(view: gpt_neox.ProjectionView, fused: Tensor) -> Tensor:
    return fused.chunk(3)[view._part]


def test_fault_contiguous_split(make_neox: MakeNeox, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt_neox.ProjectionView, "_rows", contiguous_thirds)
        assert largest_projection_error(make_neox, monkeypatch, SHAPES[0], seed=3) > 0.1


def arange_rows(model: GPTNeoXForCausalLM, part: int) -> Tensor:
    """Which rows of the fused weight a view shows, from a weight whose rows are numbered."""
    fused = model.gpt_neox.layers[0].attention.query_key_value
    with torch.no_grad():
        fused.weight[:] = torch.arange(fused.weight.shape[0], dtype=torch.float32)[:, None]
        fused.bias[:] = torch.arange(fused.weight.shape[0], dtype=torch.float32)
    view = gpt_neox.ProjectionView(model.gpt_neox.layers[0].attention, part)
    assert torch.equal(view.weight[:, 0], view.bias)
    assert torch.equal(view.weight, view.weight[:, :1].expand_as(view.weight))
    return view.bias.long()


@pytest.mark.parametrize("part", [0, 1, 2])
def test_an_arange_weight_shows_head_major_rows(make_neox: MakeNeox, part: int) -> None:
    expected = [head * 48 + part * 16 + dim for head in range(4) for dim in range(16)]
    assert arange_rows(make_neox(), part).tolist() == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt_neox.ProjectionView, "_rows", contiguous_thirds)
        assert arange_rows(make_neox(), part).tolist() != expected


@pytest.mark.parametrize(("part", "reordered"), [(0, True), (1, True), (2, False)])
def test_a_change_of_basis_reorders_rows_within_q_and_k_of_each_head(
    make_neox: MakeNeox, part: int, reordered: bool
) -> None:
    model = make_neox()
    arange_rows(model, part)
    gpt_neox.present(model)
    within = [0, 1, *range(4, 10), 2, 3, *range(10, 16)] if reordered else list(range(16))
    view = gpt_neox.ProjectionView(model.gpt_neox.layers[0].attention, part)
    assert view.bias.long().tolist() == [head * 48 + part * 16 + dim for head in range(4) for dim in within]
    assert torch.equal(view.weight[:, 5], view.bias)


def test_projection_views_hold_no_weights(make_neox: MakeNeox) -> None:
    model = gpt_neox.present(make_neox()).model
    attention = model.gpt_neox.layers[0].attention
    view = gpt_neox.ProjectionView(attention, 1)
    before = view.weight.clone()
    with torch.no_grad():
        attention.query_key_value.weight += 1
    assert torch.equal(view.weight, before + 1), "a view must follow its parameter"
    with gpt_neox.presented(model):
        assert {name for name, _ in model.named_parameters()} == {name for name, _ in make_neox().named_parameters()}


# ---------------------------------------------------------------------------------------------- no trace


def snapshot(model: GPTNeoXForCausalLM) -> dict[str, Any]:
    """Everything that could be left behind: attributes, submodules, hooks, config, the logger's filters.

    ``masked_key_indices=None`` is what any plain forward leaves once kvpress is imported; it counts as nothing.
    """
    state: dict[str, Any] = {"filters": list(logging.getLogger("kvpress.presses.base_press").filters)}
    for owner in (model.config, *model.modules()):
        held: dict[str, Any] = {name: id(value) for name, value in owner.__dict__.items()}
        if owner.__dict__.get("masked_key_indices", ...) is None:
            del held["masked_key_indices"]
        for name, value in owner.__dict__.items():
            if isinstance(value, dict):
                held[f"{name}()"] = {key: id(item) for key, item in value.items()}
        state[f"{type(owner).__name__} {id(owner)}"] = held
    return state


class Stumbles(kvpress.KnormPress):
    """Fails in the second layer."""

    def compress(self, module: nn.Module, *args: Any) -> Any:
        if module.layer_idx == 1:
            raise RuntimeError("stumbled")
        return super().compress(module, *args)


class StumblesMasking(kvpress.AdaKVPress):
    """Masks in the first layer, fails in the second."""

    def compress(self, module: nn.Module, *args: Any) -> Any:
        if module.layer_idx == 1:
            raise RuntimeError("stumbled")
        return super().compress(module, *args)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PRESSES)
def test_a_prefill_leaves_no_trace(make_pressable: Callable[..., PressableModel], attn: str, name: str) -> None:
    if attn == "eager" and name in MASKS:
        pytest.skip("kvpress masks heads in its patched attention functions, which eager attention does not use")
    model = make_pressable(attn)
    before = snapshot(model.model)
    prefill(model, tokens(1), PRESSES[name]())
    assert snapshot(model.model) == before


STUMBLING: dict[str, Callable[[], Any]] = {
    "shrinks": lambda: Stumbles(0.5),
    "masks": lambda: StumblesMasking(kvpress.KnormPress(0.5)),
}


@pytest.mark.parametrize("kind", STUMBLING)
def test_a_prefill_that_fails_leaves_no_trace(make_pressable: Callable[..., PressableModel], kind: str) -> None:
    model = make_pressable()
    before = snapshot(model.model)
    with pytest.raises(RuntimeError, match="stumbled"):
        prefill(model, tokens(1), STUMBLING[kind]())
    assert snapshot(model.model) == before


def test_an_exception_inside_presented_leaves_no_trace(make_pressable: Callable[..., PressableModel]) -> None:
    model = make_pressable()
    before = snapshot(model.model)
    with pytest.raises(KeyError), model.presented():
        assert snapshot(model.model) != before, "the snapshot must see what is lent"
        raise KeyError("inside")
    assert snapshot(model.model) == before


def test_presented_restores_what_was_there(make_pressable: Callable[..., PressableModel]) -> None:
    model = make_pressable()
    model.model.config.__dict__["head_dim"] = 16
    before = snapshot(model.model)
    with model.presented(), model.presented():
        pass
    assert snapshot(model.model) == before


def test_kvpress_does_not_warn_of_an_untested_model(
    make_pressable: Callable[..., PressableModel], caplog: pytest.LogCaptureFixture
) -> None:
    prefill(make_pressable(), tokens(1), kvpress.KnormPress(0.5))
    assert not [record for record in caplog.records if "not tested" in record.getMessage()]
    with make_pressable().presented():
        logging.getLogger("kvpress.presses.base_press").warning("something else")
    assert [record for record in caplog.records if "something else" in record.getMessage()]


@pytest.mark.parametrize("name", [name for name in PRESSES if name != "none"])
def test_a_press_changes_no_logit_of_its_own_prefill(make_pressable: Callable[..., PressableModel], name: str) -> None:
    """The trap that all else is built around: a press acts after attention, so a single forward cannot show it."""
    model = make_pressable()
    expected = logits(model.model, tokens())
    with model.presented(), PRESSES[name]()(model.model):
        found = logits(model.model, tokens())
    for attention in model.attentions:
        attention.__dict__.pop("masked_key_indices", None)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
