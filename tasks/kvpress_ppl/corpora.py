"""WikiText-2 pages and PG-19 books as documents with a title, a text and its counts of words and bytes.

The text comes from the Hugging Face hub or from local files that the user names, and nothing else takes its place.
lm-eval calls the two `load_*` functions with the task's metadata, into which it merges `--model_args` and
`--metadata`: hence `pretrained` and `tokenizer` are known here, and unknown keys are the model's business.

One module for both tasks, because helpers beside a YAML file are loaded by path and cannot import each other.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import Task
from lm_eval.tasks.wikitext import preprocess_wikitext as stock
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.files import refuse_special
from lm_eval_kvpress.harness.checkpoint import BUILTIN, resolve_pretrained

Record = dict[str, Any]

OPTIONS = ("data_dir", "books", "max_tokens")
MODEL_ARGUMENTS = ("pretrained", "press", "rolling", "stream_budget")  # any of them: the model's arguments are known
CHARACTERS_PER_TOKEN = 8  # more than prose has, so that one look at the head of a book is mostly enough


def load_wikitext(
    *,
    hub_dataset: str,
    hub_config: str,
    local_file: str,
    loaded: dict[str, Any],
    data_dir: str | None = None,
    needs_rolling: str | None = None,
    one_document: bool = False,
    **metadata: Any,
) -> dict[str, datasets.Dataset]:
    """The pages of the test split, detokenised, with the counts that lm-eval's own `wikitext` divides by.

    `loaded` is the task's metadata entry of that name. lm-eval passes it by reference and writes it into the results,
    where the titles and the source of what was scored would otherwise be missing.

    Raises:
        UsageError: if the model is known to run another protocol than `needs_rolling`.
    """
    _refuse_misspelt(metadata)
    _refuse_other_rolling(needs_rolling, metadata)
    records, source = read_records(hub_dataset, hub_config, local_file, ("page",), data_dir)
    documents = [wikitext_document(record) for record in records]
    return _documents([joined(documents)] if one_document else documents, source, loaded)


def load_pg19(
    *,
    hub_dataset: str,
    local_file: str,
    loaded: dict[str, Any],
    data_dir: str | None = None,
    books: Any = None,
    max_tokens: Any = None,
    needs_rolling: str | None = None,
    **metadata: Any,
) -> dict[str, datasets.Dataset]:
    """The books of the test split: those chosen, each cut to its first `max_tokens` tokens of the model's tokenizer.

    Raises:
        UsageError: for a book that is not there, or a limit without a tokenizer to count with. For `loaded` and
            `needs_rolling` see above.
    """
    _refuse_misspelt(metadata)
    _refuse_other_rolling(needs_rolling, metadata)
    if max_tokens is not None and (isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1):
        raise UsageError(f"max_tokens={max_tokens!r} must be a whole number of at least 1")
    fields = ("short_book_title", "url", "text")
    records, source = read_records(hub_dataset, None, local_file, fields, data_dir)
    if books is not None:
        records = select_books(records, books if isinstance(books, list) else [books])
    if max_tokens is not None:
        loaded["tokenizer"], tokenizer = _tokenizer(metadata)
        records = [{**record, "text": cut(record["text"], max_tokens, tokenizer)} for record in records]
    return _documents(map(book_document, records), source, loaded)


# ----------------------------------------------------------------------------------------------------- documents


def wikitext_document(record: Record) -> Record:
    """The detokenised page is scored, the words and bytes of the raw one are counted, as lm-eval does."""
    text = stock.wikitext_detokenizer(record)
    weights = stock.process_results(record, (0.0,))
    return {
        "title": text.strip().partition("\n")[0].strip("= "),
        "text": text,
        "num_words": weights["word_perplexity"][1],
        "num_bytes": weights["byte_perplexity"][1],
    }


def joined(pages: Sequence[Record]) -> Record:
    """The test set as one text: its pages were cut out of one file, so nothing stands between them.

    Words and bytes are the sums over the pages, so that figures divide by what `wikitext_kvpress` divides by.
    """
    return {
        "title": f"{len(pages)} pages, from {pages[0]['title']} to {pages[-1]['title']}",
        "text": "".join(page["text"] for page in pages),
        "num_words": sum(page["num_words"] for page in pages),
        "num_bytes": sum(page["num_bytes"] for page in pages),
    }


def book_document(record: Record) -> Record:
    """Words (parts between white space) and bytes of the text as it is scored, that is after a cut."""
    text = record["text"]
    return {
        "title": record["short_book_title"],
        "url": record["url"],
        "text": text,
        "num_words": Task.count_words(text),
        "num_bytes": Task.count_bytes(text),
    }


def _documents(documents: Iterable[Record], source: str, loaded: dict[str, Any]) -> dict[str, datasets.Dataset]:
    rows = list(documents)
    loaded.update(source=source, titles=[row["title"] for row in rows])
    return {"test": datasets.Dataset.from_list(rows)}


def select_books(records: Sequence[Record], books: Sequence[Any]) -> list[Record]:
    """The books named, in the order named: each by title, part of a title, Gutenberg number, or index from 0.

    A whole number is an index as long as there are so many books, and a Gutenberg number above.
    """
    if not books:
        raise UsageError("books=[] chooses no book: leave it out for all of them")
    chosen = [_find_book(records, book) for book in books]
    twice = {index for index in chosen if chosen.count(index) > 1}
    if twice:
        raise UsageError(f"books names '{records[min(twice)]['short_book_title']}' more than once")
    return [records[index] for index in chosen]


def _find_book(records: Sequence[Record], book: Any) -> int:
    if isinstance(book, int) and not isinstance(book, bool) and 0 <= book < len(records):
        return book
    wanted = str(book).casefold()
    titles = [record["short_book_title"].casefold() for record in records]
    numbers = [record["url"].rstrip("/").rpartition("/")[2] for record in records]
    for keys in (numbers, titles):
        if wanted in keys:
            return keys.index(wanted)
    parts = [index for index, title in enumerate(titles) if wanted and wanted in title]
    if len(parts) == 1:
        return parts[0]
    if parts:
        names = "', '".join(records[index]["short_book_title"] for index in parts[:3])
        raise UsageError(f"books: {book!r} fits {len(parts)} books, such as '{names}': write more of the title")
    near = difflib.get_close_matches(wanted, titles, n=1)
    hint = f"did you mean '{records[titles.index(near[0])]['short_book_title']}'? " if near else ""
    raise UsageError(
        f"books: no book {book!r}: {hint}give a title or part of it, a Gutenberg number, or an index from 0 to "
        f"{len(records) - 1}"
    )


def cut(text: str, max_tokens: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The first `max_tokens` tokens of `text`, or fewer where they would be more when tokenised by themselves.

    Counted again after the cut, because tokens are not stable under cutting: what follows decides how white space is
    split, and a cut cannot pass through a character of several tokens.
    """
    head = text[: CHARACTERS_PER_TOKEN * max_tokens]
    while len(head) < len(text) and len(_token_ends(head, tokenizer)) <= max_tokens:
        head = text[: 2 * len(head)]
    ends = _token_ends(head, tokenizer)
    if len(ends) <= max_tokens:
        return text
    for end in reversed(ends[:max_tokens]):
        if len(_token_ends(text[:end], tokenizer)) <= max_tokens:
            return text[:end]
    raise UsageError(f"max_tokens={max_tokens} is less than the first character of '{text[:20]}...' takes")


def _token_ends(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Where each token of the text ends, in characters."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [end for _, end in encoded["offset_mapping"]]


def _tokenizer(metadata: Mapping[str, Any]) -> tuple[str, PreTrainedTokenizerBase]:
    """The tokenizer that the model arguments name, as `HFLM` chooses it: `tokenizer`, else that of `pretrained`."""
    name = metadata.get("tokenizer") or metadata.get("pretrained")
    if not isinstance(name, str):
        raise UsageError(
            "max_tokens counts tokens of the model's tokenizer, which is not known here: pass pretrained=... in "
            '--model_args, or --metadata \'{"tokenizer": "EleutherAI/pythia-2.8b"}\''
        )
    folder = name
    if name == BUILTIN:
        folder = resolve_pretrained(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder,
            revision=metadata.get("revision") or "main",
            trust_remote_code=bool(metadata.get("trust_remote_code")),
        )
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot load the tokenizer of {name} for max_tokens: {_first_line(error)}") from error
    if not tokenizer.is_fast:
        raise UsageError(f"max_tokens needs a fast tokenizer, which says where tokens end; that of {name} is not")
    return name, tokenizer


# -------------------------------------------------------------------------------------------------------- sources


def read_records(
    hub_dataset: str, hub_config: str | None, local_file: str, fields: Sequence[str], data_dir: str | None
) -> tuple[list[Record], str]:
    """The records of the test split and where they came from. With a data folder, no network is tried.

    Raises:
        UsageError: if the source cannot be read, naming both; or if a record lacks one of `fields`.
    """
    if data_dir in (None, ""):
        data_dir = os.environ.get("KVPRESS_DATA_DIR") or None
    if data_dir is not None:
        path = Path(str(data_dir)).expanduser() / local_file  # lm-eval reads a folder named 2024 as a number
        records, source = _from_file(path, hub_dataset), str(path)
    else:
        records, source = _from_hub(hub_dataset, hub_config, local_file), hub_dataset
    if not records:
        raise UsageError(f"{source} holds no document")
    for number, record in enumerate(records, start=1):
        missing = [field for field in fields if not isinstance(record, dict) or not isinstance(record.get(field), str)]
        if missing:
            raise UsageError(f"{source}: record {number} has no text in field '{missing[0]}'")
    return records, source


def _from_file(path: Path, hub_dataset: str) -> list[Record]:
    refuse_special(path)
    try:
        with path.open(encoding="utf-8") as lines:
            return [_record(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    except OSError as error:
        raise UsageError(
            f"cannot read {path} ({error.strerror}): data_dir (or KVPRESS_DATA_DIR) must hold this file; without "
            f"data_dir the task loads {hub_dataset} from the Hugging Face hub"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 with one JSON object per line: {_first_line(error)}") from error


def _record(path: Path, number: int, line: str) -> Record:
    try:
        record: Record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}, line {number}, is not a whole JSON object: fetch that file again") from error
    return record


def _from_hub(hub_dataset: str, hub_config: str | None, local_file: str) -> list[Record]:
    """OSError covers what `datasets` and `huggingface_hub` raise: ConnectionError, not found, not allowed, offline."""
    try:
        return list(datasets.load_dataset(hub_dataset, hub_config, split="test"))
    except OSError as error:
        raise UsageError(
            f"cannot load {hub_dataset} from the Hugging Face hub: {_first_line(error).rstrip('.')}. Connect, or name "
            f'a folder that holds {local_file}: --metadata \'{{"data_dir": "..."}}\' or KVPRESS_DATA_DIR=...'
        ) from error


def _refuse_misspelt(metadata: Mapping[str, Any]) -> None:
    """`max_token` would otherwise be taken for a model argument and be ignored."""
    for key in metadata:
        near = difflib.get_close_matches(key, OPTIONS, n=1, cutoff=0.85)
        if near and key not in OPTIONS:
            raise UsageError(f"unknown metadata '{key}': did you mean '{near[0]}'?")


def _refuse_other_rolling(needed: str | None, metadata: Mapping[str, Any]) -> None:
    """A task of one protocol is not run under another, as far as lm-eval tells which one it will be.

    It hands on `--model_args` and nothing of a model object, whose protocol stands in the record only.
    """
    if needed is None or not any(name in metadata for name in MODEL_ARGUMENTS):
        return
    rolling = metadata.get("rolling")
    if rolling != needed:
        given = "leave it to its default" if rolling is None else f"say rolling={rolling}"
        raise UsageError(
            f"this task is scored with rolling={needed}, and the model arguments {given}: add rolling={needed},"
            "stream_budget=N, or take the task of the same text without '_stream'"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
