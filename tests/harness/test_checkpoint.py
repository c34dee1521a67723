"""``pretrained`` is a folder that exists, a hub name, or the built-in checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.checkpoint import resolve_pretrained


def test_a_path_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match="no such folder"):
        resolve_pretrained("./nowhere/at/all")


def test_a_hub_name_stays_as_it_is() -> None:
    assert resolve_pretrained("EleutherAI/pythia-2.8b") == "EleutherAI/pythia-2.8b"


def test_the_home_folder_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve_pretrained("~/model") == str(tmp_path / "model")


def test_builtin_is_a_checkpoint_of_this_installation() -> None:
    assert (Path(resolve_pretrained("builtin")) / "config.json").is_file()
