"""What the positions of a run ask of a model: RoPE frequencies that stay, rotations that can be undone, no window.

Keys are cached under the frequencies of the forward that made them. Two kinds of RoPE choose theirs by the largest
position of a forward, so that a longer forward would read them under others: "longrope" has two sets, "dynamic" one for
every length beyond the trained one. A run that stays below is exact; one that may go beyond is refused.

Knows configs of transformers. Does not know models, presses or text. Source: ``transformers.modeling_rope_utils``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lm_eval_kvpress.errors import UsageError


@dataclass(frozen=True)
class Positions:
    """The positions that a run uses.

    Attributes:
        num: the most of any forward, from 0 on; infinite where the longest document decides.
        rotates_back: whether cached keys are turned back and rotated anew, as a stream does by places in the cache.
    """

    num: float
    rotates_back: bool = False


def rope_type(config: PretrainedConfig) -> str:
    """The kind of RoPE by transformers' name."""
    rope = rope_parameters(config)
    return str(rope.get("rope_type") or rope.get("type") or "default")


def rope_parameters(config: PretrainedConfig) -> dict[str, Any]:
    """RoPE's own part of a config."""
    return getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}  # transformers 5, 4


def check_rope(config: PretrainedConfig, positions: Positions) -> None:
    """Refuse a run in which frequencies would change, or rotations could not be undone.

    Raises:
        UsageError: in one line.
    """
    kind, last = rope_type(config), frequencies_change_after(config)
    if positions.rotates_back and attention_scaling(config) != 1:
        raise UsageError(
            f"rope_type '{kind}' rescales the keys that it rotates, which rolling=stream by places in the cache cannot "
            "undo: use another protocol (rolling=prefix), or a checkpoint with plain RoPE"
        )
    if positions.num > last:
        beyond = "a document of any length" if math.isinf(positions.num) else f"max_length={positions.num:g}"
        raise UsageError(
            f"rope_type '{kind}' has other frequencies beyond {last:g} positions, and {beyond} may cross them: keys "
            f"that were cached below would be wrong. Pass max_length={last:g}, and no stream_positions=original"
        )


def frequencies_change_after(config: PretrainedConfig) -> float:
    """The most positions of a forward with the frequencies of a short one; infinite where they never change."""
    kind, rope = rope_type(config), rope_parameters(config)
    if "dynamic" in kind:
        return float(config.max_position_embeddings)
    if kind == "longrope":
        original = getattr(config, "original_max_position_embeddings", None)
        return float(rope.get("original_max_position_embeddings") or original or config.max_position_embeddings)
    return math.inf


def attention_scaling(config: PretrainedConfig) -> float:
    """What RoPE multiplies cosines and sines with."""
    kind = rope_type(config)
    return 1.0 if kind == "default" else ROPE_INIT_FUNCTIONS[kind](config, "cpu")[1]


def hidden_after(config: PretrainedConfig) -> float:
    """The most positions of a forward of which a sliding window hides none; infinite where no layer has a window."""
    layer_types = getattr(config, "layer_types", None) or []
    window = getattr(config, "sliding_window", None)
    slides = any("sliding" in kind for kind in layer_types) or (window and not layer_types)
    return float(window or 0) if slides else math.inf


def check_windows(config: PretrainedConfig, positions: Positions) -> None:
    """Refuse sliding windows that could hide a position of the run.

    Raises:
        UsageError: in one line.
    """
    if positions.num <= hidden_after(config):
        return
    window = getattr(config, "sliding_window", None)
    raise UsageError(
        f"{config.model_type} with sliding-window attention (window {window}) is not supported, since kvpress "
        f"compresses full-attention layers only: pass max_length={window}, which leaves the window nothing to hide, or "
        "use a checkpoint without sliding windows"
    )
