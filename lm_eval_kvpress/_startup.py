"""Tell lm-eval of this package when, and only when, somebody imports lm-eval.

lm-eval 0.4.13 finds models only in its own table and tasks only in its own folder; it scans no entry points
(a later one does, for models: lm-evaluation-harness pull request 4013). So a start-up file,
`lm_eval_kvpress_startup.pth`, lies in site-packages and imports this module in every interpreter of the
environment. Hence its rules: nothing is imported here but `sys`, neither torch nor lm-eval; where lm-eval is
absent nothing happens; and no other program fails because of us.

The hook stands first in `sys.meta_path`, because a finder behind one that answers is never asked. It answers
for the module names below only, with what Python's own path finder answers for them, so it needs no knowledge of
the other finders and cannot recurse through them. What it adds to a loader goes away when the module has been
executed: `__loader__` stays the real one for `inspect`, `importlib.resources` and `importlib.reload`.
"""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

# A module of lm-eval -> what `plugin` does once it has been executed. Not earlier: lm-eval fills its registry
# by importing `lm_eval.models` only as long as the registry is empty.
AFTER_IMPORT = {
    "lm_eval.models": "enter_models",
    "lm_eval.tasks.manager": "include_tasks",
    "lm_eval.api.task": "read_infinitebench",
    "lm_eval.config.evaluate_config": "check_arguments",
}


class LmEvalHook:
    """A `sys.meta_path` finder (PEP 451) for the keys of `AFTER_IMPORT`."""

    @staticmethod
    def find_spec(
        fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if fullname not in AFTER_IMPORT:
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None:
            _announce_after(spec)
        return spec


def install() -> None:
    """Put the hook in place, once, and catch up on modules that were imported before it."""
    if LmEvalHook not in sys.meta_path:
        sys.meta_path.insert(0, LmEvalHook)
    for fullname in AFTER_IMPORT:
        if fullname in sys.modules:
            _announce(fullname)


def _announce_after(spec: "ModuleSpec") -> None:
    """Have the loader of `spec` call `_announce` when it has executed that module, and then forget it.

    A loader without `exec_module` (of a namespace package) or without a `__dict__` is left as it is.
    """
    loader = spec.loader
    if loader is None or not hasattr(loader, "exec_module") or not hasattr(loader, "__dict__"):
        return
    exec_module = loader.exec_module

    def exec_and_announce(module: "ModuleType") -> None:
        is_it = module.__name__ == spec.name  # one zipimporter serves every module of its archive
        if is_it:
            vars(loader).pop("exec_module", None)  # also where lm-eval itself raises
        exec_module(module)
        if is_it:
            _announce(spec.name)

    vars(loader)["exec_module"] = exec_and_announce


def _announce(fullname: str) -> None:
    """Let `plugin` do its part. An lm-eval that has changed is reported and goes on without us.

    Whatever our part raises, even a warning that `-W error` turned into an error, the import of lm-eval is not ours to
    fail: so every exception is caught here, and nowhere else.
    """
    try:
        from lm_eval_kvpress.harness import plugin

        getattr(plugin, AFTER_IMPORT[fullname])()
    except Exception as error:
        import warnings

        problem = f"lm-eval-kvpress, made for lm_eval 0.4.13, cannot enter itself after {fullname}: {error!r}"
        try:
            warnings.warn(problem, RuntimeWarning, stacklevel=2)
        except RuntimeWarning:
            print(f"RuntimeWarning: {problem}", file=sys.stderr)


install()
