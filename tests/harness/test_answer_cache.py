"""lm-eval's ``--use_cache`` never hands one press the answers of another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.model import KVPress

TEXT = "the cold river ran past an old mill where seven grey geese slept " * 6


def requests() -> list[Instance]:
    return [Instance("loglikelihood", {}, (TEXT, f" {word}"), 0, ("t", i, 1)) for i, word in enumerate(["a", "geese"])]


def cached(checkpoint_dir: Path, file: Path, **arguments: Any) -> CachingLM:
    return CachingLM(KVPress(pretrained=str(checkpoint_dir), device="cpu", **arguments), str(file))


def test_the_same_setting_is_answered_from_the_cache(checkpoint_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "answers.db"
    first = cached(checkpoint_dir, file, press="knorm")
    answers = first.loglikelihood(requests())
    first.dbdict.close()
    again = cached(checkpoint_dir, file, press="knorm", batch_size=2)
    assert again.loglikelihood(requests()) == answers
    assert again.lm.describe()["tasks"] == {}, "nothing was computed"


@pytest.mark.parametrize(
    "other",
    [
        {"press": "none"},
        {"press": "knorm", "compression_ratio": 0.75},
        {"press": "knorm", "query_tokens": 0},
        {"press": "knorm", "add_bos_token": True},
        {"press": "knorm", "mixed_precision_dtype": "bfloat16"},
        {"press": "knorm", "think_end_token": " the"},
    ],
)
def test_another_setting_is_refused(checkpoint_dir: Path, tmp_path: Path, other: dict[str, Any]) -> None:
    first = cached(checkpoint_dir, tmp_path / "answers.db", press="knorm")
    first.loglikelihood(requests())
    first.dbdict.close()
    with pytest.raises(UsageError, match="answers under another setting .*choose another file") as caught:
        cached(checkpoint_dir, tmp_path / "answers.db", **other)
    assert "\n" not in str(caught.value)


def test_answers_of_unknown_origin_are_refused(checkpoint_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown origin"):
        lm = cached(checkpoint_dir, tmp_path / "answers.db")
        del lm.dbdict["lm_eval_kvpress.owner"]
        lm.dbdict["hash of a request"] = (-1.0, True)
        lm.dbdict.commit()
        lm.dbdict.close()
        cached(checkpoint_dir, tmp_path / "answers.db")
