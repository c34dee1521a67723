"""Run RULER's five offline tasks under twelve presses, and write the tables of the leaderboard.

python -m scripts.studies.ruler_board sweep FOLDER
python -m scripts.studies.ruler_board page

The first step takes a checkpoint's folder or hub name. It makes one sweep per task and length, and goes on where it was
stopped. The second writes tables of what is finished into docs/leaderboards/ruler-smollm2.md. Needs
`pip install "lm-eval-kvpress[longcontext]"`, no network.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import kendalltau

from lm_eval_kvpress import cli
from lm_eval_kvpress.bootstrap import paired_intervals
from lm_eval_kvpress.report.cell import Cell
from lm_eval_kvpress.report.result_files import read_results
from lm_eval_kvpress.report.samples import read_samples
from lm_eval_kvpress.tables import markdown_table
from scripts.machine import ROOT
from scripts.studies.press_pages import replaced

FOLDER, SETTINGS = Path("runs/ruler_board"), Path(__file__).with_suffix(".yaml")
PAGE = ROOT / "docs" / "leaderboards" / "ruler-smollm2.md"
LENGTHS = (1024, 2048)
TASKS: Mapping[str, int | None] = {
    "niah_single_1": 24,
    "niah_multikey_2": 24,
    "niah_multikey_3": 48,
    "ruler_fwe": None,
    "ruler_cwe": None,
}
"""Tasks that make their own texts -> the most tokens of an answer. None is RULER's own number, which for needles is
128: a small model's right answer comes first, of 7 digits or 36 characters, and repeats itself."""
NONE, RANDOM = "none", "random"
WHOLE = "niah_single_1"
"""The one task that the full cache answers whole, which decides the ranks over all tasks."""
AWARE, HELD_BACK = "aware", "held back"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    steps.add_parser("sweep").add_argument("pretrained", help="a checkpoint's folder or hub name")
    steps.add_parser("page")
    args = parser.parse_args()
    if args.step == "sweep":
        sweep(FOLDER, args.pretrained)
    else:
        write(PAGE, read_scores(FOLDER))


def sweep(folder: Path, pretrained: str) -> None:
    """Run what is missing of every task, the shorter length first."""
    for length in LENGTHS:
        for task, num_tokens in TASKS.items():
            output = folder / f"{length}.{task}"
            chosen = ["--model_args", f"pretrained={pretrained},dtype=float32", "--tasks", task]
            chosen += ["--metadata", json.dumps({"max_seq_lengths": [length]}), "--output_path", str(output)]
            chosen += [] if num_tokens is None else ["--gen_kwargs", f"max_gen_toks={num_tokens}"]
            if cli.main(["sweep", "--config", str(SETTINGS), *chosen]):
                raise SystemExit(f"{output} could not be finished")


def read_scores(folder: Path) -> pd.DataFrame:
    """The score of each document, from 0 to 1, in every finished cell.

    Returns:
        columns ``task``, ``length``, ``press``, ``ratio`` (0 without a press), ``question`` (`AWARE` or `HELD_BACK`),
        ``document`` and ``score``.
    """
    return pd.DataFrame(row for cell in read_results(sorted(folder.glob("*.*"))) for row in _rows(cell))


def _rows(cell: Cell) -> Iterator[dict[str, Any]]:
    question = HELD_BACK if dict(cell.protocol).get("query_aware") == "false" else AWARE
    for task in cell.tasks:
        (length,) = (metric.name for metric in task.metrics if metric.is_length)
        assert task.samples is not None
        (samples,) = read_samples(task.samples).values()
        about = {"task": task.name, "length": int(length), "press": cell.press.name, "question": question}
        about["ratio"] = cell.press.removed_asked or 0.0
        for document, score in zip(samples.documents, samples.scores[length].numerators, strict=True):
            yield about | {"document": document[0], "score": float(score)}


# ------------------------------------------------------------------------------------------------------------- tables


def write(page: Path, scores: pd.DataFrame) -> None:
    """Replace what stands between the marks of the page, which chooses the tasks and lengths that have a table."""
    text = replaced(page.read_text(encoding="utf-8"), "full", without_press(scores))
    for (task, length), own in scores.groupby(["task", "length"]):
        if f"<!-- {task} at {length}: begin -->" in text:
            text = replaced(text, f"{task} at {length}", presses(own))
    text = replaced(text, "ranks", ranks(scores))
    page.write_text(replaced(text, f"ranks without {WHOLE}", ranks(scores[scores.task != WHOLE])), encoding="utf-8")


def without_press(scores: pd.DataFrame) -> str:
    """What the full cache scores on every task, by length."""
    full = scores[(scores.press == NONE) & (scores.question == AWARE)]
    means = full.pivot_table(index="task", columns="length", values="score").reindex(TASKS)
    rows = [(f"`{task}`", *map(_percent, own)) for task, own in zip(means.index, means.to_numpy(), strict=True)]
    return markdown_table(("task", *(f"{length:,} tokens" for length in means.columns)), rows)


def presses(scores: pd.DataFrame) -> str:
    """The mean score of each press by where the question is and by ratio, the best first."""
    compressed = scores[scores.press != NONE]
    means = compressed.pivot_table(index="press", columns=["question", "ratio"], values="score")
    order = means.mean(axis=1).sort_values(ascending=False, kind="stable").index
    full = scores[scores.press == NONE].groupby("question").score.mean()
    head = ["press", *(f"{question}: {_percent(ratio)} removed" for question, ratio in means.columns)]
    rows = [(NONE, *(_percent(full[question]) for question, _ in means.columns))]
    return markdown_table(head, rows + [(press, *map(_percent, means.loc[press])) for press in order])


def ranks(scores: pd.DataFrame) -> str:
    """The rank of each press by its mean score over all tasks, lengths and ratios, and its distance from `RANDOM`."""
    found = {question: _against_random(scores[scores.question == question]) for question in (AWARE, HELD_BACK)}
    aware, held_back = found.values()
    order = aware.sort_values("score", ascending=False, kind="stable").index
    rows = [(press, *(cell for one in found.values() for cell in _standing(one, press))) for press in order]
    head = [f"{question}: {part}" for question in found for part in ("score", "rank", "beyond random")]
    tau = kendalltau(aware.score, held_back.score.reindex(aware.index)).statistic
    table = markdown_table(("press", *head), rows)
    return f"{table}\n\nKendall's rank correlation of the two columns of scores: {tau:.2f}."


def _standing(found: pd.DataFrame, press: str) -> tuple[str, str, str]:
    """Score, rank and distance from `RANDOM` of one press."""
    rank = found.score.rank(ascending=False, method="min")[press]
    apart, low, high = map(_signed, found.loc[press, ["apart", "low", "high"]])
    return _percent(found.score[press]), f"{rank:.0f}", "-" if press == RANDOM else f"{apart} [{low}, {high}]"


def _against_random(scores: pd.DataFrame) -> pd.DataFrame:
    """Of each press the mean score, the difference to `RANDOM` and the 95 % interval of that.

    A document's score is its mean over ratios: its answers at several ratios are one draw. Documents are paired.
    """
    compressed = scores[scores.press != NONE]
    table = compressed.pivot_table(index=["task", "length", "document"], columns="press", values="score")
    values = table.to_numpy()
    low, high = paired_intervals(values, np.ones_like(values), table.columns.get_loc(RANDOM), lambda ratio: ratio)
    means = table.mean()
    return pd.DataFrame({"score": means, "apart": means - means[RANDOM], "low": low, "high": high})


def _percent(share: float) -> str:
    return "-" if np.isnan(share) else f"{100 * share:.0f} %"


def _signed(difference: float) -> str:
    return f"{100 * difference:+.0f}".replace("-", "−")


if __name__ == "__main__":
    main()
