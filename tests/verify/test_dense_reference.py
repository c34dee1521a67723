"""The dense reference is the plain model but for the entries that it is told to hide."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_neox

from lm_eval_kvpress.verify import dense_reference


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dense_reference_is_the_plain_model_where_nothing_is_evicted(attention: str) -> None:
    model = tiny_neox(attention)
    tokens = torch.randint(0, 200, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    plain = dense_reference.logits(model, tokens)[:-1].log_softmax(dim=-1)
    expected = plain.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    nothing = [torch.zeros(4, 40, dtype=torch.bool)] * 3
    for evicted in (None, nothing):
        torch.testing.assert_close(
            dense_reference.log_probabilities(model, tokens, evicted), expected, atol=1e-4, rtol=0
        )
    assert model.config._attn_implementation == attention
    assert not any("dense_probe" in module.__dict__ for module in model.modules())


def test_dense_reference_hides_evicted_entries_from_later_tokens_only() -> None:
    """Evicting everything but the first entry leaves the prefill as it is, and later tokens changed."""
    model = tiny_neox()
    tokens = torch.randint(0, 200, (50,), generator=torch.Generator().manual_seed(1)).tolist()
    evicted = torch.ones(4, 40, dtype=torch.bool)
    evicted[:, 0] = False
    full = dense_reference.log_probabilities(model, tokens)
    masked = dense_reference.log_probabilities(model, tokens, [evicted] * 3)
    torch.testing.assert_close(masked[:39], full[:39], atol=1e-5, rtol=0)
    assert (masked[40:] - full[40:]).abs().max() > 0.1
