"""Compare what a compressed cache predicts with what the full cache predicts, over the whole vocabulary.

Two sets of hidden states are walked over the vocabulary together, a tile of logits of each at a time. The full cache's
side is scored on the same tokens, with the same end of the context fed after the prefill. Knows token ids, contexts and
the two sides. Does not know presses by name, text or lm-eval.

Letters in shape comments: P predicting positions, E hidden size, C columns of a tile, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch

from lm_eval_kvpress.engine.compression import CompressedBatch, Compressor
from lm_eval_kvpress.engine.contexts import Context
from lm_eval_kvpress.engine.online_softmax import RunningSoftmax, column_ranges, rows_per_walk
from lm_eval_kvpress.engine.outcomes import GenerationSettings, Prompt
from lm_eval_kvpress.engine.scoring import BranchScore, Predictions, predict
from lm_eval_kvpress.engine.turns import Turn
from lm_eval_kvpress.models.pressable import PressableModel, logit_dtype
from lm_eval_kvpress.records.fidelity import Fidelity


class FullSide:
    """What the full cache predicts and generates for batches of contexts; the latest batch's serve further presses.

    Args:
        model: the model, presentable to kvpress.
        compressor: prefills without a press.
        autocast: makes the context in which forwards run.
    """

    def __init__(
        self, model: PressableModel, compressor: Compressor, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        assert compressor.press.is_none, f"press={compressor.press.name} leaves no full cache"
        self._model, self._compressor, self._autocast = model, compressor, autocast
        self._latest: tuple[Any, list[Predictions]] | None = None
        self._latest_texts: tuple[Any, list[list[int]]] | None = None

    def predictions(self, contexts: Sequence[Context], turns: Sequence[Turn]) -> list[Predictions]:
        """The predictions of each turn, by the attention in use. The caches are freed before this returns."""
        key = self._model.model.config._attn_implementation, tuple(contexts), tuple(turns)
        if self._latest is None or self._latest[0] != key:
            self._latest = None  # before the next ones, which need the memory
            with self._autocast():
                cache = self._compressor.compress(contexts).cache
                self._latest = key, [predict(self._model, turn.select(cache), turn.packs) for turn in turns]
        return self._latest[1]

    def compared(
        self,
        scores: Sequence[Sequence[BranchScore]],
        turns: Sequence[Turn],
        full: Sequence[Predictions],
        compressed: Sequence[Predictions],
    ) -> list[list[BranchScore]]:
        """The scores of each row, with how far each token is from the full cache's prediction."""
        found = [list[Fidelity]() for _ in scores]
        for turn, *sides in zip(turns, full, compressed, strict=True):
            with self._autocast():
                for row, branches in zip(turn.rows, compare(self._model, *sides), strict=True):
                    found[row] += branches
        return [
            [replace(branch, fidelity=fidelity) for branch, fidelity in zip(*row, strict=True)]
            for row in zip(scores, found, strict=True)
        ]

    def texts(
        self,
        prompts: Sequence[Prompt],
        settings: GenerationSettings,
        decode: Callable[[CompressedBatch], list[list[int]]],
    ) -> list[list[int]]:
        """The new tokens of each prompt, which ``decode`` produces from the full cache, by the attention in use."""
        key = self._model.model.config._attn_implementation, tuple(prompts), settings
        if self._latest_texts is None or self._latest_texts[0] != key:
            with self._autocast():
                batch = self._compressor.compress([prompt.context for prompt in prompts])
                self._latest_texts = key, decode(batch)
        return self._latest_texts[1]


class FullDocuments:
    """What the full cache predicts of documents that are streamed: one plain forward over each, up to the window.

    Args:
        model: the model, presentable to kvpress.
        documents: token ids.
        prefix_token: predicts each document's first token.
        window: the most tokens of a forward; what comes later in a document has no full cache to compare with.
    """

    def __init__(
        self, model: PressableModel, documents: Sequence[Sequence[int]], prefix_token: int, window: int
    ) -> None:
        self._model, self._documents, self._window = model, documents, window
        rows = [torch.tensor([prefix_token, *document[:-1]][:window]) for document in documents]
        with torch.inference_mode():  # (T, E) each
            self._hidden = [model.hidden_states(row[None].to(model.device), use_cache=False)[0] for row in rows]

    @torch.inference_mode()
    def compared(self, index: int, hidden: torch.Tensor, first: int) -> Fidelity | None:
        """Compare what predicts some tokens of a document, as far as they fit into the window.

        Args:
            index: of the document.
            hidden: ``(n, E)``, of the stream.
            first: place of the first of these tokens.
        """
        last = min(len(self._documents[index]), first + len(hidden), self._window)
        if last <= first:
            return None
        sides = self._hidden[index][first:last], hidden[: last - first]
        values = compare_states(self._model, *sides, torch.arange(last - first), self._targets(index, first, last))
        kl, agrees, changes = values.T.tolist()
        return Fidelity(tuple(kl), tuple(flag == 1 for flag in agrees), tuple(changes))

    def _targets(self, index: int, first: int, last: int) -> torch.Tensor:
        return torch.tensor(self._documents[index][first:last])


@torch.inference_mode()
def compare(model: PressableModel, full: Predictions, compressed: Predictions) -> list[list[Fidelity]]:
    """Compare two predictions of the same packs.

    Returns:
        one list per pack with one `Fidelity` per branch, in order.
    """
    assert torch.equal(full.sources, compressed.sources), "two sides of different tokens"
    values = compare_states(model, full.hidden, compressed.hidden, compressed.sources, compressed.layout.targets)
    return [
        [Fidelity(tuple(kl), tuple(flag == 1 for flag in agrees), tuple(changes)) for kl, agrees, changes in branches]
        for branches in compressed.layout.regroup(values)
    ]


def compare_states(
    model: PressableModel, full: torch.Tensor, compressed: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """KL, agreement and change of the log-probability of each token, ``(N, 3)`` in float64 on the CPU.

    Args:
        full, compressed: ``(P, E)``, hidden states before the head.
        sources: ``(N,)``: the row that predicts each token.
        targets: ``(N,)``: their ids.
    """
    values = torch.empty(len(targets), 3, dtype=torch.float64)
    step = rows_per_walk(model)
    for start in range(0, len(full), step):
        members = ((sources >= start) & (sources < start + step)).nonzero()[:, 0]
        walk = _Walk(model, full[start : start + step], compressed[start : start + step])
        values[members] = walk.over(sources[members] - start, targets[members])
    return values


class _Walk:
    """One walk of two sets of hidden states ``(P, E)`` over the vocabulary.

    KL(full || compressed) is the mean of ``full - compressed`` under the full side's probabilities, with logits in
    place of log-probabilities, less the difference of the logarithms of their sums.
    """

    def __init__(self, model: PressableModel, full: torch.Tensor, compressed: torch.Tensor) -> None:
        self._model, device, dtype = model, model.head_device, logit_dtype(full)
        self._sides = [_Side(hidden.to(device), device, dtype) for hidden in (full, compressed)]
        self._weighted = torch.zeros(len(full), device=device, dtype=dtype)

    def over(self, sources: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """KL, agreement and change of the log-probability of each token, ``(N, 3)`` on the CPU."""
        full, compressed = self._sides
        device = full.hidden.device
        sources, targets = sources.to(device), targets.to(device)
        wanted = torch.zeros(len(targets), device=device, dtype=torch.float64)  # compressed less full
        for start, end in column_ranges(self._model, 2 * len(full.hidden)):
            logits = [self._model.logits(side.hidden, start, end) for side in self._sides]
            inside = ((targets >= start) & (targets < end)).nonzero()[:, 0]
            rows, columns = sources[inside], targets[inside] - start
            wanted[inside] = logits[1][rows, columns].double() - logits[0][rows, columns].double()
            self._add_tile(logits[0], logits[1], start)
        log_sums = full.softmax.log_sums() - compressed.softmax.log_sums()  # (P,)
        kl = (self._weighted / full.softmax.total).double() - log_sums
        agrees = (full.best == compressed.best).double()
        return torch.stack([kl[sources], agrees[sources], wanted + log_sums[sources]], dim=-1).cpu()

    def _add_tile(self, full: torch.Tensor, compressed: torch.Tensor, start: int) -> None:
        """Add the logits ``(P, C)`` of some columns, which are overwritten."""
        change = torch.sub(full, compressed)
        change.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=0.0)  # what the full side holds impossible has no weight
        factor = self._sides[0].add(full, start)
        self._sides[1].add(compressed, start)
        self._weighted = self._weighted * factor + full.mul_(change).sum(dim=-1)


class _Side:
    """One set of hidden states, the sums over its logits so far, and the most likely tokens so far."""

    def __init__(self, hidden: torch.Tensor, device: torch.device, dtype: torch.dtype) -> None:
        self.hidden, self.softmax = hidden, RunningSoftmax(len(hidden), device, dtype)
        self.best = torch.zeros(len(hidden), dtype=torch.long, device=device)

    def add(self, logits: torch.Tensor, start: int) -> torch.Tensor:
        """Add logits, which become their exponentials; of equal maxima the first is the most likely, as in argmax."""
        highest, columns = logits.max(dim=-1)
        self.best = torch.where(highest > self.softmax.highest, columns + start, self.best)
        return self.softmax.add(logits, highest)
