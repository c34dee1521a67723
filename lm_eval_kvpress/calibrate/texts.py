"""Texts to calibrate on, and the windows of tokens that they are cut into.

A text file, a file of JSON lines, or a task of lm-eval. Does not know models or presses.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.files import refuse_special
from lm_eval_kvpress.harness import plugin
from lm_eval_kvpress.harness.task_seeds import seed_as_lm_eval
from lm_eval_kvpress.presses.suggest import near


def read_texts(data: str) -> list[str]:
    """Read the documents of a file, or the prompts of a task.

    Args:
        data: ``FILE.txt`` is one document, ``FILE.jsonl`` has one on each line under ``text``; any other word is a
            task, of which the training documents are taken if it has any.

    Raises:
        UsageError: in one line, if there is no such file or task, or no text in it.
    """
    file = Path(data).expanduser()
    is_file = file.suffix in (".txt", ".jsonl") or file.exists()
    texts = [text for text in (_of_file(file) if is_file else _of_task(data)) if text.strip()]
    if not texts:
        raise UsageError(f"--data {data} holds no text: name a file with some, or another task")
    return texts


def sha256_of(texts: Iterable[str]) -> str:
    """A hash of documents, to tell later which they were."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


def _of_file(file: Path) -> list[str]:
    refuse_special(file, f"--data {file}")
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UsageError(f"--data {file} cannot be read ({reason}): name a text file, FILE.jsonl, or a task") from error
    if file.suffix != ".jsonl":
        return [content]
    return [_text_of_line(file, number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]


def _text_of_line(file: Path, number: int, line: str) -> str:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("text"), str):
        raise UsageError(f'--data {file}: line {number} is no JSON object with a "text": {line[:40]!r}')
    return str(found["text"])


def _of_task(name: str) -> list[str]:
    tasks = TaskManager(include_path=str(plugin.tasks_path()))
    if name not in tasks.all_tasks:
        raise UsageError(f"--data {name} is neither a file nor a task of lm-eval; {near(name, tasks.all_tasks)}")
    seed_as_lm_eval()
    loaded = tasks.load([name])["tasks"]
    return [text for task in loaded.values() for text in _of_documents(task)]


def _of_documents(task: Task) -> Iterator[str]:
    """The prompt of every document; where it is empty, as in perplexity tasks, the document itself."""
    documents: Any = task.training_docs() if task.has_training_docs() else task.eval_docs
    for document in documents:
        yield str(task.doc_to_text(document) or task.doc_to_target(document))


def windows_of(documents: Sequence[Sequence[int]], *, length: int, num_tokens: int, least: int) -> list[list[int]]:
    """Cut documents into windows, until so many tokens are there.

    Args:
        documents: token ids.
        length: tokens of a window, at most.
        num_tokens: of all windows together, at most.
        least: tokens of a window, at the least; shorter rests are left out.
    """
    found, missing = list[list[int]](), num_tokens
    for document in documents:
        for start in range(0, len(document), length):
            window = list(itertools.islice(document, start, start + min(length, missing)))
            if len(window) >= least:
                found.append(window)
                missing -= len(window)
    return found
