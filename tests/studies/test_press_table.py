"""The table of presses: every press of the settings can be run, rows are sorted, and a star says what chance does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml

from lm_eval_kvpress.presses.catalog import ROWS
from lm_eval_kvpress.report.cell import Press
from lm_eval_kvpress.sweep.cells import cells_of
from lm_eval_kvpress.sweep.command import settings_from
from scripts.studies import press_table
from scripts.studies.press_pages import GROUP, GROUPS_PAGE, Point, replaced, table

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
        about = {"press": name, "num_tokens": "1200", "seconds": "3.5", "processor_seconds": "1.2"}
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


def test_every_press_of_the_catalog_has_figures_and_a_place_in_the_docs() -> None:
    files = (press_table.SETTINGS, press_table.OF_FINCH, press_table.EAGER)
    listed = [one for file in files for one in yaml.safe_load(file.read_text(encoding="utf-8"))["presses"]]
    run = {one if isinstance(one, str) else one["press"] for one in listed}
    assert {part for name in run for part in re.split("[:+]", name)} >= set(ROWS)
    shown = ", ".join(GROUP.findall(GROUPS_PAGE.read_text(encoding="utf-8"))).split(", ")
    assert sorted(shown) == sorted(run), "each press in one group"


def test_a_table_replaces_what_stands_between_its_marks() -> None:
    end = "<!-- figures: end -->"
    page = f"a\n<!-- figures of x, y: begin -->\n\nold\n\n{end}\n<!-- figures of z: begin -->\n{end}"
    assert replaced(page, "figures of x, y", "new") == page.replace("old", "new")
    with pytest.raises(ValueError, match="no marks"):
        replaced(page, "recall", "new")


def test_a_cell_is_known_by_its_ratio_and_kvzip_plus_by_its_argument() -> None:
    def cell(removed: float, *arguments: tuple[str, str]) -> Any:
        return SimpleNamespace(press=Press("kvzip", arguments, removed))

    assert press_table._key(cell(0.25)) != press_table._key(cell(0.5))
    assert press_table._name(cell(0.5)) == "kvzip"
    assert press_table._name(cell(0.5, ("kvzip_plus_normalization", "True"))) == "kvzip_plus"


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
    assert "| `random` | 75 / 50 / 25 % | 0.70 / 0.50 / 0.30 | 45.0 / 45.0 / 45.0 | 0.500 |" in rows


def test_the_times_of_calibration_are_those_of_the_files(folder: Path) -> None:
    rows = press_table.calibration_table(folder).splitlines()
    assert rows[2] == "| `qfilter` | 1,200 | 1.2 s | 3.5 s |"
    assert rows[-1] == "| `lukv:expected_attention` | 1,200 | 1.2 s | 3.5 s |"
