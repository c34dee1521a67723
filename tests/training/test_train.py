"""Laws of the training of the built-in checkpoint, on a made-up corpus and the tiny recipe."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from repository import ROOT
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXForCausalLM

from lm_eval_kvpress.recall import GIVEN_NAMES, KINDS, WORDS, generated_filler, recall_documents
from scripts.training import evaluate
from scripts.training import train as training
from scripts.training.data import copy_rows, read_books
from scripts.training.recipe import RECIPES, Mixture, check_schedule, stage_at
from scripts.training.run import Run

BUILTIN = ROOT / "lm_eval_kvpress" / "builtin"

TINY = RECIPES["tiny"]
NUM_STEPS = 120

Losses = list[tuple[str, ...]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums are rounded by the number of threads; the killed run, a process of its own, has one as well."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "books.txt"
    books = [generated_filler(random.Random(seed), 8_000) for seed in range(4)]
    file.write_text("\n<|endoftext|>\n".join(books), encoding="utf-8")
    return file


def losses(output: Path) -> Losses:
    with (output / "loss.csv").open() as file:
        return [tuple(row) for row in csv.reader(file)][1:]


def train(corpus: Path, output: Path, *, seed: int = 0, num_steps: int = NUM_STEPS) -> Losses:
    run = Run(output, corpus, "tiny", seed)
    tokens = num_steps * TINY.tokens_per_step
    training.train(run, total_tokens=tokens, minutes=None, device="cpu", save_every_sec=60)
    return losses(output)


@pytest.fixture(scope="module")
def whole_run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    train(corpus, output)
    return output


def test_killed_run_ends_with_the_curve_of_one_that_was_not(corpus: Path, whole_run: Path, tmp_path: Path) -> None:
    """SIGKILL while it trains, behind a checkpoint and rows of the curve that the checkpoint does not cover."""
    output = tmp_path / "run"
    arguments = [sys.executable, "-m", "scripts.training.train", "--corpus", str(corpus), "--output", str(output)]
    arguments += ["--recipe", "tiny"]
    arguments += ["--tokens", str(NUM_STEPS * TINY.tokens_per_step), "--save-every-sec", "0.2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    killed = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300  # imports alone take a minute beside other work
    while not (output / "checkpoint.pt").exists() and time.monotonic() < deadline and killed.poll() is None:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert 0 < len(losses(output)) < NUM_STEPS

    with (output / "loss.csv").open("a") as file:
        file.write("119,30464,256,0.0001,9.999999\n120,307")  # steps that were lost, the last half written
    assert train(corpus, output) == losses(whole_run)
    assert len(losses(output)) == NUM_STEPS


def test_same_seed_gives_the_same_losses_and_another_seed_others(corpus: Path, whole_run: Path, tmp_path: Path) -> None:
    expected = losses(whole_run)[:10]
    assert train(corpus, tmp_path / "same", num_steps=10) == expected
    assert train(corpus, tmp_path / "other", seed=1, num_steps=10) != expected


def test_training_lowers_the_loss(whole_run: Path) -> None:
    values = [float(row[-1]) for row in losses(whole_run)]
    assert np.mean(values[-10:]) < np.mean(values[:10]) - 1


def test_export_loads_with_the_auto_classes_and_the_card_has_figures(corpus: Path, whole_run: Path) -> None:
    """The run is complete, so the command only measures and exports."""
    held_out = corpus.with_name("held_out.txt")
    held_out.write_text(generated_filler(random.Random(99), 6_000), encoding="utf-8")
    tokens = str(NUM_STEPS * TINY.tokens_per_step)
    arguments = ["--corpus", str(corpus), "--output", str(whole_run), "--recipe", "tiny", "--tokens", tokens]
    assert training.main([*arguments, "--held-out", str(held_out), "--documents-per-cell", "1"]) == 0

    model = AutoModelForCausalLM.from_pretrained(whole_run / "export")
    tokenizer = AutoTokenizer.from_pretrained(whole_run / "export")
    assert type(model).__name__ == "GPTNeoXForCausalLM"
    assert model.dtype == torch.float32
    assert all(torch.equal(weight, weight.bfloat16().float()) for weight in model.parameters())  # as stored
    assert model.config.use_parallel_residual and not model.config.tie_word_embeddings
    assert model.config.rope_parameters["partial_rotary_factor"] == 0.25
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.decode(tokenizer("An old mill, 1847.")["input_ids"]) == "An old mill, 1847."
    card = (whole_run / "export" / "README.md").read_text(encoding="utf-8")
    assert f"Trained on {int(tokens):,} tokens" in card
    assert "| 1024-2047 |" in card and "| 1800 |" in card
    assert (whole_run / "loss.png").stat().st_size > 5_000


def test_batches_are_a_function_of_seed_and_step(corpus: Path, whole_run: Path) -> None:
    def batch(seed: int, step: int) -> np.ndarray:
        run = Run(whole_run, corpus, "tiny", 0)
        run.data.seed = seed
        return run.data.batch(step, num_rows=8, num_tokens=256, mixture=Mixture(text=0.3, repeats=0.4))

    first = batch(0, 7)
    assert first.shape == (8, 256) and first.max() < TINY.vocab_size
    assert np.array_equal(first, batch(0, 7))
    assert not np.array_equal(first, batch(0, 8))
    assert not np.array_equal(first, batch(1, 7))


def test_recall_rows_hold_facts_before_their_questions(corpus: Path, whole_run: Path) -> None:
    data = Run(whole_run, corpus, "tiny", 0).data
    for seed in range(50):
        for write in (data.recall_text, data.dense_recall_text):
            context, *questions = write(random.Random(seed), 400).split("\n\nQuestion: What is the ")
            assert questions
            for question in questions:
                asked, answer = question.strip().split("\nThe ")[0].split("?\nAnswer: ")
                assert f"The {asked} is {answer}." in context


def test_copy_probe_repeats_its_first_half(corpus: Path, whole_run: Path) -> None:
    rows = copy_rows(Run(whole_run, corpus, "tiny", 0).data, num_rows=4, num_tokens=32)
    assert np.array_equal(rows[:, :16], rows[:, 16:])


def test_stages_follow_tokens_and_the_rate_warms_up_and_cools_down() -> None:
    recipe = RECIPES["builtin"]
    total = 40_000_000
    last = total // recipe.tokens_per_step - 1
    names = [stage_at(recipe, step, total)[0].name for step in range(0, last, 50)]
    assert list(dict.fromkeys(names)) == [stage.name for stage in recipe.stages]
    rates = [stage_at(recipe, step, total)[1] for step in range(last + 1)]
    assert rates[0] == pytest.approx(1e-5) and max(rates) == rates[500] == 2e-3
    assert rates[last] == pytest.approx(recipe.stages[-1].rate_to, rel=0.01)


def test_tokens_may_change_until_the_last_stage_has_begun() -> None:
    recipe = RECIPES["builtin"]
    check_schedule(recipe, 5_000, 40_000_000, 60_000_000)
    with pytest.raises(ValueError, match="--tokens 40000000"):
        check_schedule(recipe, 9_700, 40_000_000, 60_000_000)


def test_held_out_books_are_not_trained_on(corpus: Path) -> None:
    texts, held_out = read_books(corpus, characters=10**9)
    assert len(texts) == 3
    assert held_out not in texts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corpus", "missing.txt", "--output", "new"], "cannot read the corpus missing.txt"),
        (["--corpus", "short.txt", "--output", "new"], "at least 20000"),
        (["--corpus", "short.txt", "--output", "full"], "holds no run"),
        (["--corpus", "short.txt", "--output", "new", "--tokens", "1"], "less than one step"),
        (["--corpus", "short.txt", "--output", "new", "--held-out", "missing.txt"], "does not exist"),
    ],
)
def test_bad_input_ends_with_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("Too short.", encoding="utf-8")
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine", encoding="utf-8")
    assert training.main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not Path("new").exists()


def test_folder_of_another_setting_is_refused(
    corpus: Path, whole_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--corpus", str(corpus), "--output", str(whole_run), "--recipe", "tiny", "--seed", "5"]
    assert training.main(arguments) == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.skipif(not (BUILTIN / "tokenizer.json").exists(), reason="the built-in checkpoint is not here")
def test_answer_words_and_given_names_are_one_token_of_the_builtin_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN)
    words = [*GIVEN_NAMES, *(word for group in WORDS.values() for word in group)]
    assert {word: len(tokenizer.tokenize(f" {word}")) for word in words} == dict.fromkeys(words, 1)


@pytest.mark.skipif(not (BUILTIN / "config.json").exists(), reason="the built-in checkpoint is not here")
def test_builtin_recalls_facts_far_back() -> None:
    model = GPTNeoXForCausalLM.from_pretrained(BUILTIN, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(BUILTIN / "tokenizer.json"))
    documents = recall_documents(4321, per_cell=2, distances=(128, 1024), kinds=KINDS)
    hits = [evaluate.answer(model, tokenizer, document)[0] for document in documents]
    assert np.mean(hits) >= 0.9, [(d.distance, d.kind) for d, hit in zip(documents, hits, strict=True) if not hit]


class Bigram:
    """Logits that depend on the last token alone: more context cannot change its perplexity."""

    device = torch.device("cpu")

    def __init__(self, vocab_size: int) -> None:
        self.table = torch.randn(vocab_size, vocab_size, generator=torch.Generator().manual_seed(0))

    def __call__(self, input_ids: torch.Tensor, use_cache: bool, logits_to_keep: int) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids[:, -logits_to_keep:]])


def test_every_length_of_context_scores_the_same_tokens_once() -> None:
    model, row = Bigram(50), torch.randint(50, (evaluate.WINDOW,), generator=torch.Generator().manual_seed(1))
    half = evaluate.WINDOW // 2
    expected = torch.nn.functional.cross_entropy(model.table[row[half - 1 : -1]], row[half:]).exp().item()
    found = evaluate.perplexities(model, [row])
    assert list(found) == ["64", "128-143", "256-287", "512-575", "1024-2047"]
    assert list(found.values()) == pytest.approx([expected] * 5, rel=1e-5)
