"""Streams against an independent loop: keys cached before rotation, rotated by their place in the cache each step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpress import KeyDiffPress, LagKVPress, SnapKVPress, StreamingLLMPress, TOVAPress
from lm_eval.api.instance import Instance
from transformers import GPTNeoXForCausalLM
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

from lm_eval_kvpress.engine.streaming import StreamPlan, stream
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.arguments import parse_arguments
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.records.loss_files import StreamStore

BUDGET = 20


def streaming_llm(num_entries: int, budget: int = BUDGET) -> StreamingLLMPress:
    return StreamingLLMPress(1 - (budget + 0.5) / num_entries, n_sink=4)


def documents(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, 211, (length,), generator=generator).tolist() for length in lengths]


def losses(
    model: PressableModel,
    texts: Sequence[list[int]],
    chunk: int,
    press_for: Callable[[int], Any],
    rotate: bool = True,
    num_sinks: int | None = None,
) -> list[list[float]]:
    out: list[list[float]] = [[] for _ in texts]
    for step in stream(model, texts, 0, StreamPlan(BUDGET, chunk, rotate, num_sinks=num_sinks), press_for):
        assert step.num_entries <= BUDGET
        for index, row in zip(step.documents, step.losses, strict=True):
            out[index] += row
    return out


def reference(model: GPTNeoXForCausalLM, text: list[int]) -> list[float]:
    """One token at a time on the untouched model, with parallel residual; sinks and the newest tokens stay."""
    base, caches = model.gpt_neox, [[] for _ in model.gpt_neox.layers]  # type: ignore[var-annotated]
    out = []
    with torch.no_grad():
        for token, target in zip([0, *text], text, strict=False):
            hidden = base.embed_in(torch.tensor([[token]]))
            for layer, cache in zip(base.layers, caches, strict=True):
                attention = layer.attention
                heads = attention.query_key_value(layer.input_layernorm(hidden)).view(4, 3, 16)
                cache.append((heads[:, 1], heads[:, 2]))
                keys = torch.stack([key for key, _ in cache], dim=1)[None]  # (1, H, T, D), not rotated
                values = torch.stack([value for _, value in cache], dim=1)
                cos, sin = base.rotary_emb(hidden, torch.arange(len(cache))[None])
                queries = heads[:, 0][None, :, None].expand_as(keys)
                queries, keys = apply_rotary_pos_emb(queries, keys, cos, sin)
                weights = torch.softmax((keys[0] @ queries[0, :, -1, :, None])[..., 0] * attention.scaling, dim=-1)
                mixed = (weights[:, None] @ values)[:, 0].reshape(1, 1, -1)
                hidden = hidden + attention.dense(mixed) + layer.mlp(layer.post_attention_layernorm(hidden))
                if len(cache) > BUDGET:
                    del cache[4]
            logits = model.embed_out(base.final_layer_norm(hidden))[0, 0]
            out.append(-logits.log_softmax(-1)[target].item())
    return out


@pytest.mark.parametrize("num_sinks", [None, 4], ids=["press", "in place"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_chunk_one_equals_the_reference_token_by_token(
    make_neox: Callable[..., GPTNeoXForCausalLM],
    make_pressable: Callable[..., PressableModel],
    attn: str,
    num_sinks: int | None,
) -> None:
    texts = documents(90, 60, 61)
    untouched = make_neox(attn)
    expected = [reference(untouched, text) for text in texts]
    found = losses(make_pressable(attn), texts, 1, streaming_llm, num_sinks=num_sinks)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize(("chunk", "num_sinks"), [(1, 4), (7, 4), (16, 4), (7, 0), (20, 0)])
def test_the_window_in_place_is_what_the_press_keeps(
    make_pressable: Callable[..., PressableModel], chunk: int, num_sinks: int, rotate: bool
) -> None:
    """Documents many times the buffer, so that the window is moved to its front again and again."""
    model, texts = make_pressable("sdpa"), documents(300, 1, 130, 19)

    def press_for(num_entries: int) -> StreamingLLMPress:
        return StreamingLLMPress(1 - (BUDGET + 0.5) / num_entries, n_sink=num_sinks)

    expected = losses(model, texts, chunk, press_for, rotate)
    found = losses(model, texts, chunk, lambda _: pytest.fail("asked the press"), rotate, num_sinks=num_sinks)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize("name", ["streaming_llm", "snapkv", "tova", "keydiff", "lagkv"])
def test_side_by_side_equals_one_by_one(make_pressable: Callable[..., PressableModel], name: str, chunk: int) -> None:
    presses: dict[str, Callable[[int], Any]] = {
        "streaming_llm": streaming_llm,
        "snapkv": lambda _: SnapKVPress(0.5, window_size=chunk),
        "tova": lambda _: TOVAPress(0.5),
        "keydiff": lambda _: KeyDiffPress(0.5),
        "lagkv": lambda _: LagKVPress(0.5, lag_size=5),
    }
    model, texts = make_pressable("sdpa"), documents(70, 1, 55, 56)
    together = losses(model, texts, chunk, presses[name])
    for text, found in zip(texts, together, strict=True):
        assert len(found) == len(text)
        torch.testing.assert_close(found, losses(model, [text], chunk, presses[name])[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_sinks", [None, 4], ids=["press", "in place"])
@pytest.mark.parametrize("first_changed", [49, 130, 133])
def test_a_later_chunk_never_changes_an_earlier_loss(
    make_pressable: Callable[..., PressableModel], num_sinks: int | None, first_changed: int
) -> None:
    """Far enough for the window in place to be moved to its front before and after the change."""
    model, (text,) = make_pressable("sdpa"), documents(210)
    changed = copy.copy(text)
    changed[first_changed:] = reversed(changed[first_changed:])
    one, other = (losses(model, [tokens], 7, streaming_llm, num_sinks=num_sinks)[0] for tokens in (text, changed))
    assert one[:first_changed] == other[:first_changed]
    assert max(abs(a - b) for a, b in zip(one[first_changed:], other[first_changed:], strict=True)) > 1e-2


BAD = [
    ({"rolling": "stream", "press": "snapkv"}, "stream_budget"),
    ({"rolling": "stream", "press": "none", "stream_budget": 64}, "standing cache"),
    ({"rolling": "stream", "press": "adakv:snapkv", "stream_budget": 64}, "standing cache"),
    ({"rolling": "stream", "press": "snapkv", "stream_budget": 63, "stream_chunk": 64}, "must keep"),
    ({"rolling": "stream", "press": "snapkv", "stream_budget": 128, "stream_chunk": 0}, "at least 1"),
    ({"rolling": "stream", "press": "snapkv", "stream_budget": 128, "compression_ratio": 0.5}, "compression_ratio"),
    ({"rolling": "stream", "press": "random", "stream_budget": 128, "seed": 7}, "same places"),
    ({"rolling": "prefix", "press": "snapkv", "stream_budget": 128}, "rolling=stream"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD, ids=[str(arguments) for arguments, _ in BAD])
def test_bad_streams_are_refused_in_one_line(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_arguments(arguments)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("positions", [{}, {"stream_positions": "original"}])
def test_positions_beyond_the_trained_ones_are_refused(checkpoint_dir: Path, positions: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="positions"):
        KVPress(
            pretrained=str(checkpoint_dir),
            device="cpu",
            rolling="stream",
            press="streaming_llm",
            stream_budget=100 if positions else 1_000_000,
            **positions,
        )


def requests() -> list[Instance]:
    texts = ["the mill " * 120, "", "river", "seven grey geese slept " * 40]
    return [Instance("loglikelihood_rolling", {}, (text,), 0, ("s", i, 1)) for i, text in enumerate(texts)]


def test_finished_documents_are_read_and_another_setting_is_refused(
    checkpoint_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common: dict[str, Any] = {"pretrained": str(checkpoint_dir), "device": "cpu", "rolling": "stream"}
    common |= {"press": "streaming_llm", "stream_chunk": 8, "stream_output": str(tmp_path / "losses")}
    lm = KVPress(stream_budget=40, **common)
    first = lm.loglikelihood_rolling(requests(), disable_tqdm=True)
    assert [score.num_tokens for score in first] == [  # type: ignore[attr-defined]
        len(lm.tok_encode(request.args[0])) for request in requests()
    ]
    record = lm.describe()["tasks"]["s"]
    assert record["max_stream_entries"] <= 40
    assert record["tokens_scored"] == sum(score.num_tokens for score in first)  # type: ignore[attr-defined]
    again = KVPress(stream_budget=40, **common)
    monkeypatch.setattr("lm_eval_kvpress.harness.stream_requests.stream", lambda *_: pytest.fail("computed again"))
    assert again.loglikelihood_rolling(requests(), disable_tqdm=True) == first
    with pytest.raises(UsageError, match="another setting"):
        KVPress(stream_budget=41, **common).loglikelihood_rolling(requests(), disable_tqdm=True)


@pytest.mark.parametrize("change", ["weights", "seed"])
def test_losses_of_other_weights_or_another_seed_are_not_taken_up(
    checkpoint_dir: Path, tmp_path: Path, change: str
) -> None:
    common: dict[str, Any] = {"pretrained": str(checkpoint_dir), "device": "cpu", "rolling": "stream"}
    common |= {"press": "random", "stream_budget": 40, "stream_chunk": 8, "stream_output": str(tmp_path / "losses")}
    torch.manual_seed(1)
    KVPress(**common).loglikelihood_rolling(requests(), disable_tqdm=True)
    other = KVPress(**common)
    if change == "seed":
        torch.manual_seed(2)
    else:
        with torch.no_grad():
            other.model.get_output_embeddings().weight[3] += 0.1
    with pytest.raises(UsageError, match=change):
        other.loglikelihood_rolling(requests(), disable_tqdm=True)


def test_the_summary_of_a_stream_does_not_claim_that_nothing_was_compressed(
    checkpoint_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lm = KVPress(
        pretrained=str(checkpoint_dir), device="cpu", rolling="stream", press="streaming_llm", stream_budget=70
    )
    lm.loglikelihood_rolling(requests(), disable_tqdm=True)
    with caplog.at_level("INFO", logger="lm_eval_kvpress"):
        lm.get_model_info()
    assert "held every layer to 70 entries" in caplog.text
    assert "compressed nothing" not in caplog.text


def test_rotations_that_cannot_be_turned_back_are_refused(make_pressable: Callable[..., PressableModel]) -> None:
    model = make_pressable("sdpa")
    model.model.base_model.rotary_emb.attention_scaling = 0.8
    with pytest.raises(ValueError, match="plain RoPE"):
        losses(model, documents(30), 7, streaming_llm)


def test_a_stored_document_is_exact_and_an_unfinished_one_is_absent(tmp_path: Path) -> None:
    store = StreamStore(tmp_path, {"press": "a"})
    values = [0.1, math.pi, 1e-17]
    assert store.load("task", [1, 2, 3], "0") is None
    store.save("task", [1, 2, 3], "0", values)
    assert store.load("task", [1, 2, 3], "0") == values
    assert store.load("task", [1, 2, 4], "0") is None, "another text of the same name"
