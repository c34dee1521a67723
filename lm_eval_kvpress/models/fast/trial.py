"""Holds a decoding step in few kernels to the modules that it stands for, and falls back on them.

A step is compared before it is believed: the first one of each kind is computed both ways. What cannot be compiled, or
differs, leaves the modules in place, with one line that says why; what ran is counted in the record (`decode_graph`).

Knows `neox_step`. Does not know what is in a step, how steps are recorded, presses or text.

Letters in shape comments: B rows, E hidden size.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Hashable, Sequence

import torch
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXForCausalLM

from lm_eval_kvpress.cache.layers import GrowingLayer
from lm_eval_kvpress.models.fast import triton_support
from lm_eval_kvpress.models.fast.gpt_neox_step import NeoxStep, why_not

logger = logging.getLogger("lm_eval_kvpress")

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""One token per row and its position, ``(B, 1)`` each, to last hidden states, ``(B, E)``."""

TOLERANCE = {torch.float32: 1e-2, torch.float16: 1e-1, torch.bfloat16: 1e-1}
"""The largest relative difference of a row's last hidden state from that of the modules: above what rounding makes of
32 layers (0.02 of the largest number in bfloat16), also under TF32, and far below what a wrong kernel makes."""

DEVICE_TYPES = {"cuda"}
"""Where a step is worth asking for, and its absence worth a line."""


class StepMaker:
    """Makes the steps of one model, one for each batch.

    Args:
        model: presentable to kvpress or not; on any device.
    """

    def __init__(self, model: GPTNeoXForCausalLM) -> None:
        self._model = model
        self._agreed: set[Hashable] = set()  # kinds of steps whose hidden states were the modules'
        self._was_refused = False
        self._said: set[str] = set()

    def __call__(self) -> Callable[..., Batch] | None:
        """What makes a step over buffers, or None where the modules are to run; asked while no hook of ours is set."""
        if self._was_refused or self._model.device.type not in DEVICE_TYPES:
            return None
        reason = why_not(self._model)
        if reason:
            self._say(reason)
            return None
        return functools.partial(Batch, self)

    def made(
        self, layers: Sequence[GrowingLayer], masks: Sequence[torch.Tensor], places: Sequence[torch.Tensor]
    ) -> NeoxStep:
        """A step over whole buffers; for the arguments see `Batch`."""
        return NeoxStep(self._model, layers, masks, places, _side_stream(layers[0].keys.device))

    def needs_comparison(self, kind: Hashable) -> bool:
        return kind not in self._agreed

    def compare(self, kind: Hashable, found: torch.Tensor, expected: torch.Tensor) -> None:
        """Settles whether steps of a kind stand for the modules; leaves it open where these overflow."""
        found, expected = found.float(), expected.float()
        if not expected.isfinite().all():
            return
        difference = ((found - expected).norm(dim=1) / expected.norm(dim=1)).max().item()
        if difference <= TOLERANCE[self._model.dtype]:  # a NaN is not
            self._agreed.add(kind)
        else:
            self.refuse(f"its hidden states differ from those of the model's modules by {difference:.2g}")

    def refuse(self, reason: str) -> None:
        """From here on the modules run."""
        self._was_refused = True
        self._say(reason)

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            logger.warning("decoding steps run module by module, at less than half the speed: %s", reason)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """For the attention of a GPU's steps, one for all models and batches: libraries keep a workspace for every stream
    that they meet. It goes first: of more and smaller kernels, attention is what the feed-forward would wait for."""
    return torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None


class Batch:
    """The forward of one batch. Its first call tries the step in few kernels, and compares it with the modules if none
    of its kind has agreed with them yet; the others are the step's, or the modules' where it was refused.

    Args:
        layers: the buffers of each layer.
        masks: per layer, ``(1 or B, 1 or heads, 1, capacity)``, to be added to its scores.
        places: per layer, ``(1,)``, where the token is written; all before it is attended.
        modules: the forward that the step stands for.
    """

    def __init__(
        self,
        maker: StepMaker,
        layers: Sequence[GrowingLayer],
        masks: Sequence[torch.Tensor],
        places: Sequence[torch.Tensor],
        modules: Forward,
    ) -> None:
        self._maker, self._buffers, self._modules = maker, (layers, masks, places), modules
        self._forward: Forward | None = None

    @property
    def kernels(self) -> str:
        """What its steps are made of, for the record."""
        return "few kernels" if isinstance(self._forward, NeoxStep) else "modules"

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if self._forward is not None:
            return self._forward(tokens, positions)
        self._forward = self._modules
        tried = self._tried(tokens, positions)
        if tried is None:
            return self._modules(tokens, positions)
        step, found = tried
        if self._maker.needs_comparison(step.kind):
            expected = self._modules(tokens, positions)  # last, so that what it writes to the cache stays
            self._maker.compare(step.kind, found, expected)
            found = expected
        if not self._maker.needs_comparison(step.kind):
            self._forward = step
        return found

    def _tried(self, tokens: torch.Tensor, positions: torch.Tensor) -> tuple[NeoxStep, torch.Tensor] | None:
        try:
            step = self._maker.made(*self._buffers)
            return step, step(tokens, positions).clone()
        except torch.OutOfMemoryError:
            raise  # a smaller batch is the answer
        except triton_support.refusals() as error:
            self._maker.refuse(triton_support.cause(error))
            return None
