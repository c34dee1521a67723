"""The command writes a file that says whose statistics it holds, and runs take it for these weights alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import SENTENCES
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_kvpress import cli
from lm_eval_kvpress.calibrate.methods import calibration_of
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.harness.statistics import hashes_of_statistics
from lm_eval_kvpress.sweep.cells import Cell, presses_of
from lm_eval_kvpress.sweep.settings import SweepSettings


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text(" ".join(SENTENCES * 6), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def filters(checkpoint_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("statistics") / "filters.safetensors"
    arguments = [
        "--model_args",
        f"pretrained={checkpoint_dir}",
        "--data",
        str(data),
        "--window",
        "128",
        "-o",
        str(file),
    ]
    assert cli.main(["calibrate", "qfilter", *arguments, "--window", "128", "--num_tokens", "300"]) == 0
    return file


def answers(lm: KVPress) -> list[tuple[float, bool]]:
    tokens: list[int] = lm.tok_encode(" ".join(SENTENCES))
    return lm._loglikelihood_tokens([(("", ""), tokens[:60], tokens[60:80])], disable_tqdm=True)


def test_the_file_says_whose_statistics_it_holds(filters: Path, checkpoint_dir: Path, data: Path) -> None:
    with safe_open(filters, framework="pt") as content:
        about = content.metadata()
    assert (about["press"], about["model"], about["data"]) == ("qfilter", str(checkpoint_dir), str(data))
    assert (about["num_tokens"], about["num_windows"], about["dtype"]) == ("300", "3", "float32")
    assert json.loads(about["versions"]).keys() >= {"torch", "kvpress"}
    assert float(about["seconds"]) >= 0 and float(about["processor_seconds"]) >= 0


def test_a_run_takes_the_statistics_of_its_weights_and_records_them(filters: Path, checkpoint_dir: Path) -> None:
    lm = KVPress(str(checkpoint_dir), press="qfilter", statistics=str(filters), max_length=128)
    facts = lm.describe()["press"]["statistics"]
    assert facts["file"] == str(filters) and len(facts["sha256"]) == 64 and facts["num_tokens"] == "300"
    assert answers(lm) != answers(KVPress(str(checkpoint_dir), max_length=128))
    model = AutoModelForCausalLM.from_pretrained(checkpoint_dir)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_dir)
    passed_in = KVPress(model, tokenizer=tokenizer, press="qfilter", statistics=str(filters), max_length=128)
    assert answers(passed_in)[0][0] == pytest.approx(answers(lm)[0][0], abs=1e-4)


def test_statistics_of_other_weights_are_refused_in_one_line(filters: Path, checkpoint_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint_dir)
    with torch.no_grad():
        model.gpt_neox.layers[1].attention.dense.weight[3, 5] += 0.01
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_dir)
    with pytest.raises(UsageError, match="are of other weights .* calibrate this model") as caught:
        KVPress(model, tokenizer=tokenizer, press="adakv:qfilter", statistics=str(filters))
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="were taken in float32, and this model is in bfloat16"):
        KVPress(str(checkpoint_dir), dtype="bfloat16", press="qfilter", statistics=str(filters))
    with pytest.raises(UsageError, match="those of press=qfilter: calibrate expected_attention_stats"):
        KVPress(str(checkpoint_dir), press="expected_attention_stats", statistics=str(filters))


@pytest.mark.parametrize(
    ("press", "options"), [("kvzap", ["max_length=64"]), ("qfilter", ["max_length=128", "--window", "2"])]
)
def test_windows_that_no_text_could_fill_are_refused_in_one_line(
    press: str, options: list[str], checkpoint_dir: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, *others = options
    given = ["--model_args", f"pretrained={checkpoint_dir},{model}", *others, "--data", str(data)]
    assert cli.main(["calibrate", press, *given, "-o", "x.safetensors"]) == cli.BAD_INPUT
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "windows would have" in told and "the shortest that counts has 8" in told


def test_a_surrogate_is_not_fitted_to_fewer_tokens_than_it_has_weights(
    checkpoint_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its 64 weights and a bias would reproduce the scores of 60 tokens whatever these are."""
    given = ["--model_args", f"pretrained={checkpoint_dir}", "--data", str(data), "-o", str(tmp_path / "x.safetensors")]
    assert cli.main(["calibrate", "kvzap", *given, "--num_tokens", "60"]) == cli.BAD_INPUT
    assert "has 60 tokens, too few to calibrate kvzap on, which takes more than 64" in capsys.readouterr().err


def test_statistics_of_the_same_weights_under_another_rope_are_refused_in_one_line(
    filters: Path, checkpoint_dir: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint_dir)
    model.config.rope_parameters["rope_theta"] /= 10  # queries of all later positions are turned otherwise
    with pytest.raises(
        UsageError, match="of these weights under another config.json .* calibrate this model"
    ) as caught:
        KVPress(
            model, tokenizer=AutoTokenizer.from_pretrained(checkpoint_dir), press="qfilter", statistics=str(filters)
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["snapkv"], "no statistics are taken for 'snapkv': name one of qfilter"),
        (["lukv:criticalkv:snapkv"], "no curve is made for its scores"),
        (["lukv:streaming_llm"], "would lose the newest tokens"),
        (["lukv:lukv"], "cannot wrap"),
        (["lukv:snapkv,window=x"], "window=x"),
        (["lukv:snapkv,window_sise=8"], "window_size"),
        (["lukv:snapkv,window_size"], "window_size= must be a whole number"),
        (["lukv:snapkv,compression_ratio=0.3"], "serves every compression_ratio: leave compression_ratio out"),
        (["qfilter,window_size=8"], "statistics of qfilter depend on no argument"),
        (["qfilter", "--model_args", "press=knorm"], "without a press"),
        (["qfilter", "-o", "x.pt"], "must end in .safetensors"),
        (["qfilter", "-o", "no/such/folder/x.safetensors"], "there is no folder"),
        (["qfilter", "--num_tokens", "0"], "above 0"),
    ],
)
def test_bad_commands_end_before_anything_is_loaded(
    changed: list[str], message: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--data", str(data), *([] if "-o" in changed else ["-o", "x.safetensors"])]
    with pytest.raises(SystemExit):
        cli.main(["calibrate", *changed, *given])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("press", "arguments"),
    [
        ("duo_attention", {"sink_size": 4, "recent_size": 8}),
        ("kvzap", {}),
        ("lukv:knorm", {}),
    ],
)
def test_other_presses_get_their_statistics_too(
    press: str, arguments: dict[str, int], checkpoint_dir: Path, data: Path, tmp_path: Path
) -> None:
    file = tmp_path / "statistics.safetensors"
    options = ["--model_args", f"pretrained={checkpoint_dir}", "--data", str(data), "-o", str(file)]
    assert cli.main(["calibrate", press, *options, "--window", "100", "--num_tokens", "300"]) == 0
    lm = KVPress(str(checkpoint_dir), press=press, statistics=str(file), max_length=128, **arguments)
    assert lm.describe()["press"]["statistics"]["press"] == press
    assert answers(lm) != answers(KVPress(str(checkpoint_dir), max_length=128))
    if press == "lukv:knorm":
        with pytest.raises(UsageError, match="are those of press=lukv:knorm, not lukv:keydiff"):
            KVPress(str(checkpoint_dir), press="lukv:keydiff", statistics=str(file))


def test_a_curve_serves_the_scores_alone_that_it_was_taken_for(
    checkpoint_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, press = tmp_path / "curve.safetensors", "lukv:snapkv,window_size=8,sink=2"
    options = ["--model_args", f"pretrained={checkpoint_dir}", "--data", str(data), "-o", str(file)]
    assert cli.main(["calibrate", press, *options, "--window", "100", "--num_tokens", "300"]) == 0
    assert f"press={press},statistics={file}" in capsys.readouterr().out
    with safe_open(file, framework="pt") as content:
        about, tensors = content.metadata(), {"budget_curve": content.get_tensor("budget_curve")}
    assert about["press"] == "lukv:snapkv"
    assert json.loads(about["arguments"]) == {"window_size": 8, "kernel_size": 5, "sink": 2, "window": 1}

    def load(**arguments: int) -> KVPress:
        return KVPress(str(checkpoint_dir), press="lukv:snapkv", statistics=str(file), max_length=128, **arguments)

    assert load(window_size=8, sink=2).describe()["press"]["statistics"]["arguments"] == about["arguments"]
    with pytest.raises(UsageError) as caught:
        load(window_size=7, kernel_size=1, sink=2)
    assert str(caught.value) == (
        f"statistics={file} are those of press=lukv:snapkv with window_size=8,kernel_size=5, and this one has "
        "window_size=7,kernel_size=1: give it window_size=8,kernel_size=5, or calibrate "
        "lukv:snapkv,window_size=7,kernel_size=1,sink=2,window=1"
    )
    with pytest.raises(UsageError, match="with sink=2, and this one has sink=4: give it sink=2"):
        load(window_size=8)
    del about["arguments"]  # as files of earlier versions
    file.write_bytes(safetensors.torch.save(tensors, about))
    load(window_size=7)


def test_kvpress_own_lukv_is_taken_with_its_own_arguments() -> None:
    calibration = calibration_of("lukv")
    assert calibration.press == "lukv:expected_attention" and calibration.arguments["epsilon"] == 0.02
    assert calibration_of("lukv:expected_attention").arguments["epsilon"] == 0
    assert calibration_of("lukv,epsilon=0.1").arguments["epsilon"] == 0.1


def test_too_little_text_is_refused_and_nothing_is_written(
    checkpoint_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, file = tmp_path / "short.txt", tmp_path / "x.safetensors"
    data.write_text("Few words.", encoding="utf-8")
    arguments = ["--model_args", f"pretrained={checkpoint_dir}", "--data", str(data), "-o", str(file)]
    assert cli.main(["calibrate", "qfilter", *arguments]) == 2
    assert "too few to calibrate qfilter on" in capsys.readouterr().err
    assert not file.exists()


def test_a_sweep_knows_the_statistics_of_its_cells(filters: Path) -> None:
    """They are part of what its answers depend on: a file that is written anew must not go on with the old answers."""
    settings = SweepSettings(tasks=["x"], output_path="x", presses=["none"])
    cells = [Cell("a", {"press": "none"}), Cell("b", {"press": "adakv:qfilter", "statistics": str(filters)})]
    hashes = hashes_of_statistics(presses_of(settings, cells))
    assert list(hashes) == [f"statistics {filters}"]
    before = filters.read_bytes()
    try:
        filters.write_bytes(before.replace(b'"num_windows":"3"', b'"num_windows":"4"'))
        assert hashes_of_statistics(presses_of(settings, cells)) != hashes
    finally:
        filters.write_bytes(before)
