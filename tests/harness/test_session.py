"""Sessions of one loaded model are runs of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from lm_eval_requests import generation_requests, loglikelihood_requests, ours, rolling_requests

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.arguments import parse_arguments
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.harness.session import Session

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
