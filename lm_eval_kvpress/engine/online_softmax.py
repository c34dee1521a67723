"""Softmax over a vocabulary that is seen in tiles, some positions by some columns at a time.

Each tile is added to a running maximum and sum while the processor's cache still holds it (the online softmax of
Milakov and Gimelshein, 2018, arXiv:1805.02867). Knows the model's output layer. Does not know tokens, caches or
presses.

Letters in shape comments: P predicting positions, C columns of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from lm_eval_kvpress.models.pressable import PressableModel

TILE_ROWS = 2_048
TILE_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}
"""Bytes of fp32 logits at a time: on a CPU what its caches hold, on a GPU enough work for one launch."""
ALIGNMENT = 16
"""Columns of a tile are a multiple of this: MKL's product with 1,007 columns takes 1.4 times as long as with 1,008."""


def rows_per_walk(model: PressableModel) -> int:
    """Positions that walk over the vocabulary together."""
    return TILE_ROWS if model.head_can_be_cut else rows_at_once(model)


def rows_at_once(model: PressableModel) -> int:
    """Positions whose whole rows of logits are one tile; at least 1."""
    return max(1, _budget(model) // (4 * model.num_logits))


def column_ranges(model: PressableModel, num_rows: int) -> Iterator[tuple[int, int]]:
    """Ranges of columns of nearly equal width; one range if the output layer cannot be cut."""
    size = model.num_logits
    widest = max(1, _budget(model) // (4 * num_rows)) if model.head_can_be_cut else size
    step = ALIGNMENT if ALIGNMENT <= widest < size else 1
    num_tiles = -(-size // (widest // step * step))
    width = -(-size // (num_tiles * step)) * step
    for start in range(0, size, width):
        yield start, min(start + width, size)


def _budget(model: PressableModel) -> int:
    return TILE_BYTES.get(model.head_device.type, TILE_BYTES["cuda"])


class RunningSoftmax:
    """The running maximum and sum of each row's exponentials.

    They are powers of two: a CPU computes those in half the time of powers of e. log2(e) is rounded to the dtype of the
    sums: multiplied and then divided by it, a large logit is what it was.

    Args:
        num_rows: P.
        dtype: of the logits.

    Attributes:
        highest: ``(P,)``, each row's largest logit so far.
    """

    def __init__(self, num_rows: int, device: torch.device, dtype: torch.dtype) -> None:
        self._log2_e = torch.tensor(math.log2(math.e), dtype=dtype).item()
        self.highest = torch.full((num_rows,), torch.finfo(dtype).min / 2, device=device, dtype=dtype)
        self._total = torch.zeros(num_rows, device=device, dtype=dtype)  # of 2^(logit * log2(e) - shift)

    def add(self, logits: torch.Tensor, highest: torch.Tensor) -> torch.Tensor:
        """Add the logits ``(P, C)`` of some columns, which become their exponentials, relative to the largest so far.

        Args:
            highest: ``(P,)``, the maximum of these columns.

        Returns:
            ``(P,)``: the factor that earlier exponentials are to be multiplied by.
        """
        highest = torch.maximum(highest, self.highest)
        shift = highest * self._log2_e
        factor = (self.highest * self._log2_e - shift).exp2_()
        self._total *= factor
        self._total += torch.add(-shift[:, None], logits, alpha=self._log2_e, out=logits).exp2_().sum(dim=-1)
        self.highest = highest
        return factor

    @property
    def total(self) -> torch.Tensor:
        """``(P,)``: the sum of the exponentials, relative to the largest logit."""
        return self._total

    def log_sums(self) -> torch.Tensor:
        """``(P,)`` in float64: the logarithm of the sum of e^logit."""
        return (self.highest * self._log2_e).double() / self._log2_e + self._total.log()
