"""Statistics of made-up models in files, for presses that read some; the same arguments give the same file."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import safetensors.torch
import torch

from lm_eval_kvpress.presses.statistics import TENSORS

FOLDER = tempfile.TemporaryDirectory(prefix="statistics")
NEOX, LLAMA = "neox", "llama"  # the tiny models of `conftest`
SIZES = {
    NEOX: {"L": 3, "H": 4, "K": 4, "D": 16, "E": 64, "P": 99},
    LLAMA: {"L": 3, "H": 4, "K": 2, "D": 16, "E": 64, "P": 99},
}
OWN = {
    "sink_size": lambda shape: torch.tensor(4.0),
    "recent_size": lambda shape: torch.tensor(8.0),
    "budget_curve": lambda shape: torch.linspace(0.01, 0.99, 99)[:, None, None].expand(shape).contiguous(),
}
"""Tensors that cannot be random."""


@functools.cache
def statistics_file(press: str, model: str) -> str:
    """The path of a file as ``lm-eval-kvpress calibrate`` writes it, with random tensors."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, letters in TENSORS[press].items():
        shape = [SIZES[model][letter] for letter in letters]
        tensor = OWN[name](shape) if name in OWN else torch.randn(shape, generator=generator)
        tensors[name] = tensor @ tensor.mT / 16 if letters.endswith("DD") else tensor
    file = Path(FOLDER.name) / f"{press}_{model}.safetensors"
    file.write_bytes(safetensors.torch.save(tensors, {"press": press}))
    return str(file)


def windows() -> list[list[int]]:
    """Windows of tokens to calibrate on."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(1, 200, (length,), generator=generator).tolist() for length in (60, 33, 90)]
