"""What all fast paths have in common."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lm_eval_kvpress.engine.prefill import prefill_padded
from lm_eval_kvpress.models.pressable import PressableModel


def test_cudnns_attention_is_off_in_forwards_alone(make_pressable: Callable[..., PressableModel]) -> None:
    model, seen = make_pressable(), list[bool]()
    before = torch.backends.cuda.cudnn_sdp_enabled()
    assert before, "PyTorch has it on"
    with model.attentions[0].register_forward_hook(lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled())):
        for for_cache_only in (False, True):  # the second forward is left by an exception
            prefill_padded(model, [[1, 2, 3]], for_cache_only=for_cache_only)
            assert torch.backends.cuda.cudnn_sdp_enabled()
    assert seen == [False, False]
