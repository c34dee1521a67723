"""Divergence, agreement and changes of log-probabilities equal those of two dense float64 forwards.

The reference is `references.DenseReference`: the untouched weights, explicit masks, whole rows of logits.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import kvpress
import pytest
import torch
from references import (
    PRESSES,
    REROTATES,
    DenseReference,
    Evicted,
    LlamaReference,
    NeoxReference,
    distinct_tokens,
    kept_by_press,
    largest_difference,
)
from repository import ROOT
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTNeoXForCausalLM
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from lm_eval_kvpress.cache.compressed import CompressedCache, stack
from lm_eval_kvpress.engine import online_softmax
from lm_eval_kvpress.engine.fidelity import FullDocuments, FullSide, compare
from lm_eval_kvpress.engine.prefill import prefill
from lm_eval_kvpress.engine.scoring import Pack, Predictions, predict
from lm_eval_kvpress.engine.stream_plan import StreamPlan
from lm_eval_kvpress.engine.streaming import stream
from lm_eval_kvpress.models.architectures import present
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.records.fidelity import Fidelity

TOKENS = distinct_tokens(64, 211, 3)
CONTEXT, CONTINUATION = TOKENS[:52], TOKENS[52:]
PREFILLED = len(CONTEXT) - 1
PACK = Pack((CONTEXT[-1],), (tuple(CONTINUATION),))
MORE = {
    "keydiff": lambda: kvpress.KeyDiffPress(0.5),
    "adakv:knorm": lambda: kvpress.AdaKVPress(kvpress.KnormPress(0.5)),
}


@dataclass(frozen=True)
class Subject:
    """A model in float64, and the reference that was made of it untouched."""

    model: PressableModel
    reference: DenseReference

    @functools.cached_property
    def full(self) -> Tensor:
        """The reference's log-probabilities over the full cache, ``(N, V)``."""
        return self.reference.logprobs(CONTEXT, CONTINUATION, None, PREFILLED)

    def cache(self, press: Any, rerotates: bool = False) -> CompressedCache:
        return prefill(self.model, torch.tensor([CONTEXT[:PREFILLED]]), press, rerotates=rerotates)

    def predictions(self, press: Any, rerotates: bool = False) -> Predictions:
        return predict(self.model, self.cache(press, rerotates), [PACK])

    def fidelity(self, full: Predictions, compressed: Predictions) -> Fidelity:
        ((found,),) = compare(self.model, full, compressed)
        return found


@pytest.fixture(scope="module", autouse=True)
def in_float64() -> Iterator[None]:
    """transformers computes RoPE's angles and Llama's norms in fp32 whatever the model's dtype is, which moves
    log-probabilities by 5e-6. Here all of it is float64, as in the reference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", norm_in_float64)
        for rotary in (LlamaRotaryEmbedding, GPTNeoXRotaryEmbedding):
            patch.setattr(rotary, "forward", angles_in_float64)
        for name, press in MORE.items():
            patch.setitem(PRESSES, name, press)
        yield


@pytest.fixture(scope="module", params=["neox", "neox, full rotary, sequential", "llama"])
def subject(
    request: pytest.FixtureRequest,
    make_neox: Callable[..., GPTNeoXForCausalLM],
    make_pressable_llama: Callable[..., PressableModel],
) -> Subject:
    if request.param == "llama":
        model = make_pressable_llama(dtype=torch.float64)
        return Subject(model, LlamaReference(model.model))
    shape = {"rotary_pct": 1.0, "parallel": False} if "full" in request.param else {}
    return neox_subject(make_neox(dtype=torch.float64, **shape))


def neox_subject(plain: GPTNeoXForCausalLM) -> Subject:
    reference = NeoxReference(plain)  # before the change of basis
    return Subject(present(plain), reference)


def norm_in_float64(norm: LlamaRMSNorm, hidden: Tensor) -> Tensor:
    return norm.weight * hidden * (hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()


def angles_in_float64(rotary: Any, like: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Frequencies are zero for the dims of a GPTNeoX's head that do not rotate."""
    frequencies = torch.zeros(rotary.inv_freq.numel(), dtype=torch.float64)
    num_rotated = int((rotary.inv_freq != 0).sum())
    theta = rotary.config.rope_parameters["rope_theta"]
    frequencies[:num_rotated] = theta ** (-torch.arange(num_rotated, dtype=torch.float64) / num_rotated)
    angles = (position_ids[..., None] * frequencies).repeat(1, 1, 2)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


@pytest.fixture(params=[2**23, 2_000], ids=["one tile", "small tiles"])
def any_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(online_softmax.TILE_BYTES, "cpu", request.param)
    monkeypatch.setattr(online_softmax, "TILE_ROWS", 5)


def dense(full: Tensor, compressed: Tensor, targets: Sequence[int] = CONTINUATION) -> Fidelity:
    """From two tables of log-probabilities, ``(N, V)``."""
    kl = torch.nn.functional.kl_div(compressed, full, log_target=True, reduction="none").sum(dim=-1)
    agrees = full.argmax(dim=-1) == compressed.argmax(dim=-1)
    places = range(len(targets))
    return Fidelity(
        tuple(kl.tolist()),
        tuple(agrees.tolist()),
        tuple((compressed - full)[places, targets].tolist()),
    )


def difference(found: Fidelity, expected: Fidelity) -> float:
    assert found.agrees == expected.agrees
    changes = largest_difference(found.logprob_changes, expected.logprob_changes)
    return max(largest_difference(found.kl, expected.kl), changes)


def expected_fidelity(subject: Subject, name: str) -> Fidelity:
    kept = kept_by_press(subject.model, CONTEXT[:PREFILLED], name)
    return dense(subject.full, subject.reference.logprobs(CONTEXT, CONTINUATION, kept, PREFILLED))


def check_against_dense(subject: Subject, name: str) -> Fidelity:
    found = subject.fidelity(subject.predictions(None), subject.predictions(PRESSES[name](), name in REROTATES))
    assert difference(found, expected_fidelity(subject, name)) < 1e-6
    return found


@pytest.mark.usefixtures("any_tiles")
@pytest.mark.parametrize("name", [*PRESSES, *MORE])
def test_fidelity_equals_two_dense_forwards(subject: Subject, name: str) -> None:
    found = check_against_dense(subject, name)
    if name != "none":
        assert max(found.kl) > 1e-3 and min(found.kl) > 0


@pytest.mark.end_to_end  # seconds
def test_fidelity_of_the_built_in_equals_two_dense_forwards() -> None:
    folder = ROOT / "lm_eval_kvpress" / "builtin"
    subject = neox_subject(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval())
    for name in PRESSES.keys() - {"qfilter"}:  # whose statistics in tests are of tiny models
        found = check_against_dense(subject, name)
        assert name == "none" or max(found.kl) > 1e-6, name


def test_the_other_direction_is_another_number(subject: Subject) -> None:
    full, compressed = subject.predictions(None), subject.predictions(PRESSES["knorm"]())
    forth, back = subject.fidelity(full, compressed), subject.fidelity(compressed, full)
    assert largest_difference(forth.kl, back.kl) > 0.01
    assert largest_difference(forth.logprob_changes, [-change for change in back.logprob_changes]) < 1e-12


@pytest.mark.parametrize("press", [kvpress.KnormPress, kvpress.StreamingLLMPress, kvpress.TOVAPress])
def test_ratio_zero_diverges_by_nothing(
    subject: Subject, make_pressable: Callable[..., PressableModel], press: Callable[[float], Any]
) -> None:
    """The pressed row stands in a padded batch, so that both sides are computed in another way."""
    for one, tolerance in ((subject, 1e-9), (dataclasses.replace(subject, model=make_pressable()), 2e-6)):
        cache = one.cache(press(0.0))
        longer = prefill(one.model, torch.tensor([TOKENS[:60]]), None)
        beside = predict(one.model, stack([cache, longer]), [PACK, Pack((TOKENS[60],), (tuple(TOKENS[61:]),))])
        full = predict(one.model, stack([one.cache(None), longer]), [PACK, Pack((TOKENS[60],), (tuple(TOKENS[61:]),))])
        (found,), _ = compare(one.model, full, beside)
        assert max(map(abs, found.kl)) < tolerance and all(found.agrees)
        assert max(map(abs, found.logprob_changes)) < max(1e-9, 5 * tolerance)


def test_more_eviction_of_what_is_attended_diverges_more(subject: Subject) -> None:
    """A constructed case: one new token predicted from fewer and fewer of the same entries, the sinks last."""
    full = subject.predictions(None)
    ratios = (0.0, 0.5, 0.9, 0.98)
    means = []
    for ratio in ratios:
        found = subject.fidelity(full, subject.predictions(kvpress.StreamingLLMPress(ratio, n_sink=1)))
        means.append(sum(found.kl) / len(found.kl))
    assert means == sorted(means) and means[0] < 1e-9 < means[1]


def test_a_stream_equals_two_dense_forwards(subject: Subject) -> None:
    """One eviction: 24 entries have been cached, of which the four first and the 16 newest stay."""
    if isinstance(subject.reference, LlamaReference):
        evicted = torch.zeros(3, 2, 24, dtype=torch.bool)
    else:
        evicted = torch.zeros(3, 4, 24, dtype=torch.bool)
    evicted[:, :, 4:8] = True
    document, plan = TOKENS[:32], StreamPlan(20, 8, rotate=False, num_hidden=16)
    *_, last = stream(
        subject.model, [document], 0, plan, lambda num: kvpress.StreamingLLMPress(1 - 20.5 / num, n_sink=4)
    )
    assert last.start == plan.first_pressed == 24
    context, new = [0, *document[:24]], document[24:]
    sides = [subject.reference.logprobs(context, new, hidden, 24) for hidden in (None, Evicted(evicted, 24))]
    expected = dense(*sides, new)
    for window, num_compared in ((32, 8), (28, 4), (24, 0)):
        found = FullDocuments(subject.model, [document], 0, window).compared(0, last.hidden[0], last.start)
        assert (found is None) == (num_compared == 0)
        if found is not None:
            assert found.agrees == expected.agrees[:num_compared] and max(found.kl) > 1e-3
            assert largest_difference(found.kl, expected.kl[:num_compared]) < 1e-6


def test_what_the_full_side_holds_impossible_has_no_weight(make_pressable: Callable[..., PressableModel]) -> None:
    model = make_pressable()
    layer = model.model.get_output_embeddings()
    layer.bias = torch.nn.Parameter(torch.zeros(model.num_logits), requires_grad=False)
    layer.bias[:100] = -torch.inf
    pack = Pack((5,), ((150, 160, 170),))
    sides = [predict(model, prefill(model, torch.tensor([tokens]), None), [pack]) for tokens in (TOKENS[:9], [7] * 9)]
    ((found,),) = compare(model, *sides)
    with torch.inference_mode():
        tables = [model.logits(side.hidden).double().log_softmax(dim=-1)[:, 100:] for side in sides]
    expected = (tables[0].exp() * (tables[0] - tables[1])).sum(dim=-1)
    assert largest_difference(found.kl, expected.tolist()) < 1e-5


def test_of_equal_maxima_the_first_is_compared(
    make_pressable: Callable[..., PressableModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_pressable()
    weight = model.model.get_output_embeddings().weight
    with torch.inference_mode():
        weight[100:200] = weight[:100].clone()
        weight[200:] = 0
    monkeypatch.setitem(online_softmax.TILE_BYTES, "cpu", 3_000)
    sides = [predict(model, prefill(model, torch.tensor([TOKENS[:9]]), None), [PACK]) for _ in range(2)]
    ((found,),) = compare(model, *sides)
    assert all(found.agrees) and set(found.kl) == {0.0}


def test_the_full_side_serves_further_presses_of_the_same_attention_alone() -> None:
    """Other attention rounds otherwise: figures would depend on what a process did before, and so on its share."""
    attention = SimpleNamespace(_attn_implementation="sdpa")
    model: Any = SimpleNamespace(model=SimpleNamespace(config=attention))
    compressed = list[Any]()
    compressor: Any = SimpleNamespace(
        press=SimpleNamespace(is_none=True),
        compress=lambda contexts: compressed.append(contexts) or SimpleNamespace(cache=None),
    )
    full, settings = FullSide(model, compressor, nullcontext), Any
    for attention._attn_implementation in ("sdpa", "sdpa", "eager", "eager", "sdpa"):
        full.predictions([], [])
        full.texts([], settings, lambda batch: [])  # type: ignore[arg-type]
    assert len(compressed) == 3 + 3
