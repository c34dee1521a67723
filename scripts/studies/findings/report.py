"""The report of the findings: an introduction, and sections of tables, figures and sentences.

Every sentence with a figure is chosen by that figure; none is written in advance of it.
"""

from __future__ import annotations

from collections.abc import Mapping

from lm_eval_kvpress.tables import markdown_table
from scripts.studies.findings.perplexity_sections import protocols_section, ratio_section, split_section
from scripts.studies.findings.rows import Findings
from scripts.studies.findings.writing import percent, picture, section


def markdown(findings: Findings, figures: Mapping[str, str]) -> str:
    """The report.

    Args:
        figures: section to the file name of its figure.
    """
    sections = [
        introduction(findings),
        protocols_section(findings, figures.get("protocols")),
        split_section(findings),
        ratio_section(findings, figures.get("ratios")),
        first_token_section(findings),
        speed_section(findings, figures.get("speeds")),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def introduction(findings: Findings) -> str:
    lines = [
        "# Findings",
        "",
        "This project began with a benchmark of Pythia-2.8B, here called the origin, whose perplexity was the same for "
        "every press. This is its experiment again, and what it could not see.",
    ]
    lines += ["", *(f"- {line}" for line in findings.setting), *(f"- Skipped: {line}" for line in findings.skipped)]
    lines += [
        "",
        "`compression_ratio` is the fraction *removed*. `one_pass` is one forward per window; `prefix` prefills a "
        "context under the press, holds its last token back, and scores what follows through the compressed cache. "
        "Perplexities are per token: under `one_pass` of all tokens, under `prefix` of those scored over a cache, for "
        "the baseline too. So the rows of a table compare, and figures of different protocols do not.",
    ]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------- first token


def first_token_section(findings: Findings) -> str:
    rows = findings.first_tokens
    if not rows:
        return ""
    cells = [
        [row.press, str(row.held_back), f"{row.largest_move:.2g}", f"{row.mean_move:.2g}", percent(row.accuracy)]
        for row in rows
    ]
    pressed = [row for row in rows if row.press != "none"]
    on, off = ([row for row in pressed if row.held_back == held] for held in (1, 0))
    inert = all(row.largest_move < 1e-3 for row in off)
    acting = [row for row in on if row.largest_move >= 1e-3]
    if inert and acting:
        sentence = (
            "With no token held back no press moves an answer (by more than rounding): the last context token predicts "
            "it within the prefill, from the full cache. Every press then has the baseline's accuracy, whatever it "
            "evicted. With one token held back the figures are those of the compressed cache."
        )
    elif inert:
        sentence = "No press moves an answer, held back or not: on this model these contexts do not matter."
    else:
        sentence = "Answers move with no token held back, which a press cannot cause: look at the table."
    return section(
        "The first-token rule",
        f"{findings.removed:g} removed; four answers of one token each, about a fact some 400 tokens back. "
        "`query_tokens` is how many tokens of the context are held back and fed after compression.",
        markdown_table(["press", "query_tokens", "largest change, nats", "mean change, nats", "right answers"], cells),
        sentence,
    )


# ----------------------------------------------------------------------------------------------------------- speed


def speed_section(findings: Findings, figure: str | None) -> str:
    rows = findings.speeds
    if not rows:
        return ""
    cells = [
        [
            row.press,
            str(row.batch_size),
            percent(row.figures["kept_share"]["median"]),
            *(interval(row.figures[name], scale, digits) for name, scale, digits in SPEED_COLUMNS.values()),
        ]
        for row in rows
    ]
    baseline = {row.batch_size: row.figures["decode_tokens_per_sec"] for row in rows if row.press == "none"}
    told = []
    for row in rows:
        if row.press == "none":
            continue
        ours, plain = row.figures["decode_tokens_per_sec"], baseline[row.batch_size]
        apart = ours["low"] > plain["high"] or ours["high"] < plain["low"]
        told.append(
            f"{row.press} at batch {row.batch_size} decodes {ours['median'] / plain['median']:.2f} times as fast as no "
            f"press ({'intervals apart' if apart else 'intervals overlap: no difference shown'})"
        )
    return section(
        "Speed",
        f"{rows[0].num_prompt_tokens:,} tokens of prompt, {rows[0].num_new_tokens} new ones; every setting warmed up, "
        "the device synchronized at the edges of each phase, prefill apart from decoding; medians with 95 % intervals.",
        markdown_table(["press", "batch", "kept", *SPEED_COLUMNS], cells),
        picture(figure, "Decoded tokens per second"),
        "; ".join(told) + ".",
        "The origin, with Pythia-2.8B on a GPU of 8 GB, reported (tok/s at batch 1 / 4) baseline 11.15 / 3.18, SnapKV "
        "9.50 / 21.09, StreamingLLM 10.16 / 21.81, PyramidKV 9.04 / 13.36. Its baseline at batch 4 had spilled into "
        "host memory, so the ratios to it are not the presses' doing alone.",
    )


SPEED_COLUMNS = {
    "prefill tok/s": ("prefill_tokens_per_sec", 1, 0),
    "press ms": ("press_sec", 1000, 1),
    "TTFT ms": ("ttft_sec", 1000, 0),
    "TPOT ms": ("tpot_sec", 1000, 2),
    "decode tok/s": ("decode_tokens_per_sec", 1, 0),
}


def interval(estimate: Mapping[str, float], scale: float, digits: int) -> str:
    median, low, high = (estimate[name] * scale for name in ("median", "low", "high"))
    return f"{median:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"
