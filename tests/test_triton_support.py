"""Where Triton's kernels can run; for what is raised where they cannot be made see the tests of those who run them."""

from __future__ import annotations

import pytest
import torch

from lm_eval_kvpress import triton_support


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
    assert triton_support.can_run_on(torch.device("cuda", 0)) is can
