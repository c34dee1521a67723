"""GPTNeoX's decoding step on a GPU in few kernels; the numbers are those of its modules, up to rounding.

Between two products of a layer transformers runs kernel after kernel of two microseconds; these, and an attention that
leaves a GPU idle at few rows, were two thirds of a step of Pythia-2.8B (docs/experiments/h200_decoding_step.md). Here a
layer is its four products and four kernels (and GELU, for more than one row), and attention and feed-forward, which
Pythia has beside each other, run on two streams: each fills the gaps of the other.

It stands for models whose modules are the ones it was written from (`gpt_neox_modules`), once a `trial` has compared
the results of both.

Knows transformers' GPTNeoX modules and, once asked for a step, Triton. Does not know presses, text or how tokens are
chosen.

Letters in shape comments: B rows, E hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.models.gpt_neox.modeling_gpt_neox import (
    GPTNeoXAttention,
    GPTNeoXForCausalLM,
    GPTNeoXLayer,
    GPTNeoXMLP,
)

from lm_eval_kvpress.cache.layers import GrowingLayer
from lm_eval_kvpress.models.fast.gpt_neox_modules import why_no_step
from lm_eval_kvpress.models.fast.trial import Trial

TOLERANCE = {torch.float32: 1e-2, torch.float16: 1e-1, torch.bfloat16: 1e-1}
"""The largest relative difference of a row's last hidden state from that of the modules: above what rounding makes of
32 layers (0.02 of the largest number in bfloat16), also under TF32, and far below what a wrong kernel makes."""

DEVICE_TYPES = {"cuda"}
"""Devices on which a step is tried, and its absence is worth a line."""

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""One token per row and its position, ``(B, 1)`` each, to last hidden states, ``(B, E)``."""


class StepMaker:
    """Makes the decoding steps of one model, one for each batch.

    Args:
        model: on any device.
    """

    def __init__(self, model: GPTNeoXForCausalLM) -> None:
        self._model = model
        self._trial = Trial("the model's modules", "decoding steps run module by module, at less than half the speed")

    def __call__(self) -> Callable[..., TriedStep] | None:
        """What makes a step over buffers, or None where the modules must run; ask while no hook of ours is set."""
        if self._trial.is_refused or self._model.device.type not in DEVICE_TYPES:
            return None
        reason = why_no_step(self._model)
        if reason:
            self._trial.warn(reason)
            return None
        return functools.partial(TriedStep, self._model, self._trial)


class TriedStep:
    """The forward of one batch: a step in few kernels, or the modules where that was refused.

    The first call tries the step, and compares it with the modules if none of its kind has agreed with them yet.

    Args:
        layers: the buffers of each layer.
        masks: per layer, ``(1 or B, 1 or heads, 1, capacity)``, to be added to its scores.
        places: per layer, ``(1,)``, where the token is written; all before it is attended.
        modules: the forward that the step stands for.
    """

    def __init__(
        self,
        model: GPTNeoXForCausalLM,
        trial: Trial,
        layers: Sequence[GrowingLayer],
        masks: Sequence[torch.Tensor],
        places: Sequence[torch.Tensor],
        modules: Forward,
    ) -> None:
        self._model, self._trial, self._buffers, self._modules = model, trial, (layers, masks, places), modules
        self._forward: Forward | None = None

    @property
    def kernels(self) -> str:
        """What its steps are computed with, for the record."""
        return "few kernels" if isinstance(self._forward, NeoxStep) else "modules"

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """``(B, E)``, in a buffer that the next call may overwrite."""
        if self._forward is None:
            return self._first(tokens, positions)
        return self._forward(tokens, positions)

    def _first(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self._forward = self._modules
        step = self._trial.attempt(self._step)
        if step is None:
            return self._modules(tokens, positions)
        hidden, _ = self._trial.run(
            step.kind,
            lambda: step(tokens, positions).clone(),
            lambda: self._modules(tokens, positions),
            TOLERANCE[self._model.dtype],
        )
        if self._trial.believes(step.kind):
            self._forward = step
        return hidden

    def _step(self) -> NeoxStep:
        return NeoxStep(self._model, *self._buffers, _side_stream(self._buffers[0][0].keys.device))


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream for the attention of a GPU's steps, one for all models and batches.

    Libraries keep a workspace for every stream that they meet. It has priority: attention is made of more and smaller
    kernels, and the feed-forward would wait for it.
    """
    return torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None


class NeoxStep:
    """One token per row through the model, over whole buffers; for the arguments see `TriedStep`.

    What it returns is in a buffer that the next call overwrites.
    """

    def __init__(
        self,
        model: GPTNeoXForCausalLM,
        layers: Sequence[GrowingLayer],
        masks: Sequence[torch.Tensor],
        places: Sequence[torch.Tensor],
        side: torch.cuda.Stream | None,
    ) -> None:
        from lm_eval_kvpress.models.fast import triton_attention, triton_ops

        self._kernels, self._body = triton_ops, model.gpt_neox
        self._layers, self._masks, self._places, self._side = layers, masks, places, side
        keys = layers[0].keys
        rows, heads, _, dim = keys.shape
        capacity = max(layer.capacity for layer in layers)
        self._attention = triton_attention.Attention(rows, heads, dim, capacity, keys)
        self.kind: Hashable = (rows == 1, self._attention.block_spans)
        """Steps of one kind run the same kernels."""
        self._query = keys.new_empty(rows, heads, dim)
        self._normed = (keys.new_empty(rows, heads * dim), keys.new_empty(rows, heads * dim))

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        body, add_and_norm = self._body, self._kernels.add_and_norm
        x = body.embed_in(tokens)[:, 0]  # (B, E)
        angles = body.rotary_emb(x, position_ids=positions)
        added = None
        for index, layer in enumerate(body.layers):
            add_and_norm(x, added, (layer.input_layernorm, layer.post_attention_layernorm), self._normed)
            added = self._both(index, layer, angles)
        add_and_norm(x, added, (body.final_layer_norm,), self._normed[:1])
        return self._normed[0]

    def _both(self, index: int, layer: GPTNeoXLayer, angles: tuple[torch.Tensor, torch.Tensor]) -> Any:
        """Attention and feed-forward of a layer, on two streams.

        A stream reads what the other has made only after it has waited for it, and only after that is it let go, so
        nothing is overwritten while it is read.
        """
        if self._side is None:
            return self._attend(index, layer.attention, angles), self._feed_forward(layer.mlp)
        main = torch.cuda.current_stream()
        self._side.wait_stream(main)
        with torch.cuda.stream(self._side):
            attended = self._attend(index, layer.attention, angles)
        fed = self._feed_forward(layer.mlp)
        main.wait_stream(self._side)
        return attended, fed

    def _attend(
        self, index: int, attention: GPTNeoXAttention, angles: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        cached, place = self._layers[index], self._places[index]
        qkv, num_pairs = self._linear(attention.query_key_value, self._normed[0]), attention.rotary_ndims // 2
        self._kernels.rotate_and_store(qkv, angles, num_pairs, self._query, cached.keys, cached.values, place)
        mask = self._masks[index]
        mixed = self._attention(self._query, cached.keys, cached.values, mask, place, attention.scaling)
        return self._linear(attention.dense, mixed)

    def _feed_forward(self, mlp: GPTNeoXMLP) -> torch.Tensor:
        return self._linear(mlp.dense_4h_to_h, self._linear(mlp.dense_h_to_4h, self._normed[1], gelu=True))

    def _linear(self, layer: nn.Linear, x: torch.Tensor, *, gelu: bool = False) -> torch.Tensor:
        """A product by our kernel for a single row, since it has less to set up; by the library's for more."""
        if len(x) == 1 and self._kernels.can_multiply(layer):
            return self._kernels.vector_product(x, layer, x.new_empty(1, layer.out_features), gelu=gelu)
        product = nn.functional.linear(x, layer.weight, layer.bias)
        return torch.ops.aten.gelu_(product) if gelu else product
