"""R-KV scores entries as its paper does, in loops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from decode_references import rkv_scores

from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.rkv import RKVPress

NUM, WINDOW = 26, 5


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("architecture", ["make_pressable", "make_pressable_llama"])
def test_scores_are_those_of_the_paper(architecture: str, threshold: float, request: pytest.FixtureRequest) -> None:
    make: Callable[..., PressableModel] = request.getfixturevalue(architecture)
    model, generator = make(), torch.Generator().manual_seed(3)
    heads, dim, attention = model.num_key_value_heads, model.head_dim, model.attentions[1]
    keys = torch.randn(2, heads, NUM, dim, generator=generator)
    keys[:, :, 9] = 1.1 * keys[:, :, 4]  # a repeated token
    hidden = torch.randn(2, WINDOW + 3, 64, generator=generator)
    turns = torch.randn(2, WINDOW + 3, dim // 2, generator=generator).repeat(1, 1, 2)
    cos, sin = turns.cos(), turns.sin()
    press = RKVPress(0.5, window_size=WINDOW, kernel_size=3, mix_lambda=0.3, redundancy_threshold=threshold)
    with model.presented():
        found = press.score(attention, hidden, keys, keys, None, {"position_embeddings": (cos, sin)})
        project: Callable[[torch.Tensor], torch.Tensor] = attention.q_proj  # type: ignore[assignment]
        queries = project(hidden[:, -WINDOW:]).view(2, WINDOW, -1, dim).transpose(1, 2)
    half = torch.complex(queries[..., : dim // 2], queries[..., dim // 2 :])
    turned = half * torch.complex(cos, sin)[:, None, -WINDOW:, : dim // 2]
    queries = torch.cat([turned.real, turned.imag], dim=-1).unflatten(1, (heads, -1))
    for row in range(2):
        for head in range(heads):
            sides = keys[row, head].double(), queries[row, head].double()
            expected = rkv_scores(*sides, WINDOW, 3, mix=0.3, threshold=threshold)
            assert (found[row, head, :-WINDOW] - expected[:-WINDOW]).abs().max() < 1e-6
            assert found[row, head, -WINDOW:].min() > found[row, head, :-WINDOW].max()


def test_of_tokens_that_are_alike_older_ones_are_more_redundant() -> None:
    keys = torch.eye(9)[None, None].clone()
    keys[0, 0, 5] = keys[0, 0, 7] = keys[0, 0, 1]
    redundancy = RKVPress()._redundancy(keys)[0, 0]
    assert redundancy[1] > redundancy[5] > redundancy[0]
    assert redundancy[7] == redundancy[0], "the newest of those that are alike is no more redundant than any other"
