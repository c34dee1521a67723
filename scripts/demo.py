"""The main job on a small trained model: five presses, one bar, one table. `make demo` runs it.

A sweep of all presses (`demo.yaml`) prefills every context once. Then lm-eval evaluates one of them without the sweep,
and its figures are held against the sweep's. Both run in this process: to import torch and the libraries once is a
third of the time. What they print goes to a file beside the results.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import datetime
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lm_eval_kvpress.report.build import build_report
from lm_eval_kvpress.report.cell import Cell
from lm_eval_kvpress.report.html import html
from scripts.studies.cells import SCORED_UNDER_PRESS, kept_share, metric, notes, read_cells

SETTINGS = Path(__file__).with_suffix(".yaml")
CHECKED = {"press": "snapkv", "compression_ratio": 0.5}
STORY = {"kvpress_story": [0]}
"""The press, and the document, that lm-eval evaluates alone."""

FIGURES = {
    "story ppl": ("kvpress_story", SCORED_UNDER_PRESS, "{:.2f}"),
    "recall": ("kvpress_recall", "acc", "{:.0%}"),
    "recall, generated": ("kvpress_recall_gen", "exact_match", "{:.0%}"),
}
"""Heading -> task, metric, and how it is printed."""

PROGRESS = re.compile(r"(loglikelihood|loglikelihood_rolling|generate_until) \(press=[\w:+]+\): +(\d+)%")
"""A bar of the lm-eval model."""
KINDS = 3
"""Kinds of requests that the sweep's tasks make, each with a bar of its own."""
LOADING, ALONE = 150, 50
"""How long it takes to import everything, and the story alone, in hundredths of such a bar."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    parser.add_argument("--output", type=Path, default=folder, help="a new folder for the results (default: by time)")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    os.environ |= {"HF_HUB_OFFLINE": "1", "LOGLEVEL": "WARNING"}
    started = time.monotonic()
    sweep = ["--config", os.path.relpath(SETTINGS), "--output_path", str(output / "sweep")]
    print("$ lm-eval-kvpress sweep", *sweep, flush=True)
    with shown_as_a_bar(output / "log.txt"):
        run_sweep(sweep)
        alone = story_perplexity(evaluated_alone())
    cells = read_cells(output / "sweep", SETTINGS)
    page = output / "report.html"
    page.write_text(html(build_report([output / "sweep"])), encoding="utf-8")
    Console(width=max(100, Console().width)).print("\n", table(cells))
    print("\n".join([*noted(cells), advice(cells), agreement(alone, cells)]))
    print(f"Took {time.monotonic() - started:.0f} s. Open {page.resolve()}")


class Feed(io.TextIOBase):
    """Takes what is printed: all of it to a file, and the progress of the model's bars to one bar."""

    def __init__(self, log: IO[str], bar: Progress) -> None:
        self._log, self._bar = log, bar
        self._task = bar.add_task("five presses", total=LOADING + 100 * KINDS + ALONE)
        self._done: dict[str, int] = {}

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """For tqdm, which draws in letters without one."""
        return "utf-8"

    def write(self, text: str) -> int:
        self._done |= {kind: int(percent) for kind, percent in PROGRESS.findall(text)}
        self._bar.update(self._task, completed=LOADING * bool(self._done) + sum(self._done.values()))
        return self._log.write(text)

    def finish(self) -> None:
        """Fill the bar."""
        self._bar.update(self._task, completed=LOADING + 100 * KINDS + ALONE)


@contextmanager
def shown_as_a_bar(log: Path) -> Iterator[None]:
    """Show what runs as one bar; where it fails, the traceback follows, and the file says what came before."""
    bar = Progress(console=Console(file=sys.stdout), redirect_stdout=False, redirect_stderr=False)
    with bar, log.open("w", encoding="utf-8") as file:
        feed = Feed(file, bar)
        with redirect_stdout(feed), redirect_stderr(feed):
            yield
        feed.finish()


def run_sweep(arguments: Sequence[str]) -> None:
    from lm_eval_kvpress.sweep.command import main as sweep  # imported behind the bar

    sweep(arguments)


def evaluated_alone() -> dict[str, float]:
    """The story's metrics, as lm-eval's own `simple_evaluate` finds them."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from lm_eval_kvpress.harness.model import PythiaKVPress
    from lm_eval_kvpress.harness.plugin import tasks_path

    model = PythiaKVPress("builtin", batch_size=8, **CHECKED)
    tasks = TaskManager(include_path=str(tasks_path()), include_defaults=False)
    results = lm_eval.simple_evaluate(model, task_manager=tasks, tasks=["kvpress_story"], samples=STORY)
    assert results is not None
    found: dict[str, float] = results["results"]["kvpress_story"]
    return found


def story_perplexity(metrics: dict[str, float]) -> float:
    return metrics[f"{SCORED_UNDER_PRESS},none"]


def table(cells: Sequence[Cell]) -> Table:
    shown = Table(title="kvpress_demo on the built-in checkpoint, compression_ratio 0.5 (removed)")
    for heading in ("press", "kept, measured", *FIGURES):
        shown.add_column(heading, justify="left" if heading == "press" else "right", no_wrap=True)
    for cell in cells:
        shown.add_row(*row(cell))
    return shown


def row(cell: Cell) -> list[str]:
    """One line of the table, from measured figures only."""
    share = kept_share(cell)
    return [
        cell.press.name,
        "100 %" if share is None else f"{100 * share:.1f} %",
        *(shape.format(metric(cell, task, name)).replace("%", " %") for task, name, shape in FIGURES.values()),
    ]


def noted(cells: Sequence[Cell]) -> list[str]:
    """What presses said about themselves."""
    found = [(cell.press.name, note, share) for cell in cells for note, share in notes(cell).items()]
    return [f"{press}: {note} (in {share:.0%} of its contexts)" for press, note, share in found]


def advice(cells: Sequence[Cell]) -> str:
    """What to look at, in one sentence."""
    recall = {cell.press.name: f"{metric(cell, 'kvpress_recall', 'acc'):.0%}" for cell in cells}
    return (
        f"Look at recall: every press kept half of the cache, snapkv answers {recall['snapkv']} and random, by chance, "
        f"{recall['random']} (guessing: 25%), while the perplexities hardly differ."
    )


def agreement(alone: float, cells: Sequence[Cell]) -> str:
    """Say how far lm-eval's figure of the story is from that of the same press in the sweep."""
    cell = next(cell for cell in cells if cell.press.name == CHECKED["press"])
    swept = metric(cell, "kvpress_story", SCORED_UNDER_PRESS)
    difference = abs(alone - swept) / swept
    verdict = "agree" if difference < 1e-6 else "DISAGREE"
    return f"lm-eval alone and the sweep {verdict} on {cell.press.name}'s story: relative difference {difference:.1g}."


if __name__ == "__main__":
    main()
