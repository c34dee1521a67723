"""Score continuations while a decoding press compresses the cache under them: as if they were being generated.

Each token is predicted over the cache that a text would have at that place. Tokens are known, so that those between two
compressions are fed at once. Token ids in, hidden states out. Does not know text, lm-eval or presses.

Letters in shape comments: B rows, E hidden size, N tokens of a continuation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lm_eval_kvpress.cache.compressed import CompressedCache
from lm_eval_kvpress.engine.decode_budget import BudgetKeeper
from lm_eval_kvpress.engine.decode_state import DecodeState
from lm_eval_kvpress.engine.prefill import prefill_hidden
from lm_eval_kvpress.engine.scoring import Layout, Pack, Predictions
from lm_eval_kvpress.models.pressable import PressableModel, masked


@torch.inference_mode()
def predict_while_compressing(
    model: PressableModel, cache: CompressedCache, packs: Sequence[Pack], keeper: BudgetKeeper
) -> Predictions:
    """Predict the one continuation of each pack.

    Args:
        cache: the compressed contexts, which stay as they are.
        packs: one per row, with held-back tokens in all of them or in none.
        keeper: compresses the growing cache.
    """
    assert all(len(pack.branches) == 1 for pack in packs), "one continuation per row"
    queries, continuations = [pack.query for pack in packs], [pack.branches[0] for pack in packs]
    lengths, held = [len(one) for one in continuations], [len(query) for query in queries]
    assert max(held) == 0 or min(held) > 0, f"some rows hold back nothing, others do: {held}"
    state = DecodeState(model, cache, held, max(lengths) - 1)
    with masked(model.attentions, state.biases), keeper.watching():
        first = state.feed_held_back(queries) if max(held) else prefill_hidden(cache)  # (B, E)
        last_positions = state.positions + torch.tensor(lengths, device=model.device) - 2
        hidden = [first[:, None]]
        tokens = _padded(continuations).to(model.device)
        while (num_fed := sum(part.shape[1] for part in hidden) - 1) < max(lengths) - 1:
            num_forwards = num_fed + (max(held) > 0)
            if keeper.is_due(num_forwards, num_fed + 1):
                state = state.with_cache(keeper.compress(state.as_cache()), max(lengths) - 1 - num_fed)
            width = min(keeper.num_until_due(num_forwards), max(lengths) - 1 - num_fed)
            keeper.expect(width)
            hidden.append(state.feed_known(tokens[:, num_fed : num_fed + width], last_positions))
    return Predictions.of(*_in_columns(packs, torch.cat(hidden, dim=1)))


def _padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


def _in_columns(packs: Sequence[Pack], hidden: torch.Tensor) -> tuple[Layout, torch.Tensor]:
    """The layout of packs, and the hidden states ``(B, N, E)`` that predict their tokens in its columns."""
    layout = Layout.of(packs)
    width = layout.tokens.shape[1]
    columns = hidden.new_zeros(len(packs), width + 1, hidden.shape[-1])
    for row, (pack, states) in enumerate(zip(packs, hidden, strict=True)):
        held, length = len(pack.query), len(pack.branches[0])
        columns[row, held - 1 if held else width] = states[0]
        columns[row, held : held + length - 1] = states[1:length]
    return layout, columns
