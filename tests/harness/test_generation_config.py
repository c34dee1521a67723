"""Generated texts are stock ``HFLM``'s under the checkpoint's ``generation_config.json``; the rest is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval_requests import generation_requests, ours
from transformers import GenerationConfig

from lm_eval_kvpress.engine.logits_processors import OPTIONS
from lm_eval_kvpress.engine.sampling import sampler_for
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness import generation_config
from lm_eval_kvpress.harness.arguments import parse_arguments
from lm_eval_kvpress.harness.generation_config import STRATEGY, UNSUPPORTED, WITHOUT_EFFECT, effective_options
from lm_eval_kvpress.harness.model import KVPress

END = [356, 410]
"""Ids that the tiny model chooses, so that they end texts early."""

CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "repetition_penalty": ({"repetition_penalty": 1.7}, {}),
    "switched_off": ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.0}),
    "no_repeat_ngram_size": ({"no_repeat_ngram_size": 2}, {}),
    "encoder_no_repeat_ngram_size": (
        {"encoder_no_repeat_ngram_size": 1, "sequence_bias": [[[380], 60.0], [[87], 50.0]]},  # 380 is in each prompt
        {},
    ),
    "encoder_repetition_penalty": ({"encoder_repetition_penalty": 3.0}, {}),
    "suppress_tokens": ({"suppress_tokens": list(range(0, 512, 2))}, {}),
    "begin_suppress_tokens": ({"begin_suppress_tokens": list(range(300))}, {}),
    "bad_words_ids": ({"bad_words_ids": [[id] for id in range(1, 460, 3)] + [[2, 3], [5, 6, 8]]}, {}),
    "sequence_bias": ({"sequence_bias": [[[7], 9.0], [[7, 8], 40.0], [[8, 11], 50.0]]}, {}),
    "forced_eos_token_id": ({"forced_eos_token_id": 44}, {}),
    "forced_bos_token_id": ({"forced_bos_token_id": 44}, {}),
    "eos list": ({"eos_token_id": END}, {}),
    "eos of the task": ({"eos_token_id": 0}, {"eos_token_id": END}),
    "min_new_tokens": ({"eos_token_id": END, "min_new_tokens": 5}, {}),
    "min_length": ({"eos_token_id": END, "min_length": 40}, {}),
    "exponential_decay_length_penalty": ({"eos_token_id": [44], "exponential_decay_length_penalty": [3, 1.6]}, {}),
    "max_new_tokens": ({"max_new_tokens": 3}, {}),
    "max_length": ({"max_length": 20}, {}),
    "penalty of the task": ({}, {"repetition_penalty": 1.7}),
    "n-grams of the task": ({}, {"no_repeat_ngram_size": 2}),
    "sampling only": ({"do_sample": True, "temperature": 0.6, "top_k": 3, "top_p": 0.5, "top_h": 0.4}, {}),
    "all": (
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "suppress_tokens": [9], "min_new_tokens": 4}
        | {"eos_token_id": END, "begin_suppress_tokens": [11, 12], "forced_eos_token_id": [44]},
        {},
    ),
}


LIKE_NO_OPTION = {"switched_off", "max_length", "sampling only", "forced_bos_token_id"}
"""Cases whose texts are those of the checkpoint without them; a beginning is forced behind one token only."""


@pytest.fixture(scope="module")
def stock(checkpoint_dir: Path) -> HFLM:
    """Answers one by one: in a batch of stock's, processors look at padding as well."""
    return HFLM(pretrained=str(checkpoint_dir), device="cpu", dtype="float32", batch_size=1)


@pytest.fixture(scope="module")
def lm(checkpoint_dir: Path) -> KVPress:
    return ours(checkpoint_dir)


def texts(lm: HFLM, says: dict[str, Any], gen_kwargs: dict[str, Any], batch_size: int = 1) -> list[str]:
    """What a loaded model generates when its checkpoint's file says so."""
    lm.model.generation_config = GenerationConfig(**{"bos_token_id": 0, "eos_token_id": 0, **says})
    lm.batch_size_per_gpu = batch_size
    return lm.generate_until(requests(**gen_kwargs), disable_tqdm=True)


def requests(max_gen_toks: int = 7, **gen_kwargs: Any) -> list[Instance]:
    """Prompts of 11, 37 and 60 tokens."""
    return generation_requests(until=[], max_gen_toks=max_gen_toks, **gen_kwargs)[:3]


@pytest.fixture(scope="module")
def plain(stock: HFLM) -> list[str]:
    return texts(stock, {}, {})


@pytest.mark.parametrize("case", CONFIGS)
def test_texts_are_those_of_stock(stock: HFLM, lm: KVPress, plain: list[str], case: str) -> None:
    expected = texts(stock, *CONFIGS[case])
    assert (expected == plain) == (case in LIKE_NO_OPTION), "the case must show"
    assert texts(lm, *CONFIGS[case]) == texts(lm, *CONFIGS[case], batch_size=5) == expected


def test_a_beginning_is_forced_behind_a_prompt_of_one_token(stock: HFLM, lm: KVPress) -> None:
    config = GenerationConfig(forced_bos_token_id=44, begin_suppress_tokens=list(range(300)), eos_token_id=0)
    request = Instance("generate_until", {}, ("t", {"until": [], "max_gen_toks": 4}), 0, ("gen", 0, 1))
    found = []
    for model in (stock, lm):
        model.model.generation_config = config
        found += model.generate_until([request], disable_tqdm=True)
    assert found[0] == found[1] and lm.tok_encode(found[1])[0] == 44


@pytest.mark.parametrize("case", ["no_repeat_ngram_size", "min_length", "all"])
def test_under_a_press_texts_do_not_depend_on_the_batch(lm: KVPress, case: str) -> None:
    unpressed = lm.session
    lm.use(lm.open_session(parse_arguments({"press": "knorm"})[0]))
    try:
        assert texts(lm, *CONFIGS[case]) == texts(lm, *CONFIGS[case], batch_size=5)
    finally:
        lm.use(unpressed)


def test_the_checkpoints_own_file_is_read(checkpoint_dir: Path, tmp_path: Path, stock: HFLM) -> None:
    """Entries of other programs, such as the chat format in Qwen's file, are carried along and ignored."""
    folder = Path(shutil.copytree(checkpoint_dir, tmp_path / "checkpoint"))
    file, says = folder / "generation_config.json", {"chat_format": "chatml", "repetition_penalty": 1.7}
    file.write_text(json.dumps({**json.loads(file.read_text()), **says}))
    lm = ours(folder)
    assert lm.describe()["generation_config"] == {"eos_token_id": 0, "repetition_penalty": 1.7}
    assert lm.generate_until(requests(), disable_tqdm=True) == texts(stock, {"repetition_penalty": 1.7}, {})


@pytest.mark.parametrize(
    ("says", "gen_kwargs"),
    [
        ({}, {"do_sample": True, "temperature": 0.7}),
        ({"top_k": 5, "top_p": 0.9, "repetition_penalty": 1.3}, {"temperature": 1.5}),
        ({"min_p": 0.02, "typical_p": 0.9}, {"temperature": 1.0, "top_k": 0}),
        ({"epsilon_cutoff": 0.01, "eta_cutoff": 0.02, "top_k": 0}, {"temperature": 2.0, "top_p": 0.95}),
    ],
)
def test_tokens_are_drawn_from_the_probabilities_of_stock(
    stock: HFLM, monkeypatch: pytest.MonkeyPatch, says: Any, gen_kwargs: Any
) -> None:
    first = requests(max_gen_toks=1, **gen_kwargs)[:1]
    stock.model.generation_config = GenerationConfig(eos_token_id=0, **says)
    drawn: list[torch.Tensor] = []
    multinomial = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda p, *n, **m: drawn.append(p) or multinomial(p, *n, **m))
    stock.generate_until(first, disable_tqdm=True)
    ids = torch.tensor([stock.tok_encode(first[0].args[0])])
    given = {"do_sample": True, **gen_kwargs}
    options = effective_options(stock.model.generation_config, given)
    sampler = sampler_for(options, ids.tolist(), [0], 1, torch.device("cpu"))
    with torch.inference_mode():
        found = sampler.processors(ids, stock.model(ids).logits[:, -1]).softmax(-1)
    torch.testing.assert_close(found, drawn[0])


@pytest.mark.parametrize(
    ("says", "gen_kwargs", "message"),
    [
        ({"num_beams": 4}, {}, "num_beams=4 of the checkpoint's generation_config.json is not supported"),
        ({}, {"num_beams": 4}, "num_beams=4 is not supported"),
        ({"penalty_alpha": 0.6}, {}, "penalty_alpha=0.6 of the checkpoint's"),
        ({"guidance_scale": 1.5}, {}, "guidance_scale=1.5"),
        ({"stop_strings": ["###"]}, {}, "stop_strings"),
        ({"max_time": 2.0}, {}, "gen_kwargs max_time=None leaves it out"),
        ({"top_h": 0.4}, {"temperature": 1.0}, "top_h=0.4"),
        ({}, {"colour": "red"}, "generation arguments not supported: colour"),
        ({}, {"max_length": 40}, "not supported: max_length"),
        ({"no_repeat_ngram_size": -1}, {}, "no_repeat_ngram_size=-1"),
        ({"bad_words_ids": [[9_000]]}, {}, "do not fit: The model vocabulary size"),
        ({"forced_eos_token_id": 9_000}, {}, "do not fit: index 9000"),
        ({}, {"do_sample": True, "temperature": 0.0}, "temperature > 0"),
    ],
)
def test_what_cannot_be_followed_is_refused_in_one_line_before_work(
    lm: KVPress, monkeypatch: pytest.MonkeyPatch, says: Any, gen_kwargs: Any, message: str
) -> None:
    monkeypatch.setattr(lm.session.runner, "generate", lambda *_: pytest.fail("work began"))
    with pytest.raises(UsageError) as caught:
        texts(lm, says, gen_kwargs)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("says", "off"), [({"num_beams": 4}, 1), ({"max_time": 2.0}, None), ({"num_beams": 4}, None)])
def test_a_task_switches_off_what_the_checkpoint_asks_for(says: dict[str, Any], off: Any) -> None:
    (name,) = says
    assert name not in effective_options(GenerationConfig(**says), {"do_sample": False, name: off})


def test_every_field_of_transformers_is_followed_refused_or_without_effect() -> None:
    """A field that a new version adds must be looked at."""
    decided = {*OPTIONS, *STRATEGY, *UNSUPPORTED, *WITHOUT_EFFECT}
    assert {name for name in vars(GenerationConfig()) if not name.startswith("_")} - decided == set()


def test_a_field_that_nobody_has_looked_at_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_config, "UNSUPPORTED", {})
    with pytest.raises(UsageError, match="guidance_scale=2.0"):
        effective_options(GenerationConfig(guidance_scale=2.0), {"do_sample": False})
