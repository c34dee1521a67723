"""What measuring costs is taken out of the model whole, and changes no answer."""

from __future__ import annotations

import argparse
from pathlib import Path

from scripts.benchmarks.log_overhead import KINDS, NoClock, NoMeter, Taken, _models, _requests, figures


def test_a_model_without_a_clock_answers_the_same_and_records_nothing(checkpoint_dir: Path, tmp_path: Path) -> None:
    arguments = argparse.Namespace(pretrained=str(checkpoint_dir), press="knorm", batch_size=2)
    models = _models(arguments, tmp_path)
    assert tuple(models) == KINDS
    (_, documents, _) = _requests(4)
    answers = {kind: lm.loglikelihood_rolling(documents, disable_tqdm=True) for kind, lm in models.items()}
    assert answers["without clock"] == answers["without log"] == answers["with log"]
    runner = models["without clock"].session.runner
    assert isinstance(runner.clock, NoClock) and isinstance(runner.meter, NoMeter)
    assert not runner.meter.records.batches and models["without log"].session.runner.meter.records.batches
    assert (tmp_path / "log.jsonl").stat().st_size > 0


def test_ratios_are_those_of_a_round() -> None:
    found = [
        dict(zip(KINDS, (Taken(2.0 * slow, 3.0), Taken(1.0 * slow, 3.0), Taken(4.0 * slow, 1.0)), strict=True))
        for slow in (1, 9)
    ]
    ratios = figures(found)
    assert ratios["wall: with log / without log"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert ratios["cpu: with log / without clock"]["median"] == 3.0
