"""Statistics of a model, which some presses need: files of `lm-eval-kvpress calibrate`, or what kvpress published.

Tensors are in the checkpoint's own basis: the order of a head's dims as its weights have it. `models` may present the
model in another one and says so by ``head_order``. Knows files of safetensors. Does not know how statistics are taken.

Letters: L layers, H query heads, K key-value heads, D head_dim, E hidden size, P whole percents from 1 to 99, M hidden
units of a surrogate.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.presses import published

STATISTICS = "statistics"
"""The argument that names the file."""

HUB = "hub:"
"""``statistics=hub:NAME`` is a repository of the hub, or a folder, with the files that a method's authors published."""

TENSORS: Mapping[str, Mapping[str, str]] = types.MappingProxyType(
    {
        "qfilter": {"q_filters": "LKD"},
        "expected_attention_stats": {"query_mean": "LHD", "query_cov": "LHDD"},
        "duo_attention": {"full_attention_heads": "LK", "sink_size": "", "recent_size": ""},
        "kvzap": {"weight": "LKE", "bias": "LK"},
        "lukv": {"budget_curve": "PLK"},
    }
)
"""Press -> the tensors of its file, by the names that kvpress's published files have, and their shapes."""

MLP: Mapping[str, str] = types.MappingProxyType(
    {"hidden_weight": "LME", "hidden_bias": "LM", "weight": "LKM", "bias": "LK"}
)
"""The tensors of a published surrogate of ``kvzap`` with a hidden layer."""

NUM_PERCENTS = 99


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
    path = published.find(press, file.removeprefix(HUB)) if file.startswith(HUB) else Path(file).expanduser()
    try:
        about = path.stat()
        return _read(press, file, path, about.st_mtime_ns, about.st_size)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"statistics={file} cannot be read ({reason}): lm-eval-kvpress calibrate {press} ... -o FILE.safetensors "
            "writes one"
        ) from error


@functools.lru_cache(maxsize=8)
def _read(press: str, file: str, path: Path, modified_ns: int, num_bytes: int) -> Statistics:
    if file.startswith(HUB):
        tensors, sha256 = published.read(press, path)
        return Statistics(press, file, sha256, {}, _named(press, file, tensors))
    with safe_open(path, framework="pt") as content:
        metadata = dict(content.metadata() or {})
        _check_press(press, file, metadata.get("press"))
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118, it is no mapping
    return Statistics(press, file, published.sha256_of([path]), metadata, _named(press, file, tensors))


def layout_of(press: str, tensors: Container[str]) -> Mapping[str, str]:
    """The names and shapes of a press's tensors: of the kind that a file with these holds."""
    return MLP if press == "kvzap" and "hidden_weight" in tensors else TENSORS[press]


def _named(press: str, file: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    layout = layout_of(press, tensors)
    if missing := sorted(layout.keys() - tensors.keys()):
        raise UsageError(f"statistics={file} has no tensor {missing[0]}, which press={press} reads")
    return {name: tensors[name] for name in layout}


def _check_press(press: str, file: str, made_for: str | None) -> None:
    if made_for is None:
        raise UsageError(
            f"statistics={file} does not say of which weights it is: lm-eval-kvpress calibrate {press} writes a file "
            f"that does; {HUB}NAME reads what kvpress published"
        )
    if made_for.partition(":")[0] != press:
        raise UsageError(f"statistics={file} are those of press={made_for}: calibrate {press}")


def tensors_for(press: str, file: str, model: Any, *, in_float32: bool = False) -> dict[str, Any]:
    """Read a press's tensors as a presented model needs them: in the order of its heads' dims, where it computes.

    Args:
        in_float32: whether they are in float32, whatever the model computes in.

    Raises:
        UsageError: in one line, also if they are those of a model of another shape.
    """
    statistics, config, order = read_statistics(press, file), model.config, getattr(model, "head_order", None)
    sizes = {
        "L": config.num_hidden_layers,
        "H": config.num_attention_heads,
        "K": config.num_key_value_heads,
        "D": config.head_dim,
        "E": config.hidden_size,
        "P": NUM_PERCENTS,
        "M": statistics.tensors["hidden_bias"].shape[-1] if "hidden_bias" in statistics.tensors else 0,
    }
    found = {}
    for name, letters in layout_of(press, statistics.tensors).items():
        tensor, expected = statistics.tensors[name], tuple(sizes[letter] for letter in letters)
        if tuple(tensor.shape) != expected:
            raise UsageError(
                f"statistics={file} are of another model: {name} has shape {tuple(tensor.shape)}, and this model needs "
                f"{expected}: calibrate this one"
            )
        for dim, letter in enumerate(letters):
            if letter == "D" and order is not None:
                tensor = tensor.index_select(dim, order.to(tensor.device))
        found[name] = tensor.to(model.device).float() if in_float32 else tensor.to(model.device, dtype=model.dtype)
    return found
