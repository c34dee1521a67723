"""The change of basis that turns partial RoPE into RoPE over whole heads, which is all that kvpress's presses know.

**Partial RoPE is full RoPE with zero frequencies on the dims that do not rotate.** The rows of Q and K are put into the
order ``[rot first half, pass first half, rot second half, pass second half]``, and the rotary frequencies are padded
with zeros. A rotation by a zero angle is the identity, so attention logits are unchanged while every head rotates over
its full width. Knows heads and a rotary embedding of transformers. Does not know presses, nor where an architecture has
its queries and keys: that is told to `WideHeads`.

Letters in shape comments: D head_dim, R rotated dims (R <= D).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.models.pressable import PressableModel

ROPE_TYPES = ("default", "linear")
"""Those whose frequencies are fixed and whose cosines are not rescaled: a zero frequency is the identity under them."""


@dataclass(frozen=True, eq=False)
class WideHeads:
    """How the heads of a model come to rotate over their full width.

    Attributes:
        attentions: the attention modules in layer order.
        rotary: the rotary embedding of all of them.
        head_dim: D.
        projections: names of an attention's modules that make queries and keys.
        reorder: puts the dims of every head of an attention's queries and keys into an order of shape ``(D,)``.
    """

    attentions: tuple[Any, ...]
    rotary: Any
    head_dim: int
    projections: tuple[str, ...]
    reorder: Callable[[Any, torch.Tensor], None]

    @property
    def are_made(self) -> bool:
        """Whether every dim of a head has a frequency."""
        return rotated_dims(self.rotary) == self.head_dim

    def check(self) -> None:
        """Refuse weights, or a rotary embedding, for which the change would not be exact.

        Raises:
            UsageError: in one line.
        """
        for attention in self.attentions:
            for name in self.projections:
                weight = getattr(getattr(attention, name), "weight", None)
                check_plain_weight(weight, f"{name} of layer {attention.layer_idx}")
        if not self.are_made:
            check_rotary(self.rotary, self.head_dim)

    def make(self) -> None:
        """Change the basis in memory, for good. Idempotent.

        Parameter names and shapes stay; a checkpoint saved afterwards would hold permuted rows, so do not save it.

        Raises:
            UsageError: as `check` does.
        """
        with ExitStack() as undo:
            self._make(undo)
            undo.pop_all()

    @contextmanager
    def made(self) -> Iterator[None]:
        """Change the basis for the length of a ``with`` block, to the bit; heads that are wide stay as they are.

        Takes the memory of Q and K of one layer, and per call the time in which they are read and written twice.

        Raises:
            UsageError: as `check` does.
        """
        with ExitStack() as undo:
            self._make(undo)
            yield

    def _make(self, undo: ExitStack) -> None:
        self.check()
        if self.are_made:
            return
        order = full_width_order(self.head_dim, rotated_dims(self.rotary))
        for attention in self.attentions:
            self.reorder(attention, order)
            undo.callback(self.reorder, attention, order.argsort())
            undo.callback(setattr, attention, "rotary_ndims", attention.rotary_ndims)
            attention.rotary_ndims = self.head_dim
        pad_frequencies(self.rotary, self.head_dim, undo)


def present_wide(
    model: PreTrainedModel,
    heads: WideHeads,
    presented: Callable[[], AbstractContextManager[Any]],
    *,
    for_good: bool,
) -> PressableModel:
    """Present a model whose heads are made wide for good, or while it is in use.

    Raises:
        UsageError: if its weights or its rotary embedding cannot follow exactly.
    """
    if for_good:
        heads.make()
        return PressableModel(model, heads.attentions, presented)
    heads.check()
    return PressableModel(model, heads.attentions, presented, basis=heads.made)


def check_rope_type(kind: str) -> None:
    """Refuse a rotary embedding that partial RoPE over whole heads cannot follow.

    Raises:
        UsageError: in one line.
    """
    if kind not in ROPE_TYPES:
        raise UsageError(
            f"rope_type '{kind}' rescales or recomputes the rotary frequencies, which partial RoPE over whole heads "
            "cannot follow; use a checkpoint with default or linear RoPE"
        )


def check_rotary(rotary: Any, head_dim: int) -> None:
    """As `check_rope_type`, of a loaded model; and refuse dims that do not come in pairs.

    Raises:
        UsageError: in one line.
    """
    check_rope_type(rotary.rope_type)
    assert rotary.attention_scaling == 1.0
    if head_dim % 2 or rotated_dims(rotary) % 2:
        raise UsageError(f"head_dim {head_dim} and rotated dims {rotated_dims(rotary)} must both be even")


def check_plain_weight(weight: Any, where: str) -> None:
    """Refuse quantised weights: their rows cannot be reordered, nor read by parts (float8 has scales).

    Args:
        weight: of a projection; None where its module has none, as GPTQ's and AWQ's.
        where: names the projection.

    Raises:
        UsageError: in one line.
    """
    if weight is None or weight.is_meta or not weight.is_floating_point() or weight.element_size() < 2:
        kind = "packed" if weight is None else f"{weight.dtype} on {weight.device}"
        raise UsageError(
            f"{where} is {kind}: quantised or offloaded weights cannot be reordered or split into q, k, v; load the "
            "model in 16 or 32 bit"
        )


def rotated_dims(rotary: Any) -> int:
    """R: dims of a head that have a frequency; after the change of basis all of them."""
    return 2 * int(rotary.inv_freq.numel())


def full_width_order(head_dim: int, rotary_dims: int) -> torch.Tensor:
    """The order of a head's rows after the change of basis, shape ``(D,)``.

    ``rotate_half`` over the whole head pairs dim ``i`` with ``i + D / 2``; the order puts the two halves that partial
    RoPE pairs with each other at just that distance, and fills up with dims that are not rotated.
    """
    dims = torch.arange(head_dim)
    rotated, passed = dims[:rotary_dims], dims[rotary_dims:]
    half_rotated, half_passed = rotary_dims // 2, (head_dim - rotary_dims) // 2
    return torch.cat([rotated[:half_rotated], passed[:half_passed], rotated[half_rotated:], passed[half_passed:]])


def head_order(rotary: Any) -> torch.Tensor:
    """The order that a widened model's heads have, by the checkpoint's own dims, shape ``(D,)``.

    Dims that do not rotate are those whose frequency is zero.
    """
    return full_width_order(rotated_dims(rotary), 2 * int(rotary.inv_freq.count_nonzero()))


def pad_frequencies(rotary: Any, head_dim: int, undo: ExitStack) -> None:
    """Give every dim of a head a frequency, zero where it does not rotate, until ``undo`` is closed."""
    for name in ("inv_freq", "original_inv_freq"):
        frequencies = getattr(rotary, name)
        undo.callback(setattr, rotary, name, frequencies)
        padding = frequencies.new_zeros(head_dim // 2 - frequencies.numel())
        setattr(rotary, name, torch.cat([frequencies, padding]))
