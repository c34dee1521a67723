"""The table of presses: each name's kvpress class, what its scores read, what it needs, and its paper.

Rows are facts read off kvpress 0.5.5, each checked by a test that runs the press. Arguments and defaults are not
written here: `press_arguments` reads them from the class. Knows kvpress's press classes; does not know models or how
a press name is put together (`press_grammar`).

Names are those of kvpress's own evaluation (``evaluation/evaluate_registry.py``), with one exception: there
``expected_attention`` means AdaKV over expected attention with ``epsilon=0.01``; here it is the press of that name.
"""

from __future__ import annotations

import enum
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import kvpress
from transformers import PreTrainedModel

from lm_eval_kvpress.errors import UsageError

Notes = Callable[[Mapping[str, Any], float, int, int], Iterator[str]]
"""From a row's arguments, the ratio removed, the tokens of context and the number of layers to what a reader of the
figures must know. The wording never depends on the length, so that a caller can count contexts by it."""


class PerLayerPress(kvpress.PerLayerCompressionPress):
    """kvpress's wrapper, which silently drops ratios beyond the last layer and leaves the wrapped press unprepared."""

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        check_number_of_ratios(self.compression_ratios, model.config.num_hidden_layers)
        self.press.post_init_from_model(model)


def check_number_of_ratios(ratios: Sequence[float], num_layers: int) -> None:
    """Raises a UsageError unless there is one ratio per layer."""
    if len(ratios) != num_layers:
        raise UsageError(f"compression_ratios has {len(ratios)} values for {num_layers} layers: give one per layer")


REQUIRED = "required"
"""Stands for the default of an argument that has none, or one with which the press would do nothing."""


class Reads(enum.IntEnum):
    """What a press's score of a token depends on; each includes those before it."""

    ENTRIES = 0  # keys and values as a set: the score survives any reordering or cutting
    ORDER = 1  # keys, values or hidden states in their order
    QUERIES = 2  # queries at their positions: wrong on a part of the context, for kvpress slices no position embeddings
    ATTENTIONS = 3  # the attention weights of the forward, which only eager attention returns


@dataclass(frozen=True, eq=False)
class Row:
    """One press.

    Attributes:
        name: as the user types it.
        factory: the kvpress class.
        paper: where the method is described.
        reads: what its scores depend on.
        protects: arguments that count tokens which are always kept. kvpress asserts that the context is longer than
            their sum; presses without a ratio remove nothing from a shorter one.
        min_context: least tokens of context, where `protects` does not ask for more.
        attention: the attention implementation that it needs, or None.
        masks: whether it hides entries head by head and leaves the cache as long as it was.
        rerotates: whether kept keys move to positions ``0..kept-1``.
        batches: whether equally long contexts may share a prefill: False where kvpress decides for the whole batch
            by its first row or its mean, or draws random numbers.
        batches_unless: an argument that, when true, makes it draw random numbers.
        removes_tokens: False for a press that keeps every token.
        no_ratio: why it takes no ``compression_ratio``, and what to use instead; empty where it takes one.
        no_budget: why it cannot keep exactly ``kv_budget`` tokens, likewise.
        defaults: defaults that differ from kvpress's, its own or those of what it wraps: kvpress's would compress
            nothing, or kvpress itself advises against them.
        hidden: arguments of the class that are not offered.
        wraps: for a wrapper, the most that the wrapped press's scores may read; None for others.
        refuses: presses that a wrapper cannot wrap although kvpress would let it, and why.
        check: what is wrong with the arguments as a whole, where kvpress asserts nothing; empty if nothing is.
        notes: what a reader must know at a given length.
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
    notes: Notes | None = None

    @property
    def scores(self) -> bool:
        """Whether it ranks tokens and leaves their count to ``ScorerPress``, so that a wrapper loses nothing of it."""
        factory = self.factory
        return issubclass(factory, kvpress.ScorerPress) and factory.compress is kvpress.ScorerPress.compress

    @property
    def takes_ratio(self) -> bool:
        """Whether its class is given the ratio; wrappers pass it on to what they wrap."""
        return "compression_ratio" in inspect.signature(self.factory).parameters


# ------------------------------------------------------------------------------------------------------------- notes


def _pyramidkv_notes(arguments: Mapping[str, Any], ratio: float, context_tokens: int, num_layers: int) -> Iterator[str]:
    """The condition of ``PyramidKVPress.get_layer_budget``, in its own arithmetic."""
    window = arguments["window_size"]
    kept = window + context_tokens * (1 - ratio) - window
    smallest = kept / arguments["beta"]
    largest = kept * 2 - smallest
    if largest >= context_tokens - window:
        largest = context_tokens - window
        smallest = kept * 2 - largest
    if ratio == 0:
        return
    if context_tokens >= largest >= smallest >= window:
        if num_layers == 1 and largest > smallest:
            yield "pyramidkv gave the only layer its largest budget, which is more than was asked"
    elif smallest < window:
        yield f"pyramidkv fell back to snapkv: its smallest layer budget is below its window_size of {window}"
    else:
        yield f"pyramidkv fell back to snapkv: fewer tokens are removed than its window_size of {window}"


def _lagkv_notes(arguments: Mapping[str, Any], ratio: float, context_tokens: int, num_layers: int) -> Iterator[str]:
    n_sink, lag_size = arguments["n_sink"], arguments["lag_size"]
    if ratio == 0:
        return
    if context_tokens < n_sink + 2 * lag_size:
        yield f"lagkv fell back to sinks and most recent tokens: the context is below {n_sink + 2 * lag_size} tokens"
    elif int(context_tokens * (1 - ratio)) < n_sink + lag_size + (context_tokens - n_sink) % lag_size:
        yield "lagkv keeps fewer tokens than its sinks and last partitions: which of these is arbitrary"


def _think_notes(arguments: Mapping[str, Any], ratio: float, context_tokens: int, num_layers: int) -> Iterator[str]:
    share = arguments["key_channel_compression_ratio"]
    yield f"think keeps every token and frees no memory: kvpress zeroes {share:.0%} of the key channels"


def _random_notes(arguments: Mapping[str, Any], ratio: float, context_tokens: int, num_layers: int) -> Iterator[str]:
    if arguments["seed"] is not None and ratio > 0:
        yield "random with a seed keeps the same places in every layer and in every context of the same length"


def _check_simlayerkv(arguments: Mapping[str, Any]) -> str:
    """kvpress keeps the last ``n_recent - n_last`` tokens by a negative slice, which at 0 keeps all of them."""
    n_recent, n_last = arguments["n_recent"], arguments["n_last"]
    return "" if n_recent > n_last else f"n_recent={n_recent} must exceed n_last={n_last}"


# ------------------------------------------------------------------------------------------------------------- table

# CriticalKV multiplies scores by the size of what a value adds to the output: of negative scores, that would evict
# the weightiest first.
_NO_CRITICAL: Mapping[str, str] = {
    "criticalkv": "the weighting by the output projection would be applied twice",
    **dict.fromkeys(
        ("knorm", "keydiff", "leverage", "noncausal", "compactor"),
        "it multiplies scores, which must not be negative: wrap snapkv, tova or expected_attention",
    ),
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
        notes=_pyramidkv_notes,
    ),
    Row("knorm", kvpress.KnormPress, "https://arxiv.org/abs/2406.11430"),
    Row("random", kvpress.RandomPress, batches=False, notes=_random_notes),
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
    Row("lagkv", kvpress.LagKVPress, "https://arxiv.org/abs/2504.04704", Reads.ORDER, notes=_lagkv_notes),
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
    Row("cap", kvpress.CapPress, "https://arxiv.org/abs/2604.25975", Reads.QUERIES, ("n_sink",)),
    Row(
        "think",
        kvpress.ThinKPress,
        "https://arxiv.org/abs/2407.21018",
        Reads.QUERIES,
        min_context=1,
        removes_tokens=False,
        no_ratio="it zeroes key channels and keeps every token: use key_channel_compression_ratio",
        defaults={"key_channel_compression_ratio": 0.5},
        notes=_think_notes,
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
    ),
    Row(
        "entropy_gated_chunkkv",
        kvpress.EntropyGatedChunkKVPress,
        "https://arxiv.org/abs/2502.00299",
        attention="sdpa",
        batches=False,
        wraps=Reads.QUERIES,
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
        "critical_snapkv": ("criticalkv:snapkv", {}),
        "critical_adakv_snapkv": ("critical_adakv:snapkv", {}),
        "critical_expected_attention": ("criticalkv:expected_attention", {}),
        "critical_adakv_expected_attention": ("critical_adakv:expected_attention", {}),
        "merging_knorm": ("merging:knorm", {}),
        "merging_snapkv": ("merging:snapkv", {}),
        "merging_expected_attention": ("merging:expected_attention", {"epsilon": 0.01}),
        "snap_think": ("composed:snapkv+think", {}),
    }
)
"""kvpress's evaluation names for combinations: the combination, and defaults of its own."""


@dataclass(frozen=True)
class Unsupported:
    """A press of kvpress that cannot run here.

    Attributes:
        factory: its class.
        reason: why, as a sentence that starts with "it".
        paper: where the method is described.
        variants: other names that kvpress's evaluation has for it.
    """

    factory: type[kvpress.BasePress]
    reason: str
    paper: str = ""
    variants: tuple[str, ...] = ()


_TRAINED = "it needs {} trained for the one model"
_DECODES = "it acts while text is generated: decoding:PRESS holds a budget there, as in decoding:knorm"

STANDING = ("knorm", "keydiff", "tova", "streaming_llm", "snapkv")
"""Presses that can choose again and again on a cache whose tokens are long gone, from the newest tokens' hidden
states. Not among them: expected_attention, which takes the number of hidden states for a position; lagkv, which falls
back below its partitions; random, whose draws would depend on the batch."""

DEFAULT_INTERVAL = 128
"""Tokens produced between two compressions of a decoding press."""

UNSUPPORTED: Mapping[str, Unsupported] = types.MappingProxyType(
    {
        "qfilter": Unsupported(kvpress.QFilterPress, _TRAINED.format("filters"), "https://arxiv.org/abs/2503.02812"),
        "duo_attention": Unsupported(
            kvpress.DuoAttentionPress,
            "it needs head patterns computed for the one model, or a tokenizer and texts to compute them",
            "https://arxiv.org/abs/2410.10819",
            ("duo_attention_on_the_fly",),
        ),
        "kvzap": Unsupported(
            kvpress.KVzapPress,
            _TRAINED.format("a surrogate model"),
            "https://arxiv.org/abs/2601.07891",
            ("kvzap_linear", "kvzap_mlp", "kvzap_mlp_head", "kvzap_mlp_layer", "merging_kvzap_mlp"),
        ),
        "fastkvzip": Unsupported(kvpress.FastKVzipPress, _TRAINED.format("gates"), "https://arxiv.org/abs/2601.17668"),
        "restorekv": Unsupported(
            kvpress.RestoreKVPress,
            _TRAINED.format("an adapter"),
            "https://arxiv.org/abs/2608.01247",
            ("RestoreKV", "RestoreKV_plus"),
        ),
        "expected_attention_stats": Unsupported(
            kvpress.ExpectedAttentionStatsPress,
            "it needs query statistics computed for the one model: expected_attention takes them from the context",
            "https://arxiv.org/abs/2510.00636",
        ),
        "lukv": Unsupported(
            kvpress.LUKVPress,
            "it needs a budget curve computed for the one model and press",
            "https://arxiv.org/abs/2602.08585",
        ),
        "finch": Unsupported(
            kvpress.FinchPress,
            "it needs a delimiter token between context and question, which no lm-eval request has: snapkv is its kin",
            "https://doi.org/10.1162/tacl_a_00716",
        ),
        "kvzip": Unsupported(
            kvpress.KVzipPress,
            "it loads a tokenizer by the model's name and replays the context through Llama's own forward",
            "https://arxiv.org/abs/2505.23416",
            ("kvzip_plus",),
        ),
        "kvgrad": Unsupported(
            kvpress.KVgradPress,
            "it loads a tokenizer by the model's name and replays the context forward and backward",
            "https://openreview.net/forum?id=cg1wTCJjjk",
        ),
        "kvcompose": Unsupported(
            kvpress.KVComposePress,
            "it replays the context behind itself, at twice the positions and through Llama's own forward",
            "https://arxiv.org/abs/2509.05165",
            ("kvcompose_unstructured",),
        ),
        "cam": Unsupported(
            kvpress.CAMPress,
            _DECODES,
            "https://openreview.net/forum?id=LCTmppB165",
            ("cam_streaming_llm", "cam_knorm", "cam_adakv_snapkv", "cam_tova"),
        ),
        "decoding": Unsupported(
            kvpress.DecodingPress,
            _DECODES,
            variants=(
                *("decoding_knorm", "decoding_streaming_llm", "decoding_tova", "decoding_qfilter", "decoding_keydiff"),
                *("decoding_adakv_expected_attention_e2", "decoding_adakv_snapkv"),
            ),
        ),
        "compression_ratio_decoding": Unsupported(kvpress.CompressionRatioDecodingPress, _DECODES),
        "prefill_decoding": Unsupported(
            kvpress.PrefillDecodingPress,
            "it names two presses: prefill_decoding:PREFILL+PRESS, as in prefill_decoding:snapkv+knorm",
        ),
    }
)
