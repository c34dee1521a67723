"""Renders the templates in `assets`. Everything that a template prints is escaped for its format.

The exception is what a template marks as ``| safe``, which gives it an ``__html__``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

# LaTeX is full of braces, so its templates have other delimiters than Jinja's own.
ANGLES = {
    "block_start_string": "<%",
    "block_end_string": "%>",
    "variable_start_string": "<<",
    "variable_end_string": ">>",
    "comment_start_string": "<#",
    "comment_end_string": "#>",
}


def render_text(template: str, escape: Callable[[str], str], delimiters: dict[str, Any], **values: Any) -> str:
    """A template of a text format.

    Args:
        template: the name of a file in `assets`.
        escape: makes text plain text of the format.
        delimiters: in place of Jinja's own; empty for these.
        values: the variables of the template.
    """

    def finalize(value: object) -> str:
        return str(value) if hasattr(value, "__html__") else escape(str(value))

    environment = _environment(finalize=finalize, keep_trailing_newline=True, **delimiters)
    environment.filters["json"] = json.dumps
    return environment.get_template(template).render(values)


def render_html(template: str, **values: Any) -> str:
    """An HTML template, escaped by Jinja."""
    return _environment(autoescape=True).get_template(template).render(values)


def _environment(**options: Any) -> Environment:
    return Environment(
        loader=PackageLoader("lm_eval_kvpress.report", "assets"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )
