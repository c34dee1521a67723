"""What was kept of each context, and what that takes: the records of a cache that was just compressed.

Knows caches and a `PressSpec`. Does not know models or how contexts were prefilled.
"""

from __future__ import annotations

from collections.abc import Sequence

from lm_eval_kvpress.cache.compressed import CompressedCache
from lm_eval_kvpress.cache.packed import PackedKV
from lm_eval_kvpress.presses.spec import PressSpec
from lm_eval_kvpress.records.totals import ContextRecord


def context_records(cache: CompressedCache, press: PressSpec, pressed: bool) -> list[ContextRecord]:
    """The record of each row of a cache.

    Args:
        press: that was asked for.
        pressed: whether it ran.
    """
    return [
        _context_record(cache, press, kept, num_seen, pressed)
        for kept, num_seen in zip(cache.kept(), cache.num_seen, strict=True)
    ]


def _context_record(
    cache: CompressedCache, press: PressSpec, kept: Sequence[float], num_seen: int, pressed: bool
) -> ContextRecord:
    """The record of one row; padding beside it in a plain prefill does not count."""
    sizes = [layer.entry_bytes for layer in cache.layers]
    entries = [layer.num_entries if pressed else num_seen for layer in cache.layers]
    unpacked = sum(size * count for size, count in zip(sizes, entries, strict=True))
    is_packed = any(isinstance(layer, PackedKV) for layer in cache.layers)  # without padding, rows of one length
    held = sum(layer.num_bytes for layer in cache.layers) // len(cache.num_seen)
    return ContextRecord(
        num_tokens=num_seen,
        kept_per_layer=tuple(kept),
        bytes_before=sum(sizes) * num_seen,
        bytes_allocated=held if is_packed else unpacked,
        pressed=pressed,
        is_short=not pressed and not press.is_none,
        is_shrunk=pressed and num_seen < press.min_context(),
        notes=tuple(press.notes(num_seen, len(cache.layers))) if pressed else (),
        bytes_unpacked=unpacked,
    )
