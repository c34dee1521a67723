"""The README's commands run (or, where they need the hub, parse), its links lead somewhere, its table is complete."""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager
from lm_eval.utils import simple_parse_args_string
from real_data import DATA
from repository import ROOT

from lm_eval_kvpress.harness import plugin
from lm_eval_kvpress.harness.arguments import ARGUMENTS, parse_arguments
from lm_eval_kvpress.sweep.cells import parse_settings

README = (ROOT / "README.md").read_text()


def commands() -> list[list[str]]:
    """The indented command lines, continuations joined, comments dropped."""
    block = "\n".join(line[4:] for line in README.splitlines() if line.startswith("    "))
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if shlex.split(line, comments=True)]


EVALUATIONS = [command for command in commands() if command[0] == "lm_eval"]
OFFLINE = [command for command in EVALUATIONS if "builtin" in " ".join(command)]


@functools.cache
def known_tasks() -> frozenset[str]:
    """lm-eval's index takes a dozen seconds."""
    return frozenset(TaskManager(include_path=str(plugin.tasks_path())).all_tasks)


def test_the_readme_shows_offline_and_hub_runs() -> None:
    assert len(OFFLINE) >= 2
    assert len(EVALUATIONS) > len(OFFLINE)


@pytest.mark.parametrize("command", EVALUATIONS, ids=lambda command: command[command.index("--model_args") + 1])
def test_model_arguments_and_tasks_of_the_readme_exist(command: list[str]) -> None:
    arguments = simple_parse_args_string(command[command.index("--model_args") + 1])
    arguments.pop("pretrained", None)
    parse_arguments(arguments)
    for task in command[command.index("--tasks") + 1].split(","):
        assert task in known_tasks(), task


@pytest.mark.parametrize("command", OFFLINE, ids=lambda command: command[command.index("--tasks") + 1])
def test_offline_commands_of_the_readme_run(command: list[str]) -> None:
    if "--metadata" in command:
        if not DATA.is_dir():
            pytest.skip("no real texts beside the repository")
        command = [part.replace("path/to/data", str(DATA)) for part in command]
        # One short page and a short stretch of one book; the command as it stands reads everything.
        command[command.index("--metadata") + 1] = f'{{"data_dir": "{DATA}", "max_tokens": 1200}}'
    executable = Path(sys.executable).with_name("lm_eval")
    if not executable.is_file():
        pytest.skip("lm_eval is not installed beside this interpreter")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [str(executable), *command[1:], "--limit", "1"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|" in done.stdout
    assert re.search(r"press=\w+ kept \d+\.\d %", done.stderr), "the screen says what was kept"


def test_sweeps_of_the_readme_have_cells() -> None:
    sweeps = [command for command in commands() if command[:2] == ["lm-eval-kvpress", "sweep"]]
    assert sweeps
    for command in sweeps:
        assert len(parse_settings(command[2:]).cells()) > 1


def test_every_model_argument_stands_in_the_table() -> None:
    for name in ARGUMENTS:
        assert f"`{name}`" in README, f"{name} is missing in the table of model arguments"


def test_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in commands():
        if command[0] == "make":
            assert re.search(rf"^{command[1]}:", makefile, re.MULTILINE), command
