"""Attention where several query heads share a key-value head, without a copy of keys and values for each of them.

transformers repeats keys and values for all query heads as soon as there is a mask, as in every ragged batch and every
recorded step: with four query heads per key-value head a step then moves the cache's bytes nine times, most of them of
a cache that no press has shortened, and a press looks faster than it is. Here the query heads that share a key-value
head are rows of one query.

On a GPU in 16 bits a Triton kernel (`triton_attention`) stands for that, once a `trial` has compared the two: PyTorch's
kernel for masks has one block per row and key-value head, which leaves a GPU idle at few rows and few such heads (on an
H200 one row of 1,900 entries, 32 heads over 8, takes 87 us; ours 8).

Knows transformers' registry of attention functions. Does not know presses, caches or text.

Letters in shape comments: B rows, Q new tokens, H query heads, G query heads per key-value head, T entries, D head_dim.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from lm_eval_kvpress.models.fast import triton_support
from lm_eval_kvpress.models.fast.trial import Trial
from lm_eval_kvpress.models.lend import lend

if TYPE_CHECKING:
    from lm_eval_kvpress.models.fast.triton_attention import Attention

NAME = "kvpress_grouped"
REPLACES = "sdpa"

DEVICE_TYPES = {"cuda"}
"""Devices on which the kernel is tried, and its absence is worth a line."""

DTYPES = (torch.float16, torch.bfloat16)
"""In float32, 32 rows take more than twice PyTorch's time."""

TOLERANCE = 0.03
"""The largest relative difference of a head's result from PyTorch's: above rounding in 16 bits, below a wrong head,
order or span. One entry too many among thousands is within it; the tests of `triton_attention` are finer."""


@contextmanager
def lent(attentions: Sequence[Any]) -> Iterator[None]:
    """Let attention modules look up `attend` instead of transformers' function: they read its name in their config.

    Modules whose heads share nothing, or that use other attention than PyTorch's, keep what they have.
    """
    copies: dict[int, Any] = {}  # by the id of the config, which in general all modules share
    with ExitStack() as loans:
        for attention in filter(_shares_heads, attentions):
            own = id(attention.config)
            if own not in copies:
                copies[own] = copy.copy(attention.config)
                copies[own]._attn_implementation = NAME
            loans.enter_context(lend(attention, config=copies[own]))
        yield


def _shares_heads(attention: Any) -> bool:
    return attention.num_key_value_groups > 1 and attention.config._attn_implementation == REPLACES


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """``(B, Q, H, D)``, and no weights; the numbers are those of transformers' function, up to rounding.

    Args:
        module: the attention module, for transformers' function, which attends without a mask to several tokens.
        query: ``(B, H, Q, D)``.
        key, value: ``(B, H / G, T, D)``.
        attention_mask: ``(1 or B, 1 or H, Q, T)``, is added to the scores.
    """
    by_pytorch = functools.partial(nn.functional.scaled_dot_product_attention, dropout_p=dropout, scale=scaling)
    is_prefill = query.shape[2] == key.shape[2]  # transformers', for kvpress has it take marks off the module
    if query.shape[2] == 1 and not is_prefill:
        return _of_one_token(query, key, value, attention_mask, by_pytorch), None
    if attention_mask is not None and query.device.type == "cpu" and not is_prefill:
        mixed = by_pytorch(query, key, value, attn_mask=attention_mask, enable_gqa=True)  # which only a CPU has fast
        return mixed.transpose(1, 2).contiguous(), None
    attended: tuple[torch.Tensor, None] = ALL_ATTENTION_FUNCTIONS[REPLACES](
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return attended


def _of_one_token(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    by_pytorch: functools.partial[torch.Tensor],
) -> torch.Tensor:
    """``(B, 1, H, D)``."""
    batch, heads, _, dim = query.shape
    groups = (key.shape[1], heads // key.shape[1])  # H / G, G

    def as_rows_of_one_query() -> torch.Tensor:
        masks = mask
        if masks is not None and masks.shape[1] == heads:
            masks = masks.reshape(masks.shape[0], *groups, -1)
        return by_pytorch(query.reshape(batch, *groups, dim), key, value, attn_mask=masks).reshape(batch, heads, dim)

    if by_pytorch.keywords["dropout_p"] or torch.is_grad_enabled():
        return as_rows_of_one_query()[:, None]
    scale = by_pytorch.keywords["scale"] or dim**-0.5
    return KERNEL(query[:, :, 0], key, value, mask, scale, as_rows_of_one_query)[:, None]


class GroupedKernel:
    """Our kernel for one token per row, where it may stand for PyTorch's attention; one for all models of a process.

    Attributes:
        ran_last: whether the kernel computed the newest result.
    """

    def __init__(self) -> None:
        self._trial = Trial("PyTorch's", "attention to shared key-value heads is PyTorch's, which is slow at few rows")
        self.ran_last = False

    def __call__(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        by_pytorch: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """``(B, H, D)``, by the kernel if it can.

        Args:
            query: ``(B, H, D)``.
            keys, values: ``(B, H / G, T, D)``.
            mask: ``(1 or B, 1 or H, 1, T)``, finite, is added to the scores.
            by_pytorch: computes what the kernel stands for.
        """
        self.ran_last = False
        if mask is None or not self._is_for(keys, values, mask):
            return by_pytorch()
        attention = self._trial.attempt(lambda: _attention(query, keys))
        if attention is None:
            return by_pytorch()
        kind = (keys.dtype, *query.shape[1:], keys.shape[1], mask.shape[1] > 1, attention.block_spans)
        if _is_recording(keys.device) and not self._trial.believes(kind):  # nothing can be compared then
            return by_pytorch()
        mixed, self.ran_last = self._trial.run(
            kind, lambda: _run(attention, query, keys, values, mask, scale), by_pytorch, TOLERANCE
        )
        return mixed

    def _is_for(self, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> bool:
        """Whether a call reads whole buffers: slices, as of a cache that grows, come in calls not worth a kernel."""
        if self._trial.is_refused or keys.device.type not in DEVICE_TYPES or keys.dtype not in DTYPES:
            return False
        if not (keys.is_contiguous() and values.is_contiguous() and mask.stride(-1) == 1 and mask.is_floating_point()):
            return False
        reason = triton_support.why_not_on(keys.device)
        if reason:  # other devices may do
            self._trial.warn(reason)
        return not reason


def _is_recording(device: torch.device) -> bool:
    """Whether a CUDA graph is being made of what is called."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _attention(query: torch.Tensor, keys: torch.Tensor) -> Attention:
    from lm_eval_kvpress.models.fast.triton_attention import Attention

    rows, heads, dim = query.shape
    return Attention(rows, heads, dim, keys.shape[2], query, per_key_head=heads // keys.shape[1])


def _run(
    attention: Attention,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    last = keys.new_full((1,), keys.shape[2] - 1, dtype=torch.long)  # the mask hides what is not written
    return attention(query.contiguous(), keys, values, mask, last, scale).view(query.shape)


KERNEL = GroupedKernel()


def step_kind() -> str:
    """The name of what the newest step by modules was computed with, for the record."""
    return "modules, grouped kernel" if KERNEL.ran_last else "modules"


AttentionInterface.register(NAME, attend)
