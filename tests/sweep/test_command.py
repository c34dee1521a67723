"""The sweep's command line: bad input is one line before any work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lm_eval_kvpress import cli
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.sweep import command
from lm_eval_kvpress.sweep.shards.shard import OF_ARRAY, Shard

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
    ({"workers": "0"}, "workers=0 must be at least 1"),
    ({"slurm": "time=60"}, "slurm is for --launcher submitit, and the launcher is local"),
    ({"ray_address": "auto"}, "ray_address is for --launcher ray, and the launcher is local"),
    ({"shard": "5/4"}, "shard=5/4: give I/N with I from 1 to N"),
    ({"shard": "auto"}, "shard=auto needs the variables that Slurm sets in an array"),
    ({"include_path": "no-such-folder"}, "include_path=no-such-folder: there is no such folder"),
    ({"tasks": ""}, "a sweep needs tasks"),
    ({"ratios": ""}, "ratios: '' names none: leave it out for the default"),
    ({"budgets": ","}, "budgets: ',' names none"),
    ({"config": "no-such.yaml"}, "no-such.yaml"),
    ({"presses": "none"}, "ratios=0.5: no press of this sweep takes one; name presses that do"),
    ({"presses": "none", "ratios": None, "budgets": "64"}, "budgets=64: no press of this sweep takes one"),
    ({"samples": '{"t": [0]}', "limit": "3"}, "samples and limit both choose documents"),
    ({"samples": '{"t": "0"}'}, "samples: t needs a list of whole numbers"),
    ({"samples": '{"t": [-1]}'}, "samples: t needs a list of whole numbers"),
    ({"samples": "no-such.json"}, "--samples no-such.json cannot be read"),
    ({"samples": "[0, 1]"}, "--samples [0, 1] cannot be read"),
    ({"fewshot_as_multiturn": "true"}, "fewshot_as_multiturn needs a chat template"),
    ({"wandb_args": "project=p"}, "wandb_args needs wandb"),
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
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match="a sweep starts its own processes: start it without accelerate or torchrun"):
        command.main(["--presses", "none", "--tasks", "t", "--output_path", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


VARIABLES_OF_A_SHELL = {"WORLD_SIZE": "4", "SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_ARRAY_TASK_ID": "3"}


def test_variables_that_a_shell_sets_leave_a_sweep_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On an interactive node, say: neither other processes nor an array are really there."""
    for name, value in VARIABLES_OF_A_SHELL.items():
        monkeypatch.setenv(name, value)
    parts = list[object]()
    monkeypatch.setattr(command, "_run", lambda settings, cells, part: parts.append(part))
    assert command.main(["--presses", "none", "--tasks", "t", "--output_path", str(tmp_path / "out")]) == 0
    assert parts == ["all"] and "WORLD_SIZE" not in os.environ
    (record,) = caplog.records
    assert record.getMessage() == "WORLD_SIZE=4 is set without a RANK, and is left out of account: this is one process"


@pytest.mark.parametrize(("given", "part"), [([], Shard(2, 3)), (["--shard", "none"], "all"), (["--merge"], "merge")])
def test_a_task_of_an_array_answers_its_share_and_says_so(
    given: list[str], part: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in zip(OF_ARRAY, (8, 7, 1, 3, 0, 2), strict=True):
        monkeypatch.setenv(name, str(value))
    parts = list[object]()
    monkeypatch.setattr(command, "_run", lambda settings, cells, part: parts.append(part))
    assert command.main(["--presses", "none", "--tasks", "t", "--output_path", "o", *given]) == 0
    assert parts == [part]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (not given) and all(
        "task 2/3 of an array of Slurm: it answers that share" in line for line in lines
    )


def test_a_pipe_in_place_of_a_file_is_one_line(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    given = ["--presses", "none", "--tasks", "t", "--output_path", "o"]
    for argument in ("--config", "--samples"):
        with pytest.raises(UsageError, match=f"{argument} .*pipe is a pipe: name a file"):
            command.main([*given, argument, str(pipe)])


def test_names_in_a_list_may_be_typed_with_spaces() -> None:
    typed = ["--presses", " none, knorm ", "--ratios", "0.5, 0.75", "--tasks", "a, b", "--output_path", "o"]
    settings = command.settings_from(typed)
    assert (settings.presses, settings.ratios, settings.tasks) == (["none", "knorm"], [0.5, 0.75], ["a", "b"])


def test_flags_are_typed_as_those_of_lm_eval() -> None:
    given = ["--presses", "none", "--tasks", "t", "--output_path", "o"]
    plain = command.settings_from(given)
    assert (plain.apply_chat_template, plain.chats_in_turns, plain.predict_only) == (False, False, False)
    chat = command.settings_from([*given, "--apply_chat_template", "--predict_only", "--trust_remote_code"])
    assert (chat.apply_chat_template, chat.chats_in_turns, chat.predict_only) == (True, True, True)
    assert chat.trust_remote_code
    named = command.settings_from([*given, "--apply_chat_template", "rag", "--fewshot_as_multiturn", "false"])
    assert (named.apply_chat_template, named.chats_in_turns) == ("rag", False)
    for other in (chat, named):
        assert other.shared != plain.shared, "cells of another prompt are never mixed"
