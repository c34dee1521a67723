"""Decoding from compressed caches: the tokens of independent references, in any batch; sampling follows the softmax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from references import (
    MASKS,
    PRESSES,
    REROTATES,
    Evicted,
    NeoxReference,
    distinct_tokens,
    kept_by_press,
    one_by_one_greedy,
    probabilities,
)
from rotation import in_turn
from torch import Tensor
from transformers import (
    GPTNeoXForCausalLM,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lm_eval_kvpress.cache.compressed import CompressedCache, stack
from lm_eval_kvpress.engine import decode_state, decoding
from lm_eval_kvpress.engine.prefill import prefill
from lm_eval_kvpress.engine.sampling import Sampler
from lm_eval_kvpress.models.pressable import PressableModel

LENGTHS = (50, 29, 64, 29, 41)
CONTEXTS = [distinct_tokens(length, 211, length + place) for place, length in enumerate(LENGTHS)]
NUM_NEW = 14
GREEDY = Sampler(LogitsProcessorList())


@dataclass(frozen=True)
class Subject:
    """A model under test, and the same model untouched."""

    model: PressableModel
    untouched: GPTNeoXForCausalLM
    reference: NeoxReference

    def skip_refused(self, name: str) -> None:
        if name in MASKS and self.untouched.config._attn_implementation == "eager":
            pytest.skip("kvpress refuses to mask heads under eager attention")


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def subject(
    request: pytest.FixtureRequest,
    make_neox: Callable[..., GPTNeoXForCausalLM],
    make_pressable: Callable[..., PressableModel],
) -> Subject:
    untouched = make_neox(request.param)
    return Subject(make_pressable(request.param), untouched, NeoxReference(untouched))


def cached(model: PressableModel, context: Sequence[int], held: int, name: str) -> CompressedCache:
    tokens = torch.tensor([context[: len(context) - held]])
    return prefill(model, tokens, PRESSES[name](), rerotates=name in REROTATES)


def decoded(
    model: PressableModel,
    contexts: Sequence[Sequence[int]],
    name: str,
    held: int | Sequence[int] = 1,
    *,
    sampler: Sampler = GREEDY,
    stop_ids: frozenset[int] = frozenset(),
    stopped: Callable[[Tensor], Sequence[bool]] = lambda new: [False] * len(new),
    num_new: int = NUM_NEW,
    record: Any = None,
) -> list[list[int]]:
    """One ragged batch over all contexts."""
    holds = [held] * len(contexts) if isinstance(held, int) else list(held)
    caches = [cached(model, context, count, name) for context, count in zip(contexts, holds, strict=True)]
    return decoding.decode(
        model,
        stack(caches),
        contexts,
        num_held_back=holds,
        max_new_tokens=num_new,
        sampler=sampler,
        stop_ids=stop_ids,
        stopped=stopped,
        record=record,
    )


# ---------------------------------------------------------------------------------------------- greedy


@pytest.mark.parametrize(("name", "held"), in_turn(PRESSES, [0, 1, 3]))
def test_greedy_tokens_are_those_of_the_references(subject: Subject, name: str, held: int) -> None:
    """A dense forward anew for each token, and kvpress's own token by token loop."""
    subject.skip_refused(name)
    context = CONTEXTS[0]
    end = len(context) - held
    (found,) = decoded(subject.model, [context], name, held)
    assert found == one_by_one_greedy(subject.model, context, held, name, NUM_NEW)
    assert found == subject.reference.greedy(context, NUM_NEW, kept_by_press(subject.model, context[:end], name), end)


@pytest.mark.parametrize("held", [0, 1, 3])
def test_without_a_press_greedy_tokens_are_those_of_generate(subject: Subject, held: int) -> None:
    expected = [generated(subject.untouched, context) for context in CONTEXTS]
    assert decoded(subject.model, CONTEXTS, "none", held) == expected
    assert len({tuple(tokens) for tokens in expected}) == len(CONTEXTS)


@torch.no_grad()
def generated(model: GPTNeoXForCausalLM, context: Sequence[int], **options: Any) -> list[int]:
    """Greedy, by transformers. Without the mask it would take every 0 of the context for padding."""
    ids = torch.tensor([context])
    arguments = {"do_sample": False, "max_new_tokens": NUM_NEW, "pad_token_id": 0, "eos_token_id": None, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)[0, len(context) :].tolist()


@pytest.mark.parametrize(("name", "held"), in_turn(PRESSES, [(1, 3, 2, 1, 3), 0, 1, 3]), ids=str)
def test_a_ragged_batch_equals_batches_of_one(subject: Subject, name: str, held: int | tuple[int, ...]) -> None:
    subject.skip_refused(name)
    holds = [held] * len(CONTEXTS) if isinstance(held, int) else held
    alone = [decoded(subject.model, [context], name, count)[0] for context, count in zip(CONTEXTS, holds, strict=True)]
    assert decoded(subject.model, CONTEXTS, name, holds) == alone


def test_different_presses_and_an_empty_cache_in_one_batch(subject: Subject) -> None:
    names = ["none", "pyramidkv", "key_rerotation:streaming_llm", "random"]
    if subject.untouched.config._attn_implementation == "sdpa":
        names.append("adakv:snapkv")
    caches = [cached(subject.model, CONTEXTS[2], 2, name) for name in names] + [subject.model.empty_cache(1)]
    contexts = [CONTEXTS[2]] * len(names) + [CONTEXTS[2][:2]]
    found = decoding.decode(
        subject.model,
        stack(caches),
        contexts,
        num_held_back=[2] * len(caches),
        max_new_tokens=NUM_NEW,
        sampler=GREEDY,
        stop_ids=frozenset(),
        stopped=lambda new: [False] * len(new),
    )
    assert found[:-1] == [decoded(subject.model, [CONTEXTS[2]], name, 2)[0] for name in names]
    assert found[-1] == generated(subject.untouched, CONTEXTS[2][:2])


def test_rows_with_and_without_a_held_back_token_do_not_mix(subject: Subject) -> None:
    """The latter would be predicted by their padding."""
    with pytest.raises(AssertionError, match="hold back nothing"):
        decoded(subject.model, CONTEXTS[:2], "none", (0, 1))


def test_decoding_leaves_the_cache_as_it_was(subject: Subject) -> None:
    cache = cached(subject.model, CONTEXTS[0], 1, "pyramidkv")
    before = [(la.keys.clone(), la.values.clone()) for la in cache.layers]
    turns = [
        decoding.decode(
            subject.model,
            cache,
            CONTEXTS[:1],
            num_held_back=[1],
            max_new_tokens=NUM_NEW,
            sampler=GREEDY,
            stop_ids=frozenset(),
            stopped=lambda new: [False],
        )
        for _ in range(2)
    ]
    assert turns[0] == turns[1]
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
    assert all(not attention._forward_pre_hooks for attention in subject.model.attentions)


@pytest.mark.parametrize("record", [None, lambda step: step], ids=["by modules", "static"])
def test_logits_that_are_not_finite_are_an_error_up_to_the_end_of_a_row(
    make_pressable: Callable[..., PressableModel], monkeypatch: pytest.MonkeyPatch, record: Any
) -> None:
    model, logits, num_steps = make_pressable(), PressableModel.logits, []

    def broken(self: PressableModel, hidden: Tensor, *rest: Any) -> Tensor:
        num_steps.append(1)
        found = logits(self, hidden, *rest)
        if len(num_steps) == 5:
            found[1, 9] = torch.nan
        return found

    monkeypatch.setattr(PressableModel, "logits", broken)
    options: dict[str, Any] = {"record": record, "stopped": lambda new: [False, new.shape[1] == 4]}
    assert len(decoded(model, CONTEXTS[:2], "knorm", **options)[1]) == 4, "what comes after a row's end is no answer"
    num_steps.clear()
    with pytest.raises(decoding.LogitsNotFiniteError) as caught:
        decoded(model, CONTEXTS[:2], "knorm", record=record)
    assert (caught.value.row, caught.value.num_tokens) == (1, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_half_precision_decodes_finite_logits(
    make_pressable: Callable[..., PressableModel], attn: str, dtype: torch.dtype
) -> None:
    model = make_pressable(attn, dtype=dtype)
    seen: list[Tensor] = []
    with model.model.embed_out.register_forward_hook(lambda *call: seen.append(call[2])):
        decoded(model, CONTEXTS, "snapkv", (1, 3, 2, 1, 3))
        if attn == "sdpa":
            decoded(model, CONTEXTS, "adakv:snapkv", 2)
    assert seen and all(logits.isfinite().all() for logits in seen)


@pytest.mark.parametrize("name", PRESSES)
def test_grouped_query_attention_decodes_as_one_by_one(
    make_pressable_llama: Callable[..., PressableModel], name: str
) -> None:
    model = make_pressable_llama()
    expected = [one_by_one_greedy(model, context, 2, name, NUM_NEW) for context in CONTEXTS]
    assert decoded(model, CONTEXTS, name, 2) == expected


# ---------------------------------------------------------------------------------------------- where a row ends


def test_a_stop_token_ends_its_own_row_and_is_part_of_it(subject: Subject) -> None:
    free = decoded(subject.model, CONTEXTS, "snapkv")
    stop = free[1][3]
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in free]
    assert len({len(row) for row in expected}) > 1, "the test needs rows that end at different steps"
    assert decoded(subject.model, CONTEXTS, "snapkv", stop_ids=frozenset({stop})) == expected
    assert decoded(subject.model, CONTEXTS[1:2], "snapkv", stop_ids=frozenset({stop, 500})) == expected[1:2]


def test_the_callback_sees_new_tokens_only_and_ends_rows(subject: Subject) -> None:
    free = decoded(subject.model, CONTEXTS, "snapkv")
    told: list[list[list[int]]] = []

    def after_its_own_number(new: Tensor) -> list[bool]:
        told.append(new.tolist())
        return [new.shape[1] == row + 2 for row in range(len(new))]  # true once: a row stays ended

    found = decoded(subject.model, CONTEXTS, "snapkv", stopped=after_its_own_number)
    assert found == [row[: place + 2] for place, row in enumerate(free)]
    assert [len(rows[0]) for rows in told] == list(range(1, len(CONTEXTS) + 2)), "nothing runs after the last row ended"
    for rows in told:
        for place, row in enumerate(rows):
            assert row[: place + 2] == free[place][: len(row[: place + 2])]


@pytest.mark.parametrize("num_new", [1, 2])
def test_no_more_tokens_and_forwards_than_asked_for(subject: Subject, num_new: int) -> None:
    forwards: list[int] = []
    with subject.model.attentions[0].register_forward_hook(lambda *_: forwards.append(1)):
        cache = cached(subject.model, CONTEXTS[0], 1, "snapkv")
        forwards.clear()
        found = decoding.decode(
            subject.model,
            cache,
            CONTEXTS[:1],
            num_held_back=[1],
            max_new_tokens=num_new,
            sampler=GREEDY,
            stop_ids=frozenset(),
            stopped=lambda new: [False],
        )
    assert [len(row) for row in found] == [num_new]
    assert len(forwards) == num_new


# ---------------------------------------------------------------------------------------------- processors


@pytest.mark.parametrize("penalty", [0.5, 1.5])
def test_a_repetition_penalty_is_that_of_generate_in_any_batch(subject: Subject, penalty: float) -> None:
    """Contexts of other lengths pad the ids that the penalty looks at: padding must not be penalized."""
    expected = [generated(subject.untouched, context, repetition_penalty=penalty) for context in CONTEXTS]
    assert expected != [generated(subject.untouched, context) for context in CONTEXTS]
    sampler = Sampler(LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)]))
    assert decoded(subject.model, CONTEXTS, "none", sampler=sampler) == expected
    alone = [decoded(subject.model, [context], "snapkv", sampler=sampler)[0] for context in CONTEXTS]
    assert decoded(subject.model, CONTEXTS, "snapkv", sampler=sampler) == alone


def test_sampled_tokens_of_a_batch_follow_the_softmax(
    make_neox: Callable[..., GPTNeoXForCausalLM], make_pressable: Callable[..., PressableModel]
) -> None:
    """Chi-square, through the whole of decode: 4,000 rows of one compressed context over a vocabulary of 12."""
    num_rows, shape = 4000, {"vocab_size": 12, "seed": 2}
    model, reference = make_pressable(**shape), NeoxReference(make_neox(**shape))
    context = [place % 12 for place in range(24)]
    hidden = torch.zeros(3, 4, 23, dtype=torch.bool)
    hidden[..., 4 : 4 + 12] = (
        True  # tokens repeat here; StreamingLLM keeps 4 sinks and the last 7 of 23 whatever they are
    )
    evicted = Evicted(hidden, 23)
    uniforms = torch.rand(num_rows, 2, generator=torch.Generator().manual_seed(0))
    found = torch.tensor(
        decoding.decode(
            model,
            cached(model, context, 1, "streaming_llm").select([0] * num_rows),
            [context] * num_rows,
            num_held_back=[1] * num_rows,
            max_new_tokens=2,
            sampler=Sampler(LogitsProcessorList([TemperatureLogitsWarper(2.0)]), uniforms),
            stop_ids=frozenset(),
            stopped=lambda new: [False] * len(new),
        )
    )
    first = torch.tensor(probabilities(reference.logits(torch.tensor(context), evicted, 23)[-1], 2.0))
    assert chi_square(found[:, 0], first) < 40  # 11 degrees of freedom: exceeded once in 30,000 runs
    common = int(found[:, 0].mode().values)
    after = torch.tensor(probabilities(reference.logits(torch.tensor([*context, common]), evicted, 23)[-1], 2.0))
    assert chi_square(found[found[:, 0] == common, 1], after) < 40
    assert chi_square(found[:, 0], after) > 200, "the two steps must differ for the test to see anything"


def chi_square(drawn: Tensor, expected: Tensor) -> float:
    counts = drawn.bincount(minlength=len(expected)).double()
    wanted = expected * len(drawn)
    return ((counts - wanted).square() / wanted).sum().item()


@pytest.mark.parametrize("warpers", [(), (TemperatureLogitsWarper(1.7), TopKLogitsWarper(20), TopPLogitsWarper(0.9))])
def test_a_row_draws_the_same_tokens_in_every_batch(subject: Subject, warpers: Sequence[Any]) -> None:
    processors = LogitsProcessorList(warpers)
    uniforms = torch.rand(len(CONTEXTS), NUM_NEW, generator=torch.Generator().manual_seed(1))
    together = decoded(subject.model, CONTEXTS, "snapkv", sampler=Sampler(processors, uniforms))
    for place, context in enumerate(CONTEXTS):
        sampler = Sampler(processors, uniforms[place : place + 1])
        assert decoded(subject.model, [context], "snapkv", sampler=sampler)[0] == together[place]
    order = [3, 0, 4]
    some = decoded(
        subject.model, [CONTEXTS[place] for place in order], "snapkv", sampler=Sampler(processors, uniforms[order])
    )
    assert some == [together[place] for place in order]
    assert together != decoded(subject.model, CONTEXTS, "snapkv")


# ---------------------------------------------------------------------------------------------- faults are seen


def decoded_wrongly(
    subject: Subject, name: str, change: Callable[[CompressedCache], CompressedCache]
) -> list[list[int]]:
    """One held-back token, over caches that were tampered with."""
    return [
        decoding.decode(
            subject.model,
            change(cached(subject.model, context, 1, name)),
            [context],
            num_held_back=[1],
            max_new_tokens=NUM_NEW,
            sampler=GREEDY,
            stop_ids=frozenset(),
            stopped=lambda new: [False],
        )[0]
        for context in CONTEXTS
    ]


def expected_greedy(subject: Subject, name: str) -> list[list[int]]:
    return [
        subject.reference.greedy(context, NUM_NEW, kept_by_press(subject.model, context[:-1], name), len(context) - 1)
        for context in CONTEXTS
    ]


def test_fault_physical_positions(subject: Subject) -> None:
    def physical(cache: CompressedCache) -> CompressedCache:
        return dataclasses.replace(cache, next_position=(cache.layers[0].num_entries,))

    assert decoded_wrongly(subject, "snapkv", lambda cache: cache) == expected_greedy(subject, "snapkv")
    assert decoded_wrongly(subject, "snapkv", physical) != expected_greedy(subject, "snapkv")


def test_fault_last_prompt_token_fed_twice(subject: Subject) -> None:
    caches = iter([cached(subject.model, context, 0, "none") for context in CONTEXTS])
    assert decoded_wrongly(subject, "none", lambda _: next(caches)) != expected_greedy(subject, "none")


def test_fault_padding_of_a_ragged_batch_attended(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [decoded(subject.model, [context], "snapkv")[0] for context in CONTEXTS]
    assert decoded(subject.model, CONTEXTS, "snapkv") == alone
    monkeypatch.setattr(decode_state, "decoding_bias", lambda *_: None)
    assert decoded(subject.model, CONTEXTS, "snapkv") != alone
