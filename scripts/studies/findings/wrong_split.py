"""The origin's mistake and what it does: GPTNeoX's fused Q, K and V cut into contiguous thirds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch

from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.models import gpt_neox
from lm_eval_kvpress.verify.kept import evicted_entries, full_cache
from lm_eval_kvpress.verify.subject import compress
from scripts.studies.findings.pressed import under
from scripts.studies.findings.rows import SplitDifference


@contextmanager
def contiguous_split() -> Iterator[None]:
    """Cut the fused rows into thirds, though they lie head by head; undone on exit."""

    def rows(self: gpt_neox.ProjectionView, fused: torch.Tensor) -> torch.Tensor:
        return fused.view(3, -1, *fused.shape[1:])[self._part]

    with mock.patch.object(gpt_neox.ProjectionView, "_rows", rows):
        yield


def split_difference(lm: KVPress, contexts: Sequence[Sequence[int]], press: str, removed: float) -> SplitDifference:
    """Which entries a press keeps with the right split and with the contiguous one, over all layers and heads."""
    num_kept = num_different = 0
    for context in contexts:
        full = full_cache(lm.model, context[:-1])
        evicted = []
        for split in (nullcontext(), contiguous_split()):
            with split:
                cache, _ = compress(under(lm, press, compression_ratio=removed), context)
            layers = zip(cache.layers, full.layers, strict=True)
            evicted.append([evicted_entries(layer, of_layer.keys[0], of_layer.values[0]) for layer, of_layer in layers])
        for right, wrong in zip(*evicted, strict=True):
            num_kept += int((~right).sum())
            num_different += int((~right & wrong).sum())
    return SplitDifference(press, len(contexts), num_kept, num_different)
