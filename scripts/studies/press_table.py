"""Recall and story perplexity of every press on the built-in, in one sorted table, with the time of calibration.

python -m scripts.studies.press_table calibrate
for task in kvpress_recall kvpress_story; do for part in press_table press_table_finch press_table_eager; do
    lm-eval-kvpress sweep --config scripts/studies/$part.yaml --tasks $task --output_path runs/press_table/$part.$task
done; done
python -m scripts.studies.press_table table
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from lm_eval_kvpress import cli, recall
from lm_eval_kvpress.report.cell import Cell
from lm_eval_kvpress.report.result_files import read_results
from lm_eval_kvpress.tables import markdown_table
from scripts.studies.cells import SCORED_UNDER_PRESS, kept_share, metric

FOLDER = Path("runs/press_table")
SETTINGS, OF_FINCH, EAGER = (Path(__file__).with_name(f"press_table{name}.yaml") for name in ("", "_finch", "_eager"))
CALIBRATED = ("qfilter", "expected_attention_stats", "duo_attention", "kvzap", "lukv")
SEED = 31
"""Of the recall documents to calibrate on: no task draws from it."""


RECALL, STORY = "kvpress_recall", "kvpress_story"


@dataclass(frozen=True)
class Point:
    """One press at one of its three strengths; None is what was not run.

    Attributes:
        recall: accuracy among four choices.
        perplexity: of a story, per token scored over a compressed cache.
        kept: share of the entries of the recall documents that could still be attended.
    """

    press: str
    recall: float
    perplexity: float | None
    kept: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("calibrate", "table"))
    parser.add_argument("--folder", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    if arguments.step == "calibrate":
        calibrate(arguments.folder)
    else:
        print(table(read_points(arguments.folder)))
        print("\n" + calibration_table(arguments.folder))


def calibrate(folder: Path) -> None:
    """Write texts of a seed that no task has, and the statistics of every press that needs some."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = folder / "calibration.jsonl"
    documents = recall.recall_documents(SEED, per_cell=4, distances=(100, 400, 800, 1200, 1500), kinds=recall.KINDS)
    texts.write_text("".join(json.dumps({"text": one.context + one.question}) + "\n" for one in documents))
    for press in CALIBRATED:
        if cli.main(["calibrate", press, "--data", str(texts), "-o", str(_file(folder, press))]):
            raise SystemExit(f"{press} could not be calibrated")


def _file(folder: Path, press: str) -> Path:
    return folder / f"{press}.safetensors"


def read_points(folder: Path) -> list[Point]:
    """Every press and strength whose recall was measured."""
    cells = read_results(sorted(folder.glob("press_table*.kvpress_*")))
    stories = {_key(cell): metric(cell, STORY, SCORED_UNDER_PRESS) for cell in cells if cell.task(STORY)}
    return [
        Point(cell.press.name, metric(cell, RECALL, "acc"), stories.get(_key(cell)), _kept(cell))
        for cell in cells
        if cell.task(RECALL)
    ]


def _key(cell: Cell) -> tuple[object, ...]:
    return cell.press.name, cell.press.arguments


def _kept(cell: Cell) -> float:
    kept = kept_share(cell, RECALL)
    return 1.0 if kept is None else kept


def table(points: Sequence[Point]) -> str:
    """One row per press, the best recall first; where it is the same, the lower perplexity."""
    rows = defaultdict(list)
    for point in points:
        rows[point.press].append(point)
    by_chance = _mean_recall(rows["random"])
    ranked = sorted(rows.items(), key=lambda row: (-_mean_recall(row[1]), _mean_perplexity(row[1]), row[0]))
    header = ("press", "kept", "recall", "story perplexity", "mean recall")
    return markdown_table(header, [_row(press, own, by_chance) for press, own in ranked])


def _row(press: str, points: Sequence[Point], by_chance: float) -> tuple[str, ...]:
    """Figures from the weakest to the strongest setting; a star where random does as well."""
    own, mean = sorted(points, key=lambda point: -point.kept), _mean_recall(points)
    star = "*" if mean <= by_chance and press not in ("none", "random") else ""
    return (
        f"`{press}`{star}",
        " / ".join(f"{100 * point.kept:.0f} %" for point in own),
        " / ".join(f"{point.recall:.2f}" for point in own),
        " / ".join("-" if point.perplexity is None else f"{point.perplexity:.1f}" for point in own),
        f"{mean:.3f}",
    )


def _mean_recall(points: Sequence[Point]) -> float:
    return sum(point.recall for point in points) / len(points)


def _mean_perplexity(points: Sequence[Point]) -> float:
    return sum(point.perplexity or 0.0 for point in points) / len(points)


def calibration_table(folder: Path) -> str:
    """What each file of statistics took."""
    return markdown_table(("press", "tokens", "seconds"), list(_calibrations(folder)))


def _calibrations(folder: Path) -> Iterator[tuple[str, str, str]]:
    for press in CALIBRATED:
        with safe_open(_file(folder, press), framework="pt") as content:
            about = content.metadata()
        yield f"`{about['press']}`", f"{int(about['num_tokens']):,}", about["seconds"]


if __name__ == "__main__":
    main()
