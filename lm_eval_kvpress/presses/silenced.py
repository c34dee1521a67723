"""Silence a logger of kvpress's where its warning is not true here.

Knows logging. Does not know presses.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silenced(name: str) -> Iterator[None]:
    """Drop all messages of a logger."""
    logger = logging.getLogger(name)

    def reject(record: logging.LogRecord) -> bool:
        return False

    logger.addFilter(reject)
    try:
        yield
    finally:
        logger.removeFilter(reject)
