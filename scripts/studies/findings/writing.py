"""Pieces of Markdown that the sections of the findings share."""

from __future__ import annotations


def section(title: str, *blocks: str) -> str:
    return "\n\n".join([f"## {title}", *(block for block in blocks if block)])


def picture(name: str | None, title: str) -> str:
    return "" if name is None else f"![{title}]({name})"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"
