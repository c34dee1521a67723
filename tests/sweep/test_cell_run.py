"""What a cell's own prefills cost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from lm_eval_kvpress.records.timings import RunLabels
from lm_eval_kvpress.sweep.cell_run import CellRun
from lm_eval_kvpress.sweep.workers.jobs import WorkerFacts


@pytest.mark.parametrize(("shares", "tokens"), [(False, 7), (True, 0)])
def test_prefills_of_earlier_calls_and_shared_ones_are_not_this_calls_own(shares: bool, tokens: int) -> None:
    batches = [SimpleNamespace(num_prefill_tokens=count) for count in (100, 3, 4)]
    meter = SimpleNamespace(records=SimpleNamespace(batches=batches))
    runner: Any = SimpleNamespace(meter=meter, compressor=SimpleNamespace(shares=shares))
    nothing: Any = None
    session: Any = SimpleNamespace(runner=runner)
    run = CellRun(nothing, session, nothing, nothing, num_batches_before=1)
    assert run.num_tokens_prefilled == tokens


def test_the_times_of_a_cell_are_those_of_the_first_workers_machine() -> None:
    def facts(gpu: str | None, device: str) -> WorkerFacts:
        machine = {"cpu": "Some CPU", "num_threads": 4, "memory_bytes": 2**30, "gpu": gpu}
        return WorkerFacts("host", {}, {}, None, {"device": device, "machine": machine})

    labels = RunLabels("r", "m", "knorm", "", "", "cpu", "float32", "cpu; 2 threads of Some CPU")
    meter, nothing = SimpleNamespace(labels=labels), cast(Any, None)
    session: Any = SimpleNamespace(runner=SimpleNamespace(meter=meter), num_ranks=1)
    run = CellRun(nothing, session, nothing, nothing)
    run.note_workers([])
    assert (session.num_ranks, meter.labels) == (1, labels), "this process answers"
    run.note_workers([facts("H100", "cuda:0"), facts("A100", "cuda:1")])
    assert (session.num_ranks, meter.labels.device) == (2, "cuda:0")
    assert meter.labels.machine == "H100; 4 threads of Some CPU"
    run.note_workers([facts(None, "mps")])
    assert meter.labels.machine == "mps; 4 threads of Some CPU"
