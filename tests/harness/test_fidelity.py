"""``fidelity=true`` adds figures to the record and changes no answer, however the requests are batched."""

from __future__ import annotations

from operator import eq
from os.path import commonprefix
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval_requests import text
from references import largest_difference

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.answering import SessionAnswering
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.presses.spec import PressSpec

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
PACKED = [{"press": press, "kv_quant": "int2", "kv_group": 8} for press in ("none", "knorm")]


@pytest.mark.parametrize("press", [*PRESSED, *PACKED], ids=lambda press: "-".join(map(str, press.values())))
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
    full, _ = answered(checkpoint_dir, press="none")
    changes = [found[task]["logprob_change_mean"] * found[task]["num_tokens"] for task in ("t", "r")]
    assert sum(changes) == pytest.approx(sum(sums(plain)) - sum(sums(full)), abs=2e-3)


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


STREAM = {"press": "streaming_llm", "rolling": "stream", "stream_budget": 32, "stream_chunk": 16}


def streamed(folder: Path, **arguments: Any) -> tuple[list[float], dict[str, Any]]:
    lm = KVPress(pretrained=str(folder), device="cpu", **STREAM, **arguments)
    return lm.loglikelihood_rolling(documents(), disable_tqdm=True), lm.describe()["tasks"]["r"]


def test_streams_are_compared_up_to_the_models_window(checkpoint_dir: Path, tmp_path: Path) -> None:
    plain, nothing = streamed(checkpoint_dir)
    answers, found = streamed(checkpoint_dir, fidelity=True)
    assert answers == plain and nothing["fidelity"] is None
    fidelity = found["fidelity"]
    assert fidelity["num_tokens"] == found["tokens_scored_under_press"] > 100 and fidelity["kl_mean"] > 1e-3
    assert fidelity["by_position"][0]["first"] == 33  # the place in the document: chunks from 48 on follow an eviction
    _, cut = streamed(checkpoint_dir, fidelity=True, max_length=80)
    assert cut["fidelity"]["num_tokens"] == 3 * (80 - 48) < fidelity["num_tokens"]
    _, together = streamed(checkpoint_dir, fidelity=True, batch_size=3)
    assert together["fidelity"]["kl_mean"] == pytest.approx(fidelity["kl_mean"], abs=2e-6)
    stored = str(tmp_path / "stream")
    first = streamed(checkpoint_dir, fidelity=True, stream_output=stored)[1]["fidelity"]
    assert streamed(checkpoint_dir, fidelity=True, stream_output=stored)[1]["fidelity"] == first == fidelity
    with pytest.raises(UsageError, match="holds losses of another setting .fidelity differ"):
        streamed(checkpoint_dir, stream_output=stored)


def prompts() -> list[Instance]:
    arguments = {"max_gen_toks": 12, "do_sample": False, "until": []}
    return [Instance("generate_until", {}, (text(index, 60), arguments), index, ("g", index, 1)) for index in range(4)]


def test_texts_are_compared_with_the_full_caches(checkpoint_dir: Path) -> None:
    def generated(**arguments: Any) -> tuple[list[str], dict[str, Any]]:
        lm = KVPress(pretrained=str(checkpoint_dir), device="cpu", **arguments)
        return lm.generate_until(prompts(), disable_tqdm=True), lm.describe()["tasks"]["g"]["text_fidelity"]

    full, nothing = generated(press="none")
    texts, found = generated(press="knorm", compression_ratio=0.9, fidelity=True)
    assert nothing is None and (found["num_texts"], found["num_identical"]) == (4, sum(map(eq, texts, full))) != (4, 4)
    assert texts == generated(press="knorm", compression_ratio=0.9)[0]
    lm = KVPress(pretrained=str(checkpoint_dir), device="cpu")
    ids = [[lm.tok_encode(one) for one in run] for run in (texts, full)]
    before = [len(commonprefix(pair)) for pair in zip(*ids, strict=True) if pair[0] != pair[1]]
    assert found["tokens_before_difference_mean"] == pytest.approx(sum(before) / len(before))
    assert generated(press="none", fidelity=True)[1]["num_identical"] == 4


def test_automatic_batches_leave_room_for_the_full_cache(checkpoint_dir: Path) -> None:
    """The prefill is held with half as much again, and a clone beside it."""
    models = [
        KVPress(pretrained=str(checkpoint_dir), device="cpu", press="knorm", fidelity=fidelity)
        for fidelity in (False, True)
    ]
    asked = []
    for lm in models:

        def limits(press: PressSpec, requests: object, quantization: object = None) -> tuple[int, int]:
            asked.append(press.name)
            return 1, 3_000

        answering = SessionAnswering(lm.session, limits)
        lm.use(lm.session, answering)
        lm.loglikelihood(choices()[:1], disable_tqdm=True)
    assert asked == ["knorm", "none"]
