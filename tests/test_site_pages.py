"""Links that work on GitHub lead to the right pages of the documentation site."""

from __future__ import annotations

import pytest
from repository import ROOT

pytest.importorskip("mkdocs", reason="the documentation site's tools are not installed: make docs")

from mkdocs.config.defaults import MkDocsConfig  # noqa: E402
from mkdocs.exceptions import PluginError  # noqa: E402
from mkdocs.structure.files import File, Files  # noqa: E402
from mkdocs.structure.pages import Page  # noqa: E402

from scripts.site_pages import OUTSIDE_DOCS, link_on_site, on_page_content  # noqa: E402


@pytest.mark.parametrize(
    "source, page, target, on_site",
    [
        ("docs/sweep.md", "sweep.md", "report.md", "report.md"),
        ("docs/experiments/README.md", "experiments/README.md", "../performance.md", "../performance.md"),
        ("docs/usage.md", "usage.md", "../README.md", "index.md"),
        ("docs/architecture.md", "architecture.md", "../CONTRIBUTING.md", "contributing.md"),
        ("CONTRIBUTING.md", "contributing.md", "docs/architecture.md", "architecture.md"),
        ("tasks/demo/README.md", "tasks/demo.md", "../../docs/arguments.md", "../arguments.md"),
        ("docs/results.md", "results.md", "../tasks/kvpress_ppl/README.md", "tasks/kvpress_ppl.md"),
    ],
)
def test_a_link_of_the_repository_is_one_of_the_site(source: str, page: str, target: str, on_site: str) -> None:
    assert link_on_site(target, source, page, "https://host/owner/name") == on_site


@pytest.mark.parametrize(
    "repository, link", [("https://host/name", "https://host/name/blob/main/scripts/demo.py"), ("", "")]
)
def test_a_link_to_another_file_leads_to_the_repository(repository: str, link: str) -> None:
    assert link_on_site("../scripts/demo.py", "docs/usage.md", "usage.md", repository) == link


def test_a_link_to_no_file_ends_the_build() -> None:
    with pytest.raises(PluginError, match=r"docs/usage.md: there is no ../scripts/no.py"):
        link_on_site("../scripts/no.py", "docs/usage.md", "usage.md", "")


def test_pages_from_outside_exist() -> None:
    assert [source for source in OUTSIDE_DOCS if not (ROOT / source).is_file()] == []


def test_links_of_a_notebook_lead_to_pages_and_one_to_no_page_ends_the_build() -> None:
    config = MkDocsConfig()
    config.load_dict({"site_name": "x", "docs_dir": str(ROOT / "docs"), "site_dir": "/nowhere"})
    names = ("guides/notebook.ipynb", "api.md", "guides/own_task.md")
    notebook, *others = (File(name, str(ROOT / "docs"), "/nowhere", use_directory_urls=True) for name in names)
    notebook.__dict__["url"] = "guides/notebook/"
    page, files = Page("x", notebook, config), Files([notebook, *others])
    html = '<a href="../api.md#errors">a</a> <a href="own_task.md">b</a> <a href="https://x/y.md">c</a>'
    linked = '<a href="../../api/#errors">a</a> <a href="../own_task/">b</a> <a href="https://x/y.md">c</a>'
    assert on_page_content(html, page, config, files) == linked
    with pytest.raises(PluginError, match=r"notebook.ipynb: there is no none.md"):
        on_page_content('<a href="none.md">', page, config, files)
