"""Where Triton's kernels can run; for what is raised where they cannot be made see the tests of those who run them."""

from __future__ import annotations

import pytest
import torch

from lm_eval_kvpress.models.fast import triton_support


@pytest.mark.parametrize(
    ("capability", "cuda", "current", "told"),
    [
        ((9, 0), "13.0", 0, ""),
        ((8, 0), "13.0", 0, ""),
        ((7, 5), "13.0", 0, "the GPU is not an NVIDIA of compute capability 8.0 or higher"),
        ((9, 0), None, 0, "the GPU is not an NVIDIA of compute capability 8.0 or higher"),
        ((9, 0), "13.0", 1, "cuda:0 is not the current device"),
    ],
)
def test_kernels_are_for_ampere_and_later_on_the_current_device(
    capability: tuple[int, int], cuda: str | None, current: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_support, "find_spec", lambda name: "there")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert triton_support.why_not_on(torch.device("cuda", 0)) == told
