from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sweep_runs import manager, write_tasks

from lm_eval_kvpress.sweep import run


@pytest.fixture(scope="session")
def tasks_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("sweep_tasks"))


@pytest.fixture(autouse=True)
def only_these_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "task_manager", lambda settings, cell: manager(settings.include_path))


@pytest.fixture(autouse=True, scope="session")
def no_listing_of_packages() -> Iterator[None]:
    """lm-eval asks pip for the installed packages with every result, which takes longer than the evaluations here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "not asked for")
        yield
