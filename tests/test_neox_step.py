"""A decoding step in few kernels against the model's modules: equal tokens, and no use where it cannot stand for them.

On a CPU the kernels run in Triton's interpreter, block by block in Python: generations are short here.
"""

from __future__ import annotations

import builtins
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import PRESSES, REROTATES, distinct_tokens
from torch import nn
from transformers import LogitsProcessorList

from lm_eval_kvpress import decode_graph, decoding, engine, neox_step
from lm_eval_kvpress.cache import stack
from lm_eval_kvpress.engine import PressableModel

pytest.importorskip("triton", reason="needs Triton: kernels are compiled, or interpreted, by it")

CONTEXTS = [distinct_tokens(length, 211, length) for length in (50, 29, 41)]
HELD = [1, 3, 2]
NUM_NEW = 4


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neox_step, "can_run_on", lambda device: True)


@pytest.fixture
def make(make_pressable: Callable[..., PressableModel]) -> Callable[..., PressableModel]:
    """``make_pressable`` for the GPU, where there is one."""

    def made(**setting: Any) -> PressableModel:
        model = make_pressable(**setting)
        model.model.to("cuda" if torch.cuda.is_available() else "cpu")
        return model

    return made


def decoded(model: PressableModel, name: str = "snapkv", rows: int = 3, *, few_kernels: bool = True) -> list[list[int]]:
    caches = [
        engine.prefill(
            model, torch.tensor([context[: len(context) - held]]), PRESSES[name](), rerotates=name in REROTATES
        )
        for context, held in zip(CONTEXTS[:rows], HELD, strict=False)
    ]
    return decoding.decode(
        model,
        stack(caches),
        CONTEXTS[:rows],
        num_held_back=HELD[:rows],
        max_new_tokens=NUM_NEW,
        sampler=decoding.Sampler(LogitsProcessorList()),
        stop_ids=frozenset(),
        stopped=lambda new: [False] * len(new),
        record=(lambda step: step) if few_kernels else None,
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What each forward of a single token was: modules or few kernels."""
    log: list[str] = []
    few, modules = neox_step.NeoxStep.__call__, PressableModel.hidden_states

    def few_kernels(self: Any, *args: Any) -> torch.Tensor:
        log.append("few")
        return few(self, *args)

    def by_modules(self: PressableModel, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if tokens.shape[1] == 1:
            log.append("modules")
        return modules(self, tokens, **kwargs)

    monkeypatch.setattr(neox_step.NeoxStep, "__call__", few_kernels)
    monkeypatch.setattr(PressableModel, "hidden_states", by_modules)
    return log


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize(
    ("name", "rows"),
    [("none", 1), ("pyramidkv", 3), ("adakv:snapkv", 1), ("adakv:snapkv", 3), ("key_rerotation:streaming_llm", 3)],
)
def test_tokens_are_those_of_the_growing_cache(
    make: Callable[..., PressableModel], name: str, rows: int, calls: list[str]
) -> None:
    model = make(num_layers=2)
    expected = decoded(model, name, rows, few_kernels=False)
    calls.clear()
    assert decoded(model, name, rows) == expected
    held_back = ["modules"] * (rows == 1)  # a single token, too
    assert calls == [*held_back, "few", "modules", *["few"] * (NUM_NEW - 2)], "the first step is compared"


@pytest.mark.usefixtures("anywhere")
def test_a_step_that_has_agreed_is_not_compared_again(make: Callable[..., PressableModel], calls: list[str]) -> None:
    model = make(num_layers=1)
    expected = decoded(model)
    calls.clear()
    assert decoded(model) == expected
    assert calls == ["few"] * (NUM_NEW - 1)
    calls.clear()
    decoded(model, rows=1)
    assert calls[1:4] == ["few", "modules", "few"], "a single row has kernels of its own, which are compared"


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("setting", [{"rotary_pct": 1.0}, {"attention_bias": False}, {"dtype": torch.float16}], ids=str)
def test_other_settings_agree_too(
    make: Callable[..., PressableModel], setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(neox_step.TOLERANCE, torch.float32, 1e-5)
    monkeypatch.setitem(neox_step.TOLERANCE, torch.float16, 1e-2)
    model = make(num_layers=2, **setting)
    decoded(model)
    assert model.step_maker.has_agreed is True  # type: ignore[attr-defined]


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("kernel", ["add_and_norm", "rotate_and_store"])
def test_a_kernel_that_does_nothing_is_found_out_and_the_modules_run(
    make: Callable[..., PressableModel],
    kernel: str,
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from lm_eval_kvpress import decode_kernels

    model = make(num_layers=2)
    expected = decoded(model, few_kernels=False)
    monkeypatch.setattr(decode_kernels, kernel, lambda *args: None)
    calls.clear()
    with caplog.at_level(logging.WARNING, "lm_eval_kvpress"):
        assert decoded(model) == expected
        assert decoded(model) == expected
    assert calls.count("few") == 1
    (line,) = [record.getMessage() for record in caplog.records]
    assert "run module by module" in line and "differ from those of the model's modules by" in line


@pytest.mark.usefixtures("anywhere")
def test_where_kernels_cannot_be_compiled_the_modules_run(
    make: Callable[..., PressableModel], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(self: Any, *args: Any) -> torch.Tensor:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore of it")

    model = make(num_layers=2)
    expected = decoded(model, few_kernels=False)
    monkeypatch.setattr(neox_step.NeoxStep, "__call__", fails)
    with caplog.at_level(logging.WARNING, "lm_eval_kvpress"):
        assert decoded(model) == expected
        assert decoded(model) == expected
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith("Failed to find C compiler. Please specify via CC environment variable.")


@pytest.mark.usefixtures("anywhere")
def test_out_of_memory_is_left_to_the_caller_and_proves_nothing(
    make: Callable[..., PressableModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, *args: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("full")

    model = make(num_layers=2)
    with monkeypatch.context() as patch:
        patch.setattr(neox_step.NeoxStep, "__call__", full)
        with pytest.raises(torch.OutOfMemoryError):
            decoded(model)
    assert decoded(model) == decoded(model, few_kernels=False)


@pytest.mark.usefixtures("anywhere")
def test_without_triton_the_modules_run_and_it_is_said_once(
    make: Callable[..., PressableModel], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(neox_step, "find_spec", lambda name: None)
    model = make(num_layers=2)
    with caplog.at_level(logging.WARNING, "lm_eval_kvpress"):
        assert model.step_maker() is None and model.step_maker() is None
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
    assert make_pressable().step_maker() is None


class OtherLinear(nn.Linear):
    """As those of adapters and quantised weights are."""


def _other_product(model: Any) -> None:
    mlp = model.gpt_neox.layers[1].mlp
    mlp.dense_h_to_4h.__class__ = OtherLinear


def _watch(model: Any) -> None:
    model.gpt_neox.layers[1].post_attention_layernorm.register_forward_hook(lambda *args: None)


def _watch_before(model: Any) -> None:
    model.gpt_neox.layers[1].attention.register_forward_pre_hook(lambda *args: None)


def _replace(model: Any) -> None:
    mlp = model.gpt_neox.layers[1].mlp
    mlp.forward = mlp.forward


def _other_activation(model: Any) -> None:
    model.gpt_neox.layers[1].mlp.act = nn.ReLU()


def _mix_dtypes(model: Any) -> None:
    model.gpt_neox.final_layer_norm.to(torch.float64)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "another class of linear layer": _other_product,
    "a hook": _watch,
    "a hook before": _watch_before,
    "a forward that was replaced": _replace,
    "another activation": _other_activation,
    "mixed dtypes": _mix_dtypes,
    "training": lambda model: model.train(),
    "float64": lambda model: model.to(torch.float64),
}


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("change", CHANGES)
def test_the_step_does_not_stand_for_modules_that_are_not_plain(
    make: Callable[..., PressableModel], change: str
) -> None:
    model = make()
    assert model.step_maker() is not None
    CHANGES[change](model.model)
    assert model.step_maker() is None


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("setting", [{"attn": "eager"}, {"parallel": False}], ids=str)
def test_nor_for_other_kinds_of_model(make: Callable[..., PressableModel], setting: dict[str, Any]) -> None:
    assert make(**setting).step_maker() is None


@pytest.mark.usefixtures("anywhere")
def test_nor_while_every_module_there_is_is_watched(make: Callable[..., PressableModel]) -> None:
    model = make()
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert model.step_maker() is None
    finally:
        handle.remove()
    assert model.step_maker() is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: a real CUDA graph")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_cuda_graph_of_few_kernels(  # pragma: no cover
    make: Callable[..., PressableModel], rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_graph, "LEAST_REPLAYS", 1)
    monkeypatch.setitem(neox_step.TOLERANCE, torch.float32, 1e-4)
    model = make(dtype=dtype)
    for _ in range(3):
        found = decoded(model, rows=rows)
        assert model.step_maker.has_agreed is True  # type: ignore[attr-defined]
        if dtype == torch.float32:
            assert found == decoded(model, rows=rows, few_kernels=False)
