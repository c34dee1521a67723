"""Sessions of one loaded model are runs of their own, and so is each evaluation by one model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from lm_eval_requests import generation_requests, loglikelihood_requests, ours, rolling_requests

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.arguments import parse_arguments
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.harness.session import Session
from lm_eval_kvpress.records.clock import Clock

PRESS = {"press": "snapkv", "window_size": 8, "compression_ratio": 0.75}


def session_under(lm: KVPress, **arguments: Any) -> Session:
    settings, _ = parse_arguments(arguments)
    return lm.open_session(settings)


def all_answers(lm: KVPress) -> tuple[list[Any], ...]:
    return (
        lm.loglikelihood(loglikelihood_requests(), disable_tqdm=True),
        lm.loglikelihood_rolling(rolling_requests(), disable_tqdm=True),
        lm.generate_until(generation_requests(until=[], max_gen_toks=5), disable_tqdm=True),
    )


def test_a_session_answers_and_reports_as_a_model_of_its_own(checkpoint_dir: Path) -> None:
    lm, alone = ours(checkpoint_dir, batch_size=4), ours(checkpoint_dir, batch_size=4, **PRESS)
    own, other = lm.session, session_under(lm, **PRESS)
    lm.use(other)
    assert all_answers(lm) == all_answers(alone)
    tasks = lm.describe()["tasks"]
    assert tasks == alone.describe()["tasks"] and tasks["choice"]["contexts_pressed"]["num_contexts"] == 5
    assert own.totals == {}, "the session that did not answer"
    lm.use(own)
    assert lm.describe()["press"]["name"] == "none" and lm.describe()["tasks"] == {}


def test_a_session_that_does_not_fit_the_model_is_refused(checkpoint_dir: Path) -> None:
    with pytest.raises(UsageError, match="exceed the 512 positions"):
        session_under(ours(checkpoint_dir), press="knorm", rolling="stream", stream_budget=4096)


def test_another_way_of_answering_takes_the_place_of_the_models(checkpoint_dir: Path) -> None:
    class Constant:
        """Says the same to every request."""

        def answers(self, kinds: Sequence[Any], bar: Any) -> Iterator[tuple[int, Any]]:
            yield from reversed([(index, (-1.0, True)) for index in range(len(loglikelihood_requests()))])

    lm = ours(checkpoint_dir)
    lm.use(lm.session, Constant())
    assert set(lm.loglikelihood(loglikelihood_requests(), disable_tqdm=True)) == {(-1.0, True)}


# ---------------------------------------------------------------------------------------------- one evaluation's end


def test_what_is_asked_after_the_record_is_a_run_of_its_own(checkpoint_dir: Path, tmp_path: Path) -> None:
    lm, asked = ours(checkpoint_dir, throughput_log=str(tmp_path / "log.jsonl"), **PRESS), loglikelihood_requests()
    answers = [lm.loglikelihood(asked[:4], disable_tqdm=True), lm.loglikelihood(asked[4:8], disable_tqdm=True)]
    between = lm.describe()
    assert between["throughput"]["num_requests"] == 8 and not lm.session.is_over, "who reads it begins nothing"
    first = lm.get_model_info()["kvpress"]
    assert first["tasks"] == between["tasks"] and lm.describe()["run"] == first["run"], "nor does the record itself"
    again = [lm.loglikelihood(asked[:4], disable_tqdm=True), lm.loglikelihood(asked[4:8], disable_tqdm=True)]
    second = lm.get_model_info()["kvpress"]
    assert again == answers and second["run"] != first["run"]
    for key in first.keys() - {"run", "throughput"}:
        assert second[key] == first[key], key
    assert second["throughput"]["num_requests"] == second["tasks"]["choice"]["tokens_scored"] - 12 == 8
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    runs = [line["run"] for line in logged if line["record"] == "request"]
    assert runs == [first["run"]] * 8 + [second["run"]] * 8


def test_a_session_that_was_given_goes_on_after_its_record(checkpoint_dir: Path) -> None:
    lm = ours(checkpoint_dir)
    given = session_under(lm, **PRESS)
    lm.get_model_info()
    lm.use(given)
    for num_asked in (4, 8):
        lm.loglikelihood(loglikelihood_requests()[:4], disable_tqdm=True)
        assert lm.get_model_info()["kvpress"]["throughput"]["num_requests"] == num_asked and lm.session is given


def test_every_rank_begins_a_run_after_the_facts_were_gathered(
    checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval asks rank 0 alone for the record."""
    lm = ours(checkpoint_dir)
    monkeypatch.setattr(HFLM, "gather_object", lambda lm, facts, dst: None)  # as of any other rank
    for part in ("samples", "metrics"):
        lm.loglikelihood(loglikelihood_requests()[:4], disable_tqdm=True)
        assert lm.gather_object(part) is None and lm.gather_object(part) is None
        assert lm.describe()["throughput"]["num_requests"] == 4


def test_a_run_that_failed_is_no_part_of_the_next(checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, asked = ours(checkpoint_dir), loglikelihood_requests()
    lm.loglikelihood(asked[:4], disable_tqdm=True)
    with monkeypatch.context() as patch:
        patch.setattr(lm.answering, "answers", interrupt)
        with pytest.raises(KeyboardInterrupt):
            lm.generate_until(generation_requests(until=[], max_gen_toks=3), disable_tqdm=True)
    assert lm.describe()["throughput"]["num_requests"] == 4, "it can be looked at"
    lm.loglikelihood(asked[:4], disable_tqdm=True)
    assert lm.describe()["throughput"]["num_requests"] == 4


def test_answers_from_the_cache_are_of_the_run_that_reads_them(checkpoint_dir: Path, tmp_path: Path) -> None:
    lm, asked, file = ours(checkpoint_dir), loglikelihood_requests()[:4], str(tmp_path / "cache.db")
    counts = []
    for num_asked in (3, 4, 4):
        cached = CachingLM(lm, file)
        cached.loglikelihood(asked[:num_asked])
        record = cached.get_model_info()["kvpress"]
        counts.append((record["answered_before"]["requests_from_use_cache"], record["throughput"]["num_requests"]))
    assert counts == [(0, 3), (3, 1), (4, 0)]


def test_an_evaluations_cache_gets_no_answers_of_later_runs(checkpoint_dir: Path, tmp_path: Path) -> None:
    lm, asked = ours(checkpoint_dir), loglikelihood_requests()
    cached = CachingLM(lm, str(tmp_path / "cache.db"))
    cached.loglikelihood(asked[:4])
    with lm.used_for_now(session_under(lm, **PRESS)):
        lm.loglikelihood(asked[4:8], disable_tqdm=True)
    assert len(cached.dbdict) == 4, "what another press answered"
    cached.get_model_info()
    lm.loglikelihood(asked[8:12], disable_tqdm=True)
    assert len(cached.dbdict) == 4, "what was asked without use_cache"


def interrupt(*_: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("arguments", "has_peak"), [({}, True), ({"fidelity": True}, False)])
def test_memory_that_the_full_cache_takes_is_no_presss_peak(
    checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], has_peak: bool
) -> None:
    monkeypatch.setattr(Clock, "_peak_memory_bytes", lambda clock: 7)
    lm = ours(checkpoint_dir, **PRESS, **arguments)
    lm.loglikelihood(loglikelihood_requests()[:2], disable_tqdm=True)
    assert lm.describe()["throughput"]["peak_memory_bytes"] == (7 if has_peak else None)
