"""Statistics as the authors of methods published them, read as the tensors that `statistics.TENSORS` names.

kvpress looks them up by the name of a model; here a folder or a repository of the hub is named. Such files do not say
of which weights they are. Knows file formats. Does not know models.

- Q-Filters, statistics of expected attention: ``model.safetensors``.
- KVzap: ``model.safetensors`` with a module for each layer, linear or with a hidden layer.
- DuoAttention: ``full_attention_heads.tsv``, a row for each layer and a column for each key-value head, beside
  ``config.json`` with ``sink_size`` and ``recent_size``.
- LU-KV: a file ``NAME.npy``, the share to prune of each head at 1 to 99 percent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
from transformers.utils import cached_file

from lm_eval_kvpress.errors import UsageError

Arrays = dict[str, Any]

HEADS_TENSOR = "full_attention_heads"
MODEL, HEADS, CONFIG, ARRAY = "model.safetensors", f"{HEADS_TENSOR}.tsv", "config.json", ".npy"


def find(press: str, name: str) -> Path:
    """The main file of what was published under a name.

    Raises:
        UsageError: in one line, if there is none.
    """
    if press == "lukv":
        return Path(name).expanduser()
    for wanted in (HEADS, CONFIG) if press == "duo_attention" else (MODEL,):
        try:
            found = Path(str(cached_file(name, wanted)))
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UsageError(f"statistics=hub:{name}: no {wanted} is found there ({reason})") from error
    return found.with_name(HEADS) if press == "duo_attention" else found


def read(press: str, path: Path) -> tuple[dict[str, Any], str]:
    """The tensors of a published file, and the sha256 of all files that they are from.

    Raises:
        UsageError: in one line, if the files are of another form.
    """
    readers = {"duo_attention": _head_patterns, "lukv": _budget_curve, "kvzap": _surrogate}
    try:
        arrays = readers[press](path) if press in readers else None
        tensors = safetensors.torch.load_file(path) if arrays is None else _as_tensors(arrays)
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"{path} is not what was published for press={press} ({reason})") from error
    parts = [path, path.with_name(CONFIG)] if press == "duo_attention" else [path]
    return tensors, sha256_of(parts)


def _as_tensors(arrays: Arrays) -> dict[str, Any]:
    return safetensors.torch.load(
        safetensors.numpy.save({name: np.asarray(value, dtype=np.float32, order="C") for name, value in arrays.items()})
    )


def sha256_of(files: Iterable[Path]) -> str:
    """Of the bytes of files, one behind the other."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _head_patterns(path: Path) -> Arrays:
    """Scores are cut to 0..1, as DuoAttention's own code does."""
    heads = np.loadtxt(path, delimiter="\t", ndmin=2).clip(0, 1)
    config: Any = json.loads(path.with_name(CONFIG).read_text(encoding="utf-8"))
    return {HEADS_TENSOR: heads, **{name: np.array(float(config[name])) for name in ("sink_size", "recent_size")}}


def _budget_curve(path: Path) -> Arrays:
    if path.suffix != ARRAY:
        raise ValueError(f"its name does not end in {ARRAY}")
    return {"budget_curve": np.load(path, allow_pickle=False)}


def _surrogate(path: Path) -> Arrays:
    """One array for all layers out of ``layers.0.weight``, or ``layers.0.0.weight`` and ``layers.0.2.weight``."""
    tensors = safetensors.torch.load_file(path)
    num_layers = 1 + max(int(name.split(".")[1]) for name in tensors)
    if "layers.0.weight" in tensors:
        parts = {"weight": "weight", "bias": "bias"}
    else:
        parts = {"hidden_weight": "0.weight", "hidden_bias": "0.bias", "weight": "2.weight", "bias": "2.bias"}
    return {
        name: np.stack([tensors[f"layers.{layer}.{part}"].float().numpy() for layer in range(num_layers)])
        for name, part in parts.items()
    }
