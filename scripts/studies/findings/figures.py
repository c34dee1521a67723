"""The findings' figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.studies.findings.rows import Findings, Perplexity, Speed, datasets, presses


def draw(findings: Findings, folder: Path) -> dict[str, str]:
    """Write a PNG per section that has figures; section to file name."""
    names = {name: f"findings_{name}.png" for name in ("protocols", "ratios", "speeds") if getattr(findings, name)}
    if "protocols" in names:
        draw_protocols(findings.protocols, folder / names["protocols"])
    if "ratios" in names:
        draw_ratios(findings.ratios, folder / names["ratios"])
    if "speeds" in names:
        draw_speeds(findings.speeds, folder / names["speeds"])
    return names


def draw_protocols(rows: Sequence[Perplexity], path: Path) -> None:
    figure = Figure(figsize=(7.5, 2.8), layout="constrained")
    axes = figure.subplots(1, len(datasets(rows)), squeeze=False)
    for axis, dataset in zip(axes[0], datasets(rows), strict=True):
        for shift, protocol in ((-0.2, "one_pass"), (0.2, "prefix")):
            mine = {r.press: r.perplexity for r in rows if (r.dataset, r.protocol) == (dataset, protocol)}
            plain = mine.pop("none")
            places = [place + shift for place in range(len(mine))]
            bars = axis.bar(places, [100 * (ppl / plain - 1) for ppl in mine.values()], width=0.4, label=protocol)
            axis.bar_label(bars, fmt="%.1f", fontsize=7)
        axis.set_xticks(range(len(mine)), list(mine), fontsize=8)
        axis.set_title(dataset, fontsize=9)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_ylabel("perplexity against no press, %", fontsize=8)
    save(figure, axes[0][0], path)


def draw_ratios(rows: Sequence[Perplexity], path: Path) -> None:
    figure = Figure(figsize=(7.5, 2.8), layout="constrained")
    axes = figure.subplots(1, len(datasets(rows)), squeeze=False)
    for axis, dataset in zip(axes[0], datasets(rows), strict=True):
        mine = [row for row in rows if row.dataset == dataset]
        axis.axhline(next(r.perplexity for r in mine if r.press == "none"), color="black", linewidth=0.8, label="none")
        for press in presses(mine):
            if press != "none":
                points = sorted((row.removed, row.perplexity) for row in mine if row.press == press)
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.2, label=press)
        axis.set_title(dataset, fontsize=9)
        axis.set_xlabel("fraction removed", fontsize=8)
        axis.set_ylabel("perplexity, prefix", fontsize=8)
    save(figure, axes[0][0], path)


def draw_speeds(rows: Sequence[Speed], path: Path) -> None:
    figure = Figure(figsize=(5, 2.8), layout="constrained")
    axis = figure.subplots()
    batches = sorted({row.batch_size for row in rows})
    names = presses(rows)
    for number, batch in enumerate(batches):
        mine: dict[str, Any] = {r.press: r.figures["decode_tokens_per_sec"] for r in rows if r.batch_size == batch}
        places = [place + (number - (len(batches) - 1) / 2) * 0.4 for place in range(len(names))]
        medians = [mine[press]["median"] for press in names]
        errors = [
            [mine[press]["median"] - mine[press]["low"] for press in names],
            [mine[press]["high"] - mine[press]["median"] for press in names],
        ]
        axis.bar(places, medians, width=0.4, yerr=errors, capsize=2, label=f"batch {batch}")
    axis.set_xticks(range(len(names)), names, fontsize=8)
    axis.set_ylabel("decoded tok/s", fontsize=8)
    save(figure, axis, path)


def save(figure: Figure, labelled: Axes, path: Path) -> None:
    handles, labels = labelled.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8, frameon=False)
    for axis in figure.axes:
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
