"""A worker says with what it answers, so that one with other files is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import safetensors.torch
from statistics_files import NEOX, statistics_file

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.identity import checkpoint_hashes
from lm_eval_kvpress.harness.run_record import versions
from lm_eval_kvpress.harness.statistics import hashes_of_statistics
from lm_eval_kvpress.presses.parse import parse_press
from lm_eval_kvpress.sweep.model import SweepModel
from lm_eval_kvpress.sweep.workers.crew import checker
from lm_eval_kvpress.sweep.workers.worker import Worker


def test_a_worker_that_reads_other_statistics_is_refused(checkpoint_dir: Path, tmp_path: Path) -> None:
    file = Path(shutil.copy(statistics_file("qfilter", NEOX), tmp_path / "statistics.safetensors"))
    presses = [parse_press("qfilter", {"statistics": str(file), "compression_ratio": 0.5}), parse_press("none", {})]
    model = SweepModel(str(checkpoint_dir), device="cpu")
    check = checker(versions(), {**checkpoint_hashes(model.lm), **hashes_of_statistics(presses)})
    check(Worker(model).facts(presses))
    tensors = {name: 2 * tensor for name, tensor in safetensors.torch.load(file.read_bytes()).items()}
    file.write_bytes(safetensors.torch.save(tensors, {"press": "qfilter"}))
    with pytest.raises(UsageError, match=f"differs in statistics {file} .* same packages, checkpoint and statistics"):
        check(Worker(model).facts(presses))
