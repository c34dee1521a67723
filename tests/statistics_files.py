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
SIZES = {NEOX: {"L": 3, "H": 4, "K": 4, "D": 16}, LLAMA: {"L": 3, "H": 4, "K": 2, "D": 16}}


@functools.cache
def statistics_file(press: str, model: str) -> str:
    """The path of a file as ``lm-eval-kvpress calibrate`` writes it, with random tensors."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, letters in TENSORS[press].items():
        tensor = torch.randn([SIZES[model][letter] for letter in letters], generator=generator)
        tensors[name] = tensor @ tensor.mT / 16 if letters.endswith("DD") else tensor
    file = Path(FOLDER.name) / f"{press}_{model}.safetensors"
    file.write_bytes(safetensors.torch.save(tensors, {"press": press}))
    return str(file)
