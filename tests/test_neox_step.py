"""A decoding step in few kernels against the model's modules: equal tokens, and no use where it cannot stand for them.

On a CPU the kernels run in Triton's interpreter, block by block in Python: generations are short here.
"""

from __future__ import annotations

import builtins
import logging
from collections.abc import Callable
from subprocess import CalledProcessError
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from references import PRESSES, REROTATES, distinct_tokens
from torch import nn
from transformers import LogitsProcessorList

from lm_eval_kvpress import decode_graph, decoding, engine, neox_step, step_trial
from lm_eval_kvpress.cache import stack
from lm_eval_kvpress.engine import PressableModel

pytest.importorskip("triton", reason="needs Triton: kernels are compiled, or interpreted, by it")

CONTEXTS = [distinct_tokens(length, 211, length) for length in (50, 29, 41)]
HELD = [1, 3, 2]
NUM_NEW = 4


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_trial, "DEVICE_TYPES", {"cpu", "cuda"})
    monkeypatch.setattr(neox_step, "can_run_on", lambda device: True)


@pytest.fixture
def make(make_pressable: Callable[..., PressableModel]) -> Callable[..., PressableModel]:
    """``make_pressable`` for the GPU, where there is one."""

    def made(**setting: Any) -> PressableModel:
        model = make_pressable(**setting)
        model.model.to("cuda" if torch.cuda.is_available() else "cpu")
        return model

    return made


def as_it_is(step: Callable[[], None]) -> Callable[[], None]:
    return step


def decoded(
    model: PressableModel,
    name: str = "snapkv",
    rows: int = 3,
    *,
    few_kernels: bool = True,
    record: decode_graph.Recorder = as_it_is,
    num_new: int = NUM_NEW,
) -> list[list[int]]:
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
        max_new_tokens=num_new,
        sampler=decoding.Sampler(LogitsProcessorList()),
        stop_ids=frozenset(),
        stopped=lambda new: [False] * len(new),
        record=record if few_kernels else None,
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
    monkeypatch.setitem(step_trial.TOLERANCE, torch.float32, 1e-5)
    monkeypatch.setitem(step_trial.TOLERANCE, torch.float16, 1e-2)
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


def _made_by_triton() -> Exception:
    from triton.compiler.errors import CompilationError

    return CompilationError("some source", SimpleNamespace(lineno=1, col_offset=0), "no such thing")


REFUSALS: dict[str, tuple[Callable[[], Exception], str]] = {
    "no compiler": (lambda: RuntimeError("Failed to find C compiler. Set CC.\nmore of it"), "C compiler. Set CC."),
    "no headers": (lambda: CalledProcessError(1, ["gcc", "main.c"]), "returned non-zero exit status 1."),
    "no libcuda": (lambda: AssertionError("libcuda.so cannot found!"), "libcuda.so cannot found!"),
    "another glibc": (lambda: ImportError("GLIBC_2.38 not found"), "GLIBC_2.38 not found"),
    "an old GPU": (lambda: IndexError("map::at"), "map::at"),
    "a full disk": (lambda: OSError(28, "No space left on device"), "No space left on device"),
    "Triton's own": (_made_by_triton, "no such thing"),
    "nothing said": (RuntimeError, "RuntimeError()"),
}


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("where", ["__init__", "__call__"])
@pytest.mark.parametrize("what", REFUSALS)
def test_where_kernels_cannot_be_made_the_modules_run(
    make: Callable[..., PressableModel],
    where: str,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    error, told = REFUSALS[what]

    def fails(self: Any, *args: Any) -> Any:
        raise error()

    model = make(num_layers=1)
    expected = decoded(model, few_kernels=False)
    monkeypatch.setattr(neox_step.NeoxStep, where, fails)
    with caplog.at_level(logging.WARNING, "lm_eval_kvpress"):
        assert decoded(model) == expected
        assert decoded(model) == expected
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith(told)


@pytest.mark.usefixtures("anywhere")
def test_a_later_batch_whose_kernels_cannot_be_made_is_decoded_by_modules(
    make: Callable[..., PressableModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Any, *args: Any) -> Any:
        raise OSError(28, "No space left on device")

    model = make(num_layers=1)
    expected = decoded(model)
    assert model.step_maker.has_agreed is True  # type: ignore[attr-defined]
    monkeypatch.setattr(neox_step.NeoxStep, "__call__", fails)
    assert decoded(model) == expected
    assert model.step_maker.has_agreed is False  # type: ignore[attr-defined]


@pytest.mark.parametrize("rows", [2, 300])
def test_one_wrong_row_among_many_is_found(make: Callable[..., PressableModel], rows: int) -> None:
    maker, expected = step_trial.StepMaker(make().model), torch.randn(rows, 64)
    found = expected.clone()
    found[1] *= 0.98
    maker.compare("some kind", found, expected)
    assert maker.has_agreed is False


def test_where_the_modules_overflow_nothing_is_settled(make: Callable[..., PressableModel]) -> None:
    maker, expected = step_trial.StepMaker(make().model), torch.randn(2, 64)
    expected[0, 3] = torch.inf
    maker.compare("some kind", expected, expected)
    assert maker.has_agreed is None and maker.needs_comparison("some kind")


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


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("change", CHANGES)
def test_the_step_does_not_stand_for_modules_that_are_not_plain(
    make: Callable[..., PressableModel], change: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = make()
    assert model.step_maker() is not None
    alter, told = CHANGES[change]
    alter(model.model)
    with caplog.at_level(logging.WARNING, "lm_eval_kvpress"):
        assert model.step_maker() is None and model.step_maker() is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert told in line


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize(
    ("setting", "told"), [({"attn": "eager"}, "is eager, not sdpa"), ({"parallel": False}, "not plain")], ids=str
)
def test_nor_for_other_kinds_of_model(
    make: Callable[..., PressableModel], setting: dict[str, Any], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "lm_eval_kvpress"):
        assert make(**setting).step_maker() is None
    assert told in caplog.text


@pytest.mark.parametrize(
    ("capability", "cuda", "current", "can"),
    [((9, 0), "13.0", 0, True), ((8, 0), "13.0", 0, True), ((7, 5), "13.0", 0, False), ((9, 0), None, 0, False),
     ((9, 0), "13.0", 1, False)],
)  # fmt: skip
def test_kernels_are_for_ampere_and_later_on_the_current_device(
    capability: tuple[int, int], cuda: str | None, current: int, can: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert neox_step.can_run_on(torch.device("cuda", 0)) is can


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
    monkeypatch.setitem(step_trial.TOLERANCE, torch.float32, 1e-4)
    model = make(dtype=dtype)
    for _ in range(3):
        eager = decoded(model, rows=rows, num_new=20)
        assert decoded(model, rows=rows, num_new=20, record=decode_graph.cuda_graph) == eager
        assert model.step_maker.has_agreed is True  # type: ignore[attr-defined]
        if dtype == torch.float32:
            assert eager == decoded(model, rows=rows, num_new=20, few_kernels=False)
