"""Sweeps: every cell equals the run of that cell alone, a killed sweep goes on, bad input is one line."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import pytest
import yaml
from lm_eval.tasks import TaskManager
from repository import ROOT

from lm_eval_kvpress import cli
from lm_eval_kvpress.engine.outcomes import Generated, Scored
from lm_eval_kvpress.engine.scoring import BranchScore
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.records.totals import ContextRecord
from lm_eval_kvpress.sweep import command
from lm_eval_kvpress.sweep.cell_run import CellRun
from lm_eval_kvpress.sweep.cells import parse_settings
from lm_eval_kvpress.sweep.store import CellStore, SweepStore

PRESSES = "none,knorm,streaming_llm,random,pyramidkv,observed_attention"
DATA = """
import datasets

WORDS = ("the cold river ran past an old mill where seven grey geese slept and nobody asked who owned " * 30).split()


def load(**_):
    def words(start, count):
        return " ".join(WORDS[start : start + count])

    documents = [
        {"text": words(17 * i, 60 + 40 * (i // 2)), "choices": [f" {words(200 + i + c, 1 + c)}" for c in range(3)]}
        for i in range(6)
    ]
    return {"test": datasets.Dataset.from_list(documents)}
"""
KINDS: dict[str, dict[str, Any]] = {
    "choice": {"output_type": "multiple_choice", "doc_to_text": "text", "doc_to_choice": "choices", "doc_to_target": 0},
    "gen": {
        "output_type": "generate_until",
        "doc_to_text": "text",
        "doc_to_target": "text",
        "generation_kwargs": {"until": [" the"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"},
}


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small tasks, one per request type."""
    folder = tmp_path_factory.mktemp("sweep_tasks")
    (folder / "data.py").write_text(DATA)
    for name, kind in KINDS.items():
        text = yaml.safe_dump({"task": f"sweep_{name}", "test_split": "test", **kind})
        (folder / f"{name}.yaml").write_text(text + "custom_dataset: !function data.load\n")
    return folder


@pytest.fixture(autouse=True)
def only_these_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without lm-eval's own thousands, which take seconds to list."""
    monkeypatch.setattr(command, "_tasks", lambda settings, cell: manager(settings.include_path))


def manager(folder: str | Path | None) -> TaskManager:
    return TaskManager(include_path=str(folder), include_defaults=False)


def command_line(checkpoint_dir: Path, tasks_dir: Path, output: Path, **settings: Any) -> list[str]:
    given = {
        "model_args": f"pretrained={checkpoint_dir},rolling_context=96,rolling_score=96",
        "presses": PRESSES,
        "ratios": "0.5,0.75",
        "tasks": ",".join(f"sweep_{name}" for name in KINDS),
        "include_path": tasks_dir,
        "device": "cpu",
        "batch_size": 4,
        "output_path": output,
        **settings,
    }
    return [part for name, value in given.items() if value is not None for part in (f"--{name}", str(value))]


def results_of(folder: Path) -> dict[str, tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]]:
    """Cell to its results and its samples by task."""
    found = {}
    for cell in sorted((folder / "cells").iterdir()):
        (file,) = cell.glob("results/*/results_*.json")
        samples = {
            path.name.split("_2")[0].removeprefix("samples_"): [json.loads(line) for line in path.open()]
            for path in file.parent.glob("samples_*.jsonl")
        }
        found[cell.name] = json.loads(file.read_text()), samples
    return found


def figures(results: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"{task}/{metric}": value
        for task, metrics in results["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float | int)
    }


@pytest.fixture(scope="module")
def whole(checkpoint_dir: Path, tasks_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that was not disturbed."""
    output = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "_tasks", lambda settings, cell: manager(settings.include_path))
        assert command.main(command_line(checkpoint_dir, tasks_dir, output)) == 0
    return output


def test_every_cell_equals_the_run_of_that_cell_alone(whole: Path, checkpoint_dir: Path, tasks_dir: Path) -> None:
    found = results_of(whole)
    assert len(found) == 1 + 5 * 2
    for name, (results, samples) in found.items():
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


@pytest.mark.parametrize(("shares", "tokens"), [(False, 7), (True, 0)])
def test_prefills_of_earlier_calls_and_shared_ones_are_not_this_calls_own(shares: bool, tokens: int) -> None:
    batches = [SimpleNamespace(num_prefill_tokens=count) for count in (100, 3, 4)]
    meter = SimpleNamespace(records=SimpleNamespace(batches=batches))
    runner: Any = SimpleNamespace(meter=meter, compressor=SimpleNamespace(shares=shares))
    nothing: Any = None
    session: Any = SimpleNamespace(runner=runner)
    run = CellRun(nothing, session, nothing, nothing, num_batches_before=1)
    assert run.num_tokens_prefilled == tokens


class Killed(BaseException):
    """Ends a sweep as a signal would: nothing below may catch it."""


@pytest.mark.parametrize("seed", range(3))
def test_a_sweep_that_was_killed_goes_on_and_ends_with_the_same_figures(
    whole: Path, checkpoint_dir: Path, tasks_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    draw, add, part, calls = random.Random(seed), CellStore.add, CellStore.part, [0]

    def dying(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: CellStore, *arguments: Any) -> Any:
            calls[0] += 1
            if calls[0] >= limit:
                if arguments:  # in the middle of a write: a line without its end
                    self.folder.mkdir(parents=True, exist_ok=True)
                    with open(self.folder / "answers.jsonl", "a") as file:
                        file.write('{"key": "torn')
                raise Killed
            return method(self, *arguments)

        return call

    monkeypatch.setattr(CellStore, "add", dying(add))
    monkeypatch.setattr(CellStore, "part", dying(part))
    arguments = command_line(checkpoint_dir, tasks_dir, tmp_path)
    for _ in range(3):
        calls[0], limit = 0, draw.randint(2, 60)
        with pytest.raises(Killed):
            command.main(arguments)
            raise Killed  # it was quicker than its killer
    limit = 10**9
    assert command.main(arguments) == 0
    assert_same(tmp_path, whole)


def assert_same(one: Path, other: Path) -> None:
    """The same cells with the same figures, samples and counts; seconds and dates differ."""
    found, expected = results_of(one), results_of(other)
    assert found.keys() == expected.keys()
    for name, (results, samples) in found.items():
        of_other, samples_of_other = expected[name]
        assert figures(results) == figures(of_other), name
        assert samples == samples_of_other, name
        for key in ("press", "protocol", "tasks"):
            assert results["config"]["kvpress"][key] == of_other["config"]["kvpress"][key], (name, key)
    assert not list(one.glob("cells/*/answers.jsonl")) and not list(one.glob("cells/*/results.part"))


def test_a_finished_sweep_computes_nothing_again_and_more_cells_can_be_added(
    checkpoint_dir: Path, tasks_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"presses": "none,knorm", "tasks": "sweep_choice"}
    assert command.main(command_line(checkpoint_dir, tasks_dir, tmp_path, ratios="0.5", **small)) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*/results/*/*")}
    load, loaded = command._load, []
    monkeypatch.setattr(command, "_load", lambda settings: (loaded.append(1), load(settings))[1])
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


# ---------------------------------------------------------------------------------------------------------- bad input


BAD = [
    ({"presses": "none,snapk"}, "did you mean 'snapkv'"),
    ({"ratios": "0.5,1.5"}, "cell knorm_compression_ratio=1.5"),
    ({"ratios": "half"}, "ratios: 'half' is no number"),
    ({"budgets": "1.5"}, "budgets: '1.5' is no whole number"),
    ({"model_args": "pretrained=x,press=knorm"}, "press is what a sweep varies: give it under presses"),
    ({"model_args": "pretrained=x,compression_ratio=0.5"}, "give it under ratios"),
    ({"model_args": "pretrained=x,throughput_log=x.jsonl"}, "leave throughput_log out"),
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


def test_unknown_tasks_are_refused_before_the_model_is_loaded(
    checkpoint_dir: Path, tasks_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_load", lambda settings: pytest.fail("the model was loaded"))
    with pytest.raises(UsageError, match="unknown task 'sweep_chioce': did you mean 'sweep_choice'"):
        command.main(command_line(checkpoint_dir, tasks_dir, tmp_path, tasks="sweep_gen,sweep_chioce"))
    assert not (tmp_path / "sweep.json").exists(), "the folder is free for the command as it was meant"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("presses: [none", "is no YAML"),
        ("- none", "must hold settings by name"),
        ("press: [none]", "did you mean 'presses'"),
        ("presses: [{name: knorm}]", "has no key 'press'"),
        ("presses: [{press: snapkv, window: 3}]", "unknown argument 'window'"),
    ],
)
def test_bad_yaml_is_one_line(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=says) as caught:
        parse_settings(["--config", str(file), "--tasks", "t", "--output_path", "o"]).cells()
    assert "\n" not in str(caught.value)


def test_yaml_holds_the_same_settings_and_the_command_line_comes_first(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    content = {
        "model_args": {"pretrained": "builtin", "dtype": "float32"},
        "presses": [
            "none",
            {"press": "snapkv", "window_size": 32},
            "adakv:knorm",
            {"press": "dms:knorm", "threshold": -9},
        ],
        "ratios": [0.25, 0.5],
        "query_tokens": [1, 32],
        "tasks": ["kvpress_demo"],
        "output_path": "out",
    }
    file.write_text(yaml.safe_dump(content))
    settings = parse_settings(["--config", str(file), "--limit", "3"])
    assert settings.limit == 3 and settings.model_args == content["model_args"]
    names = [cell.name for cell in settings.cells()]
    assert len(names) == len(set(names)) == 2 * (1 + 2 + 2 + 1)
    assert "snapkv_window_size=32_compression_ratio=0.25_query_tokens=32" in names
    assert "adakv.knorm_compression_ratio=0.5_query_tokens=1" in names
    assert parse_settings(["--config", str(file), "--presses", "none"]).presses == ["none"]
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(json.loads(json.dumps(settings.as_typed()))))
    assert parse_settings(["--config", str(again)]) == settings, "what the results hold can be run again"


def test_other_settings_and_two_sweeps_in_one_folder_are_refused(tmp_path: Path) -> None:
    first = SweepStore(tmp_path, {"tasks": ["a"], "limit": 3})
    with pytest.raises(ValueError, match="being written by another sweep"):
        SweepStore(tmp_path, {"tasks": ["a"], "limit": 3})
    first.claim("1")
    first.cell("a").add({"key": Generated((1,), ContextRecord(7, (7.0,), 100, 100, False))})
    first.close()
    with pytest.raises(ValueError, match="never mixed: it had limit=3"):
        SweepStore(tmp_path, {"tasks": ["a"], "limit": 4})
    with pytest.raises(ValueError, match="other weights"):
        SweepStore(tmp_path, {"tasks": ["a"], "limit": 3}).claim("2")
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(ValueError, match=r"sweep\.json is damaged"):
        SweepStore(tmp_path, {"tasks": ["a"], "limit": 3})


def test_a_folder_in_which_nothing_was_answered_is_free(tmp_path: Path) -> None:
    """The first command had a mistake that came out when lm-eval loaded the task."""
    for settings, fingerprint in (({"limit": -3}, "1"), ({"limit": 3}, "2")):
        store = SweepStore(tmp_path, settings)
        store.claim(fingerprint)
        store.cell("a").part()
        store.close()
    assert json.loads((tmp_path / "sweep.json").read_text()) == {"limit": 3}
    assert (tmp_path / "weights").read_text() == "2"


@pytest.mark.parametrize("stream", [{"rolling": "stream"}, {"model_args": "rolling=stream,stream_chunk=16"}])
def test_streams_beyond_the_trained_positions_are_refused(
    checkpoint_dir: Path, tasks_dir: Path, tmp_path: Path, stream: dict[str, str]
) -> None:
    """And a protocol of model_args reaches the cells, whichever way it was given."""
    model_args = ",".join([f"pretrained={checkpoint_dir}", *([stream["model_args"]] if "model_args" in stream else [])])
    settings = {**stream, "model_args": model_args, "presses": "knorm", "ratios": None, "budgets": "4096"}
    with pytest.raises(UsageError, match="cell knorm_stream_budget=4096.*exceed the 512 positions"):
        command.main(command_line(checkpoint_dir, tasks_dir, tmp_path, **settings))


def test_outcomes_come_back_from_disk_to_the_last_digit(tmp_path: Path) -> None:
    store = CellStore(tmp_path / "cell")
    record = ContextRecord(7, (3.0, 3.5), 100, 50, True)
    outcomes = {
        "a": Scored((BranchScore((-1 / 3, -1e-17), True), BranchScore((-2.0,), False)), True, record),
        "b": Scored((BranchScore((-0.1,), False),), False, None),
        "c": Generated((5, 6), record, 2, 99),
    }
    store.add(outcomes)
    assert store.outcomes() == outcomes
    with open(tmp_path / "cell" / "answers.jsonl", "a") as file:
        file.write('{"key": "d", "con')
    assert store.keys() == {"a", "b", "c"}
    assert store.outcomes() == outcomes


@pytest.mark.slow
def test_ten_real_kills_at_random_moments(checkpoint_dir: Path, tasks_dir: Path, whole: Path, tmp_path: Path) -> None:
    """Real SIGKILLs of a real process, spread over its working time."""
    code = (
        "import sys; from lm_eval.tasks import TaskManager; from lm_eval_kvpress import sweep\n"
        "sweep._tasks = lambda s, c: TaskManager(include_path=s.include_path, include_defaults=False)\n"
        "print('ready', flush=True); sys.exit(sweep.main(sys.argv[1:]))"
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
