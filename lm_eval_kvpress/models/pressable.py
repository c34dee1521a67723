"""A model that presses can act on: prefill under a press, and forwards with one attention mask per layer.

Knows torch and the shape of a causal language model. Does not know text, lm-eval, or any press by name. `scoring` and
`decoding` build on it; token ids go in, tensors come out.

Two laws hold here, whatever the press:

- **One mask per layer**, made from that layer's own length. A press such as PyramidKV leaves a different length in
  every layer, and transformers builds a single mask from the first (transformers issue 35168).
- **Logical positions.** New tokens go on counting where the context ended, not where the shortened cache ends.

Letters in shape comments: B rows, T prefilled tokens, Q new tokens, H key-value heads, E hidden size, V logits,
N positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from lm_eval_kvpress.cache.compressed import CompressedCache, LayerKV, empty_cache, stack
from lm_eval_kvpress.models.fast.onednn_linear import linear, quick_forwards


class Press(Protocol):
    """What the engine needs of a press: a context manager over a model whose hooks compress during prefill."""

    def __call__(self, model: PreTrainedModel) -> AbstractContextManager[Any]: ...


@dataclass(frozen=True, eq=False)
class PressableModel:
    """A causal language model together with how it is presented to kvpress.

    Attributes:
        model: the model, in evaluation mode.
        attentions: its attention modules in layer order.
        presented: makes the context in which kvpress presses can hook the model.
        quickened: makes a context in which the model's own layers compute the same numbers faster.
        step_maker: what makes decoding steps that stand for the modules, for as long as no hook watches them
            (`trial.StepMaker`); None where there is no such step.
        made_of: what the newest step by modules was made of, for the record.
    """

    model: PreTrainedModel
    attentions: tuple[nn.Module, ...]
    presented: Callable[[], AbstractContextManager[Any]]
    quickened: Callable[[], AbstractContextManager[Any]] = nullcontext
    step_maker: Callable[[], Callable[..., Any] | None] = lambda: None
    made_of: Callable[[], str] = lambda: "modules"

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def num_query_heads(self) -> int:
        return self.model.config.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        return getattr(self.model.config, "num_key_value_heads", None) or self.num_query_heads

    @property
    def head_dim(self) -> int:
        config = self.model.config
        return getattr(config, "head_dim", None) or config.hidden_size // self.num_query_heads

    @property
    def last_feed_forward(self) -> nn.Module:
        """The part of the last layer that comes after, or beside, its attention."""
        return self.model.base_model.layers[-1].mlp

    def empty_cache(self, batch: int) -> CompressedCache:
        """A cache of ``batch`` contexts of which nothing has been prefilled."""
        like = self.model.get_input_embeddings().weight
        return empty_cache(batch, len(self.attentions), self.num_key_value_heads, self.head_dim, like)

    def hidden_states(self, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The last hidden states, ``(B, Q, E)``, without the head."""
        with _without_cudnn_attention(), self.quickened(), quick_forwards(self.linear_layers):
            return self.model.base_model(tokens, **kwargs).last_hidden_state

    @cached_property
    def linear_layers(self) -> tuple[nn.Linear, ...]:
        """The plain ones of the body; quantised layers have classes of their own."""
        return tuple(module for module in self.model.base_model.modules() if type(module) is nn.Linear)

    @property
    def head_device(self) -> torch.device:
        return self.model.get_output_embeddings().weight.device

    @property
    def num_logits(self) -> int:
        """V, what the head makes of a hidden state; a checkpoint may pad it above the tokenizer's vocabulary."""
        return self.model.get_output_embeddings().out_features  # packed weights have another shape

    @property
    def head_can_be_cut(self) -> bool:
        """Whether columns of the logits can be made alone: the head is a plain layer on which nobody has a hook."""
        head = self.model.get_output_embeddings()
        hooks = (head._forward_hooks, head._forward_pre_hooks, head.__dict__.get("forward"))  # accelerate's the last
        return type(head) is nn.Linear and not any(hooks)

    def logits(self, hidden: torch.Tensor, start: int = 0, end: int | None = None) -> torch.Tensor:
        """fp32 logits, ``(N, V)``, of hidden states ``(N, E)``; of some columns, where the head can be cut."""
        head = self.model.get_output_embeddings()
        hidden = hidden.to(head.weight.device)
        if start == 0 and end in (None, self.num_logits):
            with quick_forwards([head] if type(head) is nn.Linear else []):
                return head(hidden).float()
        bias = None if head.bias is None else head.bias[start:end]
        return linear(hidden, head.weight[start:end], bias).float()


@contextmanager
def _without_cudnn_attention() -> Iterator[None]:
    """cuDNN's attention, PyTorch's first choice on Hopper in 16 bit, makes a plan for every new length of a cache."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


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
    """Runs contexts of equal length through the model under a press.

    Args:
        tokens: ``(B, T)``, T >= 1; no padding, since no press knows about padding.
        press: a kvpress press built for this length, or None.
        rerotates: whether the press moves its keys to positions ``0..kept-1``.
        for_cache_only: leaves out what no cache entry depends on; ``last_hidden`` is None then.
        reads_outputs: whether the press may look at what an attention returns, beyond the cache and what went in. Under
            eager attention that is so in any case: it returns weights, and presses use them where they are given.
    """
    tokens, has_weights = tokens.to(model.device), model.model.config._attn_implementation == "eager"
    reads_outputs = press is not None and (reads_outputs or has_weights)
    with marks_taken_off(model.attentions):
        with model.presented(), press(model.model) if press is not None else nullcontext():
            cache, hidden = run_prefill(model, tokens, for_cache_only=for_cache_only, reads_outputs=reads_outputs)
        last_hidden = None if hidden is None else hidden[:, -1].clone()
        return compressed_cache(model, cache, tokens.shape, last_hidden, rerotates=rerotates)


def run_prefill(
    model: PressableModel,
    tokens: torch.Tensor,
    *,
    for_cache_only: bool,
    reads_outputs: bool,
) -> tuple[Cache, torch.Tensor | None]:
    """Fills a new cache; with it the hidden states ``(B, T, E)``, or None for the cache only.

    What comes after the last layer's keys and values makes hidden states and no cache entry: a share of a prefill that
    a model of few layers feels. So for the cache only the forward ends there, once the hooks of the last attention have
    run, with nothing for its output; or, where hooks read that, the last feed-forward hands its input on.
    """
    cache = DynamicCache()
    cache.layers[:] = [DynamicLayer() for _ in model.attentions]
    if not for_cache_only:
        return cache, model.hidden_states(tokens, past_key_values=cache, use_cache=True)
    if reads_outputs:
        with _replaced_forward(model.last_feed_forward, lambda _: lambda hidden: hidden):
            model.hidden_states(tokens, past_key_values=cache, use_cache=True)
        return cache, None
    last = model.attentions[-1]
    with (
        model.quickened(),  # first: a forward that was replaced is left as it is
        _replaced_forward(last, _ended_by_its_cache),
        _ends_attention(cache.layers[-1]),
        last.register_forward_hook(_end),
        suppress(_Filled),
    ):
        model.hidden_states(tokens, past_key_values=cache, use_cache=True)
    return cache, None


@contextmanager
def _replaced_forward(module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Gives a module another forward, made of the one it has."""
    before = module.__dict__.get("forward")  # accelerate's hooks stand there
    module.__dict__["forward"] = make(module.forward)
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before


class _Filled(Exception):
    """The last layer's keys and values are cached."""


@contextmanager
def _ends_attention(layer: DynamicLayer) -> Iterator[None]:
    """Has the layer of a cache end the attention that fills it."""
    update = layer.update

    def fill(*args: Any, **kwargs: Any) -> None:
        update(*args, **kwargs)
        raise _Filled

    layer.__dict__["update"] = fill
    try:
        yield
    finally:
        del layer.__dict__["update"]


def _ended_by_its_cache(attend: Callable[..., Any]) -> Callable[..., tuple[None, None]]:
    def fill(*args: Any, **kwargs: Any) -> tuple[None, None]:
        with suppress(_Filled):
            attend(*args, **kwargs)
        return None, None

    return fill


def _end(*_: Any) -> None:
    """A hook that ends the forward; registered last, it runs after those of a press."""
    raise _Filled


def compressed_cache(
    model: PressableModel,
    cache: Cache,
    shape: Sequence[int],
    last_hidden: torch.Tensor | None,
    *,
    rerotates: bool,
) -> CompressedCache:
    """What a press left of ``(B, T)`` tokens: shortened layers, and marks on the modules where it only masks."""
    layers = tuple(
        LayerKV(layer.keys, layer.values, _evicted_by_mask(attention, layer.keys))
        for attention, layer in zip(model.attentions, cache.layers, strict=True)
    )
    batch, length = shape
    next_position = max(layer.num_entries for layer in layers) if rerotates else length
    return CompressedCache(layers, (length,) * batch, (next_position,) * batch, last_hidden)


@contextmanager
def marks_taken_off(attentions: Sequence[nn.Module]) -> Iterator[None]:
    """Takes a masking press's marks off the modules at the end, also after an exception.

    Left behind, kvpress would fake the marked keys in the next forward over any cache.
    """
    try:
        yield
    finally:
        for attention in attentions:
            attention.__dict__.pop("masked_key_indices", None)


@torch.inference_mode()
def prefill_padded(
    model: PressableModel,
    contexts: Sequence[Sequence[int]],
    *,
    side_by_side: Sequence[Sequence[int]] | None = None,
    for_cache_only: bool = False,
) -> CompressedCache:
    """Runs contexts of any lengths through the model, without a press.

    The padding of a forward stands on the right, where causal attention never sees it, and is hidden in the cache.

    Args:
        side_by_side: rows that share a forward, in order; all by default.
        for_cache_only: as for `prefill`.
    """
    groups = side_by_side or [range(len(contexts))]
    return stack(
        [_prefill_padded(model, [contexts[row] for row in group], for_cache_only=for_cache_only) for group in groups]
    )


def _prefill_padded(
    model: PressableModel, contexts: Sequence[Sequence[int]], *, for_cache_only: bool
) -> CompressedCache:
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


def _evicted_by_mask(attention: nn.Module, keys: torch.Tensor) -> torch.Tensor | None:
    """The entries that a head-wise press evicted by masking, ``(B, H, T)``.

    kvpress would overwrite these keys with fake ones at the next forward; here they go into the layer's own mask,
    which is exact for any number of queries.
    """
    evicted = getattr(attention, "masked_key_indices", None)
    if evicted is None:
        return None
    hidden = torch.zeros(keys.shape[:3], dtype=torch.bool, device=keys.device)
    hidden[tuple(index.to(keys.device) for index in evicted)] = True
    return hidden


def _right_padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


def prefill_hidden(cache: CompressedCache) -> torch.Tensor:
    assert cache.last_hidden is not None, "nothing was prefilled and nothing held back: no token predicts the first"
    return cache.last_hidden


@contextmanager
def masked(attentions: Sequence[nn.Module], biases: Sequence[torch.Tensor | None]) -> Iterator[None]:
    """Gives each attention module its own mask, whatever the model passes. ``biases`` is read at every forward."""

    def hook_for(layer: int) -> Callable[..., Any]:
        def set_mask(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            return args, {**kwargs, "attention_mask": biases[layer]}

        return set_mask

    hooks = [
        attention.register_forward_pre_hook(hook_for(layer), with_kwargs=True)
        for layer, attention in enumerate(attentions)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def placeholder_mask(model: PressableModel) -> torch.Tensor:
    """A 4-D mask is passed on by transformers as it is, which spares building the one that `masked` replaces."""
    return torch.zeros(1, 1, 1, 1, device=model.device)
