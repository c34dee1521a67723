"""What ``kv_quant`` can be combined with: an entry that is evicted once it is packed must have scales of its own.

A press that acts while text is generated, and a stream, evict single entries of a cache that is packed. Packing anew
what stays would round it again at each eviction.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.settings import Settings


def check_packing(settings: Settings) -> None:
    """Refuse sizes that belong to no quantization, and what cannot be packed.

    Raises:
        UsageError: in one line.
    """
    packing, evicting = settings.quantization, _evicting(settings)
    if packing is None:
        return
    if settings.kv_group % 8:
        raise UsageError(f"kv_group={settings.kv_group} must be a multiple of 8, so that groups fill whole bytes")
    if settings.decoding is not None and settings.decoding.merge_budget is not None:
        raise UsageError(
            f"kv_quant={packing.name} packs an entry once, and press={settings.press_name} changes values that are "
            "kept: choose another press, or leave kv_quant out"
        )
    if evicting and not packing.is_float and packing.layout != "token":
        raise UsageError(
            f"kv_layout={packing.layout} has scales for groups of entries, and {evicting} evicts some of them: add "
            "kv_layout=token and a kv_group that divides a head's dims, or use kv_quant=fp8"
        )
    if settings.kv_residual and (evicting or not settings.press.is_none):
        raise UsageError(
            f"kv_residual={settings.kv_residual} spares the newest entries, and press={settings.press_name} leaves "
            "them in the order of their scores: use kv_residual=0, or press=none"
        )


def check_groups(settings: Settings, config: PretrainedConfig) -> None:
    """Refuse groups that reach over several entries where single ones are evicted.

    Raises:
        UsageError: naming groups that do not.
    """
    packing, evicting = settings.quantization, _evicting(settings)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if packing is None or not evicting or packing.block_entries(dim) == 1:
        return
    possible = ", ".join(str(size) for size in range(8, dim + 1, 8) if dim % size == 0)
    raise UsageError(
        f"kv_group={packing.group} does not divide a head's {dim} dims, and {evicting} evicts single entries: use one "
        f"of {possible or 'none: kv_quant=fp8 has no groups'}"
    )


def _evicting(settings: Settings) -> str:
    """The argument because of which packed entries are evicted; empty if none is."""
    if settings.rolling == "stream":
        return "rolling=stream"
    return "" if settings.decoding is None else f"press={settings.press_name}"
