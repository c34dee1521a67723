"""A record says which of its requests an earlier run answered; all else is as without an interruption."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.model import CachingLM
from lm_eval_requests import generation_requests, loglikelihood_requests, ours, rolling_requests

from lm_eval_kvpress.engine.compression import Compressor
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.records.loss_files import LossFiles

OF_ONE_CALL = ("run", "throughput", "answered_before")


def streaming(checkpoint: Path, folder: Path, batch_size: int) -> KVPress:
    arguments: dict[str, Any] = {"rolling": "stream", "press": "knorm", "stream_budget": 24, "stream_chunk": 8}
    return ours(checkpoint, stream_output=str(folder), batch_size=batch_size, **arguments)


def interrupted_after(num_documents: int, monkeypatch: pytest.MonkeyPatch) -> None:
    save, saved = LossFiles.save, list[Any]()

    def save_or_stop(*arguments: Any) -> None:
        save(*arguments)
        saved.append(arguments)
        if len(saved) == num_documents:
            raise KeyboardInterrupt

    monkeypatch.setattr(LossFiles, "save", save_or_stop)


@pytest.mark.parametrize(("batch_size", "num_finished"), [(1, 2), (3, 2), (1, 4)])
def test_a_resumed_stream_has_the_record_of_an_uninterrupted_one(
    checkpoint_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int, num_finished: int
) -> None:
    undisturbed = streaming(checkpoint_dir, tmp_path / "whole", batch_size)
    undisturbed.loglikelihood_rolling(rolling_requests(), disable_tqdm=True)
    with monkeypatch.context() as patch:
        interrupted_after(num_finished, patch)
        with pytest.raises(KeyboardInterrupt):
            streaming(checkpoint_dir, tmp_path / "killed", batch_size).loglikelihood_rolling(rolling_requests(), True)
    resumed = streaming(checkpoint_dir, tmp_path / "killed", batch_size)
    resumed.loglikelihood_rolling(rolling_requests(), disable_tqdm=True)
    expected, found = undisturbed.describe(), resumed.describe()
    assert expected["answered_before"]["documents_from_stream_output"] == 0 == len(expected["answered_before"]["notes"])
    assert found["answered_before"]["documents_from_stream_output"] == num_finished
    num_timed = [record["throughput"]["num_requests"] for record in (expected, found)]
    assert num_timed == [4, 4 - num_finished], "times cover the others"
    stream_notes = found["answered_before"]["notes"]
    assert len(stream_notes) == (1 if batch_size == 1 else 2), "with batch_size=1 no loss differs"
    if batch_size > 1:
        bytes_of_batches = [record["tasks"]["rolling"].pop("max_stream_bytes") for record in (expected, found)]
        assert all(bytes_of_batches)
        likelihoods = [record["tasks"]["rolling"].pop("token_perplexity") for record in (expected, found)]
        pressed = [record["tasks"]["rolling"].pop("token_perplexity_under_press") for record in (expected, found)]
        assert likelihoods[0] == pytest.approx(likelihoods[1], rel=1e-5)
        assert pressed[0] == pytest.approx(pressed[1], rel=1e-5)
    for key in (expected.keys() | found.keys()) - set(OF_ONE_CALL):
        assert found[key] == expected[key], key


def test_requests_that_the_cache_answered_are_counted(
    checkpoint_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked, texts = loglikelihood_requests(), generation_requests(until=[], max_gen_toks=3)
    first = ours(checkpoint_dir, press="knorm")
    cached = CachingLM(first, str(tmp_path / "cache.db"))
    cached.loglikelihood(asked[:8])
    cached.generate_until(texts[:2])
    assert first.describe()["answered_before"]["requests_from_use_cache"] == 0
    second = ours(checkpoint_dir, press="knorm")
    again = CachingLM(second, str(tmp_path / "cache.db"))
    again.loglikelihood(asked)
    again.generate_until(texts)
    with caplog.at_level(logging.WARNING, "lm_eval_kvpress"):
        record = again.get_model_info()["kvpress"]
    assert record["answered_before"]["requests_from_use_cache"] == 8 + 2
    (note,) = record["answered_before"]["notes"]
    assert note.startswith("what was kept for the 10 requests answered from use_cache") and note in caplog.text
    assert record["throughput"]["num_requests"] == len(asked) - 8 + len(texts) - 2


def test_what_is_cut_counts_once_it_is_answered(checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = ours(checkpoint_dir, press="knorm", max_length=64, query_aware=False, question_pattern="geese")
    calls = (
        functools.partial(lm.loglikelihood, loglikelihood_requests()[:8]),
        functools.partial(lm.generate_until, generation_requests(until=[], max_gen_toks=3)),
    )
    for call in calls:
        with monkeypatch.context() as patch:
            patch.setattr(Compressor, "compress", interrupt)
            with pytest.raises(KeyboardInterrupt):
                call(disable_tqdm=True)
        assert not lm.describe()["tasks"], "nothing was answered"
    lm.generate_until(generation_requests(until=[], max_gen_toks=3), disable_tqdm=True)
    assert lm.describe()["tasks"]["gen"]["num_cut_contexts"] == 2


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
