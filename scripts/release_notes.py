"""Print the changelog's section of one version: the text of a release.

python scripts/release_notes.py 0.2.0
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

CHANGELOG = Path(__file__).parent.parent / "CHANGELOG.md"


def notes_of(version: str, changelog: str) -> str:
    """Return the text below the heading `## VERSION`, up to the next version's heading.

    Raises `ValueError` where the changelog has no such heading, so that no release goes out without notes.
    """
    section = re.search(rf"^## {re.escape(version)}(?: [^\n]*)?\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    if section is None:
        raise ValueError(f"CHANGELOG.md has no heading '## {version}'")
    return section.group(1).strip() + "\n"


if __name__ == "__main__":
    try:
        print(notes_of(sys.argv[1], CHANGELOG.read_text()), end="")
    except (IndexError, ValueError) as error:
        sys.exit(f"release_notes.py VERSION: {error}")
