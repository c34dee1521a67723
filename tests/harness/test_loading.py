"""A checkpoint that cannot be evaluated is one line that says why, before weights are read where that can be known."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval_requests import ours
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness import loading
from lm_eval_kvpress.harness.model import KVPress, PythiaKVPress


@pytest.fixture
def copied(checkpoint_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint_dir, tmp_path / "checkpoint"))


def refused(folder: Path) -> str:
    with pytest.raises(UsageError) as caught:
        KVPress(pretrained=str(folder), device="cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_tokenizer_is_found_out_before_weights_are_read(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers makes up an empty one, under which every text has perplexity 1."""
    for file in copied.glob("*token*"):
        file.unlink()
    monkeypatch.setattr(HFLM, "_create_model", lambda *_, **__: pytest.fail("weights were read"))
    assert refused(copied).startswith(f"no tokenizer in {copied}: pass tokenizer=FOLDER")


def test_the_folder_that_was_named_is_told_and_a_small_alphabet_is_a_tokenizer(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    shutil.copy(copied / "config.json", tmp_path / "none")
    with pytest.raises(UsageError, match=f"no tokenizer in {tmp_path / 'none'}: "):
        KVPress(pretrained=str(copied), tokenizer=str(tmp_path / "none"), device="cpu")
    letters = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate("ACGT|")}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="|").save_pretrained(copied)
    assert KVPress(pretrained=str(copied), device="cpu").tok_encode("GATTACA") == [2, 0, 3, 3, 0, 1, 0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_other_device_takes_the_place_of_the_one_asked_for(checkpoint_dir: Path) -> None:
    with pytest.raises(UsageError, match="device=cuda:1 is not on this machine, and cpu would take its place"):
        KVPress(pretrained=str(checkpoint_dir), device="cuda:1")
    assert KVPress(pretrained=str(checkpoint_dir), device="cuda:0").device.type == "cpu", "lm-eval's default"


def test_torn_weights_are_one_line(copied: Path) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert refused(copied).startswith(f"cannot read the weights of pretrained={copied}: ")


def test_missing_weights_are_one_line(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    assert "model.safetensors" in refused(copied)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_found_out_by_its_ids(
    copied: Path, make_neox: Callable[..., GPTNeoXForCausalLM]
) -> None:
    num_tokens = len(AutoTokenizer.from_pretrained(copied))
    make_neox(vocab_size=num_tokens // 2, max_positions=512).save_pretrained(copied)
    lm = KVPress(pretrained=str(copied), device="cpu")
    text = "the cold river ran past an old mill where seven grey geese slept"
    for type, arguments in (
        ("loglikelihood", (text, " slept")),
        ("loglikelihood_rolling", (text,)),
        ("generate_until", (text, {"until": []})),
    ):
        with pytest.raises(UsageError, match=f"beyond the {num_tokens // 2} embeddings"):
            getattr(lm, type)([Instance(type, {}, arguments, 0, ("t", 0, 1))], disable_tqdm=True)


def test_max_length_beyond_the_trained_positions_needs_an_opt_in(checkpoint_dir: Path) -> None:
    with pytest.raises(UsageError, match="allow_extrapolation=true"):
        KVPress(pretrained=str(checkpoint_dir), device="cpu", max_length=1_000_000)
    lm = KVPress(pretrained=str(checkpoint_dir), device="cpu", max_length=1_000_000, allow_extrapolation=True)
    assert lm.max_length == 1_000_000


def test_a_loaded_model_with_the_wrong_attention_is_refused(
    checkpoint_dir: Path, make_neox: Callable[..., GPTNeoXForCausalLM]
) -> None:
    with pytest.raises(UsageError, match="needs eager attention and the loaded model has sdpa"):
        KVPress(pretrained=make_neox("sdpa"), tokenizer=str(checkpoint_dir), press="observed_attention")


def test_an_unknown_architecture_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(UsageError, match="'gpt2' cannot be presented"):
        KVPress(pretrained=str(tmp_path), device="cpu")


def test_a_hub_out_of_reach_says_how_to_run_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the variable was read at import
    with pytest.raises(UsageError, match="pretrained=builtin"):
        PythiaKVPress()


def test_no_checkpoint_at_all_is_refused() -> None:
    with pytest.raises(UsageError, match="pretrained is required"):
        KVPress()


def test_a_folder_for_streams_that_cannot_be_written_is_found_out_at_once(checkpoint_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match=f"stream_output={place} cannot be written"):
            ours(checkpoint_dir, press="knorm", rolling="stream", stream_budget=64, stream_output=str(place))


@pytest.mark.parametrize(
    ("arguments", "computes_in"),
    [
        ({"dtype": "float16"}, torch.float16),
        ({"dtype": "float32"}, torch.float32),
        ({"dtype": "float32", "mixed_precision_dtype": "bfloat16"}, torch.bfloat16),
    ],
    ids=str,
)
def test_a_slow_dtype_is_asked_for_on_a_cpu(
    checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, str], computes_in: torch.dtype
) -> None:
    asked: list[torch.dtype] = []
    monkeypatch.setattr("lm_eval_kvpress.harness.loading.warn_of_slow_dtype", asked.append)
    KVPress(pretrained=str(checkpoint_dir), device="cpu", **arguments)
    assert asked == [computes_in]


def test_a_model_on_a_second_gpu_makes_it_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events and graphs would be made on the first one, and be complete at once."""
    calls = list[Any]()
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    for device in ("cpu", "cuda:1"):
        model: Any = SimpleNamespace(device=torch.device(device))
        loading.settle_on_device(model, torch.float32)
    assert calls == [torch.device("cuda:1")]
