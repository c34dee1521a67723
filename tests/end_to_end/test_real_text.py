"""Real WikiText-2 and PG-19 text under the real Pythia tokenizer: presses differ through the cache, and only there."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from real_data import DATA
from transformers import AutoTokenizer, GPTNeoXForCausalLM

from lm_eval_kvpress.harness.model import KVPress

PRESSES = ("snapkv", "streaming_llm", "pyramidkv", "random")
NUM_CHARACTERS = 3_500  # of each text: about 800 tokens

pytestmark = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"no real texts and tokenizer in {DATA}: set KVPRESS_DATA_DIR"
)


@pytest.fixture(scope="module")
def pythia_like(tmp_path_factory: pytest.TempPathFactory, make_neox: Callable[..., GPTNeoXForCausalLM]) -> Path:
    """A tiny GPTNeoX with Pythia's vocabulary, on disk with Pythia's tokenizer."""
    folder = tmp_path_factory.mktemp("pythia_like")
    make_neox(vocab_size=50_304, max_positions=512).save_pretrained(folder)
    AutoTokenizer.from_pretrained(DATA / "pythia_tokenizer").save_pretrained(folder)
    return folder


def requests() -> list[Instance]:
    def texts(file: Path, key: str) -> list[str]:
        with file.open() as lines:
            return [json.loads(line)[key][:NUM_CHARACTERS] for line, _ in zip(lines, range(1), strict=False)]

    documents = [*texts(DATA / "wikitext2" / "test.jsonl", "page"), *texts(DATA / "pg19" / "test.jsonl", "text")]
    return [
        Instance("loglikelihood_rolling", {}, (text,), 0, ("real", index, 1)) for index, text in enumerate(documents)
    ]


def total(checkpoint: Path, **arguments: Any) -> float:
    lm = KVPress(pretrained=str(checkpoint), device="cpu", batch_size=4, **arguments)
    return math.fsum(lm.loglikelihood_rolling(requests(), disable_tqdm=True))


@pytest.mark.parametrize("ratio", [0.5, 0.9])
def test_presses_differ_through_the_cache_and_agree_in_one_pass(pythia_like: Path, ratio: float) -> None:
    figures = {}
    for rolling in ("prefix", "one_pass"):
        figures[rolling] = {"none": total(pythia_like, rolling=rolling)}
        for press in PRESSES:
            # At 0.9 pyramidkv becomes snapkv unless its window is small (see the next test).
            window = {"window_size": 4} if press == "pyramidkv" else {}
            figures[rolling][press] = total(
                pythia_like, rolling=rolling, press=press, compression_ratio=ratio, **window
            )
    assert len({round(figure, 2) for figure in figures["prefix"].values()}) == len(PRESSES) + 1, figures["prefix"]
    assert len(set(figures["one_pass"].values())) == 1, figures["one_pass"]


def test_where_pyramidkv_falls_back_its_figure_is_snapkvs_and_the_record_says_so(pythia_like: Path) -> None:
    arguments: dict[str, Any] = {"pretrained": str(pythia_like), "device": "cpu", "compression_ratio": 0.9}
    pyramid, snap = (KVPress(press=press, batch_size=4, **arguments) for press in ("pyramidkv", "snapkv"))
    scores = [math.fsum(lm.loglikelihood_rolling(requests(), disable_tqdm=True)) for lm in (pyramid, snap)]
    # Not to the bit: PyramidKV rounds the number kept, SnapKV cuts it.
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)
    notes = pyramid.describe()["tasks"]["real"]["notes"]
    assert any("fell back to snapkv" in note for note in notes), notes
    assert not any("fell back" in note for note in snap.describe()["tasks"]["real"]["notes"])
