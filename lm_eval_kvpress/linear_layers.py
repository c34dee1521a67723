"""Linear layers on a CPU: by oneDNN where PyTorch would take MKL and be slow.

In fp32 PyTorch multiplies by Intel's MKL, on AMD's processors too, where it is slow for the few rows of a decoding
step: on Zen 4 one, two and sixteen rows by a head of 50,304 x 512 take 9.3, 20.4 and 17.7 ms, and by oneDNN, which
PyTorch brings along, 4.0, 5.2 and 8.4; large products gain a tenth (docs/LOG.md). Both are fp32 and differ by rounding.
In 16 bit PyTorch takes oneDNN by itself. On Intel's processors nothing changes: there the two were not compared.

For every new number of rows oneDNN generates code, 0.3 to 1 ms and up to 0.6 MB each, at most 0.45 GB in all, and keeps
it. That pays where numbers of rows recur, which those of decoding do, and where the product is large.

The operator is the one that ``torch.compile`` makes of a linear layer (``torch/_inductor/fx_passes/mkldnn_fusion.py``).
No release promises it, so it is used only once it has multiplied a small matrix correctly.

Knows torch. Does not know presses, caches or text.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

FEW_ROWS = 32
LARGE_PRODUCT = 2**27
"""Multiplications of a product, one to two milliseconds, from which on its code is worth generating."""


def linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``(..., E)`` by ``(V, E)`` to ``(..., V)``, as `torch.nn.functional.linear` by the faster library."""
    multiply = _quickly if _is_on() and _fits(weight) else nn.functional.linear
    return multiply(hidden, weight, bias)


@contextmanager
def quick_forwards(layers: Iterable[nn.Linear]) -> Iterator[None]:
    """Makes layers compute as `linear` does. Their hooks stay in force; one whose ``forward`` was replaced is left."""
    lent = [layer for layer in layers if "forward" not in layer.__dict__ and _fits(layer.weight)] if _is_on() else []
    for layer in lent:
        layer.__dict__["forward"] = functools.partial(_quickly, weight=layer.weight, bias=layer.bias)
    try:
        yield
    finally:
        for layer in lent:
            layer.__dict__.pop("forward", None)


def _quickly(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    num_rows = hidden.numel() // weight.shape[1]
    pays = num_rows <= FEW_ROWS or num_rows * weight.numel() >= LARGE_PRODUCT
    return _by_onednn(hidden, weight, bias) if pays else nn.functional.linear(hidden, weight, bias)


def _is_on() -> bool:
    """The operator has no gradient, and autocast, which would cast the factors, does not know it."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return bool(torch.backends.mkldnn.enabled) and _is_faster_here()


def _fits(weight: torch.Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.device.type == "cpu"


@functools.cache
def _is_faster_here() -> bool:
    return torch.backends.mkl.is_available() and _processor_is_amd() and _operator_works()


def _processor_is_amd() -> bool:
    path = Path("/proc/cpuinfo")  # on Linux `platform` names the architecture only
    return "AuthenticAMD" in (path.read_text(encoding="utf-8") if path.exists() else platform.processor())


def _operator_works() -> bool:
    hidden, weight, bias = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3), torch.arange(4.0)
    try:
        with torch.inference_mode():
            return torch.equal(_by_onednn(hidden, weight, bias), hidden @ weight.T + bias)
    except (AttributeError, RuntimeError, TypeError):  # absent, not for this processor, another signature
        return False


def _by_onednn(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")
    return product
