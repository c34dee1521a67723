"""Laws of the recall documents."""

import random
from itertools import pairwise

import pytest

from lm_eval_kvpress.recall import (
    KINDS,
    NUM_CHOICES,
    WORDS,
    RecallDocument,
    count_by_characters,
    generated_filler,
    recall_document,
    recall_documents,
    sample_facts,
    scatter,
)

DISTANCES = (48, 64, 128, 512, 1500, 1800)


def sample() -> list[RecallDocument]:
    return recall_documents(7, per_cell=6, distances=DISTANCES, kinds=KINDS)


def test_same_seed_gives_the_same_document() -> None:
    assert sample() == sample()
    assert recall_document(1, distance=128, kind="key") != recall_document(2, distance=128, kind="key")


def test_asked_fact_stands_exactly_once_and_before_the_question() -> None:
    for document in sample():
        assert document.context.count(document.fact) == 1
        assert document.question not in document.context
        assert "Question" not in document.context
        assert document.question.endswith("Answer:")


def test_choices_are_distinct_and_hold_the_answer_of_the_asked_fact() -> None:
    for document in sample():
        assert len(set(document.choices)) == NUM_CHOICES
        assert all(choice.startswith(" ") for choice in document.choices)
        assert document.fact.endswith(f"is{document.choices[document.answer]}.")


def test_every_choice_is_stated_in_the_context() -> None:
    """Knowing which values occur in the text must not be enough to answer."""
    for document in sample():
        for choice in document.choices:
            assert f" is{choice}." in document.context, (choice, document.context)


def test_question_names_the_subject_of_the_fact() -> None:
    for document in sample():
        asked = document.question.split("What is the ")[1].split("?")[0]
        assert document.fact.startswith(f"The {asked} is ")


def test_distance_is_near_what_was_asked_for() -> None:
    for wanted in DISTANCES:
        for kind in KINDS:
            for seed in range(10):
                document = recall_document(seed, distance=wanted, kind=kind)
                tail = document.context.split(document.fact)[1]
                assert document.distance == count_by_characters(tail)
                assert abs(document.distance - wanted) <= max(24, wanted // 10), (wanted, document.distance)


def test_context_and_question_fit_2048_tokens_at_1800() -> None:
    for document in recall_documents(3, per_cell=20, distances=(1800,), kinds=KINDS):
        assert count_by_characters(document.context + document.question) < 2040


def test_counter_and_filler_of_the_caller_are_used() -> None:
    def words(text: str) -> int:
        return len(text.split())

    def dull(rng: random.Random, num_tokens: int) -> str:
        return " ".join(["Dull prose."] * (num_tokens // 2))

    document = recall_document(5, distance=200, kind="word", filler=dull, count_tokens=words)
    assert document.context.count("Dull prose.") > 80
    assert abs(document.distance - 200) <= 4


def test_answers_do_not_favour_a_position() -> None:
    """Chance is one in four for a scorer that always picks the same choice."""
    documents = recall_documents(0, per_cell=250, distances=(64,), kinds=KINDS)
    answers = [document.answer for document in documents]
    for index in range(NUM_CHOICES):
        assert abs(answers.count(index) / len(answers) - 0.25) < 0.05


def test_generated_filler_holds_no_answer_and_has_its_length() -> None:
    text = generated_filler(random.Random(0), 20_000)
    assert abs(count_by_characters(text) - 20_000) < 600
    words = set(text.replace(".", " ").replace(",", " ").split())
    assert not words & {word for group in WORDS.values() for word in group}
    assert not any(character.isdigit() for character in text)


def test_scatter_keeps_statements_in_order_and_prose_whole() -> None:
    filler = "One came. Two went! Three stayed? Four"
    result = scatter(random.Random(3), filler, ["A is b.", "C is d.", "E is f."])
    places = [result.index(statement) for statement in ("A is b.", "C is d.", "E is f.")]
    assert all(before < after for before, after in pairwise(places))
    for statement in ("A is b.", "C is d.", "E is f."):
        result = result.replace(statement, "")
    assert result.split() == filler.split()


@pytest.mark.parametrize(
    ("distance", "kind", "message"), [(100, "colour", "unknown kind"), (20, "word", "at least 48")]
)
def test_bad_arguments_are_named(distance: int, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recall_document(0, distance=distance, kind=kind)


def test_sampled_facts_differ_in_subject_and_value() -> None:
    taken: set[str] = set()
    facts = sample_facts(random.Random(1), "word", 8, taken)
    assert len({fact.subject for fact in facts}) == len({fact.value for fact in facts}) == len(taken) == 8
