"""`lm-eval-kvpress sweep`: many presses, ratios and protocols in one resumable run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from lm_eval_kvpress import __version__
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.launch import num_processes
from lm_eval_kvpress.harness.run_record import versions
from lm_eval_kvpress.sweep.cells import Cell, cells_of
from lm_eval_kvpress.sweep.run import run_cells
from lm_eval_kvpress.sweep.settings import SweepSettings, parse_settings, read_settings
from lm_eval_kvpress.sweep.store import SweepStore

INTERRUPTED = 130  # what shells report after Ctrl-C


def main(argv: Sequence[str]) -> int:
    """Run a sweep; every mistake in the settings is found before its folder is made."""
    settings = settings_from(argv)
    _refuse_several_processes()
    cells = cells_of(settings)
    _refuse_streams_of_workers(settings, cells)
    shared = {**settings.shared, "versions": {"lm-eval-kvpress": __version__, **versions()}}
    with closing(SweepStore(Path(settings.output_path), shared)) as store:
        try:
            run_cells(settings, cells, store)
        except KeyboardInterrupt:
            print(f"stopped; the same command goes on from {settings.output_path}", file=sys.stderr)
            return INTERRUPTED
    return 0


def settings_from(argv: Sequence[str]) -> SweepSettings:
    """Settings of the command line, over those of ``--config FILE.yaml``.

    Raises:
        UsageError: for an unknown setting, a missing one, or a value of the wrong type.
    """
    typed = {key: value for key, value in vars(_parser().parse_args(argv)).items() if value is not None}
    file = typed.pop("config", None)
    return parse_settings({**(read_settings(Path(file)) if file else {}), **typed})


def _refuse_several_processes() -> None:
    if num_processes() > 1:
        raise UsageError(
            "a sweep starts its own processes: start it without accelerate or torchrun, and for several GPUs with "
            "--workers N"
        )


def _refuse_streams_of_workers(settings: SweepSettings, cells: Sequence[Cell]) -> None:
    if settings.has_workers and any({**settings.model_args, **c.arguments}.get("rolling") == "stream" for c in cells):
        raise UsageError(
            f"workers={settings.workers}: streams are answered by one process; give them a sweep of their own"
        )


def _as_lm_eval_reads(text: str) -> bool:
    return text.lower() in ("true", "1", "yes")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lm-eval-kvpress sweep",
        description="Evaluate many presses and ratios in one run, from one prefill, resumably.",
        epilog="A killed sweep goes on with the same command. Then: lm-eval-kvpress report DIR -o report.html",
    )
    lists = "comma-separated"
    parser.add_argument("--config", metavar="FILE.yaml", help="settings by these names; the command line comes first")
    parser.add_argument("--model", help="pythia-kvpress (default) or kvpress")
    parser.add_argument("--model_args", help="what all cells share: pretrained=...,dtype=...")
    parser.add_argument("--presses", help=f"{lists}; include none, the baseline")
    parser.add_argument("--ratios", help=f"{lists} fractions removed")
    parser.add_argument("--budgets", help=f"{lists} tokens kept, instead of ratios; what rolling=stream needs")
    parser.add_argument("--rolling", help=f"{lists} protocols of perplexity tasks: prefix, one_pass, stream")
    parser.add_argument("--query_tokens", help=f"{lists} numbers of held-back tokens")
    parser.add_argument("--query_aware", help=f"{lists}: true, false (the question is held back as a whole)")
    parser.add_argument("--kv_quant", help=f"{lists}: none, int8, int4, int2 (how kept entries are stored)")
    compares = "compare each scored token with the full cache's prediction"
    parser.add_argument("--fidelity", action="store_const", const=True, help=compares)
    parser.add_argument("--tasks", help=lists)
    parser.add_argument("--output_path", metavar="DIR", help="folder of the sweep")
    for name in ("batch_size", "max_batch_size", "device", "num_fewshot", "limit", "gen_kwargs", "metadata"):
        parser.add_argument(f"--{name}", help="as lm-eval's")
    parser.add_argument(
        "--samples", metavar="JSON", help="documents by task, as lm-eval's: an object, or a file of one"
    )
    parser.add_argument(
        "--apply_chat_template", nargs="?", const=True, metavar="NAME", help="the tokenizer's, or the one of this name"
    )
    parser.add_argument("--system_instruction", metavar="TEXT", help="as lm-eval's")
    parser.add_argument(
        "--fewshot_as_multiturn", nargs="?", const=True, type=_as_lm_eval_reads, metavar="BOOL", help="as lm-eval's"
    )
    for flag in ("predict_only", "trust_remote_code"):
        parser.add_argument(f"--{flag}", action="store_const", const=True, help="as lm-eval's")
    parser.add_argument("--wandb_args", metavar="NAME=VALUE,...", help="as lm-eval's; a run for each cell")
    parser.add_argument("--include_path", metavar="DIR", help="more tasks, as lm-eval's")
    parser.add_argument("--seed", help="of torch, as lm-eval's third (default 1234)")
    parser.add_argument("--launcher", help="who answers: local, this process or others of this machine")
    parser.add_argument("--workers", help="processes that answer: one per GPU, or on CPUs with a share of the threads")
    return parser
