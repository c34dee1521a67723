"""MkDocs hook: pages that are files outside `docs/`, links that work on GitHub too, and drawings that follow the theme.

Pages link to each other by the paths of the repository, so that they can be read there. This turns such a path into
that of the site's page, and puts a drawing into the page itself, where the site's style sheet reaches its colours. It
knows no content. MkDocs then checks that the page, and the heading, exist.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE_DOCS = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "lm_eval_kvpress/builtin/README.md": "builtin.md",
    "tasks/demo/README.md": "tasks/demo.md",
    "tasks/kvpress_ppl/README.md": "tasks/kvpress_ppl.md",
}
WITHOUT_SIDEBARS = {"leaderboard.md"}
"""Pages of wide tables."""
DRAWING = re.compile(r"^!\[([^\]]*)\]\(([^)\s]*drawings/[^)\s]+\.svg)\)$", re.MULTILINE)
NUMBER_AND_UNIT = re.compile(r"(?<=\d) (?=(?:%|KiB|MiB|GiB|GB|ms|s)(?!\w))")
LINK_IN_HTML = re.compile(r'href="([^":#]+\.md)(#[^"]*)?"')
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s:]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside `docs/`."""
    for source, page in OUTSIDE_DOCS.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let a page's links lead to pages of the site, draw its drawings, and name the repository to clone."""
    of_page = {on_site: source for source, on_site in OUTSIDE_DOCS.items()}
    source = of_page.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def relink(match: re.Match[str]) -> str:
        text, target, heading = match[1], match[2], match[3] or ""
        on_site = link_on_site(target, source, page.file.src_uri, config.repo_url or "")
        return f"[{text}]({on_site}{heading})" if on_site else text

    if page.file.src_uri in WITHOUT_SIDEBARS:
        page.meta["hide"] = ["navigation", "toc"]
    if config.repo_url:
        markdown = markdown.replace("git clone ADDRESS", f"git clone {config.repo_url}")
    return LINK.sub(relink, DRAWING.sub(lambda match: _drawn(match, source), markdown))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Keep a number and its unit on one line; let a notebook's links, which are HTML by now, lead to pages."""
    if page.file.src_uri.endswith(".ipynb"):
        return LINK_IN_HTML.sub(lambda match: _linked_page(match, page.file, files), html)
    return NUMBER_AND_UNIT.sub("\u00a0", html)


def _linked_page(match: re.Match[str], notebook: File, files: Files) -> str:
    """The link to another page as the site has it."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(notebook.src_uri), match[1]))
    found = files.get_file_from_path(path)
    if found is None:
        raise PluginError(f"docs/{notebook.src_uri}: there is no {match[1]}")
    return f'href="{found.url_relative_to(notebook)}{match[2] or ""}"'


def _drawn(match: re.Match[str], source: str) -> str:
    drawing = (ROOT / source).parent / match[2]
    return f"<figure>\n{drawing.read_text(encoding='utf-8')}</figure>"


def link_on_site(target: str, source: str, page: str, repository: str) -> str:
    """Translate a link.

    Args:
        target: as written, relative to `source`.
        source: the file that holds the link, relative to the repository.
        page: that file on the site, relative to the site's root.
        repository: its address, for files that are not part of the site.

    Returns:
        The link; empty for a file that is not part of the site, where the repository has no address.

    Raises:
        PluginError: there is no such file.
    """
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    on_site = {"README.md": "index.md", **OUTSIDE_DOCS}.get(path)
    if path.startswith("docs/"):
        on_site = path.removeprefix("docs/")
    if on_site is not None:
        return posixpath.relpath(on_site, posixpath.dirname(page) or ".")
    if not (ROOT / path).exists():
        raise PluginError(f"{source}: there is no {target}")
    return f"{repository}/blob/main/{path}" if repository else ""
