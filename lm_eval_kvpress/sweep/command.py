"""`lm-eval-kvpress sweep`: many presses, ratios and protocols in one resumable run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.launch import forget_processes_of_a_shell, num_processes
from lm_eval_kvpress.harness.run_record import versions
from lm_eval_kvpress.sweep.cells import Cell, cells_of
from lm_eval_kvpress.sweep.run import run_cells, run_shard
from lm_eval_kvpress.sweep.settings import SweepSettings, parse_settings, read_settings
from lm_eval_kvpress.sweep.shards.joining import refuse_unmerged, siblings
from lm_eval_kvpress.sweep.shards.shard import AUTO, Shard, is_in_array, parse_shard, shard_of_array
from lm_eval_kvpress.sweep.store import SweepStore

INTERRUPTED = 130  # what shells report after Ctrl-C


def main(argv: Sequence[str]) -> int:
    """Run a sweep; every mistake in the settings is found before its folder is made."""
    typed = _typed(argv)
    part = _part(typed.pop("shard", None), is_merge=typed.pop("merge", False))
    settings = _settings(typed)
    if settings.launcher == "submitit" and part != "all":
        raise UsageError("launcher=submitit submits every shard and the merge: leave --shard and --merge to it")
    try:
        run_sweep(settings, part)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from {settings.output_path}", file=sys.stderr)
        return INTERRUPTED
    return 0


def run_sweep(settings: SweepSettings, part: Shard | Literal["all", "merge"] = "all") -> None:
    """Run a sweep, or a part of it, resumably.

    Raises:
        UsageError: for settings that do not fit each other, the model or the folder.
    """
    _leave_processes_of_a_launcher()
    _run(settings, cells_of(settings), part)


def _run(settings: SweepSettings, cells: Sequence[Cell], part: Shard | Literal["all", "merge"]) -> None:
    output_path = Path(settings.output_path)
    shared = {**settings.shared, "versions": versions()}
    # With another batch size blocks of requests are others, and so are the shares.
    of_shards = {**shared, "batch_size": settings.batch_size, "max_batch_size": settings.max_batch_size}
    if isinstance(part, Shard):
        others = siblings(output_path, part, shared, of_shards)
        with closing(SweepStore(part.folder(output_path), of_shards)) as store:
            run_shard(settings, cells, store, part, others)
        return
    if settings.launcher == "submitit":
        _submit(settings)
        return
    if part == "all":
        refuse_unmerged(output_path)
    with closing(SweepStore(output_path, shared)) as store:
        run_cells(settings, cells, store, of_shards=of_shards if part == "merge" else None)


def _submit(settings: SweepSettings) -> None:
    from lm_eval_kvpress.sweep.launchers.slurm_jobs import submit  # an extra

    for line in submit(settings):
        print(line, file=sys.stderr)


def _part(shard: str | None, *, is_merge: bool) -> Shard | Literal["all", "merge"]:
    """What of the sweep this process does."""
    if is_merge:
        if shard is not None:
            raise UsageError("shard and merge: a shard answers, and --merge joins what all have answered: give one")
        return "merge"
    if shard is None and is_in_array():
        shard = AUTO
        print(
            f"task {shard_of_array()} of an array of Slurm: it answers that share, as by --shard auto; --merge "
            "joins all shares, and --shard none runs a whole sweep in each task",
            file=sys.stderr,
        )
    return (None if shard is None else parse_shard(shard)) or "all"


def settings_from(argv: Sequence[str]) -> SweepSettings:
    """Settings of the command line, over those of ``--config FILE.yaml``.

    Raises:
        UsageError: for an unknown setting, a missing one, or a value of the wrong type.
    """
    typed = _typed(argv)
    for name in ("shard", "merge"):
        typed.pop(name, None)
    return _settings(typed)


def _typed(argv: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in vars(_parser().parse_args(argv)).items() if value is not None}


def _settings(typed: dict[str, Any]) -> SweepSettings:
    file = typed.pop("config", None)
    return parse_settings({**(read_settings(Path(file)) if file else {}), **typed})


def _leave_processes_of_a_launcher() -> None:
    forget_processes_of_a_shell()
    if num_processes() > 1:
        raise UsageError(
            "a sweep starts its own processes: start it without accelerate or torchrun, and for several GPUs with "
            "--workers N"
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
    parser.add_argument("--kv_quant", help=f"{lists}: none, int8, int4, int2, fp8 (how kept entries are stored)")
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
    parser.add_argument("--launcher", help="who answers: local (default, processes of this machine), ray or submitit")
    parser.add_argument("--workers", help="processes that answer: one per GPU, or on CPUs with a share of the threads")
    parser.add_argument(
        "--ray_address", metavar="HOST:PORT", help="of a Ray cluster, or auto; without it, one is started"
    )
    parser.add_argument("--gpus_per_worker", help="of Ray's workers (default 1 if the cluster has any)")
    jobs = "of submitit's jobs: time=...,partition=...,gpus_per_node=...; cluster=local runs them here"
    parser.add_argument("--slurm", metavar="NAME=VALUE,...", help=jobs)
    share = "answer the I-th of N shares of the requests; auto (default in an array of Slurm), none"
    parser.add_argument("--shard", metavar="I/N", help=share)
    parser.add_argument("--merge", action="store_const", const=True, help="join what all shards answered, to results")
    return parser
