"""lm-eval's ids of documents, also under its ``--samples``.

There an `Instance` holds the document's place among the chosen ones, and lm-eval looks up its id when it logs samples
(``doc_id_true`` in `lm_eval/evaluator.py`). No model is told which documents were chosen, so the method that makes the
requests of a task is wrapped. It writes the id on each of them, and our records, losses and messages name that one.
"""

from __future__ import annotations

import functools
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task

from lm_eval_kvpress.harness.chosen_documents import in_order

ATTRIBUTE = "kvpress_doc_id"


def document_id(request: Instance) -> int | None:
    """The document's place in its data set, as in lm-eval's samples."""
    doc_id: int | None = getattr(request, ATTRIBUTE, request.doc_id)
    return doc_id


def note_document_ids() -> None:
    """Have the requests of every task carry their document's id. May be called any number of times."""
    build = Task.build_all_requests
    if hasattr(build, "notes_document_ids"):
        return

    @functools.wraps(build)
    def build_and_note(self: Task, *, samples: list[int] | None = None, **arguments: Any) -> None:
        build(self, samples=samples, **arguments)
        ids = in_order(samples or ())
        for request in self.instances if samples else ():
            if request.doc_id < len(ids):  # a cache of requests holds those of all documents
                setattr(request, ATTRIBUTE, ids[request.doc_id])

    build_and_note.notes_document_ids = True  # type: ignore[attr-defined]
    Task.build_all_requests = build_and_note  # type: ignore[method-assign]
