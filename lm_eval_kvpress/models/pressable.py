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
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lm_eval_kvpress.cache.compressed import CompressedCache, empty_cache
from lm_eval_kvpress.models.fast.onednn_linear import linear, quick_forwards


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
