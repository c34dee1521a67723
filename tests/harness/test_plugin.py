"""What lm-eval is told about us, in the installed lm-eval."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.registry import get_model, model_registry
from lm_eval.tasks import manager
from lm_eval.tasks.manager import TaskManager
from repository import ROOT

from lm_eval_kvpress.harness import plugin

LM_EVAL_TASKS = Path(manager.__file__).parent


@pytest.fixture(autouse=True)
def told() -> None:
    plugin.register_models()
    plugin.include_tasks()


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Path]]:
    """A `TaskManager` that indexes nothing: returns the folders that it would have read, in their order."""

    def scanned(*args: Any, **kwargs: Any) -> list[Path]:
        folders: list[Path] = []

        def build(paths: list[Path], **_: Any) -> dict[str, Any]:
            folders.extend(paths)
            return {}

        monkeypatch.setattr(manager.TaskIndex, "build", staticmethod(build))
        TaskManager(*args, **kwargs)
        return folders

    return scanned


def test_names_equal_the_declared_entry_points() -> None:
    tomllib = pytest.importorskip("tomllib", reason="reads pyproject.toml: Python 3.11 and later")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["lm_eval.models"] == plugin.MODELS
    (function,) = project["entry-points"][plugin.TASKS_GROUP].values()
    assert function == f"{plugin.__name__}:{plugin.tasks_path.__name__}"


def test_models_may_be_registered_any_number_of_times() -> None:
    count = len(model_registry)
    plugin.register_models()
    plugin.register_models()
    assert len(model_registry) == count
    assert set(plugin.MODELS) <= set(model_registry)
    assert "hf" in model_registry


def test_a_misspelt_model_is_answered_with_our_names() -> None:
    with pytest.raises(ValueError, match="pythia-kvpress"):
        get_model("pythia-kvpres")


def test_tasks_path_holds_our_tasks() -> None:
    assert plugin.tasks_path() == ROOT / "tasks"
    assert any(plugin.tasks_path().glob("**/*.yaml"))


def test_tasks_path_is_inside_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "__file__", str(tmp_path / "lm_eval_kvpress" / "harness" / "plugin.py"))
    with pytest.raises(FileNotFoundError, match="reinstall"):
        plugin.tasks_path()
    (tmp_path / "tasks").mkdir()
    assert plugin.tasks_path() == tmp_path / "tasks"
    (tmp_path / "lm_eval_kvpress" / "tasks").mkdir(parents=True)
    assert plugin.tasks_path() == tmp_path / "lm_eval_kvpress" / "tasks"


def test_our_tasks_come_after_lm_evals_and_before_the_users(scanned: Callable[..., list[Path]], tmp_path: Path) -> None:
    ours = plugin.tasks_path()
    assert scanned() == [LM_EVAL_TASKS, ours]
    assert scanned(include_path=str(tmp_path)) == [LM_EVAL_TASKS, ours, tmp_path]
    assert scanned(None, tmp_path, metadata={}) == [LM_EVAL_TASKS, ours, tmp_path]
    assert scanned(include_path=[str(tmp_path), tmp_path / "b"]) == [LM_EVAL_TASKS, ours, tmp_path, tmp_path / "b"]


def test_our_tasks_are_not_read_twice(scanned: Callable[..., list[Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert scanned(include_path="tasks") == [LM_EVAL_TASKS, Path("tasks")]
    assert scanned(include_path=ROOT) == [LM_EVAL_TASKS, ROOT]
    plugin.include_tasks()
    assert scanned() == [LM_EVAL_TASKS, plugin.tasks_path()]


def test_a_task_manager_without_defaults_stays_without(scanned: Callable[..., list[Path]], tmp_path: Path) -> None:
    assert scanned(include_defaults=False) == []
    assert scanned(None, tmp_path, False) == [tmp_path]


def test_a_changed_task_manager_is_refused_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Changed:
        def __init__(self, folders: list[str]) -> None: ...

    init = Changed.__init__
    monkeypatch.setattr(manager, "TaskManager", Changed)
    with pytest.raises(TypeError, match="folders"):
        plugin.include_tasks()
    assert Changed.__init__ is init


@pytest.mark.end_to_end  # it lists lm-eval's thousands of tasks twice
def test_our_task_names_are_not_those_of_lm_eval(caplog: pytest.LogCaptureFixture) -> None:
    """The real index: no task of ours overrides another, and `--include_path tasks` enters none twice."""
    with caplog.at_level(logging.WARNING, logger="lm_eval.tasks._index"):
        assert "kvpress_recall" in TaskManager(include_path=plugin.tasks_path()).all_tasks
    ours = [record.getMessage() for record in caplog.records if str(plugin.tasks_path()) in record.getMessage()]
    assert ours == []
