"""A model as presses and the engine see it: hidden states, logits, its shape, and one attention mask per layer.

Knows torch and the shape of a causal language model. Does not know text, lm-eval, any press by name, or how a forward
is made quicker: `present` brings that along as `FastPaths`.

Two laws hold for all that is built on it, whatever the press:

- **One mask per layer**, made from that layer's own length. A press such as PyramidKV leaves a different length in
  every layer, and transformers builds a single mask from the first (transformers issue 35168).
- **Logical positions.** New tokens go on counting where the context ended, not where the shortened cache ends.

Letters in shape comments: B rows, Q new tokens, E hidden size, V logits, N positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lm_eval_kvpress.cache.compressed import CompressedCache, empty_cache


@dataclass(frozen=True, eq=False)
class FastPaths:
    """Quicker ways to the same numbers, up to rounding; the defaults are transformers' and PyTorch's own.

    Attributes:
        forwards: makes a context in which the model's modules compute faster.
        linear: a product like `torch.nn.functional.linear`.
        linear_library: the name of the library that multiplies by a weight, for the record.
        step_maker: returns what makes decoding steps that stand for the modules, as long as no hook watches them
            (`fast.gpt_neox_step.StepMaker`); None where there is no such step.
        step_kind: the name of what the newest step by modules was computed with, for the record.
    """

    forwards: Callable[[], AbstractContextManager[Any]] = nullcontext
    linear: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor] = nn.functional.linear
    linear_library: Callable[[torch.Tensor], str] = lambda weight: "torch"
    step_maker: Callable[[], Callable[..., Any] | None] = lambda: None
    step_kind: Callable[[], str] = lambda: "modules"


NO_FAST_PATHS = FastPaths()


@dataclass(frozen=True, eq=False)
class PressableModel:
    """A causal language model together with how it is presented to kvpress; `present` makes one.

    Attributes:
        model: the model.
        attentions: its attention modules in layer order.
        presented: makes the context in which kvpress presses can hook the model.
        fast: what makes its forwards quicker.
        basis: makes the context in which its weights are as ``presented`` and the engine need them.
    """

    model: PreTrainedModel
    attentions: tuple[nn.Module, ...]
    presented: Callable[[], AbstractContextManager[Any]]
    fast: FastPaths = NO_FAST_PATHS
    basis: Callable[[], AbstractContextManager[Any]] = nullcontext

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """A context for everything that the engine does with the model: in evaluation mode, and in its basis.

        Between two of them the model is its owner's, who may train or save it; modules in training mode are so again.
        """
        in_training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with self.basis():
                yield
        finally:
            for module in in_training:
                module.training = True

    @property
    def is_fast(self) -> bool:
        """Whether anything but transformers' modules and PyTorch's operators may compute the numbers."""
        return self.fast is not NO_FAST_PATHS

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
        with self.fast.forwards():
            return self.model.base_model(tokens, **kwargs).last_hidden_state

    @property
    def head_device(self) -> torch.device:
        return self.model.get_output_embeddings().weight.device

    @property
    def num_logits(self) -> int:
        """V, the outputs of the head; a checkpoint may pad it above the tokenizer's vocabulary."""
        return self.model.get_output_embeddings().out_features  # packed weights have another shape

    @property
    def head_can_be_cut(self) -> bool:
        """Whether columns of the logits can be computed alone: the head is a plain layer on which nobody has a hook."""
        head = self.model.get_output_embeddings()
        everywhere = nn.modules.module  # hooks that watch every module there is
        hooks = (
            *(head._forward_hooks, head._forward_pre_hooks, head.__dict__.get("forward")),  # accelerate's the last
            *(everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks),
        )
        return type(head) is nn.Linear and not any(hooks)

    @property
    def linear_library(self) -> str:
        """The library that multiplies by the head's weight, for the record."""
        if not self.head_can_be_cut:
            return "torch"
        return self.fast.linear_library(self.model.get_output_embeddings().weight)

    def logits(self, hidden: torch.Tensor, start: int = 0, end: int | None = None) -> torch.Tensor:
        """Logits ``(N, V)`` of hidden states ``(N, E)``; of some columns, where the head can be cut.

        They are fp32, and float64 where the model computes in it.
        """
        head = self.model.get_output_embeddings()
        hidden = hidden.to(head.weight.device)
        if not self.head_can_be_cut:
            assert start == 0 and end in (None, self.num_logits), "this head cannot be cut"
            return _wide(head(hidden))
        bias = None if head.bias is None else head.bias[start:end]
        return _wide(self.fast.linear(hidden, head.weight[start:end], bias))


def logit_dtype(hidden: torch.Tensor) -> torch.dtype:
    """The dtype of the logits of hidden states."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(logit_dtype(logits))


@contextmanager
def masked(attentions: Sequence[nn.Module], biases: Sequence[torch.Tensor | None]) -> Iterator[None]:
    """Give each attention module its own mask, whatever the model passes; ``biases`` is read at every forward."""

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
    """A mask that transformers passes on as it is, since it has 4 dimensions; `masked` replaces it in each layer."""
    return torch.zeros(1, 1, 1, 1, device=model.device)
