"""The table of presses: from a name to the kvpress class, and what kvpress 0.5.5 demands of whoever runs it.

Holds facts about kvpress, read off its sources and checked by ``tests/test_presses.py``; builds and parses nothing.
A row is a name, a factory and its paper; arguments and defaults are read from the factory's signature.

Source: ``kvpress/presses/*.py``; the names are those of ``evaluation/evaluate_registry.py`` in NVIDIA/kvpress.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import kvpress
from kvpress import BasePress
from transformers import PreTrainedModel


class PerLayerPress(kvpress.PerLayerCompressionPress):
    """kvpress's wrapper, which takes more ratios than there are layers and leaves the wrapped press unprepared."""

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        num_layers = model.config.num_hidden_layers
        if len(self.compression_ratios) != num_layers:
            raise ValueError(
                f"compression_ratios names {len(self.compression_ratios)} layers and the model has {num_layers}: "
                "give one ratio per layer, joined by '+'"
            )
        self.press.post_init_from_model(model)


Notes = Callable[[Mapping[str, Any], float, int, int], list[str]]
"""``(own arguments, fraction removed, context tokens, layers)`` to what a reader must know."""


def no_notes(arguments: Mapping[str, Any], removed: float, context_tokens: int, num_layers: int) -> list[str]:
    return []


@dataclass(frozen=True)
class PressEntry:
    """One press, or one wrapper around a press.

    Attributes:
        name: what a user types.
        factory: a kvpress class; called anew for every press that is built.
        paper: where the method is described.
        wraps: 0 for a press, 1 for a wrapper around one, 2 for a wrapper around several.
        windows: arguments that count tokens which are set aside before scoring: a context must be longer than their
            sum. These are the arguments that ``short_context=shrink`` shrinks.
        least: the fewest tokens it runs on, whatever the arguments.
        attention: the attention implementation it needs.
        masks: evicts by masking; the cache keeps its size.
        rerotates: moves the kept keys to positions ``0..kept-1``.
        batches: rows of a batch are compressed independently of each other.
        keys_alone: an entry's score depends on the keys only, not on their order, positions or queries, so that
            scoring a cache which another press has thinned out is sound.
        signed: scores may be negative or normalised, so that a weight above 1 does not make an entry more important.
        exact: keeps just as many tokens as are asked for.
        defaults: what replaces kvpress's own defaults, here and in a wrapped press.
        notes: what a reader of the figures must know about one context.
    """

    name: str
    factory: type[BasePress]
    paper: str
    wraps: int = 0
    windows: tuple[str, ...] = ()
    least: int = 1
    attention: str | None = None
    masks: bool = False
    rerotates: bool = False
    batches: bool | Callable[[Mapping[str, Any]], bool] = True
    keys_alone: bool = False
    signed: bool = False
    exact: bool = True
    defaults: Mapping[str, Any] = field(default_factory=dict)
    notes: Notes = no_notes


WINDOW_IS_CUT = "fewer tokens kept than the window or sinks that the press protects: which of them stay is arbitrary"
PYRAMID_TOO_SMALL = "pyramidkv fell back to snapkv (smallest layer budget below window_size)"
PYRAMID_INVERTED = "pyramidkv fell back to snapkv (smallest layer budget above the largest: too little is removed)"
LAG_IS_WINDOW = "lagkv kept the sinks and the last tokens (context below n_sink + 2 * lag_size)"
LAZY_NEVER = "simlayerkv kept everything (lazy_threshold=1)"
LAZY_SHORT = "simlayerkv kept everything (context not longer than n_initial + n_recent + n_last)"
CHANNELS_ONLY = "think zeroes key channels: no token is removed and no byte saved"
WHOLE_CHUNKS = "whole chunks are kept, so the kept share differs from the one asked for"
KEEPS_ALL_SHORT = "the kept tokens fill the context: nothing was removed"


def _pyramid_notes(arguments: Mapping[str, Any], removed: float, context_tokens: int, num_layers: int) -> list[str]:
    """The conditions under which ``PyramidKVPress.get_layer_budget`` gives up its pyramid without a word."""
    if removed == 0:
        return []
    window = arguments["window_size"]
    # The upstream order of operations: adding and subtracting the window decides ties in floating point.
    share = (window + context_tokens * (1 - removed)) - window
    smallest = share / arguments["beta"]
    largest = share * 2 - smallest
    if largest >= context_tokens - window:
        largest = context_tokens - window
        smallest = share * 2 - largest
    if smallest < window:
        return [PYRAMID_TOO_SMALL]
    return [PYRAMID_INVERTED] if largest < smallest else []


def _lag_notes(arguments: Mapping[str, Any], removed: float, context_tokens: int, num_layers: int) -> list[str]:
    if removed == 0:
        return []
    n_sink, lag_size = arguments["n_sink"], arguments["lag_size"]
    if context_tokens < n_sink + 2 * lag_size:
        return [LAG_IS_WINDOW]
    num_protected = n_sink + lag_size + (context_tokens - n_sink) % lag_size
    return [WINDOW_IS_CUT] if n_kept(context_tokens, removed) < num_protected else []


def _lazy_notes(arguments: Mapping[str, Any], removed: float, context_tokens: int, num_layers: int) -> list[str]:
    if arguments["lazy_threshold"] == 1:
        return [LAZY_NEVER]
    least = arguments["n_initial"] + arguments["n_recent"] + arguments["n_last"]
    return [LAZY_SHORT] if context_tokens <= least else []


def n_kept(context_tokens: int, removed: float) -> int:
    """Tokens that kvpress keeps: its own rounding, after which 0.9 of 100 leaves 9."""
    return max(1, int(context_tokens * (1 - removed)))


_COMPACTOR = "https://arxiv.org/abs/2507.08143"
_CRITICAL = "https://arxiv.org/abs/2502.03805"
_CHUNKKV = "https://arxiv.org/abs/2502.00299"

PRESSES = (
    PressEntry("knorm", kvpress.KnormPress, "https://arxiv.org/abs/2406.11430", keys_alone=True, signed=True),
    PressEntry("random", kvpress.RandomPress, "", batches=False, keys_alone=True),
    PressEntry("streaming_llm", kvpress.StreamingLLMPress, "https://arxiv.org/abs/2309.17453", windows=("n_sink",)),
    PressEntry("snapkv", kvpress.SnapKVPress, "https://arxiv.org/abs/2404.14469", windows=("window_size",)),
    PressEntry(
        "pyramidkv",
        kvpress.PyramidKVPress,
        "https://arxiv.org/abs/2406.02069",
        windows=("window_size",),
        exact=False,
        notes=_pyramid_notes,
    ),
    PressEntry("tova", kvpress.TOVAPress, "https://arxiv.org/abs/2401.06104", least=2),
    PressEntry(
        "expected_attention",
        kvpress.ExpectedAttentionPress,
        "https://arxiv.org/abs/2510.00636",
        windows=("n_sink",),
    ),
    PressEntry(
        "observed_attention", kvpress.ObservedAttentionPress, "https://arxiv.org/abs/2306.14048", attention="eager"
    ),
    PressEntry("keydiff", kvpress.KeyDiffPress, "https://arxiv.org/abs/2504.15364", keys_alone=True, signed=True),
    PressEntry("lagkv", kvpress.LagKVPress, "https://arxiv.org/abs/2504.04704", notes=_lag_notes),
    PressEntry("leverage", kvpress.LeverageScorePress, _COMPACTOR, batches=False, signed=True),
    PressEntry("non_causal_attention", kvpress.NonCausalAttnPress, _COMPACTOR, batches=False, signed=True),
    PressEntry(
        "compactor",
        kvpress.CompactorPress,
        _COMPACTOR,
        windows=("sink_size_start", "sink_size_end"),
        batches=False,
        signed=True,
    ),
    PressEntry(
        "cur",
        kvpress.CURPress,
        "https://arxiv.org/abs/2509.15038",
        batches=lambda arguments: not arguments["use_random_leverage"],
    ),
    PressEntry(
        "think",
        kvpress.ThinKPress,
        "https://arxiv.org/abs/2407.21018",
        keys_alone=True,
        defaults={"key_channel_compression_ratio": 0.5},
        notes=lambda *_: [CHANNELS_ONLY],
    ),
    PressEntry(
        "simlayerkv", kvpress.SimLayerKVPress, "https://arxiv.org/abs/2410.13846", batches=False, notes=_lazy_notes
    ),
    PressEntry("adakv", kvpress.AdaKVPress, "https://arxiv.org/abs/2407.11550", wraps=1, attention="sdpa", masks=True),
    PressEntry("criticalkv", kvpress.CriticalKVPress, _CRITICAL, wraps=1, defaults={"use_vnorm": False}),
    PressEntry("key_rerotation", kvpress.KeyRerotationPress, "", wraps=1, rerotates=True),
    PressEntry("merging", kvpress.MergingPress, "https://arxiv.org/abs/2210.09461", wraps=1),
    PressEntry(
        "chunkkv",
        kvpress.ChunkKVPress,
        _CHUNKKV,
        wraps=1,
        attention="sdpa",
        batches=False,
        exact=False,
        notes=lambda *_: [WHOLE_CHUNKS],
    ),
    PressEntry(
        "entropy_gated_chunkkv",
        kvpress.EntropyGatedChunkKVPress,
        _CHUNKKV,
        wraps=1,
        attention="sdpa",
        batches=False,
    ),
    PressEntry(
        "chunk",
        kvpress.ChunkPress,
        "https://direct.mit.edu/tacl/article/doi/10.1162/tacl_a_00716/125280",
        wraps=1,
        attention="sdpa",
        exact=False,
    ),
    PressEntry("block", kvpress.BlockPress, "https://arxiv.org/abs/2504.15364", wraps=1, attention="sdpa"),
    PressEntry("per_layer", PerLayerPress, "", wraps=1),
    PressEntry("composed", kvpress.ComposedPress, "", wraps=2),
)

CATALOG: Mapping[str, PressEntry] = {entry.name: entry for entry in PRESSES}

ALIASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "no_press": ("none", {}),
    "adakv_snapkv": ("adakv:snapkv", {}),
    "adakv_compactor": ("adakv:compactor", {}),
    "block_keydiff": ("block:keydiff", {}),
    "critical_snapkv": ("criticalkv:snapkv", {}),
    "critical_expected_attention": ("criticalkv:expected_attention", {}),
    "snap_think": ("composed:snapkv+think", {}),
    "merging_knorm": ("merging:knorm", {}),
    "merging_snapkv": ("merging:snapkv", {}),
    "merging_expected_attention": ("merging:expected_attention", {"epsilon": 0.01}),
}
"""Names of kvpress's evaluation for what is spelt out here, with the arguments that it presets."""

_TRAINED = "needs a file trained for each model"
_DECODING = "compresses during decoding, which is not supported yet"
_TOKENIZER = "loads a tokenizer by the model's name to replay the context"

UNSUPPORTED: Mapping[str, tuple[str, str]] = {
    "qfilter": (f"{_TRAINED} (Q-filters)", "https://arxiv.org/abs/2503.02812"),
    "duo_attention": (f"{_TRAINED} (attention patterns)", "https://arxiv.org/abs/2410.10819"),
    "duo_attention_on_the_fly": (
        "measures attention patterns on texts of its own that it downloads",
        "https://arxiv.org/abs/2410.10819",
    ),
    "kvzap": (f"{_TRAINED} (KVzap surrogate)", "https://arxiv.org/abs/2601.07891"),
    "fastkvzip": (f"{_TRAINED} (gates)", "https://arxiv.org/abs/2601.17668"),
    "restorekv": (f"{_TRAINED} (restoration weights)", "https://arxiv.org/abs/2608.01247"),
    "expected_attention_stats": (f"{_TRAINED} (query statistics)", "https://arxiv.org/abs/2510.00636"),
    "lukv": (f"{_TRAINED} (head budgets)", "https://arxiv.org/abs/2602.08585"),
    "finch": ("needs a delimiter token between context and question", ""),
    "kvzip": (_TOKENIZER, "https://arxiv.org/abs/2505.23416"),
    "kvzip_plus": (_TOKENIZER, "https://arxiv.org/abs/2505.23416"),
    "kvgrad": (_TOKENIZER, "https://openreview.net/forum?id=cg1wTCJjjk"),
    "kvcompose": ("replaces the model's forward to run the context twice", "https://arxiv.org/abs/2509.05165"),
    "dms": ("evicts by a score threshold and may evict while decoding", "https://arxiv.org/abs/2506.05345"),
    "critical_adakv": ("adds the head budgets of all rows of a batch", _CRITICAL),
    "cam": (_DECODING, "https://openreview.net/forum?id=LCTmppB165"),
    "decoding": (_DECODING, ""),
    "prefill_decoding": (_DECODING, ""),
}
"""Name -> why it cannot run here, and its paper."""
