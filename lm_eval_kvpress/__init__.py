"""lm-eval-kvpress: honest evaluation of KV-cache compression.

``from lm_eval_kvpress import load_model`` is what notebooks begin with. Importing the package loads nothing: start-up
runs it in every interpreter of the environment (`_startup`). Each name below, and the version, which comes from the git
tag at the time of installation, is looked up where it is asked for.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from lm_eval_kvpress.api.model import LoadedModel as LoadedModel
    from lm_eval_kvpress.api.model import load_model as load_model
    from lm_eval_kvpress.api.results import read_results as read_results
    from lm_eval_kvpress.api.results import run_sweep as run_sweep
    from lm_eval_kvpress.errors import UsageError as UsageError
    from lm_eval_kvpress.harness.model import KVPress as KVPress
    from lm_eval_kvpress.report.kept_tokens import KeptTokens as KeptTokens

__version__: str

EXPORTS = {
    "load_model": "lm_eval_kvpress.api.model",
    "LoadedModel": "lm_eval_kvpress.api.model",
    "KeptTokens": "lm_eval_kvpress.report.kept_tokens",
    "run_sweep": "lm_eval_kvpress.api.results",
    "read_results": "lm_eval_kvpress.api.results",
    "KVPress": "lm_eval_kvpress.harness.model",
    "UsageError": "lm_eval_kvpress.errors",
}
"""Name -> the module that has it."""


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("lm-eval-kvpress")
    if name not in EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), "__version__", *EXPORTS])
