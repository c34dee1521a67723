"""Results of a sweep that are no longer what it wrote are refused; other folders need no manifest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.report.manifests import FORMAT, refuse_damage
from lm_eval_kvpress.sweep.manifest import Manifest, seal

FILES_3 = f'{{"format": "{FORMAT}", "files": 3}}'


def sealed(folder: Path) -> Path:
    file = folder / "results" / "model" / "results_1.json"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    file.with_name("samples_t_1.jsonl").write_text('{"doc_id": 0}\n{"doc_id": 1}\n')
    seal(folder / "results")
    return file


def test_samples_that_lost_a_whole_line_are_refused_by_name(tmp_path: Path) -> None:
    file = sealed(tmp_path)
    refuse_damage(file)
    os.truncate(file.with_name("samples_t_1.jsonl"), 14)
    with pytest.raises(UsageError, match=r"samples_t_1\.jsonl is not what its sweep wrote") as caught:
        refuse_damage(file)
    assert "\n" not in str(caught.value)


def test_samples_that_are_gone_are_no_damage(tmp_path: Path) -> None:
    file = sealed(tmp_path)
    file.with_name("samples_t_1.jsonl").unlink()
    refuse_damage(file)


@pytest.mark.parametrize("content", ["", "[]", '{"format": "a web page"}', FILES_3, FILES_3.replace("3", '{"a": 3}')])
def test_a_manifest_of_somebody_else_says_nothing(content: str, tmp_path: Path) -> None:
    file = sealed(tmp_path)
    (tmp_path / "results" / "manifest.json").write_text(content)
    refuse_damage(file)


def test_the_format_is_the_one_that_sweeps_write() -> None:
    assert Manifest.model_fields["format"].default == FORMAT
