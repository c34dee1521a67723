"""Scores through a compressed cache equal a dense float64 forward that hides the evicted entries, by layer and head.

Each main law is also shown to fail when the code is wrong (``test_fault_*``).
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from references import (
    MASKS,
    PRESSES,
    REROTATES,
    DenseReference,
    LlamaReference,
    NeoxReference,
    distinct_tokens,
    kept_by_press,
    largest_difference,
    one_by_one_logprobs,
)
from rotation import in_turn
from torch import Tensor
from transformers import GPTNeoXForCausalLM

from lm_eval_kvpress.cache.compressed import CompressedCache, LayerKV, stack
from lm_eval_kvpress.cache.masks import attention_bias
from lm_eval_kvpress.engine import prefill as engine_prefill
from lm_eval_kvpress.engine import scoring
from lm_eval_kvpress.engine.prefill import prefill
from lm_eval_kvpress.engine.scoring import BranchScore, Pack
from lm_eval_kvpress.models.pressable import PressableModel

TOLERANCE = 2e-5
WRONG = 1e-2  # a fault moves some log-probability by more than this

TOKENS = distinct_tokens(64, 211, 3)
CONTEXT, CONTINUATION = TOKENS[:52], TOKENS[52:]


@dataclass(frozen=True)
class Subject:
    """A model under test and the reference that was made of it untouched."""

    model: PressableModel
    reference: DenseReference

    def skip_refused(self, name: str) -> None:
        if name in MASKS and self.model.model.config._attn_implementation == "eager":
            pytest.skip("kvpress refuses to mask heads under eager attention")


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def subject(
    request: pytest.FixtureRequest,
    make_neox: Callable[..., GPTNeoXForCausalLM],
    make_pressable: Callable[..., PressableModel],
) -> Subject:
    return Subject(make_pressable(request.param), NeoxReference(make_neox(request.param)))


@pytest.fixture(scope="module")
def sdpa(make_neox: Callable[..., GPTNeoXForCausalLM], make_pressable: Callable[..., PressableModel]) -> Subject:
    return Subject(make_pressable(), NeoxReference(make_neox()))


@pytest.fixture(scope="module")
def llama(make_pressable_llama: Callable[..., PressableModel]) -> Subject:
    model = make_pressable_llama()
    return Subject(model, LlamaReference(model.model))


def prefilled(model: PressableModel, context: Sequence[int], name: str) -> CompressedCache:
    return prefill(model, torch.tensor([list(context)]), PRESSES[name](), rerotates=name in REROTATES)


def cached(
    model: PressableModel, context: Sequence[int], held: int, name: str
) -> tuple[CompressedCache, tuple[int, ...]]:
    """All but the held-back tokens, compressed; and these."""
    end = len(context) - held
    return prefilled(model, context[:end], name), tuple(context[end:])


def branch_logprobs(rows: list[list[BranchScore]]) -> list[float]:
    return [value for branches in rows for branch in branches for value in branch.logprobs]


def scored(model: PressableModel, name: str, held: int, *branches: Sequence[int]) -> list[float]:
    cache, query = cached(model, CONTEXT, held, name)
    return branch_logprobs(scoring.score(model, cache, [Pack(query, tuple(map(tuple, branches)))]))


def dense(subject: Subject, name: str, held: int, branch: Sequence[int] = CONTINUATION) -> list[float]:
    end = len(CONTEXT) - held
    return subject.reference.token_logprobs(CONTEXT, branch, kept_by_press(subject.model, CONTEXT[:end], name), end)


def dense_difference(subject: Subject, name: str, held: int) -> float:
    return largest_difference(scored(subject.model, name, held, CONTINUATION), dense(subject, name, held))


# ---------------------------------------------------------------------------------------------- the main law


@pytest.mark.parametrize("held", [0, 1, 3])
@pytest.mark.parametrize("name", PRESSES)
def test_scores_equal_a_dense_forward_that_hides_the_evicted_entries(subject: Subject, name: str, held: int) -> None:
    subject.skip_refused(name)
    assert dense_difference(subject, name, held) < TOLERANCE


@pytest.mark.parametrize("shape", [{"parallel": False}, {"attention_bias": False}, {"rotary_pct": 1.0}], ids=str)
@pytest.mark.parametrize("name", ["pyramidkv", "expected_attention", "adakv:snapkv", "key_rerotation:streaming_llm"])
def test_scores_equal_the_dense_forward_for_other_shapes_of_neox(
    make_neox: Callable[..., GPTNeoXForCausalLM],
    make_pressable: Callable[..., PressableModel],
    name: str,
    shape: dict[str, Any],
) -> None:
    assert dense_difference(Subject(make_pressable(**shape), NeoxReference(make_neox(**shape))), name, 1) < TOLERANCE


@pytest.mark.parametrize("name", PRESSES)
def test_scores_equal_the_dense_forward_under_grouped_query_attention(llama: Subject, name: str) -> None:
    assert dense_difference(llama, name, 1) < 5e-5


@pytest.mark.parametrize("name", [name for name in PRESSES if name != "none"])
def test_every_press_moves_the_scores_and_no_two_agree(subject: Subject, name: str) -> None:
    subject.skip_refused(name)
    found = scored(subject.model, name, 1, CONTINUATION)
    for other in PRESSES:
        if other != name and not (other in MASKS and subject.model.model.config._attn_implementation == "eager"):
            assert largest_difference(found, scored(subject.model, other, 1, CONTINUATION)) > WRONG, other


def test_greedy_flag_says_whether_each_token_is_the_most_likely(subject: Subject) -> None:
    best = subject.reference.greedy(CONTEXT, 4, kept_by_press(subject.model, CONTEXT[:-1], "snapkv"), len(CONTEXT) - 1)
    wrong_last, wrong_first = [*best[:-1], (best[-1] + 1) % 211], [(best[0] + 1) % 211, *best[1:]]
    cache, query = cached(subject.model, CONTEXT, 1, "snapkv")
    pack = Pack(query, (tuple(best), tuple(wrong_last), tuple(wrong_first), tuple(best[:1])))
    (branches,) = scoring.score(subject.model, cache, [pack])
    assert [branch.is_greedy for branch in branches] == [True, False, False, True]


# ---------------------------------------------------------------------------------------------- the first token


@pytest.mark.parametrize("name", [name for name in PRESSES if name != "none"])
def test_the_first_token_sees_the_compressed_cache_only_if_a_token_is_held_back(subject: Subject, name: str) -> None:
    subject.skip_refused(name)
    full = dense(subject, "none", 0)[:1]
    one_token = CONTINUATION[:1]
    assert largest_difference(scored(subject.model, name, 0, one_token), full) < TOLERANCE
    assert largest_difference(scored(subject.model, name, 1, one_token), full) > WRONG
    whole = scored(subject.model, name, 0, CONTINUATION)
    assert largest_difference(whole[:1], full) < TOLERANCE
    assert largest_difference(whole[1:], dense(subject, "none", 0)[1:]) > WRONG, "later tokens see the compressed cache"


# ---------------------------------------------------------------------------------------------- many at once


@pytest.mark.parametrize(("name", "held"), in_turn(PRESSES, [1, 3]))
def test_many_tokens_at_once_equal_one_by_one(subject: Subject, name: str, held: int) -> None:
    """Presses that mask are compared with kvpress's own fake keys here."""
    subject.skip_refused(name)
    found = scored(subject.model, name, held, CONTINUATION)
    expected = one_by_one_logprobs(subject.model, TOKENS, len(CONTEXT) - held, name, len(CONTINUATION))
    assert largest_difference(found, expected) < TOLERANCE


@pytest.mark.parametrize("name", PRESSES)
def test_a_later_token_changes_no_earlier_score(subject: Subject, name: str) -> None:
    subject.skip_refused(name)
    before = scored(subject.model, name, 1, CONTINUATION)
    for place in range(1, len(CONTINUATION)):
        changed = list(CONTINUATION)
        changed[place] = (changed[place] + 7) % 211
        after = scored(subject.model, name, 1, changed)
        assert largest_difference(after[:place], before[:place]) < TOLERANCE, place
        if place + 1 < len(CONTINUATION):
            assert largest_difference(after[place + 1 :], before[place + 1 :]) > 1e-3, place


BRANCHES: tuple[tuple[int, ...], ...] = ((9, 8, 7, 6), (5,), (9, 8, 7, 1), (9,), tuple(range(40, 60)), (5,))


@pytest.mark.parametrize(("name", "held"), in_turn(PRESSES, [0, 1, 3]))
def test_packed_branches_equal_each_branch_alone(subject: Subject, name: str, held: int) -> None:
    subject.skip_refused(name)
    cache, query = cached(subject.model, CONTEXT, held, name)
    (packed,) = scoring.score(subject.model, cache, [Pack(query, BRANCHES)])
    for branch, found in zip(BRANCHES, packed, strict=True):
        ((alone,),) = scoring.score(subject.model, cache, [Pack(query, (branch,))])
        assert len(found.logprobs) == len(branch)
        assert largest_difference(found.logprobs, alone.logprobs) < TOLERANCE
        assert found.is_greedy == alone.is_greedy
        assert largest_difference(found.logprobs, dense(subject, name, held, branch)) < TOLERANCE


@pytest.mark.parametrize("name", PRESSES)
def test_scoring_leaves_the_cache_as_it_was_and_repeats(subject: Subject, name: str) -> None:
    subject.skip_refused(name)
    cache, query = cached(subject.model, CONTEXT, 1, name)
    before = [[None if t is None else t.clone() for t in (la.keys, la.values, la.hidden)] for la in cache.layers]
    first = scoring.score(subject.model, cache, [Pack(query, BRANCHES)])
    assert scoring.score(subject.model, cache, [Pack(query, BRANCHES)]) == first
    for layer, old in zip(cache.layers, before, strict=True):
        for found, expected in zip((layer.keys, layer.values, layer.hidden), old, strict=True):
            assert (found is None) == (expected is None)
            assert found is None or torch.equal(found, expected)


# ---------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(("name", "held"), in_turn(PRESSES, [1, 3, 0]))
def test_a_batch_equals_batches_of_one(subject: Subject, name: str, held: int) -> None:
    """Contexts of different lengths, queries of one length, branches of many."""
    subject.skip_refused(name)
    contexts = [distinct_tokens(length, 211, length) for length in (50, 29, 64, 29, 41)]
    branches = [((3, 4, 5), (6,)), ((7,),), (tuple(range(100, 130)),), BRANCHES, ((1, 2),)]
    caches, packs = [], []
    for context, own in zip(contexts, branches, strict=True):
        cache, query = cached(subject.model, context, held, name)
        caches.append(cache)
        packs.append(Pack(query, own))
    alone = [scoring.score(subject.model, cache, [pack])[0] for cache, pack in zip(caches, packs, strict=True)]
    together = scoring.score(subject.model, stack(caches), packs)
    assert [[len(b.logprobs) for b in row] for row in together] == [[len(b) for b in own] for own in branches]
    assert largest_difference(branch_logprobs(together), branch_logprobs(alone)) < TOLERANCE


def test_rows_may_hold_back_different_numbers_of_tokens(subject: Subject) -> None:
    """Also none beside some, and an empty cache beside a full one."""
    rows = [cached(subject.model, CONTEXT, held, "snapkv") for held in (0, 3, 1)]
    rows.append((dataclasses.replace(subject.model.empty_cache(1), last_hidden=torch.zeros(1, 64)), tuple(CONTEXT[:2])))
    caches, packs = [cache for cache, _ in rows], [Pack(query, BRANCHES) for _, query in rows]
    alone = [scoring.score(subject.model, cache, [pack])[0] for cache, pack in zip(caches, packs, strict=True)]
    together = scoring.score(subject.model, stack(caches), packs)
    assert largest_difference(branch_logprobs(together), branch_logprobs(alone)) < TOLERANCE


@pytest.mark.parametrize("branches", [(tuple(CONTINUATION),), BRANCHES], ids=["plain forward", "packed"])
def test_an_empty_cache_is_a_plain_model(subject: Subject, branches: tuple[tuple[int, ...], ...]) -> None:
    queries = [tuple(CONTEXT[:1]), tuple(CONTEXT), tuple(CONTEXT[:20])]
    found = scoring.score(subject.model, subject.model.empty_cache(3), [Pack(query, branches) for query in queries])
    for query, row in zip(queries, found, strict=True):
        for branch, of_branch in zip(branches, row, strict=True):
            expected = subject.reference.token_logprobs(query, branch, None, 0)
            assert largest_difference(of_branch.logprobs, expected) < TOLERANCE


# ---------------------------------------------------------------------------------------------- the head


@pytest.mark.parametrize("held", [0, 1])
def test_the_head_runs_once_where_a_token_is_scored_and_nowhere_else(
    sdpa: Subject, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    caches, packs = [], []
    for length in (50, 29):
        cache, query = cached(sdpa.model, distinct_tokens(length, 211, length), held, "snapkv")
        caches.append(cache)
        packs.append(Pack(query, BRANCHES))
    rows: list[int] = []
    whole = PressableModel.logits
    monkeypatch.setattr(PressableModel, "logits", lambda *call: rows.append(len(call[1])) or whole(*call))
    scoring.score(sdpa.model, stack(caches), packs)
    assert rows == [2 * (1 + sum(len(branch) - 1 for branch in BRANCHES))]


@pytest.mark.parametrize("name", ["snapkv", "pyramidkv", "adakv:snapkv"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_half_precision_is_near_the_dense_reference(
    make_neox: Callable[..., GPTNeoXForCausalLM],
    make_pressable: Callable[..., PressableModel],
    attn: str,
    dtype: torch.dtype,
    name: str,
) -> None:
    subject = Subject(make_pressable(attn, dtype=dtype), NeoxReference(make_neox(attn, dtype=dtype)))
    subject.skip_refused(name)
    found = scored(subject.model, name, 1, CONTINUATION)
    assert all(math.isfinite(value) for value in found)
    assert largest_difference(found, dense(subject, name, 1)) < (0.3 if dtype is torch.bfloat16 else 0.05)


def test_head_wise_masks_of_one_layer_at_a_time_are_alive(sdpa: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Pythia-2.8B, 1,024 tokens scored over 1,024: 128 MiB per layer in 16 bit, 4 GiB for all 32."""
    cache, query = cached(sdpa.model, CONTEXT, 1, "adakv:snapkv")
    made: list[weakref.ref[Tensor]] = []
    most_alive = 0

    def counting(*arguments: Any) -> Tensor | None:
        nonlocal most_alive
        bias = attention_bias(*arguments)
        assert bias is not None
        made.append(weakref.ref(bias))
        most_alive = max(most_alive, sum(reference() is not None for reference in made))
        return bias

    monkeypatch.setattr(scoring, "attention_bias", counting)
    scoring.score(sdpa.model, cache, [Pack(query, (tuple(CONTINUATION),))])
    assert len(made) == 3
    assert most_alive <= 2


# ---------------------------------------------------------------------------------------------- faults are seen


def other_masks(monkeypatch: pytest.MonkeyPatch, change: Callable[[list[Tensor]], list[Tensor]]) -> None:
    """Scoring with other masks than its own; ``change`` gets the right ones, one per layer."""
    masked = scoring.masked
    monkeypatch.setattr(scoring, "masked", lambda attentions, biases: masked(attentions, change(list(biases))))


def test_fault_mask_of_layer_0_for_all_layers(sdpa: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut to each layer's length, as lenient versions of transformers do: queries see the future, silently."""
    other_masks(monkeypatch, lambda biases: [biases[0][..., : bias.shape[-1]] for bias in biases])
    assert dense_difference(sdpa, "snapkv", 1) < TOLERANCE, "equal lengths hide the fault"
    assert dense_difference(sdpa, "pyramidkv", 1) > WRONG


def test_fault_zero_mask(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    other_masks(monkeypatch, lambda biases: [torch.zeros_like(bias) for bias in biases])
    assert dense_difference(subject, "snapkv", 1) > WRONG


def test_fault_masked_heads_ignored(sdpa: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine_prefill, "_evicted_by_mask", lambda *_: None)
        assert dense_difference(sdpa, "adakv:snapkv", 1) > WRONG


def test_fault_mask_of_head_0_for_all_heads(sdpa: Subject) -> None:
    cache, query = cached(sdpa.model, CONTEXT, 1, "adakv:snapkv")
    layers = tuple(LayerKV(la.keys, la.values, la.hidden[:, :1]) for la in cache.layers if la.hidden is not None)
    pack = Pack(query, (tuple(CONTINUATION),))
    found = branch_logprobs(scoring.score(sdpa.model, dataclasses.replace(cache, layers=layers), [pack]))
    assert largest_difference(found, dense(sdpa, "adakv:snapkv", 1)) > WRONG


@pytest.mark.parametrize("name", ["snapkv", "key_rerotation:streaming_llm"])
def test_fault_the_other_rule_for_positions(subject: Subject, name: str) -> None:
    """Physical instead of logical positions; logical instead of physical after keys were rotated anew."""
    cache, query = cached(subject.model, CONTEXT, 1, name)
    wrong = cache.num_seen if name in REROTATES else (cache.layers[0].num_entries,)
    assert cache.next_position != wrong
    pack = Pack(query, (tuple(CONTINUATION),))
    found = branch_logprobs(scoring.score(subject.model, dataclasses.replace(cache, next_position=wrong), [pack]))
    assert largest_difference(found, dense(subject, name, 1)) > WRONG


def test_fault_last_prompt_token_fed_twice(subject: Subject) -> None:
    cache = prefilled(subject.model, CONTEXT, "none")
    pack = Pack(tuple(CONTEXT[-1:]), (tuple(CONTINUATION),))
    found = branch_logprobs(scoring.score(subject.model, cache, [pack]))
    assert largest_difference(found, dense(subject, "none", 1)) > WRONG


def test_fault_targets_off_by_one(subject: Subject) -> None:
    found = scored(subject.model, "none", 1, CONTINUATION)
    assert largest_difference(found[1:], dense(subject, "none", 1)[:-1]) > WRONG


def test_fault_branches_see_each_other(sdpa: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_earlier(layout: scoring.Layout) -> Tensor:
        size = layout.segments.shape[1]
        return torch.ones(len(layout.segments), size, size, dtype=torch.bool).tril()

    monkeypatch.setattr(scoring.Layout, "visible", all_earlier)
    assert dense_difference(sdpa, "snapkv", 1) < TOLERANCE, "one branch alone hides the fault"
    expected = [value for branch in BRANCHES for value in dense(sdpa, "snapkv", 1, branch)]
    assert largest_difference(scored(sdpa.model, "snapkv", 1, *BRANCHES), expected) > WRONG


def test_fault_padding_of_a_ragged_batch_attended(sdpa: Subject) -> None:
    caches = [prefilled(sdpa.model, distinct_tokens(length, 211, 1), "snapkv") for length in (50, 20)]
    stacked = stack(caches)
    bare = dataclasses.replace(stacked, layers=tuple(LayerKV(la.keys, la.values) for la in stacked.layers))
    packs = [Pack((5,), ((6, 7, 8),))] * 2
    found = branch_logprobs(scoring.score(sdpa.model, bare, packs)[1:])
    assert largest_difference(found, branch_logprobs(scoring.score(sdpa.model, caches[1], packs[:1]))) > WRONG
