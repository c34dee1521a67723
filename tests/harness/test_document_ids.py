"""Records name documents as lm-eval's samples do, also where ``--samples`` chose them."""

from __future__ import annotations

import json
from pathlib import Path

import lm_eval
import pytest
from lm_eval.tasks import TaskManager
from lm_eval_requests import SENTENCE, ours

TASK = """
task: chosen
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: " geese"
metric_list:
  - {metric: acc}
"""


@pytest.mark.parametrize("chosen", [[2, 4], [4, 2, 4], None])
def test_the_throughput_log_joins_lm_evals_samples(
    checkpoint_dir: Path, tmp_path: Path, chosen: list[int] | None
) -> None:
    data, log = tmp_path / "data.jsonl", tmp_path / "log.jsonl"
    data.write_text("".join(json.dumps({"text": SENTENCE[: 20 + 5 * index]}) + "\n" for index in range(6)))
    (tmp_path / "chosen.yaml").write_text(TASK.replace("DATA", str(data)))
    results = lm_eval.simple_evaluate(
        model=ours(checkpoint_dir, throughput_log=str(log)),
        tasks=["chosen"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        samples=None if chosen is None else {"chosen": chosen},
        bootstrap_iters=0,
    )
    logged = [record["doc_id"] for record in map(json.loads, log.open()) if record["record"] == "request"]
    asked = [sample["doc"]["text"] for sample in results["samples"]["chosen"]]
    places = [(len(text) - 20) // 5 for text in asked]
    assert sorted(logged) == places == sorted(set(chosen or range(6)))
    if chosen != [4, 2, 4]:  # of such a list lm-eval's own samples name other documents, see chosen_documents
        assert [sample["doc_id"] for sample in results["samples"]["chosen"]] == places
