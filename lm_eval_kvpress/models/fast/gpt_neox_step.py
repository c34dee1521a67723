"""GPTNeoX's decoding step on a GPU in few kernels; the numbers are those of its modules, up to rounding.

Between two products of a layer transformers runs kernel after kernel of two microseconds; these, and an attention that
leaves a GPU idle at few rows, were two thirds of a step of Pythia-2.8B
(docs/experiments/h200_decoding_step.md). Here a layer is its four
products and four kernels (and GELU, for more than one row), and attention and feed-forward, which Pythia has beside
each other, run on two streams: each fills the gaps of the other.

It stands for models whose modules are the ones it was written from (`why_not`); `step_trial` holds it to their numbers.

Knows transformers' GPTNeoX modules and, once asked for a step, Triton. Does not know presses, text or how tokens are
chosen.

Letters in shape comments: B rows, E hidden size.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.models.gpt_neox.modeling_gpt_neox import (
    GPTNeoXAttention,
    GPTNeoXForCausalLM,
    GPTNeoXLayer,
    GPTNeoXMLP,
    GPTNeoXModel,
)

from lm_eval_kvpress.cache.layers import GrowingLayer
from lm_eval_kvpress.models.fast.gpt_neox_forward import every_module_is_watched, has_plain_gelu
from lm_eval_kvpress.models.fast.triton_support import why_not_on

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not(model: GPTNeoXForCausalLM) -> str:
    """Why a step may not stand for the modules, or nothing: they have to be those of transformers with Pythia's
    settings, on a GPU that the kernels are for, and nobody watches or replaces any of them."""
    body = model.gpt_neox
    tensors = list(body.parameters())
    checks = {
        f"attn_implementation is {model.config._attn_implementation}, not sdpa": (
            model.config._attn_implementation == "sdpa"
        ),
        "the weights are of several devices or dtypes, or of a dtype other than float32 and 16 bits": (
            len({(tensor.device, tensor.dtype) for tensor in tensors}) == 1 and tensors[0].dtype in DTYPES
        ),
        "a hook watches a module, or its forward was replaced": not _is_watched(body),
        "the modules are not plain ones of transformers, with parallel residuals and GELU": (
            not body.training
            and [type(part) for part in (body, body.embed_in)] == [GPTNeoXModel, nn.Embedding]
            and _is_plain_norm(body.final_layer_norm)
            and all(map(_is_plain_layer, body.layers))
        ),
    }
    return why_not_on(tensors[0].device) or next((reason for reason, holds in checks.items() if not holds), "")


def _is_watched(body: nn.Module) -> bool:
    watched = (m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in body.modules())
    return any(watched) or every_module_is_watched()


def _is_plain_layer(layer: Any) -> bool:
    if type(layer) is not GPTNeoXLayer or not layer.use_parallel_residual:
        return False
    attention, mlp = layer.attention, layer.mlp
    if type(attention) is not GPTNeoXAttention or type(mlp) is not GPTNeoXMLP or not has_plain_gelu(mlp):
        return False
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    products = (attention.query_key_value, attention.dense, mlp.dense_h_to_4h, mlp.dense_4h_to_h)
    return (
        all(map(_is_plain_norm, norms))
        and norms[0].eps == norms[1].eps
        and all(map(_is_plain_product, products))
        and attention.rotary_ndims % 2 == 0
    )


def _is_plain_norm(norm: nn.Module) -> bool:
    return type(norm) is nn.LayerNorm and type(norm.weight) is type(norm.bias) is nn.Parameter


def _is_plain_product(product: nn.Module) -> bool:
    """Quantisation may leave the class and change that of the weight, which then has no address."""
    return type(product) is nn.Linear and type(product.weight) is nn.Parameter and product.weight.is_contiguous()


class NeoxStep:
    """One token per row through the model, over whole buffers; for the arguments see `trial.Batch`.

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
        """Steps of one kind are made of the same kernels."""
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
        """Attention and feed-forward. What one stream has made the other reads only after it has waited, and it is let
        go only after that: so none of it is overwritten while it is read."""
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
        """For a single row by our kernel, which has less to set up; for more by the library's."""
        if len(x) == 1 and self._kernels.can_multiply(layer):
            return self._kernels.vector_product(x, layer, x.new_empty(1, layer.out_features), gelu=gelu)
        product = nn.functional.linear(x, layer.weight, layer.bias)
        return torch.ops.aten.gelu_(product) if gelu else product
