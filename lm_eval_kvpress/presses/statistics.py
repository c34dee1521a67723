"""Statistics of a model, which some presses need: files of `lm-eval-kvpress calibrate`, or what kvpress published.

Tensors are in the checkpoint's own basis: the order of a head's dims as its weights have it. `models` may present the
model in another one and says so by ``head_order``. Knows files of safetensors. Does not know how statistics are taken.

Letters: L layers, H query heads, K key-value heads, D head_dim.
"""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from lm_eval_kvpress.errors import UsageError

STATISTICS = "statistics"
"""The argument that names the file."""

HUB, PUBLISHED = "hub:", "model.safetensors"
"""``statistics=hub:NAME`` is a repository of the hub, or a folder, that holds this file, as kvpress publishes it."""

TENSORS: Mapping[str, Mapping[str, str]] = types.MappingProxyType(
    {
        "qfilter": {"q_filters": "LKD"},
        "expected_attention_stats": {"query_mean": "LHD", "query_cov": "LHDD"},
    }
)
"""Press -> the tensors of its file, by the names that kvpress's published files have, and their shapes."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a file holds.

    Attributes:
        press: that reads them.
        file: as the user typed it.
        sha256: of the file.
        metadata: how they were taken: press, weights, dtype, data, tokens, versions; empty for published ones.
        tensors: by name, in the checkpoint's own basis.
    """

    press: str
    file: str
    sha256: str
    metadata: Mapping[str, str]
    tensors: Mapping[str, Any]

    def describe(self) -> dict[str, Any]:
        """For the record; JSON can hold it."""
        return {"file": self.file, "sha256": self.sha256, **self.metadata}


def read_statistics(press: str, file: str) -> Statistics:
    """Read a press's statistics; a file that did not change is read once.

    Raises:
        UsageError: in one line, if there is no such file, or it is not this press's.
    """
    path = _published(file.removeprefix(HUB)) if file.startswith(HUB) else Path(file).expanduser()
    try:
        about = path.stat()
        return _read(press, file, path, about.st_mtime_ns, about.st_size)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"statistics={file} cannot be read ({reason}): lm-eval-kvpress calibrate {press} ... -o FILE.safetensors "
            "writes one"
        ) from error


def _published(name: str) -> Path:
    try:
        found = cached_file(name, PUBLISHED)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"statistics={HUB}{name}: no {PUBLISHED} is found there ({reason})") from error
    return Path(str(found))


@functools.lru_cache(maxsize=8)
def _read(press: str, file: str, path: Path, modified_ns: int, num_bytes: int) -> Statistics:
    with safe_open(path, framework="pt") as content:
        metadata = dict(content.metadata() or {})
        if not file.startswith(HUB):
            _check_press(press, file, metadata.get("press"))
        if missing := sorted(TENSORS[press].keys() - set(content.keys())):
            raise UsageError(f"statistics={file} has no tensor {missing[0]}, which press={press} reads")
        tensors = {name: content.get_tensor(name) for name in TENSORS[press]}
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return Statistics(press, file, sha256, {} if file.startswith(HUB) else metadata, tensors)


def _check_press(press: str, file: str, made_for: str | None) -> None:
    if made_for is None:
        raise UsageError(
            f"statistics={file} does not say of which weights it is: lm-eval-kvpress calibrate {press} writes a file "
            f"that does; {HUB}NAME reads what kvpress published"
        )
    if made_for != press:
        raise UsageError(f"statistics={file} are those of press={made_for}: calibrate {press}")


def tensors_for(press: str, file: str, model: Any) -> dict[str, Any]:
    """Read a press's tensors as a presented model needs them: in the order of its heads' dims, where it computes.

    Raises:
        UsageError: in one line, also if they are those of a model of another shape.
    """
    statistics, config, order = read_statistics(press, file), model.config, getattr(model, "head_order", None)
    sizes = {
        "L": config.num_hidden_layers,
        "H": config.num_attention_heads,
        "K": config.num_key_value_heads,
        "D": config.head_dim,
    }
    found = {}
    for name, letters in TENSORS[press].items():
        tensor, expected = statistics.tensors[name], tuple(sizes[letter] for letter in letters)
        if tuple(tensor.shape) != expected:
            raise UsageError(
                f"statistics={file} are of another model: {name} has shape {tuple(tensor.shape)}, and this model needs "
                f"{expected}: calibrate this one"
            )
        for dim, letter in enumerate(letters):
            if letter == "D" and order is not None:
                tensor = tensor.index_select(dim, order.to(tensor.device))
        found[name] = tensor.to(model.device, dtype=model.dtype)
    return found
