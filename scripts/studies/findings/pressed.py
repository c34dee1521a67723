"""The model under a press, on the weights that are loaded."""

from __future__ import annotations

from typing import Any

from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.harness.parity import quiet_loader


def under(lm: KVPress, press: str, **arguments: Any) -> KVPress:
    """The same loaded model under a press."""
    if press == "none":
        arguments.pop("compression_ratio", None)
    with quiet_loader():
        return KVPress(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=4, press=press, **arguments)
