"""Contexts to caches: which of them run side by side, and whether the press acts on them.

No padding ever enters a press: contexts that it acts on are prefilled in groups of equal length. Those on which it does
not act share one padded prefill. If entries are stored as integers, each group is packed once the press has acted on
it, before it gets neighbours of other lengths.

Knows a `PressSpec`, `prefill` and the prefills that presses share. Does not know how groups become a batch, or text.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from lm_eval_kvpress.cache.compressed import CompressedCache, LayerKV
from lm_eval_kvpress.cache.packed import pack
from lm_eval_kvpress.cache.quantized import Quantization
from lm_eval_kvpress.engine.batching import in_batches
from lm_eval_kvpress.engine.contexts import Context
from lm_eval_kvpress.engine.footprint import PACKED_FORWARD_TOKENS
from lm_eval_kvpress.engine.prefill import prefill, prefill_padded
from lm_eval_kvpress.engine.shared_prefill import SharedPrefills
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.spec import PressSpec
from lm_eval_kvpress.records.clock import Clock

Tokens = tuple[int, ...]

FORWARD_TOKENS = {"cpu": 2_048}
"""The most tokens that one prefill runs side by side: on a CPU more are no faster, and tensors of more than 32 MiB
begin on pages that the kernel zeroes anew."""


class ShortContextError(UsageError):
    """A context is shorter than the press needs, and the user asked for an error."""


@dataclass(frozen=True, eq=False)
class Group:
    """Contexts that were prefilled together.

    Attributes:
        places: of the contexts among all that were given.
        cache: one row per context.
        press: that was asked for, set to their question.
        pressed: whether it ran.
    """

    places: list[int]
    cache: CompressedCache
    press: PressSpec
    pressed: bool


@dataclass(frozen=True, eq=False)
class GroupedPrefill:
    """Prefills contexts under one press; its attributes are the arguments of `Compressor`."""

    model: PressableModel
    press: PressSpec
    short_context: str
    clock: Clock
    shared: SharedPrefills | None
    quantization: Quantization | None

    def check_lengths(self, contexts: Sequence[Context]) -> None:
        """Under ``short_context=error``, refuse contexts that are too short.

        Raises:
            ShortContextError: naming the first one.
        """
        if self.short_context != "error" or self.press.is_none:
            return
        for context in contexts:
            length, press = len(context.compressed), self._press_for(context)
            if self.press.reads_question and not context.num_question:
                raise ShortContextError(
                    f"a context of {length} prefilled tokens does not end with a question, which press={press.name} "
                    "reads; short_context=keep leaves such contexts uncompressed and counts them"
                )
            if length < press.min_context():
                remedy = (
                    ", short_context=shrink shrinks the press's window" if length >= press.min_context(length) else ""
                )
                raise ShortContextError(
                    f"a context of {length} prefilled tokens is shorter than the {press.min_context()} that "
                    f"press={press.name} needs; short_context=keep leaves such contexts uncompressed and counts "
                    f"them{remedy}"
                )

    def runs_on(self, context: Context) -> bool:
        """Whether the press acts on a context."""
        length, press = len(context.compressed), self._press_for(context)
        if press.is_none or length == 0 or (press.reads_question and not context.num_question):
            return False
        return length >= press.min_context(length if self.short_context == "shrink" else None)

    def groups(self, contexts: Sequence[Context], *, for_cache_only: bool) -> Iterator[Group]:
        """Prefill the compressed part of each context, and pack what is stored as integers.

        Args:
            for_cache_only: whether no token is predicted by the prefill, so that its hidden states are not needed.

        Yields:
            every context once, in any order.
        """
        for places, cache, pressed in self._prefilled(contexts, for_cache_only):
            press = self._press_for(contexts[places[0]])
            if self.quantization is None:
                yield Group(places, cache, press, pressed)
            elif pressed:
                yield Group(places, pack(cache, self.quantization), press, pressed)
            else:  # of one length each, so that no padding is packed
                for rows in _alike(range(len(places)), [contexts[place] for place in places]):
                    part = _without_padding(cache.select(rows))
                    yield Group([places[row] for row in rows], pack(part, self.quantization), press, pressed)

    def _press_for(self, context: Context) -> PressSpec:
        return self.press.for_question(context.num_question)

    def _prefilled(
        self, contexts: Sequence[Context], for_cache_only: bool
    ) -> Iterator[tuple[list[int], CompressedCache, bool]]:
        """Rows that can be prefilled together, their cache, and whether the press ran."""
        prefixes = [context.compressed for context in contexts]
        pressed = [row for row, context in enumerate(contexts) if self.runs_on(context)]
        empty = [row for row, prefix in enumerate(prefixes) if not prefix]
        plain = [row for row in range(len(prefixes)) if row not in pressed and row not in empty]
        if empty:
            yield empty, self.model.empty_cache(len(empty)), False
        if self.shared is not None:
            for rows in _alike(plain, contexts):
                yield rows, self.shared.compress([prefixes[row] for row in rows], None), False
        elif plain and self.quantization is None:
            yield plain, self._prefill_plain([prefixes[row] for row in plain], for_cache_only), False
        else:  # packed before the next ones are prefilled
            for rows in self._side_by_side(plain, prefixes):
                yield rows, self._prefill_plain([prefixes[row] for row in rows], for_cache_only), False
        for rows in _alike(pressed, contexts):
            press = self._press_for(contexts[rows[0]])
            for group in self._side_by_side(rows, prefixes) if press.batches else [[row] for row in rows]:
                yield group, self._prefill([prefixes[row] for row in group], press, for_cache_only), True

    def _side_by_side(self, rows: Sequence[int], prefixes: Sequence[Tokens]) -> Iterator[list[int]]:
        """The rows, in order, as many at a time as one forward takes; clones of shared prefills need no forward."""
        limit = FORWARD_TOKENS.get(self.model.device.type) if self.shared is None else None
        if self.quantization is not None:
            limit = min(limit or PACKED_FORWARD_TOKENS, PACKED_FORWARD_TOKENS)
        return in_batches(rows, len(rows), lambda row: len(prefixes[row]), limit)

    def _prefill_plain(self, prefixes: Sequence[Tokens], for_cache_only: bool) -> CompressedCache:
        groups = list(self._side_by_side(range(len(prefixes)), prefixes))
        return prefill_padded(self.model, prefixes, side_by_side=groups, for_cache_only=for_cache_only)

    def _prefill(self, prefixes: Sequence[Tokens], spec: PressSpec, for_cache_only: bool) -> CompressedCache:
        """Prefill prefixes of one length under the press."""
        length = len(prefixes[0])
        press = spec.build(length, shrink=length < spec.min_context())
        if press is not None:  # kvpress registers what the instance has; a replay runs its own hooks
            step: Any = "replay" if hasattr(press, "replay") else "forward_hook"
            setattr(press, step, self.clock.timed(getattr(press, step)))
        with nullcontext() if spec.batches else _seeded_by(prefixes[0]):
            if self.shared is not None:
                return self.shared.compress(prefixes, press, rerotates=spec.rerotates)
            return prefill(
                self.model,
                torch.tensor(prefixes),
                press,
                rerotates=spec.rerotates,
                for_cache_only=for_cache_only,
                reads_outputs=spec.reads_outputs,
            )


def _without_padding(cache: CompressedCache) -> CompressedCache:
    """Contexts of one length on which no press ran, as `prefill_padded` leaves them."""
    (length,) = set(cache.num_seen)
    layers = (LayerKV(layer.keys[:, :, :length], layer.values[:, :, :length]) for layer in cache.layers)
    return replace(cache, layers=tuple(layers))


def _alike(rows: Sequence[int], contexts: Sequence[Context]) -> Iterator[list[int]]:
    """Rows whose contexts have one length, and questions of one length where a press reads them."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row in rows:
        groups[len(contexts[row].compressed), contexts[row].num_question].append(row)
    yield from groups.values()


@contextmanager
def _seeded_by(context: Tokens) -> Iterator[None]:
    """A context in which a press draws the same random numbers for the same tokens, in any order or batch."""
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices):
        torch.manual_seed(zlib.crc32(repr((torch.initial_seed(), context)).encode()))
        yield
