"""Folders of results that are built once and only read, and the browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_files import write_leaderboard, write_results

NUM_ROWS = 500
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


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


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no chromium and chromedriver: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1400"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()
