"""One value against its type and range."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from lm_eval_kvpress.presses.values import ANY_NUMBER, Range, parse_value

FRACTION = Range(low=0, high=1, excludes_high=True)


@pytest.mark.parametrize(
    ("kind", "typed", "value"),
    [
        (int, "8", 8),
        (int, 8.0, 8),
        (int, 2**60 + 1, 2**60 + 1),
        (float, 1, 1.0),
        (float, "1e-3", 1e-3),
        (bool, True, True),
        (str, "cpu", "cpu"),
        (int | None, "None", None),
        (int | None, None, None),
        (int | None, "3", 3),
        (int | Literal["auto"], "auto", "auto"),
        (int | Literal["auto"], "16", 16),
        (Literal["a", "b"], "b", "b"),
        (list[float], "0.1+0.5", (0.1, 0.5)),
        (list[float], 0.5, (0.5,)),
        (list[int], [1, "2"], (1, 2)),
    ],
)
def test_values_get_the_type_of_their_argument(kind: Any, typed: Any, value: Any) -> None:
    parsed = parse_value("x", kind, typed)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ("kind", "typed", "allowed", "says"),
    [
        (int, "8.5", ANY_NUMBER, "x=8.5 must be a whole number"),
        (int, True, ANY_NUMBER, "x=True must be a whole number"),
        (float, "half", ANY_NUMBER, "x=half must be a number"),
        (float, float("nan"), ANY_NUMBER, "x=nan must be a number"),
        (float, None, ANY_NUMBER, "x=None must be a number"),
        (str, 3, ANY_NUMBER, "x=3 must be text"),
        (bool, "yes", ANY_NUMBER, "x=yes must be true or false"),
        (Literal["a", "b"], "c", ANY_NUMBER, "x=c is not known: choose one of a, b"),
        (int | Literal["auto"], "car", ANY_NUMBER, "x=car must be a whole number"),
        (list[float], "0.1+2", FRACTION, "x=2 must be at least 0 and below 1"),
        (list[float], [], ANY_NUMBER, "x must be at least one number"),
        (float, 1, FRACTION, "x=1 must be at least 0 and below 1"),
        (float, 0, Range(low=0, high=1, excludes_low=True), "x=0 must be above 0 and at most 1"),
        (int, -1, Range(low=0), "x=-1 must be at least 0"),
        (int, 4, Range(low=1, is_odd=True), "x=4 must be odd"),
        (float, 2, Range(0, 1, meaning=": it is a share"), "x=2 must be at least 0 and at most 1: it is a share"),
    ],
)
def test_bad_values_are_named_with_what_is_allowed(kind: Any, typed: Any, allowed: Range, says: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_value("x", kind, typed, allowed)
    assert str(caught.value) == says


def test_lists_are_split_at_the_separator_of_the_caller() -> None:
    assert parse_value("x", list[float], "0.1,0.5", separator=",") == (0.1, 0.5)
