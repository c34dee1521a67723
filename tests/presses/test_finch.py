"""FINCH without a delimiter token keeps what kvpress keeps with one, by the attention that the question pays."""

from __future__ import annotations

from collections.abc import Callable

import kvpress
import pytest
import references
import torch
from conftest import tiny_llama
from references import LlamaReference, NeoxReference, distinct_tokens, kept_by_press, largest_difference
from transformers import DynamicCache, PreTrainedModel

from lm_eval_kvpress.engine import scoring
from lm_eval_kvpress.engine.prefill import prefill
from lm_eval_kvpress.engine.scoring import Pack
from lm_eval_kvpress.models.architectures import present
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.parse import parse_press
from lm_eval_kvpress.presses.spec import PressSpec
from lm_eval_kvpress.verify import dense_reference
from lm_eval_kvpress.verify.kept import evicted_entries, full_cache

DELIMITER = 210
TOKENS = distinct_tokens(75, DELIMITER, 5)
CONTEXT, QUESTION, ANSWER = TOKENS[:50], TOKENS[50:59], TOKENS[59:]
PROMPT = [*CONTEXT, *QUESTION]


def finch(ratio: float, **arguments: bool) -> PressSpec:
    return parse_press("finch", {"compression_ratio": ratio, **arguments}).for_question(len(QUESTION))


def by_kvpress(model: PreTrainedModel, ratio: float, **arguments: bool) -> DynamicCache:
    """kvpress's class as its evaluation has it, the delimiter between context and question."""
    press, cache = kvpress.FinchPress(ratio, **arguments), DynamicCache()
    press.delimiter_token_id = DELIMITER
    with torch.inference_mode(), press(model):
        model.model(torch.tensor([[*CONTEXT, DELIMITER, *QUESTION]]), past_key_values=cache)
    assert ratio == 0 or press.window_size == len(QUESTION)
    return cache


@pytest.mark.parametrize("ratio", [0, 0.5, 0.8])
@pytest.mark.parametrize("arguments", [{}, {"rerotate_keys": False}, {"normalize_scores": False}], ids=str)
def test_kept_entries_are_those_of_kvpress_with_its_delimiter(ratio: float, arguments: dict[str, bool]) -> None:
    theirs, spec = by_kvpress(tiny_llama(), ratio, **arguments), finch(ratio, **arguments)
    ours = prefill(present(tiny_llama()), torch.tensor([PROMPT]), spec.build(len(PROMPT)), rerotates=spec.rerotates)
    kept = int(len(PROMPT) * (1 - ratio))
    assert ours.next_position == ((kept if arguments.get("rerotate_keys", True) else len(PROMPT)),)
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        assert one.num_entries == kept
        torch.testing.assert_close(one.keys, other.keys, rtol=0, atol=1e-6)
        torch.testing.assert_close(one.values, other.values, rtol=0, atol=1e-6)


def test_the_context_stays_by_the_attention_of_the_question() -> None:
    """The paper's rule, spelt out on the weights of the untouched model; all of the question stays."""
    model, spec = tiny_llama(), finch(0.5, rerotate_keys=False)
    cache = prefill(present(tiny_llama()), torch.tensor([PROMPT]), spec.build(len(PROMPT)))
    full, num_chosen = full_cache(model, PROMPT), int(len(PROMPT) * 0.5) - len(QUESTION)
    for layer, entries, inside in zip(cache.layers, full.layers, dense_reference.attended(model, PROMPT), strict=True):
        seen_before = torch.arange(len(CONTEXT), len(PROMPT))  # tokens that a query could have attended to
        paid = inside.weights[:, len(CONTEXT) :, : len(CONTEXT)] * seen_before[None, :, None]  # (H, Q, C)
        by_group = paid.mean(dim=1).unflatten(0, (inside.keys.shape[0], -1)).mean(dim=1)  # (G, C)
        evicted = evicted_entries(layer, entries.keys[0], entries.values[0])
        assert not evicted[:, len(CONTEXT) :].any()
        for head, chosen in enumerate(by_group.topk(num_chosen).indices):
            assert set((~evicted[head, : len(CONTEXT)]).nonzero()[:, 0].tolist()) == set(chosen.tolist())


@pytest.mark.parametrize("rerotates", [True, False])
@pytest.mark.parametrize("make", ["make_pressable", "make_pressable_llama"])
def test_scores_equal_a_dense_forward_that_hides_the_evicted_entries(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, make: str, rerotates: bool
) -> None:
    build: Callable[..., PressableModel] = request.getfixturevalue(make)
    model, spec, fed = build(), finch(0.5, rerotate_keys=rerotates), ANSWER[:2]
    reference = (
        LlamaReference(model.model) if make.endswith("llama") else NeoxReference(request.getfixturevalue("make_neox")())
    )
    monkeypatch.setitem(references.PRESSES, "finch", lambda: spec.build(len(PROMPT)))
    monkeypatch.setattr(references, "REROTATES", {"finch"} if rerotates else set())
    evicted = kept_by_press(model, PROMPT, "finch")
    cache = prefill(model, torch.tensor([PROMPT]), spec.build(len(PROMPT)), rerotates=spec.rerotates)
    ((branch,),) = scoring.score(model, cache, [Pack(tuple(fed), (tuple(ANSWER[2:]),))])
    expected = reference.token_logprobs([*PROMPT, *fed], ANSWER[2:], evicted, len(PROMPT))
    assert largest_difference(branch.logprobs, expected) < 2e-5
    plain = reference.token_logprobs([*PROMPT, *fed], ANSWER[2:], None, len(PROMPT))
    assert largest_difference(branch.logprobs, plain) > 1e-2


def test_a_press_as_such_has_no_question() -> None:
    spec = parse_press("finch")
    assert spec.reads_question and spec.min_context() == 2
    assert spec.for_question(9).min_context() == 10
    assert spec == parse_press(spec.name, spec.arguments)
    assert parse_press("knorm").for_question(9) == parse_press("knorm")
    (note,) = finch(0.9).notes(len(PROMPT), 3)
    assert note.startswith("finch keeps fewer tokens than window_size")
