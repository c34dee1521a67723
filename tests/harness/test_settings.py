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
