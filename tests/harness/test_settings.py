"""Values derived from the settings."""

from __future__ import annotations

import pytest

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.arguments import parse_arguments


@pytest.mark.parametrize(
    ("given", "window"),
    [
        ({}, (256, 256)),
        ({"rolling_context": 384}, (384, 128)),
        ({"rolling_score": 500}, (12, 500)),
        ({"rolling_context": 100, "rolling_score": 30}, (100, 30)),
    ],
)
def test_rolling_windows_default_to_halves(given: dict[str, int], window: tuple[int, int]) -> None:
    assert parse_arguments(given)[0].rolling_window(512) == window


@pytest.mark.parametrize(
    ("given", "window"),
    [
        ({}, (1_024, 1_024)),
        ({"rolling_context": 16_384}, (16_384, 1_024)),
        ({"rolling_score": 32_000}, (768, 32_000)),
        ({"query_tokens": 2_000}, (2_001, 1_024)),
    ],
)
def test_rolling_windows_of_long_models_are_no_longer_than_documents(
    given: dict[str, int], window: tuple[int, int]
) -> None:
    assert parse_arguments(given)[0].rolling_window(32_768) == window


def test_the_default_context_is_longer_than_what_is_held_back() -> None:
    assert parse_arguments({"query_tokens": 32})[0].rolling_window(64) == (33, 31)
    with pytest.raises(UsageError, match="leaves nothing to compress"):
        parse_arguments({"query_tokens": 64})[0].rolling_window(64)


@pytest.mark.parametrize("given", [{"rolling_context": 400, "rolling_score": 200}, {"rolling_context": 512}])
def test_rolling_windows_over_max_length_are_refused(given: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="max_length=512"):
        parse_arguments(given)[0].rolling_window(512)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"question_pattern": "Question:", "question_field": "q"}, "both say where the question begins"),
        ({"question_pattern": "Q(uestion"}, r"question_pattern=Q\(uestion is no regular expression"),
        ({"question_pattern": "(Question:)?"}, "is found everywhere, also where there is no text"),
        ({"question_pattern": "$"}, "is found everywhere"),
        ({"question_pattern": ""}, "question_pattern= is empty"),
        ({"query_tokens": 0}, "query_tokens=0 feeds nothing after compression"),
        ({"press": "finch"}, "press=finch scores the context by the question"),
    ],
)
def test_what_does_not_say_where_the_question_begins_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        parse_arguments({"query_aware": False, **given})
    assert "\n" not in str(raised.value)


def test_a_question_is_asked_for_by_what_needs_it() -> None:
    with pytest.raises(UsageError, match="belong to query_aware=false and to press=finch: neither is asked for"):
        parse_arguments({"question_pattern": "Question:"})
    for given, needed_by in (
        ({"query_aware": False}, "query_aware=false"),
        ({"query_aware": True}, ""),  # as in a sweep over both
        ({"press": "finch"}, "press=finch"),
    ):
        settings, _ = parse_arguments({"question_pattern": "(?=Question:)", **given})
        assert settings.question_needed_by == needed_by
