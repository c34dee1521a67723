"""The table of presses: every press of the settings can be run, rows are sorted, and a star says what chance does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lm_eval_kvpress.sweep.cells import cells_of
from lm_eval_kvpress.sweep.command import settings_from
from scripts.studies import press_table
from scripts.studies.press_table import Point, table

SHAPES = {
    "qfilter": {"q_filters": (4, 4, 64)},
    "expected_attention_stats": {"query_mean": (4, 4, 64), "query_cov": (4, 4, 64, 64)},
    "duo_attention": {"full_attention_heads": (4, 4), "sink_size": (), "recent_size": ()},
    "kvzap": {"weight": (4, 4, 256), "bias": (4, 4)},
    "lukv": {"budget_curve": (99, 4, 4)},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the settings look for statistics of the built-in."""
    monkeypatch.chdir(tmp_path)
    (folder := tmp_path / press_table.FOLDER).mkdir(parents=True)
    for press, shapes in SHAPES.items():
        tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
        name = "lukv:expected_attention" if press == "lukv" else press
        about = {"press": name, "num_tokens": "1200", "seconds": "3.5"}
        (folder / f"{press}.safetensors").write_bytes(safetensors.torch.save(tensors, about))
    return folder


@pytest.mark.parametrize(
    "settings", [press_table.SETTINGS, press_table.OF_FINCH, press_table.EAGER], ids=lambda path: path.stem
)
def test_every_press_of_the_settings_can_be_run(settings: Path, folder: Path) -> None:
    cells = cells_of(settings_from(["--config", str(settings), "--output_path", str(folder / "sweep")]))
    strengths = [json.dumps(sorted(cell.arguments.items()), default=str) for cell in cells]
    assert len(set(strengths)) == len(cells) > 2
    names = {str(cell.arguments["press"]) for cell in cells}
    assert (
        names in ({"finch"}, {"observed_attention"})
        or {"none", "random", *press_table.CALIBRATED[:4], "kvcompose", "kvgrad"} <= names
    )


def test_rows_are_sorted_by_recall_and_marked_where_chance_does_as_well() -> None:
    points = [Point("none", 1.0, 40.0, 1.0)]
    points += [Point("random", recall, 45.0, kept) for recall, kept in ((0.5, 0.5), (0.3, 0.25), (0.7, 0.75))]
    points += [Point("good", 0.9, 44.0, 0.5), Point("bad", 0.5, 44.0, 0.5), Point("worse", 0.5, 46.0, 0.5)]
    points += [Point("half", 0.8, None, 0.5)]
    rows = table(points).splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == [
        "`none`",
        "`good`",
        "`half`",
        "`bad`*",
        "`random`",
        "`worse`*",
    ]
    assert "| `half` | 50 % | 0.80 | - | 0.800 |" in rows
    assert "| `random` | 75 % / 50 % / 25 % | 0.70 / 0.50 / 0.30 | 45.0 / 45.0 / 45.0 | 0.500 |" in rows


def test_the_times_of_calibration_are_those_of_the_files(folder: Path) -> None:
    rows = press_table.calibration_table(folder).splitlines()
    assert rows[2] == "| `qfilter` | 1,200 | 3.5 |" and rows[-1] == "| `lukv:expected_attention` | 1,200 | 3.5 |"
