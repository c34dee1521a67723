"""A rolling score is a float that keeps its counts."""

from __future__ import annotations

import pickle

from lm_eval_kvpress.records.rolling_score import RollingScore


def test_a_rolling_score_keeps_its_counts_through_pickle() -> None:
    score = pickle.loads(pickle.dumps(RollingScore(-12.5, 10, 4, -5.0)))
    assert score == -12.5
    assert (score.num_tokens, score.num_tokens_pressed, score.loglikelihood_pressed) == (10, 4, -5.0)
