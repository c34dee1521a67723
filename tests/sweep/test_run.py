"""Sweeps: every cell equals the run of that cell alone, a killed sweep goes on, and nothing is computed twice."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import lm_eval
import pytest
from lm_eval.utils import sanitize_list
from repository import ROOT
from sweep_runs import (
    DATA,
    KINDS,
    PRESSES,
    Killed,
    assert_same,
    command_line,
    dies_once,
    figures,
    manager,
    results_of,
    write_tasks,
)
from transformers import AutoTokenizer

from lm_eval_kvpress.engine.compression import Compressor
from lm_eval_kvpress.engine.shared_prefill import SharedPrefills
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness import run_record
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.records import log_file
from lm_eval_kvpress.records.clock import Clock
from lm_eval_kvpress.records.loss_files import LossFiles
from lm_eval_kvpress.sweep import command, run
from lm_eval_kvpress.sweep.answers import Answers
from lm_eval_kvpress.sweep.cell_store import CellStore


@pytest.fixture(scope="module")
def whole(checkpoint_dir: Path, tasks_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that was not disturbed."""
    output = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "task_manager", lambda settings, cell: manager(settings.include_path))
        assert command.main(command_line(checkpoint_dir, tasks_dir, output)) == 0
    return output


def test_every_cell_equals_the_run_of_that_cell_alone(whole: Path, checkpoint_dir: Path, tasks_dir: Path) -> None:
    """Of each press one ratio: the first of one, the second of the next."""
    found = results_of(whole)
    assert len(found) == 1 + 5 * 2
    for name, (results, samples) in list(found.items())[::2]:
        arguments = results["config"]["model_args"]
        alone = lm_eval.simple_evaluate(
            model=KVPress(batch_size=4, device="cpu", **arguments),
            tasks=[f"sweep_{kind}" for kind in KINDS],
            task_manager=manager(tasks_dir),
        )
        assert figures(results) == pytest.approx(figures(json.loads(json.dumps(alone, default=str))), rel=1e-6), name
        for task, of_task in samples.items():
            for one, other in zip(of_task, alone["samples"][task], strict=True):
                assert one["doc_hash"] == other["doc_hash"]
                if task == "sweep_gen":
                    assert one["resps"] == [list(resp) for resp in other["resps"]], name
                    continue
                pairs = zip(_numbers(one["filtered_resps"]), _numbers(other["filtered_resps"]), strict=True)
                assert all(a == pytest.approx(b, rel=1e-6) for a, b in pairs), (name, task)
        ours, theirs = results["config"]["kvpress"], alone["config"]["kvpress"]
        for key in ("press", "protocol", "dtype", "versions", "attn_implementation", "decoding_steps"):
            assert ours[key] == json.loads(json.dumps(theirs[key])), (name, key)
        for task in ours["tasks"]:
            pressed = ours["tasks"][task]["contexts_pressed"]
            assert pressed == theirs["tasks"][task]["contexts_pressed"], (name, task)
            assert ours["tasks"][task]["notes"] == theirs["tasks"][task]["notes"]


def _numbers(value: Any) -> list[float]:
    if isinstance(value, list | tuple):
        return [number for part in value for number in _numbers(part)]
    return [float({"True": 1, "False": 0}.get(str(value), value))]


def test_cells_differ_and_say_what_they_are(whole: Path) -> None:
    found = results_of(whole)
    rolling = {name: figures(results)["sweep_rolling/word_perplexity,none"] for name, (results, _) in found.items()}
    assert len({f"{value:.9g}" for value in rolling.values()}) == len(rolling), rolling
    for name, (results, _) in found.items():
        about = results["config"]["kvpress"]["sweep"]
        assert about["cell"] == name
        assert about["shares_prefill"] == (not name.startswith("observed_attention"))
        assert about["settings"]["presses"] == PRESSES.split(",")
        assert results["config"]["model"] == "pythia-kvpress"


def test_prefill_tokens_are_run_once(whole: Path) -> None:
    """All cells that share: of each distinct head once, whatever the number of cells. The others each their own."""
    summary = json.loads((whole / "summary.json").read_text())
    (of_none,) = (results for name, (results, _) in results_of(whole).items() if name == "none")
    tasks = of_none["config"]["kvpress"]["tasks"].values()
    booked = sum(task["contexts_unpressed"]["num_tokens"] for task in tasks)
    assert 0 < summary["num_tokens_prefilled_shared"] <= booked
    alone = [
        sum(json.loads(line).get("num_prefill_tokens", 0) for line in log.read_text().splitlines())
        for log in (whole / "cells").glob("observed_attention*/throughput.jsonl")
    ]
    assert alone and summary["num_tokens_prefilled"] == summary["num_tokens_prefilled_shared"] + sum(alone)
    assert (summary["num_cells"], summary["num_cells_run"]) == (11, 11)


def test_a_finished_sweep_computes_nothing_again_and_more_cells_can_be_added(
    checkpoint_dir: Path, tasks_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"presses": "none,knorm", "tasks": "sweep_choice"}
    assert command.main(command_line(checkpoint_dir, tasks_dir, tmp_path, ratios="0.5", **small)) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*/results/*/*")}
    load, loaded = run.load_model, []
    monkeypatch.setattr(run, "load_model", lambda settings: (loaded.append(1), load(settings))[1])
    assert command.main(command_line(checkpoint_dir, tasks_dir, tmp_path, ratios="0.5", **small)) == 0
    assert not loaded
    assert command.main(command_line(checkpoint_dir, tasks_dir, tmp_path, ratios="0.5,0.9", **small)) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(results_of(tmp_path)) == 3


def test_streams_are_cells_too_and_keep_their_losses_by_position(
    checkpoint_dir: Path, tasks_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"presses": "none,streaming_llm,knorm", "rolling": "prefix,stream", "ratios": None, "budgets": "64"}
    model_args = f"pretrained={checkpoint_dir},stream_chunk=16"
    arguments = command_line(
        checkpoint_dir, tasks_dir, tmp_path, **{**settings, "model_args": model_args, "tasks": "sweep_rolling"}
    )
    assert command.main(arguments) == 0
    found = results_of(tmp_path)
    assert set(found) == {
        "none_rolling=prefix",
        "streaming_llm_kv_budget=64_rolling=prefix",
        "knorm_kv_budget=64_rolling=prefix",
        "streaming_llm_stream_budget=64_rolling=stream",
        "knorm_stream_budget=64_rolling=stream",
    }
    assert "no cell is the baseline" not in capsys.readouterr().err
    cell = tmp_path / "cells" / "knorm_stream_budget=64_rolling=stream"
    assert len(list((cell / "stream" / "sweep_rolling").glob("*.csv"))) == 6


DRAWN = """
import random

import datasets

WORDS = "the cold river ran past an old mill where seven grey geese slept".split()
OWN = random.Random(42)  # of the module: lm-eval's seeds do not reach it


def load(**_):
    texts = [" ".join(OWN.choices(WORDS, k=70)) for _ in range(3)]
    return {"test": datasets.Dataset.from_list([{"text": text, "choices": [" a", " b"]} for text in texts])}
"""


def test_all_cells_are_asked_the_same_documents_however_a_task_draws_them(checkpoint_dir: Path, tmp_path: Path) -> None:
    """Two groups of cells: one shares prefills, one does not. RULER's `ruler_cwe` draws as this task does."""
    tasks = write_tasks(tmp_path)
    (tasks / "data.py").write_text(DRAWN)
    settings = {"tasks": "sweep_choice", "presses": "knorm,observed_attention", "ratios": "0.5"}
    assert command.main(command_line(checkpoint_dir, tasks, tmp_path / "out", **settings)) == 0
    hashes = {
        name: [sample["doc_hash"] for sample in samples["sweep_choice"]]
        for name, (_, samples) in results_of(tmp_path / "out").items()
    }
    one, other = hashes.values()
    assert one == other and len(set(one)) == 3


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_record_says_of_how_many_streams_the_times_are_not_known(
    checkpoint_dir: Path, tasks_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: bool
) -> None:
    """Two batches of two documents were timed, by this machine or another one, and the third is streamed now."""
    settings = {"presses": "knorm", "rolling": "stream", "ratios": None, "budgets": "64", "tasks": "sweep_rolling"}
    given = {**settings, "model_args": f"pretrained={checkpoint_dir},stream_chunk=16", "batch_size": 2}
    arguments = command_line(checkpoint_dir, tasks_dir, tmp_path, **given)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        if elsewhere:
            patch.setattr(run_record, "machine_name", lambda facts, device: "another machine")
        dies_once(patch, LossFiles, "save", at=5)
        command.main(arguments)
    assert command.main(arguments) == 0
    ((results, _),) = results_of(tmp_path).values()
    facts = results["config"]["kvpress"]
    num_untimed, num_batches = (4, 2) if elsewhere else (0, 0)
    before = facts["answered_before"]
    assert (before["documents_from_stream_output"], before["batches_on_other_machines"]) == (num_untimed, num_batches)
    assert facts["throughput"]["num_requests"] == 6 - num_untimed, "those that are in the times"
    starts = ["the 4 documents", "documents that were left", "2 batches"] if elsewhere else ["documents that were left"]
    assert all(note.startswith(start) for note, start in zip(before["notes"], starts, strict=True))


def test_unknown_tasks_are_refused_before_the_model_is_loaded(
    checkpoint_dir: Path, tasks_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "load_model", lambda settings: pytest.fail("the model was loaded"))
    with pytest.raises(UsageError, match="unknown task 'sweep_chioce': did you mean 'sweep_choice'"):
        command.main(command_line(checkpoint_dir, tasks_dir, tmp_path, tasks="sweep_gen,sweep_chioce"))
    assert not (tmp_path / "sweep.json").exists(), "the folder is free for the command as it was meant"


@pytest.mark.parametrize("stream", [{"rolling": "stream"}, {"model_args": "rolling=stream,stream_chunk=16"}])
def test_streams_beyond_the_trained_positions_are_refused(
    checkpoint_dir: Path, tasks_dir: Path, tmp_path: Path, stream: dict[str, str]
) -> None:
    """And a protocol of model_args reaches the cells, whichever way it was given."""
    model_args = ",".join([f"pretrained={checkpoint_dir}", *([stream["model_args"]] if "model_args" in stream else [])])
    settings = {**stream, "model_args": model_args, "presses": "knorm", "ratios": None, "budgets": "4096"}
    with pytest.raises(UsageError, match="cell knorm_stream_budget=4096.*exceed the 512 positions"):
        command.main(command_line(checkpoint_dir, tasks_dir, tmp_path, **settings))


@pytest.mark.end_to_end
@pytest.mark.parametrize("seed", range(2))
def test_a_sweep_that_was_killed_goes_on_and_ends_with_the_same_figures(
    whole: Path, checkpoint_dir: Path, tasks_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    draw, add, new_results, calls = random.Random(seed), Answers.add, CellStore.new_results, [0]

    def dying(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *arguments: Any) -> Any:
            calls[0] += 1
            if calls[0] >= limit:
                raise Killed
            return method(self, *arguments)

        return call

    monkeypatch.setattr(Answers, "add", dying(add))
    monkeypatch.setattr(CellStore, "new_results", dying(new_results))
    arguments = command_line(checkpoint_dir, tasks_dir, tmp_path)
    for _ in range(3):
        calls[0], limit = 0, draw.randint(2, 60)
        with pytest.raises(Killed):
            command.main(arguments)
            raise Killed  # it was quicker than its killer
    limit = 10**9
    assert command.main(arguments) == 0
    assert_same(tmp_path, whole)


def test_a_record_says_which_windows_no_requests_time_covers(
    whole: Path, checkpoint_dir: Path, tasks_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, num_calls, num_stored = Answers.add, 0, dict[str, int]()

    def dying(answers: Answers, outcomes: Any) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls > 5:
            raise Killed
        add(answers, outcomes)
        num_stored[answers.file.parent.name] = len(answers.keys())

    arguments = command_line(checkpoint_dir, tasks_dir, tmp_path, presses="none,knorm", ratios="0.5")
    arguments[arguments.index("--tasks") + 1] = "sweep_rolling"
    with monkeypatch.context() as patch:
        patch.setattr(Answers, "add", dying)
        with pytest.raises(Killed):
            command.main(arguments)
    assert command.main(arguments) == 0
    for name, (results, _) in results_of(tmp_path).items():
        record = results["config"]["kvpress"]
        assert record["answered_before"]["windows_from_earlier_calls"] == num_stored[name] > 0
        (note,) = record["answered_before"]["notes"]
        assert note.startswith(f"{num_stored[name]} windows were answered by an earlier call")
    of_whole = [results["config"]["kvpress"]["answered_before"] for results, _ in results_of(whole).values()]
    assert not any(before["windows_from_earlier_calls"] for before in of_whole)


@pytest.mark.parametrize("first", ["another machine", None])
def test_times_of_a_sweep_that_went_on_elsewhere_are_those_of_the_last_machine(
    checkpoint_dir: Path, tasks_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str | None
) -> None:
    """Or on one that the log of the call before does not name."""
    settings = {"presses": "knorm", "ratios": "0.5", "tasks": "sweep_choice", "batch_size": 2}
    arguments = command_line(checkpoint_dir, tasks_dir, tmp_path, **settings)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run_record, "machine_name", lambda facts, device: first or "")
        if first is None:
            of_record = vars
            patch.setattr(
                log_file,
                "vars",
                lambda record: {key: value for key, value in of_record(record).items() if key != "machine"},
                raising=False,
            )
        dies_once(patch, Answers, "add", at=3)
        command.main(arguments)
    assert command.main(arguments) == 0
    ((results, _),) = results_of(tmp_path).values()
    facts, log = results["config"]["kvpress"], (tmp_path / "cells").glob("*/throughput.jsonl")
    batches = [line for file in log for line in map(json.loads, file.open()) if line["record"] == "batch"]
    of_first, of_last = batches[:2], batches[2:]
    assert {line.get("machine") for line in of_first} == {first} and len({line["machine"] for line in of_last}) == 1
    assert facts["throughput"]["num_batches"] == len(of_last) > 0
    assert facts["throughput"]["seconds_total"] == pytest.approx(sum(line["seconds"] for line in of_last))
    assert facts["answered_before"]["batches_on_other_machines"] == len(of_first) == 2
    (note,) = facts["answered_before"]["notes"]
    assert note.startswith("2 batches ran on other machines") and note.endswith(of_last[0]["machine"])
    jsonschema.validate(facts, json.loads((ROOT / "docs" / "results.schema.json").read_text()))


def test_a_cell_that_shares_prefills_has_no_peak_of_memory_and_others_their_own(
    checkpoint_dir: Path, tasks_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for what CUDA says: how many shared prefills are in memory."""
    shared, compressors, in_memory = list[SharedPrefills](), set[Compressor](), list[int]()
    compress, prepare = Compressor.compress, SharedPrefills.__init__

    def new(prefills: SharedPrefills, model: Any) -> None:
        prepare(prefills, model)
        shared.append(prefills)

    def noted(compressor: Compressor, contexts: Any) -> Any:
        compressors.add(compressor)
        return compress(compressor, [replace(context, is_shared=True) for context in contexts])

    def in_use(_: Clock) -> int:
        in_memory.append(sum(len(prefills._places) for prefills in shared))
        return 1 + in_memory[-1]

    monkeypatch.setattr(SharedPrefills, "__init__", new)
    monkeypatch.setattr(Compressor, "compress", noted)
    monkeypatch.setattr(Clock, "_peak_memory_bytes", in_use)
    settings = {"presses": "knorm,observed_attention", "ratios": "0.5,0.75", "tasks": "sweep_choice"}
    assert command.main(command_line(checkpoint_dir, tasks_dir, tmp_path, **settings)) == 0
    peaks = {name: facts["config"]["kvpress"]["throughput"] for name, (facts, _) in results_of(tmp_path).items()}
    assert {name: of_cell["peak_memory_bytes"] for name, of_cell in peaks.items()} == {
        name: 1 if name.startswith("observed_attention") else None for name in peaks
    }
    assert in_memory and len(peaks) == 4
    kept = [one._latest for one in compressors if not one.shares]
    assert len(kept) == 2 and kept.count(None) == 1, "what a cell keeps for its next batch goes with the next cell"


def test_damaged_answers_are_named_in_one_line_and_made_again(
    whole: Path, checkpoint_dir: Path, tasks_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    def dying(self: CellStore) -> Path:
        raise Killed

    arguments = command_line(checkpoint_dir, tasks_dir, tmp_path, presses="none,knorm", ratios="0.5")
    with monkeypatch.context() as patch:
        patch.setattr(CellStore, "finish", dying)
        with pytest.raises(Killed):
            command.main(arguments)
    file = tmp_path / "cells" / "knorm_compression_ratio=0.5" / "answers.sqlite"
    file.write_bytes(b"not a database, for long enough that it is no empty one" * 99)
    capfd.readouterr()
    assert command.main(arguments) == 0
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "is damaged" in line]
    assert line == f"{file} is damaged (DatabaseError: file is not a database): its answers are made again"
    assert_same(tmp_path, whole, some_cells=True)
    finished = (
        results["config"]["kvpress"]["throughput"]["num_requests"] for results, _ in results_of(tmp_path).values()
    )
    assert len(set(finished)) == 1, "the records of the dropped answers went with them"


TASK = """
task: corrected
test_split: test
output_type: generate_until
doc_to_text: text
doc_to_target: text
generation_kwargs: {until: [" the"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
custom_dataset: !function data.load
"""


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("corrected.yaml", '" the"', '"zzzz"', "corrected (generation_kwargs)"),
        ("corrected.yaml", "exact_match", "acc", "corrected (metric_list)"),
        ("data.py", "seven grey geese", "eight grey geese", "corrected (custom_dataset, documents)"),
    ],
)
def test_a_task_that_was_corrected_is_never_mixed_with_what_it_was(
    checkpoint_dir: Path, tmp_path: Path, file: str, old: str, new: str, says: str
) -> None:
    """Neither in a sweep that was killed nor in one whose first cells are finished."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "data.py").write_text(DATA)
    (folder / "corrected.yaml").write_text(TASK)
    settings = {"tasks": "corrected", "presses": "knorm", "ratios": "0.5"}
    assert command.main(command_line(checkpoint_dir, folder, tmp_path / "out", **settings)) == 0
    text = (folder / file).read_text()
    (folder / file).write_text(text.replace(old, new))
    with pytest.raises(UsageError) as caught:
        command.main(command_line(checkpoint_dir, folder, tmp_path / "out", **settings | {"ratios": "0.5,0.9"}))
    assert f"since then changed: {says}: choose another folder" in str(caught.value)
    (folder / file).write_text(text)
    assert command.main(command_line(checkpoint_dir, folder, tmp_path / "out", **settings)) == 0


def test_finished_results_that_were_damaged_are_made_again(
    whole: Path, checkpoint_dir: Path, tasks_dir: Path, tmp_path: Path, capfd: Any
) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (file,) = tmp_path.glob("cells/knorm_compression_ratio=0.5/results/*/samples_sweep_gen_*.jsonl")
    os.truncate(file, file.stat().st_size // 2)
    assert command.main(command_line(checkpoint_dir, tasks_dir, tmp_path)) == 0
    error = capfd.readouterr().err
    assert f"{file}: gone or damaged since the cell was finished; the cell is made again" in error
    assert "11 cells, 10 of them finished before" in error
    assert_same(tmp_path, whole)


def test_results_that_lm_eval_cannot_write_end_the_sweep_and_its_answers_stay(
    whole: Path, checkpoint_dir: Path, tasks_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval's tracker swallows the error, and its results are a part or nothing."""
    arguments = command_line(checkpoint_dir, tasks_dir, tmp_path, presses="none,knorm,observed_attention", ratios="0.5")
    write_text = Path.write_text

    def full(self: Path, text: str, *arguments: Any, **options: Any) -> int:
        if not self.name.startswith("results_"):
            return write_text(self, text, *arguments, **options)
        write_text(self, text[: len(text) // 2])
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(UsageError, match=r"cannot be written \(OSError.*No space left .*0 of 3 cells are finished"):
            command.main(arguments)
    assert not list(tmp_path.glob("cells/*/results")) and len(list(tmp_path.glob("cells/*/answers.sqlite"))) == 2
    assert command.main(arguments) == 0
    assert_same(tmp_path, whole, some_cells=True)


def test_prompts_and_documents_are_chosen_as_lm_eval_chooses_them(
    checkpoint_dir: Path, tasks_dir: Path, tmp_path: Path
) -> None:
    """Of a chat template, a system instruction, few-shot turns and documents by number."""
    shutil.copytree(checkpoint_dir, tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chat")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    tokenizer.save_pretrained(tmp_path / "chat")
    chosen = {"num_fewshot": 1, "system_instruction": "be brief", "apply_chat_template": True}
    samples = {"sweep_gen": [1, 4], "sweep_choice": [2]}
    settings = {"tasks": "sweep_gen,sweep_choice", "presses": "none,knorm", "ratios": "0.5"}
    arguments = command_line(
        *(tmp_path / "chat", tasks_dir, tmp_path / "out"),
        **settings,
        **{**chosen, "num_fewshot": 1, "samples": json.dumps({task: ids[::-1] for task, ids in samples.items()})},
    )
    arguments.remove("True")  # the flag is typed without a value
    assert command.main([*arguments, "--predict_only"]) == 0
    alone = lm_eval.simple_evaluate(
        model=KVPress(pretrained=str(tmp_path / "chat"), batch_size=4, device="cpu"),
        tasks=list(samples),
        task_manager=manager(tasks_dir),
        samples=samples,
        predict_only=True,
        fewshot_as_multiturn=True,
        **chosen,
    )
    for name, (results, of_cell) in results_of(tmp_path / "out").items():
        assert results["system_instruction"] == "be brief" and results["chat_template"] == tokenizer.chat_template
        assert results["fewshot_as_multiturn"] is True
        for task in samples:
            assert figures(results).keys() == figures(alone).keys()
            for ours, theirs in zip(of_cell[task], alone["samples"][task], strict=True):
                for key in ("doc_id", "doc_hash", "prompt_hash"):
                    assert ours[key] == theirs[key], (name, key)
                assert "<system>be brief" in ours["arguments"]["gen_args_0"]["arg_0"]
                if name == "none":
                    assert ours["resps"] == json.loads(json.dumps(sanitize_list(theirs["resps"]))), task


def test_a_chat_template_that_is_not_there_is_one_line(checkpoint_dir: Path, tasks_dir: Path, tmp_path: Path) -> None:
    arguments = command_line(checkpoint_dir, tasks_dir, tmp_path, tasks="sweep_gen", presses="none", ratios=None)
    with pytest.raises(UsageError, match="apply_chat_template: the tokenizer of .* has no chat template"):
        command.main([*arguments, "--apply_chat_template"])


@pytest.mark.slow
def test_ten_real_kills_at_random_moments(checkpoint_dir: Path, tasks_dir: Path, whole: Path, tmp_path: Path) -> None:
    """Real SIGKILLs of a real process, spread over its working time."""
    code = (
        "import sys; from lm_eval.tasks import TaskManager; from lm_eval_kvpress.sweep import command, run\n"
        "run.task_manager = lambda s, c: TaskManager(include_path=s.include_path, include_defaults=False)\n"
        "print('ready', flush=True); sys.exit(command.main(sys.argv[1:]))"
    )
    draw, kills, folder = random.Random(0), 0, tmp_path / "0"
    while kills < 10 or not (folder / "summary.json").exists():
        if (folder / "summary.json").exists():  # done before the tenth kill: once more from the start
            assert_same(folder, whole)
            folder = tmp_path / str(kills)
        arguments = [sys.executable, "-c", code, *command_line(checkpoint_dir, tasks_dir, folder)]
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout is not None
        process.stdout.readline()
        if kills < 10:
            time.sleep(draw.uniform(0.2, 2.5))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
        process.wait()
        process.stdout.close()
    assert_same(folder, whole)
