"""The fast paths of a model: which of this package's ways apply to it. `models.architectures` is their only user."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXForCausalLM

from lm_eval_kvpress.models.fast import gpt_neox_forward, gpt_neox_step, grouped_attention, onednn_linear
from lm_eval_kvpress.models.pressable import FastPaths, PressableModel


def fast_paths(model: PressableModel) -> FastPaths:
    """What can make the forwards of a model quicker; each path looks at every call whether it applies to it."""
    layers = [module for module in model.model.base_model.modules() if type(module) is nn.Linear]
    linear: dict[str, Any] = {"linear": onednn_linear.linear, "linear_library": onednn_linear.library_of}
    if isinstance(model.model, GPTNeoXForCausalLM):
        forwards = functools.partial(_forwards, functools.partial(gpt_neox_forward.in_place, model.model), layers)
        return FastPaths(forwards, **linear, step_maker=gpt_neox_step.StepMaker(model.model))
    forwards = functools.partial(_forwards, functools.partial(grouped_attention.lent, model.attentions), layers)
    return FastPaths(forwards, **linear, step_kind=grouped_attention.step_kind)


@contextmanager
def _forwards(own: Callable[[], AbstractContextManager[Any]], layers: list[nn.Linear]) -> Iterator[None]:
    """The architecture's own forwards, and what all of them have in common."""
    with _without_cudnn_attention(), own(), onednn_linear.quick_forwards(layers):
        yield


@contextmanager
def _without_cudnn_attention() -> Iterator[None]:
    """cuDNN's attention, PyTorch's first choice on Hopper in 16 bit, makes a plan for every new length of a cache."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
