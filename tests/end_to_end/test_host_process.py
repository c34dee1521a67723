"""A program that loads the model keeps its process as it was: errors, logging, warnings, torch, random numbers, malloc.

On a CPU no setting of torch changes. With a GPU the model's device becomes the current one, which CUDA's events and
graphs belong to. kvpress itself wraps transformers' attention functions when it is imported; the program below imports
it first, so that only what this package does is seen.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

OF_A_PROCESS_OF_OURS = {("set_num_threads", "sweep/launchers/serving.py")}

PROGRAM = """
import faulthandler, gc, locale, logging, os, random, signal, sys, threading, warnings
import datasets, kvpress, lm_eval.models.huggingface, lm_eval.tasks, numpy, torch, transformers

def state():
    loggers = {name: logging.getLogger(name) for name in ("root", "lm_eval", "transformers", "torch")}
    backends = torch.backends
    return {
        "excepthook": (sys.excepthook, sys.displayhook, threading.excepthook),
        "loggers": {name: (list(log.handlers), log.level, log.propagate) for name, log in loggers.items()},
        "warnings": (list(warnings.filters), warnings.showwarning),
        "threads of torch": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "modes of torch": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()),
        "precision": (torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()),
        "kernels": (
            backends.mkldnn.enabled, backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.allow_tf32,
            backends.cuda.matmul.allow_tf32, backends.cuda.flash_sdp_enabled(), backends.cuda.math_sdp_enabled(),
            backends.cuda.mem_efficient_sdp_enabled(),
        ),
        "random numbers": (random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()),
        "environment": dict(os.environ),
        "process": (os.getcwd(), sys.argv[:], sys.path[:], signal.getsignal(signal.SIGINT), locale.getlocale()),
        "memory": (gc.isenabled(), gc.get_threshold(), faulthandler.is_enabled()),
    }

folder = sys.argv.pop(1)
before = state()
from lm_eval_kvpress.harness.model import KVPress
lm = KVPress(pretrained=folder, device="cpu", press="knorm", max_length=128)
after = state()
changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
assert not changed, changed
"""


def test_importing_and_loading_the_model_leave_the_process_as_it_was(checkpoint_dir: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(checkpoint_dir)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("name", ["mallopt", "faulthandler", "set_num_threads"])
def test_the_package_does_not_even_name(name: str) -> None:
    """What cannot be read back afterwards, such as malloc's settings, is looked for in the source.

    A sweep's worker is a process of its own, and sets its own threads.
    """
    package = ROOT / "lm_eval_kvpress"
    files = [file for file in package.rglob("*.py") if name in file.read_text(encoding="utf-8")]
    assert {(name, file.relative_to(package).as_posix()) for file in files} <= OF_A_PROCESS_OF_OURS
