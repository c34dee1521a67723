"""Every press that acts while text is generated: perplexity of long texts, and tokens on which the full cache agrees.

python -m scripts.studies.press_table calibrate
python -m scripts.studies.decoding_presses sweep
python -m scripts.studies.decoding_presses page

A story is scored as if all but its first tokens were being generated (``decode_scoring=true``). Each step goes on where
it was stopped; the last writes the first table of docs/experiments/decoding_presses.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lm_eval_kvpress import cli
from lm_eval_kvpress.report.cell import Cell
from lm_eval_kvpress.report.result_files import read_results
from lm_eval_kvpress.tables import markdown_table
from scripts.machine import ROOT
from scripts.studies import press_table
from scripts.studies.cells import SCORED_UNDER_PRESS, metric
from scripts.studies.press_pages import replaced

FOLDER, PAGE = Path("runs/decoding_presses"), ROOT / "docs" / "experiments" / "decoding_presses.md"
STORY = 2
CONTEXT, SCORED, INTERVAL = 64, 640, 32
SIZES = (64, 192)
RATIOS = (0.9, 0.5)
"""Of ``compression_ratio_decoding``: shares of all tokens seen that are evicted."""

_WINDOW = {"decoding.window_size": 16}
_LAG = {"decoding.lag_size": 24}
PRESSES: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(("knorm", "keydiff", "tova", "streaming_llm", "random", "cur", "cap", "expected_attention"), {}),
    **{
        name: {f"decoding.{key}": value for key, value in press_table.statistics_of(name).items()}
        for name in ("qfilter", "expected_attention_stats")
    },
    **dict.fromkeys(("snapkv", "rkv", "adakv:snapkv", "criticalkv:snapkv"), _WINDOW),
    **dict.fromkeys(("adakv:keydiff", "adakv:expected_attention", "compression_ratio_decoding:keydiff"), {}),
    "lagkv": _LAG,
}
EAGER: Mapping[str, Mapping[str, Any]] = dict.fromkeys(("observed_attention", "cam:keydiff", "cam:tova"), {})
"""Those that need eager attention, which a loaded model has or has not: a sweep of their own."""


def settings(presses: Mapping[str, Mapping[str, Any]], attention: str) -> dict[str, Any]:
    """A sweep of some presses at every size; the first cell evicts nothing."""
    shared = {"decode_scoring": True, "compression_interval": INTERVAL}
    whole = {"press": "decoding:streaming_llm", "target_size": CONTEXT + SCORED}
    cells = [whole] if attention == "sdpa" else []
    for name, arguments in presses.items():
        by_ratio = name.startswith("compression_ratio_decoding:")
        size, values = ("target_compression_ratio", RATIOS) if by_ratio else ("target_size", SIZES)
        full = name if by_ratio or name.startswith("cam:") else f"decoding:{name}"
        cells += [{"press": full, **arguments, size: value} for value in values]
    model = {"pretrained": "builtin", "dtype": "float32", "rolling_context": CONTEXT, "rolling_score": SCORED}
    return {
        "model_args": {**model, "attn_implementation": attention},
        "presses": [{**cell, **shared} for cell in cells],
        "tasks": [press_table.STORY],
        "samples": {press_table.STORY: [STORY]},
        "fidelity": True,
        "batch_size": 8,
    }


def sweep() -> None:
    """Run what is missing."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for attention, presses in (("eager", EAGER), ("sdpa", PRESSES)):
        file = FOLDER / f"{attention}.yaml"
        file.write_text(yaml.safe_dump(settings(presses, attention), sort_keys=False), encoding="utf-8")
        if cli.main(["sweep", "--config", str(file), "--output_path", str(FOLDER / attention)]):
            raise SystemExit(f"{FOLDER / attention} could not be finished")


@dataclass(frozen=True)
class Point:
    """One press at one size.

    Attributes:
        evicts: the size, or the ratio.
        perplexity: per token scored after the prefill's last one.
        agreement: share of these tokens for which the full cache has the same most likely one.
    """

    press: str
    evicts: float
    perplexity: float
    agreement: float


def read_points(cells: Sequence[Cell]) -> list[Point]:
    """A point of each cell."""
    return [_point(cell) for cell in cells]


def _point(cell: Cell) -> Point:
    arguments, agreement = dict(cell.press.arguments), cell.agreement
    assert agreement is not None, f"{cell.file} was run without fidelity"
    size = arguments.get("decoding.target_size") or arguments["decoding.target_compression_ratio"]
    perplexity = metric(cell, press_table.STORY, SCORED_UNDER_PRESS)
    return Point(cell.press.name.removeprefix("decoding:"), float(size), perplexity, agreement.mean)


def table(points: Sequence[Point]) -> str:
    """One row per press, the lowest perplexity at the smallest cache first; the full cache on top."""
    rows = dict[str, list[Point]]()
    for point in points:
        name = "none" if point.evicts == CONTEXT + SCORED else point.press
        rows.setdefault(name, []).append(point)
    for own in rows.values():
        own.sort(key=lambda point: point.evicts, reverse=own[0].evicts < 1)
    ranked = sorted(rows.items(), key=lambda row: (row[0] != "none", row[1][0].perplexity))
    return markdown_table(("press", "perplexity", "same most likely token"), [_row(*row) for row in ranked])


def _row(press: str, points: Sequence[Point]) -> tuple[str, str, str]:
    return (
        f"`{press}`",
        " / ".join(f"{point.perplexity:.1f}" for point in points),
        " / ".join(f"{100 * point.agreement:.1f}" for point in points) + " %",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("sweep", "page"))
    if parser.parse_args().step == "sweep":
        sweep()
    else:
        found = table(read_points(read_results([FOLDER / "eager", FOLDER / "sdpa"])))
        PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), "figures", found), encoding="utf-8")


if __name__ == "__main__":
    main()
