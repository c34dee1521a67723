"""The tasks of a sweep: found by name, and what their answers and figures depend on as hashes.

A task may be corrected between two calls of a sweep: its YAML, the functions that it names, its documents. The hashes
tell that before the model is loaded. Knows lm-eval's tasks. Does not know models or cells.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.evaluator_utils import get_sample_size
from lm_eval.tasks import TaskManager

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness import plugin, task_needs
from lm_eval_kvpress.harness.task_seeds import seed_as_lm_eval
from lm_eval_kvpress.presses.suggest import near
from lm_eval_kvpress.sweep.cells import Cell
from lm_eval_kvpress.sweep.settings import SweepSettings

LONGEST_NAME = 200
"""Bytes of a task's name, which is part of the names of files."""


def task_manager(settings: SweepSettings, cell: Cell) -> TaskManager:
    """Find the tasks, and hand them the model arguments and metadata as lm-eval's command line does.

    Raises:
        UsageError: if something that a task needs is missing, or its texts are longer than the model.
    """
    paths = [str(plugin.tasks_path()), *([settings.include_path] if settings.include_path else [])]
    metadata = {**settings.model_args, **dict(cell.protocol), **settings.metadata}
    metadata = task_needs.prepared(settings.model, settings.model_args, metadata, settings.tasks)
    # lm-eval's own index takes seconds. Tasks of these folders need none of it; a user's group may have members there.
    included = TaskManager(include_path=paths, include_defaults=False, metadata=metadata)
    if set(settings.tasks) <= set(included.all_subtasks if settings.include_path else included.all_tasks):
        return included
    return TaskManager(include_path=paths, metadata=metadata)


def loads_once(tasks: TaskManager) -> TaskManager:
    """Have a task manager make its tasks at the first call and return the same ones at every later call.

    lm-eval makes them anew for every evaluation. A task that draws its documents may draw others then, whatever the
    seeds, as RULER's ``ruler_cwe`` does; the cells of a sweep would be compared on different documents.
    """
    load, loaded = tasks.load, dict[tuple[str, ...], Any]()

    def load_once(names: Sequence[str]) -> Any:
        key = tuple(names)
        if key not in loaded:
            loaded[key] = load(list(names))
        return loaded[key]

    tasks.load = load_once
    return tasks


def check_tasks(settings: SweepSettings, tasks: TaskManager) -> None:
    """Refuse unknown tasks before anything is loaded.

    Raises:
        UsageError: with the nearest name.
    """
    for name in settings.tasks:
        if name not in tasks.all_tasks and not Path(name).is_file():
            hint = near(name, tasks.all_tasks)
            raise UsageError(f"unknown task '{name}': {hint.rstrip() or '`lm_eval ls tasks` lists them'}")


def task_hashes(settings: SweepSettings, tasks: TaskManager) -> dict[str, dict[str, str]]:
    """Return, for each task and group, a hash of every part of its configuration and of its documents.

    Raises:
        UsageError: for a name that cannot be part of a file's name, or samples that are not there.
    """
    seed_as_lm_eval(settings.seed)  # else the documents that a task draws would differ from call to call
    loaded = tasks.load(settings.tasks)
    if unknown := sorted((settings.samples or {}).keys() - loaded["tasks"].keys()):
        raise UsageError(f"samples: {near(unknown[0], loaded['tasks'])}the sweep has no task '{unknown[0]}'")
    for name in loaded["tasks"]:
        if set(name) & set("/\\\0") or len(name.encode()) > LONGEST_NAME:
            raise UsageError(
                f"task {name[:60]!r} cannot be part of a file's name, as its samples need: rename it in its YAML, "
                f"without slashes and in at most {LONGEST_NAME} bytes"
            )
        _check_samples(name, loaded["tasks"][name], settings)
    of_groups = {f"group {name}": _hashes_of_group(group) for name, group in loaded["groups"].items()}
    return {name: _hashes_of_task(task, settings) for name, task in loaded["tasks"].items()} | of_groups


def _check_samples(name: str, task: Task, settings: SweepSettings) -> None:
    num_documents, places = len(task.eval_docs), (settings.samples or {}).get(name, [])
    if beyond := [place for place in places if place >= num_documents]:
        raise UsageError(f"samples: {name} has {num_documents} documents, counted from 0, and no document {beyond[0]}")


def _hashes_of_group(group: Group) -> dict[str, str]:
    return {"members": _hash([group.child_names]), "aggregation": _hash([_plain(group.aggregate_metric_list)])}


def _hashes_of_task(task: Task, settings: SweepSettings) -> dict[str, str]:
    """The metadata are left out: they hold the settings, which are compared as they are."""
    config = {key: value for key, value in vars(task.config).items() if key != "metadata" and value is not None}
    limit, samples = get_sample_size(task, settings.limit), (settings.samples or {}).get(str(task.config.task))
    documents = task.doc_iterator(rank=0, limit=limit, world_size=1, samples=samples)
    num_fewshot = settings.num_fewshot or config.get("num_fewshot") or 0
    return {
        "class": _hash([_source(type(task))]),
        **{key: _hash([_plain(value)]) for key, value in config.items()},
        "documents": _hash(documents),
        **({"few-shot documents": _hash(task.fewshot_docs())} if num_fewshot else {}),
    }


def _hash(items: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(item, sort_keys=True, default=_other).encode() + b"\n")
    return digest.hexdigest()[:16]


def _plain(value: Any) -> Any:
    """A part of a configuration as JSON has it; a function as the file that it stands in."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, set | frozenset):  # whose order differs from process to process
        return sorted(json.dumps(_plain(part), sort_keys=True, default=_other) for part in value)
    return _source(value) if callable(value) else value


def _source(function: Callable[..., Any]) -> list[Any]:
    """Its name and its whole file, which holds what it calls, and the values that are bound to it; its name alone if it
    is not written in Python."""
    if isinstance(function, functools.partial):
        return [*_source(function.func), _plain(function.args), _plain(function.keywords)]
    function = inspect.unwrap(function)
    if not hasattr(function, "__qualname__"):  # an object that can be called
        return [*_source(type(function)), _values(getattr(function, "__dict__", {}))]
    try:
        text = Path(inspect.getsourcefile(function) or "").read_text(encoding="utf-8")
        return [function.__qualname__, text, _values(_closure(function))]
    except (TypeError, OSError):
        return [function.__qualname__]


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    """The variables of the function around it, by name; those that have no value yet are left out."""
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    found = {}
    for name, cell in zip(names, getattr(function, "__closure__", None) or (), strict=True):
        with suppress(ValueError):
            found[name] = cell.cell_contents
    return found


def _values(bound: Mapping[str, Any]) -> Any:
    """Of bound variables those that are data; functions are in the file, and objects may lead back to themselves."""
    return _plain(
        {key: value for key, value in bound.items() if isinstance(value, str | int | float | list | tuple | dict)}
    )


def _other(value: Any) -> str:
    """What JSON does not know: an image as its pixels, any other value as it is shown, but without its address."""
    pixels = getattr(value, "tobytes", None)
    content = pixels() if callable(pixels) else str(value).partition(" at 0x")[0].encode()
    return hashlib.sha256(content).hexdigest()
