"""Score continuations through a compressed cache, teacher-forced. Token ids in, log-probabilities out.

The continuations of a context are packed behind each other in one row, and each sees the cache, the shared held-back
tokens and itself: a tree of depth two. No row of the cache is repeated, and the cache is left as it was. Does not know
text, lm-eval or presses.

Letters in shape comments: B rows, Q packed new tokens, E hidden size, P predicting positions, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from lm_eval_kvpress.cache.compressed import CachedLayer, CompressedCache
from lm_eval_kvpress.cache.layers import reading_cache
from lm_eval_kvpress.cache.masks import attention_bias
from lm_eval_kvpress.engine.prefill import prefill_hidden
from lm_eval_kvpress.engine.token_logprobs import token_scores
from lm_eval_kvpress.models.pressable import PressableModel, masked, placeholder_mask
from lm_eval_kvpress.records.fidelity import Fidelity


@dataclass(frozen=True)
class Pack:
    """The new tokens of one context.

    Attributes:
        query: the held-back end of the context, fed after compression. May be empty (``query_tokens=0``): then the
            first token of every branch is predicted by the prefill, that is from the full cache.
        branches: the continuations to score, each with at least one token.
    """

    query: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Held:
    """What a decoding press did to the cache of one continuation before its last token.

    Attributes:
        num_compressions: how often it evicted entries.
        max_entries: the most entries per layer that it found when it did.
        num_before: tokens that were predicted before the first time.
    """

    num_compressions: int
    max_entries: int
    num_before: int


@dataclass(frozen=True)
class BranchScore:
    """One scored continuation.

    Attributes:
        logprobs: the log-probability of each token in nats.
        is_greedy: whether every token is the most likely one.
        fidelity: how far each token's prediction is from that over the full cache, where that is measured.
        held: what a decoding press did while it was scored, where one acted.
    """

    logprobs: tuple[float, ...]
    is_greedy: bool
    fidelity: Fidelity | None = None
    held: Held | None = None


@dataclass(frozen=True, eq=False)
class Predictions:
    """The hidden states that predict the tokens of some packs.

    Attributes:
        hidden: ``(P, E)``, before the head.
        sources: ``(N,)``, on the CPU: the row of ``hidden`` that predicts each scored token.
        layout: the packs, padded.
    """

    hidden: torch.Tensor
    sources: torch.Tensor
    layout: Layout

    @classmethod
    def of(cls, layout: Layout, hidden: torch.Tensor) -> Predictions:
        """Those of the hidden states ``(B, Q, E)`` of a layout's columns, behind which the prefill's may stand."""
        places, sources = torch.unique(layout.rows * hidden.shape[1] + layout.sources, return_inverse=True)
        predicting = hidden.reshape(-1, hidden.shape[-1])[places.to(hidden.device)]  # (P, E)
        return cls(predicting, sources, layout)

    def scores(self, model: PressableModel) -> list[list[BranchScore]]:
        """One list per pack with one `BranchScore` per branch, in order."""
        logprobs, greedy = token_scores(model, self.hidden, self.sources, self.layout.targets)
        regrouped = self.layout.regroup(torch.stack([logprobs, greedy.to(logprobs.dtype)], dim=-1))
        return [
            [BranchScore(tuple(logprobs), all(flag == 1 for flag in greedy)) for logprobs, greedy in branches]
            for branches in regrouped
        ]


def score(model: PressableModel, cache: CompressedCache, packs: Sequence[Pack]) -> list[list[BranchScore]]:
    """Score every branch of every pack, teacher-forced, through the compressed cache of its row.

    Returns:
        one list per pack with one `BranchScore` per branch, in order.
    """
    return predict(model, cache, packs).scores(model)


@torch.inference_mode()
def predict(model: PressableModel, cache: CompressedCache, packs: Sequence[Pack]) -> Predictions:
    """Run the tokens of every pack through the compressed cache of its row."""
    assert len(packs) == len(cache.num_seen), f"{len(packs)} packs for {len(cache.num_seen)} rows"
    layout = Layout.of(packs)
    if layout.tokens.shape[1] == 0:  # one-token branches straight from the prefill
        hidden = prefill_hidden(cache)[:, None]
    elif cache.is_empty and all(len(pack.branches) == 1 for pack in packs):
        hidden = model.hidden_states(layout.tokens.to(model.device), use_cache=False)  # plain causal: no mask, no cache
    else:
        hidden = _forward(model, reading_cache(cache), cache, layout)
    if any(not pack.query for pack in packs) and layout.tokens.shape[1]:
        hidden = torch.cat([hidden, prefill_hidden(cache)[:, None]], dim=1)
    return Predictions.of(layout, hidden)


@dataclass(frozen=True, eq=False)
class Layout:
    """Packs as a padded batch.

    Attributes:
        tokens, offsets, segments: ``(B, Q)``: ids; distance from the row's next position; 0 for the query, 1.. for the
            branches, -1 for padding.
        rows, sources, targets: ``(N,)``: each scored token's row, the column whose hidden state predicts it (Q stands
            for the prefill's last hidden state), and its id.
        lengths: per pack, the lengths of its branches.
    """

    tokens: torch.Tensor
    offsets: torch.Tensor
    segments: torch.Tensor
    rows: torch.Tensor
    sources: torch.Tensor
    targets: torch.Tensor
    lengths: list[list[int]]

    @classmethod
    def of(cls, packs: Sequence[Pack]) -> Layout:
        tokens: list[list[int]] = []
        offsets: list[list[int]] = []
        segments: list[list[int]] = []
        rows: list[int] = []
        sources: list[int] = []
        targets: list[int] = []
        width = max(len(p.query) + sum(len(b) - 1 for b in p.branches) for p in packs)
        for row, pack in enumerate(packs):
            held = len(pack.query)
            ids, places, owners = list(pack.query), list(range(held)), [0] * held
            for owner, branch in enumerate(pack.branches, start=1):
                assert branch, "a branch without tokens"
                first = held - 1 if held else width
                sources += [first, *range(len(ids), len(ids) + len(branch) - 1)]
                targets += branch
                rows += [row] * len(branch)
                ids += branch[:-1]
                places += range(held, held + len(branch) - 1)
                owners += [owner] * (len(branch) - 1)
            padding = width - len(ids)
            tokens.append(ids + [0] * padding)
            offsets.append(places + [0] * padding)
            segments.append(owners + [-1] * padding)

        def grid(rows: list[list[int]]) -> torch.Tensor:
            return torch.tensor(rows, dtype=torch.long).view(len(packs), width)

        return cls(
            *(grid(tokens), grid(offsets), grid(segments)),
            *(torch.tensor(rows), torch.tensor(sources), torch.tensor(targets)),
            [[len(branch) for branch in pack.branches] for pack in packs],
        )

    def visible(self) -> torch.Tensor:
        """``(B, Q, Q)``: a token sees the query and its own branch, up to itself."""
        owner, other = self.segments[:, :, None], self.segments[:, None, :]
        width = self.segments.shape[1]
        earlier = torch.ones(width, width, dtype=torch.bool).tril()
        return ((other == 0) | (other == owner)) & earlier

    def regroup(self, values: torch.Tensor) -> list[list[list[list[float]]]]:
        """Split ``(N, K)`` results into packs and branches, with K lists of numbers for each branch."""
        place, packs = 0, []
        for lengths in self.lengths:
            branches = []
            for length in lengths:
                branches.append(values[place : place + length].T.tolist())
                place += length
            packs.append(branches)
        return packs


def _forward(model: PressableModel, reader: Cache, cache: CompressedCache, layout: Layout) -> torch.Tensor:
    """Hidden states ``(B, Q, E)`` of the packed tokens over the cache."""
    next_position = torch.tensor(cache.next_position)[:, None]
    with masked(model.attentions, _LayerBiases(model, cache, layout.visible().to(model.device))):
        return model.hidden_states(
            layout.tokens.to(model.device),
            position_ids=(layout.offsets + next_position).to(model.device),
            past_key_values=reader,
            attention_mask=placeholder_mask(model),
            use_cache=True,
        )


class _LayerBiases(Sequence[torch.Tensor | None]):
    """One additive mask per layer, made when the layer runs; the next layer takes the same one if it hides the same.

    Head-wise masks of all layers together can be larger than the model: for Pythia-2.8B, 1,024 tokens scored over 1,024
    take 128 MiB per layer in 16 bit.
    """

    def __init__(self, model: PressableModel, cache: CompressedCache, visible: torch.Tensor) -> None:
        self._layers, self._visible, self._num_heads = cache.layers, visible, model.num_query_heads
        self._latest: tuple[CachedLayer, torch.Tensor | None] | None = None

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, index: Any) -> Any:
        layer = self._layers[index]
        if self._latest is None or not self._same(self._latest[0], layer):
            self._latest = None  # freed before the next one is made
            bias = attention_bias(layer, self._visible.to(layer.device), layer.dtype, self._num_heads)
            self._latest = layer, bias
        return self._latest[1]

    @staticmethod
    def _same(one: CachedLayer, other: CachedLayer) -> bool:
        same_shape = (one.num_entries, one.device) == (other.num_entries, other.device)
        return same_shape and one.hidden is other.hidden
