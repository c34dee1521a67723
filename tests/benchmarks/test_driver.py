"""Workers that sleep answer every job once, in the form of a model's answers, through the pipes of real workers."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from lm_eval_kvpress.sweep.cell_store import CellStore
from lm_eval_kvpress.sweep.cells import Cell
from lm_eval_kvpress.sweep.model import SweepModel

pytest.importorskip("ray", reason="needs Ray: pip install 'lm-eval-kvpress[ray]'")

from scripts.benchmarks.driver import _measure, markdown  # noqa: E402

ARGUMENTS = argparse.Namespace(jobs=5, batch_size=2, num_tokens=20, sleep=0.001)


@pytest.mark.parametrize("transport", ["processes", pytest.param("ray", marks=pytest.mark.xdist_group("ray"))])
def test_every_answer_is_stored_once(transport: str, checkpoint_dir: Path, tmp_path: Path) -> None:
    cells = [Cell(name, {"press": name}) for name in ("none", "knorm")]
    model = SweepModel(str(checkpoint_dir), device="cpu")
    runs = [model.open(cell, CellStore(tmp_path / cell.folder)) for cell in cells]
    found = _measure(ARGUMENTS, transport, 3, model, runs)
    assert found["num_messages"] == 8 * len(cells), "a job per worker and five more, one message per cell"
    parts = ("storing_ms_per_message", "receiving_ms_per_message", "sending_ms_per_message")
    assert all(found[part] > 0 for part in parts) and sum(found[part] for part in parts) < 1000 * found["seconds"] / 16
    for run in runs:
        assert len(run.store.answers.outcomes()) == 8 * ARGUMENTS.batch_size and not run.store.answers.damage()
        assert len(run.session.runner.meter.records.requests) == 8 * ARGUMENTS.batch_size
        run.log.close()
    assert f"| {transport} | 3 |" in markdown([found])
