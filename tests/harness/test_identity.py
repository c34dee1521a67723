"""Runs whose answers may differ are told apart, and lm-eval's ``--use_cache`` never mixes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from sqlitedict import SqliteDict
from transformers import AutoTokenizer, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.checkpoint import resolve_pretrained
from lm_eval_kvpress.harness.identity import arguments_of_answers, checkpoint_hashes, weights_fingerprint
from lm_eval_kvpress.harness.model import KVPress


def test_any_weight_that_differs_is_another_checkpoint(make_neox: Callable[..., GPTNeoXForCausalLM]) -> None:
    """An adapter, or training with a frozen head, leaves the head as it was."""
    model = make_neox()
    seen = {weights_fingerprint(model)}
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.reshape(-1)[parameter.numel() // 2 + 1] += 0.01  # a single number
        seen.add(weights_fingerprint(model))
    assert len(seen) == 1 + len(list(model.parameters()))


def test_rows_and_columns_that_change_places_are_another_checkpoint(
    make_neox: Callable[..., GPTNeoXForCausalLM],
) -> None:
    model = make_neox()
    before, weight = weights_fingerprint(model), model.gpt_neox.layers[0].mlp.dense_h_to_4h.weight
    for dim in (0, 1):
        whole = weight.detach().clone()
        with torch.no_grad():
            weight.copy_(whole.roll(1, dim))
        assert weights_fingerprint(model) != before
        with torch.no_grad():
            weight.copy_(whole)
    assert weights_fingerprint(model) == before


def test_offloaded_weights_are_part_of_the_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    tiny = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 32}
    on_disk = {"model.layers.1": "disk"}
    kept = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    prints = []
    for index in range(2):
        folder, model = tmp_path / str(index), LlamaForCausalLM(LlamaConfig(**tiny, vocab_size=64))
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, 0.5)
        if index:
            torch.nn.init.constant_(model.model.layers[1].mlp.up_proj.weight, 0.25)
        model.save_pretrained(folder)
        offloaded = LlamaForCausalLM.from_pretrained(folder, device_map=kept | on_disk, offload_folder=folder / "off")
        assert any(parameter.device.type == "meta" for parameter in offloaded.parameters())
        prints += [weights_fingerprint(offloaded), weights_fingerprint(LlamaForCausalLM.from_pretrained(folder))]
    assert prints[0] == prints[1] != prints[2] == prints[3]


def test_arguments_that_change_no_answer_are_left_out() -> None:
    given = {"batch_size": 4, "device": "cpu", "dtype": "auto", "peft": "some/adapter", "add_bos_token": True}
    by_default = {"backend": "default", "use_fast_tokenizer": True, "enable_thinking": None, "logits_cache": False}
    assert arguments_of_answers({**given, **by_default}) == {"add_bos_token": "True", "peft": "some/adapter"}


def test_a_tokenizer_is_the_same_before_and_after_it_was_given_a_padding_token() -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve_pretrained("builtin"))
    before = arguments_of_answers({"tokenizer": tokenizer})
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    assert arguments_of_answers({"tokenizer": tokenizer}) == before


CORRECTIONS: dict[str, Callable[[KVPress], object]] = {
    "config": lambda lm: setattr(lm.model.config, "rotary_emb_base", 500_000),
    "generation": lambda lm: setattr(lm.model.generation_config, "repetition_penalty", 1.3),
    "tokenizer": lambda lm: lm.tokenizer.add_tokens(["<think>"]),
    "chat_template": lambda lm: setattr(lm.tokenizer, "chat_template", "{{ messages }}"),
}


@pytest.mark.parametrize("part", CORRECTIONS)
def test_a_checkpoint_that_was_corrected_beside_its_weights_is_another_one(checkpoint_dir: Path, part: str) -> None:
    lm = KVPress(pretrained=str(checkpoint_dir), device="cpu")
    before = checkpoint_hashes(lm)
    lm.tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    lm.tokenizer.padding_side = "right"
    assert checkpoint_hashes(lm) == before, "which a call changes"
    CORRECTIONS[part](lm)
    after = checkpoint_hashes(lm)
    assert {key for key in before if before[key] != after[key]} == {part}
    assert lm._identity()[part] == after[part]


TEXT = "the cold river ran past an old mill where seven grey geese slept " * 6


def cached_requests() -> list[Instance]:
    return [Instance("loglikelihood", {}, (TEXT, f" {word}"), 0, ("t", i, 1)) for i, word in enumerate(["a", "geese"])]


def cached(checkpoint_dir: Path, file: Path, **arguments: Any) -> CachingLM:
    return CachingLM(KVPress(pretrained=str(checkpoint_dir), device="cpu", **arguments), str(file))


def test_the_same_setting_is_answered_from_the_cache(checkpoint_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "answers.db"
    first = cached(checkpoint_dir, file, press="knorm")
    answers = first.loglikelihood(cached_requests())
    first.dbdict.close()
    again = cached(checkpoint_dir, file, press="knorm", batch_size=2)
    assert again.loglikelihood(cached_requests()) == answers
    assert again.lm.describe()["tasks"] == {}, "nothing was computed"


@pytest.mark.parametrize(
    "other",
    [
        {"press": "none"},
        {"press": "knorm", "compression_ratio": 0.75},
        {"press": "knorm", "query_tokens": 0},
        {"press": "knorm", "add_bos_token": True},
        {"press": "knorm", "mixed_precision_dtype": "bfloat16"},
        {"press": "knorm", "think_end_token": " the"},
    ],
)
def test_another_setting_is_refused(checkpoint_dir: Path, tmp_path: Path, other: dict[str, Any]) -> None:
    first = cached(checkpoint_dir, tmp_path / "answers.db", press="knorm")
    first.loglikelihood(cached_requests())
    first.dbdict.close()
    with pytest.raises(UsageError, match="answers under another setting .*choose another file") as caught:
        cached(checkpoint_dir, tmp_path / "answers.db", **other)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mark", [None, "no JSON", "[1]", "[" * 100_000])
def test_answers_of_unknown_origin_are_refused(checkpoint_dir: Path, tmp_path: Path, mark: str | None) -> None:
    first = cached(checkpoint_dir, tmp_path / "answers.db")
    first.loglikelihood(cached_requests())
    first.dbdict.close()
    beside = tmp_path / "answers.db.owner.json"
    beside.unlink() if mark is None else beside.write_text(mark)
    with pytest.raises(UsageError, match="unknown origin, no .*answers.db.owner.json says whose") as caught:
        cached(checkpoint_dir, tmp_path / "answers.db")
    assert "\n" not in str(caught.value)


class Hostile:
    """A pickle that runs code."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle of the cache was read",)


def test_no_pickle_of_a_foreign_cache_is_read(checkpoint_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "answers.db"
    with SqliteDict(str(file), autocommit=True) as cache:
        for key in ("lm_eval_kvpress.owner", "hash of a request"):
            cache[key] = Hostile()
    with pytest.raises(UsageError, match="unknown origin"):
        cached(checkpoint_dir, file)


def test_a_cache_that_is_empty_again_belongs_to_the_next_run(checkpoint_dir: Path, tmp_path: Path) -> None:
    first = cached(checkpoint_dir, tmp_path / "answers.db", press="knorm")
    first.dbdict.close()
    again = cached(checkpoint_dir, tmp_path / "answers.db", press="none")
    again.loglikelihood(cached_requests())
    again.dbdict.close()
    with pytest.raises(UsageError, match="answers under another setting"):
        cached(checkpoint_dir, tmp_path / "answers.db", press="knorm")
