"""kvpress's press with one ratio per layer, with two of its silent faults made errors or mended."""

from __future__ import annotations

from collections.abc import Sequence

import kvpress
from transformers import PreTrainedModel

from lm_eval_kvpress.errors import UsageError


class PerLayerPress(kvpress.PerLayerCompressionPress):
    """kvpress's wrapper, which drops ratios beyond the last layer and leaves the wrapped press unprepared."""

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        check_number_of_ratios(self.compression_ratios, model.config.num_hidden_layers)
        self.press.post_init_from_model(model)


def check_number_of_ratios(ratios: Sequence[float], num_layers: int) -> None:
    """Raise a UsageError unless there is one ratio per layer."""
    if len(ratios) != num_layers:
        raise UsageError(f"compression_ratios has {len(ratios)} values for {num_layers} layers: give one per layer")
