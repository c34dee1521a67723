"""What a reader of the page chooses: columns, presses, order, metric and theme, kept in the address; the CSV."""

from __future__ import annotations

import base64
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import column, headings, opened, wait
from report_files import NUM_DOCUMENTS, write_results
from selenium.webdriver.support.ui import Select

from lm_eval_kvpress.report.build import build_report
from lm_eval_kvpress.report.data_files import as_csv
from lm_eval_kvpress.report.html import html, linked

pytestmark = [pytest.mark.end_to_end, pytest.mark.xdist_group("browser")]
PRESSES = ("snapkv", "knorm", "tova", "keydiff", "random", "adakv:snapkv", "lagkv", "cur", "pyramidkv", "made_up")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten presses at two ratios; at half they answer 10, 11, ... of 20 documents."""
    folder = tmp_path_factory.mktemp("choices")
    write_results(folder, "none", 0.0, scores=[1] * NUM_DOCUMENTS)
    for place, press in enumerate(PRESSES):
        for ratio, good in ((0.5, 10 + place), (0.75, place)):
            scores = [1] * good + [0] * (NUM_DOCUMENTS - good)
            write_results(folder, press, ratio, scores=scores, name=f"{place}-{ratio}")
    file = folder / "page.html"
    file.write_text(html(build_report([folder])), encoding="utf-8")
    return file


@pytest.fixture
def browser(chromium: Any, page: Path) -> Iterator[Any]:
    with opened(chromium, page):
        yield chromium


def box(driver: Any, key: str) -> Any:
    return driver.find_element("css selector", f"#columns input[value='{key}']")


def plotted(driver: Any) -> set[str]:
    """The presses of the plot over the kept share."""
    script = "return document.querySelector(`[data-plot='kept']`).data.map(one => one.name)"
    return set(driver.execute_script(script))


def test_the_page_opens_with_the_metric_one_size_and_the_best_run_on_top(browser: Any) -> None:
    shown = headings(browser)
    assert shown[:4] == ["Press", "Removed", "acc", "Kept"]
    assert not {"KV allocated", "KV effective", "TPOT", "Peak memory"} & set(shown), "on demand, or said by no run"
    assert column(browser, 3)[:3] == ["1.000", "0.950", "0.900"]


def test_columns_are_chosen_and_stand_in_the_address(chromium: Any, page: Path) -> None:
    with opened(chromium, page):
        chromium.find_element("css selector", "#columns summary").click()
        box(chromium, "kv_bytes_allocated").click()
        box(chromium, "removed_asked").click()
        assert "KV allocated" in headings(chromium) and "Removed" not in headings(chromium)
        address = chromium.execute_script("return location.hash.slice(1)")
    with opened(chromium, page, address=address):
        assert "KV allocated" in headings(chromium) and "Removed" not in headings(chromium)
        chromium.find_element("css selector", "#columns summary").click()
        chromium.find_element("css selector", "#columns button[data-set='default']").click()
        assert headings(chromium)[:4] == ["Press", "Removed", "acc", "Kept"]
        assert chromium.execute_script("return location.hash") in ("", "#")


def test_presses_order_metric_and_theme_come_back_with_the_address(chromium: Any, page: Path) -> None:
    with opened(chromium, page):
        chromium.find_element("css selector", "[data-press='tova'].press").click()
        chromium.find_elements("css selector", "thead th")[2].click()
        wait(chromium, "return document.querySelector('th[aria-sort=ascending]') !== null")
        metric = Select(chromium.find_element("css selector", "[data-choice='metric']"))
        metric.select_by_visible_text("recall.acc_at_800")
        before = chromium.execute_script("return document.documentElement.dataset.theme")
        chromium.find_element("id", "theme").click()
        address = chromium.execute_script("return location.hash.slice(1)")
    with opened(chromium, page, address=address):
        rows = column(chromium, 1)
        assert rows[0].startswith("none") and not any(name.startswith("tova") for name in rows)
        assert column(chromium, 3)[1:3] == ["0.000", "0.050"]
        chosen = Select(chromium.find_element("css selector", "[data-choice='metric']")).first_selected_option
        assert chosen.text == "recall.acc_at_800"
        assert chromium.execute_script("return document.documentElement.dataset.theme") != before


@pytest.mark.parametrize("address", ["columns=no_such", "sort.0=none:up&metric.0=x&off=nobody&theme=pink", "%%%"])
def test_an_address_that_asks_for_what_is_not_there_opens_the_page(chromium: Any, page: Path, address: str) -> None:
    with opened(chromium, page, address=address):
        assert len(column(chromium, 1)) == 1 + 2 * len(PRESSES)


def test_plots_open_with_the_leading_presses_and_can_show_all(browser: Any) -> None:
    assert plotted(browser) == {"none", *PRESSES[-6:]}
    Select(browser.find_element("css selector", "[data-choice='shown']")).select_by_value("all")
    assert plotted(browser) == {"none", *PRESSES}


def test_the_csv_is_that_of_the_report(browser: Any, page: Path) -> None:
    link = browser.find_element("id", "csv")
    assert link.get_attribute("download") == "report.csv"
    text = base64.b64decode(link.get_attribute("href").partition("base64,")[2]).decode()
    assert text == as_csv(build_report([page.parent]))
    assert len(list(csv.reader(text.splitlines()))) == 2 + 2 * len(PRESSES)


def test_names_lead_to_papers(browser: Any) -> None:
    row = next(row for row in browser.find_elements("css selector", "tbody tr") if row.text.startswith("adakv:snapkv"))
    links = [link.get_attribute("href") for link in row.find_elements("css selector", "a")]
    assert links == ["https://arxiv.org/abs/2407.11550", "https://arxiv.org/abs/2404.14469"]
    assert linked("made_up:snapkv")[0] == ("made_up", "")
