"""What fits: the largest batch at a context length, and the longest context at a batch, under presses and quantization.

All of it is reckoned by `engine.footprint`, as ``batch_size=auto`` does: for a batch that is prefilled at once, as on a
GPU, and for one whose contexts are prefilled in turn, as long ones are on a CPU. ``--check`` measures both on this
machine at small sizes, each in a process of its own.

    python -m scripts.benchmarks.capacity --shape pythia-2.8b --dtype float16 --budget 8GiB
    python -m scripts.benchmarks.capacity --shape builtin --check

Every press here prunes layer by layer while a context is prefilled. One that needs the whole cache first saves nothing
of the prefill's peak: the row of ``none`` tells what fits then. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from lm_eval_kvpress.cache.quantized import BITS, Quantization
from lm_eval_kvpress.engine import compression
from lm_eval_kvpress.engine.batch_size import kept_share
from lm_eval_kvpress.engine.compression import Compressor
from lm_eval_kvpress.engine.contexts import Context
from lm_eval_kvpress.engine.footprint import Footprint
from lm_eval_kvpress.models.architectures import present
from lm_eval_kvpress.models.lend import lend
from lm_eval_kvpress.presses.parse import parse_press
from lm_eval_kvpress.records.clock import Clock
from lm_eval_kvpress.tables import markdown_table
from scripts.benchmarks.models import BUILTIN, DTYPES, SHAPES, model_named
from scripts.benchmarks.peak_memory import peak_extra_bytes

UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
LONGEST = 2**22


@dataclass(frozen=True)
class Case:
    """One way to hold a cache.

    Attributes:
        press, ratio: the fraction removed; 0 for ``none``.
        kv_quant: ``none``, or how entries are packed, in groups of 64.
    """

    press: str
    ratio: float
    kv_quant: str

    @property
    def quantization(self) -> Quantization | None:
        return None if self.kv_quant == "none" else Quantization(self.kv_quant)

    def footprint(self, config: PretrainedConfig, dtype: torch.dtype) -> Footprint:
        """Bytes per token of context."""
        press = parse_press(self.press, {"compression_ratio": self.ratio} if self.press != "none" else {})
        return Footprint.of(config, dtype, share=kept_share(press, config), quantization=self.quantization)


@dataclass(frozen=True)
class Room:
    """What is left of a budget beside the weights, for texts of so many new tokens per context.

    Attributes:
        in_turn: whether contexts are prefilled one after the other.
    """

    num_bytes: float
    num_new: int
    in_turn: bool = False

    def takes(self, footprint: Footprint, num_rows: int, num_tokens: int) -> bool:
        """Whether a batch can be prefilled, and then decoded."""
        total = num_rows * num_tokens
        peak = footprint.batch_bytes(total, 2, num_tokens if self.in_turn else total)
        return peak + num_rows * self.num_new * footprint.cache_bytes <= self.num_bytes

    def largest_batch(self, footprint: Footprint, num_tokens: int) -> int:
        """Rows that fit."""
        return _most(lambda rows: self.takes(footprint, rows, num_tokens))

    def longest_context(self, footprint: Footprint, num_rows: int) -> int:
        """Tokens of context that fit, trained positions apart."""
        return _most(lambda tokens: self.takes(footprint, num_rows, tokens))


def _most(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, by bisection; 0 if none does."""
    low, high = 0, LONGEST
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def cases_of(presses: Sequence[str], ratios: Sequence[float], kv_quants: Sequence[str]) -> list[Case]:
    """Every press at every ratio, and ``none`` once, under every quantization."""
    sizes = [(press, ratio) for press in presses for ratio in ((0.0,) if press == "none" else ratios)]
    return [Case(press, ratio, kv_quant) for press, ratio in sizes for kv_quant in kv_quants]


def config_of(shape: str) -> PretrainedConfig:
    return AutoConfig.from_pretrained(BUILTIN) if shape == "builtin" else SHAPES[shape].config()


def weight_bytes(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Of a model that is never filled with numbers."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


# --------------------------------------------------------------------------------------------------- measurement


@torch.inference_mode()
def measured(shape: str, dtype: str, case: Case, num_rows: int, num_tokens: int, in_turn: bool) -> dict[str, float]:
    """The prefill's peak and what is held afterwards, in bytes, of a batch in this process."""
    model = present(model_named(shape, dtype))
    press = parse_press(case.press, {"compression_ratio": case.ratio} if case.press != "none" else {})
    at_once = num_tokens if in_turn else num_rows * num_tokens
    clock = Clock(model.device)
    compressor = Compressor(model, press, short_context="keep", clock=clock, quantization=case.quantization)
    vocabulary = model.model.config.vocab_size
    rows = torch.randint(
        vocabulary, (num_rows + 1, num_tokens + 1), generator=torch.Generator().manual_seed(0)
    ).tolist()
    found: list[Any] = []
    contexts = [Context(tuple(row), 1) for row in rows[:-1]]
    with lend(compression, FORWARD_TOKENS={"cpu": at_once}, PACKED_FORWARD_TOKENS=at_once):
        compressor.compress([Context(tuple(rows[-1][:257]), 1)])  # libraries warm up
        peak = peak_extra_bytes(lambda: found.append(compressor.compress(contexts)))
    held = sum(layer.num_bytes for layer in found[0].cache.layers)
    footprint = case.footprint(model.model.config, getattr(torch, dtype))
    return {
        "peak_bytes": peak,
        "peak_bytes_reckoned": footprint.batch_bytes(num_rows * num_tokens, 1, at_once),
        "held_bytes": held,
        "held_bytes_reckoned": num_rows * num_tokens * footprint.held_bytes,
    }


def measured_apart(
    shape: str, dtype: str, case: Case, num_rows: int, num_tokens: int, in_turn: bool
) -> dict[str, float]:
    """As `measured`, in a process of its own: torch never gives all of an earlier peak back."""
    arguments = json.dumps([shape, dtype, asdict(case), num_rows, num_tokens, in_turn])
    command = [sys.executable, "-m", "scripts.benchmarks.capacity", "--measure", arguments]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


# --------------------------------------------------------------------------------------------------------- tables


def capacity_table(arguments: argparse.Namespace, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """A row per case: what fits, and the peaks of one batch."""
    config, dtype = config_of(arguments.shape), getattr(torch, arguments.dtype)
    weights = weight_bytes(config, dtype)
    room, in_turn = (Room(arguments.budget - weights, arguments.new_tokens, turn) for turn in (False, True))
    rows = []
    for case in cases:
        footprint = case.footprint(config, dtype)
        rows.append(
            {
                **asdict(case),
                "held_bytes_per_token": footprint.held_bytes,
                "prefill_bytes_per_token": footprint.prefill_bytes,
                "largest_batch": room.largest_batch(footprint, arguments.context),
                "longest_context": room.longest_context(footprint, arguments.batch),
                "largest_batch_in_turn": in_turn.largest_batch(footprint, arguments.context),
            }
        )
    return rows


def markdown(arguments: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> str:
    head = [
        *("press", "removed", "kv_quant", "held per token", "prefill's peak per token"),
        f"largest batch at {arguments.context:,}, prefilled at once",
        "in turn",
        f"longest context at batch {arguments.batch}",
    ]
    body = [
        [
            *(row["press"], f"{row['ratio']:g}", row["kv_quant"]),
            *(f"{row[name] / 1024:,.1f} KiB" for name in ("held_bytes_per_token", "prefill_bytes_per_token")),
            *(f"{row[name]:,}" for name in ("largest_batch", "largest_batch_in_turn", "longest_context")),
        ]
        for row in rows
    ]
    return markdown_table(head, body)


def check(arguments: argparse.Namespace, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """What is reckoned beside what is measured, and print it case by case."""
    rows = []
    for case, in_turn in itertools.product(cases, (False, True)):
        sizes = arguments.check_rows, arguments.check_tokens
        found = measured_apart(arguments.shape, arguments.dtype, case, *sizes, in_turn)
        rows.append({**asdict(case), "in_turn": in_turn, **found})
        mebibytes = {name: value / 2**20 for name, value in found.items()}
        print(
            f"{case.press} {case.ratio:g} {case.kv_quant} {'in turn' if in_turn else 'at once'}: peak "
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
    parser.add_argument("--context", type=int, default=2_048, help="tokens of context at which batches are reckoned")
    parser.add_argument("--batch", type=int, default=1, help="batch at which contexts are reckoned")
    parser.add_argument("--new-tokens", type=int, default=128, help="generated per context")
    parser.add_argument("--presses", type=_names, default=["none", "snapkv"])
    parser.add_argument("--ratios", type=lambda text: [float(ratio) for ratio in text.split(",")], default=[0.5, 0.75])
    parser.add_argument("--kv_quant", type=_names, default=["none", *BITS])
    parser.add_argument("--check", action="store_true", help="measure on this machine at small sizes")
    parser.add_argument("--check-rows", type=int, default=8)
    parser.add_argument("--check-tokens", type=int, default=1_024)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.measure:
        shape, dtype, case, *sizes = json.loads(arguments.measure)
        print(json.dumps(measured(shape, dtype, Case(**case), *sizes)))
        return 0
    cases = cases_of(arguments.presses, arguments.ratios, arguments.kv_quant)
    rows = check(arguments, cases) if arguments.check else capacity_table(arguments, cases)
    if not arguments.check:
        print(markdown(arguments, rows))
    print(json.dumps({"shape": arguments.shape, "dtype": arguments.dtype, "budget": arguments.budget, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
