"""A step that a CUDA graph can repeat: recorded here by a recorder that keeps a graph's rules on a CPU."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from references import PRESSES, REROTATES, distinct_tokens
from rotation import in_turn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lm_eval_kvpress.cache.compressed import stack
from lm_eval_kvpress.engine import cuda_graph, decoding
from lm_eval_kvpress.engine.prefill import prefill
from lm_eval_kvpress.engine.sampling import Sampler
from lm_eval_kvpress.models.fast import grouped_attention, triton_support
from lm_eval_kvpress.models.pressable import PressableModel

CONTEXTS = [distinct_tokens(length, 211, length + place) for place, length in enumerate((50, 29, 64, 29, 41))]
NUM_NEW = 20
GREEDY = Sampler(LogitsProcessorList())
SAMPLING = Sampler(
    LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.3),
            TemperatureLogitsWarper(1.7),
            TopKLogitsWarper(50),
            TopPLogitsWarper(0.95),
            MinPLogitsWarper(0.01),
        ]
    ),
    torch.rand(len(CONTEXTS), NUM_NEW, generator=torch.Generator().manual_seed(3)),
)
FROM_DEVICE_TO_HOST = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "item"}


class Tape(TorchDispatchMode):
    """What a CUDA graph keeps of a step: its operations with the very tensors and numbers that they had.

    `replay` does them again and writes each result where it stood; views need nothing done. A number that should have
    moved on, a tensor made anew, a look at a value: each gives other tokens, or is refused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in FROM_DEVICE_TO_HOST, f"{name} waits for the device"
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        storages = {t.untyped_storage().data_ptr() for t in tensors([args, kwargs])}
        made = [t for t in tensors(out) if t.untyped_storage().data_ptr() not in storages]
        if func._schema.is_mutable or made:
            self.calls.append((func, args, kwargs, made))
        return out

    def replay(self) -> None:
        for func, args, kwargs, made in self.calls:
            again = func(*args, **kwargs)
            if made:
                for old, new in zip(made, tensors(again), strict=True):
                    old.copy_(new)


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def tape(step: Callable[[], None]) -> Callable[[], None]:
    """A recorder that, unlike a GPU's, must run the step to see it: what the step changed is put back."""
    recorder = Tape()
    moved = [t for t in tensors(list(vars(step).values())) if not t.is_floating_point()]
    moved += [place for place in step._places.values()]  # type: ignore[attr-defined]
    before = [t.clone() for t in moved]
    with recorder:
        step()
    for tensor, value in zip(moved, before, strict=True):
        tensor.copy_(value)
    return recorder.replay


def decoded(model: PressableModel, name: str, held: list[int], sampler: Sampler = GREEDY, **options: Any) -> Any:
    caches = [
        prefill(model, torch.tensor([context[: len(context) - count]]), PRESSES[name](), rerotates=name in REROTATES)
        for context, count in zip(CONTEXTS, held, strict=True)
    ]
    arguments = {"stop_ids": frozenset(), "stopped": lambda new: [False] * len(new), **options}
    return decoding.decode(
        model,
        stack(caches),
        CONTEXTS,
        num_held_back=held,
        max_new_tokens=NUM_NEW,
        sampler=sampler,
        **arguments,
    )


@pytest.fixture(scope="module")
def model(make_pressable: Callable[..., PressableModel]) -> PressableModel:
    return make_pressable()


def run_as_it_is(step: Callable[[], None]) -> Callable[[], None]:
    return step


@pytest.mark.parametrize("record", [run_as_it_is, tape], ids=["static", "recorded"])
@pytest.mark.parametrize(("name", "held"), in_turn(PRESSES, [[0] * 5, [1] * 5, [1, 3, 2, 1, 3]]), ids=str)
def test_tokens_are_those_of_the_growing_cache(model: PressableModel, name: str, held: list[int], record: Any) -> None:
    assert decoded(model, name, held, record=record) == decoded(model, name, held)


@pytest.mark.parametrize("record", [run_as_it_is, tape], ids=["static", "recorded"])
@pytest.mark.parametrize("name", ["snapkv", "pyramidkv", "adakv:snapkv"])
def test_sampled_tokens_are_those_of_the_growing_cache(model: PressableModel, name: str, record: Any) -> None:
    held = [1] * len(CONTEXTS)
    expected = decoded(model, name, held, SAMPLING)
    assert decoded(model, name, held, SAMPLING, record=record) == expected != decoded(model, name, held)


@pytest.mark.parametrize("name", ["snapkv", "pyramidkv", "adakv:snapkv"])
def test_grouped_query_attention_too(make_pressable_llama: Callable[..., PressableModel], name: str) -> None:
    llama, held = make_pressable_llama(), [1] * len(CONTEXTS)
    assert decoded(llama, name, held, record=tape) == decoded(llama, name, held)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_too(make_pressable: Callable[..., PressableModel], dtype: torch.dtype) -> None:
    half, held = make_pressable(dtype=dtype), [1, 3, 2, 1, 3]
    assert decoded(half, "snapkv", held, record=tape) == decoded(half, "snapkv", held, record=run_as_it_is)


def test_stop_ids_end_rows_of_a_recorded_run(model: PressableModel) -> None:
    held = [1] * len(CONTEXTS)
    free = decoded(model, "snapkv", held)
    stop = frozenset({free[1][6]})
    expected = [next((row[: i + 1] for i, token in enumerate(row) if token in stop), row) for row in free]
    assert decoded(model, "snapkv", held, record=tape, stop_ids=stop) == expected != free


def test_no_tensor_of_a_step_moves(model: PressableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses and shapes of all that attention, embedding and head are given, step by step."""
    seen: list[list[tuple[int, Any]]] = []
    call = cuda_graph.StaticStep.__call__

    def watched(self: cuda_graph.StaticStep) -> None:
        call(self)
        state = self._state
        held = [self._tokens, self._positions, self._column, self._step, self._ids, *self._places.values()]
        held += [t for layer in state.layers for t in (layer.keys, layer.values)]
        held += [bias for bias in state.biases if bias is not None]
        seen.append([(t.data_ptr(), t.shape) for t in held])

    monkeypatch.setattr(cuda_graph.StaticStep, "__call__", watched)
    decoded(model, "pyramidkv", [1] * len(CONTEXTS), record=run_as_it_is)
    assert len(seen) == NUM_NEW - 1 and all(step == seen[0] for step in seen)


def test_the_tape_sees_a_number_that_should_have_moved(model: PressableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    held = [1] * len(CONTEXTS)
    expected = decoded(model, "snapkv", held, SAMPLING)
    choose = Sampler.choose
    monkeypatch.setattr(Sampler, "choose", lambda self, ids, logits, step: choose(self, ids, logits, int(step)))
    assert decoded(model, "snapkv", held, SAMPLING) == expected
    with pytest.raises(AssertionError, match="waits for the device"):
        decoded(model, "snapkv", held, SAMPLING, record=tape)


# ---------------------------------------------------------------------------------------------- control flow


def test_warms_up_then_records_once_then_replays() -> None:
    log: list[str] = []

    def record(step: Callable[[], None]) -> Callable[[], None]:
        log.append("record")
        return lambda: log.append("replay")

    repeated = cuda_graph.Repeated(lambda: log.append("run"), record)
    for _ in range(5):
        repeated()
    assert log == ["run", "record", "replay", "replay", "replay", "replay"]


@pytest.fixture
def _says_again() -> Iterator[None]:
    cuda_graph._say_once.cache_clear()
    yield
    cuda_graph._say_once.cache_clear()


@pytest.fixture
def on_gpu(model: PressableModel, monkeypatch: pytest.MonkeyPatch) -> PressableModel:
    monkeypatch.setattr(PressableModel, "device", torch.device("cuda"))
    return model


@pytest.mark.usefixtures("_says_again")
def test_what_cannot_be_recorded_is_said_once_and_not_tried_again(
    on_gpu: PressableModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(step: Callable[[], None]) -> Callable[[], None]:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        finally:
            raise RuntimeError("capture failed due to an error before")  # as the end of a capture says

    monkeypatch.setattr(cuda_graph, "cuda_graph", refuse)
    graphs, log = cuda_graph.GraphRecorder(on_gpu), list[str]()
    with caplog.at_level(logging.WARNING, "lm_eval_kvpress"):
        record = graphs.for_steps(100)
        assert record is graphs
        repeated = cuda_graph.Repeated(lambda: log.append("run"), record)
        for _ in range(4):
            repeated()
        assert graphs.for_steps(100) is None
        cuda_graph.GraphRecorder(on_gpu)(lambda: None)
    assert log == ["run"] * 4
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith("without a CUDA graph: operation not permitted when stream is capturing")


def test_a_run_that_was_not_recorded_gives_the_same_tokens(model: PressableModel) -> None:
    held = [1] * len(CONTEXTS)
    assert decoded(model, "snapkv", held, record=lambda step: None) == decoded(model, "snapkv", held)


def test_a_broken_capture_gives_stream_and_random_numbers_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``torch.cuda.graph`` does, whose exit raises before it leaves its stream and frees the random numbers."""
    current = ["the caller's"]
    numbers = SimpleNamespace(clone_state=lambda: "as before", graphsafe_set_state=current.append)

    @contextmanager
    def graph(_: object) -> Iterator[None]:
        current[:] = ["the capture's"]
        yield

    def broken() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "default_generators", (numbers,))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: current.__setitem__(0, stream))
    with pytest.raises(RuntimeError, match="not permitted"):
        cuda_graph.cuda_graph(broken)
    assert current == ["the caller's", "as before"]


def test_out_of_memory_is_left_to_the_caller(on_gpu: PressableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(step: Callable[[], None]) -> Callable[[], None]:
        raise torch.OutOfMemoryError("full")

    def full_in_a_capture(step: Callable[[], None]) -> Callable[[], None]:
        try:
            full(step)
        finally:
            raise RuntimeError("capture failed due to an error before")

    graphs = cuda_graph.GraphRecorder(on_gpu)
    for record in (full, full_in_a_capture):
        monkeypatch.setattr(cuda_graph, "cuda_graph", record)
        with pytest.raises(torch.OutOfMemoryError, match="full"):
            graphs(lambda: None)
        assert graphs.for_steps(100) is graphs, "a smaller batch may be recorded"


def test_it_is_known_how_the_steps_of_the_newest_batch_were_made(
    on_gpu: PressableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(step: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    def step() -> None:
        pass

    graphs = cuda_graph.GraphRecorder(on_gpu)
    assert graphs.for_steps(2) is None and graphs.newest == "modules"
    assert graphs.for_steps(0) is None and graphs.newest is None, "no step"
    assert graphs.for_steps(100, must_run_singly=True) is None and graphs.newest == "modules"
    assert graphs.for_steps(100) is graphs and graphs.newest is None, "it may end before a record"
    monkeypatch.setattr(cuda_graph, "cuda_graph", lambda step: step)
    graphs(step)
    assert graphs.newest == "modules, CUDA graph"
    step.kernels = "few kernels"  # type: ignore[attr-defined]
    graphs(step)
    assert graphs.newest == "few kernels, CUDA graph"
    monkeypatch.setattr(cuda_graph, "cuda_graph", refuse)
    graphs(step)
    assert graphs.newest == "few kernels"
    assert graphs.for_steps(100) is None and graphs.newest == "modules", "after a failed capture"


def test_a_generation_too_short_for_a_record_is_not_recorded(on_gpu: PressableModel) -> None:
    least = cuda_graph.NUM_WARM_UP + cuda_graph.LEAST_REPLAYS
    graphs = cuda_graph.GraphRecorder(on_gpu)
    assert graphs.for_steps(least - 1) is None and graphs.for_steps(least) is graphs


def test_on_a_cpu_the_growing_cache_is_used_and_nothing_is_said(
    model: PressableModel, caplog: pytest.LogCaptureFixture
) -> None:
    assert cuda_graph.GraphRecorder(model).for_steps(1000) is None
    assert not caplog.records


def test_rotary_embeddings_that_look_at_the_host_are_not_recorded(
    make_pressable: Callable[..., PressableModel],
) -> None:
    model = make_pressable()
    assert cuda_graph.why_not_recorded(model) == ""
    model.model.base_model.rotary_emb.rope_type = "dynamic"
    assert "positions on the host" in cuda_graph.why_not_recorded(model)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: a real CUDA graph")


@needs_gpu
@pytest.mark.parametrize("name", ["none", "snapkv", "pyramidkv", "adakv:snapkv"])
def test_a_cuda_graph_gives_the_tokens_of_the_growing_cache(  # pragma: no cover
    make_pressable: Callable[..., PressableModel], name: str
) -> None:
    model = make_pressable()
    model.model.to("cuda")
    for sampler in (GREEDY, SAMPLING):
        found = decoded(model, name, [1] * 5, sampler, record=cuda_graph.cuda_graph)
        assert found == decoded(model, name, [1] * 5, sampler)
    assert model.fast.step_maker() is not None, "the few kernels agreed"


@pytest.mark.kernels
@pytest.mark.parametrize("on_gpu", [False, pytest.param(True, marks=needs_gpu)], ids=["static", "recorded"])
@pytest.mark.parametrize("name", ["pyramidkv", "adakv:snapkv"])
def test_heads_that_share_keys_are_attended_by_the_kernel(
    make_pressable_llama: Callable[..., PressableModel], name: str, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole buffers, as a GPU attends to them: the growing cache's tokens, which are PyTorch's."""
    pytest.importorskip("triton", reason="needs Triton: kernels are compiled, or interpreted, by it")
    if not on_gpu:
        monkeypatch.setattr(grouped_attention, "DEVICE_TYPES", {"cpu", "cuda"})
        monkeypatch.setattr(triton_support, "is_new_enough", lambda device: True)
        monkeypatch.setattr(sys.modules[__name__], "NUM_NEW", 4)  # Triton's interpreter takes its time
    monkeypatch.setattr(grouped_attention, "DTYPES", (torch.float32,))  # in 16 bits rounding decides between tokens
    monkeypatch.setattr(grouped_attention, "KERNEL", grouped_attention.GroupedKernel())
    model, held = make_pressable_llama(), [1, 3, 2, 1, 3]
    model.model.to("cuda" if on_gpu else "cpu")
    expected = decoded(model, name, held)
    assert model.fast.step_kind() == "modules", "of a cache that grows"
    assert decoded(model, name, held, record=cuda_graph.cuda_graph if on_gpu else run_as_it_is) == expected
    assert model.fast.step_kind() == "modules, grouped kernel"


@needs_gpu
def test_after_a_broken_capture_the_device_works_on() -> None:  # pragma: no cover
    stream, tensor = torch.cuda.current_stream(), torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError):
        cuda_graph.cuda_graph(lambda: tensor.add_(1).sum().item())
    assert torch.cuda.current_stream() == stream
    torch.cuda.empty_cache()
    torch.manual_seed(5)
    drawn = torch.rand(3, device="cuda")
    cuda_graph.cuda_graph(lambda: tensor.add_(1))()
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3, device="cuda"), drawn) and drawn.isfinite().all()
