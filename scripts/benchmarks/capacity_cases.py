"""Ways to hold a cache, and what fits beside a model's weights, by the reckoning of `engine.footprint`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import AutoConfig, PretrainedConfig

from lm_eval_kvpress.cache.quantized import Quantization
from lm_eval_kvpress.engine.batch_size import kept_share
from lm_eval_kvpress.engine.footprint import ACTIVATIONS_PER_TOKEN, CPU_ACTIVATIONS_PER_TOKEN, Footprint
from lm_eval_kvpress.presses.parse import parse_press
from lm_eval_kvpress.presses.spec import PressSpec
from scripts.benchmarks.models import BUILTIN, SHAPES

LONGEST = 2**22


@dataclass(frozen=True)
class Case:
    """One way to hold a cache.

    Attributes:
        press, ratio: the fraction removed; 0 for ``none``.
        kv_quant: ``none``, or how entries are packed, in groups of 64.
    """

    press: str
    ratio: float
    kv_quant: str

    @property
    def quantization(self) -> Quantization | None:
        return None if self.kv_quant == "none" else Quantization(self.kv_quant)

    @property
    def spec(self) -> PressSpec:
        return parse_press(self.press, {"compression_ratio": self.ratio} if self.press != "none" else {})

    @property
    def cells(self) -> list[str]:
        """Of a table's row."""
        return [self.press, f"{self.ratio:g}", self.kv_quant]

    def footprint(self, config: PretrainedConfig, dtype: torch.dtype, device: str) -> Footprint:
        """Bytes per token of context, on a kind of device."""
        share = kept_share(self.spec, config)
        activations = CPU_ACTIVATIONS_PER_TOKEN if device == "cpu" else ACTIVATIONS_PER_TOKEN
        return Footprint.of(config, dtype, share=share, quantization=self.quantization, activations=activations)


@dataclass(frozen=True)
class Room:
    """What is left of a budget beside the weights, for texts of so many new tokens per context.

    Attributes:
        in_turn: whether contexts are prefilled one after the other.
    """

    num_bytes: float
    num_new: int
    in_turn: bool = False

    def takes(self, footprint: Footprint, num_rows: int, num_tokens: int) -> bool:
        """Whether a batch can be prefilled, and then decoded."""
        total = num_rows * num_tokens
        peak = footprint.batch_bytes(total, 2, num_tokens if self.in_turn else total)
        return peak + num_rows * self.num_new * footprint.cache_bytes <= self.num_bytes

    def largest_batch(self, footprint: Footprint, num_tokens: int) -> int:
        """Rows that fit."""
        return _most(lambda rows: self.takes(footprint, rows, num_tokens))

    def longest_context(self, footprint: Footprint, num_rows: int) -> int:
        """Tokens of context that fit, trained positions apart."""
        return _most(lambda tokens: self.takes(footprint, num_rows, tokens))


def _most(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, by bisection; 0 if none does."""
    low, high = 0, LONGEST
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def cases_of(presses: Sequence[str], ratios: Sequence[float], kv_quants: Sequence[str]) -> list[Case]:
    """Every press at every ratio, and ``none`` once, under every quantization."""
    sizes = [(press, ratio) for press in presses for ratio in ((0.0,) if press == "none" else ratios)]
    return [Case(press, ratio, kv_quant) for press, ratio in sizes for kv_quant in kv_quants]


def config_of(shape: str) -> PretrainedConfig:
    return AutoConfig.from_pretrained(BUILTIN) if shape == "builtin" else SHAPES[shape].config()


def weight_bytes(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Of a model that is never filled with numbers."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
