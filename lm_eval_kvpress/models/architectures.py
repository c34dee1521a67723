"""Present a loaded model to presses and the engine: the one registry of architectures, and the one switch for speed.

A new architecture is one new file in this package and one row of `ARCHITECTURES`. Knows models and their configs. Does
not know lm-eval, adapters on top of a model, or how weights are loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

from transformers import PretrainedConfig, PreTrainedModel

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.models import gpt_neox, llama_like, partial_rope
from lm_eval_kvpress.models.fast.paths import fast_paths
from lm_eval_kvpress.models.positions import Positions
from lm_eval_kvpress.models.pressable import PressableModel

SWITCH = "LM_EVAL_KVPRESS_FAST"
"""Environment variable; 0 leaves every forward to transformers and PyTorch, whatever is asked for."""


@dataclass(frozen=True)
class Architecture:
    """What a model type needs to be presented.

    Attributes:
        present: makes a `PressableModel` of a loaded model, and may change its weights in memory, once or, if not
            ``for_good``, while it is in use; raises `UsageError` for weights that cannot be presented.
        check_config: raises `UsageError` for a config that cannot be presented, or not at the positions of a run,
            before weights are read.
    """

    present: Callable[..., PressableModel]
    check_config: Callable[[PretrainedConfig, Positions], None]


_LLAMA_LIKE = Architecture(llama_like.present, llama_like.check_config)
_PARTIAL_ROPE = Architecture(partial_rope.present, partial_rope.check_config)

ARCHITECTURES: dict[str, Architecture] = {
    "gpt_neox": Architecture(gpt_neox.present, gpt_neox.check_config),
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "olmo2": _LLAMA_LIKE,
    "phi": _PARTIAL_ROPE,
    "phi3": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "qwen3_moe": _LLAMA_LIKE,
    "stablelm": _PARTIAL_ROPE,
}
"""By ``config.model_type``."""

NOT_EXACT: dict[str, str] = {
    "gemma3_text": "five of its six layers see a window of the newest tokens, which the masks over a compressed cache "
    "do not know, and kvpress rotates queries by one set of frequencies where it has two",
}
"""Architectures that would run and give wrong figures, and why (docs/experiments/gemma3_windows.md)."""


def check_config(config: PretrainedConfig, positions: Positions) -> None:
    """Refuse a config whose model cannot be presented, or not at the positions of a run, before weights are read.

    Raises:
        UsageError: in one line.
    """
    _architecture(config).check_config(config, positions)


def check_numbers(config: PretrainedConfig) -> None:
    """Refuse a config of a known architecture without layers or positions; the rest of the package counts on both.

    Raises:
        UsageError: in one line.
    """
    _architecture(config)
    for name in ("num_hidden_layers", "max_position_embeddings"):
        value = getattr(config, name, None)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UsageError(
                f"the checkpoint's config.json says {name}={value!r}, where a whole number above 0 belongs"
            )


def present(model: PreTrainedModel, *, fast: bool = True, for_good: bool = True) -> PressableModel:
    """Present a loaded model.

    Args:
        model: it may be changed in memory once, so do not save it afterwards (`full_width.WideHeads`).
        fast: whether its forwards may be made quicker by `models.fast`.
        for_good: False changes a model that belongs to somebody else only within `PressableModel.in_use`.

    Raises:
        UsageError: if the model cannot be presented.
    """
    pressable = _architecture(model.config).present(model, for_good=for_good)
    if not fast or os.environ.get(SWITCH) == "0":
        return pressable
    return replace(pressable, fast=fast_paths(pressable))


def _architecture(config: PretrainedConfig) -> Architecture:
    if config.model_type in NOT_EXACT:
        raise UsageError(f"architecture '{config.model_type}' is refused: {NOT_EXACT[config.model_type]}")
    if config.model_type not in ARCHITECTURES:
        raise UsageError(
            f"architecture '{config.model_type}' cannot be presented to kvpress, only {', '.join(ARCHITECTURES)} can"
        )
    return ARCHITECTURES[config.model_type]
