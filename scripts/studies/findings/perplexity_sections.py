"""What perplexity shows and hides: the sections on protocols, the wrong split and the ratio.

Every sentence with a figure is chosen by that figure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lm_eval_kvpress.tables import markdown_table
from scripts.studies.findings.rows import Findings, OneForward, Perplexity, SplitDifference, datasets, presses
from scripts.studies.findings.writing import percent, picture, section

ROUNDING = 1e-5
"""Relative difference of perplexities below which they are the same figure: sums of thousands of float32 terms."""

# ------------------------------------------------------------------------------------------------------ protocols


def protocols_section(findings: Findings, figure: str | None) -> str:
    rows = findings.protocols
    if not rows:
        return ""
    return section(
        "Why was it 10.96 and 8.94 everywhere?",
        "The origin measured WikiText and PG19 perplexity of Pythia-2.8B under SnapKV, StreamingLLM and PyramidKV and "
        "found 10.96 and 8.94 for every method, the baseline included. Here, by that protocol and by one that reads "
        "the cache:",
        *perplexity_tables(rows),
        picture(figure, "Perplexity relative to no press, by protocol"),
        *(protocol_sentence(rows, dataset) for dataset in datasets(rows)),
        "A press is a hook that prunes a layer's cache after that layer's attention has run. A single forward under "
        f"each press ({findings.forwards[0].num_tokens} tokens) shows the order of events:",
        markdown_table(
            ["press", "entries left in the cache", "largest logit", "largest change of a logit"],
            [
                [f.press, percent(f.kept_share), f"{f.largest_logit:.2f}", f"{f.largest_difference:.2g}"]
                for f in findings.forwards
            ],
        ),
        forward_sentence(findings.forwards),
    )


def protocol_sentence(rows: Sequence[Perplexity], dataset: str) -> str:
    found = {
        protocol: {row.press: row.perplexity for row in rows if (row.dataset, row.protocol) == (dataset, protocol)}
        for protocol in ("one_pass", "prefix")
    }
    spreads = {protocol: max(by_press.values()) / min(by_press.values()) - 1 for protocol, by_press in found.items()}
    if spreads["one_pass"] <= ROUNDING:
        control = f"`one_pass` gives one figure for every press, {next(iter(found['one_pass'].values())):.2f}"
    else:
        control = f"`one_pass` figures differ by {percent(spreads['one_pass'])}, which no press can cause"
    plain = found["prefix"]["none"]
    moves = {press: value / plain - 1 for press, value in found["prefix"].items() if press != "none"}
    if spreads["prefix"] <= ROUNDING:
        effect = "`prefix` does too: the presses did not act"
    else:
        effect = "`prefix` tells them apart: " + ", ".join(f"{press} {move:+.1%}" for press, move in moves.items())
    return f"**{dataset}**: {control}; {effect} against no press ({plain:.2f})."


def forward_sentence(forwards: Sequence[OneForward]) -> str:
    moved = [f.press for f in forwards if f.largest_difference > ROUNDING * f.largest_logit]
    pruned = [f.press for f in forwards if f.kept_share < 1]
    if moved:
        return f"The logits moved under {', '.join(moved)}: there the press acts within the forward."
    if len(pruned) == len(forwards):
        return (
            "Every press pruned the cache, and not one logit moved: they had been computed from the full cache before "
            "the first entry went, and nothing read what was left. A perplexity from such forwards is the baseline's, "
            "whatever the press does. That is why it was 10.96 and 8.94 everywhere."
        )
    return "The logits did not move, and not every press pruned: see the table."


# ----------------------------------------------------------------------------------------------------- wrong split


def split_section(findings: Findings) -> str:
    rows = findings.wrong
    if not rows:
        return ""
    answers = [
        [row.press, row.split, percent(row.accuracy), f"{row.mean_move:.2f}"]
        for wrong in findings.wrong_answers
        for row in [*(r for r in findings.first_tokens if r.press == wrong.press and r.held_back == 1), wrong]
    ]
    return section(
        "A wrong Q/K/V split",
        "GPTNeoX fuses Q, K and V head by head. The origin once cut the rows into contiguous thirds, which runs, saw "
        "the same perplexity, and took SnapKV for robust. Right and wrong split, the same documents:",
        *perplexity_tables(rows, with_split=True),
        split_sentence(rows),
        "Which entries are kept, over all layers and heads:",
        markdown_table(
            ["press", "contexts", "entries kept", "of these evicted with the wrong split"],
            [
                [d.press, str(d.num_contexts), f"{d.num_kept:,}", percent(d.num_different / d.num_kept)]
                for d in findings.differences
            ],
        ),
        difference_sentence(findings.differences),
        "Questions about a fact in the context (more of them below):",
        markdown_table(["press", "split", "right answers", "mean change against no press, nats"], answers),
        "`lm-eval-kvpress verify` looks for a wrong split where it is: at the projections and the kept entries.",
    )


def split_sentence(rows: Sequence[Perplexity]) -> str:
    """What the wrong split does to perplexity: its relative change, by protocol."""
    figures = {(row.protocol, row.dataset, row.press, row.split): row.perplexity for row in rows}
    moves = {
        protocol: {
            f"{press} on {dataset}": figures[protocol, dataset, press, "contiguous"] / right - 1
            for (of, dataset, press, split), right in figures.items()
            if (of, split) == (protocol, "right")
        }
        for protocol in ("one_pass", "prefix")
    }
    largest = max(abs(move) for move in moves["one_pass"].values())
    control = "invisible" if largest <= ROUNDING else f"worth up to {largest:.2%}, which it cannot be,"
    told = ", ".join(f"{case} {move:+.2%}" for case, move in moves["prefix"].items())
    better = [case for case, move in moves["prefix"].items() if move < -ROUNDING]
    verdict = f" It scores *better* for {', '.join(better)}: a better perplexity proves no split." if better else ""
    return f"The wrong split is {control} under `one_pass`. Under `prefix` it moves perplexity: {told}.{verdict}"


def difference_sentence(differences: Sequence[SplitDifference]) -> str:
    affected = [d for d in differences if d.num_different]
    unaffected = [d.press for d in differences if not d.num_different]
    lines = []
    if affected:
        shares = ", ".join(f"{d.press} {percent(d.num_different / d.num_kept)}" for d in affected)
        lines.append(f"The wrong split changes which entries stay: {shares} of those kept.")
    if unaffected:
        lines.append(f"{', '.join(unaffected)}: not one entry differs.")
    return " ".join(lines)


# ---------------------------------------------------------------------------------------------------------- ratios


def ratio_section(findings: Findings, figure: str | None) -> str:
    rows = findings.ratios
    if not rows:
        return ""
    removed = sorted({row.removed for row in rows if row.press != "none"})
    blocks: list[str] = []
    for dataset in datasets(rows):
        of_dataset = [row for row in rows if row.dataset == dataset]
        plain = next(row.perplexity for row in of_dataset if row.press == "none")
        cells = [
            [press, *(f"{value(of_dataset, press, ratio):.2f}" for ratio in removed)]
            for press in presses(of_dataset)
            if press != "none"
        ]
        blocks.append(f"{dataset}, `prefix`, no press {plain:.2f}:")
        blocks.append(markdown_table(["press", *(f"removed {ratio:g}" for ratio in removed)], cells))
        extremes = [
            f"{press} {value(of_dataset, press, removed[0]) / plain - 1:+.2%} and "
            f"{value(of_dataset, press, removed[-1]) / plain - 1:+.1%}"
            for press in presses(of_dataset)
            if press != "none"
        ]
        blocks.append(f"At {removed[0]:g} and {removed[-1]:g} removed, against no press: {'; '.join(extremes)}.")
    notes: dict[tuple[str, str], list[float]] = {(row.press, note): [] for row in rows for note in row.notes}
    for row in rows:
        for note in row.notes:
            if row.removed not in notes[row.press, note]:
                notes[row.press, note].append(row.removed)
    told = [f"- {press}, removed {', '.join(f'{r:g}' for r in at)}: {note}" for (press, note), at in notes.items()]
    return section(
        "compression_ratio 0.01 against 0.99",
        'The origin\'s "keep 1 %" test passed 0.01, the fraction removed: it kept 99 %. Both, and what lies between:',
        *blocks,
        picture(figure, "Perplexity over the fraction removed"),
        "\n".join(["The presses report of themselves:", "", *told]) if told else "",
    )


def value(rows: Iterable[Perplexity], press: str, removed: float) -> float:
    return next(row.perplexity for row in rows if row.press == press and row.removed == removed)


# ---------------------------------------------------------------------------------------------------------- tables


def perplexity_tables(rows: Sequence[Perplexity], *, with_split: bool = False) -> list[str]:
    """One table per protocol: a table never mixes protocols."""
    protocols = dict.fromkeys(row.protocol for row in rows)
    return [perplexity_table([row for row in rows if row.protocol == p], with_split=with_split) for p in protocols]


def perplexity_table(rows: Sequence[Perplexity], *, with_split: bool) -> str:
    """One row per press (and split), one column per data set."""
    columns = list(dict.fromkeys((row.dataset, row.protocol) for row in rows))
    head = [f"{dataset}, `{protocol}`" for dataset, protocol in columns]
    lines = []
    for press, split in dict.fromkeys((row.press, row.split) for row in rows):
        mine = {(row.dataset, row.protocol): row for row in rows if (row.press, row.split) == (press, split)}
        kept = next((row.kept_share for row in mine.values() if row.kept_share is not None), None)
        lines.append(
            [
                press,
                *([split] if with_split else []),
                "-" if kept is None else percent(kept),
                *(f"{mine[column].perplexity:.3f}" for column in columns),
            ]
        )
    return markdown_table(["press", *(["split"] if with_split else []), "kept", *head], lines)
