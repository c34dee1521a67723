"""A page in Chromium, for tests of what readers see and do; `chromium` in tests/report/conftest.py is the browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def opened(driver: Any, page: Path, *, address: str = "") -> Iterator[None]:
    """The page, loaded anew; afterwards, that there was no console error and that nothing outside was asked for.

    Args:
        address: what follows ``#``.
    """
    driver.get("about:blank")  # another part of the address alone would not load the page again
    driver.get(page.as_uri() + (f"#{address}" if address else ""))
    wait(driver, "return document.documentElement.dataset.ready === 'true'")
    yield
    assert driver.get_log("browser") == []
    asked = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [one["params"]["request"]["url"] for one in asked if one["method"] == "Network.requestWillBeSent"]
    assert urls and all(url.startswith(("file:", "data:", "blob:", "about:")) for url in urls), urls


def wait(driver: Any, script: str) -> None:
    """Until a script returns what is true."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 20).until(lambda one: one.execute_script(script))


def column(driver: Any, number: int) -> list[str]:
    """The first line of each cell of a column, counted from 1 among those that are shown."""
    return [row.text.split("\n")[0] for row in driver.find_elements("css selector", f"tbody td:nth-child({number})")]


def headings(driver: Any) -> list[str]:
    """The last line of each head of the first table that is shown, without the arrows."""
    heads = driver.find_elements("css selector", "table:first-of-type thead th")
    return [head.text.split("\n")[-1].rstrip(" ↑↓▲▼") for head in heads]
