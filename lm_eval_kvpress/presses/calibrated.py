"""Presses of kvpress that read statistics of the model, from a file that is named instead of a model's name.

kvpress looks for files by the name of the checkpoint. Here ``statistics=FILE`` says which they are, so that they can be
checked against the weights. What the presses compute is kvpress's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import kvpress

from lm_eval_kvpress.presses.statistics import read_statistics, tensors_for


@dataclass
class CalibratedQFilterPress(kvpress.QFilterPress):
    """Q-Filters: a token stays by the projection of its keys on the main direction of the queries.

    Args:
        statistics: file with ``q_filters``, shape ``(L, K, D)``.
    """

    statistics: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        read_statistics("qfilter", self.statistics)

    def post_init_from_model(self, model: Any) -> None:
        self.q_filters = tensors_for("qfilter", self.statistics, model)["q_filters"]


@dataclass
class CalibratedExpectedAttentionPress(kvpress.ExpectedAttentionStatsPress):
    """Expected attention, with queries as they were on the calibration texts instead of those of the context.

    Args:
        statistics: file with ``query_mean``, shape ``(L, H, D)``, and ``query_cov``, shape ``(L, H, D, D)``, of queries
            before RoPE.
    """

    statistics: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        read_statistics("expected_attention_stats", self.statistics)

    def post_init_from_model(self, model: Any) -> None:
        tensors = tensors_for("expected_attention_stats", self.statistics, model)
        self.mu, self.cov = tensors["query_mean"], tensors["query_cov"]
