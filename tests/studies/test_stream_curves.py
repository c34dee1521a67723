"""The script behind the curves: its recomputation is what a stream is before it evicts, its intervals are of ratios."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from repository import ROOT

from lm_eval_kvpress.harness.model import KVPress
from scripts.benchmarks.streams import SETTINGS
from scripts.studies import stream_curves


@pytest.mark.parametrize("name", ["sinks_512", "sinks_original_512", "tova_512"])
def test_recomputation_equals_a_stream_that_evicts_nothing(checkpoint_dir: Path, name: str) -> None:
    lm = KVPress(pretrained=str(checkpoint_dir), device="cpu", dtype="float32")
    texts = torch.randint(1, 300, (2, 200), generator=torch.Generator().manual_seed(0)).tolist()
    expected = stream_curves.recomputed(lm, texts, budget=512)
    found = stream_curves.losses(lm, SETTINGS[name], texts)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_recomputation_sees_the_budget_and_its_own_chunk_only(checkpoint_dir: Path) -> None:
    lm = KVPress(pretrained=str(checkpoint_dir), device="cpu", dtype="float32")
    (text,) = torch.randint(1, 300, (1, 200), generator=torch.Generator().manual_seed(0)).tolist()
    changed = [token % 299 + 1 for token in text[:50]] + text[50:]
    one, other = (stream_curves.recomputed(lm, [tokens], budget=64)[0] for tokens in (text, changed))
    assert one[128:] == other[128:], "the chunk from 128 on sees from 64 on"
    assert one[64:128] != other[64:128]


def test_ratios_are_of_perplexities_and_their_interval_holds_them() -> None:
    assert stream_curves.with_interval(np.full(5, math.log(1.25))) == {"ratio": 1.25, "interval_95": [1.25, 1.25]}
    figure = stream_curves.with_interval(np.array([0.0, 0.2, 0.4]))
    assert figure["interval_95"][0] < figure["ratio"] == round(math.exp(0.2), 4) < figure["interval_95"][1]


def test_the_page_holds_the_table_that_the_script_wrote() -> None:
    docs = ROOT / "docs"
    assert (docs / "figures" / "stream_curves.md").read_text() in (docs / "streaming.md").read_text()
