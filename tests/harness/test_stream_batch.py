"""Documents side by side stream as they do alone: every press, the strict and the fast protocol, ties and endings."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from rotation import in_turn

from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.presses.streaming import STREAM_PRESSES

SENTENCE = "the mill , a river and seven grey geese slept ; nobody asked who owned them . In 1871 it burnt down"
BUDGET = {1: 24, 64: 80}
LENGTHS = {1: (60, 1, 41, 40), 64: (250, 1, 90, 150)}
"""Words of the documents: one ends at once, others within a chunk and in different steps."""


def texts(lengths: Sequence[int]) -> list[str]:
    words, generator = SENTENCE.split(), torch.Generator().manual_seed(8)
    picks = [torch.randint(len(words), (length,), generator=generator).tolist() for length in lengths]
    return [" ".join(words[pick] for pick in row) for row in picks]


def requests(documents: Sequence[str]) -> list[Instance]:
    return [Instance("loglikelihood_rolling", {}, (text,), 0, ("s", i, 1)) for i, text in enumerate(documents)]


def streamed(
    checkpoint: Path, folder: Path, documents: Sequence[str], batch_size: int, **arguments: Any
) -> tuple[list[list[float]], list[Any]]:
    """Losses by position as the files have them, and the reported scores."""
    torch.manual_seed(3)  # press=random draws from it
    lm = KVPress(
        pretrained=str(checkpoint),
        device="cpu",
        rolling="stream",
        batch_size=batch_size,
        stream_output=str(folder),
        **arguments,
    )
    scores = lm.loglikelihood_rolling(requests(documents), disable_tqdm=True)
    files = [next((folder / "s").glob(f"{number}-*.csv")) for number in range(len(documents))]
    return [[float(row["loss_nats"]) for row in csv.DictReader(file.open())] for file in files], scores


@pytest.mark.parametrize(("press", "chunk"), in_turn(sorted(STREAM_PRESSES), [1, 64]))
def test_side_by_side_equals_one_by_one(checkpoint_dir: Path, tmp_path: Path, press: str, chunk: int) -> None:
    arguments: dict[str, Any] = {"press": press, "stream_budget": BUDGET[chunk], "stream_chunk": chunk}
    if press == "lagkv":
        arguments["lag_size"] = 8
    documents = texts(LENGTHS[chunk])
    together, scores = streamed(checkpoint_dir, tmp_path / "together", documents, 4, **arguments)
    alone, _ = streamed(checkpoint_dir, tmp_path / "alone", documents, 1, **arguments)
    assert max(map(len, together)) > BUDGET[chunk] + chunk, "something must be evicted"
    for found, expected, score in zip(together, alone, scores, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        assert float(score) == -math.fsum(found)
        assert score.num_tokens == len(found)


@pytest.mark.parametrize("chunk", [1, 64])
def test_entries_that_tie_fall_alike_whoever_streams_beside_them(
    checkpoint_dir: Path, tmp_path: Path, chunk: int
) -> None:
    """A repeated word gives the first layer keys of one norm, up to the rounding of their rotation."""
    words = ("the mill ", "river ", "the ")
    documents = [word * length for word, length in zip(words, LENGTHS[chunk], strict=False)]
    arguments: dict[str, Any] = {"press": "knorm", "stream_budget": BUDGET[chunk], "stream_chunk": chunk}
    together, _ = streamed(checkpoint_dir, tmp_path / "together", documents, 3, **arguments)
    alone, _ = streamed(checkpoint_dir, tmp_path / "alone", documents, 1, **arguments)
    for found, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
