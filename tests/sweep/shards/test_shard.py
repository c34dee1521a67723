"""Which share a process answers: as typed, or as an array of Slurm really says."""

from __future__ import annotations

import itertools

import pytest

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.sweep.shards.shard import OF_ARRAY, Shard, is_in_array, number_of, parse_shard, shard_of_array


def array(monkeypatch: pytest.MonkeyPatch, task: int, count: int, first: int, last: int) -> None:
    for name, value in zip(OF_ARRAY, (7, 7, task, count, first, last), strict=True):
        monkeypatch.setenv(name, str(value))


def test_every_block_is_of_one_shard() -> None:
    for count, block in itertools.product((1, 3, 4), range(9)):
        owners = [number for number in range(1, count + 1) if Shard(number, count).has(block)]
        assert owners == [number_of(block, count)]


def test_what_is_typed() -> None:
    assert parse_shard("2/4") == Shard(2, 4) and parse_shard("none") is None


@pytest.mark.parametrize("text", ["", "2", "0/4", "5/4", "a/4", "1/0", "1/", "-1/4", "1/4/8"])
def test_what_is_no_shard_is_one_line(text: str) -> None:
    with pytest.raises(UsageError, match="give I/N with I from 1 to N"):
        parse_shard(text)


@pytest.mark.parametrize(("first", "step"), [(0, 1), (1, 1), (10, 5)])
def test_an_array_counts_from_any_number_and_in_any_step(
    first: int, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in range(3):
        array(monkeypatch, first + step * place, 3, first, first + 2 * step)
        assert parse_shard("auto") == shard_of_array() == Shard(place + 1, 3)


@pytest.mark.parametrize(("task", "count", "first", "last"), [(2, 3, 0, 6), (1, 3, 1, 6), (4, 3, 1, 3)])
def test_an_array_with_gaps_is_refused(
    task: int, count: int, first: int, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    array(monkeypatch, task, count, first, last)
    with pytest.raises(UsageError, match="give I/N, such as --shard"):
        shard_of_array()


@pytest.mark.parametrize("missing", OF_ARRAY)
def test_variables_that_a_shell_sets_are_no_array(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    array(monkeypatch, 1, 4, 1, 4)
    assert is_in_array()
    monkeypatch.delenv(missing)
    assert not is_in_array()
    with pytest.raises(UsageError, match="shard=auto needs the variables"):
        parse_shard("auto")
