"""Folders of results that are built once and only read."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_files import write_leaderboard, write_results

NUM_ROWS = 500


@pytest.fixture(scope="session")
def leaderboard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results with every kind of table, mark and notice."""
    folder = tmp_path_factory.mktemp("leaderboard")
    write_leaderboard(folder)
    return folder


@pytest.fixture(scope="session")
def many_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 runs of one setting, the baseline and `press1` to `press499`."""
    folder = tmp_path_factory.mktemp("many")
    for index in range(NUM_ROWS):
        press = f"press{index}" if index else "none"
        write_results(folder, press, 0.5, acc=(index * 7 % NUM_ROWS) / NUM_ROWS, name=str(index))
    return folder
