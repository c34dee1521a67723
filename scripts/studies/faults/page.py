"""The tables of a campaign, and their place in `docs/experiments/faults.md`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from lm_eval_kvpress.tables import markdown_table
from scripts.machine import ROOT
from scripts.studies.faults.verdicts import VERDICTS, Trial

PAGE = ROOT / "docs" / "experiments" / "faults.md"
BEGIN, END = "<!-- faults: begin, written by scripts/studies/faults -->", "<!-- faults: end -->"
GOOD = {"killed": {"held"}, "bad input": {"one line"}}
"""Kind to the verdicts that are right; of other kinds both are, since damage may not be mendable."""


def written(trials: Sequence[Trial], facts: Mapping[str, str]) -> str:
    """Numbers of trials by kind and verdict, and every trial that was not right."""
    counts = Counter((_row(trial), trial.verdict) for trial in trials)
    rows = [
        [kind, str(sum(counts[kind, verdict] for verdict in VERDICTS)), *(str(counts[kind, v]) for v in VERDICTS)]
        for kind in dict.fromkeys(map(_row, sorted(trials, key=lambda trial: trial.kind)))
    ]
    bad = [[trial.kind, f"`{trial.name}`", trial.verdict, _cell(trial.detail)] for trial in trials if is_bad(trial)]
    parts = [markdown_table(["fault", "trials", *VERDICTS], rows)]
    if bad:
        parts.append(markdown_table(["fault", "which", "verdict", "what was said"], bad))
    parts.append(f"Commit {facts['commit']}; {facts['machine']}.")
    return "\n\n".join(parts)


def is_bad(trial: Trial) -> bool:
    return trial.verdict not in GOOD.get(trial.kind, {"held", "one line"})


def num_bad(trials: Iterable[Trial]) -> int:
    """How many trials ended as they should not."""
    return sum(map(is_bad, trials))


def update(text: str) -> None:
    """Put the tables into the page."""
    page = PAGE.read_text(encoding="utf-8")
    begin, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    PAGE.write_text(f"{page[:begin]}\n\n{text}\n\n{page[end:]}", encoding="utf-8")


def _row(trial: Trial) -> str:
    """The kind, and of which run."""
    of = next((name for name in ("sweep", "stream", "logged run") if trial.name.startswith(name)), "")
    return f"{trial.kind}: {of}" if of and trial.kind != "bad input" else trial.kind


def _cell(text: str) -> str:
    return text.replace("|", "\\|")[:200]
