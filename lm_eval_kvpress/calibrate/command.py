"""`lm-eval-kvpress calibrate`: take the statistics of a model that a press needs, and write them to a file.

The file is one of safetensors. Its metadata say of which weights, texts and versions the statistics are.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from lm_eval.utils import simple_parse_args_string

from lm_eval_kvpress.calibrate.methods import CURVE, METHODS, NUM_SKIPPED, REPLAYS, calibration_of
from lm_eval_kvpress.calibrate.texts import read_texts, sha256_of, windows_of
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.files import refuse_special, write_whole
from lm_eval_kvpress.harness import run_record
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.harness.statistics import ARGUMENTS, identity_of_model
from lm_eval_kvpress.harness.tokenization import encode_all

ENDING = ".safetensors"
LEAST_WINDOW = 2 * NUM_SKIPPED
"""Tokens of the shortest window that counts."""
PROMPT_TOKENS = 64
"""Room for the prompt between a window and its replay, in a model's positions."""


def main(arguments: Sequence[str]) -> int:
    """Calibrate, and say in one line what was written."""
    options = _parse(arguments)
    refuse_special(options.output, "-o")
    texts = read_texts(options.data)
    lm = KVPress(**{"pretrained": "builtin", **options.model_args})
    length = min(options.window, _longest_window(options.press, lm.max_length))
    if min(length, options.num_tokens) < LEAST_WINDOW:
        raise UsageError(
            f"windows would have {max(0, min(length, options.num_tokens))} tokens, and the shortest that counts has "
            f"{LEAST_WINDOW}: raise --window, --num_tokens or max_length"
        )
    windows = windows_of(encode_all(lm, texts), length=length, num_tokens=options.num_tokens, least=LEAST_WINDOW)
    num_tokens = sum(map(len, windows))
    needed = _unknowns(options.press, lm)
    if num_tokens <= needed:
        raise UsageError(
            f"--data {options.data} has {num_tokens} tokens, too few to calibrate {options.press} on, which takes more "
            f"than {needed}: name more text, or raise --num_tokens"
        )
    started, on_processors = time.perf_counter(), time.process_time()
    calibration = calibration_of(options.press)
    tensors = calibration.take(lm.press_model, windows)
    seconds, processor_seconds = time.perf_counter() - started, time.process_time() - on_processors
    about = {
        "press": calibration.press,
        **({ARGUMENTS: json.dumps(calibration.arguments)} if calibration.arguments else {}),
        "model": lm.pretrained_name,
        **identity_of_model(lm.press_model),
        "data": options.data,
        "data_sha256": sha256_of(texts),
        "num_tokens": str(num_tokens),
        "num_windows": str(len(windows)),
        "window_tokens": str(length),
        "num_skipped": str(NUM_SKIPPED),
        "seconds": f"{seconds:.1f}",
        "processor_seconds": f"{processor_seconds:.1f}",
        "versions": json.dumps(run_record.versions()),
    }
    write_whole(options.output, safetensors.torch.save(tensors, about), "make room, and run the same command again")
    print(f"{options.output}: {options.press} of {lm.pretrained_name}, from {num_tokens:,} tokens in {seconds:.0f} s")
    print(f"next: --model_args press={options.press},statistics={options.output}")
    return 0


def _unknowns(press: str, lm: KVPress) -> int:
    """Numbers that are fitted per head: as many tokens, or fewer, fit whatever they hold."""
    return int(lm.model.config.hidden_size) if press in REPLAYS else lm.press_model.head_dim


def _longest_window(press: str, max_length: int) -> int:
    return (max_length - PROMPT_TOKENS) // 2 if press in REPLAYS else max_length


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lm-eval-kvpress calibrate",
        description="Take the statistics of a model that a press needs. Take them on texts that no task of the "
        "evaluation holds, and in the dtype of the evaluation.",
    )
    parser.add_argument(
        "press", type=_press, metavar="PRESS", help=f"one of {', '.join(METHODS)}, {CURVE}:PRESS,ARGUMENT=VALUE,..."
    )
    parser.add_argument(
        "--model_args",
        type=_model_args,
        default={},
        help="as for lm_eval, without a press: pretrained=... (default: builtin), dtype=..., device=...",
    )
    parser.add_argument("--data", required=True, help="FILE.txt, FILE.jsonl (a text per line), or a task of lm-eval")
    parser.add_argument("-o", "--output", type=_safetensors, required=True, metavar="FILE", help="write there")
    parser.add_argument(
        "--num_tokens", type=_positive, default=65_536, help="tokens of text, at most (default: %(default)s)"
    )
    parser.add_argument(
        "--window", type=_positive, default=1_024, help="tokens of a window, at most (default: %(default)s)"
    )
    return parser.parse_args(arguments)


def _press(text: str) -> str:
    try:
        calibration_of(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _model_args(text: str) -> dict[str, Any]:
    """``a=1,b=2`` or a JSON object, as on lm-eval's command line."""
    try:
        found: dict[str, Any] = json.loads(text) if text.lstrip().startswith("{") else simple_parse_args_string(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"give NAME=VALUE,... or a JSON object, not {text!r}") from error
    if {"press", "compression_ratio", "kv_budget"} & found.keys():
        raise argparse.ArgumentTypeError("statistics are taken without a press: leave press and its arguments out")
    return found


def _safetensors(text: str) -> Path:
    path = Path(text).expanduser()
    if path.suffix != ENDING:
        raise argparse.ArgumentTypeError(f"{text}: the name must end in {ENDING}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no folder {path.parent}")
    return path


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"give a whole number above 0, not {text!r}")
    return int(text)
