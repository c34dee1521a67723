"""Stock ``lm_eval`` with our model: what a user can mend or did is one line on stderr, a status, and no traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.end_to_end

LM_EVAL = str(Path(sys.executable).with_name("lm_eval"))


def command(checkpoint: Path, *, tasks: str = "kvpress_recall", limit: int = 1) -> list[str]:
    model_args = f"pretrained={checkpoint},press=knorm"
    what = ["--tasks", tasks, "--limit", str(limit)]
    return [LM_EVAL, "--model", "kvpress", "--model_args", model_args, "--device", "cpu", *what]


@pytest.mark.parametrize(
    ("output", "line"),
    [
        (">&-", "error: the standard output is closed: leave it open, or have it written to a file"),
        (">/dev/full", "error: No space left on device: make room there, and run the same command again"),
    ],
)
def test_an_output_that_takes_nothing_is_one_line(checkpoint_dir: Path, output: str, line: str) -> None:
    run = ["bash", "-c", f'"$@" {output}', "bash", *command(checkpoint_dir)]
    result = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert result.returncode != 0 and "Traceback" not in result.stderr, result.stderr[-2000:]
    assert result.stderr.splitlines()[-1] == line


def test_ctrl_c_is_one_line(checkpoint_dir: Path) -> None:
    run = command(checkpoint_dir, tasks="kvpress_demo", limit=60)  # goes on for long after its first bar
    process = subprocess.Popen(
        run,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    assert process.stderr is not None
    read = b""
    while b"(press=knorm):" not in read:  # the bar of our requests
        piece = process.stderr.read1(4096)
        assert piece, read[-2000:]
        read += piece
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=120)
    assert process.returncode != 0
    assert b"Traceback" not in read + rest, (read + rest)[-2000:]
    assert rest.decode().splitlines()[-1] == "error: interrupted"


def test_results_that_lm_eval_cannot_save_are_one_line_after_its_figures(checkpoint_dir: Path, tmp_path: Path) -> None:
    """lm-eval itself says so in a warning, which ``--verbosity`` hides, and ends with status 0."""
    (tmp_path / "results").write_text("a file where the folder belongs")
    output = ["--output_path", str(tmp_path / "results"), "--log_samples"]
    result = subprocess.run([*command(checkpoint_dir), *output], capture_output=True, text=True, timeout=300)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr[-2000:]
    assert "|kvpress_recall|" in result.stdout
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: results or samples are not whole on disk (NotADirectoryError(")
    assert result.stderr.count("Could not save") == 2
