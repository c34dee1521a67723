"""The report of `scripts.studies.findings`: its sentences follow the figures; what it cannot measure it says."""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
from repository import ROOT

from lm_eval_kvpress.harness.checkpoint import resolve_pretrained
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.models import gpt_neox
from scripts.studies.findings.command import load, parser
from scripts.studies.findings.experiments import one_forward, perplexities
from scripts.studies.findings.first_token import answer, first_token, questions
from scripts.studies.findings.perplexity_sections import (
    difference_sentence,
    forward_sentence,
    protocol_sentence,
    ratio_section,
    split_sentence,
)
from scripts.studies.findings.report import first_token_section, markdown
from scripts.studies.findings.rows import Findings, FirstToken, OneForward, Perplexity, SplitDifference
from scripts.studies.findings.wrong_split import contiguous_split, split_difference

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def lm(checkpoint_dir: Path) -> KVPress:
    return KVPress(pretrained=str(checkpoint_dir), device="cpu")


@pytest.fixture(scope="module")
def context(lm: KVPress) -> list[int]:
    return lm.tok_encode("The cold river ran past an old mill where seven grey geese slept. " * 30)[:200]


def row(press: str, protocol: str, perplexity: float, *, split: str = "right", removed: float = 0.5) -> Perplexity:
    kept = None if protocol == "one_pass" else 1 - removed
    return Perplexity("WikiText-2", press, removed, protocol, split, perplexity, 100, kept, ())


# -------------------------------------------------------------------------------------------------- experiments


def test_one_forward_prunes_the_cache_and_leaves_the_logits(lm: KVPress, context: list[int]) -> None:
    found = one_forward(lm, context, "snapkv", 0.5)
    assert found.kept_share == 0.5
    assert found.largest_difference <= 1e-5 * found.largest_logit


def test_a_wrong_split_changes_what_queries_choose_and_nothing_else(lm: KVPress, context: list[int]) -> None:
    views = gpt_neox.ProjectionView._rows
    by_query = split_difference(lm, [context], "snapkv", 0.5)
    by_place = split_difference(lm, [context], "streaming_llm", 0.5)
    assert by_query.num_kept == by_place.num_kept == 3 * 4 * 99
    assert 0 < by_query.num_different < by_query.num_kept
    assert by_place.num_different == 0
    assert gpt_neox.ProjectionView._rows is views


def test_a_press_moves_rolling_scores_under_prefix_only(lm: KVPress, context: list[int]) -> None:
    documents = {"pg19_kvpress": [lm.tok_decode(context * 3)]}
    figures = {
        (press, protocol): perplexities(lm, documents, press, 0.5, protocol)[0].perplexity
        for press in ("none", "snapkv")
        for protocol in ("one_pass", "prefix")
    }
    assert figures["none", "one_pass"] == figures["snapkv", "one_pass"]
    assert abs(figures["none", "prefix"] / figures["snapkv", "prefix"] - 1) > 1e-4


def test_answers_move_only_if_a_token_is_held_back(lm: KVPress) -> None:
    asked = [replace(question, context=question.context[-300:]) for question in questions(lm, 3)]
    for held_back, moves in ((1, True), (0, False)):
        plain, pressed = (answer(lm, asked, press, 0.9, held_back) for press in ("none", "random"))
        found = first_token(asked, pressed, plain, press="random", held_back=held_back, split="right")
        assert (found.largest_move > 1e-2) is moves


def test_contiguous_split_is_undone_after_an_error() -> None:
    rows = gpt_neox.ProjectionView._rows
    with pytest.raises(RuntimeError), contiguous_split():
        assert gpt_neox.ProjectionView._rows is not rows
        raise RuntimeError
    assert gpt_neox.ProjectionView._rows is rows


def test_data_that_is_not_there_is_skipped_and_named(lm: KVPress, tmp_path: Path) -> None:
    arguments = parser().parse_args(["--data_dir", str(tmp_path)])
    said: list[str] = []
    documents, skipped = load(arguments, lm, said.append)
    assert not documents
    assert [line.partition(":")[0] for line in skipped] == ["WikiText-2", "PG19"]
    assert all(str(tmp_path) in line for line in skipped)
    assert len(said) == 2


# ------------------------------------------------------------------------------------------- sentences and figures


@pytest.mark.parametrize(
    ("one_pass", "prefix", "words"),
    [
        (10.96, 12.0, ("one figure for every press, 10.96", "tells them apart: snapkv +9.1%")),
        (10.96, 11.0, ("one figure for every press", "the presses did not act")),
        (11.5, 12.0, ("differ by 4.9 %, which no press can cause", "tells them apart")),
    ],
)
def test_protocol_sentence_says_what_was_measured(one_pass: float, prefix: float, words: tuple[str, str]) -> None:
    rows = [
        row("none", "one_pass", 10.96),
        row("snapkv", "one_pass", one_pass),
        row("none", "prefix", 11.0),
        row("snapkv", "prefix", prefix),
    ]
    sentence = protocol_sentence(rows, "WikiText-2")
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize(
    ("kept_share", "difference", "words"),
    [(0.5, 0.0, "not one logit moved"), (0.5, 0.3, "moved under snapkv"), (1.0, 0.0, "not every press pruned")],
)
def test_forward_sentence_says_what_was_measured(kept_share: float, difference: float, words: str) -> None:
    assert words in forward_sentence([OneForward("snapkv", 1024, kept_share, 17.0, difference)])


@pytest.mark.parametrize(
    ("one_pass", "prefix", "words", "not_words"),
    [
        (10.0, 9.9, ("invisible", "-1.00%", "scores *better*"), "cannot be"),
        (10.0, 10.2, ("invisible", "+2.00%"), "better"),
        (10.1, 10.2, ("worth up to 1.00%, which it cannot be",), "invisible"),
    ],
)
def test_split_sentence_says_what_was_measured(
    one_pass: float, prefix: float, words: tuple[str, ...], not_words: str
) -> None:
    rows = [
        *(row("snapkv", protocol, 10.0) for protocol in ("one_pass", "prefix")),
        row("snapkv", "one_pass", one_pass, split="contiguous"),
        row("snapkv", "prefix", prefix, split="contiguous"),
    ]
    sentence = split_sentence(rows)
    assert all(word in sentence for word in words) and not_words not in sentence, sentence


def test_difference_sentence_tells_those_that_differ_from_those_that_do_not() -> None:
    sentence = difference_sentence([SplitDifference("snapkv", 1, 100, 35), SplitDifference("streaming_llm", 1, 100, 0)])
    assert "snapkv 35.0 % of those kept" in sentence and "streaming_llm: not one entry differs" in sentence


@pytest.mark.parametrize(
    ("held", "free", "words"),
    [
        (2.0, 1e-6, "With one token held back the figures are those of the compressed cache"),
        (1e-6, 1e-6, "these contexts do not matter"),
        (2.0, 2.0, "which a press cannot cause"),
    ],
)
def test_first_token_section_says_what_was_measured(held: float, free: float, words: str) -> None:
    rows = [
        *(FirstToken("none", held_back, "right", 0.0, 0.0, 1.0) for held_back in (1, 0)),
        FirstToken("snapkv", 1, "right", held, held, 0.5),
        FirstToken("snapkv", 0, "right", free, free, 1.0),
    ]
    assert words in first_token_section(Findings([], 0.5, first_tokens=rows))


def test_ratio_section_repeats_what_presses_report_of_themselves() -> None:
    noted = replace(row("pyramidkv", "prefix", 12.0, removed=0.99), notes=("fell back",))
    rows = [row("none", "prefix", 10.0, removed=0.0), row("pyramidkv", "prefix", 10.0, removed=0.01), noted]
    text = ratio_section(Findings([], 0.5, ratios=rows), None)
    assert "pyramidkv +0.00% and +20.0%" in text
    assert "- pyramidkv, removed 0.99: fell back" in text


def test_without_data_the_report_has_the_reasons_and_no_empty_section() -> None:
    report = markdown(Findings(["setting"], 0.5, skipped=["PG19: no such file"]), {})
    assert "- Skipped: PG19: no such file" in report
    assert "##" not in report


def test_committed_report_is_of_the_builtin_and_its_figures_are_there() -> None:
    report = (DOCS / "findings.md").read_text(encoding="utf-8")
    weights = Path(resolve_pretrained("builtin")) / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
    assert f"`builtin` (SHA-256 {digest})" in report, "other weights: run python -m scripts.studies.findings again"
    assert "Skipped" not in report
    assert "Why was it 10.96 and 8.94 everywhere?" in report
    for name in ("protocols", "ratios", "speeds"):
        assert f"(findings_{name}.png)" in report
        assert (DOCS / f"findings_{name}.png").is_file()


def test_options_have_defaults_for_the_builtin() -> None:
    assert isinstance(parser().parse_args([]), argparse.Namespace)
    assert parser().parse_args([]).pretrained == "builtin"
