"""A checkpoint under test is loaded twice, with the same arguments, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.verify.subject import Subject


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"press": "snapkv"}, "leave press out"),
        ({"peft": "some/adapter"}, "leave peft out"),
        ({"kv_quant": "int4"}, "under its own presses and settings: leave kv_quant out"),
        ({"query_aware": False}, "leave query_aware out"),
        ({"compression_ratio": 0.5}, "leave compression_ratio out"),
        ({"pretrained": 3}, "cannot load pretrained=3"),
        ({"max_length": 64}, "128"),
        ({"dtype": "float32", "presss": 1}, "unknown argument"),
    ],
)
def test_arguments_that_verify_cannot_follow_are_errors(
    checkpoint_dir: Path, arguments: dict[str, object], complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint):
        Subject.load({"pretrained": str(checkpoint_dir), "device": "cpu", **arguments})


def test_checks_run_without_quick_kernels_where_these_are_refused(checkpoint_dir: Path) -> None:
    subject = Subject.load({"pretrained": str(checkpoint_dir), "device": "cpu", "fast": False})
    assert not subject.under("snapkv").session.settings.fast


def test_both_copies_hold_the_same_weights_and_configurations_of_their_own(checkpoint_dir: Path) -> None:
    subject = Subject.load({"pretrained": str(checkpoint_dir), "device": "cpu"})
    ours, untouched = (model.get_input_embeddings().weight for model in (subject.lm.model, subject.untouched))
    assert torch.equal(ours, untouched) and ours is not untouched
    assert subject.lm.model.config is not subject.untouched.config


def test_every_press_of_the_panel_runs_on_the_loaded_weights(checkpoint_dir: Path) -> None:
    subject = Subject.load({"pretrained": str(checkpoint_dir), "device": "cpu"})
    for press in subject.presses(none=True):
        lm = subject.under(press)
        assert lm.model is subject.lm.model and lm.session.settings.press.name == press
