"""Enter this package into lm-eval: the names of its models and the folder of its tasks.

Models are entered by lm-eval's own `model_registry.register`. Tasks have no such registry: `TaskManager.__init__` is
replaced by a function that adds our folder to its `include_path` and calls the original. The names of model arguments
and what the tasks need are checked once `EvaluatorConfig.from_cli` has parsed the command line, before lm-eval imports
torch. All are done by the import hook of `_startup` or, explicitly, by `lm-eval-kvpress run`. Every function may be
called any number of times. It does not know the model: lm-eval imports it, and with it torch, when somebody asks for
it.
"""

from __future__ import annotations

import functools
import inspect
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from lm_eval_kvpress.harness import infinitebench, task_needs
from lm_eval_kvpress.harness.argument_names import check_names
from lm_eval_kvpress.harness.chosen_documents import in_order
from lm_eval_kvpress.harness.command_line import refuse_closed_output, show_usage_errors_in_one_line

TaskPath = str | PathLike[str]
TASKS_GROUP = "lm_eval.tasks"

# The same pairs as the entry points `lm_eval.models` in pyproject.toml; a test compares them.
MODELS = {
    "pythia-kvpress": "lm_eval_kvpress.harness.model:PythiaKVPress",
    "kvpress": "lm_eval_kvpress.harness.model:KVPress",
}


def tasks_path() -> Path:
    """The folder of our tasks: inside the package where a wheel put it, beside the package in a checkout.

    Raises:
        FileNotFoundError: if neither is there.
    """
    package = Path(__file__).resolve().parents[1]
    for path in (package / "tasks", package.parent / "tasks"):
        if path.is_dir():
            return path
    raise FileNotFoundError(f"no folder 'tasks' in {package} or beside it: reinstall lm-eval-kvpress")


def register_models() -> None:
    """Enter our models into lm-eval's registry as lazy "module:Class" placeholders.

    A name that is taken is left alone: an lm-eval that scans the entry points by itself was here before us.
    """
    import lm_eval.models  # noqa: F401  first lm-eval's own: it enters them only as long as the registry is empty
    from lm_eval.api.registry import model_registry

    for name, target in MODELS.items():
        if name not in model_registry:
            model_registry.register(name, target=target)


def enter_models() -> None:
    """Enter the models, and have lm-eval's own command end on a `UsageError` in one line."""
    register_models()
    show_usage_errors_in_one_line()


def include_tasks() -> None:
    """Have every `TaskManager` that includes lm-eval's own tasks include ours as well, and InfiniteBench's read their
    data set.

    Raises:
        FileNotFoundError: if our tasks are gone.
        TypeError: if `TaskManager` takes other arguments than in 0.4.13. Both are raised here rather than in somebody's
            `TaskManager(...)`.
    """
    from lm_eval.tasks import manager

    TaskManager = manager.TaskManager
    init = TaskManager.__init__
    if hasattr(init, "includes_kvpress"):
        return
    ours, is_found_without_us = tasks_path(), _scans_entry_points(manager)
    signature = inspect.signature(init)
    if not {"include_path", "include_defaults"} <= signature.parameters.keys():
        raise TypeError(f"TaskManager{signature} has no include_path or no include_defaults")

    @functools.wraps(init)
    def init_with_our_tasks(*args: Any, **kwargs: Any) -> None:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        if call.arguments.get("metadata"):
            call.arguments["metadata"] = _with_tokenizer(call.arguments["metadata"])
        if call.arguments["include_defaults"] and not is_found_without_us:
            call.arguments["include_path"] = _with(ours, call.arguments["include_path"])
        init(*call.args, **call.kwargs)

    init_with_our_tasks.includes_kvpress = True  # type: ignore[attr-defined]
    TaskManager.__init__ = init_with_our_tasks


def read_infinitebench() -> None:
    """Have lm-eval's tasks of InfiniteBench read their data set, which those of 0.4.13 cannot."""
    infinitebench.read_data_set()


def _scans_entry_points(manager: ModuleType) -> bool:
    """Whether this lm-eval looks for tasks among entry points itself, so that ours would be found twice."""
    try:
        source = inspect.getsource(manager)
    except OSError:
        return False
    return "entry_points" in source and f'"{TASKS_GROUP}"' in source.replace("'", '"')


def _with_tokenizer(metadata: Any) -> Any:
    return task_needs.with_tokenizer(metadata) if isinstance(metadata, dict) else metadata


def check_arguments() -> None:
    """Have lm-eval's command refuse misspelt arguments of our models, tasks that lack something, and a closed output,
    once it has parsed them. RULER finds the tokenizer of the model.

    Raises:
        KeyError: if lm-eval parses its command line in another way than in 0.4.13; arguments are then checked when the
            model is made.
    """
    from lm_eval.config.evaluate_config import EvaluatorConfig

    show_usage_errors_in_one_line()
    from_cli = vars(EvaluatorConfig)["from_cli"].__func__
    if hasattr(from_cli, "checks_kvpress"):
        return

    @functools.wraps(from_cli)
    def from_cli_and_check(cls: type[EvaluatorConfig], *args: Any, **kwargs: Any) -> EvaluatorConfig:
        config: EvaluatorConfig = from_cli(cls, *args, **kwargs)
        if getattr(config, "model", None) in MODELS and isinstance(getattr(config, "model_args", None), dict):
            refuse_closed_output()
            arguments = cast("dict[str, Any]", config.model_args)
            check_names(arguments)
            config.metadata = task_needs.prepared(config.model, arguments, config.metadata, _names(config.tasks))
            if isinstance(config.samples, dict):
                config.samples = {task: in_order(chosen) for task, chosen in config.samples.items()}
        return config

    from_cli_and_check.checks_kvpress = True  # type: ignore[attr-defined]
    EvaluatorConfig.from_cli = classmethod(from_cli_and_check)  # type: ignore[method-assign,assignment]


def _names(tasks: str | list[str]) -> list[str]:
    return tasks.split(",") if isinstance(tasks, str) else [str(task) for task in tasks]


def _with(ours: Path, include_path: TaskPath | list[TaskPath] | tuple[TaskPath, ...] | None) -> list[TaskPath]:
    """Put our folder before the given ones, because later ones win; not twice if one of them holds it."""
    if not include_path:
        return [ours]
    given: list[TaskPath] = list(include_path) if isinstance(include_path, list | tuple) else [include_path]
    if any(ours.is_relative_to(Path(path).resolve()) for path in given):
        return given
    return [ours, *given]
