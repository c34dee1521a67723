"""Silence kvpress's warning, at every prefill, that it has not tested a model class: this project's tests have.

Knows logging. Does not know models or presses.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_untested_warning() -> Iterator[None]:
    """A context in which the warning is dropped."""
    logger = logging.getLogger("kvpress.presses.base_press")

    def is_other(record: logging.LogRecord) -> bool:
        return "not tested, supported models" not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
