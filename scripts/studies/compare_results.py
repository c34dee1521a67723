"""Compare what two commits measured: metrics, kept counts and answers of the same runs, and exit with 1 if they differ.

    python -m scripts.studies.compare_results BEFORE_DIR AFTER_DIR [--tolerance 1e-6]

Both folders hold lm-eval results (`--output_path`) or a sweep. Two runs are the same if they lie in the same folder
below BEFORE_DIR and AFTER_DIR and have the same press; lm-eval's file names, which hold the time, do not count.

What is compared, per task:

- metrics: the largest relative difference. The default tolerance of 1e-6 allows another order of floating-point sums.
  It allows no accuracy to differ, since one changed answer among fewer than a million documents is more than that.
- kept counts: contexts, tokens and bytes of `config.kvpress.tasks`, which must be equal.
- answers, where samples were logged: texts that differ, and the largest difference of a log-likelihood, in nats. They
  are shown and decide nothing: a last digit may tip a tie between two answers that score the same.

A run or a task that only one side has is a difference.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_kvpress.tables import markdown_table

Key = tuple[str, str, str]
"""Folder below the compared one, press with its arguments, task."""


@dataclass(frozen=True)
class TaskResult:
    """One task of one run.

    Attributes:
        metrics: `name,filter` to figure, standard errors included.
        kept: path of a count to the count.
        answers: document and request to what the model answered.
    """

    metrics: Mapping[str, float]
    kept: Mapping[str, float]
    answers: Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """How far one task of one run differs.

    Attributes:
        missing: "before" or "after", if only the other side has it.
        metric: the largest relative difference of a metric, and whose it is.
        kept: the counts that differ, with both figures.
        num_answers: answers that both sides logged; of these `num_texts` texts differ.
        num_unpaired: answers that only one side logged.
        answer: the largest difference of a log-likelihood, nats.
    """

    key: Key
    missing: str | None = None
    num_metrics: int = 0
    metric: tuple[float, str] = (0.0, "")
    kept: tuple[str, ...] = ()
    num_answers: int = 0
    num_unpaired: int = 0
    num_texts: int = 0
    answer: float = 0.0

    def exceeds(self, tolerance: float) -> bool:
        return bool(self.missing or self.kept) or not self.metric[0] <= tolerance


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        differences = compared(read(arguments.before), read(arguments.after))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(markdown(differences, arguments.tolerance))
    failed = [one for one in differences if one.exceeds(arguments.tolerance)]
    verdict = f"by more than {arguments.tolerance:g}, or in a kept count"
    print(f"\n{len(failed)} of {len(differences)} tasks differ {verdict}")
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, metavar="BEFORE_DIR")
    parser.add_argument("after", type=Path, metavar="AFTER_DIR")
    parser.add_argument("--tolerance", type=float, default=1e-6, help="relative, of metrics (default: %(default)g)")
    return parser


# ---------------------------------------------------------------------------------------------------------- reading


def read(folder: Path) -> dict[Key, TaskResult]:
    """Every task of every results file below a folder.

    Raises:
        ValueError: if there are none, or two of the same folder and press, of which none is the right one.
    """
    found: dict[Key, TaskResult] = {}
    for file in sorted(folder.rglob("results_*.json")):
        for key, result in _tasks(file, folder):
            if key in found:
                raise ValueError(f"{file.parent} holds two results of {' '.join(key[1:])}: leave one of them there")
            found[key] = result
    if not found:
        raise ValueError(f"no results_*.json below {folder}: pass the --output_path of lm_eval or of a sweep")
    return found


def _tasks(file: Path, folder: Path) -> Iterator[tuple[Key, TaskResult]]:
    content = json.loads(file.read_text(encoding="utf-8"))
    facts = content["config"].get("kvpress") or {}
    press = facts.get("press") or {"name": "none", "arguments": {}}
    protocol = facts.get("protocol") or {}
    asked = {**press["arguments"], **{name: protocol.get(name) for name in ("rolling", "query_tokens")}}
    shown = " ".join([press["name"], *(f"{name}={value}" for name, value in asked.items() if value is not None)])
    for task, figures in content["results"].items():
        samples = file.with_name(f"samples_{task}_{file.stem.removeprefix('results_')}.jsonl")
        metrics = {name: float(value) for name, value in figures.items() if _is_number(value)}
        kept = dict(_counts("", (facts.get("tasks") or {}).get(task) or {}))
        if not metrics and not kept:  # a group without figures of its own
            continue
        yield (str(file.parent.relative_to(folder)), shown, task), TaskResult(metrics, kept, dict(_answers(samples)))


def _counts(path: str, facts: Any) -> Iterator[tuple[str, float]]:
    """The whole numbers of a task's facts, in depth, by path. Its perplexities and shares follow from other figures."""
    items = facts.items() if isinstance(facts, Mapping) else enumerate(facts) if isinstance(facts, list) else ()
    for name, value in items:
        if isinstance(value, int) and not isinstance(value, bool):
            yield f"{path}{name}", value
        else:
            yield from _counts(f"{path}{name}.", value)


def _answers(samples: Path) -> Iterator[tuple[str, Any]]:
    if samples.is_file():
        with samples.open(encoding="utf-8") as lines:
            for sample in map(json.loads, lines):
                for place, answer in enumerate(sample["resps"]):
                    yield f"{sample['doc_id']} {sample['filter']} {place}", answer


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# -------------------------------------------------------------------------------------------------------- comparing


def compared(before: Mapping[Key, TaskResult], after: Mapping[Key, TaskResult]) -> list[Difference]:
    """One difference per task that either side has."""
    differences = []
    for key in sorted(before.keys() | after.keys()):
        if key not in before or key not in after:
            differences.append(Difference(key, missing="before" if key not in before else "after"))
        else:
            differences.append(_difference(key, before[key], after[key]))
    return differences


def _difference(key: Key, one: TaskResult, other: TaskResult) -> Difference:
    metrics = {
        name: _relative(one.metrics.get(name), other.metrics.get(name)) for name in {**one.metrics, **other.metrics}
    }
    worst = max(metrics, key=lambda name: metrics[name], default="")
    kept = [
        f"{name}: {one.kept.get(name)} -> {other.kept.get(name)}"
        for name in {**one.kept, **other.kept}
        if one.kept.get(name) != other.kept.get(name)
    ]
    shared = [(one.answers[name], other.answers[name]) for name in one.answers.keys() & other.answers.keys()]
    pairs = [pair for answers in shared for pair in zip(*map(_flat, answers), strict=False)]
    numbers = [(_as_number(a), _as_number(b)) for a, b in pairs]
    gaps = [abs(a - b) for a, b in numbers if a is not None and b is not None]
    texts = [a != b for (a, b), (x, y) in zip(pairs, numbers, strict=True) if x is None or y is None]
    return Difference(
        key,
        num_metrics=len(metrics),
        metric=(metrics.get(worst, 0.0), worst),
        kept=tuple(kept),
        num_answers=len(shared),
        num_unpaired=len(one.answers.keys() ^ other.answers.keys()),
        num_texts=sum(texts),
        answer=max(gaps, default=0.0),
    )


def _relative(one: float | None, other: float | None) -> float:
    """0 for two figures that are not numbers, infinite where only one is."""
    if one is None or other is None or math.isnan(one) != math.isnan(other):
        return math.inf
    if one == other or math.isnan(one):
        return 0.0
    return abs(one - other) / max(abs(one), abs(other))


def _flat(answer: Any) -> list[Any]:
    """The parts of a logged answer: a text, or a log-likelihood and whether it is greedy."""
    return [part for item in answer for part in _flat(item)] if isinstance(answer, list) else [answer]


def _as_number(part: Any) -> float | None:
    """lm-eval logs log-likelihoods as text. A generated text that reads as a number is compared as one."""
    try:
        return float(part)
    except ValueError:
        return None


# ---------------------------------------------------------------------------------------------------------- showing


def markdown(differences: Sequence[Difference], tolerance: float) -> str:
    headings = ["run", "press", "task", "metrics", "kept", "answers", ""]
    return markdown_table(headings, [_cells(one, tolerance) for one in differences])


def _cells(one: Difference, tolerance: float) -> list[str]:
    verdict = "DIFFERS" if one.exceeds(tolerance) else "equal" if not one.metric[0] else "within the tolerance"
    if one.missing:
        return [*one.key, "-", "-", "-", f"MISSING {one.missing}"]
    size, name = one.metric
    metrics = f"{one.num_metrics} equal" if not size else f"{name} by {size:.2g}"
    answers = f"{one.num_answers}: {one.num_texts} texts differ, {one.answer:.2g} nats" if one.num_answers else "none"
    if one.num_unpaired:
        answers += f", {one.num_unpaired} on one side only"
    return [*one.key, metrics, "; ".join(one.kept) or "equal", answers, verdict]


if __name__ == "__main__":
    sys.exit(main())
