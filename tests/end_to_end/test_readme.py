"""Commands of the README and the docs run or parse, links lead somewhere, tables are complete, named files exist."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from documentation import commands
from lm_eval.tasks import TaskManager
from lm_eval.utils import simple_parse_args_string
from real_data import DATA
from repository import ROOT
from statistics_files import NEOX, statistics_file
from test_layering import MAY_IMPORT, PACKAGE

from lm_eval_kvpress.cli import COMMANDS
from lm_eval_kvpress.harness import plugin
from lm_eval_kvpress.harness.arguments import ARGUMENTS, parse_arguments
from lm_eval_kvpress.sweep.cells import cells_of
from lm_eval_kvpress.sweep.command import settings_from

PAGES = [
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md"),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "tasks").rglob("README.md")),
]
EXPERIMENTS = ROOT / "docs" / "experiments"


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


ALL = [command for page in PAGES for command in commands(page)]
RUNS = [command for command in ALL if "lm_eval" in command or command[:2] == ["lm-eval-kvpress", "run"]]
STOCK_RUNS = [command for command in RUNS if command[0] == "lm_eval" and "--tasks" in command]
SHOWN_FIRST = [command for page in ("README.md", "docs/usage.md") for command in commands(ROOT / page)]
OFFLINE = [command for command in STOCK_RUNS if "builtin" in " ".join(command) and command in SHOWN_FIRST]


@functools.cache
def known_tasks() -> frozenset[str]:
    """lm-eval's index takes a dozen seconds."""
    return frozenset(TaskManager(include_path=str(plugin.tasks_path())).all_tasks)


def test_the_docs_show_offline_and_hub_runs() -> None:
    assert len(OFFLINE) >= 2
    assert len(STOCK_RUNS) > len(OFFLINE)


def test_the_readme_is_short_and_runs_something() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 130
    assert any(command in OFFLINE for command in commands(ROOT / "README.md"))


@pytest.mark.parametrize("command", RUNS, ids=lambda command: command[command.index("--model_args") + 1])
def test_model_arguments_and_tasks_of_the_docs_exist(command: list[str]) -> None:
    arguments = simple_parse_args_string(option(command, "--model_args"))
    arguments.pop("pretrained", None)
    if "statistics" in arguments:  # a file that the command before it writes
        arguments["statistics"] = statistics_file(arguments["press"], NEOX)
    parse_arguments(arguments)
    if "--include_path" in command:
        return  # of the guide's own task, which test_guides.py runs
    for task in option(command, "--tasks").split(","):
        assert task in known_tasks(), task


@pytest.mark.parametrize("command", OFFLINE, ids=lambda command: command[command.index("--tasks") + 1])
def test_offline_commands_of_the_docs_run(command: list[str], tmp_path: Path) -> None:
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
        [str(executable), *command[1:], "--limit", "1"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|" in done.stdout
    assert re.search(r"press=\w+ kept \d+\.\d %", done.stderr), "the screen says what was kept"


@pytest.mark.parametrize("page", ["README.md", "docs/cli.md", "docs/sweep.md"])
def test_sweeps_of_the_docs_have_cells(page: str) -> None:
    sweeps = [command for command in commands(ROOT / page) if command[:2] == ["lm-eval-kvpress", "sweep"]]
    assert sweeps
    for command in sweeps:
        assert len(cells_of(settings_from(command[2:]))) > 1


def test_commands_of_the_docs_are_commands_of_ours() -> None:
    named = {command[1] for command in ALL if command[0] == "lm-eval-kvpress"}
    assert named == set(COMMANDS)


def test_every_model_argument_stands_in_the_table() -> None:
    rows = [line for line in (ROOT / "docs" / "arguments.md").read_text(encoding="utf-8").splitlines() if "|" in line]
    first_cells = " ".join(row.split("|")[1] for row in rows)
    for name in ARGUMENTS:
        assert f"`{name}`" in first_cells, f"{name} is missing in the table of model arguments"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        on_github = target.startswith(("http", "../../actions/"))
        assert on_github or (page.parent / target).exists(), target


def test_make_targets_of_the_docs_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in ALL:
        if command[0] == "make" and "=" not in command[1]:
            assert re.search(rf"^{command[1]}:", makefile, re.MULTILINE), command


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_that_the_docs_name_exist(page: Path) -> None:
    text, folders = page.read_text(encoding="utf-8"), "scripts|tests|tasks|docs|lm_eval_kvpress"
    named = re.findall(rf"\b(?:{folders})/[\w./-]+\.(?:py|md|yaml|json)\b", text)
    named += [f"{module.replace('.', '/')}.py" for module in re.findall(r"python -m (scripts[\w.]+)", text)]
    runnable = [name for name in named if not (ROOT / name.removesuffix(".py") / "__main__.py").is_file()]
    assert [name for name in runnable if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_modules_that_the_docs_name_exist(page: Path) -> None:
    """``harness/plugin`` is a module of the package, or mirrors one in the tests."""
    packages = "|".join(name for name in MAY_IMPORT if (PACKAGE / name).is_dir())
    named = re.findall(rf"(?<![\w/.])((?:{packages})/[\w/]*\w)", page.read_text(encoding="utf-8"))
    modules = [name for name in named if not (PACKAGE / name).is_dir()]
    assert [name for name in modules if not (PACKAGE / f"{name}.py").is_file()] == []


def test_packages_of_the_architecture_are_those_that_may_be_imported() -> None:
    """Each arrow of the first picture is an import that the layering allows, and every package is a row."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = text.split("```mermaid")[1].split("```")[0]
    arrows = [line.split("-->") for line in picture.splitlines() if "-->" in line]
    for users, used in arrows:
        for user in re.findall(r"\w+", users):
            assert set(re.findall(r"\w+", used)) <= MAY_IMPORT[user], (user, used)
    packages = [name for name in MAY_IMPORT if (PACKAGE / name).is_dir()]
    assert [name for name in packages if f"| `{name}/` |" not in text] == []


def test_every_experiment_is_in_the_index_and_has_its_four_parts() -> None:
    index = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
    pages = [path for path in EXPERIMENTS.glob("*.md") if path.name != "README.md"]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        question = text.splitlines()[0].removeprefix("# ")
        assert f"[{question}]({page.name})" in index, f"{page.name}: the index has another question"
        parts = re.findall(r"^## (.*)$", text, re.MULTILINE)
        assert parts == ["Question", "Setup", "Result", "Decision"], page.name
