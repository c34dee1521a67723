"""Attention of one token to shared key-value heads by our Triton kernel, where it agrees with PyTorch's.

PyTorch's kernel for masks has one block per row and key-value head: at few rows and few such heads a GPU is idle (on an
H200 one row of 1,900 entries, 32 heads over 8, takes 87 us; ours 8). The kernel is believed once it has agreed: the
first call of each kind is computed both ways. What cannot be compiled, or differs, leaves PyTorch's, with one line that
says why.

Knows `decode_attention`. Does not know models, presses or text.

Letters in shape comments: B rows, H query heads, G query heads per key-value head, C entries, D head_dim.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

import torch

from lm_eval_kvpress.models.fast import triton_support

if TYPE_CHECKING:
    from lm_eval_kvpress.models.fast.triton_attention import Attention

logger = logging.getLogger("lm_eval_kvpress")

DEVICE_TYPES = {"cuda"}
"""Where the kernel is worth asking for, and its absence worth a line."""

DTYPES = (torch.float16, torch.bfloat16)
"""Of float32, 32 rows take more than twice PyTorch's time."""

TOLERANCE = 0.03
"""The largest relative difference of a head's result from PyTorch's: above rounding in 16 bits, below a wrong head,
order or span. One entry too many among thousands is within it; the tests of `decode_attention` are finer."""


class GroupedKernel:
    """Stands for PyTorch's attention of one token per row, in all models of a process."""

    def __init__(self) -> None:
        self._agreed: set[Hashable] = set()
        self._was_refused = False
        self._said: set[str] = set()
        self.ran_last = False
        """Whether the kernel made the newest result."""

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
            keys, values: ``(B, H / G, C, D)``.
            mask: ``(1 or B, 1 or H, 1, C)``, finite, is added to the scores.
            by_pytorch: makes what the kernel stands for.
        """
        self.ran_last = False
        if mask is None or not self._is_for(keys, values, mask):
            return by_pytorch()
        try:
            attention = _attention(query, keys)
            kind = (keys.dtype, *query.shape[1:], keys.shape[1], mask.shape[1] > 1, attention.block_spans)
            if kind in self._agreed:
                found = _run(attention, query, keys, values, mask, scale)
                self.ran_last = True
                return found
            if _is_recording(keys.device):  # nothing can be compared then
                return by_pytorch()
            found = _run(attention, query, keys, values, mask, scale)
        except torch.OutOfMemoryError:
            raise  # a smaller batch is the answer
        except triton_support.refusals() as error:
            self._refuse(triton_support.cause(error))
            return by_pytorch()
        expected = by_pytorch()
        self._compare(kind, found, expected)
        return expected

    def _is_for(self, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> bool:
        """Whole buffers: of a cache that grows, a slice is attended, in calls that are not worth a kernel."""
        if self._was_refused or keys.device.type not in DEVICE_TYPES or keys.dtype not in DTYPES:
            return False
        if not (keys.is_contiguous() and values.is_contiguous() and mask.stride(-1) == 1 and mask.is_floating_point()):
            return False
        reason = triton_support.why_not_on(keys.device)
        if reason:  # other devices may do
            self._say(reason)
        return not reason

    def _compare(self, kind: Hashable, found: torch.Tensor, expected: torch.Tensor) -> None:
        """Settles whether calls of a kind stand for PyTorch's; leaves it open where these overflow."""
        if not expected.isfinite().all():
            return
        found, expected = found.float(), expected.float()
        differences, sizes = (found - expected).norm(dim=-1), expected.norm(dim=-1)
        if (differences <= TOLERANCE * sizes).all():  # a NaN is not
            self._agreed.add(kind)
        else:
            self._refuse(f"its results differ from those of PyTorch's by {(differences / sizes).max().item():.2g}")

    def _refuse(self, reason: str) -> None:
        """From here on PyTorch's runs."""
        self._was_refused = True
        self._say(reason)

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            logger.warning("attention to shared key-value heads is PyTorch's, which is slow at few rows: %s", reason)


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
