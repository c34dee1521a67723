"""The change of basis is checked in every dtype that a checkpoint may be run in."""

from __future__ import annotations

from pathlib import Path

import torch

from lm_eval_kvpress.verify.presentation import check_basis
from lm_eval_kvpress.verify.subject import Subject


def test_the_change_of_basis_is_checked_in_16_bits_too(checkpoint_dir: Path) -> None:
    subject = Subject.load({"pretrained": str(checkpoint_dir), "device": "cpu"})
    assert subject.lm.config.dtype is subject.lm.model.dtype is torch.float32
    whats = [part.what for part in check_basis(subject).parts]
    assert whats == ["float32 logits, relative", "bfloat16 logits, relative"]
