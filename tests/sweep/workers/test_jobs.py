"""Jobs travel between processes, and what is answered is not done again."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import pytest

from lm_eval_kvpress.engine.contexts import Context
from lm_eval_kvpress.engine.generation_batches import GenerationBatches
from lm_eval_kvpress.engine.likelihood_batches import LikelihoodBatches
from lm_eval_kvpress.engine.outcomes import Document, GenerationSettings, Prompt
from lm_eval_kvpress.engine.rolling_batches import RollingBatches
from lm_eval_kvpress.engine.stream_batches import StreamBatches
from lm_eval_kvpress.engine.windows import Window
from lm_eval_kvpress.records.meter import RequestId
from lm_eval_kvpress.sweep.cells import Cell
from lm_eval_kvpress.sweep.workers.jobs import Answered, Job

IDS = [RequestId("task", index, 0) for index in range(4)]
TEXTS = [(1, 2), (3, 4, 5), (1, 2), (6,)]
CONTEXTS = [Context(text, 1) for text in TEXTS]


class Echo:
    """A runner that answers with what it is given."""

    def score_groups(self, groups: Sequence[Any], ids: Any) -> list[Any]:
        return [(group, [ids[member] for member in group.members]) for group in groups]

    def score_windows(self, windows: Sequence[Any], ids: Sequence[Any]) -> list[Any]:
        return list(zip(windows, ids, strict=True))

    def generate(self, prompts: Sequence[Any], settings: Any) -> list[Any]:
        return list(prompts)

    def stream(self, documents: Sequence[Any], plan: Any, **_: Any) -> list[Any]:
        return list(documents)


def stopped(tokens: Any) -> list[bool]:
    return []


KINDS = {
    "likelihood": LikelihoodBatches([(context, (7,)) for context in CONTEXTS], IDS),
    "rolling": RollingBatches([[Window(text, (7,), index > 1)] for index, text in enumerate(TEXTS)], IDS),
    "generation": GenerationBatches(
        {index: Prompt(context, 0, IDS[index]) for index, context in enumerate(CONTEXTS)},
        GenerationSettings({}, 2, frozenset(), stopped),
        str,
    ),
    "stream": StreamBatches([Document(text, id) for text, id in zip(TEXTS, IDS, strict=True)], None, prefix_token=0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_runs_the_same_items_in_another_process(kind: str) -> None:
    """Also in an order that is not the best one, as after memory ran out."""
    whole: Any = KINDS[kind]
    part = pickle.loads(pickle.dumps(whole.part([2, 0])))
    assert part.progress_total if kind == "stream" else part.progress_total == 2
    for places in ([0, 1], [1]):
        found = part.run(Echo(), places, lambda num: None)
        assert found == whole.run(Echo(), [[2, 0][place] for place in places], lambda num: None)
    assert part.contexts([0]) == whole.contexts([2]) and part.identity(1)[:2] == whole.identity(0)[:2]


def test_what_a_lost_worker_answered_is_not_asked_again() -> None:
    one, other = Cell("one", {"press": "none"}), Cell("other", {"press": "knorm"})
    requests: Any = None
    job = Job(requests, [5, 6, 7], ((one, frozenset({0, 1, 2})), (other, frozenset({1}))))
    left = job.without(Answered(one, (0, 2), (), ())).without(Answered(other, (1,), (), ()))
    assert left.todo == ((one, frozenset({1})),)
    assert job.without(Answered(one, (0, 1, 2), (), ())).without(Answered(other, (1,), (), ())).todo == ()
