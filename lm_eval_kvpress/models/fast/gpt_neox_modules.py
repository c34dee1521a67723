"""Whether GPTNeoX's modules are plain ones that nobody watches, so that a quicker forward may stand for them.

Knows transformers' GPTNeoX modules. Does not know what stands for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.activations import GELUActivation
from transformers.models.gpt_neox.modeling_gpt_neox import (
    GPTNeoXAttention,
    GPTNeoXForCausalLM,
    GPTNeoXLayer,
    GPTNeoXMLP,
    GPTNeoXModel,
)

from lm_eval_kvpress.models.fast import triton_support

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes that the kernels of a step are written for."""


def every_module_is_watched() -> bool:
    """Whether a hook is registered for all modules there are."""
    hooks = nn.modules.module
    return bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks)


def has_plain_gelu(mlp: Any) -> bool:
    """Whether the activation is the exact GELU, with nothing around it."""
    return type(mlp.act) is GELUActivation and mlp.act.act is nn.functional.gelu


def why_no_step(model: GPTNeoXForCausalLM) -> str:
    """Why a step in few kernels may not stand for a model's modules, or nothing.

    They have to be those of transformers with Pythia's settings, on a GPU that the kernels are for, and nobody may
    watch or replace any of them.
    """
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
    return triton_support.why_not_on(tensors[0].device) or next(
        (reason for reason, holds in checks.items() if not holds), ""
    )


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
    """Whether a linear layer has a plain weight: quantisation may keep the layer's class and replace the weight."""
    return type(product) is nn.Linear and type(product.weight) is nn.Parameter and product.weight.is_contiguous()
