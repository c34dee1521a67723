"""MkDocs hook: the tables of `docs/results.schema.json`, one for each object, on the page of the results file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

from lm_eval_kvpress.tables import markdown_table

SCHEMA = Path(__file__).resolve().parents[1] / "docs" / "results.schema.json"
PLACE = "<!-- tables of results.schema.json, on the site -->"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the tables where the page marks their place."""
    if PLACE not in markdown:
        return markdown
    return markdown.replace(PLACE, "\n\n".join(tables(json.loads(SCHEMA.read_text(encoding="utf-8")))))


def tables(schema: dict[str, Any]) -> Iterator[str]:
    """Yield a heading and a table for each object of the schema, in its order."""
    for part in schema["$defs"].values():
        if "properties" in part:
            rows = [
                (f"`{name}`", _types(field, schema), field["description"]) for name, field in part["properties"].items()
            ]
            yield f"## {part['title']}\n\n{markdown_table(('field', 'type', 'meaning'), rows)}"


def _types(field: dict[str, Any], schema: dict[str, Any]) -> str:
    """What a field may be, in words; null, which the meaning explains, comes last."""
    if "enum" in field:
        return " or ".join(f"`{value}`" for value in field["enum"])
    if "oneOf" in field:
        return " or ".join(_types(choice, schema) for choice in field["oneOf"])
    if "$ref" in field:
        return _types(schema["$defs"][field["$ref"].rpartition("/")[-1]], schema)
    types = field["type"] if isinstance(field["type"], list) else [field["type"]]
    return " or ".join(types)
