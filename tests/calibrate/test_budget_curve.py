"""LU-KV's curve spends every budget best on an untouched model's attention; its hull is that of the definition."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import tiny_llama, tiny_neox
from references import distinct_tokens
from statistics_files import windows
from transformers import PreTrainedModel

from lm_eval_kvpress.calibrate.budget_curve import concave, gains, lukv, prune_shares
from lm_eval_kvpress.models.architectures import present
from lm_eval_kvpress.presses.parse import parse_press


@pytest.mark.parametrize("make", [tiny_neox, tiny_llama])
def test_gains_are_later_attention_times_what_values_write(make: Callable[..., PreTrainedModel]) -> None:
    """Under knorm: in the order of the keys' norms, first and newest entries before all others."""
    window, untouched = distinct_tokens(90, 211, seed=1), make("eager")  # of repeated ones norms tie in the first layer
    half = len(window) // 2
    found = gains(present(make()), window, parse_press("knorm"))
    with torch.inference_mode():
        out = untouched(torch.tensor([window]), output_attentions=True, use_cache=True)
    outputs = [module for name, module in untouched.named_modules() if name.endswith(("attention.dense", "o_proj"))]
    for layer, (weights, entries, output) in enumerate(
        zip(out.attentions, out.past_key_values.layers, outputs, strict=True)
    ):
        keys, values = entries.keys[0, :, :half].double().numpy(), entries.values[0, :, :half].double().numpy()
        num_kv_heads, _, head_dim = keys.shape
        by_head = output.weight.detach().double().numpy().reshape(-1, num_kv_heads, 4 // num_kv_heads, head_dim)
        written = np.linalg.norm(np.einsum("ekgd,kpd->kgpe", by_head, values), axis=-1)
        paid = weights[0].double().numpy()[:, half:, :half].sum(axis=1).reshape(written.shape)
        utility = (paid * written).sum(axis=1)  # (K, P)
        norms = np.linalg.norm(keys, axis=-1)
        norms[:, :4] = norms[:, -1:] = -1
        expected = np.take_along_axis(utility, np.argsort(norms, axis=1, kind="stable"), axis=1)
        assert np.abs(found[layer] - expected).max() < 1e-4


def test_first_and_newest_entries_come_first_as_many_as_are_protected() -> None:
    window, model = distinct_tokens(40, 211, seed=1), present(tiny_neox())
    found = gains(model, window, parse_press("knorm"), sink=20, window=0)
    first = gains(model, window, parse_press("streaming_llm", {"compression_ratio": 0}), sink=20, window=0)
    assert np.array_equal(found, first), "all of a context is protected, so that no score decides"


def test_the_hull_is_the_least_concave_function_above() -> None:
    """By its definition: a slope is the least, over what lies before, of the greatest mean over what follows."""
    for seed in range(5):
        steps = np.random.default_rng(seed).random(12)
        sums = np.concatenate([[0.0], steps.cumsum()])
        expected = [
            min(
                max((sums[end] - sums[start]) / (end - start) for end in range(place + 1, len(sums)))
                for start in range(place + 1)
            )
            for place in range(len(steps))
        ]
        np.testing.assert_allclose(concave(steps), expected, atol=1e-12)


def test_no_other_split_of_a_budget_is_worth_more() -> None:
    generator = np.random.default_rng(0)
    falling = np.sort(generator.random((1, 2, 10)), axis=-1)[..., ::-1]  # each head's own hull
    worth = np.concatenate([np.zeros((2, 1)), falling[0].cumsum(axis=-1)], axis=1)
    for percent, shares in enumerate(prune_shares(falling), start=1):
        kept = np.rint((1 - shares[0]) * 10).astype(int)
        total = round(20 * (1 - percent / 100))
        assert kept.sum() == total
        best = max(worth[0, one] + worth[1, total - one] for one in range(11) if 0 <= total - one <= 10)
        assert worth[0, kept[0]] + worth[1, kept[1]] == pytest.approx(best)


def test_a_curve_keeps_the_budget_over_all_heads_of_all_layers() -> None:
    curve = lukv(present(tiny_neox()), windows(), parse_press("snapkv", {"window_size": 8}))["budget_curve"]
    assert tuple(curve.shape) == (99, 3, 4) and curve.min() >= 0 and curve.max() <= 1
    asked = torch.arange(1, 100) / 100
    assert (curve.mean(dim=(1, 2)) - asked).abs().max() < 0.005
    assert (curve.diff(dim=0) >= -1e-6).all(), "no head gains entries where more go"
    assert curve.std(dim=(1, 2)).max() > 0.05
