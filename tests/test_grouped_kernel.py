"""The kernel for shared key-value heads stands for PyTorch's attention once it has agreed, and nowhere else."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from test_step_trial import REFUSALS

pytest.importorskip("triton", reason="needs Triton: kernels are compiled, or interpreted, by it")

from lm_eval_kvpress import decode_attention, grouped_attention, grouped_kernel, triton_support  # noqa: E402
from lm_eval_kvpress.grouped_kernel import GroupedKernel  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, HEADS, SHARED, CAPACITY, DIM = 2, 6, 2, 48, 16
PYTORCHS = torch.full((ROWS, HEADS, DIM), 7.0)
"""What stands for PyTorch's result where only the question is who was asked."""


@pytest.fixture(autouse=True)
def _asked_for_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_kernel, "DEVICE_TYPES", {"cpu", "cuda"})
    monkeypatch.setattr(triton_support, "can_run_on", lambda device: True)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtype of each call of the kernel."""
    log: list[torch.dtype] = []
    call = decode_attention.Attention.__call__

    def watched(self: Any, query: torch.Tensor, *args: Any) -> torch.Tensor:
        log.append(query.dtype)
        return call(self, query, *args)

    monkeypatch.setattr(decode_attention.Attention, "__call__", watched)
    return log


def arguments(*, mask_heads: int = 1, dtype: torch.dtype = torch.float16, seed: int = 0) -> tuple[Any, ...]:
    """Of `attend`, after the module: the last entries are hidden, as what is not written, and some others."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(ROWS, 1, HEADS, DIM), (ROWS, SHARED, CAPACITY, DIM), (ROWS, SHARED, CAPACITY, DIM)]
    query, key, value = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    hidden = torch.rand(ROWS, mask_heads, 1, CAPACITY, generator=generator) < 0.3
    hidden[..., 40:] = True
    mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(dtype).min).to(DEVICE, dtype)
    return query.transpose(1, 2), key, value, mask


def attended(kernel: GroupedKernel, values: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    monkeypatch.setattr(grouped_attention, "KERNEL", kernel)
    return grouped_attention.attend(torch.nn.Module(), *values, scaling=0.3)[0]


@pytest.mark.parametrize("mask_heads", [1, HEADS])
def test_after_the_first_call_the_kernel_runs_with_pytorchs_results(
    mask_heads: int, ran: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = GroupedKernel()
    for seed in range(3):
        values = arguments(mask_heads=mask_heads, seed=seed)
        expected = attended(never(), values, monkeypatch)
        torch.testing.assert_close(attended(kernel, values, monkeypatch), expected, atol=4e-3, rtol=0)
        assert len(ran) == seed + 1
    asked: list[int] = []
    query, key, value, mask = values
    kernel(query[:, :, 0], key, value, mask, 0.3, lambda: asked.append(1) or PYTORCHS)  # type: ignore[func-returns-value]
    assert not asked


def never() -> GroupedKernel:
    kernel = GroupedKernel()
    kernel._was_refused = True
    return kernel


def test_each_kind_is_compared(ran: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = GroupedKernel()
    for mask_heads in (1, HEADS, 1, HEADS):
        attended(kernel, arguments(mask_heads=mask_heads), monkeypatch)
    assert len(kernel._agreed) == 2 and len(ran) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"mask": None},
        {"dtype": torch.float32},
        {
            "key": lambda key: key[:, :, :40],
            "value": lambda value: value[:, :, :40],
            "mask": lambda mask: mask[..., :40],
        },
    ],
    ids=["no mask", "float32", "a slice of a cache that grows"],
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
    monkeypatch.setattr(grouped_kernel, "_is_recording", lambda device: True)
    kernel = GroupedKernel()
    attended(kernel, arguments(), monkeypatch)
    assert not ran and not kernel._agreed


@pytest.mark.parametrize("what", REFUSALS)
def test_where_the_kernel_cannot_be_made_pytorchs_runs(
    what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    error, told = REFUSALS[what]

    def fails(self: Any, *args: Any) -> Any:
        raise error()

    expected, kernel = attended(never(), arguments(), monkeypatch), GroupedKernel()
    monkeypatch.setattr(decode_attention.Attention, "__call__", fails)
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


@pytest.mark.parametrize("wrong", [1.1, torch.nan])
def test_one_wrong_head_is_found(
    wrong: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    call, expected = decode_attention.Attention.__call__, attended(never(), arguments(), monkeypatch)

    def wrong_head(self: Any, *args: Any) -> torch.Tensor:
        found = call(self, *args).view(ROWS, HEADS, DIM).clone()
        found[1, 4] *= wrong
        return found

    monkeypatch.setattr(decode_attention.Attention, "__call__", wrong_head)
    kernel = GroupedKernel()
    with caplog.at_level(logging.WARNING, "lm_eval_kvpress"):
        for _ in range(2):
            assert torch.equal(attended(kernel, arguments(), monkeypatch), expected)
    assert "its results differ from those of PyTorch's" in caplog.text


def test_where_pytorchs_overflows_nothing_is_settled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    values, kernel = arguments(), GroupedKernel()
    values[2][0, 0, 3] = torch.inf
    values[3][0, 0, 0, 3] = 0
    attended(kernel, values, monkeypatch)
    assert not kernel._agreed and not caplog.records
    attended(kernel, arguments(), monkeypatch)
    assert len(kernel._agreed) == 1


def test_out_of_memory_is_left_to_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, *args: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("full")

    kernel = GroupedKernel()
    monkeypatch.setattr(decode_attention.Attention, "__call__", full)
    with pytest.raises(torch.OutOfMemoryError):
        attended(kernel, arguments(), monkeypatch)
    assert not kernel._was_refused
