"""The list of presses as data: it is shown, and papers are looked up in it, without importing kvpress and torch.

`press_list.json` beside this file is what `presses.listing` says of the catalog; a test holds them together, and
``python -m scripts.press_list`` writes it. Standard library only.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class PressInfo:
    """One line of the list of presses.

    Attributes:
        name: as typed; ``PRESS`` stands for what a wrapper wraps.
        arguments: name to default, ``required`` where it has none.
        needs: what it needs or cannot do; for an unsupported press, why it is not supported.
        paper: where the method is described.
        supported: whether `parse_press` takes it.
    """

    name: str
    arguments: Mapping[str, Any]
    needs: str
    paper: str
    supported: bool

    @property
    def own_name(self) -> str:
        """The name without what is wrapped."""
        return self.name.partition(":")[0]


@functools.cache
def press_list() -> tuple[PressInfo, ...]:
    """Every press of kvpress: those that run here, then those that do not, with the reason."""
    return tuple(PressInfo(**entry) for entry in _content()["presses"])


def aliases() -> Mapping[str, str]:
    """Names that kvpress's evaluation has for combinations -> the combination, such as ``composed:snapkv+think``."""
    names: dict[str, str] = _content()["aliases"]
    return names


@functools.cache
def _content() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return content


def infos_of(name: str) -> list[PressInfo]:
    """The lines of each press of a name such as ``adakv:snapkv``, outermost first; parts that are not listed have
    none."""
    by_name = {info.own_name: info for info in press_list()}
    return [by_name[part] for part in re.split(r"[:+]", name) if part in by_name]


def is_default(name: str, argument: str, value: str) -> bool:
    """Whether an argument of a press has the value that it has where nobody gives it.

    Args:
        argument: as recorded, with the press before it where two presses of the name share it.
        value: as text.
    """
    press, _, plain = argument.rpartition(".")
    infos = [info for info in infos_of(name) if press in ("", info.own_name)]
    defaults: Sequence[Any] = [info.arguments[plain] for info in infos if plain in info.arguments]
    return bool(defaults) and all(str(default) == value for default in defaults)
