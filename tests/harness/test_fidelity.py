"""``fidelity=true`` adds figures to the record and changes no answer, however the requests are batched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval_requests import text
from references import largest_difference

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.answering import SessionAnswering
from lm_eval_kvpress.harness.model import KVPress

CHOICES = (" geese", " the small river", " an old house by the sea")


def choices() -> list[Instance]:
    """Contexts of several lengths, three choices each."""
    return [
        Instance("loglikelihood", {}, (text(index, 30 + 7 * (index % 3)), choice), number, ("t", index, 1))
        for index in range(5)
        for number, choice in enumerate(CHOICES)
    ]


def documents() -> list[Instance]:
    return [Instance("loglikelihood_rolling", {}, (text(index, 90),), 0, ("r", index, 1)) for index in range(3)]


def answered(folder: Path, **arguments: Any) -> tuple[list[Any], dict[str, Any]]:
    lm = KVPress(pretrained=str(folder), device="cpu", rolling_context=40, rolling_score=30, **arguments)
    answers = lm.loglikelihood(choices(), disable_tqdm=True) + lm.loglikelihood_rolling(documents(), disable_tqdm=True)
    return answers, {task: facts["fidelity"] for task, facts in lm.describe()["tasks"].items()}


def sums(answers: list[Any]) -> list[float]:
    return [answer[0] if isinstance(answer, tuple) else answer for answer in answers]


PRESSED = [{"press": "knorm", "compression_ratio": 0.5}, {"press": "adakv:snapkv", "window_size": 8}]


@pytest.mark.parametrize("press", PRESSED, ids=lambda press: press["press"])
def test_answers_stay_and_figures_do_not_depend_on_batches(checkpoint_dir: Path, press: dict[str, Any]) -> None:
    plain, nothing = answered(checkpoint_dir, **press)
    assert set(nothing.values()) == {None}
    alone, expected = answered(checkpoint_dir, fidelity=True, **press)
    together, found = answered(checkpoint_dir, fidelity=True, batch_size=4, **press)
    for answers in (alone, together):
        assert largest_difference(sums(answers), sums(plain)) < 1e-3
    for task in ("t", "r"):
        assert found[task]["num_tokens"] == expected[task]["num_tokens"] > 10
        assert expected[task]["kl_mean"] > 1e-3
        for name, value in expected[task].items():
            if name != "by_position":
                assert found[task][name] == pytest.approx(value, abs=2e-5), name
        assert sum(row["num_tokens"] for row in found[task]["by_position"]) == found[task]["num_tokens"]


def test_the_baseline_and_ratio_zero_lose_nothing(checkpoint_dir: Path) -> None:
    for press in ({"press": "none"}, {"press": "snapkv", "compression_ratio": 0, "window_size": 8}):
        _, found = answered(checkpoint_dir, fidelity=True, batch_size=3, **press)
        for task in ("t", "r"):
            assert abs(found[task]["kl_max"]) < 2e-6 and found[task]["top1_agreement"] == 1


def test_only_tokens_scored_under_the_press_are_counted(checkpoint_dir: Path) -> None:
    _, one_pass = answered(checkpoint_dir, fidelity=True, press="knorm", compression_ratio=0.5, rolling="one_pass")
    assert one_pass["r"] is None and one_pass["t"]["num_tokens"] > 0
    _, short = answered(checkpoint_dir, fidelity=True, press="snapkv", compression_ratio=0.5, window_size=500)
    assert short == {"t": None, "r": None}


def test_a_first_token_from_the_full_cache_shows_no_loss(checkpoint_dir: Path) -> None:
    """``query_tokens=0``: the trap that this figure is to show."""
    lm = KVPress(
        pretrained=str(checkpoint_dir),
        device="cpu",
        fidelity=True,
        press="knorm",
        compression_ratio=0.9,
        query_tokens=0,
    )
    lm.loglikelihood(choices(), disable_tqdm=True)
    first, *later = lm.describe()["tasks"]["t"]["fidelity"]["by_position"]
    assert first["kl_mean"] == 0 and min(row["kl_mean"] for row in later) > 1e-3


def test_streams_are_refused(checkpoint_dir: Path) -> None:
    with pytest.raises(UsageError, match="fidelity=true compares prefilled contexts"):
        KVPress(pretrained=str(checkpoint_dir), fidelity=True, press="knorm", rolling="stream", stream_budget=32)


def test_automatic_batches_leave_room_for_the_full_cache(checkpoint_dir: Path) -> None:
    """The prefill is held with half as much again, and a clone beside it."""
    models = [
        KVPress(pretrained=str(checkpoint_dir), device="cpu", press="knorm", fidelity=fidelity)
        for fidelity in (False, True)
    ]
    asked = []
    for lm in models:
        answering = SessionAnswering(lm.session, lambda press, requests: asked.append(press.name) or (1, 3_000))
        lm.use(lm.session, answering)
        lm.loglikelihood(choices()[:1], disable_tqdm=True)
    assert asked == ["knorm", "none"]
