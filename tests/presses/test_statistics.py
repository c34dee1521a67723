"""Files of statistics: what is read, what is refused in one line, and what a published file is."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from press_cases import run, tokens
from statistics_files import LLAMA, NEOX, statistics_file

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.parse import parse_press
from lm_eval_kvpress.presses.statistics import read_statistics


def written(file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None) -> str:
    file.write_bytes(safetensors.torch.save(tensors, metadata))
    return str(file)


def test_files_that_are_no_statistics_of_the_press_are_refused_in_one_line(tmp_path: Path) -> None:
    filters = {"q_filters": torch.ones(3, 4, 16)}
    (tmp_path / "text.safetensors").write_text("no tensors here")
    files = {
        "cannot be read": str(tmp_path / "missing.safetensors"),
        "cannot be read .*eader": str(tmp_path / "text.safetensors"),
        "does not say of which weights": written(tmp_path / "a.safetensors", filters, None),
        "are those of press=expected_attention_stats": statistics_file("expected_attention_stats", NEOX),
        "has no tensor q_filters": written(tmp_path / "b.safetensors", {"x": torch.ones(1)}, {"press": "qfilter"}),
        "hub:": "hub:" + str(tmp_path / "no_folder"),
    }
    for message, file in files.items():
        with pytest.raises(UsageError, match=message) as caught:
            parse_press("qfilter", {"statistics": file})
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="calibrate qfilter writes it"):
        parse_press("adakv:qfilter")


def test_statistics_of_another_shape_are_refused(models: dict[str, PressableModel]) -> None:
    spec = parse_press("qfilter", {"statistics": statistics_file("qfilter", LLAMA)})
    with pytest.raises(UsageError, match=r"q_filters has shape \(3, 2, 16\), and this model needs \(3, 4, 16\)"):
        run(models["neox sdpa"], spec, tokens(1, 40))


def test_published_files_are_read_without_metadata(models: dict[str, PressableModel], tmp_path: Path) -> None:
    ours = statistics_file("qfilter", LLAMA)
    published = read_statistics("qfilter", ours).tensors
    written(tmp_path / "model.safetensors", dict(published), {"format": "pt"})
    specs = [parse_press("qfilter", {"statistics": name}) for name in (ours, f"hub:{tmp_path}")]
    caches = [run(models["llama sdpa"], spec, tokens(1, 60)) for spec in specs]
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(one.keys, other.keys)
    assert specs[1].describe()["statistics"].keys() == {"file", "sha256"}


def test_a_file_that_was_written_anew_is_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    for value in (1.0, 2.0):
        written(file, {"q_filters": torch.full((3, 4, int(16 * value)), value)}, {"press": "qfilter"})
        found = read_statistics("qfilter", str(file))
        assert found.tensors["q_filters"].unique().tolist() == [value]
    assert len(found.sha256) == 64
