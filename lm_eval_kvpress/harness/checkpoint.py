"""Where a checkpoint is: the folder or hub name behind ``pretrained``. Knows paths only."""

from __future__ import annotations

from pathlib import Path

from lm_eval_kvpress.errors import UsageError

BUILTIN = "builtin"
"""The name of the checkpoint that ships with this package."""


def resolve_pretrained(pretrained: str) -> str:
    """The folder or hub name to load.

    Raises:
        UsageError: if a path does not exist.
    """
    if pretrained == BUILTIN:
        return str(_builtin_folder())
    looks_like_path = pretrained.startswith((".", "/", "~")) or pretrained.count("/") > 1
    if not looks_like_path:
        return pretrained
    folder = Path(pretrained).expanduser()
    if not folder.is_dir():
        raise UsageError(f"pretrained={pretrained}: there is no such folder")
    return str(folder)


def _builtin_folder() -> Path:
    folder = Path(__file__).resolve().parents[1] / "builtin"
    if not (folder / "config.json").is_file():
        raise UsageError(f"this installation has no built-in checkpoint in {folder}: reinstall lm-eval-kvpress")
    return folder
