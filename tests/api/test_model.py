"""The Python API: its figures are those of lm-eval's model, what it says was kept is what a press chose."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
from lm_eval.api.instance import Instance
from lm_eval_requests import ours, text

import lm_eval_kvpress
from lm_eval_kvpress import LoadedModel, UsageError, load_model
from lm_eval_kvpress.harness.arguments import parse_arguments

CONTEXT, CHOICES = text(0, 60), [" grey geese", " the mill", " nobody"]
REQUEST: Any = "loglikelihood", {}, (CONTEXT, CHOICES[0]), 0, ("t", 0, 1)
SNAPKV: dict[str, Any] = {"press": "snapkv", "compression_ratio": 0.75, "window_size": 8}
DECODING = {"press": "decoding:streaming_llm", "target_size": 64, "decoding.n_sink": 2}
FINCH = {"press": "finch", "question_pattern": "geese"}
STREAM = {"press": "knorm", "rolling": "stream", "stream_budget": 24, "stream_chunk": 8}


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


def test_a_call_leaves_the_run_of_evaluations_as_it_was(checkpoint_dir: Path) -> None:
    model, asked = load_model(str(checkpoint_dir), device="cpu", **SNAPKV), Instance(*REQUEST)
    before, session, answering = model.lm.loglikelihood([asked], True), model.lm.session, model.lm.answering
    model.score(CONTEXT, CHOICES, press="streaming_llm", compression_ratio=0.9)
    with pytest.raises(UsageError, match="give it 1 to"):
        model.prefill("", press="knorm")
    assert model.lm.session is session and model.lm.answering is answering
    assert model.lm.loglikelihood([asked], True) == before
    record = model.lm.describe()
    assert record["press"]["name"] == "snapkv" and list(record["tasks"]) == ["t"]


@pytest.mark.parametrize(
    ("at_load", "arguments", "alone"),
    [
        ({}, {}, {}),
        (SNAPKV, {}, SNAPKV),
        (SNAPKV | {"query_tokens": 8, "kv_quant": "int4"}, {}, SNAPKV | {"query_tokens": 8, "kv_quant": "int4"}),
        (SNAPKV, {"kv_budget": 9}, {"press": "snapkv", "kv_budget": 9, "window_size": 8}),
        (SNAPKV, {"press": "none"}, {}),
        (SNAPKV | {"query_tokens": 8}, {"press": "knorm"}, {"press": "knorm", "query_tokens": 8}),
        ({"query_tokens": 8, "kv_quant": "int4"}, {"query_tokens": 2, "kv_quant": "none"}, {"query_tokens": 2}),
        (DECODING | {"kv_quant": "fp8"}, {"press": "knorm"}, {"press": "knorm", "kv_quant": "fp8"}),
        (DECODING | {"decode_scoring": True}, {}, DECODING | {"decode_scoring": True}),
        (FINCH, {"press": "knorm"}, {"press": "knorm"}),
        (FINCH, {}, FINCH),
        (FINCH, {"question_field": "q", "press": "knorm", "query_aware": True}, {"press": "knorm"}),
        (STREAM, {}, STREAM),
        (STREAM, SNAPKV, SNAPKV),
        ({"fidelity": True, "rolling_context": 40, "fast": False}, {"query_tokens": 50}, {"query_tokens": 50}),
    ],
)
def test_what_was_given_at_load_time_is_the_default_of_calls(
    model: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    at_load: dict[str, Any],
    arguments: dict[str, Any],
    alone: dict[str, Any],
) -> None:
    monkeypatch.setattr(model.lm, "given", at_load)
    others = {name: value for name, value in arguments.items() if name != "press"}
    with model._session(arguments.get("press"), others) as session:
        found = session.settings
    expected, _ = parse_arguments(alone)
    unread = {} if expected.question_needed_by else {"question_pattern": None, "question_field": None}
    assert replace(found, **unread) == expected


def test_scores_under_what_was_given_at_load_time_are_those_of_an_evaluation(checkpoint_dir: Path) -> None:
    at_load = SNAPKV | {"query_tokens": 8, "kv_quant": "int4"}
    model = load_model(str(checkpoint_dir), device="cpu", **at_load)
    (score,) = model.score(CONTEXT, CHOICES[:1])
    assert [(score.logprob, score.is_greedy)] == model.lm.loglikelihood([Instance(*REQUEST)], True)
    assert score == model.score(CONTEXT, CHOICES[:1], **SNAPKV)[0] != model.score(CONTEXT, CHOICES[:1], press="none")[0]
    assert len(model.prefill(CONTEXT).held_back) == 8


def test_a_length_beyond_the_trained_one_that_was_allowed_at_load_time_is_allowed(checkpoint_dir: Path) -> None:
    model = load_model(str(checkpoint_dir), device="cpu", max_length=600, allow_extrapolation=True)
    assert model.prefill(CONTEXT, press="knorm").share == pytest.approx(0.5, abs=0.01)
    with pytest.raises(UsageError, match="allow_extrapolation is no argument of a call: give it to load_model"):
        model.prefill(CONTEXT, allow_extrapolation=True)


def test_a_ratio_without_a_press_is_refused_before_loading() -> None:
    with pytest.raises(UsageError, match="compression_ratio=0.5 belongs to a press"):
        load_model("nowhere", compression_ratio=0.5)


def test_files_of_an_evaluation_get_nothing_of_calls(checkpoint_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    model = load_model(str(checkpoint_dir), device="cpu", throughput_log=str(log), **SNAPKV)
    model.score(CONTEXT, CHOICES)
    assert log.read_text() == ""


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
