"""Results and samples of a cell, written by lm-eval's own tracker and read back.

The tracker swallows every error: on a full disk it leaves a results file that is cut, or none, and says so at a level
that nobody sees. Here such an error ends the sweep. Knows lm-eval's results. Does not know models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.loggers import EvaluationTracker, WandbLogger

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.unsaved import tracker_errors

Samples = Mapping[str, Sequence[Any]]


def write_results(tracker: EvaluationTracker, results: dict[str, Any], samples: dict[str, Any]) -> None:
    """Write results and samples as lm-eval's command does, and make sure that they can be read again.

    Args:
        tracker: with an empty folder as its ``output_path``.

    Raises:
        UsageError: in one line, if they are not whole on disk.
    """
    with tracker_errors() as errors:
        tracker.save_results_aggregated(results=results, samples=samples)
        for task in results["configs"]:
            tracker.save_results_samples(task_name=task, samples=samples[task])
    problem = "; ".join(errors) or _problem(tracker, results, samples)
    if problem:
        raise UsageError(
            f"{tracker.output_path}: results cannot be written ({problem}): make room; the answers are kept, and the "
            "same command goes on"
        )


def log_to_wandb(arguments: dict[str, Any], results: dict[str, Any], samples: dict[str, Any]) -> str:
    """Send a cell to Weights & Biases, as lm-eval's command sends a run.

    Returns:
        What went wrong, in one line. As in lm-eval's command, a service that fails costs no results.
    """
    try:
        logger = WandbLogger(arguments)
        logger.post_init(results)
        logger.log_eval_result()
        logger.log_eval_samples(samples)
        logger.run.finish()
    except Exception as error:  # noqa: BLE001 (any error of a service)
        return f"logging to Weights & Biases failed ({type(error).__name__}: {' '.join(str(error).split())})"
    return ""


def _problem(tracker: EvaluationTracker, results: Mapping[str, Any], samples: Samples) -> str:
    """What cannot be read back; empty if everything can."""
    folder = Path(str(tracker.output_path)) / str(tracker.general_config_tracker.model_name_sanitized)
    try:
        file = folder / f"results_{tracker.date_id}.json"
        if json.loads(file.read_text(encoding="utf-8"))["results"].keys() != results["results"].keys():
            return f"{file.name} does not hold all tasks"
        for task in results["configs"]:
            file, num_samples = folder / f"samples_{task}_{tracker.date_id}.jsonl", len(samples[task])
            with file.open(encoding="utf-8") as lines:
                num_found = sum(bool(json.loads(line)) for line in lines)
            if num_found != num_samples:
                return f"{file.name} holds {num_found} of {num_samples} samples"
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
