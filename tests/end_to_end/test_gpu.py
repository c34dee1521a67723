"""What only a GPU can show: the same answers as on a CPU, and batches that its memory sets the size of.

The tests of memory need the card for themselves: run this file alone, in a process of its own.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_presses import PRESSES
from conftest import tiny_tokenizer
from lm_eval.api.instance import Instance
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from lm_eval_kvpress.engine import batch_size
from lm_eval_kvpress.harness.model import KVPress

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

MIB = 2**20
NUM_CONTEXTS = 48


def assert_equal(found: list[Any], expected: list[Any]) -> None:
    """Answers of one kind: texts, or scores up to what the order of sums makes."""
    if isinstance(expected[0], str):
        assert found == expected
        return
    if isinstance(expected[0], tuple):
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        found, expected = ([score for score, _ in answers] for answers in (found, expected))
    torch.testing.assert_close([*map(float, found)], [*map(float, expected)], atol=1e-3, rtol=1e-5)


def both(checkpoint_dir: Path, **arguments: Any) -> tuple[KVPress, KVPress]:
    gpu, cpu = (KVPress(pretrained=str(checkpoint_dir), device=device, **arguments) for device in ("cuda", "cpu"))
    return gpu, cpu


TIE = ("knorm", "random")
"""Left out: repeated tokens have keys of one length in the first layer; each device breaks ties, and draws, its way."""


def requests_of_all_kinds() -> dict[str, list[Instance]]:
    """Contexts long enough for scores not to tie, as they do where a pooling window covers all entries."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=4)) for _ in range(40)]
    texts = [" ".join(draw.choices(words, k=30 + 8 * index)) for index in range(5)]
    arguments: dict[str, list[Any]] = {
        "loglikelihood": [(text, f" {word}") for text in texts for word in words[:4]],
        "loglikelihood_rolling": [(" ".join(texts[:num]),) for num in (1, 3, 5)],
        "generate_until": [(text, {"until": [], "max_gen_toks": 16}) for text in texts],
    }
    return {
        kind: [Instance(kind, {}, values, 0, (kind, index, 1)) for index, values in enumerate(several)]
        for kind, several in arguments.items()
    }


@pytest.mark.parametrize("press", [name for name in PRESSES if name not in TIE])
def test_answers_are_those_of_a_cpu(checkpoint_dir: Path, press: str) -> None:
    gpu, cpu = both(checkpoint_dir, press=press, batch_size=3, **PRESSES[press])
    for kind, requests in requests_of_all_kinds().items():
        found, expected = (getattr(lm, kind)(requests, disable_tqdm=True) for lm in (gpu, cpu))
        assert_equal(found, expected)
    assert set(gpu.describe()["decoding_steps"]) == {"few kernels, CUDA graph"}


def test_texts_under_a_decoding_press_are_those_of_a_cpu(checkpoint_dir: Path) -> None:
    gpu, cpu = both(checkpoint_dir, press="decoding:streaming_llm", target_size=24, batch_size=3)
    requests = requests_of_all_kinds()["generate_until"]
    assert_equal(gpu.generate_until(requests, disable_tqdm=True), cpu.generate_until(requests, disable_tqdm=True))


@pytest.fixture(scope="module")
def wide() -> GPTNeoXForCausalLM:
    """Wide enough for a context of 400 tokens to take megabytes: 48 of them do not fit beside each other below."""
    config = GPTNeoXConfig(
        vocab_size=512,
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        intermediate_size=2048,
        max_position_embeddings=512,
        initializer_range=0.05,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        return GPTNeoXForCausalLM(config).eval()


def requests_of(kind: str) -> list[Instance]:
    """Of equal length, so that all may be prefilled beside each other: letters that the tokenizer never joins."""
    draw = random.Random(1)
    texts = ["".join(draw.choices("QXZJ", k=400)) for _ in range(NUM_CONTEXTS)]
    second = " the end" if kind == "loglikelihood" else {"until": [], "max_gen_toks": 12}
    return [Instance(kind, {}, (text, second), 0, (kind, index, 1)) for index, text in enumerate(texts)]


def answered(model: GPTNeoXForCausalLM, kind: str, batch_size: Any) -> tuple[list[Any], KVPress]:
    lm = KVPress(pretrained=model, tokenizer=tiny_tokenizer(), batch_size=batch_size, press="snapkv")
    return getattr(lm, kind)(requests_of(kind), disable_tqdm=True), lm


@pytest.fixture
def little_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """So many MiB of the card are left free; the rest is held by somebody."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(free - request.param * MIB, dtype=torch.uint8, device="cuda")
    yield
    del held
    torch.cuda.empty_cache()


@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until"])
@pytest.mark.parametrize("little_memory", [700], indirect=True)
def test_an_automatic_batch_fits(
    wide: GPTNeoXForCausalLM, kind: str, little_memory: None, caplog: pytest.LogCaptureFixture
) -> None:
    expected, _ = answered(wide, kind, 1)
    with caplog.at_level(logging.WARNING):
        found, lm = answered(wide, kind, "auto")
    assert_equal(found, expected)
    assert "out of memory" not in caplog.text
    assert 1 < lm.session.runner.meter.records.summary()["num_batches"] < NUM_CONTEXTS, (
        "neither one by one nor all at once"
    )


@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until"])
@pytest.mark.parametrize("little_memory", [300], indirect=True)
def test_a_batch_that_does_not_fit_is_halved(
    wide: GPTNeoXForCausalLM,
    kind: str,
    little_memory: None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, _ = answered(wide, kind, 1)
    monkeypatch.setattr(batch_size, "SHARE_OF_FREE", 50)
    with caplog.at_level(logging.WARNING):
        found, _ = answered(wide, kind, "auto")
    assert_equal(found, expected)
    assert f"out of memory with {NUM_CONTEXTS} contexts at once; trying {NUM_CONTEXTS // 2}" in caplog.text
