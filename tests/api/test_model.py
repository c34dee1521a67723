"""The Python API: its figures are those of lm-eval's model, what it says was kept is what a press chose."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from lm_eval.api.instance import Instance
from lm_eval_requests import ours, text

import lm_eval_kvpress
from lm_eval_kvpress import LoadedModel, UsageError, load_model

CONTEXT, CHOICES = text(0, 60), [" grey geese", " the mill", " nobody"]
SNAPKV = {"press": "snapkv", "compression_ratio": 0.75, "window_size": 8}


@pytest.fixture(scope="module")
def model(checkpoint_dir: Path) -> LoadedModel:
    return load_model(str(checkpoint_dir), device="cpu")


def test_importing_the_package_loads_nothing() -> None:
    code = (
        "import sys, lm_eval_kvpress as package\n"
        "loaded = {'torch', 'lm_eval', 'numpy', 'pandas', 'typing'} & set(sys.modules)\n"
        "assert 'load_model' in dir(package) and not hasattr(package, 'no_such_name')\n"
        "assert not loaded & {'torch', 'lm_eval', 'numpy', 'pandas'}, loaded"
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("name", lm_eval_kvpress.EXPORTS)
def test_every_name_is_there(name: str) -> None:
    assert getattr(lm_eval_kvpress, name).__name__ == name


def test_scores_are_those_of_the_lm_eval_model(model: LoadedModel, checkpoint_dir: Path) -> None:
    requests = [
        Instance("loglikelihood", {}, (CONTEXT, choice), index, ("t", 0, 1)) for index, choice in enumerate(CHOICES)
    ]
    expected = ours(checkpoint_dir, **SNAPKV).loglikelihood(requests)
    full = model.score(CONTEXT, CHOICES)
    found = model.score(CONTEXT, CHOICES, **SNAPKV)
    assert [(one.logprob, one.is_greedy) for one in found] == expected and [
        one.continuation for one in found
    ] == CHOICES
    assert [one.logprob for one in full] != [one.logprob for one in found]
    assert full[0].kept_share == 1 and found[0].kept_share == pytest.approx(0.25, abs=0.01)


def test_texts_are_those_of_the_lm_eval_model(model: LoadedModel, checkpoint_dir: Path) -> None:
    arguments = {"max_gen_toks": 9, "until": ["."], "do_sample": False}
    expected = ours(checkpoint_dir, **SNAPKV).generate_until([Instance("generate_until", {}, (CONTEXT, arguments), 0)])
    found = model.generate(CONTEXT, max_new_tokens=9, until=["."], **SNAPKV)
    assert [found.text] == expected and found.kept_share == pytest.approx(0.25, abs=0.01)


def test_prefill_says_which_tokens_were_kept_and_which_were_held_back(model: LoadedModel) -> None:
    kept = model.prefill(CONTEXT, press="streaming_llm", compression_ratio=0.5, query_tokens=3)
    num_tokens = len(model.lm.tok_encode(CONTEXT)) - 3
    assert "".join([*kept.tokens, *kept.held_back]) == CONTEXT and len(kept.held_back) == 3
    num_kept = num_tokens // 2
    expected = [place < 4 or place >= num_tokens - num_kept + 4 for place in range(num_tokens)]
    assert kept.kept.shape == (3, 4, num_tokens) and (kept.kept == numpy.array(expected)).all()


def test_kept_tokens_do_not_depend_on_how_entries_are_stored(model: LoadedModel) -> None:
    plain, packed = (model.prefill(CONTEXT, **SNAPKV, **more) for more in ({}, {"kv_quant": "int4"}))
    assert (plain.kept == packed.kept).all() and not plain.kept.all()


def test_a_context_too_short_for_the_press_is_kept_whole(model: LoadedModel) -> None:
    assert model.prefill("geese ran", press="snapkv", compression_ratio=0.75).kept.all()
    assert model.score("geese ran", [" past"], press="snapkv", compression_ratio=0.75)[0].kept_share == 1


def test_a_press_that_needs_other_attention_gets_it_and_gives_it_back(model: LoadedModel) -> None:
    kept = model.prefill(CONTEXT, press="observed_attention", compression_ratio=0.5)
    assert kept.share == pytest.approx(0.5, abs=0.01) and model.lm.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"press": "snpkv"}, "did you mean 'snapkv'"),
        ({"press": "snapkv", "window_sise": 8}, "did you mean 'window_size'"),
        ({"press": "snapkv", "dtype": "float32"}, "dtype is no argument of a call: give it to load_model"),
        ({"press": "snapkv", "throughput_log": "x.jsonl"}, "throughput_log is no argument of a call"),
        ({"press": "decoding:knorm", "target_size": 64}, "acts while text is generated"),
    ],
)
def test_mistakes_are_told(model: LoadedModel, arguments: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        model.prefill(CONTEXT, **arguments)


def test_an_empty_context_and_one_that_is_too_long_are_refused(model: LoadedModel) -> None:
    for context, num_tokens in (("", 0), (CONTEXT * 20, "[0-9]+")):
        with pytest.raises(UsageError, match=f"has {num_tokens} tokens: give it 1 to max_length=512"):
            model.prefill(context, press="knorm")
