"""The tables of decoding presses: every press of the catalog is run at every size, and rows are sorted."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml

from lm_eval_kvpress.presses.decodable import DECODING_PRESSES
from lm_eval_kvpress.sweep.cells import cells_of
from lm_eval_kvpress.sweep.command import settings_from
from scripts.studies import decoding_agreement, decoding_presses, press_table
from scripts.studies.decoding_presses import EAGER, PRESSES, Point, settings, table


def test_every_decoding_press_is_run_at_every_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (folder := tmp_path / press_table.FOLDER).mkdir(parents=True)
    for press, tensors in (
        ("qfilter", {"q_filters": torch.ones(4, 4, 64)}),
        ("expected_attention_stats", {"query_mean": torch.ones(4, 4, 64), "query_cov": torch.ones(4, 4, 64, 64)}),
    ):
        (folder / f"{press}.safetensors").write_bytes(safetensors.torch.save(tensors, {"press": press}))
    names = list[str]()
    for attention, presses in (("eager", EAGER), ("sdpa", PRESSES)):
        file = tmp_path / f"{attention}.yaml"
        file.write_text(yaml.safe_dump(settings(presses, attention)))
        cells = cells_of(settings_from(["--config", str(file), "--output_path", str(tmp_path / "sweep")]))
        names += [str(cell.arguments["press"]) for cell in cells if cell.arguments["press"] != "none"]
    assert {name.rpartition(":")[2] for name in names} == set(DECODING_PRESSES)
    assert len(names) == 1 + 2 * len({*EAGER, *PRESSES}), "and one cell in which nothing is evicted"


def test_rows_are_sorted_and_the_full_cache_stands_first() -> None:
    points = [
        Point("streaming_llm", decoding_presses.CONTEXT + decoding_presses.SCORED, 45.0, 1.0),
        *(Point("keydiff", size, perplexity, 0.8) for size, perplexity in ((192, 47.0), (64, 48.0))),
        *(Point("streaming_llm", size, perplexity, 0.9) for size, perplexity in ((64, 47.5), (192, 46.0))),
        *(Point("compression_ratio_decoding:keydiff", ratio, 50 * ratio, ratio) for ratio in (0.5, 0.9)),
    ]
    assert table(points).splitlines()[2:] == [
        "| `none` | 45.0 | 100.0 % |",
        "| `compression_ratio_decoding:keydiff` | 45.0 / 25.0 | 90.0 / 50.0 % |",
        "| `streaming_llm` | 47.5 / 46.0 | 90.0 / 90.0 % |",
        "| `keydiff` | 48.0 / 47.0 | 80.0 / 80.0 % |",
    ]


def test_the_share_counts_entries_that_both_keep_in_any_order() -> None:
    keys = torch.arange(24.0).view(2, 4, 3)
    assert decoding_agreement.share([keys], [keys.flip(1)]) == 1
    assert decoding_agreement.share([keys], [torch.cat([keys[:, 2:], keys[:, 2:] + 0.5], dim=1)]) == 0.5
