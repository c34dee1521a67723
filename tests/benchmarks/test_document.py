"""A document holds the figures of one machine, dtype and set of versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.benchmarks import document
from scripts.machine import commit, described, machine


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    found = document.read(tmp_path / "new", "float32")
    found["evaluation"] = {"rows": [1]}
    document.write(found, tmp_path / "new")
    assert document.read(tmp_path / "new", "float32") == found


@pytest.mark.parametrize(
    ("change", "named"),
    [({"machine": {**machine(), "cpu": "Another"}}, "another cpu:"), ({"dtype": "float16"}, "another dtype:")],
)
def test_figures_of_another_machine_are_refused(tmp_path: Path, change: dict[str, object], named: str) -> None:
    document.write({"machine": machine(), "dtype": "float32", **change}, tmp_path)
    with pytest.raises(ValueError, match=named):
        document.read(tmp_path, "float32")


def test_a_machine_is_described_by_what_figures_depend_on() -> None:
    facts = machine()
    text = described(facts)
    assert facts["cpu"] in text and f"torch {facts['versions']['torch']}" in text and "GiB" in text
    assert facts["num_threads"] >= 1 and facts["memory_bytes"] > 2**28


def test_a_folder_without_git_has_no_commit(tmp_path: Path) -> None:
    assert commit(tmp_path) is None
