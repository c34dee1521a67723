"""GPTNeoX's decoding step on a GPU in few kernels; the numbers are those of its modules, up to rounding.

Between two products of a layer transformers runs kernel after kernel of two microseconds; these, and an attention that
leaves a GPU idle at few rows, were three quarters of a step of Pythia-2.8B (docs/LOG.md). Here a layer is its four
products and four kernels, and attention and feed-forward, which Pythia has beside each other, run on two streams: each
fills the gaps of the other.

The step is used for models whose modules are the ones that it stands for, and only once it has agreed with them.

Knows transformers' GPTNeoX modules and, once asked for a step, Triton. Does not know presses, text or how tokens are
chosen.

Letters in shape comments: B rows, E hidden size.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from importlib.util import find_spec
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

from lm_eval_kvpress.cache import GrowingLayer
from lm_eval_kvpress.neox_forward import every_module_is_watched, has_plain_gelu

logger = logging.getLogger("lm_eval_kvpress")

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""One token per row and its position, ``(B, 1)`` each, to last hidden states, ``(B, E)``."""

TOLERANCE = {torch.float32: 1e-2, torch.float16: 1e-1, torch.bfloat16: 1e-1}
"""The largest relative difference of a row's last hidden state from that of the modules: above what rounding makes of
32 layers (0.02 in bfloat16), also under TF32, and far below what a wrong kernel makes."""


class StepMaker:
    """Makes the steps of one model, one for each batch.

    Args:
        model: presentable to kvpress or not; on any device.
    """

    def __init__(self, model: GPTNeoXForCausalLM) -> None:
        self._model = model
        self._agreed: dict[bool, bool] = {}  # a single row or more -> what a first step's comparison said
        self._side: torch.cuda.Stream | None = None

    @property
    def has_agreed(self) -> bool | None:
        """Whether steps' hidden states were those of the modules; None before one was tried."""
        return all(self._agreed.values()) if self._agreed else None

    def __call__(self) -> Callable[..., Forward] | None:
        """What makes a step over buffers, or None where the modules are to run; asked while no hook of ours is set."""
        if self.has_agreed is False or not is_plain(self._model):
            return None
        if find_spec("triton") is None:
            self._refuse("Triton is not installed")
            return None
        return self._over

    def _over(
        self,
        layers: Sequence[GrowingLayer],
        masks: Sequence[torch.Tensor],
        places: Sequence[torch.Tensor],
        modules: Forward,
    ) -> Forward:
        """A step over whole buffers. The first call ever, for a single row and for more, is the modules', compared.

        Args:
            layers: the buffers of each layer.
            masks: per layer, ``(1 or B, 1 or heads, 1, capacity)``, to be added to its scores.
            places: per layer, ``(1,)``, where the token is written; all before it is attended.
            modules: the forward that the step stands for.
        """
        if self._side is None and self._model.device.type == "cuda":
            # One for all batches: libraries keep a workspace for every stream that they meet. It goes first: attention,
            # of more and smaller kernels, is what the feed-forward would wait for.
            self._side = torch.cuda.Stream(self._model.device, priority=-1)
        step = NeoxStep(self._model, layers, masks, places, self._side)
        is_known = (len(layers[0].keys) == 1) in self._agreed
        return step if is_known else functools.partial(self._compared, step, modules)

    def _compared(self, step: Forward, modules: Forward, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if self.has_agreed is False:
            return modules(tokens, positions)
        kind = len(tokens) == 1
        if kind in self._agreed:
            return step(tokens, positions)
        found, expected = self._tried(step, tokens, positions), modules(tokens, positions)
        if found is not None:
            difference = (torch.dist(found.float(), expected.float()) / expected.float().norm()).item()
            self._agreed[kind] = difference <= TOLERANCE[expected.dtype]  # a NaN is not
            if not self._agreed[kind]:
                self._refuse(f"its hidden states differ from those of the model's modules by {difference:.2g}")
        return expected

    def _tried(self, step: Forward, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
        from lm_eval_kvpress import decode_kernels

        try:
            return step(tokens, positions).clone()
        except torch.OutOfMemoryError:
            raise  # a smaller batch is the answer
        except decode_kernels.REFUSALS as error:
            self._refuse(str(error).strip().splitlines()[0] if str(error).strip() else repr(error))
            return None

    def _refuse(self, reason: str) -> None:
        self._agreed[False] = False
        logger.warning("decoding steps run module by module, at less than half the speed: %s", reason)


def is_plain(model: GPTNeoXForCausalLM) -> bool:
    """Whether a step may stand for the model's modules: they are those of transformers, on one GPU, in one dtype, with
    Pythia's settings, and nobody watches or replaces any of them."""
    body = model.gpt_neox
    if type(body) is not GPTNeoXModel or body.training or model.config._attn_implementation != "sdpa":
        return False
    tensors = list(body.parameters())
    if len({(tensor.device, tensor.dtype) for tensor in tensors}) > 1 or tensors[0].dtype not in TOLERANCE:
        return False
    watched = any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in body.modules())
    return (
        can_run_on(tensors[0].device)
        and not watched
        and not every_module_is_watched()
        and type(body.embed_in) is nn.Embedding
        and type(body.final_layer_norm) is nn.LayerNorm
        and all(map(_is_plain_layer, body.layers))
    )


def can_run_on(device: torch.device) -> bool:
    return device.type == "cuda"


def _is_plain_layer(layer: Any) -> bool:
    if type(layer) is not GPTNeoXLayer or not layer.use_parallel_residual:
        return False
    attention, mlp = layer.attention, layer.mlp
    if type(attention) is not GPTNeoXAttention or type(mlp) is not GPTNeoXMLP or not has_plain_gelu(mlp):
        return False
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    products = (attention.query_key_value, attention.dense, mlp.dense_h_to_4h, mlp.dense_4h_to_h)
    return (
        all(type(norm) is nn.LayerNorm and norm.bias is not None for norm in norms)
        and norms[0].eps == norms[1].eps
        and all(type(product) is nn.Linear and product.weight.is_contiguous() for product in products)
        and attention.rotary_ndims % 2 == 0
    )


class NeoxStep:
    """One token per row through the model, over whole buffers; for the arguments see `StepMaker._over`.

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
        from lm_eval_kvpress import decode_attention, decode_kernels

        self._kernels, self._body = decode_kernels, model.gpt_neox
        self._layers, self._masks, self._places, self._side = layers, masks, places, side
        keys = layers[0].keys
        rows, heads, _, dim = keys.shape
        capacity = max(layer.capacity for layer in layers)
        self._attention = decode_attention.Attention(rows, heads, dim, capacity, keys)
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
        if len(x) == 1:
            return self._kernels.vector_product(x, layer, x.new_empty(1, layer.out_features), gelu=gelu)
        product = nn.functional.linear(x, layer.weight, layer.bias)
        return torch.ops.aten.gelu_(product) if gelu else product
