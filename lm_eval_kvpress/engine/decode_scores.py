"""Scores of cached entries by a press while text is generated, from what was seen of the newest tokens.

Knows kvpress's ``score``. Does not know which entries stay, or text.

Letters in shape comments: G rows of equal length, H key-value heads, n entries, D head_dim, W newest tokens whose
hidden states are known.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from lm_eval_kvpress.engine.decode_row import Row
from lm_eval_kvpress.engine.decode_watch import Watch
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.decoding import DecodingSpec
from lm_eval_kvpress.presses.positions import expect_from


class DecodingScores:
    """Scores entries of the rows of one batch.

    Args:
        model: the model.
        spec: what scores.
        watch: what was seen of the forwards before.
    """

    def __init__(self, model: PressableModel, spec: DecodingSpec, watch: Watch) -> None:
        self._model, self._spec, self._watch = model, spec, watch
        self._press = functools.lru_cache(maxsize=4)(self._built)

    def of_rows(
        self, layer: int, places: Sequence[int], rows: Sequence[Row], num_kept: int, positions: Sequence[int]
    ) -> list[list[torch.Tensor]]:
        """Scores of each row's heads, ``(n,)`` each; higher ones are kept.

        Args:
            layer: its index.
            places: of the rows in the batch.
            rows: equally long ones, or one whose heads see different entries.
            num_kept: entries that stay of each.
            positions: of each row's next token.
        """
        if rows[0].is_even:
            keys, values = (torch.cat([getattr(row, name) for row in rows]) for name in ("keys", "values"))
            received = [row.received for row in rows if row.received is not None]
            weights = self._as_attention(torch.cat(received)) if self._spec.reads_attention else None
            return [list(of_row) for of_row in self._scores(layer, places, keys, values, weights, num_kept, positions)]
        (row,) = rows
        heads = range(len(row.counts))
        return [[self._of_head(layer, places, row.head(head), head, num_kept, positions) for head in heads]]

    def _of_head(
        self, layer: int, places: Sequence[int], alone: Row, head: int, num_kept: int, positions: Sequence[int]
    ) -> torch.Tensor:
        """Scores ``(n,)`` of entries that one head alone has.

        The press is shown them as those of every head, and the scores of this one are taken: it scores heads apart.
        """
        shape = (-1, self._model.num_key_value_heads, -1, -1)
        keys, values = alone.keys.expand(shape), alone.values.expand(shape)
        return self._scores(layer, places, keys, values, None, num_kept, positions)[0, head]

    def _scores(
        self,
        layer: int,
        places: Sequence[int],
        keys: torch.Tensor,
        values: torch.Tensor,
        weights: torch.Tensor | None,
        num_kept: int,
        positions: Sequence[int],
    ) -> torch.Tensor:
        """Scores ``(G, H, n)`` of entries ``(G, H, n, D)``."""
        device, press = keys.device, self._press(keys.shape[2], num_kept)  # a model may lie on several devices
        hidden = self._watch.hidden[layer].to(device)[torch.tensor(places)]
        asked = torch.tensor(positions, device=device)[:, None] + torch.arange(-hidden.shape[1], 0, device=device)
        angles = self._model.model.base_model.rotary_emb(hidden, asked)
        kwargs = {"hidden_states": hidden, "position_embeddings": tuple(angle.to(device) for angle in angles)}
        if self._spec.reads_position:
            expect_from(press, positions[0])
        scores: torch.Tensor = press.score(self._model.attentions[layer], hidden, keys, values, weights, kwargs)
        return scores

    def _built(self, num_entries: int, num_kept: int) -> Any:
        press = self._spec.build(num_entries, num_kept)
        press.post_init_from_model(self._model.model)
        return press

    def _as_attention(self, received: torch.Tensor) -> torch.Tensor:
        """Attention weights, ``(G, query heads, 1, n)``, of which kvpress makes the average that an entry received.

        kvpress divides what it adds up by the queries of a prefill, which see an entry from its own token on.
        """
        num_queries = torch.arange(received.shape[2], 0, -1, device=received.device)
        weights = received[..., 0] / received[..., 1] * num_queries
        return weights.repeat_interleave(self._model.num_query_heads // received.shape[1], dim=1)[:, :, None]
