"""RULER through kvpress's own pipeline and through this package: kept entries, greedy answers, right answers.

    python -m scripts.studies.kvpress_agreement rows.jsonl --model FOLDER --documents 20 --length 384
    python -m scripts.studies.kvpress_agreement rows.jsonl

The documents are lm-eval's ``niah_single_1``. kvpress gets context, question and answer prefix and makes a prompt of
them with its own chat template and tokens (``KVPressTextGenerationPipeline``). This package gets lm-eval's prompt.
Under ``query_aware=true`` kvpress's evaluation moves the question into the context; what its pipeline feeds afterwards
is the end of the template and the answer prefix, which is ``query_tokens`` here.

Each document is written when it is finished, and those that are there are not run again. Without ``--model`` the table
of all is printed. Needs ``pip install "lm-eval-kvpress[longcontext]"``, no network.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import kvpress
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from lm_eval_kvpress.cache.compressed import CachedLayer
from lm_eval_kvpress.engine.compression import CompressedBatch, Compressor
from lm_eval_kvpress.engine.contexts import Context
from lm_eval_kvpress.harness.arguments import parse_arguments
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.harness.requests import generation_batches
from lm_eval_kvpress.harness.task_seeds import seed_as_lm_eval
from lm_eval_kvpress.models.lend import lend
from lm_eval_kvpress.tables import markdown_table

TASK = "niah_single_1"
RATIO = 0.5
NUM_NEW = 16
PRESSES: dict[str, type[kvpress.ScorerPress]] = {
    "snapkv": kvpress.SnapKVPress,
    "streaming_llm": kvpress.StreamingLLMPress,
    "knorm": kvpress.KnormPress,
    "keydiff": kvpress.KeyDiffPress,
    "tova": kvpress.TOVAPress,
}
QUESTION = re.compile(r"What (?:is|are all) the special magic")  # kvpress's, for its RULER data set


@dataclass
class Agreement:
    """What both sides made of one document under one press.

    Attributes:
        has_other_tokens: whether the prompt or its split has other tokens.
        num_other_layers: layers that keep other entries.
        largest_difference: of a kept key or value.
        has_other_answer: whether the greedy answers differ.
        is_right, is_right_here: whether the answer holds the needle: of kvpress, of this package.
        needle_kept: the share of the entries of the needle's number that kvpress keeps, over layers and heads.
    """

    has_other_tokens: bool
    num_other_layers: int
    largest_difference: float
    has_other_answer: bool
    is_right: bool
    is_right_here: bool
    needle_kept: float


def documents(folder: str, count: int, length: int) -> tuple[Any, list[dict[str, Any]]]:
    """lm-eval's task and its first documents."""
    seed_as_lm_eval()
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
        self._needles: dict[str, list[torch.Tensor]] = {}

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
        (context,), compressor = batches.contexts([0]), self.lm.session.runner.compressor
        kept = list[CompressedBatch]()

        def compress(contexts: Sequence[Context]) -> CompressedBatch:
            kept.append(Compressor.compress(compressor, contexts))
            return kept[-1]

        with lend(compressor, compress=compress):
            (answer,) = self.lm.generate_until([request], disable_tqdm=True)
        return context, kept[0].cache, answer

    def needle_kept(self, document: Mapping[str, Any], parts: Mapping[str, Any], cache: DynamicCache) -> float:
        """The share of the entries of the needle's number that a compressed cache holds, by their values."""
        values = self._needle_values(document, parts["context_ids"])
        shares = [
            (one[:, :, None] - layer.values[0, :, None]).abs().amax(-1).amin(-1).lt(1e-4).float().mean()
            for one, layer in zip(values, cache.layers, strict=True)
        ]
        return float(torch.stack(shares).mean())

    def _needle_values(self, document: Mapping[str, Any], tokens: torch.Tensor) -> list[torch.Tensor]:
        """Of each layer, the values of the needle's number before compression, ``(H, N, D)``."""
        (number,) = document["outputs"]
        if number not in self._needles:  # what stands behind the needle changes nothing
            ends = [len(self.tokenizer.decode(tokens[0, : place + 1])) for place in range(tokens.shape[1])]
            start = self.tokenizer.decode(tokens[0]).index(number)
            places = [place for place, end in enumerate(ends) if start < end <= start + len(number)]
            cache = DynamicCache()
            with torch.inference_mode():
                self.pipeline.model.model(tokens[:, : places[-1] + 1], past_key_values=cache)
            self._needles[number] = [layer.values[0, :, places] for layer in cache.layers]
        return self._needles[number]


def compare(sides: Sides, document: dict[str, Any], request: Instance, press: str, aware: bool) -> Agreement:
    """One document under one press."""
    parts, their_cache, their_answer = sides.theirs(document, press, aware)
    (fed,) = parts["questions_ids"]
    context, cache, answer = sides.ours(request, press, aware, fed.shape[1])
    differences = [_difference(one, other) for one, other in zip(cache.layers, their_cache.layers, strict=True)]
    same = [*context.compressed] == parts["context_ids"][0].tolist() and [*context.held_back] == fed[0].tolist()
    return Agreement(
        has_other_tokens=not same,
        num_other_layers=differences.count(None),
        largest_difference=max((one for one in differences if one is not None), default=0.0),
        has_other_answer=answer != their_answer,
        is_right=all(value in their_answer for value in document["outputs"]),
        is_right_here=all(value in answer for value in document["outputs"]),
        needle_kept=sides.needle_kept(document, parts, their_cache),
    )


def _difference(one: CachedLayer, other: Any) -> float | None:
    """The largest difference of keys and values; None if other entries were kept."""
    if one.keys.shape != other.keys.shape:
        return None
    largest = max(float((one.keys - other.keys).abs().max()), float((one.values - other.values).abs().max()))
    return largest if largest < 1e-2 else None


def run(args: argparse.Namespace) -> None:
    """Write what is not there yet."""
    keys = [
        {"model": args.model.name, "length": args.length, "press": press, "query_aware": aware, "document": index}
        for press in args.presses.split(",")
        for aware in (False, True)
        for index in range(args.documents)
    ]
    done = rows_of(args.rows)
    missing = [key for key in keys if not any(key.items() <= row.items() for row in done)]
    if not missing:
        return
    sides = Sides(str(args.model))
    task, docs = documents(str(args.model), args.documents, args.length)
    for document in docs:
        document["gen_prefix"] = document["gen_prefix"].strip()
    requests = prompts(task, sides.lm, args.documents)
    for request in requests:
        request.args[1]["max_gen_toks"] = NUM_NEW
    for key in missing:
        document, request = docs[key["document"]], requests[key["document"]]
        row = key | asdict(compare(sides, document, request, key["press"], key["query_aware"]))
        with args.rows.open("a") as stream:
            stream.write(json.dumps(row) + "\n")


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The finished documents; none if there is no such file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """As Markdown, a row per model, length, press and value of ``query_aware``."""
    groups: dict[tuple[Any, ...], list[Agreement]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("model", "length", "press", "query_aware"))
        groups.setdefault(key, []).append(Agreement(**{name: row[name] for name in get_type_hints(Agreement)}))
    counts = ["other tokens", "other layers", "largest difference", "other answers"]
    head = ["model", "tokens", "press", "query_aware", "documents", *counts, "right: kvpress", "here", "needle kept"]
    return markdown_table(head, [[*map(str, key), *_cells(found)] for key, found in groups.items()])


def _cells(found: Sequence[Agreement]) -> list[str]:
    return [
        str(len(found)),
        str(sum(one.has_other_tokens for one in found)),
        str(sum(one.num_other_layers for one in found)),
        f"{max(one.largest_difference for one in found):.0e}",
        str(sum(one.has_other_answer for one in found)),
        str(sum(one.is_right for one in found)),
        str(sum(one.is_right_here for one in found)),
        f"{statistics.mean(one.needle_kept for one in found):.0%}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="JSONL file of finished documents")
    parser.add_argument("--model", type=Path, help="folder of a checkpoint that kvpress supports")
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--length", type=int, default=384, help="max_seq_lengths of RULER")
    parser.add_argument("--presses", default=",".join(PRESSES))
    args = parser.parse_args(argv)
    if args.model is not None:
        run(args)
    print(table(rows_of(args.rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
