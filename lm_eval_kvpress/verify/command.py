"""`lm-eval-kvpress verify`: run the checks on a checkpoint, print a line for each, and a verdict.

What a check is stands in `check`, what it is run on in `subject`, the checks themselves in `presentation`, `kept`,
`scores`, `fidelity`, `decoding`, `packing` and `answers`.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.utils import simple_parse_args_string

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.files import make_writable, refuse_special, write_whole
from lm_eval_kvpress.verify import answers, decoding, fidelity, kept, packing, presentation, scores
from lm_eval_kvpress.verify.check import Check
from lm_eval_kvpress.verify.subject import Subject

CHECKS: Mapping[str, Callable[[Subject], Check]] = {
    "basis": presentation.check_basis,
    "projections": presentation.check_projections,
    "rotation": presentation.check_rotation,
    "kept": kept.check_kept,
    "scoring": scores.check_scoring,
    "fidelity": fidelity.check_fidelity,
    "causality": scores.check_causality,
    "decoding": decoding.check_decoding,
    "packing": packing.check_packing,
    "parity": answers.check_parity,
    "action": scores.check_action,
    "batches": answers.check_batches,
    "records": answers.check_records,
    "refusals": answers.check_refusals,
}
"""In the order in which they run: each relies on what the ones before it have shown."""


def main(arguments: Sequence[str]) -> int:
    """Print one line per check and the verdict; exit status 1 if a check failed."""
    options = _parse(arguments)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    torch.manual_seed(0)  # presses that draw random numbers do so from this seed
    started = time.perf_counter()
    subject = Subject.load(options.model_args)
    model = subject.lm.model
    print(
        f"{options.model_args.get('pretrained', 'builtin')}: {type(model).__name__}, "
        f"{model.num_parameters() / 1e6:.1f} M parameters, {str(model.dtype).removeprefix('torch.')}, "
        f"{model.config._attn_implementation}, {subject.lm.device}; windows of {subject.max_length} tokens"
    )
    found = []
    for name in options.checks:
        found.append(CHECKS[name](subject))
        print(line(found[-1]), flush=True)
    failed = [check.name for check in found if not check.passed]
    seconds = time.perf_counter() - started
    print(verdict(failed, len(found)) + f" ({seconds:.0f} s)")
    if options.json:
        text = json.dumps(report(options.model_args, subject, found, seconds), indent=2) + "\n"
        advice = "the verdict above is complete; make room and run it again for the file"
        write_whole(options.json, text, advice, what=f"--json {options.json}")
    return 1 if failed else 0


def line(check: Check) -> str:
    """One check on one line: verdict, figure, tolerance, and of what."""
    sign = ">=" if check.worst.at_least else "<="
    word = "ok  " if check.passed else "FAIL"
    return (
        f"{word} {check.name:<12} {check.measured:9.3g} {sign} {check.tolerance:<8.3g} {check.claim} [{check.detail}]"
    )


def verdict(failed: Sequence[str], num_checks: int) -> str:
    if failed:
        return f"NOT VERIFIED: {len(failed)} of {num_checks} checks failed: {', '.join(failed)}"
    return f"VERIFIED: {num_checks} checks passed"


def report(arguments: Mapping[str, Any], subject: Subject, found: Sequence[Check], seconds: float) -> dict[str, Any]:
    """Everything that was measured, ready for JSON."""
    facts = subject.lm.describe()
    return {
        "model_args": dict(arguments),
        **{key: facts[key] for key in ("dtype", "device", "attn_implementation", "versions")},
        "passed": all(check.passed for check in found),
        "seconds": round(seconds, 1),
        "checks": [
            {
                **{key: getattr(check, key) for key in ("name", "claim", "passed", "measured", "tolerance", "detail")},
                "parts": [
                    {
                        "what": part.what,
                        "measured": part.measured,
                        "limit": part.limit,
                        "at_least": part.at_least,
                        "passed": part.passed,
                    }
                    for part in check.parts
                ],
            }
            for check in found
        ],
    }


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lm-eval-kvpress verify",
        description="Check on a checkpoint that compressed caches are scored correctly. Takes memory for two copies "
        "of it, and at the first check for a third.",
    )
    parser.add_argument(
        "--model_args",
        type=_model_args,
        default={},
        help="as for lm_eval, without a press: pretrained=... (default: builtin), dtype=... (default: float32), "
        "device=..., attn_implementation=..., max_length=...",
    )
    parser.add_argument(
        "--checks",
        type=lambda text: text.split(","),
        default=list(CHECKS),
        help=f"some of them, separated by commas: {', '.join(CHECKS)}",
    )
    parser.add_argument("--json", type=_writable, metavar="FILE", help="write every measurement there")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.checks if name not in CHECKS]
    if unknown:
        parser.error(f"unknown check {unknown[0]!r}; there are {', '.join(CHECKS)}")
    return options


def _model_args(text: str) -> dict[str, Any]:
    """``a=1,b=2`` or a JSON object, as on lm-eval's command line."""
    try:
        found: dict[str, Any] = json.loads(text) if text.lstrip().startswith("{") else simple_parse_args_string(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"give NAME=VALUE,... or a JSON object, not {text!r}") from error
    return found


def _writable(text: str) -> Path:
    file = Path(text)
    try:
        if not text:
            raise UsageError("the name is empty: name a file")
        refuse_special(file)
        if not file.parent.is_dir():  # a slip of the pen, rather than a folder to make
            raise UsageError(f"{text} cannot be written: No such file or directory as {file.parent}")
        make_writable("--json", file.parent)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return file.resolve()
