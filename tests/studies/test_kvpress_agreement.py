"""The agreement with kvpress's pipeline: finished rows are kept, and the table shows them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from scripts.studies import kvpress_agreement as study


def test_rows_that_are_there_are_shown_and_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "Sides", None)  # nothing is loaded
    rows, found = tmp_path / "rows.jsonl", study.Agreement(False, 2, 3e-5, True, True, False, 0.25)
    keys = [
        {"model": "m", "length": 384, "press": "tova", "query_aware": aware, "document": index}
        for aware in (False, True)
        for index in range(3)
    ]
    rows.write_text("".join(json.dumps(key | asdict(found)) + "\n" for key in keys))
    assert study.main([str(rows), "--model", str(tmp_path / "m"), "--presses", "tova", "--documents", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| m | 384 | tova | False | 3 | 0 | 6 | 3e-05 | 3 | 3 | 0 | 25% |"
    assert len(lines) == 4 and "| True |" in lines[3]
