"""A class of ours is extended through public methods: no subclass replaces a private one of its base."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "lm_eval_kvpress"


def classes() -> Iterator[ast.ClassDef]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield from (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef))


def private_methods(node: ast.ClassDef) -> set[str]:
    names = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
    return {name for name in names if name.startswith("_") and not name.endswith("__")}


def private_attributes(node: ast.ClassDef) -> set[str]:
    """What the class assigns to ``self._name``."""
    targets = (item for item in ast.walk(node) if isinstance(item, ast.Attribute) and isinstance(item.ctx, ast.Store))
    return {item.attr for item in targets if isinstance(item.value, ast.Name) and item.attr.startswith("_")}


def test_no_class_replaces_what_is_private_to_its_base() -> None:
    ours = {node.name: node for node in classes()}
    replaced = {}
    for name, node in ours.items():
        bases = {base.id for base in node.bases if isinstance(base, ast.Name)} & ours.keys()
        for base in bases:
            both = private_methods(node) | private_attributes(node)
            replaced[name, base] = both & (private_methods(ours[base]) | private_attributes(ours[base]))
    assert {pair: names for pair, names in replaced.items() if names} == {}
    assert ("KVPress", "CheckedHFLM") in replaced, "the test looks at what it is about"
