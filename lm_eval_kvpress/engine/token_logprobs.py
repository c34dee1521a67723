"""Log-probabilities of tokens from hidden states, without ever holding ``[tokens, vocabulary]``.

Logits are computed in tiles, some positions by some columns of the vocabulary (`online_softmax`). Whole rows would cost
twice as much on a CPU: products of a few rows with the whole output layer are slow, and their logits go to memory and
back.

Knows hidden states and the model's output layer. Does not know text, caches or presses.

Letters in shape comments: P predicting positions, E hidden size, V vocabulary, C columns of a tile, N scored tokens.
"""

from __future__ import annotations

import torch

from lm_eval_kvpress.engine.online_softmax import RunningSoftmax, column_ranges, rows_per_walk
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.models.pressable import PressableModel, logit_dtype


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
    logprobs = torch.empty(len(targets), dtype=logit_dtype(hidden))
    greedy = torch.empty(len(targets), dtype=torch.bool)
    step = rows_per_walk(model)
    for start in range(0, len(hidden), step):
        members = ((sources >= start) & (sources < start + step)).nonzero()[:, 0]
        rows = _Rows(model, hidden[start : start + step], sources[members] - start, targets[members])
        logprobs[members], greedy[members] = rows.scores()
    return logprobs, greedy


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
        self._dtype = logit_dtype(hidden)
        self._softmax = RunningSoftmax(len(hidden), device, self._dtype)
        self._wanted = torch.empty(len(targets), device=device, dtype=self._dtype)
        self._greedy = torch.empty(len(targets), dtype=torch.bool, device=device)

    def scores(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities, and whether each token is greedy, ``(N,)`` each, on the CPU."""
        for start, end in column_ranges(self._model, len(self._hidden)):
            self._add_tile(self._model.logits(self._hidden, start, end), start, end)
        logprobs = (self._wanted - self._softmax.log_sums()[self._sources]).to(self._dtype)
        return logprobs.cpu(), (self._greedy & (self._wanted == self._softmax.highest[self._sources])).cpu()

    def _add_tile(self, logits: torch.Tensor, start: int, end: int) -> None:
        """Add the logits ``(P, C)`` of some columns, which are overwritten."""
        highest = logits.amax(dim=-1)
        first, last = torch.searchsorted(self._sorted, torch.tensor([start, end])).tolist()
        if first < last:
            self._look_up(logits, highest, self._order[first:last], start)
        self._softmax.add(logits, highest)

    def _look_up(self, logits: torch.Tensor, highest: torch.Tensor, members: torch.Tensor, start: int) -> None:
        """Take the logits of the tokens in these columns. Of equal maxima (common in 16 bit) the first is greedy, as in
        argmax."""
        rows, columns = self._sources[members], self._targets[members] - start
        wanted = logits[rows, columns]
        greedy = (wanted == highest[rows]) & (wanted > self._softmax.highest[rows])
        ties = greedy.nonzero()[:, 0]  # argmax is slow: on these rows only
        greedy[ties] = logits[rows[ties]].argmax(dim=-1) == columns[ties]
        self._wanted[members], self._greedy[members] = wanted, greedy
