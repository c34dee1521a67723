"""Generates from a ragged batch of compressed caches, one forward per token. Token ids in, token ids out.

Does not know text, lm-eval or presses.

Letters in shape comments: B rows, N tokens of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch

from lm_eval_kvpress.cache.compressed import CompressedCache
from lm_eval_kvpress.engine.cuda_graph import Recorder, Repeated, StaticStep
from lm_eval_kvpress.engine.decode_budget import BudgetKeeper
from lm_eval_kvpress.engine.decode_state import DecodeState
from lm_eval_kvpress.engine.prefill import prefill_hidden
from lm_eval_kvpress.engine.sampling import Sampler
from lm_eval_kvpress.models.pressable import PressableModel, masked


@torch.inference_mode()
def decode(
    model: PressableModel,
    cache: CompressedCache,
    contexts: Sequence[Sequence[int]],
    *,
    num_held_back: Sequence[int],
    max_new_tokens: int,
    sampler: Sampler,
    stop_ids: frozenset[int],
    stopped: Callable[[torch.Tensor], Sequence[bool]],
    on_token: Callable[[], None] = lambda: None,
    record: Recorder | None = None,
    keeper: BudgetKeeper | None = None,
) -> list[list[int]]:
    """Generates for each row from its compressed cache, one forward per token for the whole ragged batch.

    Args:
        contexts: the full context of each row, compressed part included (for processors that look at it).
        num_held_back: how many of a context's last tokens were held back; all rows or none may have zero.
        stop_ids: tokens that end a row; they are part of the result.
        stopped: told the new tokens so far, ``(B, n)``, says which rows are complete for other reasons.
        on_token: called when the tokens of a step have reached the host.
        record: how steps are recorded and repeated; None for the growing cache.
        keeper: compresses the growing cache as it is due; steps are not recorded then.

    Returns:
        the new tokens of each row, up to and including the one that ended it.
    """
    assert max(num_held_back) == 0 or min(num_held_back) > 0, (
        f"some rows hold back nothing, others do: {list(num_held_back)}"
    )
    prompt, ids = max(map(len, contexts)), _ids(contexts, max_new_tokens).to(model.device)
    sampler, record = sampler.on(model.device), record if keeper is None else None
    make_step = model.fast.step_maker() if record else None  # before the masks' hooks
    steps = DecodeState(model, cache, num_held_back, max_new_tokens)
    ends = _Ends(len(contexts), max_new_tokens, stop_ids, stopped, on_token)
    arrivals = Arrivals(max_new_tokens, len(contexts), model.device)

    def choose(hidden: torch.Tensor, step: int) -> None:
        ids[:, prompt + step] = sampler.choose(ids, model.logits(hidden).to(ids.device), step)

    with masked(model.attentions, steps.biases), nullcontext() if keeper is None else keeper.watching():
        queries = [list(context[len(context) - held :]) for context, held in zip(contexts, num_held_back, strict=True)]
        choose(steps.first(queries) if max(num_held_back) else prefill_hidden(cache), 0)
        repeated = record and Repeated(StaticStep(steps, sampler, ids, prompt, 1, make_step), record)
        for step in range(max_new_tokens):
            if step and repeated:
                repeated()
            elif step:
                if keeper is not None and keeper.is_due(step - (max(num_held_back) == 0), step):
                    steps = steps.over(keeper.compress(steps.standing()), max_new_tokens - step)
                choose(steps.next(ids[:, prompt + step - 1]), step)
            arrivals.send(ids[:, prompt + step])
            if ends.see(arrivals.take(wait=step == 0)):  # the first token's time is one of the figures
                break
        ends.see(arrivals.take(wait=True))
    return ends.cut(arrivals.take(wait=True))


class Arrivals:
    """Chosen tokens on their way to the host.

    On a GPU each step's copy is queued behind it and looked at while the next step runs, so that neither waits for the
    other; what a step beyond a row's end makes is cut off. Elsewhere tokens are there at once.
    """

    def __init__(self, num_tokens: int, num_rows: int, device: torch.device) -> None:
        self._lags = device.type == "cuda"
        self._tokens = torch.empty(num_tokens, num_rows, dtype=torch.long, pin_memory=self._lags)
        self._events: list[torch.cuda.Event] = []
        self._num_sent = 0

    def send(self, tokens: torch.Tensor) -> None:
        """Sends one token per row, ``(B,)``."""
        self._tokens[self._num_sent].copy_(tokens, non_blocking=self._lags)
        self._num_sent += 1
        if self._lags:
            self._events.append(torch.cuda.Event())
            self._events[-1].record()

    def take(self, *, wait: bool = False) -> torch.Tensor:
        """What has come, ``(n, B)``: all but the newest step, or all of it after waiting."""
        num_here = self._num_sent - (self._lags and not wait)
        if self._lags and num_here:
            self._events[num_here - 1].synchronize()
        return self._tokens[:num_here]


class _Ends:
    """Where each row ends."""

    def __init__(
        self,
        num_rows: int,
        max_new_tokens: int,
        stop_ids: frozenset[int],
        stopped: Callable[[torch.Tensor], Sequence[bool]],
        on_token: Callable[[], None],
    ) -> None:
        self._stop_ids, self._stopped, self._on_token = stop_ids, stopped, on_token
        self._lengths, self._open = [max_new_tokens] * num_rows, set(range(num_rows))
        self._num_seen = 0

    def see(self, tokens: torch.Tensor) -> bool:
        """Looks at the steps of ``(n, B)`` that are new; whether all rows have ended."""
        while self._open and self._num_seen < len(tokens):
            self._num_seen += 1
            newest = tokens[self._num_seen - 1].tolist()
            self._on_token()
            stopped = self._stopped(tokens[: self._num_seen].T)
            for row in [row for row in self._open if newest[row] in self._stop_ids or stopped[row]]:
                self._lengths[row] = self._num_seen
                self._open.remove(row)
        return not self._open

    def cut(self, tokens: torch.Tensor) -> list[list[int]]:
        """Each row up to its end."""
        return [row[:length] for row, length in zip(tokens.T.tolist(), self._lengths, strict=True)]


def _ids(contexts: Sequence[Sequence[int]], num_new: int) -> torch.Tensor:
    """Contexts, right-aligned in ``(B, N)``, and places for new tokens behind them. What is empty holds the row's own
    first token, so that a repetition penalty sees no token that is not in the row."""
    width = max(map(len, contexts))
    rows = [[row[0]] * (width - len(row)) + list(row) + [row[0]] * num_new for row in contexts]
    return torch.tensor(rows)
