"""The main job on a small trained model: five presses, one table. `make demo` runs it.

First the stock `lm_eval` command under one press, then a sweep of all of them (`demo.yaml`), which prefills every
context once for all presses. The table is read off the sweep's results, and the stock command's figures are held
against it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lm_eval_kvpress.report.cell import Cell
from lm_eval_kvpress.report.formatting import Kind, format_value
from scripts.studies.cells import SCORED_UNDER_PRESS, kept_share, metric, notes, read_cells

SETTINGS = Path(__file__).with_suffix(".yaml")
STOCK = ("--model", "pythia-kvpress", "--model_args", "pretrained=builtin,press=snapkv,compression_ratio=0.5")
TASKS = ("--tasks", "kvpress_demo", "--batch_size", "8")

FIGURES = {
    "story ppl": ("kvpress_story", SCORED_UNDER_PRESS, "{:.2f}"),
    "recall": ("kvpress_recall", "acc", "{:.0%}"),
    "recall, generated": ("kvpress_recall_gen", "exact_match", "{:.0%}"),
}
"""Heading -> task, metric, and how it is printed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    parser.add_argument("--output", type=Path, default=folder, help="a new folder for the results (default: by time)")
    output = parser.parse_args().output
    started = time.monotonic()
    run("lm_eval", *STOCK, *TASKS, "--output_path", str(output / "stock"))
    print("(the same under press=none, streaming_llm, pyramidkv and random; a sweep runs all five from one prefill)")
    run("lm-eval-kvpress", "sweep", "--config", os.path.relpath(SETTINGS), "--output_path", str(output / "sweep"))
    (stock,), cells = read_cells(output / "stock", SETTINGS), read_cells(output / "sweep", SETTINGS)
    Console(width=max(110, Console().width)).print("\n", table(cells))
    print("\n".join([*legend(cells), agreement(stock, cells)]))
    print(f"Took {time.monotonic() - started:.0f} s. As a page: lm-eval-kvpress report {output / 'sweep'} -o demo.html")


def run(program: str, *arguments: str) -> None:
    """Print a command of this environment and run it; its own table is left out."""
    print("\n$ " + " ".join([program, *arguments]), flush=True)
    command = [str(Path(sys.executable).with_name(program)), *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "LOGLEVEL": "WARNING"}
    if subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode != 0:
        sys.exit(f"error: {program} failed; its message stands above")


def table(cells: Sequence[Cell]) -> Table:
    shown = Table(title="kvpress_demo on the built-in checkpoint, compression_ratio 0.5 (removed)")
    for heading in ("press", "kept, measured", *FIGURES, "decode tok/s"):
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
        format_value(cell.speed.decode_tokens_per_sec, Kind.COUNT),
    ]


def legend(cells: Sequence[Cell]) -> list[str]:
    """What a reader of the table must know."""
    prefill = f"{format_value(cells[0].speed.prefill_tokens_per_sec, Kind.COUNT)} tok/s"
    noted = [(cell.press.name, note, share) for cell in cells for note, share in notes(cell).items()]
    return [
        "story ppl: token perplexity of what is scored over the compressed cache, the same tokens for every press.",
        "recall: four choices; the wrong ones answer other questions, so a lost fact can score below guessing.",
        f"prefill: {prefill}, one forward for all presses; what the presses themselves take stands apart.",
        *(f"{press}: {note} (in {share:.0%} of its contexts)" for press, note, share in noted),
    ]


def agreement(stock: Cell, cells: Sequence[Cell]) -> str:
    """Say how far the stock command's figures are from those of the same press in the sweep."""
    cell = next(cell for cell in cells if cell.press == stock.press)
    pairs = [(metric(stock, task, name), metric(cell, task, name)) for task, name, _ in FIGURES.values()]
    largest = max(abs(one - other) / abs(one) for one, other in pairs)
    verdict = "agree" if largest < 1e-6 else "DISAGREE"
    return f"The stock command and the sweep {verdict} on {cell.press.name}: largest relative difference {largest:.1g}."


if __name__ == "__main__":
    main()
