"""A step in few kernels is believed once it has agreed with the modules; whatever speaks against it leaves these."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from neox_steps import NUM_NEW, decoded
from triton_failures import REFUSALS

from lm_eval_kvpress.models.fast import gpt_neox_step
from lm_eval_kvpress.models.pressable import PressableModel

pytest.importorskip("triton", reason="needs Triton: kernels are compiled, or interpreted, by it")


@pytest.mark.usefixtures("few_kernels_anywhere")
def test_a_step_that_has_agreed_is_not_compared_again(
    make_for_gpu: Callable[..., PressableModel], step_calls: list[str]
) -> None:
    model = make_for_gpu(num_layers=1)
    expected = decoded(model)
    step_calls.clear()
    assert decoded(model) == expected
    assert step_calls == ["few"] * (NUM_NEW - 1)
    step_calls.clear()
    decoded(model, rows=1)
    assert step_calls[1:4] == ["few", "modules", "few"], "a single row has kernels of its own, which are compared"


@pytest.mark.usefixtures("few_kernels_anywhere")
@pytest.mark.parametrize("kernel", ["add_and_norm", "rotate_and_store"])
def test_a_kernel_that_does_nothing_is_found_out_and_the_modules_run(
    make_for_gpu: Callable[..., PressableModel],
    kernel: str,
    step_calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from lm_eval_kvpress.models.fast import triton_ops

    model = make_for_gpu(num_layers=2)
    expected = decoded(model, few_kernels=False)
    monkeypatch.setattr(triton_ops, kernel, lambda *args: None)
    step_calls.clear()
    with caplog.at_level(logging.WARNING, "lm_eval_kvpress"):
        assert decoded(model) == expected
        assert decoded(model) == expected
    assert step_calls.count("few") == 1
    (line,) = [record.getMessage() for record in caplog.records]
    assert "run module by module" in line and "differ from those of the model's modules by" in line


@pytest.mark.usefixtures("few_kernels_anywhere")
@pytest.mark.parametrize("where", ["__init__", "__call__"])
@pytest.mark.parametrize("what", REFUSALS)
def test_where_kernels_cannot_be_made_the_modules_run(
    make_for_gpu: Callable[..., PressableModel],
    where: str,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    error, told = REFUSALS[what]

    def fails(self: Any, *args: Any) -> Any:
        raise error()

    model = make_for_gpu(num_layers=1)
    expected = decoded(model, few_kernels=False)
    monkeypatch.setattr(gpt_neox_step.NeoxStep, where, fails)
    with caplog.at_level(logging.WARNING, "lm_eval_kvpress"):
        assert decoded(model) == expected
        assert decoded(model) == expected
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith(told)


@pytest.mark.usefixtures("few_kernels_anywhere")
def test_a_later_batch_whose_kernels_cannot_be_made_is_decoded_by_modules(
    make_for_gpu: Callable[..., PressableModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Any, *args: Any) -> Any:
        raise OSError(28, "No space left on device")

    model = make_for_gpu(num_layers=1)
    expected = decoded(model)
    assert model.fast.step_maker() is not None
    monkeypatch.setattr(gpt_neox_step.NeoxStep, "__call__", fails)
    assert decoded(model) == expected
    assert model.fast.step_maker() is None


@pytest.mark.usefixtures("few_kernels_anywhere")
def test_out_of_memory_is_left_to_the_caller_and_proves_nothing(
    make_for_gpu: Callable[..., PressableModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, *args: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("full")

    model = make_for_gpu(num_layers=2)
    with monkeypatch.context() as patch:
        patch.setattr(gpt_neox_step.NeoxStep, "__call__", full)
        with pytest.raises(torch.OutOfMemoryError):
            decoded(model)
    assert decoded(model) == decoded(model, few_kernels=False)
