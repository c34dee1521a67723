"""Kept tokens: shares, a table, and a heat map whose text is the context's and whose colours are the shares."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import numpy
import pytest

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.report.kept_tokens import KeptTokens

EVIL = "</span><script>alert(1)</script>"
TEXTS = ("One", " two\n", EVIL)


@pytest.fixture
def kept() -> KeptTokens:
    """Two layers of two heads: all of them kept the first token, one the second, none the third."""
    entries = numpy.array([[[1, 1, 0], [1, 0, 0]], [[1, 0, 0], [1, 0, 0]]], dtype=bool)
    return KeptTokens("snapkv, compression_ratio=0.5", TEXTS, (" end",), entries, ("it fell back",))


def test_shares_are_means_of_what_heads_kept(kept: KeptTokens) -> None:
    assert kept.share == pytest.approx(5 / 12)
    assert kept.share_per_token.tolist() == [1, 0.25, 0] and kept.share_per_layer.tolist() == [
        0.5,
        pytest.approx(1 / 3),
    ]
    frame = kept.to_frame()
    assert list(frame.columns) == ["token", "kept", "layer 0", "layer 1"]
    assert frame["layer 0"].tolist() == [1, 0.5, 0] and tuple(frame["token"]) == TEXTS


def test_the_heat_map_holds_the_text_escaped_and_its_shares(kept: KeptTokens) -> None:
    page = kept.html()
    spans = re.findall(r'<span style="--s:([\d.]+)"[^>]*>(.*?)</span>', page, re.DOTALL)
    assert [float(share) for share, _ in spans] == [1, 0.25, 0]
    assert "".join(html.unescape(text) for _, text in spans).replace("↵", "") == "".join(TEXTS)
    assert EVIL not in page and "it fell back" in page and '["110", "100", "100", "100"]' in page


def test_two_heat_maps_of_one_notebook_do_not_share_an_id(kept: KeptTokens) -> None:
    other = KeptTokens(kept.press, kept.tokens, kept.held_back, ~kept.kept)
    names = [re.findall(r'id="(kept-\w+)"', one.html()) for one in (kept, other)]
    assert names[0] != names[1] and all(len(name) == 1 for name in names)


def test_the_figure_has_a_row_per_head_and_a_column_per_token(kept: KeptTokens) -> None:
    upper, lower = kept.figure().axes
    assert lower.images[0].get_array().tolist() == kept.kept.reshape(4, 3).tolist()
    assert [bar.get_height() for bar in upper.patches] == [1, 0.25, 0]


def test_files_are_written_by_their_endings(kept: KeptTokens, tmp_path: Path) -> None:
    for name, begins in (("map.html", b"<!doctype html>"), ("map.png", b"\x89PNG"), ("map.svg", b"<?xml")):
        kept.save(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(begins)
    with pytest.raises(UsageError, match=r"map.txt: the ending must be one of .html, .png"):
        kept.save(tmp_path / "map.txt")


@pytest.mark.end_to_end
@pytest.mark.xdist_group("browser")
def test_a_reader_chooses_layer_and_head(kept: KeptTokens, chromium: Any, tmp_path: Path) -> None:
    from selenium.webdriver.support.ui import Select

    kept.save(tmp_path / "map.html")
    chromium.get((tmp_path / "map.html").as_uri())

    def shares() -> list[str]:
        script = "return [...document.querySelectorAll('.text span')].map(one => one.style.getPropertyValue('--s'))"
        return list(chromium.execute_script(script))

    assert shares() == ["1.000", "0.250", "0.000"]
    Select(chromium.find_element("css selector", "[data-of='layer']")).select_by_visible_text("0")
    assert shares() == ["1.000", "0.500", "0.000"]
    Select(chromium.find_element("css selector", "[data-of='head']")).select_by_visible_text("1")
    assert shares() == ["1.000", "0.000", "0.000"]
    assert chromium.get_log("browser") == []


@pytest.mark.end_to_end
@pytest.mark.xdist_group("browser")
@pytest.mark.parametrize(("site", "notebook", "is_dark"), [("slate", "true", True), ("default", "false", False)])
def test_its_ink_is_that_of_the_site_around_a_notebook(
    kept: KeptTokens, chromium: Any, tmp_path: Path, site: str, notebook: str, is_dark: bool
) -> None:
    page = tmp_path / "site.html"
    body = f'<body data-md-color-scheme="{site}"><div data-jp-theme-light="{notebook}">{kept.html()}</div></body>'
    page.write_text(f"<meta charset=utf-8>{body}")
    chromium.get(page.as_uri())
    color = chromium.execute_script("return getComputedStyle(document.querySelector('.kept-map')).color")
    assert (sum(map(int, re.findall(r"\d+", color)[:3])) > 3 * 128) == is_dark, color
