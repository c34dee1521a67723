"""Log-probabilities of tokens from hidden states, without ever holding ``[tokens, vocabulary]``.

Logits are computed in tiles, some positions by some columns of the vocabulary, and each tile is added to a running
maximum and sum while the processor's cache still holds it (the online softmax of Milakov and Gimelshein, 2018,
arXiv:1805.02867, over the vocabulary). Whole rows would cost twice as much on a CPU: products of a few rows with the
whole output layer are slow, and their logits go to memory and back.

Knows hidden states and the model's output layer. Does not know text, caches or presses.

Letters in shape comments: P predicting positions, E hidden size, V vocabulary, C columns of a tile, N scored tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.models.pressable import PressableModel

TILE_ROWS = 2_048
TILE_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}
"""Bytes of fp32 logits at a time: on a CPU what its caches hold, on a GPU enough work for one launch."""
LOG2_E = torch.tensor(math.log2(math.e), dtype=torch.float32).item()
"""Rounded to fp32 as in the sums: multiplied and then divided by it, a large logit is what it was."""
ALIGNMENT = 16
"""Columns of a tile are a multiple of this: MKL's product with 1,007 columns takes 1.4 times as long as with 1,008."""


@torch.inference_mode()
def token_scores(
    model: PressableModel, hidden: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score tokens, each from the hidden state that predicts it.

    Args:
        hidden: ``(P, E)``, last hidden states.
        sources: ``(N,)``, on the CPU: the row of ``hidden`` that predicts each token; a row may predict several.
        targets: ``(N,)``, on the CPU: the ids of the tokens.

    Returns:
        the log-probability of each token in nats, ``(N,)``, and whether ``argmax`` would choose it, ``(N,)``, both on
        the CPU.

    Raises:
        UsageError: if the output layer has no logit for a token.
    """
    if len(targets) and (highest := int(targets.max())) >= model.num_logits:
        raise UsageError(
            f"token id {highest} is beyond the {model.num_logits} logits of the model: the tokenizer has tokens that "
            "the checkpoint does not know; use the one that belongs to it"
        )
    logprobs = torch.empty(len(targets))
    greedy = torch.empty(len(targets), dtype=torch.bool)
    step = TILE_ROWS if model.head_can_be_cut else rows_at_once(model)
    for start in range(0, len(hidden), step):
        members = ((sources >= start) & (sources < start + step)).nonzero()[:, 0]
        rows = _Rows(model, hidden[start : start + step], sources[members] - start, targets[members])
        logprobs[members], greedy[members] = rows.scores()
    return logprobs, greedy


def rows_at_once(model: PressableModel) -> int:
    """Positions whose whole rows of logits are one tile; at least 1."""
    return max(1, _budget(model) // (4 * model.num_logits))


def _budget(model: PressableModel) -> int:
    return TILE_BYTES.get(model.head_device.type, TILE_BYTES["cuda"])


def _shift(highest: torch.Tensor) -> torch.Tensor:
    """The shift of a row's logits in base 2; a CPU computes powers of two in half the time of powers of e."""
    return highest * LOG2_E


class _Rows:
    """Log-softmax of some rows over the whole vocabulary, a tile at a time.

    Args:
        hidden: ``(P, E)``.
        sources, targets: ``(N,)``, on the CPU.
    """

    def __init__(
        self, model: PressableModel, hidden: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor
    ) -> None:
        self._model, device = model, model.head_device
        self._hidden = hidden.to(device)
        self._sorted, order = targets.sort()
        self._order, self._sources, self._targets = (part.to(device) for part in (order, sources, targets))
        self._highest = torch.full((len(hidden),), torch.finfo(torch.float32).min / 2, device=device)
        self._total = torch.zeros(len(hidden), device=device)  # of 2^(logit * log2(e) - shift)
        self._wanted = torch.empty(len(targets), device=device)
        self._greedy = torch.empty(len(targets), dtype=torch.bool, device=device)

    def scores(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities, and whether each token is greedy, ``(N,)`` each, on the CPU."""
        for start, end in self._tiles():
            self._add_tile(self._model.logits(self._hidden, start, end), start, end)
        log_sums = _shift(self._highest).double() / LOG2_E + self._total.log()
        logprobs = (self._wanted - log_sums[self._sources]).float()
        return logprobs.cpu(), (self._greedy & (self._wanted == self._highest[self._sources])).cpu()

    def _tiles(self) -> Iterator[tuple[int, int]]:
        """Ranges of columns of nearly equal width; one range if the output layer cannot be cut."""
        size = self._model.num_logits
        widest = max(1, _budget(self._model) // (4 * len(self._hidden))) if self._model.head_can_be_cut else size
        step = ALIGNMENT if ALIGNMENT <= widest < size else 1
        num_tiles = -(-size // (widest // step * step))
        width = -(-size // (num_tiles * step)) * step
        for start in range(0, size, width):
            yield start, min(start + width, size)

    def _add_tile(self, logits: torch.Tensor, start: int, end: int) -> None:
        """Add the logits ``(P, C)`` of some columns, which are overwritten."""
        highest = logits.amax(dim=-1)
        first, last = torch.searchsorted(self._sorted, torch.tensor([start, end])).tolist()
        if first < last:
            self._look_up(logits, highest, self._order[first:last], start)
        highest = torch.maximum(highest, self._highest)
        shift = _shift(highest)
        self._total *= (_shift(self._highest) - shift).exp2_()
        self._total += torch.add(-shift[:, None], logits, alpha=LOG2_E, out=logits).exp2_().sum(dim=-1)
        self._highest = highest

    def _look_up(self, logits: torch.Tensor, highest: torch.Tensor, members: torch.Tensor, start: int) -> None:
        """Take the logits of the tokens in these columns. Of equal maxima (common in 16 bit) the first is greedy, as in
        argmax."""
        rows, columns = self._sources[members], self._targets[members] - start
        wanted = logits[rows, columns]
        greedy = (wanted == highest[rows]) & (wanted > self._highest[rows])
        ties = greedy.nonzero()[:, 0]  # argmax is slow: on these rows only
        greedy[ties] = logits[rows[ties]].argmax(dim=-1) == columns[ties]
        self._wanted[members], self._greedy[members] = wanted, greedy
