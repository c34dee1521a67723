"""Decoding steps as a CUDA graph, so that no token waits for Python.

A captured graph repeats its kernels on the same addresses and shapes. So the step here works on tensors that stay where
they are: whole buffers of a known size, whose unwritten end a mask hides, and counters on the device that the step
itself advances. It reads nothing from the host and writes nothing to it. The first step runs as it is, which warms up
libraries; then a step is captured, which runs nothing, and replayed from there on.

Knows torch and `decode_state`. Does not know text or presses.

Letters in shape comments: B rows, C capacity of a layer's buffers, N tokens of a row.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch

from lm_eval_kvpress.engine.decode_state import DecodeState
from lm_eval_kvpress.models.pressable import PressableModel

logger = logging.getLogger("lm_eval_kvpress")

NUM_WARM_UP = 1
LEAST_REPLAYS = 8
"""A capture costs about as much as a few steps, so it must save at least this many."""

Recorder = Callable[[Callable[[], None]], Callable[[], None] | None]
"""Captures a function without running it and returns its replay; None if it cannot be captured."""


class Chooses(Protocol):
    """`sampling.Sampler`, whose uniforms are on the device."""

    def choose(self, ids: torch.Tensor, logits: torch.Tensor, step: torch.Tensor) -> torch.Tensor: ...


class StaticStep:
    """Feeds the newest token of each row, chooses the next one and writes it behind it.

    It takes the state over: buffers are attended whole from now on, and masks open one entry per call.

    Args:
        state: the growing cache, after the first token has been chosen.
        sampler: chooses tokens.
        ids: ``(B, N)``, all tokens of each row, with empty columns after ``column`` for tokens to come.
        column: the column of the newest tokens.
        step: number of tokens chosen so far.
        make_step: of `FastPaths.step_maker`; None for the model's modules.
        highest: ``(B, tokens)``, gets the largest logit of each step.
    """

    def __init__(
        self,
        state: DecodeState,
        sampler: Chooses,
        ids: torch.Tensor,
        column: int,
        step: int,
        make_step: Callable[..., Any] | None = None,
        *,
        highest: torch.Tensor,
    ) -> None:
        self._state, self._sampler, self._ids, self._highest = state, sampler, ids, highest
        self._tokens, self._positions = ids[:, column, None].clone(), state.positions[:, None].clone()
        self._column, self._step = (torch.tensor([count], device=ids.device) for count in (column + 1, step))
        lengths = {layer.length for layer in state.layers}
        self._places = {length: torch.tensor([length], device=ids.device) for length in lengths}
        self._masks: list[tuple[torch.Tensor, int]] = []
        for index, layer in enumerate(state.layers):
            state.biases[index] = self._mask(index)
            layer.write_at(self._places[layer.length])
        self._forward: Callable[..., torch.Tensor] = state.forward
        if make_step is not None:
            places = [self._places[layer.length] for layer in state.layers]
            self._forward = make_step(state.layers, state.biases, places, state.forward)

    @property
    def kernels(self) -> str:
        """What computes the step, known once it has run."""
        return getattr(self._forward, "kernels", None) or self._state.model.fast.step_kind()

    def _mask(self, index: int) -> torch.Tensor:
        """A layer's mask, closed where nothing is written yet; layers that hide the same entries share one."""
        layer, mask = self._state.layers[index], self._state.masks[index]
        mask = layer.keys.new_zeros(1, 1, 1, layer.capacity) if mask is None else mask.clone()
        mask[..., layer.length :] = torch.finfo(mask.dtype).min
        for other, length in self._masks:
            if length == layer.length and torch.equal(other, mask):
                return other
        self._masks.append((mask, layer.length))
        return mask

    def __call__(self) -> None:
        for mask, length in self._masks:
            mask.index_fill_(3, self._places[length], 0)
        logits = self._state.model.logits(self._forward(self._tokens, self._positions))
        self._highest.index_copy_(1, self._step, logits.amax(dim=-1, keepdim=True))
        chosen = self._sampler.choose(self._ids, logits, self._step)
        self._tokens.copy_(chosen[:, None])
        self._ids.index_copy_(1, self._column, self._tokens)
        torch._foreach_add_([self._positions, self._column, self._step, *self._places.values()], 1)


class Repeated:
    """Runs a step once, then captures and replays it; runs it each time if it cannot be captured."""

    def __init__(self, step: Callable[[], None], record: Recorder) -> None:
        self._run, self._step, self._record = step, step, record
        self._num_run = 0

    def __call__(self) -> None:
        if self._num_run == NUM_WARM_UP:
            self._run = self._record(self._step) or self._step
        self._num_run += 1
        self._run()


class GraphRecorder:
    """Captures the decoding steps of one model as CUDA graphs; after a capture that failed it tries no more.

    Attributes:
        newest: what computed the steps of the newest batch; None if it had no step, or ended before a capture.
    """

    def __init__(self, model: PressableModel) -> None:
        self._model, self._has_failed = model, False
        self.newest: str | None = None

    def for_steps(self, num_steps: int, *, must_run_singly: bool = False) -> Recorder | None:
        """This recorder for a batch of so many steps, or None where steps are run one by one: without a GPU, because
        attending whole buffers then costs more than a graph saves, and where a press compresses the growing cache, its
        entries are packed, or a logits processor counts tokens.
        """
        if not must_run_singly and self._can_record(num_steps):
            self.newest = None
            return self
        self.newest = "modules" if num_steps > 0 else None
        return None

    def _can_record(self, num_steps: int) -> bool:
        on_gpu = self._model.device.type == "cuda"
        if not self._model.is_fast or not on_gpu or self._has_failed or num_steps < NUM_WARM_UP + LEAST_REPLAYS:
            return False
        reason = why_not_recorded(self._model)
        if reason:
            _say_once(reason)
        return not reason

    def __call__(self, step: Callable[[], None]) -> Callable[[], None] | None:
        try:
            replay = cuda_graph(step)
            self.newest = f"{getattr(step, 'kernels', 'modules')}, CUDA graph"
            return replay
        except RuntimeError as error:  # kernels and drivers refuse a capture in many ways
            cause = _first_cause(error)
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None  # a smaller batch is the answer
            self._has_failed = True
            self.newest = getattr(step, "kernels", "modules")
            _say_once((str(cause).strip() or repr(cause)).splitlines()[0])
            return None


def cuda_graph(step: Callable[[], None]) -> Callable[[], None]:
    """Capture a step as a CUDA graph and return its replay.

    After a failed capture ``torch.cuda.graph`` leaves its own stream current and the device's random numbers waiting
    for the end of the capture; both are restored here.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    before = generator.clone_state()
    try:
        with torch.cuda.graph(graph):
            step()
    except BaseException:
        torch.cuda.set_stream(stream)
        generator.graphsafe_set_state(before)
        raise
    replay: Callable[[], None] = graph.replay
    return replay


def _first_cause(error: BaseException) -> BaseException:
    """The first error: the end of a broken capture raises another one, which hides the cause."""
    while error.__context__ is not None and not error.__suppress_context__:
        error = error.__context__
    return error


def why_not_recorded(model: PressableModel) -> str:
    """A known reason why the steps of a model on a GPU cannot be captured, or an empty string."""
    if len({parameter.device for parameter in model.model.parameters()}) > 1:
        return "the model is spread over several devices"
    rope_type = getattr(getattr(model.model.base_model, "rotary_emb", None), "rope_type", "default")
    if "dynamic" in rope_type or rope_type == "longrope":
        return f"rope_type '{rope_type}' looks at the positions on the host"
    if torch.is_autocast_enabled("cuda"):
        return "mixed precision casts the weights at every step"
    return ""


@functools.cache
def _say_once(reason: str) -> None:
    logger.warning("decoding runs step by step, without a CUDA graph: %s", reason)
