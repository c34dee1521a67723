"""RULER's leaderboard: its sweeps are sweeps, and its tables are means, ranks and paired differences."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pandas as pd
import pytest

from lm_eval_kvpress import cli
from lm_eval_kvpress.sweep.cells import cells_of
from lm_eval_kvpress.sweep.command import settings_from
from scripts.studies import ruler_board
from scripts.studies.ruler_board import AWARE, HELD_BACK


def test_every_task_is_a_sweep_at_each_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(cli, "main", lambda command: commands.append(command))
    ruler_board.sweep(tmp_path, "some/model")
    settings = [settings_from(command[1:]) for command in commands]
    assert {command[0] for command in commands} == {"sweep"}
    tasks = [(one.metadata["max_seq_lengths"], one.tasks) for one in settings]
    assert tasks == [([length], [task]) for length, task in itertools.product((1024, 2048), ruler_board.TASKS)]
    for one in settings:
        assert one.model_args["pretrained"] == "some/model" and len(cells_of(one)) == 74
        assert (one.limit, bool(one.gen_kwargs)) == (8, one.tasks[0].startswith("niah"))


def scores(**found: list[float]) -> pd.DataFrame:
    """Of two documents at two ratios: by press the four scores with the question, and the four without it."""
    places = list(itertools.product((AWARE, HELD_BACK), (0.25, 0.5), (0, 1)))
    return pd.DataFrame(
        {"task": "ruler_fwe", "length": 1024, "press": press, "question": place[0], "ratio": place[1]}
        | {"document": place[2], "score": score}
        for press, own in found.items()
        for place, score in zip(places, own, strict=True)
    )


FOUND = scores(
    none=[1.0] * 8,
    random=[0.5, 0.5, 0.0, 0.0] + [0.0, 0.0, 0.0, 0.0],
    good=[1.0, 1.0, 0.5, 0.5] + [0.0, 0.5, 0.0, 0.5],
    late=[0.5, 0.5, 0.0, 0.0] + [1.0, 1.0, 1.0, 1.0],
)


def test_presses_are_sorted_by_their_mean_and_stand_under_the_full_cache() -> None:
    assert ruler_board.presses(FOUND).splitlines() == [
        "| press | aware: 25 % removed | aware: 50 % removed | held back: 25 % removed | held back: 50 % removed |",
        "|---|---|---|---|---|",
        "| none | 100 % | 100 % | 100 % | 100 % |",
        "| late | 50 % | 0 % | 100 % | 100 % |",
        "| good | 100 % | 50 % | 25 % | 25 % |",
        "| random | 50 % | 0 % | 0 % | 0 % |",
    ]


def test_ranks_are_those_of_each_question_and_differences_are_paired() -> None:
    """``good`` is beyond random by half of every document, so its interval has no width."""
    text = ruler_board.ranks(FOUND)
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert rows[2] == ["good", "75 %", "1", "+50 [+50, +50]", "25 %", "2", "+25 [+0, +50]"]
    by_press = {row[0]: row for row in rows}
    assert by_press["random"] == ["random", "25 %", "2", "-", "0 %", "3", "-"]
    assert by_press["late"] == ["late", "25 %", "2", "+0 [+0, +0]", "100 %", "1", "+100 [+100, +100]"]
    assert text.endswith("scores: 0.00."), "aware ties what the other column orders"


def test_the_full_cache_has_a_column_for_each_length() -> None:
    both = pd.concat([FOUND, FOUND.assign(length=2048, score=0.5)])
    lines = ruler_board.without_press(both).splitlines()
    assert lines[0] == "| task | 1,024 tokens | 2,048 tokens |"
    assert "| `ruler_fwe` | 100 % | 50 % |" in lines and "| `ruler_cwe` | - | - |" in lines


def test_the_page_has_the_tables_that_it_asks_for(tmp_path: Path) -> None:
    marks = ("full", "ruler_fwe at 1024", "ranks", "ranks without niah_single_1")
    page = tmp_path / "page.md"
    page.write_text("\n".join(f"<!-- {one}: begin -->\n<!-- {one.split()[0]}: end -->" for one in marks))
    more = pd.concat([FOUND, FOUND.assign(length=2048), FOUND.assign(task="ruler_cwe")])
    whole = FOUND.assign(task="niah_single_1", score=1.0)
    ruler_board.write(page, pd.concat([more, whole]))
    text = page.read_text()
    assert text.count(ruler_board.presses(FOUND)) == 1
    assert ruler_board.ranks(pd.concat([more, whole])) in text and ruler_board.ranks(more) in text


def test_the_committed_page_asks_for_known_tables() -> None:
    asked = re.findall(r"<!-- (.*): begin -->", ruler_board.PAGE.read_text(encoding="utf-8"))
    possible = {f"{task} at {length}" for task in ruler_board.TASKS for length in ruler_board.LENGTHS}
    always = {"full", "ranks", "ranks without niah_single_1"}
    assert always <= set(asked) <= always | possible
