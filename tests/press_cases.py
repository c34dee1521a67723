"""Every press with arguments that suit some hundred tokens, and what it keeps of them; models that it fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from statistics_files import LLAMA, NEOX, statistics_file

from lm_eval_kvpress.cache.compressed import CompressedCache
from lm_eval_kvpress.engine.prefill import prefill
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.parse import parse_press
from lm_eval_kvpress.presses.spec import PressSpec
from lm_eval_kvpress.presses.statistics import TENSORS

Kept = Callable[[int, float, Mapping[str, Any]], list[float]]
NUM_LAYERS = 3
RATIOS = (0.1, 0.5, 0.9)


# --------------------------------------------------------------------------------------- what each press should keep


def exact(length: int, ratio: float, arguments: Mapping[str, Any]) -> list[float]:
    """``ScorerPress``: rounded down, at least one."""
    return [max(1, int(length * (1 - ratio)))] * NUM_LAYERS


def everything(length: int, ratio: float, arguments: Mapping[str, Any]) -> list[float]:
    return [length] * NUM_LAYERS


def pyramid(length: int, ratio: float, arguments: Mapping[str, Any]) -> list[float]:
    """A straight line around the mean, from the highest layer's ``mean / beta`` (arXiv 2406.02069); else SnapKV."""
    mean, window = length * (1 - ratio), arguments["window_size"]
    smallest = mean / arguments["beta"]
    largest = min(2 * mean - smallest, length - window)
    smallest = 2 * mean - largest
    if not largest >= smallest >= window:
        return [max(1, round(mean))] * NUM_LAYERS
    return [round(largest - layer * (largest - smallest) / (NUM_LAYERS - 1)) for layer in range(NUM_LAYERS)]


def chunks(length: int, ratio: float, arguments: Mapping[str, Any]) -> list[float]:
    """Every chunk rounds by itself."""
    size = arguments["chunk_length"]
    lengths = [min(size, length - start) for start in range(0, length, size)]
    return [sum(max(1, int(part * (1 - ratio))) for part in lengths)] * NUM_LAYERS


def per_layer(length: int, ratio: float, arguments: Mapping[str, Any]) -> list[float]:
    return [max(1, int(length * (1 - own))) for own in arguments["compression_ratios"]]


def lazy(length: int, ratio: float, arguments: Mapping[str, Any]) -> list[float]:
    """At threshold 0 every layer is lazy: sinks and recent tokens, less the ``n_last`` that kvpress cuts off."""
    return [arguments["n_initial"] + arguments["n_recent"] - arguments["n_last"]] * NUM_LAYERS


# Names with arguments that suit contexts of some hundred tokens, and what is kept of them; None where the text decides.
PRESSES: dict[str, tuple[dict[str, Any], Kept | None]] = {
    "snapkv": ({"window_size": 8}, exact),
    "streaming_llm": ({}, exact),
    "pyramidkv": ({"window_size": 4, "beta": 3}, pyramid),
    "knorm": ({}, exact),
    "random": ({}, exact),
    "tova": ({}, exact),
    "expected_attention": ({}, exact),
    "observed_attention": ({}, exact),
    "keydiff": ({}, exact),
    "lagkv": ({"lag_size": 16}, exact),
    "leverage": ({}, exact),
    "noncausal": ({"chunk_size": 32}, exact),
    "compactor": ({"sink_size_start": 4, "chunk_size": 32}, exact),
    "cur": ({}, exact),
    "finch": ({}, exact),
    "cap": ({}, exact),
    "qfilter": ({"statistics": statistics_file("qfilter", NEOX)}, exact),
    "expected_attention_stats": ({"statistics": statistics_file("expected_attention_stats", NEOX)}, exact),
    "kvzap": ({"statistics": statistics_file("kvzap", LLAMA)}, exact),
    "duo_attention": ({"statistics": statistics_file("duo_attention", NEOX)}, None),
    "lukv:snapkv": ({"statistics": statistics_file("lukv", NEOX), "window_size": 8}, None),
    "rkv": ({}, exact),
    "kvzip": ({"chunk_size": 40}, None),
    "kvgrad": ({"chunk_size": 40}, None),
    "kvcompose": ({}, None),
    "kvcompose_unstructured": ({}, None),
    "think": ({"window_size": 8}, everything),
    "simlayerkv": ({"lazy_threshold": 0, "n_recent": 20, "n_initial": 3, "n_last": 2}, lazy),
    "adakv:snapkv": ({"window_size": 8}, exact),
    "adakv:knorm": ({}, exact),
    "adakv:qfilter": ({"statistics": statistics_file("qfilter", LLAMA)}, exact),
    "critical_adakv:snapkv": ({"window_size": 8}, exact),
    "critical_adakv:expected_attention": ({}, exact),
    "criticalkv:snapkv": ({"window_size": 8}, exact),
    "criticalkv:expected_attention": ({}, exact),
    "criticalkv:expected_attention_stats": (
        {"statistics": statistics_file("expected_attention_stats", LLAMA)},
        exact,
    ),
    "criticalkv:observed_attention": ({}, exact),
    "key_rerotation:streaming_llm": ({}, exact),
    "key_rerotation:criticalkv:tova": ({}, exact),
    "key_rerotation:observed_attention": ({}, exact),
    "merging:knorm": ({}, exact),
    "merging:snapkv": ({"window_size": 8, "merge_fraction": 0.75}, exact),
    "chunkkv:snapkv": ({"window_size": 8}, None),
    "chunkkv:knorm": ({}, None),
    "entropy_gated_chunkkv:snapkv": ({"window_size": 8}, exact),
    "entropy_gated_chunkkv:keydiff": ({}, exact),
    "chunk:knorm": ({"chunk_length": 32}, chunks),
    "chunk:cur": ({"chunk_length": 33}, chunks),
    "block:keydiff": ({"block_size": 16}, exact),
    "block:knorm": ({}, exact),
    "per_layer:knorm": ({"compression_ratios": "0.1+0.5+0.9"}, per_layer),
    "per_layer:snapkv": ({"compression_ratios": [0, 0.25, 0.5], "window_size": 8}, per_layer),
    "dms:knorm": ({"threshold": -3.0, "sliding_window_size": 16}, None),
    "dms:kvzap": (
        {"statistics": statistics_file("kvzap", NEOX), "threshold": 0.5, "sliding_window_size": 16},
        None,
    ),
    "dms:random": ({"threshold": 0.5, "sliding_window_size": 16}, None),
    "composed:snapkv+think": ({"snapkv.window_size": 8, "think.window_size": 8}, exact),
    "composed:think+knorm": ({}, exact),
    "composed:chunkkv:snapkv+think": ({"snapkv.window_size": 8}, None),
}


def spec_for(name: str, **more: Any) -> PressSpec:
    """The press; one that reads questions takes the last eight tokens for one."""
    return parse_press(name, {**PRESSES[name][0], **more}).for_question(8)


def takes_ratio(name: str) -> bool:
    return "compression_ratio" in spec_for(name).arguments


def fitting(models: dict[str, PressableModel], spec: PressSpec) -> Iterator[tuple[str, PressableModel]]:
    for name, model in models.items():
        if spec.attn_implementation in (None, name.split()[1]) and has_statistics_of(spec, model):
            yield name, model


def one_of_each(models: dict[str, PressableModel], spec: PressSpec, turn: int) -> Iterator[tuple[str, PressableModel]]:
    """A GPTNeoX and a Llama that the press fits: one under sdpa and one under eager attention, by turns."""
    attentions = ("sdpa", "eager") if turn % 2 == 0 else ("eager", "sdpa")
    for architecture, attention in zip(("neox", "llama"), attentions, strict=True):
        name = f"{architecture} {spec.attn_implementation or attention}"
        if has_statistics_of(spec, models[name]):
            yield name, models[name]


def has_statistics_of(spec: PressSpec, model: PressableModel) -> bool:
    """Whether the press needs none, or has those of a model of this shape."""
    statistics = spec.statistics
    if statistics is None:
        return True
    config = model.model.config
    kv_heads, head_dim = model.num_key_value_heads, model.head_dim
    sizes = {
        **{"L": config.num_hidden_layers, "H": config.num_attention_heads, "K": kv_heads, "D": head_dim},
        **{"E": config.hidden_size, "P": 99},
    }
    return all(
        tuple(statistics.tensors[name].shape) == tuple(sizes[letter] for letter in letters)
        for name, letters in TENSORS[statistics.press].items()
    )


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, 200, (batch, length), generator=torch.Generator().manual_seed(length))


def run(model: PressableModel, spec: PressSpec, context: torch.Tensor, *, shrink: bool = False) -> CompressedCache:
    press = spec.build(context.shape[1], shrink=shrink)
    with torch.random.fork_rng([]):
        torch.manual_seed(7)
        return prefill(model, context, press, rerotates=spec.rerotates)
