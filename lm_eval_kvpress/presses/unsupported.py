"""Presses of kvpress that cannot run here, and why. A press that starts to run moves to `catalog`."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass

import kvpress


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

UNSUPPORTED: Mapping[str, Unsupported] = types.MappingProxyType(
    {
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
        "lukv": Unsupported(
            kvpress.LUKVPress,
            "it needs a budget curve computed for the one model and press",
            "https://arxiv.org/abs/2602.08585",
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
