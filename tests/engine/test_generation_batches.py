"""What the outcome of a prompt depends on."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from lm_eval_kvpress.engine.contexts import Context
from lm_eval_kvpress.engine.generation_batches import GenerationBatches
from lm_eval_kvpress.engine.outcomes import GenerationSettings, Prompt
from lm_eval_kvpress.records.meter import RequestId

SETTINGS = GenerationSettings({"do_sample": False}, 8, frozenset({0}), lambda new: [False] * len(new), (" the",))
OTHERS: dict[str, Any] = {
    "options": {"do_sample": True},
    "max_new_tokens": 9,
    "stop_ids": frozenset({0, 1}),
    "until": ("\n",),
}


def test_every_setting_is_told_apart_or_made_of_another() -> None:
    made_of_until = {"stopped"}
    assert {field.name for field in fields(GenerationSettings)} == {*OTHERS, *made_of_until}


@pytest.mark.parametrize("name", OTHERS)
def test_a_prompt_continued_in_another_way_has_another_outcome(name: str) -> None:
    prompts = {0: Prompt(Context((1, 2, 3), 1), 7, RequestId("t", 0, 0))}

    def identity(settings: GenerationSettings) -> str:
        return repr(GenerationBatches(prompts, settings, str).identity(0))

    assert identity(SETTINGS) == identity(replace(SETTINGS))
    assert identity(SETTINGS) != identity(replace(SETTINGS, **{name: OTHERS[name]}))
