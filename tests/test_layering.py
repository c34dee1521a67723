"""What each package may import, and who owns which library. Imports run downward only, and no file is in a circle.

One line per package, bottom up; a new package needs one here.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lm_eval_kvpress"

EVERYWHERE = {"errors", "files", "tables"}
"""Any file may raise the base class of errors in what a user gave, which a command shows in one line, write a file that
is whole or absent, and print a table. None of these knows what the package is about."""

# Package -> the packages of ours that it may import, inside functions as well.
MAY_IMPORT: dict[str, set[str]] = {
    "press_list": set(),
    "presses": {"press_list"},
    "cache": set(),
    "report": {"bootstrap", "press_list"},
    "models": {"cache"},
    "records": {"bootstrap"},
    "bootstrap": set(),
    "engine": {"presses", "cache", "models", "records"},
    "harness": {"presses", "cache", "models", "records", "engine", "recall"},
    "calibrate": {"presses", "models", "harness"},
    "verify": {"presses", "cache", "models", "records", "engine", "harness", "recall"},
    "sweep": {"presses", "cache", "models", "records", "engine", "harness"},
    "api": {"presses", "records", "engine", "harness", "sweep", "report"},
    "recall": set(),
    "errors": set(),
    "files": set(),
    "tables": set(),
    "cli": {"presses", "harness", "verify", "sweep", "calibrate", "report"},
    "__main__": {"cli"},
    "_startup": {"harness"},
    "__init__": {"api", "harness", "report"},  # looked up where it is asked for
}

# Library, or a part of one -> the only packages or files that import it.
OWNERS = {
    "kvpress": {"presses", "calibrate.queries"},
    "lm_eval": {"harness", "sweep", "verify", "calibrate", "cli", "api"},
    "triton": {"models.fast"},
    "lm_eval_kvpress.models.fast": {"models.fast", "models.architectures"},
    "transformers.models": {"models", "cache.stream_layer", "cache.window_layer"},
    "itables": {"report"},
    "jinja2": {"report"},
    "matplotlib": {"report"},
    "pandas": {"report", "api"},
    "plotly": {"report"},
    "prometheus_client": {"records.prometheus"},
    "ray": {"sweep.launchers.ray_actors"},
    "submitit": {"sweep.launchers.slurm_jobs", "sweep.launchers.slurm_part"},
}

# Package or file -> what it must not import, of ours or of others.
NEVER = {
    "presses": {"torch", "transformers.models", "transformers.cache_utils"},
    "cache": {"transformers.modeling_utils", "transformers.AutoModel", "transformers.PreTrainedModel"},
    "report": {"torch", "lm_eval", "transformers", "kvpress"},
    "recall": {"torch", "lm_eval", "transformers", "kvpress", "numpy"},
    "press_list": {"torch", "lm_eval", "transformers", "kvpress", "numpy"},
    "verify.dense_reference": {PACKAGE.name},
    "verify.press_formulas": {PACKAGE.name},
}


def module_name(path: Path) -> str:
    """`records.clock` for a file of the package; a package itself for its `__init__.py`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = {
    module_name(path): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if "builtin" not in path.relative_to(PACKAGE).parts
}


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Every module that a file imports anywhere, also by a string that names one of ours, less the standard library."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively; name the whole module"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and re.fullmatch(rf"{PACKAGE.name}(\.\w+)+(:\w+)?", str(node.value)):
            found.add(node.value.partition(":")[0])
    return frozenset(name for name in found if name.partition(".")[0] not in sys.stdlib_module_names)


def our_modules(name: str) -> set[str]:
    """The files of this package that a file of it imports."""
    found = set()
    for imported in imports(FILES[name]):
        parts = imported.split(".")
        if parts[0] == PACKAGE.name:
            candidates = [".".join(parts[1:end]) for end in range(len(parts), 1, -1)]
            found.update([candidate for candidate in candidates if candidate in FILES][:1])
    return found - {name}


def is_part_of(name: str, owner: str) -> bool:
    return name == owner or name.startswith(f"{owner}.")


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_run_downward(name: str) -> None:
    package = name.partition(".")[0]
    allowed = {package, "__init__"} | MAY_IMPORT.get(package, set()) | EVERYWHERE
    assert {module for module in our_modules(name) if module.partition(".")[0] not in allowed} == set()


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_names_what_it_imports_of_ours(name: str) -> None:
    whole = {PACKAGE.name, f"{PACKAGE.name}.*"}
    assert whole.isdisjoint(imports(FILES[name])), "through the whole package anything can be reached"


def test_every_package_has_a_line() -> None:
    assert {name.partition(".")[0] for name in FILES} == set(MAY_IMPORT)


def test_no_file_imports_itself_in_a_circle() -> None:
    TopologicalSorter({name: our_modules(name) for name in FILES}).prepare()


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_is_imported_by_its_owners_only(library: str) -> None:
    users = {name for name, path in FILES.items() if any(is_part_of(imported, library) for imported in imports(path))}
    assert {user for user in users if not any(is_part_of(user, owner) for owner in OWNERS[library])} == set()


@pytest.mark.parametrize("name", NEVER)
def test_what_a_file_must_not_know(name: str) -> None:
    for module, path in FILES.items():
        if is_part_of(module, name):
            known = {imported for imported in imports(path) if imported != f"{PACKAGE.name}.__version__"}
            assert [other for other in known for banned in NEVER[name] if is_part_of(other, banned)] == [], module


def test_every_imported_library_is_declared() -> None:
    tomllib = pytest.importorskip("tomllib", reason="reads pyproject.toml: Python 3.11 and later")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    declared = {re.split(r"[\s\[<>=~!;]", requirement)[0].replace("-", "_").lower() for requirement in required}
    files = [path for folder in (PACKAGE, ROOT / "tasks", ROOT / "scripts") for path in folder.rglob("*.py")]
    imported = {name.partition(".")[0] for path in files for name in imports(path)}
    own = {PACKAGE.name, "scripts", *(path.stem for path in (ROOT / "tasks").rglob("*.py"))}
    distributions = {"yaml": "pyyaml"}  # where the two names differ
    assert {distributions.get(name, name) for name in imported - own} - declared == set()
