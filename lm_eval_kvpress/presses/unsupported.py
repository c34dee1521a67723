"""Presses of kvpress that cannot run here, and why. A press that starts to run moves to `catalog`.

Those that act while text is generated run behind another press (`presses.decoding`); the reason says how.
"""

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


_TRAINED = (
    "it needs {}, which its authors trained by gradient and published for {}; kvpress ends with an error on other "
    "models, and calibrate trains nothing: docs/experiments/press_table.md"
)
_DECODES = "it acts while text is generated and wraps another press: {0}:PRESS, as in {0}:knorm"

UNSUPPORTED: Mapping[str, Unsupported] = types.MappingProxyType(
    {
        "fastkvzip": Unsupported(
            kvpress.FastKVzipPress,
            _TRAINED.format("gates", "some Qwen and Gemma models"),
            "https://arxiv.org/abs/2601.17668",
        ),
        "restorekv": Unsupported(
            kvpress.RestoreKVPress,
            _TRAINED.format("restore tokens and an adapter", "Llama-3.1-8B-Instruct and Qwen3-8B"),
            "https://arxiv.org/abs/2608.01247",
            ("RestoreKV", "RestoreKV_plus"),
        ),
        "cam": Unsupported(
            kvpress.CAMPress,
            _DECODES.format("cam"),
            "https://openreview.net/forum?id=LCTmppB165",
            ("cam_streaming_llm", "cam_knorm", "cam_adakv_snapkv", "cam_tova"),
        ),
        "decoding": Unsupported(
            kvpress.DecodingPress,
            _DECODES.format("decoding"),
            variants=(
                *("decoding_knorm", "decoding_streaming_llm", "decoding_tova", "decoding_qfilter", "decoding_keydiff"),
                *("decoding_adakv_expected_attention_e2", "decoding_adakv_snapkv"),
            ),
        ),
        "compression_ratio_decoding": Unsupported(
            kvpress.CompressionRatioDecodingPress, _DECODES.format("compression_ratio_decoding")
        ),
        "prefill_decoding": Unsupported(
            kvpress.PrefillDecodingPress,
            "it names two presses: prefill_decoding:PREFILL+PRESS, as in prefill_decoding:snapkv+knorm",
        ),
    }
)
