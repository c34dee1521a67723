"""Linear layers on a CPU by oneDNN, where PyTorch would use MKL and be slow.

In fp32 PyTorch multiplies by Intel's MKL, on AMD's processors too, where it is slow for the few rows of a decoding
step: on Zen 4, products of 1, 2 and 16 rows with a head of 50,304 x 512 take 9.3, 20.4 and 17.7 ms, and by oneDNN,
which comes with PyTorch, 4.0, 5.2 and 8.4; large products gain a tenth (docs/experiments/onednn_linear.md). Both are
fp32 and differ by rounding. On Zen 3, which has no AVX-512, only few rows with large weights gain. So the thresholds
depend on the instruction set. On other processors the two were not compared, and nothing changes.

For every new number of rows oneDNN generates code, 0.3 to 1 ms and 0.3 to 0.6 MB each, and keeps it (0.45 GB was the
most seen). That pays where numbers of rows recur, as in decoding, and where the product is large.

The operator is the one that ``torch.compile`` makes of a linear layer (``torch/_inductor/fx_passes/mkldnn_fusion.py``).
No release promises it, so it is used only once it has multiplied small matrices correctly.

Knows torch. Does not know presses, caches or text.

Letters in shape comments: I inputs and O outputs of a linear layer.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path

import torch
from torch import nn

from lm_eval_kvpress.models.lend import lend

FEW_ROWS = 32
"""Rows up to which a product uses oneDNN however small it is, if its weight is large enough."""


@dataclass(frozen=True)
class Bounds:
    """Size thresholds from which oneDNN is used.

    Attributes:
        weight: entries of a weight.
        product: multiplications of a product of many rows; 2^27 take one to two milliseconds.
    """

    weight: float
    product: float


AMD_BOUNDS = {"AVX512": Bounds(weight=0, product=2**27), "AVX2": Bounds(weight=2**20, product=inf)}
"""By PyTorch's name for the instruction set."""
NEVER = Bounds(weight=inf, product=inf)


def linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiply ``(..., I)`` by ``(O, I)``, as `torch.nn.functional.linear` does, with the faster library."""
    # The operator has no gradient, and autocast, which would cast the factors, does not know it.
    if uses_onednn(weight) and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"):
        num_rows = hidden.numel() // weight.shape[1]
        if num_rows <= FEW_ROWS or num_rows * weight.numel() >= bounds_here().product:
            return _by_onednn(hidden, weight, bias)
    return nn.functional.linear(hidden, weight, bias)


@contextmanager
def quick_forwards(layers: Iterable[nn.Linear]) -> Iterator[None]:
    """Let layers compute by `linear`. Their hooks stay in force; a layer whose ``forward`` was replaced keeps it."""
    with ExitStack() as loans:
        for layer in layers if bounds_here() != NEVER else ():
            if "forward" not in layer.__dict__:
                loans.enter_context(lend(layer, forward=functools.partial(_forward, layer)))
        yield


def _forward(layer: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    return linear(hidden, layer.weight, layer.bias)  # read now: a hook may have put another weight there


def uses_onednn(weight: torch.Tensor) -> bool:
    """Whether oneDNN may multiply by a weight: a plain fp32 tensor of a size for which it is faster here.

    Subclasses of tensors, as quantisation makes them, multiply in ways of their own.
    """
    return (
        weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and type(weight) in (nn.Parameter, torch.Tensor)
        and bool(torch.backends.mkldnn.enabled)
        and weight.numel() >= bounds_here().weight
    )


def library_of(weight: torch.Tensor) -> str:
    """The name of the library that `linear` multiplies by a weight with, for the record."""
    return "oneDNN" if uses_onednn(weight) else "torch"


@functools.cache
def bounds_here() -> Bounds:
    """The thresholds of this processor; `NEVER` where oneDNN was not found faster or does not work."""
    wanted = torch.backends.mkl.is_available() and "AuthenticAMD" in _processor()
    bounds = AMD_BOUNDS.get(torch.backends.cpu.get_cpu_capability(), NEVER) if wanted else NEVER
    return bounds if bounds != NEVER and _operator_works() else NEVER


def _processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")  # on Linux `platform` names the architecture only
    except OSError:
        return platform.processor()


def _operator_works() -> bool:
    def whole(*shape: int) -> torch.Tensor:
        numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float32, device="cpu")
        return numbers.view(shape)  # products of whole numbers are exact

    weight = whole(4, 3)
    try:
        with torch.inference_mode():
            return all(
                torch.equal(_by_onednn(hidden, weight, bias), hidden @ weight.T + (0 if bias is None else bias))
                for hidden in (whole(2, 3), whole(2, 5, 3))
                for bias in (None, whole(4))
            )
    except (AttributeError, RuntimeError, TypeError):  # absent, not for this processor, another signature
        return False


def _by_onednn(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")
    return product
