"""The one switch for speed: every law holds with it on and off, and off means that no fast path runs at all."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from references import (
    PRESSES,
    REROTATES,
    DenseReference,
    LlamaReference,
    NeoxReference,
    distinct_tokens,
    kept_by_press,
    largest_difference,
)
from transformers import LogitsProcessorList, PreTrainedModel

from lm_eval_kvpress.cache.compressed import CompressedCache, stack
from lm_eval_kvpress.engine.cuda_graph import GraphRecorder
from lm_eval_kvpress.engine.decoding import decode
from lm_eval_kvpress.engine.prefill import prefill, prefill_padded
from lm_eval_kvpress.engine.sampling import Sampler
from lm_eval_kvpress.engine.scoring import Pack, score
from lm_eval_kvpress.engine.shared_prefill import SharedPrefills
from lm_eval_kvpress.models import fast as fast_package
from lm_eval_kvpress.models.architectures import SWITCH, present
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.parse import parse_press

TOLERANCE = 2e-5
TOKENS = distinct_tokens(64, 211, 3)
CONTEXT, CONTINUATION = TOKENS[:52], TOKENS[52:]
CONTEXTS = [distinct_tokens(length, 211, length) for length in (50, 29, 41)]
NUM_NEW = 6
FAST_FOLDER = str(Path(fast_package.__path__[0]))
ARCHITECTURES = ["gpt_neox", "llama"]

MakePressable = Callable[..., PressableModel]


@dataclass(frozen=True)
class Subject:
    """A presented model, the same model untouched, and the reference made of that."""

    model: PressableModel
    untouched: PreTrainedModel
    reference: DenseReference


@pytest.fixture(scope="module")
def subjects(
    make_neox: Callable[..., Any], make_pressable: MakePressable, make_pressable_llama: MakePressable
) -> dict[tuple[str, bool], Subject]:
    neox, llama = make_neox(), make_pressable_llama().model
    made = {}
    for fast in (True, False):
        made["gpt_neox", fast] = Subject(make_pressable(fast=fast), neox, NeoxReference(neox))
        made["llama", fast] = Subject(make_pressable_llama(fast=fast), llama, LlamaReference(llama))
    return made


@pytest.fixture(params=[(name, fast) for name in ARCHITECTURES for fast in (True, False)], ids=str)
def subject(request: pytest.FixtureRequest, subjects: dict[tuple[str, bool], Subject]) -> Subject:
    return subjects[request.param]


def scored(model: PressableModel, cache: CompressedCache, held: int) -> list[float]:
    query = tuple(CONTEXT[len(CONTEXT) - held :])
    [[branch]] = score(model, cache, [Pack(query, (tuple(CONTINUATION),))])
    return list(branch.logprobs)


def decoded(model: PressableModel, press: str, record: Any = None) -> list[list[int]]:
    caches = [
        prefill(model, torch.tensor([context[:-1]]), PRESSES[press](), rerotates=press in REROTATES)
        for context in CONTEXTS
    ]
    return decode(
        model,
        stack(caches),
        CONTEXTS,
        num_held_back=[1] * len(CONTEXTS),
        max_new_tokens=NUM_NEW,
        sampler=Sampler(LogitsProcessorList()),
        stop_ids=frozenset(),
        stopped=lambda new: [False] * len(new),
        record=record,
    )


# ---------------------------------------------------------------------------------------------- laws, both ways


@pytest.mark.parametrize("press", ["none", "snapkv", "pyramidkv", "adakv:snapkv", "key_rerotation:streaming_llm"])
def test_scoring_equals_the_dense_reference(subject: Subject, press: str) -> None:
    end = len(CONTEXT) - 1
    cache = prefill(subject.model, torch.tensor([CONTEXT[:end]]), PRESSES[press](), rerotates=press in REROTATES)
    evicted = kept_by_press(subject.model, CONTEXT[:end], press)
    expected = subject.reference.token_logprobs(CONTEXT, CONTINUATION, evicted, end)
    assert largest_difference(scored(subject.model, cache, 1), expected) < TOLERANCE


@torch.inference_mode()
@pytest.mark.parametrize("press", ["none", "knorm", "snapkv"])
def test_ratio_zero_equals_the_untouched_model(subject: Subject, press: str) -> None:
    logprobs = subject.untouched(torch.tensor([TOKENS])).logits[0].log_softmax(dim=-1)
    expected = [logprobs[place - 1, TOKENS[place]].item() for place in range(len(CONTEXT), len(TOKENS))]
    length = len(CONTEXT) - 1
    ratio = {} if press == "none" else {"compression_ratio": 0.0}
    window = {"window_size": 8} if press == "snapkv" else {}
    built = parse_press(press, {**ratio, **window}).build(length)
    cache = prefill(subject.model, torch.tensor([CONTEXT[:length]]), built)
    assert cache.kept() == [[float(length)] * 3]
    assert largest_difference(scored(subject.model, cache, 1), expected) < TOLERANCE


def test_generation_without_a_press_equals_generate(subject: Subject) -> None:
    expected = [
        subject.untouched.generate(
            torch.tensor([context]), max_new_tokens=NUM_NEW, min_new_tokens=NUM_NEW, do_sample=False, pad_token_id=0
        )[0, len(context) :].tolist()
        for context in CONTEXTS
    ]
    assert decoded(subject.model, "none") == expected


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("press", ["snapkv", "pyramidkv", "adakv:snapkv"])
def test_generation_is_the_same_with_and_without_fast_paths(
    subjects: dict[tuple[str, bool], Subject], name: str, press: str
) -> None:
    assert decoded(subjects[name, True].model, press) == decoded(subjects[name, False].model, press)


# ---------------------------------------------------------------------------------------------- off means off


@contextmanager
def calls_of_fast_paths() -> Iterator[list[str]]:
    """The functions of `models.fast` that are called meanwhile."""
    called: list[str] = []

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(FAST_FOLDER):
            called.append(frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield called
    finally:
        sys.setprofile(before)


def everything(model: PressableModel) -> None:
    """Prefills of every kind, scoring, and decoding over the growing cache and over whole buffers."""
    tokens = torch.tensor([CONTEXT[:-1]])
    for press in ("none", "snapkv"):
        for for_cache_only in (True, False):
            cache = prefill(model, tokens, PRESSES[press](), for_cache_only=for_cache_only)
        scored(model, cache, 1)
        decoded(model, press)
        decoded(model, press, record=lambda step: step)
    prefill_padded(model, [[1, 2, 3], [4, 5, 6, 7]])
    prefills = SharedPrefills(model)
    prefills.run([tuple(CONTEXT)])
    prefills.compress([tuple(CONTEXT)], PRESSES["snapkv"]())


@pytest.mark.usefixtures("few_kernels_anywhere")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_without_fast_paths_nothing_of_them_is_called(
    name: str, make_pressable: MakePressable, make_pressable_llama: MakePressable
) -> None:
    make = {"gpt_neox": make_pressable, "llama": make_pressable_llama}[name]
    with calls_of_fast_paths() as called:
        everything(make(fast=False))
    assert called == []
    model = make(fast=True)
    with calls_of_fast_paths() as called:
        prefill(model, torch.tensor([CONTEXT]), None)
    assert called, "the watch sees them where they run"


def test_the_environment_variable_overrules_what_is_asked(
    make_neox: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for value, is_fast in {"0": False, "1": True, "": True}.items():
        monkeypatch.setenv(SWITCH, value)
        assert present(make_neox()).is_fast == is_fast
        assert not present(make_neox(), fast=False).is_fast


def test_no_graph_is_recorded_of_a_model_without_fast_paths(
    make_pressable: MakePressable, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fast in (True, False):
        model = make_pressable(fast=fast)
        with monkeypatch.context() as patch:
            patch.setattr(PressableModel, "device", torch.device("cuda"))
            assert (GraphRecorder(model).for_steps(100) is not None) == fast
