"""Write the list of presses that ships with the package: `python -m scripts.press_list`."""

from __future__ import annotations

import json
from dataclasses import asdict

from lm_eval_kvpress.press_list import FILE
from lm_eval_kvpress.presses.catalog import ALIASES
from lm_eval_kvpress.presses.listing import list_presses


def main() -> None:
    FILE.write_text(as_json(), encoding="utf-8")
    print(f"{FILE}: {len(list_presses())} presses")


def as_json() -> str:
    """What the catalog says of each press, and of each alias."""
    content = {
        "presses": [asdict(press) for press in list_presses()],
        "aliases": {name: press for name, (press, _) in ALIASES.items()},
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    main()
