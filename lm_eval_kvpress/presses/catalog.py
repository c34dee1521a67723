"""The table of presses: each name's kvpress class, what its scores read, what it needs, and its paper.

Rows are facts read off kvpress 0.5.5, each checked by a test that runs the press. Arguments and defaults are not
written here: `arguments` reads them off the class. Knows kvpress's press classes; does not know models or how a press
name is put together (`names`).

Names are those of kvpress's own evaluation (``evaluation/evaluate_registry.py``), with one exception: there
``expected_attention`` means AdaKV over expected attention with ``epsilon=0.01``; here it is the press of that name.
"""

from __future__ import annotations

import enum
import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import kvpress

from lm_eval_kvpress.presses import fallbacks, kvcompose, notes
from lm_eval_kvpress.presses.calibrated import (
    CalibratedDuoAttentionPress,
    CalibratedExpectedAttentionPress,
    CalibratedKVzapPress,
    CalibratedLUKVPress,
    CalibratedQFilterPress,
)
from lm_eval_kvpress.presses.finch import QuestionFinchPress
from lm_eval_kvpress.presses.kvcompose import ReplayedKVComposePress, UnstructuredKVComposePress
from lm_eval_kvpress.presses.kvgrad import ReplayedKVgradPress
from lm_eval_kvpress.presses.notes import Notes
from lm_eval_kvpress.presses.per_layer import PerLayerPress
from lm_eval_kvpress.presses.replay import ReplayedKVzipPress
from lm_eval_kvpress.presses.rkv import RKVPress

REQUIRED = "required"
"""In place of a default: the argument has none, or one with which the press would do nothing."""


class Reads(enum.IntEnum):
    """What a press's score of a token depends on; each includes those before it."""

    ENTRIES = 0  # keys and values as a set: the score survives any reordering or cutting
    ORDER = 1  # keys, values or hidden states in their order
    QUERIES = 2  # queries at their positions: wrong on a part of the context, for kvpress slices no position embeddings
    ATTENTIONS = 3  # the attention weights of the forward, which only eager attention returns


@dataclass(frozen=True, eq=False)
class Row:
    """What is known about one press.

    Attributes:
        name: as the user types it.
        factory: the kvpress class.
        paper: where the method is described.
        reads: what its scores depend on.
        protects: the arguments that count tokens which are always kept. kvpress asserts that the context is longer
            than their sum; presses without a ratio remove nothing from a shorter one.
        min_context: least tokens of context, where `protects` does not ask for more.
        attention: the attention implementation that it needs, or None.
        masks: whether it hides entries head by head and leaves the cache as long as it was.
        rerotates: whether kept keys move to positions ``0..kept-1``.
        rerotates_if: an argument that, when false, makes it leave them where they were.
        reads_question: whether its ``window_size`` is the question's length in each prompt, which is compressed with
            the context.
        batches: whether equally long contexts may share a prefill: False where kvpress decides for the whole batch
            by its first row or its mean, or draws random numbers.
        batches_unless: an argument that, when true, makes it draw random numbers.
        removes_tokens: False for a press that keeps every token.
        no_ratio: why it takes no ``compression_ratio``, and what to use instead; empty where it takes one.
        no_budget: why it cannot keep exactly ``kv_budget`` tokens, likewise.
        defaults: defaults other than kvpress's, for its own arguments and those of the press that it wraps: kvpress's
            would compress nothing, or kvpress itself advises against them.
        hidden: arguments of the class that are not offered.
        wraps: for a wrapper, the most that the wrapped press's scores may read; None for others.
        refuses: presses that a wrapper cannot wrap, itself or in another wrapper, although kvpress would let it, and
            why.
        check: says what is wrong with the arguments as a whole, where kvpress asserts nothing; empty if nothing is.
        changes: what it does to entries that it does not remove, from its arguments; empty if nothing. Only for a
            press that removes none: what it keeps says nothing about whether it acted.
        notes: what a reader of the figures must know at a given length of context.
    """

    name: str
    factory: type[kvpress.BasePress]
    paper: str = ""
    reads: Reads = Reads.ENTRIES
    protects: tuple[str, ...] = ()
    min_context: int = 2
    attention: str | None = None
    masks: bool = False
    rerotates: bool = False
    rerotates_if: str = ""
    reads_question: bool = False
    batches: bool = True
    batches_unless: str = ""
    removes_tokens: bool = True
    no_ratio: str = ""
    no_budget: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    hidden: tuple[str, ...] = ()
    wraps: Reads | None = None
    refuses: Mapping[str, str] = field(default_factory=dict)
    check: Callable[[Mapping[str, Any]], str] | None = None
    changes: Callable[[Mapping[str, Any]], str] | None = None
    notes: Notes | None = None

    @property
    def scores(self) -> bool:
        """Whether it scores tokens and leaves their count to ``ScorerPress``, so that a wrapper loses nothing of it."""
        factory = self.factory
        return issubclass(factory, kvpress.ScorerPress) and factory.compress is kvpress.ScorerPress.compress

    @property
    def is_hook(self) -> bool:
        """Whether it acts by nothing but a hook after each layer's attention; others replay the context."""
        return self.factory.__call__ is kvpress.BasePress.__call__

    @property
    def takes_ratio(self) -> bool:
        """Whether its class takes the ratio; wrappers pass it on to the press that they wrap."""
        return "compression_ratio" in inspect.signature(self.factory).parameters


def _check_simlayerkv(arguments: Mapping[str, Any]) -> str:
    """kvpress keeps the last ``n_recent - n_last`` tokens by a negative slice, which at 0 keeps all of them."""
    n_recent, n_last = arguments["n_recent"], arguments["n_last"]
    return "" if n_recent > n_last else f"n_recent={n_recent} must exceed n_last={n_last}"


# CriticalKV multiplies scores by the size of what a value adds to the output: of negative scores, that would evict
# the weightiest first.
_NO_CRITICAL: Mapping[str, str] = {
    "criticalkv": "the weighting by the output projection would be applied twice",
    **dict.fromkeys(
        ("knorm", "keydiff", "leverage", "noncausal", "compactor", "qfilter", "kvzap", "rkv"),
        "it multiplies scores, which must not be negative: wrap snapkv, tova or expected_attention",
    ),
}
_SHARED = "its heads and layers share what is kept: use compression_ratio"
# StreamingLLM scores a token 1 or 0, by whether it stays at one ratio; a wrapper that keeps another number chooses
# among equal scores.
_NO_CHUNK_MEANS: Mapping[str, str] = {
    "streaming_llm": "chunks stay by their mean score, that of the sinks' chunk is the least above zero, and the sinks "
    "would go: use streaming_llm itself",
    "criticalkv": "its first stage sets scores to the largest number, so that the sums of nearly all chunks are "
    "infinite and none stays by its score: wrap the press itself",
}
_NO_VNORM = {"use_vnorm": False}  # kvpress: "use_vnorm should be disabled for CriticalKVPress"

_ROWS = (
    Row("snapkv", kvpress.SnapKVPress, "https://arxiv.org/abs/2404.14469", Reads.QUERIES, ("window_size",)),
    Row("streaming_llm", kvpress.StreamingLLMPress, "https://arxiv.org/abs/2309.17453", Reads.ORDER, ("n_sink",)),
    Row(
        "pyramidkv",
        kvpress.PyramidKVPress,
        "https://arxiv.org/abs/2406.02069",
        Reads.QUERIES,
        ("window_size",),
        notes=fallbacks.pyramidkv,
    ),
    Row("knorm", kvpress.KnormPress, "https://arxiv.org/abs/2406.11430"),
    Row("random", kvpress.RandomPress, batches=False, notes=notes.random),
    Row("tova", kvpress.TOVAPress, "https://arxiv.org/abs/2401.06104", Reads.QUERIES),
    Row(
        "expected_attention",
        kvpress.ExpectedAttentionPress,
        "https://arxiv.org/abs/2510.00636",
        Reads.QUERIES,
        ("n_sink",),
    ),
    Row(
        "observed_attention",
        kvpress.ObservedAttentionPress,
        "https://arxiv.org/abs/2306.14048",
        Reads.ATTENTIONS,
        attention="eager",
    ),
    Row("keydiff", kvpress.KeyDiffPress, "https://arxiv.org/abs/2504.15364"),
    Row("lagkv", kvpress.LagKVPress, "https://arxiv.org/abs/2504.04704", Reads.ORDER, notes=fallbacks.lagkv),
    Row("leverage", kvpress.LeverageScorePress, "https://arxiv.org/abs/2507.08143", Reads.ORDER, batches=False),
    Row("noncausal", kvpress.NonCausalAttnPress, "https://arxiv.org/abs/2507.08143", Reads.QUERIES, batches=False),
    Row(
        "compactor",
        kvpress.CompactorPress,
        "https://arxiv.org/abs/2507.08143",
        Reads.QUERIES,
        ("sink_size_start", "sink_size_end"),
        batches=False,
    ),
    Row("cur", kvpress.CURPress, "https://arxiv.org/abs/2509.15038", Reads.ORDER, batches_unless="use_random_leverage"),
    Row(
        "finch",
        QuestionFinchPress,
        "https://doi.org/10.1162/tacl_a_00716",
        Reads.QUERIES,
        ("window_size",),
        rerotates=True,
        rerotates_if="rerotate_keys",
        reads_question=True,
        hidden=("window_size", "chunk_length"),  # chunks could fail on, or lose, a long question in the middle of a run
    ),
    Row("cap", kvpress.CapPress, "https://arxiv.org/abs/2604.25975", Reads.QUERIES, ("n_sink",)),
    Row(
        "qfilter",
        CalibratedQFilterPress,
        "https://arxiv.org/abs/2503.02812",
        defaults={"statistics": REQUIRED},
    ),
    Row(
        "expected_attention_stats",
        CalibratedExpectedAttentionPress,
        "https://arxiv.org/abs/2510.00636",
        Reads.QUERIES,
        ("n_sink",),
        defaults={"statistics": REQUIRED},
        hidden=("sample_seq_len", "num_samples", "dataset_name", "stats_folder"),
    ),
    Row("rkv", RKVPress, "https://arxiv.org/abs/2505.24133", Reads.QUERIES, ("window_size",)),
    Row(
        "kvzap",
        CalibratedKVzapPress,
        "https://arxiv.org/abs/2601.07891",
        Reads.ORDER,
        defaults={"statistics": REQUIRED},
        hidden=("model_type",),  # the file says it
    ),
    Row(
        "duo_attention",
        CalibratedDuoAttentionPress,
        "https://arxiv.org/abs/2410.10819",
        attention="sdpa",
        masks=True,
        no_ratio="it cuts a share of the heads to first and newest tokens: use head_compression_ratio",
        defaults={"statistics": REQUIRED, "head_compression_ratio": 0.5},
        hidden=("on_the_fly_scoring",),  # calibrate duo_attention does it once
    ),
    Row(
        "think",
        kvpress.ThinKPress,
        "https://arxiv.org/abs/2407.21018",
        Reads.QUERIES,
        min_context=1,
        removes_tokens=False,
        no_ratio="it zeroes key channels and keeps every token: use key_channel_compression_ratio",
        defaults={"key_channel_compression_ratio": 0.5},
        changes=notes.think_changes,
        notes=notes.think,
    ),
    Row(
        "simlayerkv",
        kvpress.SimLayerKVPress,
        "https://arxiv.org/abs/2410.13846",
        Reads.QUERIES,
        ("n_initial", "n_recent", "n_last"),
        batches=False,
        no_ratio="the text decides which layers are cut to n_initial + n_recent - n_last tokens: use these and "
        "lazy_threshold",
        defaults={"lazy_threshold": REQUIRED},
        check=_check_simlayerkv,
    ),
    Row(
        "kvzip",
        ReplayedKVzipPress,
        "https://arxiv.org/abs/2505.23416",
        min_context=1,
        attention="sdpa",
        masks=True,
        batches=False,
        no_budget=_SHARED,
    ),
    Row(
        "kvgrad",
        ReplayedKVgradPress,
        "https://openreview.net/forum?id=cg1wTCJjjk",
        min_context=1,
        attention="sdpa",
        masks=True,
        batches=False,
        no_budget=_SHARED,
    ),
    Row(
        "kvcompose",
        ReplayedKVComposePress,
        "https://arxiv.org/abs/2509.05165",
        min_context=1,
        batches=False,
        no_budget="its layers share what is kept: use compression_ratio",
        check=kvcompose.check_arguments,
        hidden=("structured",),
    ),
    Row(
        "kvcompose_unstructured",
        UnstructuredKVComposePress,
        "https://arxiv.org/abs/2509.05165",
        min_context=1,
        masks=True,
        batches=False,
        no_budget=_SHARED,
        check=kvcompose.check_arguments,
        hidden=("structured",),
    ),
    Row(
        "adakv",
        kvpress.AdaKVPress,
        "https://arxiv.org/abs/2407.11550",
        attention="sdpa",
        masks=True,
        wraps=Reads.QUERIES,
        refuses={"criticalkv": "the paper's combination of the two is critical_adakv"},
    ),
    Row(
        "criticalkv",
        kvpress.CriticalKVPress,
        "https://arxiv.org/abs/2502.03805",
        defaults=_NO_VNORM,
        wraps=Reads.ATTENTIONS,
        refuses=_NO_CRITICAL,
    ),
    Row(
        "critical_adakv",
        kvpress.CriticalAdaKVPress,
        "https://arxiv.org/abs/2502.03805",
        attention="sdpa",
        masks=True,
        batches=False,
        defaults=_NO_VNORM,
        wraps=Reads.QUERIES,
        refuses=_NO_CRITICAL,
    ),
    Row("key_rerotation", kvpress.KeyRerotationPress, rerotates=True, wraps=Reads.ATTENTIONS),
    Row("merging", kvpress.MergingPress, "https://arxiv.org/abs/2210.09461", wraps=Reads.ATTENTIONS),
    Row(
        "chunkkv",
        kvpress.ChunkKVPress,
        "https://arxiv.org/abs/2502.00299",
        attention="sdpa",
        batches=False,
        no_budget="it keeps whole chunks: use compression_ratio, or entropy_gated_chunkkv, which keeps an exact number",
        wraps=Reads.QUERIES,
        refuses=_NO_CHUNK_MEANS,
    ),
    Row(
        "entropy_gated_chunkkv",
        kvpress.EntropyGatedChunkKVPress,
        "https://arxiv.org/abs/2502.00299",
        attention="sdpa",
        batches=False,
        wraps=Reads.QUERIES,
        refuses=_NO_CHUNK_MEANS,
    ),
    Row(
        "chunk",
        kvpress.ChunkPress,
        "https://doi.org/10.1162/tacl_a_00716",
        attention="sdpa",
        no_budget="it rounds in every chunk: use compression_ratio",
        wraps=Reads.ORDER,
        refuses={
            "streaming_llm": "it would keep sinks in every chunk and fail on a last chunk shorter than they are",
            "lagkv": "it would fall back to the most recent tokens in every chunk shorter than its partitions",
        },
    ),
    Row("block", kvpress.BlockPress, "https://arxiv.org/abs/2504.15364", attention="sdpa", wraps=Reads.ENTRIES),
    Row(
        "per_layer",
        PerLayerPress,
        no_ratio="it takes one ratio per layer: use compression_ratios=0.1+0.5+0.9",
        wraps=Reads.ATTENTIONS,
        refuses={"criticalkv": "kvpress cannot set its ratio layer by layer: wrap the press itself"},
    ),
    Row(
        "lukv",
        CalibratedLUKVPress,
        "https://arxiv.org/abs/2602.08585",
        attention="sdpa",
        masks=True,
        no_budget="its curve knows whole percents: use compression_ratio",
        defaults={"statistics": REQUIRED},
        wraps=Reads.QUERIES,
        refuses={
            "criticalkv": "no curve is made for its scores: wrap the press itself",
            "streaming_llm": "its scores say what stays at one compression_ratio, and a head that loses more would "
            "lose the newest tokens: use streaming_llm itself",
            "compactor": "its scores depend on compression_ratio, and one curve serves every ratio",
            **dict.fromkeys(
                ("qfilter", "expected_attention_stats", "kvzap"),
                "both would read statistics of the model: wrap a press that needs none",
            ),
        },
    ),
    Row(
        "dms",
        kvpress.DMSPress,
        "https://arxiv.org/abs/2506.05345",
        protects=("sliding_window_size",),
        attention="sdpa",
        masks=True,
        no_ratio="it evicts what scores below its threshold: use threshold",
        defaults={"threshold": REQUIRED},
        hidden=("decoding",),
        wraps=Reads.QUERIES,
        refuses={
            name: f"{name}'s scores depend on compression_ratio, which dms has not"
            for name in ("streaming_llm", "compactor", "criticalkv")
        },
    ),
    Row("composed", kvpress.ComposedPress),
)

ROWS: Mapping[str, Row] = types.MappingProxyType({row.name: row for row in _ROWS})

ALIASES: Mapping[str, tuple[str, Mapping[str, Any]]] = types.MappingProxyType(
    {
        "no_press": ("none", {}),
        "adakv_snapkv": ("adakv:snapkv", {}),
        "adakv_compactor": ("adakv:compactor", {}),
        "block_keydiff": ("block:keydiff", {}),
        "chunkkv": ("chunkkv:snapkv", {}),
        "duo_attention_on_the_fly": ("duo_attention", {}),
        "kvzap_linear": ("dms:kvzap", {}),
        "kvzap_mlp": ("dms:kvzap", {}),
        "kvzap_mlp_head": ("kvzap", {}),
        "kvzap_mlp_layer": ("adakv:kvzap", {}),
        "lukv": ("lukv:expected_attention", {"epsilon": 0.02}),
        "critical_snapkv": ("criticalkv:snapkv", {}),
        "critical_adakv_snapkv": ("critical_adakv:snapkv", {}),
        "critical_expected_attention": ("criticalkv:expected_attention", {}),
        "critical_adakv_expected_attention": ("critical_adakv:expected_attention", {}),
        "kvzip_plus": ("kvzip", {"kvzip_plus_normalization": True}),
        "merging_knorm": ("merging:knorm", {}),
        "merging_snapkv": ("merging:snapkv", {}),
        "merging_kvzap_mlp": ("merging:kvzap", {}),
        "merging_expected_attention": ("merging:expected_attention", {"epsilon": 0.01}),
        "snap_think": ("composed:snapkv+think", {}),
    }
)
"""A name that kvpress's evaluation has for a combination -> the combination, and the defaults that come with it."""
