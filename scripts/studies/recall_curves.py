"""Recall and story perplexity of every press over the ratio: figures, a PNG and a Markdown table.

Recall is measured twice: with the question inside the context that the press compresses (all but the last token, so a
query-aware press sees what will be asked), and with the whole question held back (so it has to guess).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PRESSES = ("snapkv", "pyramidkv", "tova", "expected_attention", "keydiff", "knorm", "streaming_llm", "random")
RATIOS = (0.25, 0.5, 0.75, 0.9)
QUESTION_TOKENS = 32
"""At least as many as the longest question of `kvpress_recall` has."""


def evaluate(arguments: argparse.Namespace, tasks: list[str], model_args: dict[str, Any]) -> dict[str, Any]:
    """One run of lm-eval; its results."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from lm_eval_kvpress.harness import plugin

    plugin.register_models()
    manager = TaskManager(include_path=str(plugin.tasks_path()), include_defaults=False)
    return lm_eval.simple_evaluate(  # type: ignore[no-any-return]
        model="pythia-kvpress",
        model_args={"pretrained": arguments.pretrained, **model_args},
        tasks=tasks,
        batch_size=8,
        bootstrap_iters=0,
        task_manager=manager,
    )


def cell(arguments: argparse.Namespace, press: str, ratio: float) -> dict[str, Any]:
    """Figures of one press at one ratio."""
    of_press = {} if press == "none" else {"press": press, "compression_ratio": ratio}
    aware = evaluate(arguments, ["kvpress_recall", "kvpress_story"], of_press)
    blind = evaluate(arguments, ["kvpress_recall"], {**of_press, "query_tokens": QUESTION_TOKENS})
    facts = aware["config"]["kvpress"]["tasks"]
    return {
        "press": press,
        "removed": ratio,
        "recall_question_seen": aware["results"]["kvpress_recall"]["acc,none"],
        "recall_question_held_back": blind["results"]["kvpress_recall"]["acc,none"],
        "story_perplexity": facts["kvpress_story"]["token_perplexity_under_press"],
        "kept_share": facts["kvpress_recall"]["contexts_pressed"]["kept_share"],
        "notes": sorted({note for task in facts.values() for note in task["notes"]}),
        "fell_back": _fell_back(facts.values()),
    }


def _fell_back(facts: Iterable[Mapping[str, Any]]) -> float:
    """The share of the pressed contexts in which another press ran than the one named."""
    tasks = list(facts)
    counts = [count for task in tasks for note, count in task["notes"].items() if "fell back" in note]
    return sum(counts) / max(1, sum(task["contexts_pressed"]["num_contexts"] for task in tasks))


def draw(figures: list[dict[str, Any]], file: Path) -> None:
    """Three panels over the kept share; the dashed line is no press, the dotted one guessing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = {
        "recall_question_seen": "recall, question seen by the press",
        "recall_question_held_back": "recall, question held back",
        "story_perplexity": "story perplexity under the press",
    }
    baseline = next(figure for figure in figures if figure["press"] == "none")
    chart, axes = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for number, press in enumerate(PRESSES):
            rows = [figure for figure in figures if figure["press"] == press]
            axis.plot(
                [100 * row["removed"] for row in rows],
                [row[key] for row in rows],
                marker="osD^vPX*"[number],
                label=press,
            )
        axis.axhline(baseline[key], color="black", linestyle="--", linewidth=1, label="none")
        if key != "story_perplexity":
            axis.axhline(0.25, color="grey", linestyle=":", linewidth=1)
            axis.set_ylim(0, 1.03)
        axis.set(title=title, xlabel="removed, % of the context")
        axis.grid(alpha=0.3)
    axes[-1].legend(fontsize=7)
    file.parent.mkdir(parents=True, exist_ok=True)
    chart.savefig(file, dpi=110)


def markdown(figures: list[dict[str, Any]]) -> str:
    """One row per cell."""
    lines = [
        "| press | removed | recall, question seen | recall, question held back | story perplexity |",
        "|---|---|---|---|---|",
    ]
    for row in figures:
        recall = f"{100 * row['recall_question_seen']:.0f} % | {100 * row['recall_question_held_back']:.0f} %"
        share = row["fell_back"]
        mark = f" ({'' if share == 1 else f'{100 * share:.0f} % of contexts '}as snapkv)" if share else ""
        lines.append(f"| {row['press']}{mark} | {row['removed']} | {recall} | {row['story_perplexity']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", default="builtin")
    parser.add_argument("--ratios", default=",".join(map(str, RATIOS)), help="fractions removed (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("docs/figures"), help="folder of the PNG, JSON and Markdown"
    )
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    figures = [cell(arguments, "none", 0.0)]
    for press in PRESSES:
        for ratio in map(float, arguments.ratios.split(",")):
            figures.append(cell(arguments, press, ratio))
            print(json.dumps(figures[-1]), flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "recall_curves.json").write_text(json.dumps(figures, indent=1) + "\n")
    (arguments.output / "recall_curves.md").write_text(markdown(figures) + "\n")
    draw(figures, arguments.output / "recall_curves.png")


if __name__ == "__main__":
    main()
