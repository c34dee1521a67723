"""What the guides and reference pages show works as it stands there: files, programs, tables of options."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import references
import torch
from documentation import commands, first_program, titled_blocks
from references import NeoxReference, distinct_tokens, kept_by_press, largest_difference
from repository import ROOT
from transformers import GPTNeoXForCausalLM

from lm_eval_kvpress import cli
from lm_eval_kvpress.engine import scoring
from lm_eval_kvpress.engine.prefill import prefill
from lm_eval_kvpress.engine.scoring import Pack
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses import catalog, names
from lm_eval_kvpress.presses.parse import parse_press

DOCS = ROOT / "docs"


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_the_own_task_runs_and_its_results_fit_the_schema(tmp_path: Path) -> None:
    for name, content in titled_blocks(DOCS / "guides/own_task.md").items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    [command] = commands(DOCS / "guides/own_task.md")
    done = run([str(Path(sys.executable).with_name(command[0])), *command[1:]], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|my_facts|" in done.stdout
    assert "my_facts: press=knorm kept" in done.stderr
    [results] = (tmp_path / "results").rglob("results_*.json")
    shutil.copy(results, tmp_path / "results.json")
    (tmp_path / "docs").mkdir()
    shutil.copy(DOCS / "results.schema.json", tmp_path / "docs")
    checked = run([sys.executable, "-c", first_program(DOCS / "results_schema.md")], tmp_path)
    assert checked.returncode == 0, checked.stderr[-2000:]


def test_the_program_of_the_python_api_runs(tmp_path: Path) -> None:
    done = run([sys.executable, "-c", first_program(DOCS / "api.md")], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "snapkv, compression_ratio=0.75 kept 25% of" in done.stdout and "Score(continuation=' The'" in done.stdout
    assert (tmp_path / "kept.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_the_press_of_the_guide_keeps_the_newest_and_is_scored_as_a_dense_forward(
    make_neox: Callable[..., GPTNeoXForCausalLM],
    make_pressable: Callable[..., PressableModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = titled_blocks(DOCS / "guides/write_press.md")
    namespace: dict[str, Any] = {"Row": catalog.Row, "Reads": catalog.Reads}
    exec(shown["recent.py"], namespace)
    monkeypatch.setattr(names, "ROWS", {**catalog.ROWS, "recent": eval(shown["row"], namespace)})
    spec = parse_press("recent", {"compression_ratio": 0.75})
    monkeypatch.setitem(references.PRESSES, "recent", lambda: spec.build(52))
    tokens, model = distinct_tokens(64, 211, 3), make_pressable()
    context, continuation = tokens[:53], tuple(tokens[53:])
    evicted = kept_by_press(model, context[:52], "recent")
    assert evicted.hidden[:, :, :39].all() and not evicted.hidden[:, :, 39:].any()
    cache = prefill(model, torch.tensor([context[:52]]), spec.build(52))
    [[scored]] = scoring.score(model, cache, [Pack((context[52],), (continuation,))])
    dense = NeoxReference(make_neox()).token_logprobs(context, list(continuation), evicted, 52)
    assert largest_difference(scored.logprobs, dense) < 2e-5


@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if name != "run"])
def test_options_of_a_command_are_those_of_its_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`run` is lm-eval's own."""
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    printed = set(re.findall(r"^ +(?:-\w(?: \w+)?, )?(--[a-z][\w-]*)", capsys.readouterr().out, re.MULTILINE))
    section = (DOCS / "cli.md").read_text(encoding="utf-8").split(f"\n## {command}\n")[1].split("\n## ")[0]
    rows = "".join(line for line in section.splitlines() if line.startswith("| `-"))
    listed = {*re.findall(r"--[a-z][\w-]*", rows), "--help"}
    assert printed == listed, f"missing: {printed - listed}; not an option: {listed - printed}"
