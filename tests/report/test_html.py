"""The page in a real browser: sorts, filters, answers the pointer, changes its theme, and asks for nothing outside."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import column, headings, opened, wait
from report_files import NUM_DOCUMENTS, predict_only, with_fidelity, write_results, write_stream
from repository import ROOT

from lm_eval_kvpress.report.build import build_report
from lm_eval_kvpress.report.html import html, safe_json

SCREENSHOTS = ROOT / "build" / "screenshots"
EVIL = "<script>alert(1)</script>"
pytestmark = [pytest.mark.end_to_end, pytest.mark.xdist_group("browser")]  # one browser for all


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
    write_results(folder, "tova", 0.5, acc=float("nan"), checkpoint=EVIL)
    write_results(folder, "keyrot", 0.5, acc=None, checkpoint=EVIL)
    write_results(folder, "pyramid", 0.8, acc=0.3, notes={"it fell back": 4}, checkpoint=EVIL)
    file = folder / "page.html"
    file.write_text(html(build_report([folder])), encoding="utf-8")
    return file


@pytest.fixture
def browser(chromium: Any, page: Path) -> Iterator[Any]:
    with opened(chromium, page):
        yield chromium


def test_sorting_by_pointer_and_by_keyboard_keeps_the_baseline_on_top_and_the_missing_last(browser: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    heads, number = browser.find_elements("css selector", "thead th"), headings(browser).index("acc") + 1
    wait(browser, "return document.querySelector('th[aria-sort=descending]') !== null")
    figures = ["0.750", "0.600", "0.450", "0.300", "0.200"]
    rest = column(browser, number)[6:]
    assert sorted(rest) == ["-", "NaN"] and column(browser, number) == ["1.000", *figures, *rest], "best first"
    control = heads[number - 1].find_element("css selector", "[tabindex='0'], button")
    browser.execute_script("arguments[0].focus()", control)
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    wait(browser, "return document.querySelector('th[aria-sort=ascending]') !== null")
    assert column(browser, number) == ["1.000", *reversed(figures), *rest], "what is missing is last both ways"


def test_filter_by_press_hides_its_rows_and_never_the_baseline(browser: Any) -> None:
    browser.find_element("css selector", "[data-press='snapkv'].press").click()
    presses = column(browser, 1)
    assert presses[0].startswith("none") and not any(name.startswith("snapkv") for name in presses)
    assert len(presses) == 6


def test_pointing_at_a_run_names_its_press(browser: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    plot = browser.find_element("css selector", "[data-plot='bytes']")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    points = plot.find_elements("css selector", ".scatterlayer .points path")
    ActionChains(browser).move_to_element(points[0]).perform()
    wait(browser, "return document.querySelector('.hoverlayer .hovertext') !== null")
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


def test_paper_is_light_and_the_screen_stays_dark(browser: Any) -> None:
    theme = "document.documentElement.dataset.theme"
    browser.execute_script(f"if ({theme} === 'light') document.getElementById('theme').click()")
    browser.execute_script(f"window.seen = []; addEventListener('beforeprint', () => seen.push({theme}))")
    browser.print_page()
    assert browser.execute_script(f"return [seen, {theme}]") == [["light"], "dark"]


def test_a_name_that_is_a_script_is_shown_as_text(browser: Any) -> None:
    assert EVIL in browser.find_element("css selector", "h2").text
    assert any(name.startswith(EVIL) for name in column(browser, 1))


def _traces(driver: Any, plot: str) -> list[dict[str, Any]]:
    """What a plot was given."""
    keys = "x: Array.from(one.x), y: Array.from(one.y), name: one.name, marker: one.marker, hover: one.hovertemplate"
    bars = "bars: one.error_y && [Array.from(one.error_y.arrayminus ?? []), Array.from(one.error_y.array ?? [])]"
    script = f"return document.querySelector(`[data-plot='{plot}']`).data.map(one => ({{{keys}, {bars}}}))"
    return list(driver.execute_script(script))


def test_bars_are_the_intervals_and_points_stand_at_the_measured_share(browser: Any, page: Path) -> None:
    (table,) = build_report([page.parent]).tables
    rows = {(row.press, row.number("removed_asked")): row for row in table.rows}
    snapkv = next(one for one in _traces(browser, "kept") if one["name"] == "snapkv")
    assert snapkv["x"] == [0.25, 0.5] and snapkv["y"] == [0.45, 0.75]
    for index, ratio in enumerate((0.75, 0.5)):
        found = rows["snapkv", ratio].entries["recall.acc"].difference
        assert found is not None and found.bounds is not None
        expected = (found.value - found.bounds[0], found.bounds[1] - found.value)
        assert (snapkv["bars"][0][index], snapkv["bars"][1][index]) == pytest.approx(expected)


def test_a_page_ranked_by_fidelity_opens_with_it(chromium: Any, tmp_path: Path) -> None:
    for press, kl in (("none", 0.0), ("knorm", 0.25)):
        with_fidelity(write_results(tmp_path, press, 0.5, acc=0.5), kl)
    file = tmp_path / "page.html"
    file.write_text(html(build_report([tmp_path], sort=["kl_mean"])), encoding="utf-8")
    with opened(chromium, file):
        knorm = next(one for one in _traces(chromium, "bytes") if one["name"] == "knorm")
        assert knorm["y"] == [0.25] and knorm["bars"] == [[pytest.approx(0.125)], [pytest.approx(0.25)]]
        assert "95 %: 0.125 to 0.500" in knorm["hover"][0] and "to baseline" not in knorm["hover"][0]
        (place,) = [one for one in _traces(chromium, "place") if one["name"] == "knorm"]
        assert (place["x"], place["y"]) == ([1], [0.25])


def test_a_row_that_cannot_be_trusted_is_hollow_named_and_no_part_of_the_front(browser: Any) -> None:
    front, *traces = _traces(browser, "bytes")
    void = next(one for one in traces if one["name"] == "pyramid")
    assert void["marker"]["symbol"][0].endswith("-open") and "fell back" in void["hover"][0]
    assert void["x"][0] < min(front["x"]), "it would be the first of the front"
    assert not any(symbol.endswith("-open") for symbol in traces[0]["marker"]["symbol"])
    assert front["y"] == [0.45, 0.75, 1.0]


def test_recall_over_the_distance_has_a_line_per_run_and_can_show_one_share(browser: Any) -> None:
    from selenium.webdriver.support.ui import Select

    lines = _traces(browser, "distance")
    assert len(lines) == 6 and {tuple(line["x"]) for line in lines} == {(100, 800)}
    snapkv = [line["y"] for line in lines if line["name"] == "snapkv"]
    assert snapkv == [[0.75, 0.75], [0.45, 0.45]]
    Select(browser.find_element("css selector", "[data-choice='amount']")).select_by_value("75 % removed")
    assert [line["name"] for line in _traces(browser, "distance")] == ["none", "snapkv"]


def test_a_plot_without_figures_is_not_there(browser: Any) -> None:
    assert not browser.find_element("css selector", "[data-plot='position']").is_displayed()


def test_perplexity_over_the_position_is_plotted_where_streams_were_run(chromium: Any, tmp_path: Path) -> None:
    for press in ("snapkv", "knorm"):
        write_stream(tmp_path / press, press)
    file = tmp_path / "page.html"
    file.write_text(html(build_report([tmp_path])), encoding="utf-8")
    with opened(chromium, file):
        assert chromium.find_element("css selector", "[data-plot='position']").is_displayed()
        lines = _traces(chromium, "position")
        assert [line["name"] for line in lines] == ["knorm", "snapkv"] and lines[0]["x"][-1] == 50


def test_a_table_without_any_figure_has_its_rows_and_no_plot(chromium: Any, tmp_path: Path) -> None:
    for press in ("none", "snapkv"):
        predict_only(tmp_path, press)
    file = tmp_path / "page.html"
    file.write_text(html(build_report([tmp_path])), encoding="utf-8")
    with opened(chromium, file):
        assert len(chromium.find_elements("css selector", "tbody tr")) == 2
        plots = chromium.find_elements("css selector", "[data-plot]")
        assert plots and not any(plot.is_displayed() for plot in plots)


def test_500_rows_are_shown_sorted_and_searched(chromium: Any, many_results: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(html(build_report([many_results])), encoding="utf-8")
    with opened(chromium, file):
        place = headings(chromium).index("acc")
        cell = f"row.cells[{place}].firstChild.data"
        script = f"return [...document.querySelectorAll('tbody tr')].map(row => {cell})"
        wait(chromium, "return document.querySelector('th[aria-sort=descending]') !== null")
        figures = [float(text) for text in chromium.execute_script(script)]
        assert len(figures) == 500 and figures[1:] == sorted(figures[1:], reverse=True)
        chromium.find_element("css selector", ".dt-search input").send_keys("press77")
        wait(chromium, "return document.querySelectorAll('tbody tr').length === 1")
