"""The main job on a small trained model: five presses, one table.

Runs the stock `lm_eval` command once per press on the tasks of `kvpress_demo` and reads the table off its results.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PRESSES = ("none", "snapkv", "streaming_llm", "pyramidkv", "random")
TASKS = Path(__file__).resolve().parent.parent / "tasks"


def run_press(press: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the stock command for one press; its results JSON."""
    output = arguments.output / press
    ratio = "" if press == "none" else f",compression_ratio={arguments.ratio}"
    command = [
        *(str(Path(sys.executable).with_name("lm_eval")), "--model", "pythia-kvpress"),
        *("--model_args", f"pretrained={arguments.pretrained},press={press}{ratio}"),
        *("--tasks", "kvpress_demo", "--include_path", str(TASKS)),
        *("--batch_size", "8", "--output_path", str(output)),
    ]
    print("\n$ " + " ".join(["lm_eval", *command[1:]]), flush=True)
    started = time.time()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "LOGLEVEL": "WARNING"}
    if subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode != 0:
        sys.exit(f"error: the run for press={press} failed; its message stands above")
    files = [file for file in output.rglob("results_*.json") if file.stat().st_mtime >= started - 1]
    if not files:
        sys.exit(f"error: lm_eval wrote no results below {output}")
    return json.loads(max(files, key=lambda file: file.stat().st_mtime).read_text())


def row(press: str, results: dict[str, Any]) -> list[str]:
    """One line of the table, from measured figures only."""
    facts, scores = results["config"]["kvpress"], results["results"]
    contexts = [task["contexts_pressed"] for task in facts["tasks"].values()]
    seen = sum(part["num_tokens"] for part in contexts)
    kept = sum(part["num_tokens"] * part["kept_share"] for part in contexts if part["num_tokens"])
    speeds = facts["throughput"]
    return [
        press,
        f"{100 * kept / seen:.1f} %" if seen else "100 %",
        f"{facts['tasks']['kvpress_story']['token_perplexity_under_press']:.2f}",
        f"{100 * scores['kvpress_recall']['acc,none']:.0f} %",
        f"{100 * scores['kvpress_recall_gen']['exact_match,none']:.0f} %",
        *(f"{speeds[phase]['tokens_per_sec']:,.0f}" for phase in ("prefill", "decode")),
    ]


def notes(press: str, results: dict[str, Any]) -> list[str]:
    """What a reader of the table must know about a press, counted over the contexts of all tasks."""
    counts: Counter[str] = Counter()
    tasks = results["config"]["kvpress"]["tasks"].values()
    for task in tasks:
        counts.update(task["notes"])
    total = sum(task["contexts_pressed"]["num_contexts"] for task in tasks)
    return [f"{press}: {note} ({count} of {total} contexts)" for note, count in counts.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", default="builtin", help="checkpoint to evaluate (default: builtin)")
    parser.add_argument("--ratio", type=float, default=0.5, help="fraction of the cache that is removed (default: 0.5)")
    parser.add_argument("--presses", default=",".join(PRESSES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of the results files")
    arguments = parser.parse_args()
    started = time.monotonic()
    table = Table(title=f"kvpress_demo on {arguments.pretrained}, compression_ratio {arguments.ratio} (removed)")
    for heading in (
        "press",
        "kept, measured",
        "story ppl",
        "recall",
        "recall, generated",
        "prefill tok/s",
        "decode tok/s",
    ):
        table.add_column(heading, justify="left" if heading == "press" else "right", no_wrap=True)
    remarks: list[str] = []
    for press in arguments.presses.split(","):
        results = run_press(press, arguments)
        table.add_row(*row(press, results))
        remarks += notes(press, results)
    Console(width=max(110, Console().width)).print("\n", table)
    print("story ppl: token perplexity of what is scored over the compressed cache, the same tokens for every press.")
    print("recall: four choices; the wrong ones answer other questions, so a lost fact can score below guessing.")
    print("\n".join(remarks + [f"Took {time.monotonic() - started:.0f} s. Results files: {arguments.output}"]))


if __name__ == "__main__":
    main()
