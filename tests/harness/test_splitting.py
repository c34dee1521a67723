"""``query_aware=false``: the question is held out of compression, wherever it stands, and what is not found is said."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval_requests import ours, text

from lm_eval_kvpress.engine.contexts import Context
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness import tokenization
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.harness.requests import generation_batches, likelihood_batches, rolling_batches

QUESTION = "\nQuestion: which bird sleeps near the mill?\nAnswer:"
LONG = text(0, 120)


def prompts(*texts: str, task: str = "t", **document: Any) -> list[Instance]:
    generation = {"until": [], "max_gen_toks": 4, "do_sample": False}
    return [
        Instance("generate_until", document, (one, dict(generation)), 0, (task, index, 1))
        for index, one in enumerate(texts)
    ]


def agnostic(checkpoint_dir: Path, **arguments: Any) -> KVPress:
    given = {"press": "knorm", "query_aware": False, "question_pattern": "Question:", **arguments}
    return ours(checkpoint_dir, **{name: value for name, value in given.items() if value is not None})


def contexts(lm: KVPress, requests: Sequence[Instance]) -> list[Context]:
    """In the order of the requests; what was found while they were made goes to the totals, as with the answers."""
    (batches,) = generation_batches(lm, lm.session, requests)
    for task, counts in batches._found.items():
        lm.session.totals[task].merge(counts)
    found = {batches._members[item]: batches._prompt(item).context for item in range(len(requests))}
    return [found[index] for index in range(len(requests))]


@pytest.mark.parametrize("has_offsets", [True, False])
@pytest.mark.parametrize(
    ("prompt", "before"),
    [
        (f"{LONG}{QUESTION}", f"{LONG}\n"),
        (f"{LONG}{QUESTION} grey geese\n\n{LONG}{QUESTION}", f"{LONG}{QUESTION} grey geese\n\n{LONG}\n"),  # a few-shot
        (f"<|user|>{LONG}{QUESTION}<|end|><|assistant|>It is", f"<|user|>{LONG}\n"),  # a chat, and gen_prefix
        (f"{LONG}\n\n{QUESTION}", f"{LONG}\n\n\n"),  # white space that other tokens hold where a text ends with it
        (f"Ça va très bien — 日本語 🦆{QUESTION} über 🦆?", "Ça va très bien — 日本語 🦆\n"),
    ],
)
def test_the_last_question_and_all_after_it_are_held_back(
    checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch, prompt: str, before: str, has_offsets: bool
) -> None:
    lm = agnostic(checkpoint_dir)
    if not has_offsets:
        monkeypatch.setattr(tokenization, "_offsets", lambda *_: [])
    (context,) = contexts(lm, prompts(prompt))
    assert list(context.tokens) == lm.tok_encode(prompt)
    assert lm.tok_decode(list(context.compressed)) == before
    assert lm.tok_decode(list(context.held_back)) == prompt[len(before) :]
    assert lm.session.totals["t"].num_questions_inside_tokens == 0


def test_a_question_that_begins_inside_a_token_takes_the_token_with_it(checkpoint_dir: Path) -> None:
    lm, prompt = agnostic(checkpoint_dir, question_pattern="eese"), f"{LONG} grey geese"
    assert lm.tok_decode(lm.tok_encode(prompt)[-1:]) == " geese"
    (context,) = contexts(lm, prompts(prompt))
    assert list(context.tokens) == lm.tok_encode(prompt)
    assert lm.tok_decode(list(context.compressed)) == f"{LONG} grey"
    assert lm.session.totals["t"].summary()["num_questions_inside_tokens"] == 1


@pytest.mark.parametrize("pattern", [r"\s+Question", r"\n\n Q"])
def test_white_space_may_begin_a_question(checkpoint_dir: Path, pattern: str) -> None:
    """Offsets leave white space out, and it may belong to the token before."""
    lm, prompt = agnostic(checkpoint_dir, question_pattern=pattern), f"{LONG}.\n\n\n Question: which?"
    (context,) = contexts(lm, prompts(prompt))
    start = prompt.index({r"\s+Question": "\n\n\n", r"\n\n Q": "\n\n Q"}[pattern])
    assert prompt[:start].startswith(lm.tok_decode(list(context.compressed)))


def test_half_a_character_never_ends_a_context(checkpoint_dir: Path) -> None:
    """Byte-level tokens of one character share its offsets."""
    lm = agnostic(checkpoint_dir, question_pattern="語")
    (context,) = contexts(lm, prompts(f"{LONG} 日本語?"))
    assert lm.tok_decode(list(context.compressed)) == f"{LONG} 日本"


def test_a_field_of_the_document_is_the_question(checkpoint_dir: Path) -> None:
    lm = agnostic(checkpoint_dir, question_pattern=None, question_field="q")
    question = "which bird is it?"
    (context,) = contexts(lm, prompts(f"{question} yes\n\n{LONG}\n{question} ", q=f" {question}\n"))
    assert lm.tok_decode(list(context.compressed)) == f"{question} yes\n\n{LONG}\n"
    with pytest.raises(UsageError, match="question_field=q: a document has the fields other"):
        contexts(lm, prompts(LONG, other=""))
    with pytest.raises(UsageError, match="question_field=q is no text, but int"):
        contexts(lm, prompts(LONG, q=3))


def test_a_prompt_without_a_question_is_counted_and_named(
    checkpoint_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lm = agnostic(checkpoint_dir)
    with caplog.at_level(logging.WARNING, "lm_eval_kvpress"):
        lm.generate_until(prompts(f"{LONG}{QUESTION}", LONG, QUESTION.strip(), f"{LONG} {QUESTION}"), disable_tqdm=True)
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("t: 1 of 4 prompts hold no question (pattern 'Question:')") and "(documents 1)" in first
    assert second.startswith("t: in 1 of 4 prompts nothing stands before the question") and "(documents 2)" in second
    facts = lm.describe()["tasks"]["t"]
    num_tokens = len(lm.tok_encode(QUESTION.strip()))
    assert facts["num_prompts_without_question"] == facts["num_prompts_without_context"] == 1
    assert facts["tokens_held_back"] == {"least": 1, "median": num_tokens, "most": num_tokens}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ((LONG, LONG + " a"), "none of the 2 prompts of 't' has a question .pattern 'Question:'. after a context; the"),
        ((QUESTION.strip(),), "nothing stands before the question .pattern 'Question:'. in the 1 prompts of 't'"),
    ],
)
def test_a_task_without_any_question_ends_the_run(checkpoint_dir: Path, texts: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        agnostic(checkpoint_dir).generate_until(prompts(*texts), disable_tqdm=True)
    assert "\n" not in str(raised.value)


def test_choices_are_scored_after_the_question(checkpoint_dir: Path) -> None:
    """Likelihoods: held back is what stands after the context, and the spaces at its end are the continuation's."""
    lm = agnostic(checkpoint_dir)
    requests = [
        Instance("loglikelihood", {}, (f"{LONG}{QUESTION}  ", word), index, ("t", 0, 1))
        for index, word in enumerate(("geese", "mill"))
    ]
    batches = likelihood_batches(lm, lm.session, requests)
    (context,) = batches.contexts([0])
    assert lm.tok_decode(list(context.compressed)) == f"{LONG}\n"
    assert lm.tok_decode(list(context.held_back)) == QUESTION.removeprefix("\n")
    one_by_one = [agnostic(checkpoint_dir).loglikelihood([request], disable_tqdm=True)[0] for request in requests]
    for (score, greedy), (other, other_greedy) in zip(
        lm.loglikelihood(requests, disable_tqdm=True), one_by_one, strict=True
    ):
        assert score == pytest.approx(other, abs=1e-4) and greedy == other_greedy


@pytest.mark.parametrize(
    ("request_type", "num_questions"),
    [("generate_until", 1), ("generate_until", 4), ("generate_until", 16), ("loglikelihood", 4)],
)
def test_questions_on_one_context_share_its_compressed_cache(
    checkpoint_dir: Path, request_type: str, num_questions: int
) -> None:
    """Whatever the batches: the context is prefilled once, and the answers are those of each question alone."""
    asked = [f"{LONG}{QUESTION} {text(7 * index, 1 + index % 3)}" for index in range(num_questions)]
    asked.insert(num_questions // 2, f"{text(5, 140)}{QUESTION}")
    requests = prompts(*asked)
    if request_type == "loglikelihood":
        requests = [
            Instance(request_type, {}, (request.args[0], " geese slept"), 0, ("t", index, 1))
            for index, request in enumerate(requests)
        ]

    apart = agnostic(checkpoint_dir, press="random")
    alone = [getattr(apart, request_type)([request], disable_tqdm=True)[0] for request in requests]
    for batch_size in (1, 3):
        lm = agnostic(checkpoint_dir, batch_size=batch_size, press="random")
        together = getattr(lm, request_type)(requests, disable_tqdm=True)
        if request_type == "loglikelihood":
            assert [score for score, _ in together] == pytest.approx([score for score, _ in alone], abs=1e-4)
        else:
            assert together == alone
        num_tokens = len(lm.tok_encode(f"{LONG}\n")) + len(lm.tok_encode(f"{text(5, 140)}\n"))
        batches = lm.session.runner.meter.records.batches
        assert sum(batch.num_prefill_tokens for batch in batches) == num_tokens
        facts = lm.describe()["tasks"]["t"]["contexts_pressed"]
        assert (facts["num_contexts"], facts["num_tokens"]) == (2, num_tokens)


def test_prompts_that_are_cut_keep_their_question(checkpoint_dir: Path) -> None:
    lm = agnostic(checkpoint_dir, max_length=64)
    (context,) = contexts(lm, prompts(f"{text(0, 400)}{QUESTION}"))
    assert len(context) == 60
    assert lm.tok_decode(list(context.held_back)) == QUESTION.removeprefix("\n")
    (short,) = contexts(agnostic(checkpoint_dir, max_length=12), prompts(f"{LONG}{QUESTION}"))
    assert short.compressed == ()


def test_query_aware_holds_back_query_tokens_as_before(checkpoint_dir: Path) -> None:
    lm = ours(checkpoint_dir, press="knorm", query_tokens=3)
    (context,) = contexts(lm, prompts(f"{LONG}{QUESTION}"))
    assert (context.num_held_back, context.is_shared) == (3, False)
    assert lm.describe()["protocol"]["query_aware"] is True
    protocol = agnostic(checkpoint_dir).describe()["protocol"]
    assert (protocol["query_aware"], protocol["question_pattern"]) == (False, "Question:")


def test_whole_documents_are_scored_as_under_query_aware(checkpoint_dir: Path) -> None:
    """No scored token of a window is ever in what is compressed."""
    request = Instance("loglikelihood_rolling", {}, (f"{LONG}{QUESTION}",), 0, ("rolling", 0, 1))
    found = [
        rolling_batches(lm, lm.session, [request]).contexts(range(1, 2))
        for lm in (
            agnostic(checkpoint_dir, rolling_context=32, rolling_score=32),
            ours(checkpoint_dir, press="knorm", rolling_context=32, rolling_score=32),
        )
    ]
    assert found[0] == found[1] and found[0][0].num_held_back == 1


# ---------------------------------------------------------------------------------- a press that reads the question


def reading(checkpoint_dir: Path, **arguments: Any) -> KVPress:
    return ours(checkpoint_dir, **{"press": "finch", "question_pattern": "Question:", **arguments})


@pytest.mark.parametrize("num_fed", [0, 1, 3])
def test_the_question_ends_what_is_compressed(checkpoint_dir: Path, num_fed: int) -> None:
    lm, prompt = reading(checkpoint_dir, query_tokens=num_fed), f"{LONG}{QUESTION} a\n\n{LONG}{QUESTION}"
    (context,) = contexts(lm, prompts(prompt))
    assert list(context.tokens) == lm.tok_encode(prompt) and len(context.held_back) == num_fed
    question = context.compressed[len(context.compressed) - context.num_question :]
    assert lm.tok_decode([*question, *context.held_back]) == QUESTION.removeprefix("\n")
    assert not context.is_shared


def test_prompts_without_a_question_are_left_whole_and_named(
    checkpoint_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lm = reading(checkpoint_dir)
    with caplog.at_level(logging.WARNING, "lm_eval_kvpress"):
        lm.generate_until(prompts(f"{LONG}{QUESTION}", LONG, QUESTION.strip()), disable_tqdm=True)
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("t: 1 of 3 prompts hold no question") and "nothing is compressed of them" in first
    assert second.startswith("t: in 1 of 3 prompts nothing stands before the question")
    facts, num_tokens = lm.describe()["tasks"]["t"], len(lm.tok_encode(QUESTION.strip())) - 1
    assert facts["tokens_of_question"] == {"least": num_tokens, "median": num_tokens, "most": num_tokens}
    assert (facts["contexts_pressed"]["num_contexts"], facts["contexts_unpressed"]["num_contexts"]) == (1, 2)
    assert agnostic(checkpoint_dir).describe()["tasks"] == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"question_pattern": "never"}, "press=finch: none of the 1 prompts of 't' has a question"),
        ({"query_tokens": 40}, "press=finch scores contexts by questions, and query_tokens=40 hold back all of each"),
        ({"question_pattern": None}, "press=finch: where the question of task 't' begins is not known"),
    ],
)
def test_a_press_that_finds_no_question_ends_the_run(
    checkpoint_dir: Path, arguments: dict[str, Any], message: str
) -> None:
    lm = reading(checkpoint_dir, **arguments)
    with pytest.raises(UsageError, match=message) as raised:
        lm.generate_until(prompts(f"{LONG}{QUESTION}"), disable_tqdm=True)
    assert "\n" not in str(raised.value)


def test_what_asks_nothing_is_refused_under_such_a_press(checkpoint_dir: Path) -> None:
    lm = reading(checkpoint_dir)
    with pytest.raises(UsageError, match="documents of loglikelihood_rolling have none"):
        lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (LONG,), 0, ("r", 0, 1))], disable_tqdm=True)
    with pytest.raises(UsageError, match="token ids have none"):
        lm._loglikelihood_tokens([(("", ""), [1, 2], [3])], disable_tqdm=True)
    with pytest.raises(UsageError, match="which query_aware=false holds back"):
        reading(checkpoint_dir, query_aware=False)


def test_ratio_zero_answers_as_without_a_press(checkpoint_dir: Path) -> None:
    requests = prompts(*(f"{text(start, 80)}{QUESTION}" for start in (0, 3, 9)))
    choices = [Instance("loglikelihood", {}, (request.args[0], " geese"), 0, ("c", 0, 1)) for request in requests]
    plain, pressed = ours(checkpoint_dir, batch_size=2), reading(checkpoint_dir, compression_ratio=0, batch_size=2)
    assert pressed.generate_until(requests, disable_tqdm=True) == plain.generate_until(requests, disable_tqdm=True)
    both = (lm.loglikelihood(choices, disable_tqdm=True) for lm in (plain, pressed))
    for (one, _), (other, _) in zip(*both, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
