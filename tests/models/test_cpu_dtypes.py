"""A dtype that this CPU multiplies slowly is named."""

from __future__ import annotations

import platform
from collections.abc import Callable

import pytest
import torch

from lm_eval_kvpress.models import cpu_dtypes

SLOW, QUICK = (lambda: False), (lambda: True)


def refuses() -> bool:
    raise RuntimeError("no kernel")


@pytest.mark.parametrize(
    ("dtype", "bf16", "fp16", "named"),
    [
        (torch.bfloat16, SLOW, QUICK, "bfloat16"),
        (torch.float16, QUICK, SLOW, "float16"),
        (torch.bfloat16, QUICK, SLOW, None),
        (torch.float16, SLOW, QUICK, None),
        (torch.float32, SLOW, SLOW, None),
        (torch.bfloat16, refuses, SLOW, None),
    ],
)
def test_a_dtype_without_instructions_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    dtype: torch.dtype,
    bf16: Callable[[], bool],
    fp16: Callable[[], bool],
    named: str | None,
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bf16, raising=False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", fp16, raising=False)
    cpu_dtypes.warn_of_slow_dtype.__wrapped__(dtype)
    assert len(caplog.messages) == (named is not None)
    assert named is None or f"no instructions for {named}:" in caplog.text and "dtype=float32" in caplog.text


def test_pytorch_still_tells_which_dtypes_are_quick() -> None:
    if not (torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")):
        pytest.skip("this PyTorch has no oneDNN for x86")
    for dtype in ("bf16", "fp16"):
        assert getattr(torch.ops.mkldnn, f"_is_mkldnn_{dtype}_supported")() in (True, False), "renamed: follow"
