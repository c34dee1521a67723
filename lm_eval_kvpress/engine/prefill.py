"""Run contexts through the model under a press, and take what it kept as a `CompressedCache`.

Token ids in, caches out. Knows how presses hook a model and what they leave behind. Does not know text, lm-eval or any
press by name.

Letters in shape comments: B rows, T prefilled tokens, H key-value heads, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from lm_eval_kvpress.cache.compressed import CompressedCache, LayerKV, join
from lm_eval_kvpress.models.lend import lend
from lm_eval_kvpress.models.pressable import PressableModel


class Press(Protocol):
    """A kvpress press, as far as the engine needs it: a context in which its hooks compress what is prefilled."""

    def __call__(self, model: PreTrainedModel) -> AbstractContextManager[Any]: ...


@torch.inference_mode()
def prefill(
    model: PressableModel,
    tokens: torch.Tensor,
    press: Press | None,
    *,
    rerotates: bool = False,
    for_cache_only: bool = False,
    reads_outputs: bool = True,
) -> CompressedCache:
    """Run contexts of equal length through the model under a press.

    Args:
        tokens: ``(B, T)``, T >= 1; without padding, since no press knows about padding.
        press: a press built for this length, or None.
        rerotates: whether the press moves its keys to positions ``0..kept-1``.
        for_cache_only: leave out what no cache entry depends on; ``last_hidden`` is None then.
        reads_outputs: whether the press may look at what an attention returns, beyond the cache and its input. Under
            eager attention this is assumed: it returns weights, and presses use them where they are given.
    """
    tokens, has_weights = tokens.to(model.device), model.model.config._attn_implementation == "eager"
    reads_outputs = press is not None and (reads_outputs or has_weights)
    with without_marks(model.attentions):
        with model.presented(), press(model.model) if press is not None else nullcontext():
            cache, hidden = run_prefill(model, tokens, for_cache_only=for_cache_only, reads_outputs=reads_outputs)
        last_hidden = None if hidden is None else hidden[:, -1].clone()
        return compressed_cache(model, cache, tokens.shape, last_hidden, rerotates=rerotates)


@torch.inference_mode()
def prefill_padded(
    model: PressableModel,
    contexts: Sequence[Sequence[int]],
    *,
    side_by_side: Sequence[Sequence[int]] | None = None,
    for_cache_only: bool = False,
) -> CompressedCache:
    """Run contexts of any lengths through the model, without a press.

    The padding of a forward stands on the right, where causal attention never sees it, and is hidden in the cache.

    Args:
        side_by_side: the rows of each forward, in order; all rows in one forward by default.
        for_cache_only: as for `prefill`.
    """
    groups = side_by_side or [range(len(contexts))]
    return join([_prefill_padded(model, [contexts[row] for row in group], for_cache_only) for group in groups])


def _prefill_padded(model: PressableModel, contexts: Sequence[Sequence[int]], for_cache_only: bool) -> CompressedCache:
    lengths = tuple(len(context) for context in contexts)
    tokens = _right_padded(contexts).to(model.device)
    cache, hidden = run_prefill(model, tokens, for_cache_only=for_cache_only, reads_outputs=False)
    padding = None
    if min(lengths) != max(lengths):
        padding = (torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None])[:, None].to(model.device)  # (B, 1, T)
    layers = tuple(
        LayerKV(layer.keys, layer.values, None if padding is None else padding.to(layer.keys.device))
        for layer in cache.layers
    )
    last_hidden = None if hidden is None else hidden[torch.arange(len(lengths)), [length - 1 for length in lengths]]
    return CompressedCache(layers, lengths, lengths, last_hidden)


def _right_padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


def prefill_hidden(cache: CompressedCache) -> torch.Tensor:
    """The hidden state after the last prefilled token, ``(B, E)``: it predicts the first token, from the full cache."""
    assert cache.last_hidden is not None, "nothing was prefilled and nothing held back: no token predicts the first"
    return cache.last_hidden


# ------------------------------------------------------------------------------------------------ one forward


def run_prefill(
    model: PressableModel, tokens: torch.Tensor, *, for_cache_only: bool, reads_outputs: bool
) -> tuple[Cache, torch.Tensor | None]:
    """Fill a new cache; with it come the hidden states ``(B, T, E)``, or None for the cache only.

    What follows the last layer's keys and values makes hidden states and no cache entry, which is a share of the time
    in a model of few layers. So for the cache only, the forward ends once the hooks of the last attention have run,
    with nothing for its output; or, where hooks read that output, the last feed-forward hands its input on.
    """
    cache = DynamicCache()
    cache.layers[:] = [DynamicLayer() for _ in model.attentions]
    if not for_cache_only:
        return cache, model.hidden_states(tokens, past_key_values=cache, use_cache=True)
    if reads_outputs:
        with lend(model.last_feed_forward, forward=lambda hidden: hidden):
            model.hidden_states(tokens, past_key_values=cache, use_cache=True)
        return cache, None
    last, last_layer = model.attentions[-1], cache.layers[-1]
    with (
        model.fast.forwards(),  # first: it leaves a forward alone that was replaced before
        lend(last, forward=_end_after_filling(last.forward)),
        lend(last_layer, update=_fill_and_end(last_layer.update)),
        last.register_forward_hook(_end),
        suppress(_Filled),
    ):
        model.hidden_states(tokens, past_key_values=cache, use_cache=True)
    return cache, None


class _Filled(Exception):
    """The last layer's keys and values are cached."""


def _fill_and_end(update: Callable[..., Any]) -> Callable[..., None]:
    """A cache layer's update that ends the attention it was called from."""

    def fill(*args: Any, **kwargs: Any) -> None:
        update(*args, **kwargs)
        raise _Filled

    return fill


def _end_after_filling(attend: Callable[..., Any]) -> Callable[..., tuple[None, None]]:
    """An attention's forward that is ended by its cache layer and returns nothing."""

    def fill(*args: Any, **kwargs: Any) -> tuple[None, None]:
        with suppress(_Filled):
            attend(*args, **kwargs)
        return None, None

    return fill


def _end(*_: Any) -> None:
    """A hook that ends the forward; it is registered last and so runs after those of a press."""
    raise _Filled


# ------------------------------------------------------------------------------------------------ what is left


def compressed_cache(
    model: PressableModel, cache: Cache, shape: Sequence[int], last_hidden: torch.Tensor | None, *, rerotates: bool
) -> CompressedCache:
    """What a press kept of ``(B, T)`` tokens: shortened layers, or marks on the modules where it only masks.

    Entries are of their own storage: a press that replays the context may leave them as a part of one that holds the
    replay as well, for as long as the cache lives. Layers are copied in turn, so that no more than one is there twice.
    """
    for layer in cache.layers:
        layer.keys, layer.values = _of_its_own(layer.keys), _of_its_own(layer.values)
    layers = tuple(
        LayerKV(layer.keys, layer.values, _evicted_by_mask(attention, layer.keys))
        for attention, layer in zip(model.attentions, cache.layers, strict=True)
    )
    batch, length = shape
    next_position = max(layer.num_entries for layer in layers) if rerotates else length
    return CompressedCache(layers, (length,) * batch, (next_position,) * batch, last_hidden)


def _of_its_own(entries: torch.Tensor) -> torch.Tensor:
    """The entries, copied if their storage holds more than they."""
    return entries if entries.untyped_storage().nbytes() == entries.nbytes else entries.clone()


@contextmanager
def without_marks(attentions: Sequence[nn.Module]) -> Iterator[None]:
    """Begin without marks of a masking press on the modules, and take those it makes off at the end.

    kvpress would fake the marked keys in the next forward over any cache.
    """
    with ExitStack() as marks:
        for attention in attentions:
            marks.enter_context(lend(attention, masked_key_indices=None))
        yield


def _evicted_by_mask(attention: nn.Module, keys: torch.Tensor) -> torch.Tensor | None:
    """The entries that a head-wise press evicted by masking, ``(B, H, T)``.

    kvpress would overwrite these keys with fake ones at the next forward; here they become part of the layer's own
    mask, which is exact for any number of queries.
    """
    evicted = getattr(attention, "masked_key_indices", None)
    if evicted is None:
        return None
    hidden = torch.zeros(keys.shape[:3], dtype=torch.bool, device=keys.device)
    hidden[tuple(index.to(keys.device) for index in evicted)] = True
    return hidden
