"""All cells of a protocol answer batch by batch, and the progress bar counts each answer once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tqdm import tqdm

from lm_eval_kvpress.engine.outcomes import Scored
from lm_eval_kvpress.engine.scoring import BranchScore
from lm_eval_kvpress.sweep.answering import CellAnswering
from lm_eval_kvpress.sweep.answers import Answers
from lm_eval_kvpress.sweep.cell_run import CellRun
from lm_eval_kvpress.sweep.cells import Cell
from lm_eval_kvpress.sweep.workers.worker import Here, Worker

IDENTITIES = ["a", "b", "a", "c", "d"]  # a document that repeats itself has the same window twice
LARGEST = 2


class Windows:
    """Request batches in which memory runs out for more than two items."""

    request_type, splits_requests, is_cached_whole, num_cache_copies = "loglikelihood_rolling", False, False, 1
    requests = range(len(IDENTITIES))

    def __init__(self) -> None:
        self.runs: list[list[int]] = []

    def segments(self) -> Iterator[list[int]]:
        yield list(range(len(IDENTITIES)))

    def length(self, item: int) -> int:
        return 1

    def identity(self, item: int) -> str:
        return IDENTITIES[item]

    def part(self, items: Sequence[int]) -> Part:
        return Part(self, items)

    def contexts(self, items: Sequence[int]) -> list[tuple[int, ...]]:
        return []

    def run(self, runner: Any, items: Sequence[int], advance: Any) -> list[Scored]:
        if len(items) > LARGEST and runner.is_small:
            raise torch.OutOfMemoryError
        self.runs.append(list(items))
        advance(len(items))
        return [Scored((BranchScore((-float(item),), False),), False, None) for item in items]

    def answers(self, outcomes: Mapping[int, Scored]) -> dict[int, float]:
        return {item: outcome.branches[0].logprobs[0] for item, outcome in outcomes.items()}

    def record_totals(self, outcomes: Any, totals: Any) -> None: ...


class Part(Windows):
    """Some of them, counted from 0."""

    def __init__(self, whole: Windows, items: Sequence[int]) -> None:
        self._whole, self._items = whole, items

    def run(self, runner: Any, items: Sequence[int], advance: Any) -> list[Scored]:
        return self._whole.run(runner, [self._items[item] for item in items], advance)


def cell_run(folder: Path, *, is_small: bool) -> CellRun:
    meter = SimpleNamespace(finish=lambda kind: None, live=dict, take=tuple, adopt=lambda batches: None)
    runner = SimpleNamespace(meter=meter, is_small=is_small, compressor=SimpleNamespace(shares=False))
    session: Any = SimpleNamespace(runner=runner, check_lengths=lambda requests: None, totals=None)
    store: Any = SimpleNamespace(answers=Answers(folder / "answers.sqlite", folder / "log"))
    cell = Cell(folder.name, {})
    log: Any = None
    return CellRun(cell, session, store, log, store.answers.keys())


def answer(runs: Sequence[CellRun]) -> tuple[dict[int, float], tqdm[Any], Windows]:
    requests: Any = Windows()
    bar = tqdm(total=len(IDENTITIES), disable=False)
    sessions = {run.cell.name: run.session for run in runs}
    model: Any = SimpleNamespace(
        open_session=lambda cell: sessions[cell.name],
        set_attention=lambda session: None,
        lm=SimpleNamespace(press_model=SimpleNamespace(in_use=nullcontext)),
        num_tokens_shared=0,
    )
    answering = CellAnswering(runs[0], runs, lambda press, batches: (5, None), Here(Worker(model)))
    answers = dict(answering.answers([requests], bar))
    return answers, bar, requests


def test_the_bar_counts_every_answer_of_every_cell_once_also_after_memory_ran_out(tmp_path: Path) -> None:
    """The second cell fails with a batch that the first has answered; its halves ask the first for nothing."""
    runs = [cell_run(tmp_path / "large", is_small=False), cell_run(tmp_path / "small", is_small=True)]
    answers, bar, requests = answer(runs)
    assert answers == {item: -float(item) for item in range(5)}
    assert (bar.n, bar.total) == (10, 10)
    assert sorted(item for items in requests.runs for item in items) == sorted([*range(5)] * 2)


def test_the_bar_starts_from_what_is_answered_and_ends_full(tmp_path: Path) -> None:
    first = cell_run(tmp_path / "first", is_small=False)
    answer([first])
    _, bar, requests = answer([cell_run(tmp_path / "first", is_small=False)])
    assert (bar.n, bar.total, requests.runs) == (5, 5, []), "the answers of a cell that an earlier one had answered"
    _, bar, requests = answer([first, cell_run(tmp_path / "second", is_small=True)])
    assert (bar.n, bar.total) == (5, 5), "cells with all answers are not counted beside others"
    assert sum(map(len, requests.runs)) == 5
