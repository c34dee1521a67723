"""Lend attributes to an object: the one way in which modules, configs and cache layers are changed for a while.

Knows nothing of models; an ``nn.Module`` is served like any object.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_ABSENT = object()


@contextmanager
def lend(owner: object, **attributes: object) -> Iterator[None]:
    """Set instance attributes, and put back what was there on exit, also after an exception.

    On an ``nn.Module`` they are plain attributes, never submodules or parameters. A submodule that somebody registers
    under a lent name meanwhile is taken off, too: kvpress does so with the rotary embedding.
    """
    before = {name: owner.__dict__.get(name, _ABSENT) for name in attributes}
    submodules = owner.__dict__.get("_modules", {})
    foreign = attributes.keys() - submodules.keys()
    owner.__dict__.update(attributes)
    try:
        yield
    finally:
        for name in foreign:
            submodules.pop(name, None)
        for name, value in before.items():
            if value is _ABSENT:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = value
