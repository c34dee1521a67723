"""Bad inputs as data: `inputs.yaml` has commands and what each must say; here is what they name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from lm_eval_kvpress.harness.checkpoint import BUILTIN, resolve_pretrained

TABLE = Path(__file__).with_name("inputs.yaml")


@dataclass(frozen=True)
class Input:
    """A command that cannot be done.

    Attributes:
        command: with the names of `material` in braces, and ``{out}`` for a folder of its own that is not there.
        says: what stands in its one line.
    """

    command: str
    says: str


def read_inputs(file: Path = TABLE) -> Sequence[Input]:
    """All rows of the table."""
    prefixes = yaml.safe_load(file.read_text(encoding="utf-8"))
    return [Input(f"{prefix} {rest}", says) for prefix, rows in prefixes.items() for rest, says in rows]


def material(folder: Path) -> Mapping[str, str]:
    """Make what the commands name: files and folders that are not what they should be; return their paths by name."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "torn_json": '{"results": {"a": 1}, "conf',
        "list_json": "[1, 2, 3]",
        "notes": "my notes\n",
        "settings_yaml": "presses: [none\n",
        "list_yaml": "- none\n- knorm\n",
        "numbers_yaml": "tasks: 7\npresses: [1, 2]\noutput_path: out\n",
        "unknown_yaml": "tasks: [kvpress_recall]\npreses: [none]\noutput_path: out\n",
    }
    for name, text in files.items():
        _folder(folder, name).joinpath(FILE_NAMES.get(name, "results_1.json")).write_text(text, encoding="utf-8")
    _folder(folder, "binary").joinpath("results_1.json").write_bytes(bytes(range(256)))
    _folder(folder, "empty_results")
    pipe = _folder(folder, "pipe") / "results_1.json"
    if not pipe.exists():
        os.mkfifo(pipe)
    _checkpoints(folder)
    return {path.name: str(path) for path in folder.iterdir()}


FILE_NAMES = {name: "settings.yaml" for name in ("settings_yaml", "list_yaml", "numbers_yaml", "unknown_yaml")}


def _folder(folder: Path, name: str) -> Path:
    place = folder / name
    place.mkdir(exist_ok=True)
    return place


CHANGES: Mapping[str, Mapping[str, object]] = {
    "no_layers": {"num_hidden_layers": 0},
    "null_positions": {"max_position_embeddings": None},
    "text_positions": {"max_position_embeddings": "many"},
    "more_layers": {"num_hidden_layers": 9},
    "other_shape": {"hidden_size": 128, "intermediate_size": 512},
    "unknown_type": {"model_type": "no_such_model", "architectures": ["NoSuchModel"]},
}
"""Checkpoints: the built-in one with another entry in its configuration."""


def _checkpoints(folder: Path) -> None:
    builtin = Path(resolve_pretrained(BUILTIN))
    for name, change in CHANGES.items():
        config = json.loads((_copy(builtin, folder / name) / "config.json").read_text(encoding="utf-8"))
        (folder / name / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
    for name in ("no_tokenizer", "torn_weights", "no_weights", "torn_config"):
        _copy(builtin, folder / name)
    for file in (folder / "no_tokenizer").glob("tokenizer*"):
        file.unlink()
    weights = folder / "torn_weights" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    (folder / "no_weights" / "model.safetensors").unlink(missing_ok=True)
    (folder / "torn_config" / "config.json").write_text('{"model_type": "gpt_ne', encoding="utf-8")


def _copy(builtin: Path, place: Path) -> Path:
    shutil.copytree(builtin, place, dirs_exist_ok=True)
    return place
