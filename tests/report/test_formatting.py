"""Values as a person reads them."""

from __future__ import annotations

import math

import pytest

from lm_eval_kvpress.report.differences import Difference
from lm_eval_kvpress.report.formatting import Kind, Value, first_names, format_interval, format_signed, format_value


@pytest.mark.parametrize(
    "value, kind, text",
    [
        (None, Kind.METRIC, "-"),
        ("", Kind.TEXT, "-"),
        (math.nan, Kind.BYTES, "NaN"),
        (-math.inf, Kind.METRIC, "-∞"),
        (0.4567, Kind.SHARE, "45.7 %"),
        (512.0, Kind.BYTES, "512 B"),
        (3 * 2**20, Kind.BYTES, "3.00 MiB"),
        (0.0254, Kind.SECONDS, "25.4 ms"),
        (2.5, Kind.SECONDS, "2.50 s"),
        (66.81, Kind.RATE, "66.8"),
        (2670.4, Kind.RATE, "2,670"),
        (12345.0, Kind.COUNT, "12,345"),
        (0.12345, Kind.METRIC, "0.123"),
        (43.578, Kind.METRIC, "43.58"),
        (12345.678, Kind.METRIC, "12,346"),
        (1.5e9, Kind.METRIC, "1.50e+09"),
        (0.0, Kind.METRIC, "0.000"),
        (0.0005, Kind.METRIC, "0.001"),
        (0.000234, Kind.METRIC, "2.3e-04"),
        (-2e-8, Kind.METRIC, "-2.0e-08"),
        (0.0, Kind.SHARE, "0.0 %"),
        (1.0, Kind.SHARE, "100.0 %"),
        (0.9996, Kind.SHARE, "99.96 %"),
        (0.99998, Kind.SHARE, "99.998 %"),
        (0.0004, Kind.SHARE, "0.04 %"),
        (1 - 2**-50, Kind.SHARE, "100.0 %"),
        (1.01, Kind.SHARE, "101.0 %"),
    ],
)
def test_a_value_has_its_unit(value: Value, kind: Kind, text: str) -> None:
    assert format_value(value, kind) == text


@pytest.mark.parametrize("value, text", [(0.5, "+0.500"), (-0.5, "−0.500"), (0.0, "0.000"), (-0.0001, "0.000")])
def test_a_difference_has_its_sign_unless_it_is_shown_as_zero(value: float, text: str) -> None:
    assert format_signed(value) == text


def test_an_interval_is_in_brackets_and_nothing_where_there_is_none() -> None:
    assert format_interval(Difference(-0.5, -0.75, 0.25)) == "[−0.750, +0.250]"
    assert format_interval(Difference(-0.5)) == ""


def test_of_many_names_the_first_are_listed() -> None:
    assert first_names(list("abcde")) == "a, b, c, d, e"
    assert first_names(list("abcdefg")) == "a, b, c, d, e and 2 more"
