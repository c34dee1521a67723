"""KVgrad on the model as it is held here: a replay forward and backward, and tokens that its gradients point at stay.

The tokenizer and the cache come to it as to KVzip; scores and choice are kvpress's own. Does not know models or how a
prefill is run.

Source: openreview.net/forum?id=cg1wTCJjjk; kvpress ``presses/kvgrad_press.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import kvpress

from lm_eval_kvpress.presses.replay import ReplayedKVzipPress
from lm_eval_kvpress.presses.silenced import silenced


@dataclass
class ReplayedKVgradPress(kvpress.KVgradPress, ReplayedKVzipPress):
    """KVgrad: KVzip's attention, times the size of what a value writes, times how much the outcome depends on it.

    It hides entries head by head. Heads, and without ``layerwise`` layers too, share one ratio. kvpress's class comes
    first: it leaves inference mode, in which no gradient can be taken, around what it believes to be its KVzip.
    """

    name: ClassVar[str] = "kvgrad"

    def __post_init__(self) -> None:
        with silenced("kvpress.presses.kvgrad_press"):  # about the time of replays, which is measured here
            super().__post_init__()
