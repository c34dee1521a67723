"""How near decoding comes to what the memory allows, and how far it is from plain `model.generate`.

A step of decoding reads every weight and the whole cache once; the least time for it is those bytes over the bandwidth
of a large copy (read and written bytes both counted), measured here on the same device. Three comparisons, on random
weights of a known shape and random prompts:

    one row, no press             the step's share of the roofline; all of decoding against `model.generate`
    --batch-size rows             the step under a press at --ratio against none, beside what the bytes allow

A step is the median time between two tokens; TPOT counts all after the first token, the record of a graph included.
All settings are warmed up, then repeated in an order that is shuffled anew each time; ratios are those of one round,
figures medians with the 95 % bootstrap interval.

    python -m scripts.benchmarks.decoding       on a GPU: Pythia-2.8B's shape in bfloat16
    python -m scripts.benchmarks.decoding --shape pythia-160m --dtype float32 --batch-size 8     six minutes, two cores

The last line of stdout is one JSON document: that of --output (`document`), where a Markdown table is written as well.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.models.architectures import present
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.tables import markdown_table
from scripts.benchmarks import document
from scripts.benchmarks.generation import Bench, Case, Measurement, random_prompts
from scripts.benchmarks.measuring import Estimate, count, estimate, rounds, seconds
from scripts.benchmarks.models import BUILTIN, DTYPES, SHAPES, random_model

COPY_BYTES = {"cuda": 4 * 2**30, "cpu": 2**29}
TARGETS = {"roofline": 0.6, "generate": 8.0, "press": 1.9}
GENERATE = "generate"
"""Beside the cases, what a round measures: `model.generate`."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    try:
        found = document.read(arguments.output, arguments.dtype)
        report = run(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found.setdefault("decoding", {})[arguments.shape] = report
    document.write(found, arguments.output)
    (arguments.output / "decoding.md").write_text(markdown(found), encoding="utf-8")
    print(markdown(found))
    print(json.dumps(found))
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="pythia-2.8b", help="random weights (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--press", default="snapkv", help="in the batch (default: %(default)s)")
    parser.add_argument("--ratio", type=float, default=0.75, help="fraction that it removes (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=count, default=1800, help="of the single row (default: %(default)s)")
    parser.add_argument("--batch-size", type=count, default=32, help="rows of the batch (default: %(default)s)")
    parser.add_argument("--batch-prompt-tokens", type=count, default=2000, help="of each (default: %(default)s)")
    parser.add_argument("--batch-new-tokens", type=more_than_one, default=48, help="of each (default: %(default)s)")
    parser.add_argument("--new-tokens", type=more_than_one, default=200, help="of it (default: %(default)s)")
    parser.add_argument("--repeats", type=count, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--copy-bytes", type=count, help="of the copy (default: 4 GiB on a GPU, 512 MiB elsewhere)")
    parser.add_argument("--threads", type=count, default=2, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder of the two files")
    return parser


def more_than_one(text: str) -> int:
    value = count(text)
    if value < 2:
        raise argparse.ArgumentTypeError("at least 2: the first token is not decoded")
    return value


# -------------------------------------------------------------------------------------------------------- measuring


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one shape."""
    lm = KVPress(pretrained=present(random_model(arguments.shape, arguments.dtype)).model, tokenizer=str(BUILTIN))
    model, batch = lm.press_model, (arguments.batch_size, arguments.batch_prompt_tokens, arguments.batch_new_tokens)
    single = Case("none", 1, arguments.prompt_tokens, arguments.new_tokens)
    cases = [single, Case("none", *batch), Case(arguments.press, *batch)]
    bench = Bench(lm, ["none", arguments.press], arguments.ratio)
    for case in cases:
        bench.check(case)
    prompts = {case: random_prompts(lm, case) for case in cases}

    def measure(what: Case | str) -> Any:
        if isinstance(what, Case):
            return bench.measure(what, prompts[what])
        return generate_tpot_sec(model, prompts[single][0], single.num_new_tokens)

    bandwidth = copy_bandwidth(model.device, arguments.copy_bytes or COPY_BYTES[model.device.type])
    things: list[Case | str] = [*cases, GENERATE]
    found = rounds(things, measure, arguments.repeats)
    return {
        **document.stamp(),
        "compression_ratio": arguments.ratio,
        "repeats": arguments.repeats,
        "copy_bytes_per_sec": bandwidth,
        "weight_bytes": weight_bytes(model),
        "rows": report_rows(model, cases, found, bandwidth),
    }


def copy_bandwidth(device: torch.device, num_bytes: int, num_copies: int = 9) -> float:
    """Bytes per second of a large copy, what is read and what is written both counted; the median copy."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    times = [seconds(lambda: target.copy_(source))[0] for _ in range(num_copies)]
    return 2 * num_bytes / statistics.median(times[1:])


def weight_bytes(model: PressableModel) -> int:
    """What one step reads of the weights: all but the input embeddings, of which it looks up one row per token."""
    inputs, head = model.model.get_input_embeddings().weight, model.model.get_output_embeddings().weight
    looked_up = 0 if inputs is head else inputs.numel() * inputs.element_size()
    return sum(p.numel() * p.element_size() for p in model.model.parameters()) - looked_up


def step_bytes(model: PressableModel, case: Case, run: Measurement) -> float:
    """Weights, what was kept of the prompts, and half of what is appended, since the last step reads all of it."""
    per_token = run.kv_bytes_before / (case.batch_size * (case.num_prompt_tokens - 1))  # one token was held back
    return weight_bytes(model) + run.kv_bytes_allocated + per_token * case.batch_size * case.num_new_tokens / 2


def generate_tpot_sec(model: PressableModel, prompt: Sequence[int], num_new: int) -> float:
    """Seconds per token after the first, of `model.generate`."""
    ids = torch.tensor([prompt], device=model.device)

    def generated(num_tokens: int) -> float:
        taken, new = seconds(
            lambda: model.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
            )
        )
        assert new.shape[1] == len(prompt) + num_tokens
        return taken

    return (generated(num_new) - generated(1)) / (num_new - 1)


# ---------------------------------------------------------------------------------------------------------- figures


def report_rows(
    model: PressableModel, cases: Sequence[Case], found: Sequence[Mapping[Any, Any]], bandwidth: float
) -> list[dict[str, Any]]:
    """The three comparisons."""
    single, full, pressed = cases

    def roofline_sec(case: Case) -> float:
        return step_bytes(model, case, found[0][case]) / bandwidth

    def row(name: str, case: Case, values: Sequence[float], **facts: Any) -> dict[str, Any]:
        steps = [step_sec(one[case]) for one in found]
        return {
            "row": name,
            **asdict(case),
            "step_sec": asdict(estimate(steps)),
            "tpot_sec": asdict(estimate([tpot_sec(one[case]) for one in found])),
            "step_bytes": step_bytes(model, case, found[0][case]),
            "roofline_share": asdict(estimate([roofline_sec(case) / step for step in steps])),
            "value": asdict(estimate(values)),
            "target": TARGETS[name],
            **facts,
        }

    faster = [step_sec(one[full]) / step_sec(one[pressed]) for one in found]
    return [
        row("roofline", single, [roofline_sec(single) / step_sec(one[single]) for one in found]),
        row("generate", single, [one[GENERATE] / tpot_sec(one[single]) for one in found]),
        row("press", pressed, faster, bytes_allow=roofline_sec(full) / roofline_sec(pressed)),
    ]


def tpot_sec(run: Measurement) -> float:
    assert run.tpot_sec is not None, "more than one token is decoded"
    return run.tpot_sec


def step_sec(run: Measurement) -> float:
    assert run.itl_sec is not None, "more than one token is decoded"
    return run.itl_sec


def markdown(found: Mapping[str, Any]) -> str:
    """All decoding reports of a document in one table."""
    figures = ["step ms", "TPOT ms", "GB per step", "of roofline", "figure", "is", "target"]
    rows = [
        cells(model, row, report, on_gpu=found["machine"]["gpu"] is not None)
        for model, report in found["decoding"].items()
        for row in report["rows"]
    ]
    return markdown_table(["model", "batch", "prompt", "press", *figures], rows) + "\n"


def cells(model: str, row: Mapping[str, Any], report: Mapping[str, Any], *, on_gpu: bool) -> list[str]:
    """One line of the table. The targets are of a GPU, and are not judged elsewhere."""
    value = Estimate(**row["value"])
    met = "met" if value.median >= row["target"] else "MISSED"
    return [
        model,
        *(str(row[name]) for name in ("batch_size", "num_prompt_tokens", "press")),
        *(f"{1000 * row[name]['median']:.2f}" for name in ("step_sec", "tpot_sec")),
        f"{row['step_bytes'] / 1e9:.2f}",
        f"{row['roofline_share']['median']:.0%}",
        str(value),
        meaning(row, report),
        f"{row['target']:.1f} {met}" if on_gpu else "on a GPU",
    ]


def meaning(row: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """What a row's figure is."""
    if row["row"] == "roofline":
        return f"share of {report['copy_bytes_per_sec'] / 1e9:,.0f} GB/s, the bandwidth of a copy"
    if row["row"] == "generate":
        return "times as fast as `model.generate`"
    return f"times as fast as without a press; the bytes allow {row['bytes_allow']:.2f}"


if __name__ == "__main__":
    sys.exit(main())
