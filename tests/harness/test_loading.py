"""A checkpoint that cannot be evaluated is one line that says why, before weights are read where that can be known."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval_requests import generation_requests, loglikelihood_requests, ours, rolling_requests
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
    with pytest.raises(UsageError, match="device=cuda is not on this machine: name another"):
        KVPress(pretrained=str(checkpoint_dir), device="cuda")
    with pytest.raises(UsageError, match="device=cuda:1 is not on this machine, and cpu would take its place"):
        KVPress(pretrained=str(checkpoint_dir), device="cuda:1")
    assert KVPress(pretrained=str(checkpoint_dir), device="cuda:0").device.type == "cpu", "lm-eval's default"


def test_torn_weights_are_one_line(copied: Path) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert refused(copied).startswith(f"cannot read the weights of pretrained={copied}: ")


def changed_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def drop_a_tensor(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"]
    save_file(weights, file, {"format": "pt"})


def as_pickle(folder: Path) -> None:
    """A file of pickles that is none."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"no weights")


UNFIT: dict[str, tuple[Callable[[Path], object], str]] = {
    "a tensor less": (drop_a_tensor, "would be random numbers: gpt_neox.layers.1.mlp.dense_h_to_4h.weight$"),
    "more layers": (lambda folder: changed_config(folder, num_hidden_layers=5), "gpt_neox.layers.3.*and 21 more"),
    "fewer layers": (lambda folder: changed_config(folder, num_hidden_layers=2), "more layers than the 2 of its"),
    "other shapes": (lambda folder: changed_config(folder, vocab_size=600), "embed_out.weight is .*x64, not 600x64"),
    "a torn pickle": (as_pickle, "cannot read the weights"),
    "no kind of tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot read the tokenizer"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_weights_that_do_not_fit_the_config_are_named(copied: Path, case: str) -> None:
    """transformers fills what it does not find with random numbers, and figures would bear the checkpoint's name."""
    change, says = UNFIT[case]
    change(copied)
    assert re.search(says, refused(copied))


def test_tied_weights_and_weights_as_a_pickle_of_tensors_are_read(checkpoint_dir: Path, tmp_path: Path) -> None:
    """Pickles are read by PyTorch's unpickler of tensors, which runs no code."""
    folder = llama_folder(checkpoint_dir, tmp_path / "tied", tie_word_embeddings=True)
    of_safetensors = ours(folder).loglikelihood(loglikelihood_requests()[:4], disable_tqdm=True)
    weights = load_file(folder / "model.safetensors")
    assert not any("lm_head" in name for name in weights)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert ours(folder).loglikelihood(loglikelihood_requests()[:4], disable_tqdm=True) == of_safetensors


def test_a_package_that_is_not_installed_is_one_line(checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match="cannot read the weights .*peft"):
        ours(checkpoint_dir, peft="some/adapter")


def test_an_adapter_that_lacks_weights_is_refused(checkpoint_dir: Path, tmp_path: Path) -> None:
    """peft goes on without them."""
    peft = pytest.importorskip("peft")
    base = GPTNeoXForCausalLM.from_pretrained(checkpoint_dir)
    peft.get_peft_model(base, peft.LoraConfig(target_modules=["dense_h_to_4h"])).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    save_file({name: weights[name] for name in list(weights)[1:]}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UsageError, match="missing adapter keys"):
        ours(checkpoint_dir, peft=str(tmp_path))


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


def test_a_protocol_without_windows_asks_for_none(checkpoint_dir: Path) -> None:
    """Held-back tokens that leave no window under rolling=prefix are no matter to rolling=one_pass."""
    lm = KVPress(pretrained=str(checkpoint_dir), device="cpu", rolling="one_pass", query_tokens=64, max_length=64)
    (score,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("the cold river",), 0, ("t", 0, 0))])
    assert score < 0


def test_max_length_beyond_the_trained_positions_needs_an_opt_in(checkpoint_dir: Path) -> None:
    with pytest.raises(UsageError, match="allow_extrapolation=true"):
        KVPress(pretrained=str(checkpoint_dir), device="cpu", max_length=1_000_000)
    lm = KVPress(pretrained=str(checkpoint_dir), device="cpu", max_length=1_000_000, allow_extrapolation=True)
    assert lm.max_length == 1_000_000


LONGROPE = {
    **{"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 96},
    **{"short_factor": [1.0] * 8, "long_factor": [1.0 + 3 * index for index in range(8)]},
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 96}


def llama_folder(checkpoint_dir: Path, folder: Path, **config: Any) -> Path:
    """A tiny Llama beside the tokenizer of the tiny GPTNeoX."""
    shutil.copytree(checkpoint_dir, folder)
    base = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    llama = LlamaConfig(
        **base, vocab_size=512, max_position_embeddings=512, initializer_range=0.2, bos_token_id=0, eos_token_id=0
    )
    llama.update(config)
    LlamaForCausalLM(llama).save_pretrained(folder)
    return folder


def test_longrope_below_its_switch_equals_stock_hflm_in_any_batch(checkpoint_dir: Path, tmp_path: Path) -> None:
    """Beyond it stock has other frequencies for every forward, which cached keys cannot follow."""
    folder = llama_folder(checkpoint_dir, tmp_path / "longrope", rope_parameters=LONGROPE)
    stock = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1, max_length=96)
    lm = ours(folder, rolling="one_pass", batch_size=4, max_length=96)
    for answer, requests in (
        ("loglikelihood", loglikelihood_requests()),
        ("loglikelihood_rolling", rolling_requests()),
        ("generate_until", generation_requests(until=[], max_gen_toks=8)),
    ):
        theirs, mine = (getattr(one, answer)(requests, disable_tqdm=True) for one in (stock, lm))
        if answer == "loglikelihood":
            theirs, mine = [score for score, _ in theirs], [score for score, _ in mine]
        if answer == "generate_until":
            assert mine == theirs
        else:
            torch.testing.assert_close([float(x) for x in mine], [float(x) for x in theirs], atol=1e-3, rtol=1e-6)


@pytest.mark.parametrize(
    ("rope", "arguments", "says"),
    [
        (LONGROPE, {}, "Pass max_length=96"),
        (LONGROPE, {"max_length": 97}, "max_length=97 may cross"),
        (
            {**LONGROPE, "attention_factor": 1.0},
            {"max_length": 96, "rolling": "stream", "stream_positions": "original", "allow_extrapolation": True},
            "a document of any length may cross",
        ),
        (YARN, {"rolling": "stream"}, "'yarn' rescales the keys"),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, {"max_length": 600}, "beyond 512 positions"),
    ],
    ids=["longrope", "longrope, one too long", "longrope, stream", "yarn, stream", "dynamic"],
)
def test_rope_that_a_run_cannot_follow_is_refused_before_weights_are_read(
    checkpoint_dir: Path, tmp_path: Path, rope: dict[str, Any], arguments: dict[str, Any], says: str
) -> None:
    folder = llama_folder(checkpoint_dir, tmp_path / "rope", rope_parameters=rope)
    (folder / "model.safetensors").unlink()
    stream = {"press": "streaming_llm", "stream_budget": 64, "stream_chunk": 16} if "rolling" in arguments else {}
    with pytest.raises(UsageError, match=says) as caught:
        ours(folder, **{"allow_extrapolation": "max_length" in arguments, **stream, **arguments})
    assert "\n" not in str(caught.value)


def test_a_window_that_can_hide_nothing_is_no_window(checkpoint_dir: Path, tmp_path: Path) -> None:
    """Phi-3.5-mini has one of 262,144 positions over 131,072."""
    folder = llama_folder(checkpoint_dir, tmp_path / "window", max_position_embeddings=512)
    config = json.loads((folder / "config.json").read_text())
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 128}
    (folder / "config.json").write_text(json.dumps({**config, **mistral}))
    with pytest.raises(UsageError, match="pass max_length=128"):
        ours(folder)
    stock = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1, max_length=128)
    lm = ours(folder, batch_size=4, max_length=128)
    theirs, mine = (one.loglikelihood(loglikelihood_requests(), disable_tqdm=True) for one in (stock, lm))
    torch.testing.assert_close([a for a, _ in mine], [a for a, _ in theirs], atol=1e-3, rtol=1e-6)


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


@pytest.fixture
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HFLM, "_create_model", lambda *_, **__: pytest.fail("weights were read"))


@pytest.mark.usefixtures("_no_weights")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"prefix_token_id": 9_000}, "prefix_token_id=9000 is beyond the model's vocabulary of"),
        ({"throughput_log": "{folder}"}, "log.jsonl"),
        ({"metrics_port": 1}, "metrics_port=1 cannot be opened"),
    ],
)
def test_what_can_be_known_costs_no_load(
    checkpoint_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], says: str
) -> None:
    def taken(port: int, **_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("prometheus_client.start_http_server", taken)
    monkeypatch.setattr("lm_eval_kvpress.records.prometheus.start_http_server", taken)
    (tmp_path / "log.jsonl").mkdir()
    given = {name: str(tmp_path / "log.jsonl") if value == "{folder}" else value for name, value in arguments.items()}
    with pytest.raises(UsageError, match=says):
        KVPress(pretrained=str(checkpoint_dir), device="cpu", **given)


def test_a_tokenizer_without_an_end_scores_and_does_not_generate(
    make_neox: Callable[..., GPTNeoXForCausalLM],
) -> None:
    letters = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate("ACGT|")}, merges=[]))
    model, tokenizer = make_neox(vocab_size=5), PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="|")
    with pytest.raises(UsageError, match="neither BOS nor EOS.* pass prefix_token_id=N"):
        KVPress(pretrained=model, tokenizer=tokenizer, device="cpu")
    lm = KVPress(pretrained=model, tokenizer=tokenizer, device="cpu", prefix_token_id=4)
    pair = Instance("loglikelihood", {}, ("GATTACA", "GG"), 0, ("dna", 0, 1))
    assert lm.loglikelihood([pair], disable_tqdm=True)[0][0] < 0
    with pytest.raises(UsageError, match="the tokenizer has no EOS"):
        lm.generate_until([Instance("generate_until", {}, ("GATT", {"until": []}), 0, ("dna", 0, 1))], True)


def test_an_option_of_the_command_among_the_model_arguments_is_one_line() -> None:
    with pytest.raises(UsageError, match="batch_size is given twice: leave batch_size=4 out and pass --batch_size"):
        KVPress.create_from_arg_string("pretrained=builtin,batch_size=4", {"batch_size": 1, "device": None})
