"""The sweep's command line: bad input is one line before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from lm_eval_kvpress import cli
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.sweep import command

BAD = [
    ({"presses": "none,snapk"}, "did you mean 'snapkv'"),
    ({"ratios": "0.5,1.5"}, "cell knorm_compression_ratio=1.5"),
    ({"ratios": "half"}, "ratios=half must be a number"),
    ({"budgets": "1.5"}, "budgets=1.5 must be a whole number"),
    ({"model_args": "pretrained=x,press=knorm"}, "press is what a sweep varies: give it under presses"),
    ({"model_args": "pretrained=x,compression_ratio=0.5"}, "give it under ratios"),
    ({"model_args": "pretrained=x,throughput_log=x.jsonl"}, "leave throughput_log out"),
    ({"model_args": "pretrained=x,batch_size=4"}, "give it as --batch_size"),
    ({"model_args": "pretrained=x,presss=1"}, "unknown argument 'presss'"),
    ({"rolling": "streams"}, "rolling=streams is not known"),
    ({"rolling": "stream", "presses": "knorm"}, "give --budgets"),
    ({"rolling": "stream", "presses": "none", "ratios": None, "budgets": "64"}, "nothing to run: rolling=stream needs"),
    ({"model": "hf"}, "choose one of pythia-kvpress, kvpress"),
    (
        {"rolling": "stream", "presses": "decoding:knorm", "ratios": None, "budgets": "64"},
        "name the press itself, without decoding",
    ),
    ({"launcher": "slurm"}, "launcher=slurm is not known"),
    ({"include_path": "no-such-folder"}, "include_path=no-such-folder: there is no such folder"),
    ({"tasks": ""}, "a sweep needs tasks"),
    ({"ratios": ""}, "ratios: '' names none: leave it out for the default"),
    ({"budgets": ","}, "budgets: ',' names none"),
    ({"config": "no-such.yaml"}, "no-such.yaml"),
]


@pytest.mark.parametrize(("settings", "says"), BAD, ids=[says for _, says in BAD])
def test_bad_input_is_one_line_before_any_work(
    settings: dict[str, str | None], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"presses": "none,knorm", "ratios": "0.5", "tasks": "t", "output_path": str(tmp_path / "out"), **settings}
    typed = (part for name, value in given.items() if value is not None for part in (f"--{name}", value))
    code = cli.main(["sweep", *typed])
    error = capsys.readouterr().err
    assert code == 2
    assert says in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


def test_several_processes_for_one_sweep_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="a sweep is one process: start it without accelerate or torchrun"):
        command.main(["--presses", "none", "--tasks", "t", "--output_path", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
