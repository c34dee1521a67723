"""Misspelt model arguments and presses, told before torch is imported.

Importing torch, transformers, kvpress and lm-eval's models takes from ten seconds to a minute. So the names that may be
typed are read off the source texts of `Settings`, ``HFLM``, the catalog and kvpress's presses, which stay the one place
where they are written. A name that stands in none of them is wrong whatever else is given. Which press takes which
argument, and every value, is left to `arguments`, which imports them; and where a source cannot be read or has another
shape than expected, nothing is refused here.

Standard library only, but for the YAML of a sweep.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.presses.suggest import near

LOADING_ARGUMENTS = frozenset(
    {
        *("attn_implementation", "cache_dir", "code_revision", "device_map", "force_download", "local_files_only"),
        *("low_cpu_mem_usage", "max_memory", "offload_state_dict", "token", "use_safetensors", "variant"),
    }
)
"""What ``from_pretrained`` takes beyond the named arguments of ``HFLM``."""

PACKAGE = Path(__file__).resolve().parents[1]
NOT_TYPED = "decoding"
"""The field of `Settings` that is made of others."""


def check_names(arguments: Mapping[str, Any]) -> None:
    """Refuse a name that no model argument has, and a press that nobody knows.

    Raises:
        UsageError: one line with the name that is most like it.
    """
    own, stock, of_presses = own_arguments(), hflm_arguments(), press_arguments()
    known = own | stock | of_presses | LOADING_ARGUMENTS
    for name in arguments if own and stock and of_presses else ():
        if name.rpartition(".")[2] not in known:
            raise UsageError(
                f"unknown argument '{name}': {near(name, known)}the model takes "
                f"{', '.join(sorted(own))}, what lm-eval's hf model takes, and the arguments of its press "
                "(`lm-eval-kvpress presses`)"
            )
    check_press(arguments.get("press"))


def check_press(press: Any) -> None:
    """Refuse a name of which a part is no press.

    Raises:
        UsageError: one line with the press that is most like it.
    """
    known = press_names()
    if not (isinstance(press, str) and known):
        return
    for part in press.replace("+", ":").split(":"):
        if part and part.lower() not in known and part not in known:
            raise UsageError(
                f"unknown press '{part}': {near(part, sorted(known))}`lm-eval-kvpress presses` lists names"
            )


def check_command_line(arguments: Sequence[str]) -> None:
    """Check the names in ``--model_args``, ``--presses`` and ``--config``. What cannot be read is left to the command.

    Raises:
        UsageError: as `check_names`.
    """
    for flag, text in _options(arguments):
        if flag == "--model_args":
            check_names(_named(text))
        elif flag == "--presses":
            _check_presses(text.split(","))
        elif flag == "--config":
            settings = _yaml(Path(text))
            model_args = settings.get("model_args")
            check_names(_named(model_args) if isinstance(model_args, str) else _mapping(model_args))
            presses = settings.get("presses")
            _check_presses(presses if isinstance(presses, list) else str(presses or "").split(","))


def _check_presses(presses: Iterable[Any]) -> None:
    for press in presses:
        if isinstance(press, str):
            check_press(press.strip())
        else:
            check_names(_mapping(press))


def option(arguments: Sequence[str], flag: str) -> str | None:
    """The value of a flag on a command line; None without it."""
    return dict(_options(arguments)).get(flag)


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """``--flag value`` and ``--flag=value``."""
    for number, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag.startswith("--"):
            yield flag, value if equals else "".join(arguments[number + 1 : number + 2])


def _named(text: str) -> dict[str, Any]:
    """What is typed as lm-eval has it: ``NAME=VALUE,...`` or a JSON object."""
    if text.lstrip().startswith("{"):
        try:
            return _mapping(json.loads(text))
        except ValueError:
            return {}
    parts = (part.partition("=") for part in text.split(","))
    return {name.strip(): value for name, equals, value in parts if equals}


def _yaml(file: Path) -> dict[str, Any]:
    import yaml

    try:
        return _mapping(yaml.safe_load(file.read_text(encoding="utf-8"))) if file.is_file() else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _mapping(value: Any) -> dict[str, Any]:
    return {name: item for name, item in value.items() if isinstance(name, str)} if isinstance(value, dict) else {}


# ------------------------------------------------------------------------------------------ names from source texts


def own_arguments() -> frozenset[str]:
    """The fields of `Settings` that a user types."""
    classes = _classes(_tree(PACKAGE / "harness" / "settings.py"))
    return frozenset(name for one in classes if one.name == "Settings" for name in _fields(one)) - {NOT_TYPED}


def hflm_arguments() -> frozenset[str]:
    """The named arguments of lm-eval's ``HFLM``, ``self`` and ``kwargs`` apart."""
    for folder in _folders("lm_eval"):
        classes = _classes(_tree(folder / "models" / "huggingface.py"))
        found = [name for one in classes if one.name == "HFLM" for name in _parameters(one)]
        return frozenset(found)
    return frozenset()


def press_arguments() -> frozenset[str]:
    """The fields of kvpress's press classes and of ours, and the arguments that stand in our tables."""
    folders = _folders("kvpress")
    if not folders:
        return frozenset()
    found = set[str]()
    for folder in (*folders, PACKAGE):
        for file in sorted((folder / "presses").rglob("*.py")):
            for one in _classes(_tree(file)):
                found.update(_fields(one), _parameters(one))
    found |= _texts(_tree(PACKAGE / "presses" / "arguments.py"))
    return frozenset(name for name in found if name.isidentifier() and not name.endswith("_"))


def press_names() -> frozenset[str]:
    """Every text that stands in the tables of presses: supported ones, aliases, and those that are refused with a
    reason."""
    files = ("catalog.py", "unsupported.py", "names.py")
    return frozenset(text for name in files for text in _texts(_tree(PACKAGE / "presses" / name)) if " " not in text)


def _folders(package: str) -> list[Path]:
    """Where a package lies, which is not imported."""
    spec = find_spec(package)
    return [Path(place) for place in (spec.submodule_search_locations or ())] if spec is not None else []


def _tree(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ast.Module([], [])


def _classes(tree: ast.Module) -> list[ast.ClassDef]:
    return [node for node in tree.body if isinstance(node, ast.ClassDef)]


def _fields(one: ast.ClassDef) -> list[str]:
    """The annotated names of a dataclass."""
    return [
        node.target.id for node in one.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]


def _parameters(one: ast.ClassDef) -> list[str]:
    """The arguments of its constructor."""
    found = []
    for node in one.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            found += [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return [name for name in found if name != "self"]


def _texts(tree: ast.Module) -> set[str]:
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
