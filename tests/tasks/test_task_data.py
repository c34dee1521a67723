"""The data of `tasks/kvpress_ppl`: sources, counts, choice of books, cuts. No network; the hub is never reached."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest
from lm_eval.tasks.wikitext import preprocess_wikitext as stock
from real_data import DATA
from repository import ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WIKITEXT = {
    "hub_dataset": "EleutherAI/wikitext_document_level",
    "hub_config": "wikitext-2-raw-v1",
    "local_file": "wikitext2/test.jsonl",
}
PG19 = {"hub_dataset": "emozilla/pg19-test", "local_file": "pg19/test.jsonl"}

PAGES = [
    " \n = First page = \n \n One @-@ way ( street ) , closed . \n",
    " \n = Second = \n \n It 's 3 @.@ 5 \u2028 km . \n",
]
BOOKS = [
    ("The Ferry by A. Rudd", "11", "Once upon a time there was a ferry,\r\nand  a ferryman. "),
    ("The Chain by M. Crane", "4711", "Ein Übermaß an Kürze:\n\n\n  four links \N{CHAINS} of a chain."),
    ("A Chain of Lights by R. Haverill", "99", "  Short."),
]


def load_module(path: Path) -> ModuleType:
    """As lm-eval does: by path, under a name that is no package."""
    spec = importlib.util.spec_from_file_location(str(path.with_suffix("")), path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


corpora = load_module(ROOT / "tasks" / "kvpress_ppl" / "corpora.py")


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVPRESS_DATA_DIR", raising=False)

    def unreachable(*arguments: Any, **options: Any) -> None:
        raise ConnectionError(f"Couldn't reach '{arguments[0]}' on the Hub (LocalEntryNotFoundError)\nand more lines")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder in the schema of the two data sets."""
    books = [
        {"short_book_title": title, "publication_date": 1871, "url": f"http://www.gutenberg.org/ebooks/{id}", "text": t}
        for title, id, t in BOOKS
    ]
    sets: dict[str, list[dict[str, Any]]] = {"wikitext2": [{"page": page} for page in PAGES], "pg19": books}
    for name, records in sets.items():
        (tmp_path / name).mkdir()
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (tmp_path / name / "test.jsonl").write_text("".join(lines), encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes are tokens, and so are runs of spaces and a few words: enough for cuts to go wrong."""
    merges = [("a", "n"), ("Ġ", "f"), ("Ġf", "e"), ("Ċ", "Ċ"), ("ĊĊ", "Ċ")]
    merges += [("Ġ" * length, "Ġ" * length) for length in (1, 2, 4, 8)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate([*alphabet, *("".join(merge) for merge in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def documents(load: Any, **options: Any) -> list[dict[str, Any]]:
    return list(load(**{"loaded": {}, **options})["test"])


def one_line_error(load: Any, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        documents(load, **options)
    message = str(caught.value)
    assert "\n" not in message, message
    return message


def count_tokens(text: str, tokenizer: PreTrainedTokenizerFast) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


# ---------------------------------------------------------------------------------------------------- documents


def assert_as_stock(loaded: list[dict[str, Any]], pages: list[dict[str, str]]) -> None:
    assert len(loaded) == len(pages)
    for document, page in zip(loaded, pages, strict=True):
        weights = stock.process_results(page, (0.0,))
        assert document["text"] == stock.wikitext_detokenizer(page)
        assert (0.0, document["num_words"]) == weights["word_perplexity"]
        assert (0.0, document["num_bytes"]) == weights["byte_perplexity"] == weights["bits_per_byte"]


def test_pages_and_their_counts_are_those_of_stock_wikitext(folder: Path) -> None:
    assert_as_stock(
        documents(corpora.load_wikitext, **WIKITEXT, data_dir=str(folder)), [{"page": page} for page in PAGES]
    )


def test_real_pages_and_their_counts_are_those_of_stock_wikitext() -> None:
    file = DATA / "wikitext2" / "test.jsonl"
    if not file.exists():
        pytest.skip(f"no {file}")
    with file.open(encoding="utf-8") as lines:
        pages = [json.loads(line) for line in lines]
    loaded = documents(corpora.load_wikitext, **WIKITEXT, data_dir=str(DATA))
    assert len(loaded) == 62
    assert_as_stock(loaded, pages)


def test_titles_and_source_are_recorded(folder: Path) -> None:
    loaded: dict[str, Any] = {}
    documents(corpora.load_wikitext, **WIKITEXT, data_dir=str(folder), loaded=loaded)
    assert loaded == {"source": str(folder / "wikitext2/test.jsonl"), "titles": ["First page", "Second"]}


def test_book_is_whole_and_counted_as_it_is_scored(folder: Path) -> None:
    loaded = documents(corpora.load_pg19, **PG19, data_dir=str(folder))
    assert [document["text"] for document in loaded] == [text for _, _, text in BOOKS]
    for document in loaded:
        assert document["num_words"] == len(re.split(r"\s+", document["text"]))
        assert document["num_bytes"] == len(document["text"].encode())


def test_hub_records_are_read_as_local_ones(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def hub(*arguments: Any, split: str) -> datasets.Dataset:
        asked.append((*arguments, split))
        return datasets.Dataset.from_list([{"page": page} for page in PAGES])

    monkeypatch.setattr(datasets, "load_dataset", hub)
    loaded: dict[str, Any] = {}
    from_hub = documents(corpora.load_wikitext, **WIKITEXT, loaded=loaded)
    assert from_hub == documents(corpora.load_wikitext, **WIKITEXT, data_dir=str(folder))
    assert asked == [("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test")]
    assert loaded["source"] == "EleutherAI/wikitext_document_level"


def test_environment_names_the_folder_and_metadata_comes_first(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVPRESS_DATA_DIR", str(folder))
    assert len(documents(corpora.load_pg19, **PG19)) == len(BOOKS)
    assert str(tmp_path / "elsewhere") in one_line_error(
        corpora.load_pg19, **PG19, data_dir=str(tmp_path / "elsewhere")
    )


# ------------------------------------------------------------------------------------------------ books and cuts


@pytest.mark.parametrize(
    ("books", "chosen"),
    [
        ([0, 2], [0, 2]),
        ([2, 0], [2, 0]),
        (1, [1]),
        ("the ferry by a. rudd", [0]),
        ("Lights", [2]),
        ([4711], [1]),
        (["4711", "99"], [1, 2]),
    ],
)
def test_books_are_chosen_by_title_number_or_index(folder: Path, books: Any, chosen: list[int]) -> None:
    loaded = documents(corpora.load_pg19, **PG19, data_dir=str(folder), books=books)
    assert [document["title"] for document in loaded] == [BOOKS[index][0] for index in chosen]


@pytest.mark.parametrize(
    ("books", "said"),
    [
        ([], "chooses no book"),
        (["Chain"], "'The Chain by M. Crane', 'A Chain of Lights by R. Haverill'"),
        (["The Fery by A Rud"], "did you mean 'The Ferry by A. Rudd'"),
        ([3], "index from 0 to 2"),
        ([-1], "index from 0 to 2"),
        ([True], "no book True"),
        ([""], "no book ''"),
        ([0, "Ferry"], "'The Ferry by A. Rudd' more than once"),
    ],
)
def test_bad_choice_of_books_is_one_line(folder: Path, books: Any, said: str) -> None:
    assert said in one_line_error(corpora.load_pg19, **PG19, data_dir=str(folder), books=books)


@pytest.mark.parametrize("max_tokens", range(1, 60))
def test_cut_is_as_many_whole_tokens_as_fit(max_tokens: int, tokenizer: PreTrainedTokenizerFast) -> None:
    for _, _, text in BOOKS:
        head = corpora.cut(text, max_tokens, tokenizer)
        assert text.startswith(head)
        assert count_tokens(head, tokenizer) <= max_tokens
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        ends = [end for _, end in offsets[:max_tokens] if count_tokens(text[:end], tokenizer) <= max_tokens]
        assert len(head) == max(ends)


def test_head_of_a_book_is_cut_as_the_whole_book_is(tokenizer: PreTrainedTokenizerFast) -> None:
    """Sixteen spaces are a token: twice the characters per token that the first look at a book allows for."""
    text = " " * 16 * 400 + "a ferry"
    assert corpora.cut(text, 30, tokenizer) == text[: 30 * 16]


def test_counts_are_those_of_the_cut_text(folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = {"data_dir": str(folder), "max_tokens": 20}
    loaded: dict[str, Any] = {}
    by_name = documents(
        corpora.load_pg19, **PG19, **options, tokenizer=str(tmp_path / "tokenizer"), pretrained="x", loaded=loaded
    )
    for document, (_, _, text) in zip(by_name, BOOKS, strict=True):
        assert document["text"] == corpora.cut(text, 20, tokenizer)
        assert document["num_words"] == len(re.split(r"\s+", document["text"]))
        assert document["num_bytes"] == len(document["text"].encode())
    assert loaded["tokenizer"] == str(tmp_path / "tokenizer")
    of_model = documents(corpora.load_pg19, **PG19, **options, pretrained=str(tmp_path / "tokenizer"), press="snapkv")
    assert of_model == by_name


def test_real_books_are_cut_to_the_tokens_of_pythia() -> None:
    if not (DATA / "pythia_tokenizer").is_dir():
        pytest.skip(f"no {DATA / 'pythia_tokenizer'}")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(DATA / "pythia_tokenizer")
    options = {"data_dir": str(DATA), "max_tokens": 777, "pretrained": str(DATA / "pythia_tokenizer")}
    loaded = documents(corpora.load_pg19, **PG19, **options)
    assert len(loaded) == 17
    counts = [count_tokens(document["text"], tokenizer) for document in loaded]
    assert max(counts) == 777 and min(counts) >= 770, counts


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("load", [corpora.load_wikitext, corpora.load_pg19])
def test_missing_source_names_both_ways(load: Any, tmp_path: Path) -> None:
    task = WIKITEXT if load is corpora.load_wikitext else PG19
    for options in ({}, {"data_dir": str(tmp_path)}):
        message = one_line_error(load, **task, **options)
        for part in (task["hub_dataset"], task["local_file"], "data_dir", "KVPRESS_DATA_DIR"):
            assert part in message, message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no document"),
        (b'{"page": "x"}\n\n{"page":\n', "test.jsonl, line 3, is not a whole JSON object"),
        (b'{"page": "\xff"}\n', "not UTF-8"),
        (b'{"page": "x"}\n\n{"text": "y"}\n', "record 2 has no text in field 'page'"),
        (b'{"page": null}\n', "record 1 has no text in field 'page'"),
        (b"[1]\n", "record 1 has no text in field 'page'"),
    ],
)
def test_bad_file_is_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2/test.jsonl").write_bytes(content)
    assert said in one_line_error(corpora.load_wikitext, **WIKITEXT, data_dir=str(tmp_path))


@pytest.mark.parametrize("name", [2024, 0])
def test_a_folder_whose_name_is_a_number_is_read_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: int
) -> None:
    """lm-eval reads `data_dir=0` as a number; the hub's copy, or another folder's, would be other documents."""
    monkeypatch.chdir(tmp_path)
    assert f"cannot read {name}/wikitext2/test.jsonl" in one_line_error(
        corpora.load_wikitext, **WIKITEXT, data_dir=name
    )
    (tmp_path / str(name) / "wikitext2").mkdir(parents=True)
    (tmp_path / str(name) / "wikitext2/test.jsonl").write_text('{"page": "a river"}\n')
    assert len(documents(corpora.load_wikitext, **WIKITEXT, data_dir=name)) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_tokens": 0}, "at least 1"),
        ({"max_tokens": True}, "whole number"),
        ({"max_tokens": "many"}, "whole number"),
        ({"max_tokens": 9}, "pretrained=..."),
        ({"max_tokens": 9, "pretrained": "./no/such/folder"}, "cannot load the tokenizer of ./no/such/folder"),
        ({"max_token": 9}, "did you mean 'max_tokens'"),
        ({"book": 0}, "did you mean 'books'"),
    ],
)
def test_bad_metadata_is_one_line(folder: Path, options: dict[str, Any], said: str) -> None:
    assert said in one_line_error(corpora.load_pg19, **PG19, data_dir=str(folder), **options)


def test_arguments_of_models_and_presses_pass() -> None:
    """They arrive as metadata too; none may look like a misspelt option of ours."""
    import inspect

    from lm_eval.models.huggingface import HFLM

    from lm_eval_kvpress.harness.arguments import LOADING_ARGUMENTS
    from lm_eval_kvpress.harness.settings import Settings
    from lm_eval_kvpress.presses.listing import list_presses

    names = {*inspect.signature(HFLM.__init__).parameters, *LOADING_ARGUMENTS, *Settings.__dataclass_fields__}
    names |= {name for press in list_presses() for name in press.arguments}
    corpora._refuse_misspelt(dict.fromkeys(names))
