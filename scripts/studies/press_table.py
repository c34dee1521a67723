"""Run every press on the built-in: recall and story perplexity, and the time of calibration.

python -m scripts.studies.press_table calibrate
python -m scripts.studies.press_table sweep
python -m scripts.studies.press_table pages

Each step goes on where it was stopped. The last writes tables into docs/experiments/press_table.md and docs/presses.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import yaml
from safetensors import safe_open

from lm_eval_kvpress import cli, recall
from lm_eval_kvpress.report.cell import Cell
from lm_eval_kvpress.report.result_files import read_results
from lm_eval_kvpress.tables import markdown_table
from scripts.studies import press_pages as pages
from scripts.studies.cells import SCORED_UNDER_PRESS, kept_share, metric
from scripts.studies.press_pages import Point

FOLDER = Path("runs/press_table")
SETTINGS, OF_FINCH, EAGER = (Path(__file__).with_name(f"press_table{name}.yaml") for name in ("", "_finch", "_eager"))
CALIBRATED = ("qfilter", "expected_attention_stats", "duo_attention", "kvzap", "lukv")
SEED = 31
"""Of the recall documents to calibrate on: no task draws from it."""


RECALL, STORY = "kvpress_recall", "kvpress_story"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("calibrate", "sweep", "pages"))
    step = parser.parse_args().step
    if step == "calibrate":
        calibrate(FOLDER)
    elif step == "sweep":
        sweep(FOLDER)
    else:
        pages.write(read_points(FOLDER), calibration_table(FOLDER))


def calibrate(folder: Path) -> None:
    """Write texts of a seed that no task has, and the statistics that are missing of the presses that need some."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = folder / "calibration.jsonl"
    documents = recall.recall_documents(SEED, per_cell=4, distances=(100, 400, 800, 1200, 1500), kinds=recall.KINDS)
    texts.write_text("".join(json.dumps({"text": one.context + one.question}) + "\n" for one in documents))
    for press in CALIBRATED:
        file = _file(folder, press)
        if not file.exists() and cli.main(["calibrate", press, "--data", str(texts), "-o", str(file)]):
            raise SystemExit(f"{press} could not be calibrated")


def _file(folder: Path, press: str) -> Path:
    return folder / f"{press}.safetensors"


def statistics_of(press: str) -> dict[str, str]:
    """The argument that names a press's file, once `calibrate` has written it."""
    return {"statistics": str(_file(FOLDER, press))}


def sweep(folder: Path) -> None:
    """Run what is missing of every press, recall before perplexity."""
    parts = {file: yaml.safe_load(file.read_text(encoding="utf-8")) for file in (OF_FINCH, EAGER, SETTINGS)}
    for task in (RECALL, STORY):
        for file in (file for file, settings in parts.items() if task in settings["tasks"]):
            samples = json.dumps({task: parts[file]["samples"][task]})
            output = str(folder / f"{file.stem}.{task}")
            chosen = ("--tasks", task, "--samples", samples, "--output_path", output)
            if cli.main(["sweep", "--config", str(file), *chosen]):
                raise SystemExit(f"{output} could not be finished")


def read_points(folder: Path) -> list[Point]:
    """Every press and strength whose recall was measured."""
    cells = read_results(sorted(folder.glob("press_table*.kvpress_*")))
    stories = {_key(cell): metric(cell, STORY, SCORED_UNDER_PRESS) for cell in cells if cell.task(STORY)}
    return [
        Point(_name(cell), metric(cell, RECALL, "acc"), stories.get(_key(cell)), _kept(cell))
        for cell in cells
        if cell.task(RECALL)
    ]


def _name(cell: Cell) -> str:
    """As in ``press=``; kvzip_plus is kvzip with an argument."""
    return "kvzip_plus" if ("kvzip_plus_normalization", "True") in cell.press.arguments else cell.press.name


def _key(cell: Cell) -> tuple[object, ...]:
    return cell.press.name, cell.press.removed_asked, cell.press.arguments


def _kept(cell: Cell) -> float:
    kept = kept_share(cell, RECALL)
    return 1.0 if kept is None else kept


def calibration_table(folder: Path) -> str:
    """What each file of statistics took: seconds of the processor, and on the clock."""
    return markdown_table(("press", "tokens", "processor", "clock"), list(_calibrations(folder)))


def _calibrations(folder: Path) -> Iterator[tuple[str, ...]]:
    for press in CALIBRATED:
        with safe_open(_file(folder, press), framework="pt") as content:
            about = content.metadata()
        yield (
            f"`{about['press']}`",
            f"{int(about['num_tokens']):,}",
            f"{about['processor_seconds']} s",
            f"{about['seconds']} s",
        )


if __name__ == "__main__":
    main()
