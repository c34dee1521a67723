"""What `rolling=stream` is asked for: bad settings are refused, other losses are not taken up, the record is true."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from lm_eval_kvpress.engine import batch_size
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.arguments import parse_arguments
from lm_eval_kvpress.harness.model import KVPress

BAD = [
    ({"rolling": "stream", "press": "snapkv"}, "stream_budget"),
    ({"rolling": "stream", "press": "none", "stream_budget": 64}, "cannot compress one cache again and again"),
    ({"rolling": "stream", "press": "adakv:snapkv", "stream_budget": 64}, "cannot compress one cache again and again"),
    ({"rolling": "stream", "press": "snapkv", "stream_budget": 63, "stream_chunk": 64}, "must keep"),
    ({"rolling": "stream", "press": "snapkv", "stream_budget": 128, "stream_chunk": 0}, "at least 1"),
    ({"rolling": "stream", "press": "lagkv", "stream_budget": 192}, "or lower lag_size"),
    ({"rolling": "stream", "press": "snapkv", "stream_budget": 128, "compression_ratio": 0.5}, "compression_ratio"),
    ({"rolling": "stream", "press": "random", "stream_budget": 128, "seed": 7}, "same places"),
    ({"rolling": "prefix", "press": "snapkv", "stream_budget": 128}, "rolling=stream"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD, ids=[str(arguments) for arguments, _ in BAD])
def test_bad_streams_are_refused_in_one_line(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_arguments(arguments)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("positions", [{}, {"stream_positions": "original"}])
def test_positions_beyond_the_trained_ones_are_refused(checkpoint_dir: Path, positions: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="positions"):
        KVPress(
            pretrained=str(checkpoint_dir),
            device="cpu",
            rolling="stream",
            press="streaming_llm",
            stream_budget=100 if positions else 1_000_000,
            **positions,
        )


def requests() -> list[Instance]:
    texts = ["the mill " * 120, "", "river", "seven grey geese slept " * 40]
    return [Instance("loglikelihood_rolling", {}, (text,), 0, ("s", i, 1)) for i, text in enumerate(texts)]


def test_finished_documents_are_read_and_another_setting_is_refused(
    checkpoint_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common: dict[str, Any] = {"pretrained": str(checkpoint_dir), "device": "cpu", "rolling": "stream"}
    common |= {"press": "streaming_llm", "stream_chunk": 8, "stream_output": str(tmp_path / "losses")}
    lm = KVPress(stream_budget=40, **common)
    first = lm.loglikelihood_rolling(requests(), disable_tqdm=True)
    assert [score.num_tokens for score in first] == [  # type: ignore[attr-defined]
        len(lm.tok_encode(request.args[0])) for request in requests()
    ]
    record = lm.describe()["tasks"]["s"]
    assert record["max_stream_entries"] <= 40
    assert record["tokens_scored"] == sum(score.num_tokens for score in first)  # type: ignore[attr-defined]
    again = KVPress(stream_budget=40, **common)
    monkeypatch.setattr("lm_eval_kvpress.engine.runner.stream", lambda *_: pytest.fail("computed again"))
    assert again.loglikelihood_rolling(requests(), disable_tqdm=True) == first
    assert again.describe()["tasks"] == lm.describe()["tasks"], "a document that is read counts like one computed"
    with pytest.raises(UsageError, match="another setting"):
        KVPress(stream_budget=41, **common).loglikelihood_rolling(requests(), disable_tqdm=True)


def test_a_folder_in_use_is_refused_before_weights_are_read(
    checkpoint_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(KVPress, "_create_model", lambda *_, **__: pytest.fail("weights were read"))
    code = (
        "import sys; from pathlib import Path; from lm_eval_kvpress.records.loss_files import lock_folder\n"
        "lock = lock_folder(Path(sys.argv[1])); print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        with pytest.raises(UsageError, match="being written by another run"):
            KVPress(
                pretrained=str(checkpoint_dir),
                device="cpu",
                rolling="stream",
                press="knorm",
                stream_budget=128,
                stream_output=str(tmp_path),
            )
        other.kill()


@pytest.mark.parametrize("change", ["weights", "seed"])
def test_losses_of_other_weights_or_another_seed_are_not_taken_up(
    checkpoint_dir: Path, tmp_path: Path, change: str
) -> None:
    common: dict[str, Any] = {"pretrained": str(checkpoint_dir), "device": "cpu", "rolling": "stream"}
    common |= {"press": "random", "stream_budget": 40, "stream_chunk": 8, "stream_output": str(tmp_path / "losses")}
    torch.manual_seed(1)
    KVPress(**common).loglikelihood_rolling(requests(), disable_tqdm=True)
    other = KVPress(**common)
    if change == "seed":
        torch.manual_seed(2)
    else:
        with torch.no_grad():
            other.model.get_output_embeddings().weight[3] += 0.1
    with pytest.raises(UsageError, match=change):
        other.loglikelihood_rolling(requests(), disable_tqdm=True)


def test_the_summary_of_a_stream_does_not_claim_that_nothing_was_compressed(
    checkpoint_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lm = KVPress(
        pretrained=str(checkpoint_dir), device="cpu", rolling="stream", press="streaming_llm", stream_budget=70
    )
    lm.loglikelihood_rolling(requests(), disable_tqdm=True)
    with caplog.at_level("INFO", logger="lm_eval_kvpress"):
        lm.get_model_info()
    assert "held every layer to 70 entries" in caplog.text
    assert "compressed nothing" not in caplog.text


def test_batch_size_auto_counts_the_entries_of_the_cache(checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "CPU_TOKENS", 2 * (40 + 8))
    lm = KVPress(
        pretrained=str(checkpoint_dir),
        device="cpu",
        rolling="stream",
        press="knorm",
        stream_budget=40,
        stream_chunk=8,
        batch_size="auto",
    )
    lm.loglikelihood_rolling(requests(), disable_tqdm=True)
    assert [batch.batch_size for batch in lm.session.runner.meter.records.batches] == [2, 1]
