"""What is submitted to Slurm: an array of shards, and a merge that starts after it. Slurm itself is not there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.sweep.settings import parse_settings

pytest.importorskip("submitit", reason="needs submitit: pip install 'lm-eval-kvpress[slurm]'")

GIVEN = {"presses": "none", "tasks": "t", "launcher": "submitit"}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands of Slurm that keep what they are given."""
    folder = tmp_path / "bin"
    folder.mkdir()
    sbatch = f'#!/bin/sh\ncat "$1" > "{folder}/$(ls {folder} | wc -l).sh"\necho Submitted batch job 77\n'
    for name, text in (("sbatch", sbatch), ("srun", "#!/bin/sh\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return folder


def test_an_array_and_a_merge_after_it_are_submitted(slurm: Path, tmp_path: Path) -> None:
    from lm_eval_kvpress.sweep.launchers.slurm_jobs import submit

    options = "partition=a100,time=02:00:00,gpus_per_node=2"
    lines = submit(parse_settings({**GIVEN, "workers": 3, "slurm": options, "output_path": str(tmp_path / "out")}))
    array, merge = (file.read_text() for file in sorted(slurm.glob("*.sh")))
    for line in ("--partition=a100", "--time=02:00:00", "--gpus-per-node=2", "--array=0-2%3"):
        assert f"#SBATCH {line}\n" in array, array
    assert "#SBATCH --dependency=afterany:77\n" in merge and "--array" not in merge, merge
    assert "3 shards are jobs 77_0 to 77_2" in lines[0] and "merge is job 77" in lines[1]


def test_each_job_has_the_settings_and_a_worker_for_each_of_its_gpus(tmp_path: Path, monkeypatch: Any) -> None:
    from lm_eval_kvpress.sweep.launchers import slurm_jobs, slurm_part

    commands = list[list[str]]()

    class Done:
        returncode = 0

    def note(command: list[str]) -> Done:
        file = Path(command[command.index("--config") + 1])
        from lm_eval_kvpress.sweep.command import settings_from

        settings = settings_from(["--config", str(file)])
        assert (settings.launcher, settings.workers, settings.slurm, settings.fidelity) == ("local", 8, None, True)
        commands.append(command[command.index("--config") + 2 :])
        return Done()

    monkeypatch.setattr(slurm_part.subprocess, "run", note)
    settings = parse_settings(
        {**GIVEN, "workers": 2, "fidelity": True, "slurm": "gpus_per_node=8", "output_path": str(tmp_path / "out")}
    )
    slurm_jobs.part_of(settings)(["--shard", "1/2"])
    assert commands == [["--shard", "1/2"]]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("partition=a", "slurm needs time=HH:MM:SS or timeout_min=N"),
        ("time=1:00:00,colour=red", "slurm: .*Unknown argument 'colour'"),
        ("cluster=moon", "slurm: AutoExecutor doesn't know any executor named moon"),
    ],
)
def test_what_submitit_does_not_take_is_one_line(options: str, says: str, slurm: Path, tmp_path: Path) -> None:
    from lm_eval_kvpress.sweep.launchers.slurm_jobs import submit

    with pytest.raises(UsageError, match=says):
        submit(parse_settings({**GIVEN, "slurm": options, "output_path": str(tmp_path / "out")}))
    assert not list(slurm.glob("*.sh"))


def test_the_process_that_waits_for_a_shard_imports_no_model() -> None:
    """submitit starts it on every node, before the command itself."""
    code = (
        "import sys, lm_eval_kvpress.sweep.launchers.slurm_part; print(sorted({'torch', 'lm_eval'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    assert found.stdout == "[]\n"
