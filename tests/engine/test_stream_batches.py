"""Streams as request batches: halved when memory runs out, sized by the cache, answered and recorded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from lm_eval_kvpress.engine import runner as runner_module
from lm_eval_kvpress.engine.batching import Halving, batches
from lm_eval_kvpress.engine.compression import Compressor
from lm_eval_kvpress.engine.outcomes import Document, Streamed
from lm_eval_kvpress.engine.runner import Runner
from lm_eval_kvpress.engine.stream_batches import StreamBatches
from lm_eval_kvpress.engine.stream_plan import StreamPlan
from lm_eval_kvpress.engine.streaming import ChunkLosses
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.parse import parse_press
from lm_eval_kvpress.presses.streaming import for_stream
from lm_eval_kvpress.records.clock import Clock
from lm_eval_kvpress.records.loss_files import LossFiles
from lm_eval_kvpress.records.meter import Meter, RequestId
from lm_eval_kvpress.records.timings import RunLabels
from lm_eval_kvpress.records.totals import TaskTotals, TotalsByTask, new_totals

PLAN = StreamPlan(budget=20, chunk=7)
LENGTHS = (70, 0, 130, 56, 1)


def runner(model: PressableModel) -> Runner:
    clock, press = Clock(model.device), for_stream(parse_press("knorm", {}), PLAN.budget, PLAN.chunk)
    compressor = Compressor(model, press, short_context="keep", clock=clock)
    labels = RunLabels("r", "m", press.name, "", "", "cpu", "float32", "")
    return Runner(model, compressor, clock, Meter(clock, labels), nullcontext)


def stream_batches(files: LossFiles | None = None) -> StreamBatches:
    generator = torch.Generator().manual_seed(5)
    tokens = [torch.randint(1, 211, (length,), generator=generator).tolist() for length in LENGTHS]
    documents = [Document(tuple(row), RequestId("t", index, 0)) for index, row in enumerate(tokens)]
    return StreamBatches(documents, PLAN, prefix_token=0, loss_files=files)


def outcomes(requests: StreamBatches, model: PressableModel, size: int = 8) -> tuple[dict[int, Streamed], int]:
    """All outcomes, and the progress that was reported."""
    found: dict[int, Streamed] = {}
    steps, own, halving = list[int](), runner(model), Halving()
    run = lambda part: requests.run(own, part, steps.append)  # noqa: E731
    for items in batches(requests, size, None):
        found |= zip(items, halving.run(run, items, requests.length), strict=True)
    return found, sum(steps)


def totals(requests: StreamBatches, found: dict[int, Streamed]) -> TaskTotals:
    by_task: TotalsByTask = new_totals()
    requests.record_totals(found, by_task)
    return by_task["t"]


def fails_side_by_side(monkeypatch: pytest.MonkeyPatch, after: int) -> list[int]:
    """Has a stream of several documents run out of memory after so many chunks; the sizes of the streams begun."""
    stream, sizes = runner_module.stream, []

    def failing(model: Any, documents: Sequence[Any], *rest: Any) -> Iterator[ChunkLosses]:
        sizes.append(len(documents))
        for number, step in enumerate(stream(model, documents, *rest)):
            if len(documents) > 1 and number >= after:
                torch.empty(2**60, dtype=torch.uint8)  # more than a CPU has
            yield step

    monkeypatch.setattr(runner_module, "stream", failing)
    return sizes


@pytest.mark.parametrize(
    ("after", "keeps_losses", "num_documents"),
    [
        pytest.param(0, False, [4, 2, 1, 1, 1, 1], id="at once"),
        pytest.param(12, False, [4, 2, 1, 1, 1, 1], id="when all but one have ended"),
        pytest.param(12, True, [4, 1], id="when all but one are on disk"),
    ],
)
def test_a_stream_that_runs_out_of_memory_is_halved_and_scores_the_same(
    make_pressable: Callable[..., PressableModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
    keeps_losses: bool,
    num_documents: list[int],
) -> None:
    model, requests = make_pressable(), stream_batches()
    whole, num_tokens = outcomes(requests, model)
    assert num_tokens == requests.progress_total == sum(LENGTHS)
    sizes = fails_side_by_side(monkeypatch, after)
    halved = stream_batches(LossFiles(tmp_path, {}) if keeps_losses else None)
    found, num_tokens = outcomes(halved, model)
    assert num_tokens == sum(LENGTHS), "a document that starts again counts once"
    assert sizes == num_documents, "what was saved is not run again, nor is what did not fit"
    for item, outcome in whole.items():
        torch.testing.assert_close(found[item].losses, outcome.losses, atol=1e-4, rtol=0)
        assert (found[item].num_pressed, found[item].max_entries) == (outcome.num_pressed, outcome.max_entries)


def test_documents_that_ended_before_memory_ran_out_have_their_times(
    make_pressable: Callable[..., PressableModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_side_by_side(monkeypatch, 12)  # all but the longest have ended by then
    own, requests = runner(make_pressable()), stream_batches(LossFiles(tmp_path, {}))
    for items in batches(requests, 8, None):
        list(Halving().run(lambda part: requests.run(own, part, lambda count: None), items, requests.length))
    own.meter.finish("loglikelihood_rolling")
    records = own.meter.records
    assert {one.doc_id: one.num_output_tokens for one in records.requests} == {0: 70, 2: 130, 3: 56, 4: 1}
    failed, again = records.batches
    assert (failed.num_output_tokens, again.num_output_tokens) == (70 + 56 + 1 + 12 * PLAN.chunk, 130)
    ended = [one.seconds for one in records.requests if one.doc_id != 2]
    assert sum(ended) == pytest.approx(failed.seconds * (70 + 56 + 1) / failed.num_output_tokens)


def test_an_interrupted_run_has_the_totals_of_an_undisturbed_one(
    make_pressable: Callable[..., PressableModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_pressable()
    undisturbed = stream_batches()
    expected, _ = outcomes(undisturbed, model, size=1)
    with monkeypatch.context() as patch:
        save = LossFiles.save

        def killed_after_one(*arguments: Any) -> None:
            save(*arguments)
            raise KeyboardInterrupt

        patch.setattr(LossFiles, "save", killed_after_one)
        with pytest.raises(KeyboardInterrupt):
            outcomes(stream_batches(LossFiles(tmp_path, {})), model, size=1)
    resumed = stream_batches(LossFiles(tmp_path, {}))
    assert resumed.progress_total == sum(LENGTHS) - max(LENGTHS), "the longest came first and is on disk"
    found, num_tokens = outcomes(resumed, model, size=1)
    assert num_tokens == resumed.progress_total
    assert totals(resumed, found).num_documents_resumed == 1
    assert totals(undisturbed, expected).num_documents_resumed == 0
    assert totals(resumed, found).summary() == totals(undisturbed, expected).summary()
    assert totals(resumed, found).max_stream_entries == PLAN.budget
    assert resumed.answers(found) == undisturbed.answers(expected)


def test_answers_computed_twice_record_nothing(make_pressable: Callable[..., PressableModel]) -> None:
    requests = stream_batches()
    found, _ = outcomes(requests, make_pressable())
    by_task = new_totals()
    requests.record_totals(found, by_task)
    before = by_task["t"].summary()
    first, second = requests.answers(found), requests.answers(found)
    assert first == second and sorted(first) == list(range(len(LENGTHS)))
    assert by_task["t"].summary() == before
    assert before["tokens_scored"] == sum(LENGTHS) == sum(score.num_tokens for score in first.values())
    assert before["tokens_scored_under_press"] == sum(max(0, length - 21) for length in LENGTHS)


def test_a_document_takes_the_entries_of_the_cache_and_not_its_length(
    make_pressable: Callable[..., PressableModel],
) -> None:
    requests = stream_batches()
    items = [item for segment in requests.segments() for item in segment]
    assert [requests.length(item) for item in items] == [0, 27, 27, 27, 1]
    window = StreamPlan(budget=20, chunk=7, num_sinks=4)
    assert window.num_entries(1) == window.num_entries(10_000) == 20 + 7 + 28, "its buffer is there from the start"
    assert [len(batch) for batch in batches(requests, 8, 2 * 27)] == [1, 2, 2]


def test_the_order_of_shares_does_not_depend_on_what_is_finished(tmp_path: Path) -> None:
    """Shards share the documents out by it, also one that goes on after a kill."""

    def order(requests: StreamBatches) -> list[int]:
        return [requests.identity(item)[0].id.doc_id for item in requests.longest_first()]

    assert order(stream_batches()) == [2, 0, 3, 4], "longest first, and nothing without tokens"
    fresh = stream_batches(LossFiles(tmp_path, {}))
    for item in fresh.longest_first()[1:3]:
        fresh.save(item, Streamed((1.0,) * fresh.num_tokens(item)))
    resumed = stream_batches(LossFiles(tmp_path, {}))
    assert order(resumed) == order(fresh) and [id.doc_id for id in resumed.ids_stored] == [0, 3]
    assert [len(outcome.losses) for outcome in resumed.stored.values()] == [70, 56, 0]
