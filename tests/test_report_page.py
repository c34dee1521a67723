"""The page in a real browser: sorts, filters, answers the pointer, changes its theme, and asks for nothing outside."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_files import NUM_DOCUMENTS, write_results

from lm_eval_kvpress.report import make_report
from lm_eval_kvpress.report_html import html, safe_json

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SCREENSHOTS = Path(__file__).resolve().parents[1] / "build" / "screenshots"
EVIL = "<script>alert(1)</script>"


def test_json_stays_in_its_script_element() -> None:
    text = safe_json(["</script><!--&\u2028"])
    assert not set(text) & set("<>&\u2028") and json.loads(text) == ["</script><!--&\u2028"]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    write_results(folder, "none", 0.0, scores=[1] * NUM_DOCUMENTS, checkpoint=EVIL)
    for press, ratio, good in (("snapkv", 0.5, 15), ("snapkv", 0.75, 9), ("knorm", 0.5, 12), (EVIL, 0.5, 4)):
        scores = [1] * good + [0] * (NUM_DOCUMENTS - good)
        write_results(folder, press, ratio, scores=scores, checkpoint=EVIL, name=f"{press[:1].strip('<')}{good}")
    file = folder / "page.html"
    file.write_text(html(make_report([folder])), encoding="utf-8")
    return file


@pytest.fixture
def browser(page: Path) -> Iterator[Any]:
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no chromium and chromedriver: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1400"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        driver.get(page.as_uri())
        _wait(driver, "return document.documentElement.dataset.ready === 'true'")
        yield driver
        assert driver.get_log("browser") == []
        asked = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        urls = [one["params"]["request"]["url"] for one in asked if one["method"] == "Network.requestWillBeSent"]
        assert urls and all(url.startswith(("file:", "data:", "blob:")) for url in urls), urls
    finally:
        driver.quit()


def _wait(driver: Any, script: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 20).until(lambda one: one.execute_script(script))


def _column(driver: Any, number: int) -> list[str]:
    return [row.text.split("\n")[0] for row in driver.find_elements("css selector", f"tbody td:nth-child({number})")]


def test_sorting_by_pointer_and_by_keyboard_keeps_the_baseline_on_top(browser: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    heads = browser.find_elements("css selector", "thead th")
    number = next(index for index, head in enumerate(heads, start=1) if "acc" in head.text)
    heads[number - 1].click()
    assert _column(browser, number) == ["1.000", "0.200", "0.450", "0.600", "0.750"]
    control = heads[number - 1].find_element("css selector", "[tabindex='0'], button")
    browser.execute_script("arguments[0].focus()", control)
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    assert _column(browser, number) == ["1.000", "0.750", "0.600", "0.450", "0.200"]


def test_filter_by_press_hides_its_rows_and_never_the_baseline(browser: Any) -> None:
    browser.find_element("css selector", "[data-press='snapkv'].press").click()
    presses = _column(browser, 1)
    assert presses[0].startswith("none") and not any(name.startswith("snapkv") for name in presses)
    assert len(presses) == 3


def test_pointing_at_a_run_tells_its_press(browser: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    plot = browser.find_element("css selector", "[data-plot='bytes']")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    points = plot.find_elements("css selector", ".scatterlayer .points path")
    ActionChains(browser).move_to_element(points[0]).perform()
    _wait(browser, "return document.querySelector('.hoverlayer .hovertext') !== null")
    assert "kept" in plot.find_element("css selector", ".hovertext").text


def test_theme_changes_the_paper(browser: Any) -> None:
    def paper() -> str:
        return str(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))

    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    before = paper()
    browser.save_screenshot(str(SCREENSHOTS / "report_first.png"))
    browser.find_element("id", "theme").click()
    assert paper() != before
    browser.save_screenshot(str(SCREENSHOTS / "report_second.png"))


def test_a_name_that_is_a_script_is_shown_as_text(browser: Any) -> None:
    assert EVIL in browser.find_element("css selector", "h2").text
    assert any(name.startswith(EVIL) for name in _column(browser, 1))
