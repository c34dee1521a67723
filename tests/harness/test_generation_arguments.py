"""What lm-eval asks of generated text is followed or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_eval_requests import generation_requests, ours

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.generation_arguments import generation_settings
from lm_eval_kvpress.harness.requests import generation_batches


@pytest.mark.parametrize(
    "gen_kwargs",
    [
        {"num_beams": 4},
        {"penalty_alpha": 0.6},
        {"do_sample": True, "top_p": 2},
        *({"max_gen_toks": count} for count in (100_000, 0, -5)),
    ],
)
def test_unsupported_generation_arguments_are_errors(checkpoint_dir: Path, gen_kwargs: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="not supported|leave room|top_p"):
        ours(checkpoint_dir).generate_until(generation_requests(until=[], **gen_kwargs), disable_tqdm=True)


def ids_and_record(checkpoint_dir: Path, **gen_kwargs: Any) -> tuple[list[str], list[tuple[int, ...]], dict[str, Any]]:
    lm = ours(checkpoint_dir, press="knorm", batch_size=2)
    requests = generation_requests(**{"until": [], "max_gen_toks": 8, **gen_kwargs})
    (batches,) = generation_batches(lm, lm.session, requests)
    outcomes = batches.run(lm.session.runner, range(len(requests)), lambda _: None)
    return lm.generate_until(requests, disable_tqdm=True), [one.ids for one in outcomes], lm.describe()["tasks"]["gen"]


def test_ignored_ends_make_texts_equally_long_and_change_no_answer(checkpoint_dir: Path) -> None:
    _, free, _ = ids_and_record(checkpoint_dir)
    ends = sorted({free[0][2], free[1][5]})
    answers, ids, record = ids_and_record(checkpoint_dir, eos_token_id=ends)
    num_ended = sum(len(one) < 8 or one[-1] in ends for one in ids)
    assert num_ended >= 2 and (record["texts_generated"], record["texts_at_limit"]) == (5, 5 - num_ended)
    assert record["tokens_generated"] == sum(map(len, ids)) < 5 * 8
    steady, all_ids, record = ids_and_record(checkpoint_dir, eos_token_id=ends, ignore_eos=True)
    assert steady == answers and all_ids == free
    assert (record["tokens_generated"], record["texts_at_limit"]) == (5 * 8, 5)


def test_stop_strings_are_ignored_with_the_ends_and_cut_the_answer(checkpoint_dir: Path) -> None:
    """Of a task with stop strings, most of whose texts end early; the answers are those of a run that stops there."""
    until = [" ", "e"]
    answers, ids, record = ids_and_record(checkpoint_dir, until=until)
    assert record["tokens_generated"] == sum(map(len, ids)) < 5 * 8 and record["texts_at_limit"] < 5
    steady, all_ids, record = ids_and_record(checkpoint_dir, until=until, ignore_eos=True)
    assert steady == answers and all(map(len, all_ids))
    assert (record["tokens_generated"], record["texts_at_limit"]) == (5 * 8, 5)


def test_what_follows_the_end_of_an_ignored_text_is_not_read(checkpoint_dir: Path) -> None:
    """A second thought after the answer's end would otherwise be taken for the first."""
    lm = ours(checkpoint_dir)
    lm.think_end_token = lm.tok_encode(" mill")[-1]
    thought, end = lm.tok_encode(" the river ran past an old mill"), lm.tok_encode(" seven")
    ids = [*thought, *lm.tok_encode(" grey geese"), *end, *thought, *lm.tok_encode(" asked")]
    texts = []
    for ignores in (False, True):
        _, answer = generation_settings(lm, {"until": [" seven"], "max_gen_toks": 64, "ignore_eos": ignores})
        texts.append(answer(ids if ignores else ids[: len(thought) + 2 + len(end)]))
    assert texts[0] == texts[1] and "geese" in texts[0] and "asked" not in texts[1]


def test_a_least_number_of_new_tokens_keeps_texts_from_ending(checkpoint_dir: Path) -> None:
    _, free, _ = ids_and_record(checkpoint_dir)
    ends = [free[0][2]]
    _, ids, _ = ids_and_record(checkpoint_dir, eos_token_id=ends, min_new_tokens=6)
    assert all(len(one) >= 6 and not set(one[:6]) & set(ends) for one in ids)


def test_ignore_eos_is_true_or_false(checkpoint_dir: Path) -> None:
    with pytest.raises(UsageError, match="ignore_eos=3 must be true or false"):
        ours(checkpoint_dir).generate_until(generation_requests(until=[], ignore_eos=3), disable_tqdm=True)
