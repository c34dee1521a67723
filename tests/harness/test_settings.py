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


@pytest.mark.parametrize("given", [{"rolling_context": 400, "rolling_score": 200}, {"rolling_context": 512}])
def test_rolling_windows_over_max_length_are_refused(given: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="max_length=512"):
        parse_arguments(given)[0].rolling_window(512)
