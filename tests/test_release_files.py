"""The files around a release: changelog sections, workflows and the citation file say what a release needs."""

from __future__ import annotations

import pytest
import yaml
from repository import ROOT

from scripts.release_notes import notes_of

CHANGELOG = "# Changelog\n\n## 0.2.0 (2027-01-01)\n\nNew.\n\n### Fixed\n\n- A.\n\n## 0.1.0\n\nFirst.\n"


@pytest.mark.parametrize("version, notes", [("0.2.0", "New.\n\n### Fixed\n\n- A.\n"), ("0.1.0", "First.\n")])
def test_the_notes_of_a_release_are_its_section_of_the_changelog(version: str, notes: str) -> None:
    assert notes_of(version, CHANGELOG) == notes


@pytest.mark.parametrize("version", ["0.3.0", "0.2", "0x2.0"])
def test_a_version_without_a_section_has_no_notes(version: str) -> None:
    with pytest.raises(ValueError, match="no heading"):
        notes_of(version, CHANGELOG)


def test_the_changelog_has_a_section_that_a_release_can_use() -> None:
    assert len(notes_of("0.1.0", (ROOT / "CHANGELOG.md").read_text())) > 100


def test_continuous_integration_runs_the_script_of_the_repository() -> None:
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["steps"]
    assert ".ci/run" in [step.get("run") for step in steps]


@pytest.mark.parametrize("path", sorted(path.name for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")))
def test_issue_templates_and_the_citation_are_valid_yaml(path: str) -> None:
    assert yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE" / path).read_text())
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["cff-version"] == "1.2.0"
