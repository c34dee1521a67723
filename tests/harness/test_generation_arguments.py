"""What lm-eval asks of generated text is followed or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_eval_requests import generation_requests, ours

from lm_eval_kvpress.errors import UsageError


@pytest.mark.parametrize(
    "gen_kwargs",
    [
        {"num_beams": 4},
        {"penalty_alpha": 0.6},
        {"do_sample": True, "top_p": 2},
        *({"max_gen_toks": count} for count in (100_000, 0, -5)),
    ],
)
def test_unsupported_generation_arguments_are_errors(checkpoint_dir: Path, gen_kwargs: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="not supported|leave room|top_p"):
        ours(checkpoint_dir).generate_until(generation_requests(until=[], **gen_kwargs), disable_tqdm=True)
