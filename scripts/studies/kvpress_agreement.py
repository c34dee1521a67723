"""RULER through kvpress's own pipeline and through this package: kept entries, greedy answers, right answers.

    python -m scripts.studies.kvpress_agreement --model FOLDER --documents 20 --length 512 -o table.md

The documents are lm-eval's ``niah_single_1``. kvpress gets context, question and answer prefix and makes a prompt of
them with its own chat template and tokens (``KVPressTextGenerationPipeline``). This package gets lm-eval's prompt.
Under ``query_aware=true`` kvpress's evaluation moves the question into the context; what its pipeline feeds afterwards
is the end of the template and the answer prefix, which is ``query_tokens`` here.

Needs ``pip install "lm-eval-kvpress[longcontext]"``, no network.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kvpress
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from lm_eval_kvpress.cache.compressed import LayerKV
from lm_eval_kvpress.engine.contexts import Context
from lm_eval_kvpress.harness.arguments import parse_arguments
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.harness.requests import generation_batches

TASK = "niah_single_1"
RATIO = 0.5
NUM_NEW = 16
PRESSES: dict[str, type[kvpress.ScorerPress]] = {
    "snapkv": kvpress.SnapKVPress,
    "streaming_llm": kvpress.StreamingLLMPress,
    "knorm": kvpress.KnormPress,
    "expected_attention": kvpress.ExpectedAttentionPress,
    "keydiff": kvpress.KeyDiffPress,
}
QUESTION = re.compile(r"What (?:is|are all) the special magic")  # kvpress's, for its RULER data set


@dataclass
class Agreement:
    """What both sides made of the documents under one press.

    Attributes:
        num_documents: compared.
        num_token_differences: documents whose prompt or whose split has other tokens.
        num_kept_differences: layers of documents that keep other entries.
        largest_difference: of a kept key or value.
        num_answer_differences: greedy answers that differ.
        num_right: answers that hold the needle: of kvpress, of this package.
    """

    num_documents: int = 0
    num_token_differences: int = 0
    num_kept_differences: int = 0
    largest_difference: float = 0.0
    num_answer_differences: int = 0
    num_right: list[int] = field(default_factory=lambda: [0, 0])

    def row(self) -> list[str]:
        theirs, ours = (f"{count} of {self.num_documents}" for count in self.num_right)
        return [
            str(self.num_token_differences),
            str(self.num_kept_differences),
            f"{self.largest_difference:.1e}",
            str(self.num_answer_differences),
            theirs,
            ours,
        ]


def documents(folder: str, count: int, length: int) -> tuple[Any, list[dict[str, Any]]]:
    """lm-eval's task and its first documents."""
    manager = TaskManager(metadata={"tokenizer": folder, "max_seq_lengths": [length]})
    task = manager.load([TASK])["tasks"][TASK]
    return task, [task.test_docs()[index] for index in range(count)]


def prompts(task: Any, lm: KVPress, count: int) -> list[Instance]:
    """lm-eval's own requests for these documents, in the chat template of the tokenizer if it has one."""
    has_template = lm.tokenizer.chat_template is not None
    task.build_all_requests(
        limit=count,
        apply_chat_template=has_template,
        chat_template=lm.apply_chat_template if has_template else None,
        tokenizer_name=lm.tokenizer_name if has_template else "",
    )
    return [instance for instance in task.instances if instance.request_type == "generate_until"]


class Sides:
    """kvpress's pipeline and this package on copies of one checkpoint."""

    def __init__(self, folder: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.pipeline = kvpress.KVPressTextGenerationPipeline(model, self.tokenizer)
        self.lm = KVPress(folder, dtype="float32", device="cpu")

    def theirs(
        self, document: dict[str, Any], press: str, query_aware: bool
    ) -> tuple[dict[str, Any], DynamicCache, str]:
        """The pipeline's tokens, the compressed cache and the answer."""
        start = list(QUESTION.finditer(document["input"]))[-1].start()
        context, question = document["input"][:start], document["input"][start:]
        if query_aware:
            context, question = context + question, ""
        prefix = document["gen_prefix"]
        parts = self.pipeline.preprocess(context, [question], prefix, max_context_length=10**6)
        cache = DynamicCache()
        with torch.inference_mode():
            (answer,) = self.pipeline._forward(
                parts, max_new_tokens=NUM_NEW, press=PRESSES[press](compression_ratio=RATIO), cache=cache
            )
        return parts, cache, answer

    def ours(self, request: Instance, press: str, query_aware: bool, num_fed: int) -> tuple[Context, Any, str]:
        """The context, the compressed cache and the answer."""
        given = {"query_tokens": num_fed} if query_aware else {}
        settings, _ = parse_arguments({"press": press, "compression_ratio": RATIO, "query_aware": query_aware, **given})
        self.lm.use(self.lm.open_session(settings))
        (batches,) = generation_batches(self.lm, self.lm.session, [request])
        (context,) = batches.contexts([0])
        cache = self.lm.session.runner.compressor.compress([context]).cache
        (answer,) = self.lm.generate_until([request], disable_tqdm=True)
        return context, cache, answer


def compare(
    sides: Sides, docs: Sequence[dict[str, Any]], requests: Sequence[Instance], press: str, aware: bool
) -> Agreement:
    """All documents under one press."""
    found = Agreement(len(docs))
    for document, request in zip(docs, requests, strict=True):
        parts, their_cache, their_answer = sides.theirs(document, press, aware)
        (fed,) = parts["questions_ids"]
        context, cache, answer = sides.ours(request, press, aware, fed.shape[1])
        same = [*context.compressed] == parts["context_ids"][0].tolist() and [*context.held_back] == fed[0].tolist()
        found.num_token_differences += not same
        for one, other in zip(cache.layers, their_cache.layers, strict=True):
            difference = _difference(one, other)
            found.num_kept_differences += difference is None
            found.largest_difference = max(found.largest_difference, difference or 0.0)
        found.num_answer_differences += answer != their_answer
        for side, text in enumerate((their_answer, answer)):
            found.num_right[side] += all(value in text for value in document["outputs"])
    return found


def _difference(one: LayerKV, other: Any) -> float | None:
    """The largest difference of keys and values; None if other entries were kept."""
    if one.keys.shape != other.keys.shape:
        return None
    largest = max(float((one.keys - other.keys).abs().max()), float((one.values - other.values).abs().max()))
    return largest if largest < 1e-2 else None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a checkpoint that kvpress supports")
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--length", type=int, default=512, help="max_seq_lengths of RULER")
    parser.add_argument("--presses", default=",".join(PRESSES))
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args(argv)
    sides = Sides(args.model)
    task, docs = documents(args.model, args.documents, args.length)
    for document in docs:
        document["gen_prefix"] = document["gen_prefix"].strip()
    requests = prompts(task, sides.lm, args.documents)
    for request in requests:
        request.args[1]["max_gen_toks"] = NUM_NEW
    head = ["query_aware", "press", "token differences", "kept differences", "largest difference", "answer differences"]
    lines = ["| " + " | ".join([*head, "right: kvpress", "right: here"]) + " |", "|" + "---|" * 8]
    for aware in (False, True):
        for press in args.presses.split(","):
            row = [str(aware).lower(), press, *compare(sides, docs, requests, press, aware).row()]
            lines.append("| " + " | ".join(row) + " |")
            print(lines[-1], file=sys.stderr)
    text = "\n".join(lines) + "\n"
    if args.output is None:
        print(text)
    else:
        args.output.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
