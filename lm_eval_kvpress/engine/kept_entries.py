"""Which tokens of a context a press kept, per layer and head: read off the cache, whatever the press did to get there.

kvpress's presses hand back shorter keys and values, or marks, and no places. So each layer's entries are copied before
the press's hook runs, and a kept entry is the one of these that has its key, or else its value, to the bit. Knows
caches and hooks. Does not know any press by name.

Letters in shape comments: H key-value heads, P prefilled tokens, T kept entries, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lm_eval_kvpress.cache.compressed import CachedLayer, LayerKV
from lm_eval_kvpress.errors import UsageError


@contextmanager
def copied_entries(attentions: Sequence[nn.Module]) -> Iterator[dict[int, LayerKV]]:
    """Copy the entries of each layer's first forward before a press acts on them; by layer.

    Hooks run in the order in which they were registered, so this must be entered before the press's own context.
    """
    found: dict[int, LayerKV] = {}

    def copy_of(layer: int) -> Any:
        def copy(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            cache = kwargs.get("past_key_values")  # where no press runs, the model's own names are passed
            if cache is not None and layer not in found:
                entries = cache.layers[layer]
                found[layer] = LayerKV(entries.keys.clone(), entries.values.clone())

        return copy

    with ExitStack() as hooks:
        for layer, attention in enumerate(attentions):
            hooks.callback(attention.register_forward_hook(copy_of(layer), with_kwargs=True).remove)
        yield found


def kept_entries(full: CachedLayer, kept: CachedLayer, *, in_order: bool = False) -> torch.Tensor:
    """Which entries of one context's layer a press kept, ``(H, P)``, True where it did.

    Args:
        full: the layer before the press, of one row.
        kept: the layer after it.
        in_order: whether kept entries stand in the order of the text, as those of presses that rotate keys do. It
            tells repeated tokens apart in the first layer, where their values are equal.

    Raises:
        UsageError: if an entry was rewritten beyond recognition.
    """
    num_heads, num_tokens = full.keys.shape[1:3]
    attended = torch.ones(num_heads, kept.num_entries, dtype=torch.bool)
    if kept.hidden is not None:
        attended = ~kept.hidden[0].cpu().expand(num_heads, -1)  # (H, T)
    if kept.num_entries == num_tokens:  # nothing was moved
        return attended.clone()
    places = torch.tensor([_places(full, kept, head, in_order) for head in range(num_heads)])  # (H, T)
    return torch.zeros(num_heads, num_tokens, dtype=torch.bool).scatter(1, places, attended)


def _places(full: CachedLayer, kept: CachedLayer, head: int, in_order: bool) -> list[int]:
    """The place of each kept entry of a head among all of the context."""
    keys = kept.keys[0, head]
    channels = (keys != 0).any(dim=0)  # a press may empty some, for all entries of a head
    same = _equal(keys[:, channels], full.keys[0, head][:, channels])
    if not same.any(dim=1).all():  # keys were rotated to other positions
        same = _equal(kept.values[0, head], full.values[0, head])
    if not same.any(dim=1).all():
        raise UsageError("it rewrites entries: which tokens they came from cannot be told")
    return _distinct([row.nonzero().flatten().tolist() for row in same], in_order)


def _equal(some: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Which vectors are equal to the bit: ``(T, D), (P, D) -> (T, P)``."""
    exact = "donot_use_mm_for_euclid_dist"  # by differences: a product would round
    return torch.cdist(some.float(), others.float(), compute_mode=exact).cpu() == 0


def _distinct(candidates: Sequence[Sequence[int]], in_order: bool) -> list[int]:
    """One place for each kept entry, none twice."""
    places, free, last = list[int](), {place for row in candidates for place in row}, -1
    for row in candidates:
        place = next((one for one in row if one in free and (one > last or not in_order)), None)
        if place is None:
            raise UsageError("it keeps an entry more than once: which tokens it kept cannot be told")
        places.append(place)
        free.discard(place)
        last = place
    return places
