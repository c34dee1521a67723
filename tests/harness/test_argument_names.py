"""Names that are read off source texts are those of the classes, and misspelt ones are told in one line."""

from __future__ import annotations

import inspect
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.models.huggingface import HFLM

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness import argument_names, plugin
from lm_eval_kvpress.harness.argument_names import check_command_line, check_names
from lm_eval_kvpress.harness.arguments import ARGUMENTS
from lm_eval_kvpress.presses.catalog import ALIASES, ROWS
from lm_eval_kvpress.presses.names import listed_names
from lm_eval_kvpress.presses.parse import press_argument_names
from lm_eval_kvpress.presses.unsupported import UNSUPPORTED


def test_names_from_source_texts_are_those_of_the_classes() -> None:
    assert argument_names.own_arguments() == set(ARGUMENTS)
    assert argument_names.hflm_arguments() == set(inspect.signature(HFLM.__init__).parameters) - {"self", "kwargs"}


def test_every_press_and_argument_is_among_those_of_the_source_texts() -> None:
    names = [*ROWS.keys() - {"composed"}, *ALIASES]
    names = [f"{name}:snapkv" if name in ROWS and ROWS[name].wraps is not None else name for name in names]
    names = [name for name in names if name not in ("block:snapkv", "chunk:snapkv")]
    taken = {argument.rpartition(".")[2] for name in names for argument in press_argument_names(name)}
    assert {"window_size", "kv_budget", "compression_ratios"} < taken
    assert taken <= argument_names.press_arguments()
    refused_with_a_reason = {*UNSUPPORTED, *(name for one in UNSUPPORTED.values() for name in one.variants)}
    assert {*listed_names(), *refused_with_a_reason} <= argument_names.press_names()


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ({"pres": "snapkv"}, "unknown argument 'pres': did you mean 'press'?"),
        ({"pretraned": "builtin"}, "'pretraned': did you mean 'pretrained'?"),
        ({"press": "snapkv", "compresion_ratio": 0.5}, "did you mean 'compression_ratio'?"),
        ({"press": "composed:snapkv+think", "think.window_sise": 8}, "'think.window_sise'"),
        ({"press": "adakv:snpkv"}, "unknown press 'snpkv': did you mean 'snapkv'?"),
    ],
)
def test_a_misspelt_name_is_one_line(arguments: dict[str, Any], hint: str) -> None:
    with pytest.raises(UsageError) as error:
        check_names(arguments)
    assert hint in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"pretrained": "x", "press": None, "dtype": "float32", "max_memory": "1GB"},
        {"press": "None"},
        {"press": "prefill_decoding:adakv_snapkv+knorm", "target_size": 64, "decoding.n_sink": 4},
        {"press": "key_rerotation:criticalkv:knorm", "key_rerotation.x_typo": 1, "epsilon": 0.1} | {"epsilon": 0.2},
        {"press": "duo_attention_on_the_fly"},
    ],
)
def test_what_a_press_may_take_is_left_to_the_full_check(arguments: dict[str, Any]) -> None:
    check_names({name: value for name, value in arguments.items() if not name.endswith("typo")})


@pytest.mark.parametrize(
    "typed",
    [
        ["--model_args", "pres=snapkv"],
        ["--model_args=dtype=float32,pres=snapkv"],
        ["--model_args", json.dumps({"pres": "snapkv"})],
        ["--presses", "none, snpkv"],
        ["--config", "presses: [none, {press: knorm, compresion_ratio: 0.5}]"],
        ["--config", "model_args: {pres: snapkv}"],
        ["--config", "presses: none,snpkv"],
    ],
)
def test_our_commands_check_names_first(tmp_path: Path, typed: list[str]) -> None:
    if typed[0] == "--config":
        (tmp_path / "sweep.yaml").write_text(typed[1])
        typed = ["--config", str(tmp_path / "sweep.yaml")]
    with pytest.raises(UsageError, match="did you mean"):
        check_command_line([*typed, "--tasks", "x"])


@pytest.mark.parametrize("typed", [["--model_args"], ["--model_args", "{"], ["--config", "no.yaml"], ["--presses"]])
def test_what_cannot_be_read_is_left_to_the_command(typed: list[str]) -> None:
    check_command_line(typed)


def test_nothing_is_refused_where_a_source_has_another_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(argument_names, "_folders", lambda package: [])
    monkeypatch.setattr(argument_names, "PACKAGE", Path("nowhere"))
    check_names({"pres": "snapkv"})


def test_lm_evals_command_checks_our_models_only() -> None:
    plugin.check_arguments()
    plugin.check_arguments()
    typed: dict[str, Any] = {"tasks": ["lambada_openai"], "model_args": {"pres": "snapkv"}}
    assert EvaluatorConfig.from_cli(Namespace(model="hf", **typed)).model == "hf"
    with pytest.raises(UsageError, match="did you mean 'press'"):
        EvaluatorConfig.from_cli(Namespace(model="kvpress", **typed))
