"""Settings of a sweep, from YAML and the command line, and the cells that they make."""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.sweep.cells import cells_of
from lm_eval_kvpress.sweep.command import settings_from
from lm_eval_kvpress.sweep.settings import SweepSettings, parse_settings


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("presses: [none", "is no YAML"),
        ("- none", "must hold settings by name"),
        ("press: [none]", "did you mean 'presses'"),
        ("presses: [{name: knorm}]", "has no key 'press'"),
        ("presses: [{press: snapkv, window: 3}]", "unknown argument 'window'"),
        ("presses: [{press: knorm, dtype: bfloat16}]", "dtype is of the loaded model"),
        ("presses: [{press: knorm, revision: step1000}]", "revision is of the loaded model"),
        ("presses: [{press: knorm, max_length: 128}]", "max_length is of the loaded model"),
        ("presses: [{press: knorm, attn_implementation: eager}]", "attn_implementation is of the loaded model"),
        ("presses: [{press: knorm, parity: true}]", "parity is of the loaded model"),
        ("presses: [{press: knorm, throughput_log: a.jsonl}]", "throughput_log is of the loaded model"),
        ("{presses: [{press: knorm, query_tokens: 4}], query_tokens: [1, 32]}", "query_tokens.* give it in one place"),
    ],
)
def test_bad_yaml_is_one_line(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=says) as caught:
        cells_of(settings_from(["--config", str(file), "--tasks", "t", "--output_path", "o"]))
    assert "\n" not in str(caught.value)


def test_a_press_may_have_its_own_protocol() -> None:
    presses = [{"press": "knorm", "query_tokens": 4}, {"press": "tova", "rolling": "stream", "stream_budget": 64}]
    cells = cells_of(parse_settings({"tasks": "t", "presses": presses, "output_path": "o"}))
    assert [cell.protocol for cell in cells] == [(("query_tokens", 4),), (("rolling", "stream"),)]


def test_folders_of_long_names_fit_into_file_systems_and_differ() -> None:
    ratios = [{"press": "per_layer:knorm", "compression_ratios": [0.5] * 48 + [last]} for last in (0.25, 0.75)]
    cells = cells_of(parse_settings({"tasks": "t", "presses": ["knorm", *ratios], "output_path": "o"}))
    folders = [cell.folder for cell in cells]
    assert folders[0] == cells[0].name and len(cells[1].name.encode()) > 255
    assert len(set(folders)) == 3 and all(len(folder.encode()) <= 200 for folder in folders)


def test_cells_that_differ_in_a_sign_have_folders_of_their_own() -> None:
    """In one sweep or in two: a finished cell is found by its folder alone."""
    patterns = [r"\bWhat", "/bWhat", ".bWhat", "What_query_tokens=1", "What"]
    presses = [{"press": "knorm", "query_aware": False, "question_pattern": pattern} for pattern in patterns]
    presses += [{**presses[-1], "query_tokens": 1}]
    cells = [cells_of(parse_settings({"tasks": "t", "presses": [one], "output_path": "o"})) for one in presses]
    folders = [cell.folder for (cell,) in cells]
    assert len(set(folders)) == len(presses), folders
    assert folders[4] == "knorm_query_aware=False_question_pattern=What", "letters and digits need no hash"
    assert not any(set(folder) & set("/\\:") for folder in folders)


def test_documents_are_asked_in_the_order_of_the_data_set() -> None:
    """lm-eval does so whatever the order of the list, and would name them by the list's."""
    given = {"tasks": "t", "presses": "none", "output_path": "o", "samples": {"t": [5, 2, 5], "u": [0]}}
    assert parse_settings(given).samples == {"t": [2, 5], "u": [0]}


def test_yaml_holds_the_same_settings_and_the_command_line_comes_first(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    content = {
        "model_args": {"pretrained": "builtin", "dtype": "float32"},
        "presses": [
            "none",
            {"press": "snapkv", "window_size": 32},
            "adakv:knorm",
            {"press": "dms:knorm", "threshold": -9},
        ],
        "ratios": [0.25, 0.5],
        "query_tokens": [1, 32],
        "query_aware": [True, False],
        "tasks": ["kvpress_demo"],
        "output_path": "out",
    }
    file.write_text(yaml.safe_dump(content))
    settings = settings_from(["--config", str(file), "--limit", "3"])
    assert settings.limit == 3 and settings.model_args == content["model_args"]
    names = [cell.name for cell in cells_of(settings)]
    assert len(names) == len(set(names)) == 2 * 2 * (1 + 2 + 2 + 1)
    assert "snapkv_window_size=32_compression_ratio=0.25_query_tokens=32_query_aware=True" in names
    assert "adakv.knorm_compression_ratio=0.5_query_tokens=1_query_aware=False" in names
    typed = settings_from(["--config", str(file), "--query_aware", "true,false"])
    assert typed == settings_from(["--config", str(file)])
    assert settings_from(["--config", str(file), "--presses", "none"]).presses == ["none"]
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(json.loads(json.dumps(settings.as_typed()))))
    assert settings_from(["--config", str(again)]) == settings, "what the results hold can be run again"


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("batch_size", "big", "batch_size=big must be a whole number"),
        ("limit", "few", "limit=few must be a number"),
        ("tasks", [1], "tasks=1 must be text"),
        ("presses", [3], "presses: 3 has no key 'press'"),
        ("gen_kwargs", '{"do_sample"', "gen_kwargs: give NAME=VALUE,... or a JSON object"),
        ("query_tokens", "1,two", "query_tokens=two must be a whole number"),
    ],
)
def test_values_of_a_wrong_type_are_one_line(key: str, value: Any, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        cells_of(parse_settings({"tasks": "t", "presses": "none", "output_path": "o", key: value}))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_values_are_of_the_type_of_their_setting() -> None:
    settings = parse_settings(
        {
            "tasks": "a,b",
            "presses": ["none"],
            "output_path": "o",
            "ratios": 0.5,
            "budgets": [],
            "batch_size": "auto",
            "limit": "3",
            "gen_kwargs": '{"do_sample": false}',
            "model_args": "pretrained=builtin,dtype=float32",
            "device": None,
        }
    )
    assert (settings.tasks, settings.ratios, settings.budgets) == (["a", "b"], [0.5], [])
    assert (settings.batch_size, settings.limit, settings.device) == ("auto", 3.0, None)
    assert settings.gen_kwargs == {"do_sample": False}
    assert settings.model_args == {"pretrained": "builtin", "dtype": "float32"}


STRANGE: list[Any] = [
    *(None, True, 3, -1, 0.5, float("nan"), float("inf"), 10**400, "", " ", "\0", "a=b", "x" * 9999, b"bytes"),
    *(
        datetime.date(2026, 11, 28),
        datetime.datetime(2026, 11, 28),
        [],
        {},
        [None],
        [[]],
        [{}],
        [True],
        [3],
        ["a", None],
    ),
    *({"press": None}, {"press": ["knorm"]}, {"a": {"b": [datetime.date(2026, 1, 1)]}}, {1: 2}, {None: None}, {"": ""}),
    *([{"press": "knorm", 3: 4}], [{"press": "knorm", "compression_ratio": [0.5]}], [datetime.date(2026, 1, 1)]),
    *([{"press": 3}], [["knorm"]], [{"press": "knorm", "query_tokens": None}], [b"knorm"]),
]


@pytest.mark.parametrize("key", [item.name for item in dataclasses.fields(SweepSettings)])
def test_whatever_stands_in_a_file_is_a_setting_or_one_line(key: str) -> None:
    given = {"tasks": ["t"], "presses": ["none", "knorm"], "output_path": "o"}
    for value in STRANGE:
        try:
            settings = parse_settings({**given, key: value})
            cells_of(settings)
            json.dumps(settings.shared)
        except UsageError as error:
            assert "\n" not in str(error), (value, error)


@pytest.mark.parametrize("key", [3, None, True, datetime.date(2026, 11, 28), ("a", "b")])
def test_settings_without_a_name_are_one_line(key: Any) -> None:
    with pytest.raises(UsageError, match="unknown setting"):
        parse_settings({"tasks": ["t"], "presses": ["none"], "output_path": "o", key: 1})


def test_spaces_between_names_are_no_part_of_them() -> None:
    settings = parse_settings({"tasks": "a, b", "presses": "none, knorm ,snapkv", "output_path": "o"})
    assert (settings.tasks, settings.presses) == (["a", "b"], ["none", "knorm", "snapkv"])


@pytest.mark.parametrize(("launcher", "extra"), [("ray", "ray"), ("submitit", "slurm")])
def test_a_launcher_that_is_not_installed_is_one_line(
    launcher: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm_eval_kvpress.sweep.settings.find_spec", lambda name: None)
    says = rf"launcher={launcher} needs {launcher}: pip install 'lm-eval-kvpress\[{extra}\]'"
    with pytest.raises(UsageError, match=says):
        parse_settings({"presses": "none", "tasks": "t", "output_path": "o", "launcher": launcher})
