"""A stream that is killed outright goes on with the next unfinished document, to the same bytes on disk."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from lm_eval_kvpress.engine import runner
from lm_eval_kvpress.harness.model import KVPress

DOCUMENTS = ["the mill and seven grey geese " * 140, "nobody asked who owned them ; " * 120, "a river " * 300]
ARGUMENTS: dict[str, Any] = {"device": "cpu", "rolling": "stream", "press": "random", "stream_budget": 24}
ARGUMENTS["stream_chunk"] = 4


def score(checkpoint: str, folder: str) -> None:
    """One document after the other; `press=random` shows whether going on depends on what was drawn before."""
    torch.set_num_threads(1)
    torch.manual_seed(3)
    lm = KVPress(pretrained=checkpoint, stream_output=folder, batch_size=1, **ARGUMENTS)
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0, ("s", i, 1)) for i, text in enumerate(DOCUMENTS)]
    lm.loglikelihood_rolling(requests, disable_tqdm=True)


def finished(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("s/*.csv")}


def killed_after_one_document(checkpoint: Path, folder: Path) -> None:
    child = subprocess.Popen([sys.executable, __file__, json.dumps([str(checkpoint), str(folder)])])
    try:
        while not finished(folder):
            assert child.poll() is None, "ended without a document"
            time.sleep(0.002)
    finally:
        child.kill()
        child.wait()


@pytest.mark.slow
def test_a_killed_run_computes_only_what_is_missing(
    checkpoint_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score(str(checkpoint_dir), str(tmp_path / "undisturbed"))
    expected = finished(tmp_path / "undisturbed")
    killed = tmp_path / "killed"
    killed_after_one_document(checkpoint_dir, killed)
    before = {file: file.stat().st_mtime_ns for file in killed.glob("s/*.csv")}
    assert 0 < len(before) < len(expected) == len(DOCUMENTS)
    computed: list[int] = []
    stream = runner.stream

    def counted(model: Any, documents: list[list[int]], *rest: Any) -> Any:
        computed.extend(map(len, documents))
        return stream(model, documents, *rest)

    monkeypatch.setattr(runner, "stream", counted)
    score(str(checkpoint_dir), str(killed))
    assert len(computed) == len(DOCUMENTS) - len(before)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert finished(killed) == expected


if __name__ == "__main__":
    score(*json.loads(sys.argv[1]))
