"""The kernel for shared key-value heads stands for PyTorch's attention once it has agreed, and nowhere else."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from triton_failures import REFUSALS

pytest.importorskip("triton", reason="needs Triton: kernels are compiled, or interpreted, by it")

from lm_eval_kvpress.models.fast import grouped_attention, triton_attention, triton_support  # noqa: E402
from lm_eval_kvpress.models.fast.grouped_attention import GroupedKernel  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, HEADS, SHARED, CAPACITY, DIM = 2, 6, 2, 48, 16
PYTORCHS = torch.full((ROWS, HEADS, DIM), 7.0)
"""What stands for PyTorch's result where only the question is who was asked."""


@pytest.fixture(autouse=True)
def _asked_for_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_attention, "DEVICE_TYPES", {"cpu", "cuda"})
    monkeypatch.setattr(triton_support, "is_new_enough", lambda device: True)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtype of each call of the kernel."""
    log: list[torch.dtype] = []
    call = triton_attention.Attention.__call__

    def watched(self: Any, query: torch.Tensor, *args: Any) -> torch.Tensor:
        log.append(query.dtype)
        return call(self, query, *args)

    monkeypatch.setattr(triton_attention.Attention, "__call__", watched)
    return log


def arguments(
    *, mask_heads: int = 1, dtype: torch.dtype = torch.float16, seed: int = 0, num_written: int = 40
) -> tuple[Any, ...]:
    """Of `attend`, after the module: the last entries are hidden, as what is not written, and some others."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(ROWS, 1, HEADS, DIM), (ROWS, SHARED, CAPACITY, DIM), (ROWS, SHARED, CAPACITY, DIM)]
    query, key, value = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    hidden = torch.rand(ROWS, mask_heads, 1, CAPACITY, generator=generator) < 0.3
    hidden[..., num_written:] = True
    hidden[..., num_written - 2 : num_written] = False
    mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(dtype).min).to(DEVICE, dtype)
    return query.transpose(1, 2), key, value, mask


def attended(kernel: GroupedKernel, values: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    monkeypatch.setattr(grouped_attention, "KERNEL", kernel)
    with torch.inference_mode():
        return grouped_attention.attend(torch.nn.Module(), *values, scaling=0.3)[0]


@pytest.mark.parametrize("mask_heads", [1, HEADS])
def test_after_the_first_call_the_kernel_runs_with_pytorchs_results(
    mask_heads: int, ran: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = GroupedKernel()
    for seed, num_written in enumerate((40, 41, CAPACITY)):  # as a buffer is filled, to its end
        values = arguments(mask_heads=mask_heads, seed=seed, num_written=num_written)
        expected = attended(never(), values, monkeypatch)
        torch.testing.assert_close(attended(kernel, values, monkeypatch), expected, atol=4e-3, rtol=0)
        assert len(ran) == seed + 1 and kernel.ran_last is (seed > 0)
    asked: list[int] = []
    query, key, value, mask = values
    kernel(query[:, :, 0], key, value, mask, 0.3, lambda: asked.append(1) or PYTORCHS)  # type: ignore[func-returns-value]
    assert not asked


def never() -> GroupedKernel:
    kernel = GroupedKernel()
    kernel._trial.is_refused = True
    return kernel


def test_each_kind_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its mask, its head dim and its query heads."""
    kernel = GroupedKernel()
    query, key, value, mask = arguments()
    kinds = [
        (query, key, value, mask),
        arguments(mask_heads=HEADS),
        (query[..., :8], key[..., :8].contiguous(), value[..., :8].contiguous(), mask),
        (query[:, :4], key, value, mask),
        (query[:, :4], key[:, :1].contiguous(), value[:, :1].contiguous(), mask),
    ]
    for known, values in enumerate(kinds):
        for is_known in (False, True):
            attended(kernel, values, monkeypatch)
            assert (len(kernel._trial._agreed), kernel.ran_last) == (known + 1, is_known)


@pytest.mark.parametrize(
    "change",
    [
        {"mask": None},
        {"dtype": torch.float32},
        {"mask": lambda mask: mask == 0},
        {"value": lambda value: value.transpose(2, 3).contiguous().transpose(2, 3)},
        {
            "key": lambda key: key[:, :, :40],
            "value": lambda value: value[:, :, :40],
            "mask": lambda mask: mask[..., :40],
        },
    ],
    ids=[
        "no mask",
        "float32",
        "a mask of bools",
        "values with gaps",
        "a slice of a cache that grows",
    ],
)
def test_other_calls_are_pytorchs(
    change: dict[str, Any], ran: list[torch.dtype], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("query", "key", "value", "mask")
    values = dict(zip(names, arguments(dtype=change.pop("dtype", torch.float16)), strict=True))
    values.update({name: made(values[name]) if callable(made) else made for name, made in change.items()})
    found = attended(GroupedKernel(), tuple(values.values()), monkeypatch)
    assert not ran and found.shape == (ROWS, 1, HEADS, DIM) and not caplog.records


def test_nor_is_a_kernel_compared_while_a_graph_is_recorded(
    ran: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped_attention, "_is_recording", lambda device: True)
    kernel = GroupedKernel()
    attended(kernel, arguments(), monkeypatch)
    assert not ran and not kernel._trial._agreed


@pytest.mark.parametrize("what", REFUSALS)
def test_where_the_kernel_cannot_be_made_pytorchs_runs(
    what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    error, told = REFUSALS[what]

    def fails(self: Any, *args: Any) -> Any:
        raise error()

    expected, kernel = attended(never(), arguments(), monkeypatch), GroupedKernel()
    monkeypatch.setattr(triton_attention.Attention, "__call__", fails)
    with caplog.at_level(logging.WARNING, "lm_eval_kvpress"):
        for _ in range(2):
            assert torch.equal(attended(kernel, arguments(), monkeypatch), expected)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith(told)


def test_where_triton_is_missing_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(triton_support, "find_spec", lambda name: None)
    kernel = GroupedKernel()
    with caplog.at_level(logging.WARNING, "lm_eval_kvpress"):
        attended(kernel, arguments(), monkeypatch)
        attended(kernel, arguments(), monkeypatch)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith("PyTorch's, which is slow at few rows: Triton is not installed")


def test_nor_are_dropout_and_gradients_the_kernels(ran: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_attention, "KERNEL", GroupedKernel())
    assert not grouped_attention.attend(torch.nn.Module(), *arguments(), dropout=1.0)[0].any()
    with torch.enable_grad():
        grouped_attention.attend(torch.nn.Module(), *arguments())
    assert not ran


def test_a_head_of_zeros_is_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, values = GroupedKernel(), arguments()
    values[2][:, 1] = 0
    attended(kernel, values, monkeypatch)
    assert len(kernel._trial._agreed) == 1


def test_another_device_is_told_once_and_does_not_end_the_kernel_here(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernel, reasons = GroupedKernel(), iter(["cuda:1 is not the current device"] * 2 + [""] * 2)
    monkeypatch.setattr(triton_support, "why_not_on", lambda device: next(reasons))
    with caplog.at_level(logging.WARNING, "lm_eval_kvpress"):
        for _ in range(4):
            attended(kernel, arguments(), monkeypatch)
    assert len(caplog.records) == 1 and kernel.ran_last


def test_the_record_says_what_attended(monkeypatch: pytest.MonkeyPatch) -> None:
    attended(GroupedKernel(), arguments(), monkeypatch)
    assert grouped_attention.step_kind() == "modules"
    attended(grouped_attention.KERNEL, arguments(), monkeypatch)
    assert grouped_attention.step_kind() == "modules, grouped kernel"
    attended(grouped_attention.KERNEL, arguments(dtype=torch.float32), monkeypatch)
    assert grouped_attention.step_kind() == "modules"


@pytest.mark.parametrize("wrong", [1.05, torch.nan])
def test_one_wrong_head_is_found(
    wrong: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    call, expected = triton_attention.Attention.__call__, attended(never(), arguments(), monkeypatch)

    def wrong_head(self: Any, *args: Any) -> torch.Tensor:
        found = call(self, *args).view(ROWS, HEADS, DIM).clone()
        found[1, 4] *= wrong
        return found

    monkeypatch.setattr(triton_attention.Attention, "__call__", wrong_head)
    kernel = GroupedKernel()
    with caplog.at_level(logging.WARNING, "lm_eval_kvpress"):
        for _ in range(2):
            assert torch.equal(attended(kernel, arguments(), monkeypatch), expected)
    assert "differ from those of PyTorch's" in caplog.text


def test_where_pytorchs_overflows_nothing_is_settled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    values, kernel = arguments(), GroupedKernel()
    values[2][0, 0, 3] = torch.inf
    values[3][0, 0, 0, 3] = 0
    attended(kernel, values, monkeypatch)
    assert not kernel._trial._agreed and not caplog.records
    attended(kernel, arguments(), monkeypatch)
    assert len(kernel._trial._agreed) == 1


def test_out_of_memory_is_left_to_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, *args: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("full")

    kernel = GroupedKernel()
    monkeypatch.setattr(triton_attention.Attention, "__call__", full)
    with pytest.raises(torch.OutOfMemoryError):
        attended(kernel, arguments(), monkeypatch)
    assert not kernel._trial.is_refused
