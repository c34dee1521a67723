"""The task files: they load wherever their folder lies, and turn a model's answers into the right figures.

The model is a fake with answers that are easy to add up. No network, no torch model.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table
from real_data import DATA
from repository import ROOT
from transformers import AutoTokenizer

from lm_eval_kvpress.records.rolling_score import RollingScore

TASKS = ROOT / "tasks"
BUILTIN = ROOT / "lm_eval_kvpress" / "builtin"

GROUPS = {
    "kvpress_ppl": ["wikitext_kvpress", "pg19_kvpress"],
    "kvpress_ppl_stream": ["wikitext_kvpress_stream", "pg19_kvpress_stream"],
    "kvpress_demo": ["kvpress_story", "kvpress_recall", "kvpress_recall_gen"],
}
BY_TEXT = {"word_perplexity", "byte_perplexity", "bits_per_byte"}
BY_TOKEN = {"token_perplexity", "pressed_token_perplexity", "scored_tokens", "pressed_tokens"}
PAGES = [" \n = First page = \n \n One @-@ way ( street ) , closed . \n", " \n = Second = \n \n It 's 3 @.@ 5 km . \n"]
BOOKS = [("The Ferry by A. Rudd", 11, "Once upon a time."), ("The Chain by M. Crane", 4711, "Four links  of a chain.")]

Score = Callable[[str], float]


class FakeModel(LM):
    """Answers with given functions; counts the prompts and keeps them."""

    def __init__(
        self,
        rolling: Score = lambda text: -1.0,
        choice: Callable[[str, str], float] = lambda context, continuation: -1.0,
        generate: Callable[[str], str] = lambda context: "",
    ) -> None:
        super().__init__()
        self.rolling, self.choice, self.generate = rolling, choice, generate
        self.num_scored = 0

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        self.num_scored += len(requests)
        return [self.rolling(request.args[0]) for request in requests]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return [(self.choice(*request.args), False) for request in requests]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return [self.generate(request.args[0]) for request in requests]


def noise(text: str) -> float:
    """A log-likelihood with many digits."""
    return -0.7 * len(text) - zlib.crc32(text.encode()) / 7e8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with two short pages and two short books."""
    books = [
        {"short_book_title": title, "url": f"http://www.gutenberg.org/ebooks/{number}", "text": text}
        for title, number, text in BOOKS
    ]
    for name, records in {"wikitext2": [{"page": page} for page in PAGES], "pg19": books}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def manager(path: Path = TASKS, **metadata: Any) -> TaskManager:
    return TaskManager(include_path=str(path), include_defaults=False, metadata=metadata)


def evaluate(model: LM, task: str, manager: TaskManager, **options: Any) -> dict[str, Any]:
    results = lm_eval.simple_evaluate(model, tasks=[task], task_manager=manager, **options)
    assert results is not None
    make_table(results)  # the command prints it: nothing in it may be unprintable
    return json.loads(json.dumps(results, default=handle_non_serializable, allow_nan=False))


def figures(results: dict[str, Any], task: str) -> dict[str, Any]:
    named = {key.removesuffix(",none"): value for key, value in results["results"][task].items() if "," in key}
    return {name: value for name, value in named.items() if not name.endswith("_stderr")}


def documents(task: str, manager: TaskManager) -> list[dict[str, Any]]:
    return list(manager.load([task])["tasks"][task].test_docs())


# ---------------------------------------------------------------------------------------------------------- files


def test_tasks_load_wherever_their_folder_lies(tmp_path: Path, folder: Path) -> None:
    moved = tmp_path / "elsewhere" / "tasks"
    shutil.copytree(TASKS, moved, ignore=shutil.ignore_patterns("__pycache__"))
    ours = manager(moved, data_dir=str(folder))
    for group, members in GROUPS.items():
        loaded = ours.load([group])
        assert list(loaded["tasks"]) == members
        for task in loaded["tasks"].values():
            assert task.config.metadata["config_source"].startswith(str(moved))
            assert len(task.eval_docs) > (task.config.task != "wikitext_kvpress_stream")  # that one is one text


def test_no_name_is_one_of_lm_evals_own() -> None:
    names = set(manager().all_tasks)
    assert names == {*GROUPS, *sum(GROUPS.values(), [])}
    stock = Path(lm_eval.__file__).parent / "tasks"
    used = {
        match.group(1)
        for file in stock.glob("**/*.yaml")
        for match in re.finditer(r"^(?:task|group|tag): *(\w+) *$", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert "wikitext" in used
    assert names & used == set()


def test_every_task_folder_has_a_readme_that_names_its_tasks() -> None:
    for file in TASKS.rglob("*.yaml"):
        assert f"`{file.stem}`" in (file.parent / "README.md").read_text(encoding="utf-8"), file


# ----------------------------------------------------------------------------------------------------- perplexity


@pytest.mark.parametrize("data", ["made up", "real"])
def test_wikitext_figures_are_those_of_stock_to_the_last_digit(data: str, folder: Path, tmp_path: Path) -> None:
    if data == "real":
        folder = DATA
        if not folder.is_dir():
            pytest.skip(f"no {folder}")
    stock_file = Path(lm_eval.__file__).parent / "tasks" / "wikitext" / "wikitext.yaml"
    (tmp_path / "stock").mkdir()
    (tmp_path / "stock" / "stock.yaml").write_text(
        f"include: {stock_file}\n"
        "task: stock_wikitext\n"
        "dataset_path: json\n"
        "dataset_name: null\n"
        f"dataset_kwargs: {{data_files: {{test: {folder}/wikitext2/test.jsonl}}, cache_dir: {tmp_path}/cache}}\n"
        "training_split: null\n"
        "validation_split: null\n"
    )
    stock = evaluate(FakeModel(rolling=noise), "stock_wikitext", manager(tmp_path / "stock"))
    ours = evaluate(FakeModel(rolling=noise), "wikitext_kvpress", manager(data_dir=str(folder)))
    assert figures(ours, "wikitext_kvpress") == figures(stock, "stock_wikitext")
    assert figures(ours, "wikitext_kvpress").keys() == BY_TEXT


def counted(text: str) -> RollingScore:
    """The first book and page: 4 tokens, none pressed. The second: 10 tokens of -2 nats, 5 of them pressed, at -3."""
    return RollingScore(-6.0, 4, 0, 0.0) if "Once" in text or "First" in text else RollingScore(-20.0, 10, 5, -15.0)


def test_perplexities_equal_a_hand_computation(folder: Path) -> None:
    results = evaluate(FakeModel(rolling=counted), "pg19_kvpress", manager(data_dir=str(folder)))
    got = figures(results, "pg19_kvpress")
    expected = {
        "word_perplexity": math.exp(26 / (4 + 5)),
        "byte_perplexity": math.exp(26 / (17 + 23)),
        "bits_per_byte": 26 / (17 + 23) / math.log(2),
        "token_perplexity": math.exp(26 / 14),
        "pressed_token_perplexity": math.exp(15 / 5),
        "scored_tokens": 14,
        "pressed_tokens": 5,
    }
    assert got.keys() == expected.keys()
    assert got == pytest.approx(expected, rel=1e-12)


def test_token_figures_are_left_out_for_a_model_that_does_not_count(folder: Path) -> None:
    results = evaluate(FakeModel(rolling=noise), "kvpress_ppl", manager(data_dir=str(folder)))
    for task in GROUPS["kvpress_ppl"]:
        assert figures(results, task).keys() == BY_TEXT


def test_perplexity_under_the_press_is_missing_where_nothing_was_pressed(folder: Path) -> None:
    model = FakeModel(rolling=lambda text: RollingScore(-6.0, 4, 0, 0.0))
    got = figures(evaluate(model, "pg19_kvpress", manager(data_dir=str(folder))), "pg19_kvpress")
    assert got["pressed_token_perplexity"] is None
    assert got["pressed_tokens"] == 0
    assert got["token_perplexity"] == pytest.approx(math.exp(1.5))


def test_documents_without_pressed_tokens_raise_no_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    evaluate(FakeModel(rolling=counted), "pg19_kvpress", manager(data_dir=str(folder)))
    evaluate(FakeModel(), "kvpress_recall", manager())
    assert "same number of documents" not in caplog.text
    assert "No aggregation function" not in caplog.text


def test_counts_survive_the_response_cache(folder: Path, tmp_path: Path) -> None:
    cache = {"use_cache": str(tmp_path / "cache"), "task_manager": manager(data_dir=str(folder))}
    answers = []
    for calls in (2, 0):
        model = FakeModel(rolling=counted)
        results = lm_eval.simple_evaluate(model, tasks=["pg19_kvpress"], **cache)
        assert results is not None and model.num_scored == calls
        answers.append(results["results"]["pg19_kvpress"])
    assert answers[0] == answers[1]
    assert answers[0]["scored_tokens,none"] == 14


def test_perplexities_of_different_texts_are_not_averaged(folder: Path) -> None:
    results = evaluate(FakeModel(rolling=counted), "kvpress_ppl", manager(data_dir=str(folder)))
    assert figures(results, "kvpress_ppl") == {}


def test_what_was_loaded_stands_in_the_results(folder: Path) -> None:
    ours = manager(data_dir=str(folder), books=["Chain", 11])
    for number in range(2):  # a second load starts afresh
        results = evaluate(FakeModel(), "kvpress_ppl", ours)
        metadata = results["configs"]["pg19_kvpress"]["metadata"]
        assert metadata["books"] == ["Chain", 11]
        assert metadata["max_tokens"] is None
        assert metadata["loaded"] == {
            "source": str(folder / "pg19/test.jsonl"),
            "titles": ["The Chain by M. Crane", "The Ferry by A. Rudd"],
        }, number
        assert results["configs"]["wikitext_kvpress"]["metadata"]["loaded"]["titles"] == ["First page", "Second"]


# ----------------------------------------------------------------------------------------------------------- demo


def test_stories_are_long_and_scored_whole() -> None:
    texts = [document["text"] for document in documents("kvpress_story", manager())]
    assert len(texts) >= 4
    assert min(len(text.split()) for text in texts) >= 3000
    scored: list[str] = []
    evaluate(FakeModel(rolling=lambda text: scored.append(text) or counted(text)), "kvpress_story", manager())  # type: ignore[func-returns-value]
    assert scored == texts == [path.read_text("utf-8") for path in sorted((TASKS / "demo" / "stories").glob("*.txt"))]


@pytest.mark.parametrize(("task", "metric"), [("kvpress_recall", "acc"), ("kvpress_recall_gen", "exact_match")])
def test_recall_is_counted_overall_by_kind_and_by_distance(task: str, metric: str) -> None:
    """A model that knows every answer up to 400 tokens away, and of the others the words only."""
    asked = {document["prompt"]: document for document in documents(task, manager())}

    def knows(prompt: str) -> bool:
        return bool(asked[prompt]["distance"] <= 400 or asked[prompt]["kind"] == "word")

    def choice(context: str, continuation: str) -> float:
        right = asked[context]["choices"].index(continuation) == asked[context]["answer"]
        return float(right == knows(context))

    def generate(context: str) -> str:
        return f" {asked[context]['value']}" if knows(context) else " something else"

    got = figures(evaluate(FakeModel(choice=choice, generate=generate), task, manager()), task)
    expected = {f"_at_{distance}": 1.0 if distance <= 400 else 0.5 for distance in (100, 400, 800, 1200, 1500)}
    expected |= {"": 0.7, "_word": 1.0, "_number": 0.4}
    assert got == pytest.approx({f"{metric}{name}": value for name, value in expected.items()})


def test_recall_answer_is_stated_in_its_context() -> None:
    for document in documents("kvpress_recall", manager()):
        assert document["choices"][document["answer"]] == f" {document['value']}"
        assert document["value"] in document["prompt"]
        assert all(choice.startswith(" ") for choice in document["choices"])
        assert len(set(document["choices"])) == 4


def test_recall_distances_without_a_document_are_missing() -> None:
    got = figures(evaluate(FakeModel(), "kvpress_recall", manager(), limit=3), "kvpress_recall")
    assert got["acc_at_100"] is not None
    assert got["acc_at_1500"] is None


@pytest.mark.parametrize("task", ["kvpress_recall", "kvpress_recall_gen"])
def test_the_first_recall_documents_have_every_distance_and_then_every_kind(task: str) -> None:
    cells = [(document["distance"], document["kind"]) for document in documents(task, manager())]
    distances = (100, 400, 800, 1200, 1500)
    cycle = [(distance, kind) for kind in ("word", "number") for distance in distances]
    assert cells == cycle * (len(cells) // 10) and len(cells) in (30, 60)


def test_generated_recall_asks_what_the_choices_ask() -> None:
    choices = [document["prompt"] for document in documents("kvpress_recall", manager())]
    generated = [document["prompt"] for document in documents("kvpress_recall_gen", manager())]
    assert 0 < len(generated) < len(choices) and generated == choices[: len(generated)]


def test_arguments_of_the_model_do_not_choose_the_recall_documents() -> None:
    plain = documents("kvpress_recall", manager())
    assert plain == documents("kvpress_recall", manager(press="random", seed=3, pretrained="builtin"))
    assert plain != documents("kvpress_recall", manager(recall_seed=3))


@pytest.mark.parametrize("folder_of", [BUILTIN, DATA / "pythia_tokenizer"], ids=["builtin", "pythia"])
def test_recall_prompts_fit_into_2048_tokens(folder_of: Path) -> None:
    if not (folder_of / "tokenizer.json").exists():
        pytest.skip(f"no tokenizer in {folder_of}")
    tokenizer = AutoTokenizer.from_pretrained(folder_of)
    prompts = [document["prompt"] for document in documents("kvpress_recall", manager())]
    assert max(len(tokenizer(prompt, verbose=False)["input_ids"]) for prompt in prompts) + 12 <= 2048  # max_gen_toks


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"recall_per_cell": 0}, "recall_per_cell=0 must be a whole number of at least 1"),
        ({"recall_per_cell": 1.5}, "recall_per_cell=1.5"),
        ({"recall_seed": "one"}, "recall_seed='one' must be a whole number"),
    ],
)
def test_bad_recall_metadata_is_one_line(metadata: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        documents("kvpress_recall", manager(**metadata))
