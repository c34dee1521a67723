"""A check passes if every measurement keeps its limit, and its figures are those of the worst one."""

from __future__ import annotations

import math

import pytest

from lm_eval_kvpress.verify.check import Check, Part
from lm_eval_kvpress.verify.command import line


@pytest.mark.parametrize(
    ("part", "passed"),
    [
        (Part("", 1.0, 1.0), True),
        (Part("", 1.1, 1.0), False),
        (Part("", 0.0, 0.0), True),
        (Part("", 1.0, 0.0), False),
        (Part("", math.nan, 1.0), False),
        (Part("", 2.0, 1.0, at_least=True), True),
        (Part("", 0.5, 1.0, at_least=True), False),
        (Part("", 0.0, 1.0, at_least=True), False),
        (Part("", math.nan, 1.0, at_least=True), False),
    ],
)
def test_verdict_follows_the_measurement(part: Part, passed: bool) -> None:
    check = Check("name", "claim", (Part("easy", 0.0, 1.0), part, Part("easy", 3.0, 1.0, at_least=True)))
    assert part.passed is passed
    assert check.passed is passed
    assert (part.strain <= 1) is passed
    if not passed:
        assert check.worst is part
    assert line(check).startswith("ok " if passed else "FAIL")
