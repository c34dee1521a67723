"""Presses of kvpress that read statistics of the model, from a file that is named instead of a model's name.

kvpress looks for files by the name of the checkpoint. Here ``statistics=FILE`` says which they are, so that they can be
checked against the weights. What the presses compute is kvpress's own.

Letters: L layers, H query heads, K key-value heads, D head_dim, E hidden size, M hidden units of a surrogate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import kvpress
from transformers.activations import ACT2FN

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


@dataclass
class CalibratedDuoAttentionPress(kvpress.DuoAttentionPress):
    """DuoAttention: heads that retrieve least keep only first and newest entries, and all others keep everything.

    Args:
        sink_size, recent_size: first and newest entries that these heads keep; None for those of the file.
        statistics: file with ``full_attention_heads``, shape ``(L, K)``, the higher the more a head retrieves.
    """

    sink_size: int | None = None
    recent_size: int | None = None
    statistics: str = ""

    def __post_init__(self) -> None:
        read_statistics("duo_attention", self.statistics)

    def load_attention_pattern(self, model: Any) -> tuple[int, int, Any]:
        tensors = tensors_for("duo_attention", self.statistics, model, in_float32=True)
        sink_size = int(tensors["sink_size"]) if self.sink_size is None else self.sink_size
        recent_size = int(tensors["recent_size"]) if self.recent_size is None else self.recent_size
        return sink_size, recent_size, tensors["full_attention_heads"].cpu().numpy()


@dataclass
class CalibratedKVzapPress(kvpress.KVzapPress):
    """KVzap: a surrogate predicts from a token's hidden state what KVzip's replay would score its entry.

    Args:
        statistics: file with the surrogate: ``weight``, shape ``(L, K, E)``, and ``bias``, shape ``(L, K)``, or one
            with a hidden layer.
    """

    statistics: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        read_statistics("kvzap", self.statistics)

    def post_init_from_model(self, model: Any) -> None:
        tensors = tensors_for("kvzap", self.statistics, model)
        layers = range(len(tensors["bias"]))
        self.kvzap_model = SimpleNamespace(layers=[Surrogate(**_of_layer(tensors, layer)) for layer in layers])


def _of_layer(tensors: Mapping[str, Any], layer: int) -> dict[str, Any]:
    return {name: tensor[layer] for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Surrogate:
    """One layer's surrogate, called as kvpress calls its module: linear, or with one hidden layer.

    Attributes:
        weight, bias: ``(K, E)`` and ``(K,)``; ``(K, M)`` with a hidden layer.
        hidden_weight, hidden_bias: ``(M, E)`` and ``(M,)``, or None.
    """

    weight: Any
    bias: Any
    hidden_weight: Any = None
    hidden_bias: Any = None

    def __call__(self, hidden_states: Any) -> Any:
        """``(..., E)`` to ``(..., K)``."""
        if self.hidden_weight is not None:
            hidden_states = ACT2FN["gelu"](hidden_states @ self.hidden_weight.T + self.hidden_bias)
        return hidden_states @ self.weight.T + self.bias

    def to(self, *args: Any, **kwargs: Any) -> Surrogate:
        """Itself: its tensors are where the model computes."""
        return self

    def eval(self) -> Surrogate:
        """Itself: it has no other mode."""
        return self


@dataclass
class CalibratedLUKVPress(kvpress.LUKVPress):
    """LU-KV: each head has a budget of its own from a curve, and a press that scores tokens says which fill it.

    Args:
        statistics: file with ``budget_curve``, shape ``(99, L, K)``: the share that each head loses where 1 to 99
            percent of all entries go.
    """

    statistics: str = ""

    def __post_init__(self) -> None:
        self.compression_ratio = getattr(self.press, "compression_ratio", 0.0)
        super().__post_init__()
        read_statistics("lukv", self.statistics)

    def _load_budget_curves(self, model: Any) -> Any:
        return tensors_for("lukv", self.statistics, model, in_float32=True)["budget_curve"]
