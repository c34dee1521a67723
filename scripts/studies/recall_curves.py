"""Recall and story perplexity of every press over the ratio: figures, a PNG and a Markdown table of a sweep's results.

lm-eval-kvpress sweep --config scripts/studies/recall_curves.yaml --output_path runs/recall_curves
python -m scripts.studies.recall_curves runs/recall_curves
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.figure import Figure

from lm_eval_kvpress.report.cell import Cell
from lm_eval_kvpress.tables import markdown_table
from scripts.studies.cells import SCORED_UNDER_PRESS, fell_back, kept_share, metric, notes, read_cells, removed

SETTINGS = Path(__file__).with_suffix(".yaml")
QUESTION_SEEN, QUESTION_HELD_BACK = "1", "32"
"""Tokens that are held back and fed after compression."""


@dataclass(frozen=True)
class Point:
    """One press at one ratio.

    Attributes:
        recall_question_seen, recall_question_held_back: accuracy among four choices.
        fell_back: share of the compressed contexts in which another press ran than the one named.
    """

    press: str
    removed: float
    recall_question_seen: float
    recall_question_held_back: float
    story_perplexity: float
    kept_share: float | None
    notes: tuple[str, ...]
    fell_back: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="--output_path of the sweep")
    folder = Path("docs/figures")
    parser.add_argument("--output", type=Path, default=folder, help="folder of the PNG, JSON and Markdown")
    arguments = parser.parse_args()
    points = read_points(read_cells(arguments.sweep, SETTINGS))
    arguments.output.mkdir(parents=True, exist_ok=True)
    content = json.dumps([asdict(point) for point in points], indent=1)
    (arguments.output / "recall_curves.json").write_text(content + "\n", encoding="utf-8")
    (arguments.output / "recall_curves.md").write_text(markdown(points) + "\n", encoding="utf-8")
    draw(points, arguments.output / "recall_curves.png")


def read_points(cells: Sequence[Cell]) -> list[Point]:
    """Both cells of every press and ratio."""
    by_place = {(cell.press.name, removed(cell), dict(cell.protocol)["query_tokens"]): cell for cell in cells}
    return [
        _point(by_place[press, ratio, QUESTION_SEEN], by_place[press, ratio, QUESTION_HELD_BACK])
        for press, ratio in dict.fromkeys((press, ratio) for press, ratio, _ in by_place)
    ]


def _point(seen: Cell, held_back: Cell) -> Point:
    return Point(
        press=seen.press.name,
        removed=removed(seen),
        recall_question_seen=metric(seen, "kvpress_recall", "acc"),
        recall_question_held_back=metric(held_back, "kvpress_recall", "acc"),
        story_perplexity=metric(seen, "kvpress_story", SCORED_UNDER_PRESS),
        kept_share=kept_share(seen, "kvpress_recall"),
        notes=tuple(sorted(notes(seen))),
        fell_back=fell_back(seen),
    )


def markdown(points: Sequence[Point]) -> str:
    """One row per point."""
    headings = ["press", "removed", "recall, question seen", "recall, question held back", "story perplexity"]
    return markdown_table(headings, [_cells(point) for point in points])


def _cells(point: Point) -> list[str]:
    share = point.fell_back
    mark = f" ({'' if share == 1 else f'{share:.0%} of contexts '}as snapkv)".replace("%", " %") if share else ""
    recall = (f"{100 * value:.0f} %" for value in (point.recall_question_seen, point.recall_question_held_back))
    return [f"{point.press}{mark}", str(point.removed), *recall, f"{point.story_perplexity:.2f}"]


def draw(points: Sequence[Point], file: Path) -> None:
    """Three panels over the share removed; the dashed line is no press, the dotted one guessing."""
    panels = {
        "recall_question_seen": "recall, question seen by the press",
        "recall_question_held_back": "recall, question held back",
        "story_perplexity": "story perplexity under the press",
    }
    baseline = next(point for point in points if point.press == "none")
    presses = dict.fromkeys(point.press for point in points if point.press != "none")
    chart = Figure(figsize=(12, 3.6), layout="constrained")
    axes = chart.subplots(1, 3)
    for axis, (figure, title) in zip(axes, panels.items(), strict=True):
        for marker, press in zip("osD^vPX*", presses, strict=False):
            mine = [point for point in points if point.press == press]
            values = [getattr(point, figure) for point in mine]
            axis.plot([100 * point.removed for point in mine], values, marker=marker, label=press)
        axis.axhline(getattr(baseline, figure), color="black", linestyle="--", linewidth=1, label="none")
        if figure != "story_perplexity":
            axis.axhline(0.25, color="grey", linestyle=":", linewidth=1)
            axis.set_ylim(0, 1.03)
        axis.set(title=title, xlabel="removed, % of the context")
        axis.grid(alpha=0.3)
    axes[-1].legend(fontsize=7)
    chart.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
