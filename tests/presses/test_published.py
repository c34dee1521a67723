"""What authors published is read as what calibrate writes, and scores as in kvpress's own classes."""

from __future__ import annotations

import json
from pathlib import Path

import kvpress
import numpy as np
import pytest
import safetensors.torch
import torch
from kvpress.presses.kvzap_press import KVzapConfig, KVzapModel
from press_cases import run, tokens

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.parse import parse_press
from lm_eval_kvpress.presses.statistics import HUB, read_statistics


@pytest.fixture
def heads(tmp_path: Path) -> np.ndarray:
    """DuoAttention's two files, of a model of three layers and four key-value heads; some scores are beyond 0..1."""
    scores = np.random.default_rng(1).random((3, 4)) * 1.4 - 0.2
    np.savetxt(tmp_path / "full_attention_heads.tsv", scores, delimiter="\t")
    (tmp_path / "config.json").write_text(json.dumps({"sink_size": 3, "recent_size": 7}))
    return scores


def test_heads_that_retrieve_least_keep_first_and_newest_entries(
    models: dict[str, PressableModel], heads: np.ndarray, tmp_path: Path
) -> None:
    spec = parse_press("duo_attention", {"statistics": f"{HUB}{tmp_path}", "head_compression_ratio": 0.4})
    cache = run(models["neox sdpa"], spec, tokens(1, 40))
    hidden = torch.stack([layer.hidden[0] for layer in cache.layers])  # type: ignore[index]
    streaming = np.zeros(12, dtype=bool)
    streaming[np.argsort(heads.clip(0, 1), axis=None)[: round(12 * 0.4)]] = True
    expected = torch.from_numpy(streaming.reshape(3, 4))[..., None] & torch.zeros(40).bool().index_fill(
        0, torch.arange(3, 33), True
    )
    assert torch.equal(hidden, expected)
    given = parse_press("duo_attention", {"statistics": f"{HUB}{tmp_path}", "sink_size": 0, "recent_size": 39})
    (layer, *_) = run(models["neox sdpa"], given, tokens(1, 40)).layers
    assert layer.hidden is not None and layer.hidden[..., 1:].sum() == 0 and layer.hidden.any()


@pytest.mark.parametrize("hidden_dim", [None, 5])
def test_a_published_surrogate_scores_as_kvpress_own_module(
    models: dict[str, PressableModel], hidden_dim: int | None, tmp_path: Path
) -> None:
    config = KVzapConfig(input_dim=64, output_dim=4, n_modules=3, hidden_dim=hidden_dim)
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        module = KVzapModel(config).eval()
    safetensors.torch.save_file(module.state_dict(), tmp_path / "model.safetensors")
    spec = parse_press("kvzap", {"statistics": f"{HUB}{tmp_path}"})
    theirs = kvpress.KVzapPress(compression_ratio=0.5)
    theirs.kvzap_model, theirs.post_init_from_model = module, lambda model: None  # type: ignore[method-assign]
    model = models["neox sdpa"]
    found = run(model, spec, tokens(1, 40))
    with model.presented(), torch.inference_mode():
        ours = spec.build(40)
        assert ours is not None
        ours.post_init_from_model(model.model)
        hidden_states = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(0))
        for attention in model.attentions:
            arguments = (attention, hidden_states, None, None, None, {})
            torch.testing.assert_close(ours.score(*arguments), theirs.score(*arguments))  # type: ignore[attr-defined]
    assert found.kept() == [[20] * 3]


def test_a_published_curve_prunes_each_head_by_its_own_share(models: dict[str, PressableModel], tmp_path: Path) -> None:
    shares = np.random.default_rng(2).random((3, 4))
    curve = np.zeros((99, 3, 4))
    curve[39] = shares
    np.save(tmp_path / "curve.npy", curve)
    spec = parse_press("lukv:knorm", {"statistics": f"{HUB}{tmp_path}/curve.npy", "compression_ratio": 0.4})
    cache = run(models["neox sdpa"], spec, tokens(1, 50))
    kept = np.array([(~layer.hidden[0]).sum(dim=-1).numpy() for layer in cache.layers])  # type: ignore[index]
    assert np.abs(kept - 50 * (1 - shares)).max() < 1
    assert np.abs(kept.sum(axis=1) - 50 * (1 - shares).sum(axis=1)).max() <= 1


def test_files_of_another_form_are_refused_in_one_line(heads: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "curve.txt").write_text("0.5")
    safetensors.torch.save_file({"layers.0.weight": torch.ones(4, 64)}, tmp_path / "model.safetensors")
    for press, name in (("duo_attention", ""), ("kvzap", ""), ("lukv:knorm", "/curve.txt"), ("lukv:knorm", "/no.npy")):
        with pytest.raises(UsageError) as caught:
            parse_press(press, {"statistics": f"{HUB}{tmp_path}{name}"})
        assert "\n" not in str(caught.value) and press.partition(":")[0] in str(caught.value)


def test_the_hash_covers_every_file(heads: np.ndarray, tmp_path: Path) -> None:
    before = read_statistics("duo_attention", f"{HUB}{tmp_path}").sha256
    (tmp_path / "config.json").write_text(json.dumps({"sink_size": 4, "recent_size": 7}))
    (tmp_path / "full_attention_heads.tsv").touch()
    assert read_statistics("duo_attention", f"{HUB}{tmp_path}").sha256 != before
