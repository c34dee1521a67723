"""Compare once, then believe or refuse: how kernels of ours come to stand for what PyTorch or transformers compute.

The first call of each kind is computed both ways. If the results agree, the kernels run alone from then on; if they
differ, or cannot be made here, the known way runs for good and one line says why.

Knows tensors and what Triton raises. Does not know what is computed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

from lm_eval_kvpress.models.fast import triton_support

logger = logging.getLogger("lm_eval_kvpress")

Made = TypeVar("Made")


class Trial:
    """What is known of one set of kernels.

    Args:
        stands_for: what the kernels are compared with, for the message.
        otherwise: what happens without them; begins every message.

    Attributes:
        is_refused: whether the kernels must not run any more.
    """

    def __init__(self, stands_for: str, otherwise: str) -> None:
        self._stands_for, self._otherwise = stands_for, otherwise
        self._agreed: set[Hashable] = set()
        self._messages: set[str] = set()
        self.is_refused = False

    def believes(self, kind: Hashable) -> bool:
        """Whether calls of a kind need no comparison any more."""
        return kind in self._agreed and not self.is_refused

    def attempt(self, make: Callable[[], Made]) -> Made | None:
        """The result of something that needs Triton; None, and the kernels are refused, where it cannot be had.

        Raises:
            torch.OutOfMemoryError: which proves nothing; a smaller batch is the answer.
        """
        try:
            return make()
        except torch.OutOfMemoryError:
            raise
        except triton_support.refusals() as error:
            self.refuse(triton_support.cause(error))
            return None

    def run(
        self,
        kind: Hashable,
        kernels: Callable[[], torch.Tensor],
        known: Callable[[], torch.Tensor],
        tolerance: float,
    ) -> tuple[torch.Tensor, bool]:
        """A result, and whether it is the kernels'.

        Args:
            kind: calls of one kind run the same kernels.
            kernels: the way on trial; its result must not be overwritten by ``known``.
            known: the way it stands for. It comes last, so that what it writes elsewhere stays.
            tolerance: as for `compare`.
        """
        found = self.attempt(kernels)
        if found is not None and self.believes(kind):
            return found, True
        expected = known()
        if found is not None:
            self.compare(kind, found, expected, tolerance)
        return expected, False

    def compare(self, kind: Hashable, found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
        """Believe a kind whose results agree, refuse the kernels if they do not.

        Where the expected numbers overflow, nothing is settled.

        Args:
            found, expected: ``(..., N)``, vectors.
            tolerance: the largest difference of a vector, as a share of its length.
        """
        if not expected.isfinite().all():
            return
        found, expected = found.float(), expected.float()
        differences, sizes = (found - expected).norm(dim=-1), expected.norm(dim=-1)
        if (differences <= tolerance * sizes).all():  # a NaN is not
            self._agreed.add(kind)
        else:
            largest = (differences / sizes).max().item()
            self.refuse(f"results of our kernels differ from those of {self._stands_for} by {largest:.2g}")

    def refuse(self, reason: str) -> None:
        """Leave the known way in place from here on."""
        self.is_refused = True
        self.warn(reason)

    def warn(self, reason: str) -> None:
        """Say once why the kernels do not run."""
        if reason not in self._messages:
            self._messages.add(reason)
            logger.warning("%s: %s", self._otherwise, reason)
