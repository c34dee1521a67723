"""Statistics equal numpy's on queries captured inside an untouched model, in the checkpoint's own basis."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import tiny_llama, tiny_neox
from statistics_files import windows
from transformers import PreTrainedModel

from lm_eval_kvpress.calibrate.methods import METHODS, NUM_SKIPPED
from lm_eval_kvpress.engine.prefill import prefill
from lm_eval_kvpress.models.architectures import present
from lm_eval_kvpress.models.full_width import full_width_order
from lm_eval_kvpress.presses.parse import parse_press
from lm_eval_kvpress.presses.statistics import TENSORS

TOLERANCE = 1e-4
MODELS: Mapping[str, Callable[[], PreTrainedModel]] = {
    "neox": tiny_neox,
    "neox that rotates half": lambda: tiny_neox(rotary_pct=0.5),
    "llama": tiny_llama,
}


def captured(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """What transformers' own forward rotates and what comes out: queries ``(L, H, N, D)``, keys ``(L, K, N, D)``."""
    module, calls = importlib.import_module(type(model).__module__), list[tuple[torch.Tensor, ...]]()
    rotate = module.apply_rotary_pos_emb

    def watched(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        found = rotate(query, key, *args, **kwargs)
        calls.append((query.clone(), found[0].clone(), found[1].clone()))
        return found

    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr(module, "apply_rotary_pos_emb", watched)
        for window in windows():
            model(torch.tensor([window]))
    num_layers = model.config.num_hidden_layers
    by_name = dict(zip(("before", "after", "keys"), zip(*calls, strict=True), strict=True))
    return {
        name: np.stack(
            [
                np.concatenate([part[0, :, NUM_SKIPPED:].double().numpy() for part in parts[layer::num_layers]], axis=1)
                for layer in range(num_layers)
            ]
        )
        for name, parts in by_name.items()
    }


def by_numpy(press: str, queries: Mapping[str, np.ndarray], num_kv_heads: int) -> dict[str, np.ndarray]:
    if press == "expected_attention_stats":
        before = queries["before"]
        covariances = np.array([[np.cov(head, rowvar=False) for head in layer] for layer in before])
        return {"query_mean": before.mean(axis=2), "query_cov": covariances}
    left, _, right = np.linalg.svd(queries["after"], full_matrices=False)  # (L, H, N, D), _, (L, H, D, D)
    signs = np.sign(left[..., 0].sum(axis=-1))[..., None]
    filters = -signs * right[..., 0, :]
    num_layers, num_heads, head_dim = filters.shape
    return {"q_filters": filters.reshape(num_layers, num_kv_heads, num_heads // num_kv_heads, head_dim).mean(axis=2)}


@pytest.mark.parametrize("press", ["qfilter", "expected_attention_stats"])
@pytest.mark.parametrize("name", MODELS)
def test_statistics_equal_numpys_on_captured_queries(press: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = present(MODELS[name]())
    expected = by_numpy(press, captured(MODELS[name](), monkeypatch), model.num_key_value_heads)
    found = METHODS[press](model, windows())
    assert found.keys() == expected.keys() == TENSORS[press].keys()
    for key, tensor in found.items():
        difference = np.abs(tensor.numpy() - expected[key]).max()
        assert difference < TOLERANCE, (key, difference)


@pytest.mark.parametrize("order", ["own", "reordered"])
def test_filters_act_on_the_keys_of_the_untouched_model(
    order: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The press runs on reordered heads; filters in another order than the checkpoint's would keep other tokens."""
    window = windows()[2]
    model, untouched = present(tiny_neox()), tiny_neox()
    filters = METHODS["qfilter"](model, windows())["q_filters"]
    expected = kept_values(untouched, filters, window)
    if order == "reordered":
        filters = filters[..., full_width_order(16, 4)].contiguous()
    file = tmp_path / "filters.safetensors"
    file.write_bytes(safetensors.torch.save({"q_filters": filters}, {"press": "qfilter"}))
    press = parse_press("qfilter", {"statistics": str(file)}).build(len(window))
    cache = prefill(model, torch.tensor([window]), press)
    differences = [
        np.abs(np.sort(layer.values[0].double().numpy(), axis=1) - np.sort(values, axis=1)).max()
        for layer, values in zip(cache.layers, expected, strict=True)
    ]
    assert max(differences) < TOLERANCE if order == "own" else max(differences) > 0.1, differences


def kept_values(model: PreTrainedModel, filters: torch.Tensor, window: list[int]) -> list[np.ndarray]:
    """The values of the half of each head's entries whose keys stand against the filter most, ``(K, kept, D)``."""
    with torch.inference_mode():
        cache = model(torch.tensor([window]), use_cache=True).past_key_values
    found = []
    for layer, layer_filters in zip(cache.layers, filters, strict=True):
        scores = -np.einsum("ktd,kd->kt", layer.keys[0].double().numpy(), layer_filters.double().numpy())
        stay = np.argsort(-scores, axis=1)[:, : len(window) // 2]
        found.append(np.take_along_axis(layer.values[0].double().numpy(), stay[..., None], axis=1))
    return found
