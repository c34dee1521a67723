"""GPTNeoX's step in few kernels against the modules: equal tokens, and no use where it cannot stand for them."""

from __future__ import annotations

import builtins
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from neox_steps import NUM_NEW, decoded, kernels_after_trial
from torch import nn

from lm_eval_kvpress.engine import cuda_graph
from lm_eval_kvpress.models.fast import gpt_neox_step, triton_support
from lm_eval_kvpress.models.pressable import PressableModel

pytest.importorskip("triton", reason="needs Triton: kernels are compiled, or interpreted, by it")


@pytest.mark.usefixtures("few_kernels_anywhere")
@pytest.mark.parametrize(
    ("name", "rows"),
    [("none", 1), ("pyramidkv", 3), ("adakv:snapkv", 1), ("adakv:snapkv", 3), ("key_rerotation:streaming_llm", 3)],
)
def test_tokens_are_those_of_the_growing_cache(
    make_for_gpu: Callable[..., PressableModel], name: str, rows: int, step_calls: list[str]
) -> None:
    model = make_for_gpu(num_layers=2)
    expected = decoded(model, name, rows, few_kernels=False)
    step_calls.clear()
    assert decoded(model, name, rows) == expected
    held_back = ["modules"] * (rows == 1)  # a single token, too
    assert step_calls == [*held_back, "few", "modules", *["few"] * (NUM_NEW - 2)], "the first step is compared"


@pytest.mark.usefixtures("few_kernels_anywhere")
@pytest.mark.parametrize("setting", [{"rotary_pct": 1.0}, {"attention_bias": False}, {"dtype": torch.float16}], ids=str)
def test_other_settings_agree_too(
    make_for_gpu: Callable[..., PressableModel], setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gpt_neox_step.TOLERANCE, torch.float32, 1e-5)
    monkeypatch.setitem(gpt_neox_step.TOLERANCE, torch.float16, 1e-2)
    model = make_for_gpu(num_layers=2, **setting)
    assert kernels_after_trial(model) == "few kernels"


@pytest.mark.usefixtures("few_kernels_anywhere")
def test_without_triton_the_modules_run_and_it_is_said_once(
    make_for_gpu: Callable[..., PressableModel], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(triton_support, "find_spec", lambda name: None)
    model = make_for_gpu(num_layers=2)
    with caplog.at_level(logging.WARNING, "lm_eval_kvpress"):
        assert model.fast.step_maker() is None and model.fast.step_maker() is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith("Triton is not installed")


def test_on_a_cpu_there_is_no_such_step_and_triton_is_not_imported(
    make_pressable: Callable[..., PressableModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, *args: Any) -> Any:
        assert not name.startswith("triton")
        return imported(name, *args)

    imported = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    assert make_pressable().fast.step_maker() is None


class OtherLinear(nn.Linear):
    """As those of adapters and quantised weights are."""


class OtherWeight(nn.Parameter):
    """As quantisation leaves it that keeps the layer's class."""


def _layer(model: Any) -> Any:
    return model.gpt_neox.layers[1]


def _other_product(model: Any) -> None:
    _layer(model).mlp.dense_h_to_4h.__class__ = OtherLinear


def _other_weight(model: Any) -> None:
    _layer(model).mlp.dense_h_to_4h.weight.__class__ = OtherWeight


def _norm_without_bias(model: Any) -> None:
    model.gpt_neox.final_layer_norm.bias = None


def _replace(model: Any) -> None:
    _layer(model).mlp.forward = _layer(model).mlp.forward


def _other_activation(model: Any) -> None:
    _layer(model).mlp.act = nn.ReLU()


def _watch(model: Any) -> None:
    _layer(model).post_attention_layernorm.register_forward_hook(lambda *args: None)


def _watch_before(model: Any) -> None:
    _layer(model).attention.register_forward_pre_hook(lambda *args: None)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "another class of linear layer": (_other_product, "not plain"),
    "another class of weight": (_other_weight, "not plain"),
    "a norm without bias": (_norm_without_bias, "not plain"),
    "another activation": (_other_activation, "not plain"),
    "training": (lambda model: model.train(), "not plain"),
    "a hook": (_watch, "a hook watches"),
    "a hook before": (_watch_before, "a hook watches"),
    "a forward that was replaced": (_replace, "a hook watches"),
    "mixed dtypes": (lambda model: model.gpt_neox.final_layer_norm.to(torch.float64), "several devices or dtypes"),
    "float64": (lambda model: model.to(torch.float64), "other than float32"),
}


@pytest.mark.usefixtures("few_kernels_anywhere")
@pytest.mark.parametrize("change", CHANGES)
def test_the_step_does_not_stand_for_modules_that_are_not_plain(
    make_for_gpu: Callable[..., PressableModel], change: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_for_gpu()
    assert model.fast.step_maker() is not None
    alter, told = CHANGES[change]
    alter(model.model)
    with caplog.at_level(logging.WARNING, "lm_eval_kvpress"):
        assert model.fast.step_maker() is None and model.fast.step_maker() is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert told in line


@pytest.mark.usefixtures("few_kernels_anywhere")
@pytest.mark.parametrize(
    ("setting", "told"), [({"attn": "eager"}, "is eager, not sdpa"), ({"parallel": False}, "not plain")], ids=str
)
def test_nor_for_other_kinds_of_model(
    make_for_gpu: Callable[..., PressableModel], setting: dict[str, Any], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "lm_eval_kvpress"):
        assert make_for_gpu(**setting).fast.step_maker() is None
    assert told in caplog.text


@pytest.mark.usefixtures("few_kernels_anywhere")
def test_nor_while_every_module_there_is_is_watched(make_for_gpu: Callable[..., PressableModel]) -> None:
    model = make_for_gpu()
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert model.fast.step_maker() is None
    finally:
        handle.remove()
    assert model.fast.step_maker() is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: a real CUDA graph")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_cuda_graph_of_few_kernels(  # pragma: no cover
    make_for_gpu: Callable[..., PressableModel],
    rows: int,
    dtype: torch.dtype,
    step_calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(gpt_neox_step.TOLERANCE, torch.float32, 1e-4)
    model = make_for_gpu(dtype=dtype)
    for _ in range(3):
        eager = decoded(model, rows=rows, num_new=20)
        step_calls.clear()
        assert decoded(model, rows=rows, num_new=20, record=cuda_graph.cuda_graph) == eager
        assert step_calls[-1] == "few", "what was captured"
        if dtype == torch.float32:
            assert eager == decoded(model, rows=rows, num_new=20, few_kernels=False)
