"""The seeds under which tasks are made. Some tasks draw their documents, as RULER's do.

Knows lm-eval's defaults. Does not know tasks.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED


def seed_as_lm_eval(torch_seed: int = DEFAULT_OTHER_SEED) -> None:
    """Seed Python, numpy and torch as `lm_eval.simple_evaluate` does before it makes tasks.

    Whoever loads tasks behind this call gets the documents that lm-eval's own command evaluates.
    """
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(torch_seed)
