"""What fits: the largest batch at a context length, and the longest context at a batch, under presses and quantization.

All of it is reckoned by `engine.footprint`, as ``batch_size=auto`` does: for a batch that is prefilled at once, as on a
GPU, and for one whose contexts are prefilled in turn, as long ones are on a CPU. ``--run`` prefills and decodes each of
these largest batches on this machine: tokens per second there, and the peak beside the budget. ``--check`` measures
peaks at a small size. Each batch has a process of its own.

    python -m scripts.benchmarks.capacity --shape pythia-2.8b --dtype float16 --budget 8GiB --device cuda
    python -m scripts.benchmarks.capacity --shape builtin --dtype float32 --budget 1GiB --run

Every press here prunes layer by layer while a context is prefilled. One that needs the whole cache first saves nothing
of the prefill's peak: the row of ``none`` tells what fits then. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from lm_eval_kvpress.cache.quantized import BITS
from lm_eval_kvpress.tables import markdown_table
from scripts.benchmarks.capacity_cases import Case, Room, cases_of, config_of, weight_bytes
from scripts.benchmarks.capacity_measured import Batch, measured_apart
from scripts.benchmarks.models import DTYPES, SHAPES

UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
WAYS = {False: "at once", True: "in turn"}

Rows = list[dict[str, Any]]


def reckoned(arguments: argparse.Namespace, cases: Sequence[Case]) -> Rows:
    """A row per case: what fits."""
    config, dtype = config_of(arguments.shape), getattr(torch, arguments.dtype)
    at_once, in_turn = rooms(arguments)
    rows = []
    for case in cases:
        footprint = case.footprint(config, dtype, arguments.device)
        row = {
            **asdict(case),
            "held_bytes_per_token": footprint.held_bytes,
            "prefill_bytes_per_token": footprint.prefill_bytes,
            "largest_batch": at_once.largest_batch(footprint, arguments.context),
            "largest_batch_in_turn": in_turn.largest_batch(footprint, arguments.context),
            "longest_context": at_once.longest_context(footprint, arguments.batch),
        }
        rows.append(row)
        kibibytes = (f"{row[name] / 1024:,.1f} KiB" for name in ("held_bytes_per_token", "prefill_bytes_per_token"))
        fitting = (f"{row[name]:,}" for name in ("largest_batch", "largest_batch_in_turn", "longest_context"))
        row["cells"] = [*case.cells, *kibibytes, *fitting]
    head = [
        *("press", "removed", "kv_quant", "held per token", "prefill's peak per token"),
        f"largest batch at {arguments.context:,}, prefilled at once",
        *("in turn", f"longest context at batch {arguments.batch}"),
    ]
    print(markdown_table(head, [row.pop("cells") for row in rows]))
    return rows


def rooms(arguments: argparse.Namespace) -> list[Room]:
    """What a budget leaves for batches that are prefilled at once, and in turn."""
    weights = weight_bytes(config_of(arguments.shape), getattr(torch, arguments.dtype))
    return [Room(arguments.budget - weights, arguments.new_tokens, in_turn) for in_turn in WAYS]


def run(arguments: argparse.Namespace, cases: Sequence[Case]) -> Rows:
    """Prefill and decode the largest batch of each case, and print it case by case."""
    config, dtype = config_of(arguments.shape), getattr(torch, arguments.dtype)
    rows = []
    for case, room in itertools.product(cases, rooms(arguments)):
        num_rows = room.largest_batch(case.footprint(config, dtype, arguments.device), arguments.context)
        if not num_rows:
            continue
        batch = Batch(num_rows, arguments.context, arguments.new_tokens, room.in_turn)
        found = measured_apart(arguments.shape, arguments.dtype, case, batch)
        rows.append({**asdict(case), **asdict(batch), **found})
        speeds = (f"{found[f'{phase}_tokens_per_sec']:,.0f}" for phase in ("prefill", "decode"))
        peak = f"{found['peak_bytes'] / 2**20:,.0f} of {room.num_bytes / 2**20:,.0f} MiB"
        print(" | ".join(("", *case.cells, WAYS[room.in_turn], str(num_rows), *speeds, peak, "")).strip(), flush=True)
    return rows


def check(arguments: argparse.Namespace, cases: Sequence[Case]) -> Rows:
    """What is reckoned beside what is measured, and print it case by case."""
    rows = []
    for case, in_turn in itertools.product(cases, WAYS):
        batch = Batch(arguments.check_rows, arguments.check_tokens, 0, in_turn)
        found = measured_apart(arguments.shape, arguments.dtype, case, batch)
        rows.append({**asdict(case), **asdict(batch), **found})
        mebibytes = {name: value / 2**20 for name, value in found.items()}
        print(
            f"{' '.join(case.cells)} {WAYS[in_turn]}: peak "
            f"{mebibytes['peak_bytes']:.1f} MiB, reckoned {mebibytes['peak_bytes_reckoned']:.1f}; held "
            f"{mebibytes['held_bytes']:.2f} MiB, reckoned {mebibytes['held_bytes_reckoned']:.2f}",
            flush=True,
        )
    return rows


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if found is None or found[2] not in UNITS:
        raise argparse.ArgumentTypeError(f"give bytes as 24GiB or 800MB, not {text!r}")
    return int(float(found[1]) * UNITS[found[2]])


def _names(text: str) -> list[str]:
    return text.split(",")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["builtin", *SHAPES], default="builtin")
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--budget", type=_bytes, default=_bytes("24GiB"), help="of the device, such as 24GiB")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--context", type=int, default=2_048, help="tokens of context at which batches are reckoned")
    parser.add_argument("--batch", type=int, default=1, help="batch at which contexts are reckoned")
    parser.add_argument("--new-tokens", type=int, default=128, help="generated per context")
    parser.add_argument("--presses", type=_names, default=["none", "snapkv"])
    parser.add_argument("--ratios", type=lambda text: [float(ratio) for ratio in text.split(",")], default=[0.5, 0.75])
    parser.add_argument("--kv_quant", type=_names, default=["none", *BITS])
    parser.add_argument("--run", action="store_true", help="measure speed and peak of each largest batch here")
    parser.add_argument("--check", action="store_true", help="measure peaks here at a small size")
    parser.add_argument("--check-rows", type=int, default=8)
    parser.add_argument("--check-tokens", type=int, default=1_024)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    cases = cases_of(arguments.presses, arguments.ratios, arguments.kv_quant)
    rows = (run if arguments.run else check if arguments.check else reckoned)(arguments, cases)
    settings = {name: getattr(arguments, name) for name in ("shape", "dtype", "device", "budget", "context")}
    print(json.dumps({**settings, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
