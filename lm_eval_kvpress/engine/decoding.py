"""Generate from a ragged batch of compressed caches, one forward per token. Token ids in, token ids out.

Does not know text, lm-eval or presses.

Letters in shape comments: B rows, N tokens of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch

from lm_eval_kvpress.cache.compressed import CompressedCache
from lm_eval_kvpress.engine.cuda_graph import Recorder, Repeated, StaticStep
from lm_eval_kvpress.engine.decode_budget import BudgetKeeper
from lm_eval_kvpress.engine.decode_packing import EntryPacker, Keeper
from lm_eval_kvpress.engine.decode_state import DecodeState
from lm_eval_kvpress.engine.prefill import prefill_hidden
from lm_eval_kvpress.engine.sampling import Sampler
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.models.pressable import PressableModel, masked


class LogitsNotFiniteError(UsageError):
    """A token was chosen from logits of which the largest is not finite, which would be no choice.

    Attributes:
        row: of the batch.
        num_tokens: its new tokens before that one.
    """

    def __init__(self, row: int, num_tokens: int) -> None:
        super().__init__(f"row {row} has logits that are not finite after {num_tokens} new tokens")
        self.row, self.num_tokens = row, num_tokens


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
    """Generate for each row from its compressed cache, one forward per token for the whole ragged batch.

    Args:
        contexts: the full context of each row, with its compressed part, which some logits processors look at.
        num_held_back: how many of a context's last tokens were held back; zero for all rows or for none.
        stop_ids: tokens that end a row; they are part of the result.
        stopped: says from the new tokens so far, ``(B, n)``, which rows are complete for other reasons.
        on_token: called when the tokens of a step have reached the host.
        record: captures a step, to be replayed, where the sampler allows it; None runs each step.
        keeper: compresses the growing cache; steps are not captured then.

    Returns:
        the new tokens of each row, up to and including the one that ended it.

    Raises:
        LogitsNotFiniteError: once all rows have ended, if one has a token that was chosen from such logits.
    """
    assert max(num_held_back) == 0 or min(num_held_back) > 0, (
        f"some rows hold back nothing, others do: {list(num_held_back)}"
    )
    steps = _Steps(model, cache, contexts, num_held_back, max_new_tokens, sampler, record, keeper)
    ends = _Ends(len(contexts), max_new_tokens, stop_ids, stopped, on_token)
    arrivals = Arrivals(max_new_tokens, len(contexts), model.device)
    with steps.watching():
        for step in range(max_new_tokens):
            arrivals.send(steps.choose(step))
            if ends.see(arrivals.take(wait=step == 0)):  # the first token's time is one of the figures
                break
        ends.see(arrivals.take(wait=True))
    rows = ends.cut(arrivals.take(wait=True))
    steps.check([len(row) for row in rows])
    return rows


class _Steps:
    """Chooses the tokens of a batch, one per row and step; the arguments are those of `decode`."""

    def __init__(
        self,
        model: PressableModel,
        cache: CompressedCache,
        contexts: Sequence[Sequence[int]],
        num_held_back: Sequence[int],
        max_new_tokens: int,
        sampler: Sampler,
        record: Recorder | None,
        keeper: BudgetKeeper | None,
    ) -> None:
        self._model, self._cache, self._contexts, self._num_held_back = model, cache, contexts, num_held_back
        self._max_new_tokens, self._sampler = max_new_tokens, sampler.on(model.device)
        self._keeper: Keeper | None = keeper or EntryPacker.of(cache)
        self._record = record if self._keeper is None and sampler.is_repeatable else None
        self._make_step = model.fast.step_maker() if self._record else None  # before the masks' hooks
        self._state = DecodeState(model, cache, num_held_back, self._num_fed_before_rebuilt(0))
        self._num_prompt, self._ids = max(map(len, contexts)), _ids(contexts, max_new_tokens).to(model.device)
        self._highest = torch.zeros(len(contexts), max_new_tokens, device=model.device)  # logit, per row and step
        self._repeated: Repeated | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The context in which tokens are chosen: attention reads this batch's masks."""
        with (
            masked(self._model.attentions, self._state.biases),
            nullcontext() if self._keeper is None else self._keeper.watching(),
        ):
            yield

    def choose(self, step: int) -> torch.Tensor:
        """The tokens of a step, ``(B,)``; steps are counted from 0 and called in order."""
        if step == 0:
            self._write(self._first_hidden(), 0)
            if self._record:
                column = self._num_prompt
                static = StaticStep(
                    self._state, self._sampler, self._ids, column, 1, self._make_step, highest=self._highest
                )
                self._repeated = Repeated(static, self._record)
        elif self._repeated:
            self._repeated()
        else:
            self._compress_if_due(step)
            self._write(self._state.feed(self._chosen(step - 1)), step)
        return self._chosen(step)

    def _first_hidden(self) -> torch.Tensor:
        """The hidden state that predicts the first token: of the held-back tokens, or else of the prefill."""
        if not max(self._num_held_back):
            return prefill_hidden(self._cache)
        pairs = zip(self._contexts, self._num_held_back, strict=True)
        return self._state.feed_held_back([list(context[len(context) - held :]) for context, held in pairs])

    def _compress_if_due(self, step: int) -> None:
        num_forwards = step - (max(self._num_held_back) == 0)
        if self._keeper is not None and self._keeper.is_due(num_forwards, step):
            compressed = self._keeper.compress(self._state.as_cache())
            self._state = self._state.with_cache(compressed, self._num_fed_before_rebuilt(step))

    def _num_fed_before_rebuilt(self, step: int) -> int:
        """Tokens for which the state needs room, from this step on."""
        rest = self._max_new_tokens - step
        return rest if self._keeper is None else min(rest, self._keeper.most_fed)

    def _write(self, hidden: torch.Tensor, step: int) -> None:
        logits = self._model.logits(hidden).to(self._ids.device)
        self._highest[:, step] = logits.amax(dim=-1)
        self._ids[:, self._num_prompt + step] = self._sampler.choose(self._ids, logits, step)

    def check(self, lengths: Sequence[int]) -> None:
        """Refuse rows, of so many new tokens each, that hold one chosen from logits that are not finite.

        The largest logit shows NaN and infinity alike, before anything is done to the logits. Looked at once at the
        end, it makes no step wait for the device.
        """
        for row, step in (~self._highest.isfinite()).nonzero().tolist():
            if step < lengths[row]:
                raise LogitsNotFiniteError(row, step)

    def _chosen(self, step: int) -> torch.Tensor:
        return self._ids[:, self._num_prompt + step]


class Arrivals:
    """Chosen tokens on their way to the host.

    On a GPU each step's copy is queued behind it and read while the next step runs, so that neither waits for the
    other; tokens of a step beyond a row's end are cut off. Elsewhere tokens are there at once.
    """

    def __init__(self, num_tokens: int, num_rows: int, device: torch.device) -> None:
        self._lags = device.type == "cuda"
        self._tokens = torch.empty(num_tokens, num_rows, dtype=torch.long, pin_memory=self._lags)
        self._events: list[torch.cuda.Event] = []
        self._num_sent = 0

    def send(self, tokens: torch.Tensor) -> None:
        """Send one token per row, ``(B,)``."""
        self._tokens[self._num_sent].copy_(tokens, non_blocking=self._lags)
        self._num_sent += 1
        if self._lags:
            self._events.append(torch.cuda.Event())
            self._events[-1].record()

    def take(self, *, wait: bool = False) -> torch.Tensor:
        """The tokens that have arrived, ``(n, B)``: all but the newest step, or all of them after waiting."""
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
        """Look at the new steps of ``(n, B)`` tokens; return whether all rows have ended."""
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
    """Contexts, padded on the left, with columns for new tokens behind them, ``(B, N)``. Empty places hold the row's
    own first token, so that a repetition penalty sees no token that is not in the row."""
    width = max(map(len, contexts))
    rows = [[row[0]] * (width - len(row)) + list(row) + [row[0]] * num_new for row in contexts]
    return torch.tensor(rows)
