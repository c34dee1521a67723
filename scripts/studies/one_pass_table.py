"""The table of the README: the same presses on the same text, by one forward per window and through the cache.

Perplexity per token of `wikitext_kvpress` and `pg19_kvpress`, over the tokens that follow a pressed context under
`rolling=prefix`, and over all tokens under `rolling=one_pass`, where no press can act.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

PRESSES = ("snapkv", "streaming_llm", "pyramidkv", "random")
TASKS = {"wikitext_kvpress": "WikiText-2", "pg19_kvpress": "PG19"}


def perplexities(arguments: argparse.Namespace, press: str, ratio: float, rolling: str) -> dict[str, float]:
    """Token perplexity per task of one cell, from lm-eval's results."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from lm_eval_kvpress.harness import plugin

    plugin.register_models()
    results = lm_eval.simple_evaluate(
        model="pythia-kvpress",
        model_args={
            "pretrained": arguments.pretrained,
            "press": press,
            "rolling": rolling,
            **({} if press == "none" else {"compression_ratio": ratio}),
        },
        tasks=list(TASKS),
        limit=arguments.limit,
        batch_size=4,
        bootstrap_iters=0,
        task_manager=TaskManager(
            include_path=str(plugin.tasks_path()),
            include_defaults=False,
            metadata={
                "data_dir": str(arguments.data_dir),
                "max_tokens": arguments.max_tokens,
                "pretrained": arguments.pretrained,
            },
        ),
    )
    tasks = results["config"]["kvpress"]["tasks"]
    which = "token_perplexity" if rolling == "one_pass" else "token_perplexity_under_press"
    return {task: tasks[task][which] for task in TASKS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", default="builtin")
    parser.add_argument(
        "--data_dir",
        type=Path,
        default=os.environ.get("KVPRESS_DATA_DIR"),
        help="wikitext2/ and pg19/ below it, see tasks/kvpress_ppl/README.md (default: KVPRESS_DATA_DIR)",
    )
    parser.add_argument("--limit", type=int, default=10, help="documents per task (default: 10)")
    parser.add_argument("--max_tokens", type=int, default=6000, help="tokens per book (default: 6000)")
    parser.add_argument("--output", type=Path, default=Path("runs/one_pass_table.json"))
    arguments = parser.parse_args()
    if arguments.data_dir is None:
        parser.error("give --data_dir, or set KVPRESS_DATA_DIR")
    if not (arguments.data_dir / "wikitext2" / "test.jsonl").is_file():
        parser.error(f"--data_dir {arguments.data_dir} holds no wikitext2/test.jsonl")
    os.environ["HF_HUB_OFFLINE"] = "1"
    cells = [("none", 0.0), *((press, ratio) for ratio in (0.5, 0.9) for press in PRESSES)]
    figures: list[dict[str, Any]] = []
    for press, ratio in cells:
        for rolling in ("one_pass", "prefix"):
            figures.append(
                {"press": press, "removed": ratio, "rolling": rolling} | perplexities(arguments, press, ratio, rolling)
            )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(figures, indent=2))
    print(markdown(figures))


def markdown(figures: list[dict[str, Any]]) -> str:
    """One row per press and ratio."""
    by_cell = {(f["press"], f["removed"], f["rolling"]): f for f in figures}
    heads = [f"{title}, {rolling}" for title in TASKS.values() for rolling in ("one_pass", "prefix")]
    lines = ["| press | removed | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(heads)]
    for press, ratio in dict.fromkeys((f["press"], f["removed"]) for f in figures):
        values = [by_cell[press, ratio, rolling][task] for task in TASKS for rolling in ("one_pass", "prefix")]
        lines.append(f"| {press} | {ratio:.1f} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
