"""The experiments of the findings: each takes a loaded model and returns frozen rows of measured figures.

Knows nothing of how they are reported.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from transformers import DynamicCache

from lm_eval_kvpress import recall
from lm_eval_kvpress.harness import plugin
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.harness.parity import quiet_loader
from lm_eval_kvpress.models import gpt_neox
from lm_eval_kvpress.presses.parse import parse_press
from lm_eval_kvpress.verify.check import compress
from lm_eval_kvpress.verify.kept import evicted_entries, full_cache
from scripts.benchmarks.presses import Bench, Case, prompts, run_cases, summarize

PRESSES = ("none", "snapkv", "streaming_llm", "pyramidkv")
RATIOS = (0.01, 0.25, 0.5, 0.75, 0.9, 0.99)
DATASETS = {"wikitext_kvpress": "WikiText-2", "pg19_kvpress": "PG19"}

Documents = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Perplexity:
    """One data set under one press and protocol.

    Attributes:
        split: of the fused projection: ``right``, or ``contiguous`` (the origin's mistake).
        perplexity: per token; under ``prefix`` of the tokens scored over the cache.
        num_tokens: it is over so many.
        kept_share: entries that could be attended, of those prefilled; None where nothing was compressed.
        notes: what the press reported of itself.
    """

    dataset: str
    press: str
    removed: float
    protocol: str
    split: str
    perplexity: float
    num_tokens: int
    kept_share: float | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class OneForward:
    """One forward over a window under a press: what it left in the cache, and what it did to the logits."""

    press: str
    num_tokens: int
    kept_share: float
    largest_logit: float
    largest_difference: float


@dataclass(frozen=True)
class SplitDifference:
    """Entries that a press keeps with the right split of the fused projection and evicts with the contiguous one."""

    press: str
    num_contexts: int
    num_kept: int
    num_different: int


@dataclass(frozen=True)
class FirstToken:
    """Answers of one token: how far a press moves them, and how many are right.

    Attributes:
        held_back: context tokens fed after compression; with 0 the full cache predicts the answer.
        split: as in `Perplexity`.
        largest_move, mean_move: change of the answers' log-probabilities against no press, nats.
        accuracy: of the most likely among four answers.
    """

    press: str
    held_back: int
    split: str
    largest_move: float
    mean_move: float
    accuracy: float


@dataclass(frozen=True)
class Speed:
    """One press and batch size; each figure a dict of ``median``, ``low`` and ``high`` over the repeats."""

    press: str
    batch_size: int
    num_prompt_tokens: int
    num_new_tokens: int
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class Findings:
    """Everything that was measured.

    Attributes:
        setting: what it was measured on, as lines of text.
        skipped: what could not be measured, and why.
        removed: the fraction removed where not stated otherwise.
        protocols: presses under both protocols.
        forwards: a single forward under each press.
        wrong: presses with the contiguous split, under both protocols.
        differences: entries kept by one split only.
        wrong_answers: questions answered with the contiguous split.
        ratios: perplexities under ``prefix`` at each ratio.
        first_tokens: one-token answers with a token held back and without.
        speeds: prefill and decoding.
    """

    setting: Sequence[str]
    removed: float
    skipped: Sequence[str] = ()
    protocols: Sequence[Perplexity] = ()
    forwards: Sequence[OneForward] = ()
    wrong: Sequence[Perplexity] = ()
    differences: Sequence[SplitDifference] = ()
    wrong_answers: Sequence[FirstToken] = ()
    ratios: Sequence[Perplexity] = ()
    first_tokens: Sequence[FirstToken] = ()
    speeds: Sequence[Speed] = ()


def under(lm: KVPress, press: str, **arguments: Any) -> KVPress:
    """The same loaded model under a press."""
    if press == "none":
        arguments.pop("compression_ratio", None)
    with quiet_loader():
        return KVPress(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=4, press=press, **arguments)


def load_documents(dataset: str, lm: KVPress, data_dir: str | None, limit: int, num_tokens: int) -> list[str]:
    """The first texts of a data set, each cut to so many tokens.

    Raises:
        UsageError: if the data cannot be had, from the folder or, without one, from the Hugging Face hub.
    """
    metadata = {} if data_dir is None else {"data_dir": data_dir}
    manager = TaskManager(include_path=str(plugin.tasks_path()), include_defaults=False, metadata=metadata)
    task = manager.load([dataset])["tasks"][dataset]
    texts = [document["text"] for document in list(task.eval_docs)[:limit]]
    return [lm.tok_decode(lm.tok_encode(text)[:num_tokens]) for text in texts]


# -------------------------------------------------------------------------------------------------- perplexity


def perplexities(
    lm: KVPress, documents: Documents, press: str, removed: float, protocol: str, *, split: str = "right"
) -> list[Perplexity]:
    """One row per data set, from the record of a run of rolling requests."""
    pressed = under(lm, press, compression_ratio=removed, rolling=protocol)
    requests = [
        Instance("loglikelihood_rolling", {}, (text,), 0, (dataset, index, 1))
        for dataset, texts in documents.items()
        for index, text in enumerate(texts)
    ]
    with contiguous_split() if split == "contiguous" else nullcontext():
        pressed.loglikelihood_rolling(requests, disable_tqdm=True)
    tasks = pressed.describe()["tasks"]
    which = "" if protocol == "one_pass" else "_under_press"
    return [
        Perplexity(
            dataset=DATASETS[dataset],
            press=press,
            removed=removed,
            protocol=protocol,
            split=split,
            perplexity=tasks[dataset][f"token_perplexity{which}"],
            num_tokens=tasks[dataset][f"tokens_scored{which}"],
            kept_share=tasks[dataset]["contexts_pressed"]["kept_share"],
            notes=tuple(tasks[dataset]["notes"]),
        )
        for dataset in documents
    ]


@contextmanager
def contiguous_split() -> Iterator[None]:
    """The origin's mistake: the fused rows cut into thirds, though they lie head by head."""

    def rows(self: gpt_neox.ProjectionView, fused: torch.Tensor) -> torch.Tensor:
        return fused.view(3, -1, *fused.shape[1:])[self._part]

    with mock.patch.object(gpt_neox.ProjectionView, "_rows", rows):
        yield


@torch.inference_mode()
def one_forward(lm: KVPress, tokens: Sequence[int], press: str, removed: float) -> OneForward:
    """What the origin's protocol did: a forward inside ``with press(model)``, its logits against one without."""
    model, batch = lm.model, torch.tensor([list(tokens)], device=lm.device)
    plain = model(batch, use_cache=True).logits
    cache = DynamicCache()
    built = parse_press(press, {"compression_ratio": removed}).build(len(tokens))
    assert built is not None, "a forward under no press shows nothing"
    with lm.press_model.presented(), built(model):
        logits = model(batch, past_key_values=cache, use_cache=True).logits
    kept = sum(layer.keys.shape[2] for layer in cache.layers) / len(cache.layers)
    return OneForward(
        press=press,
        num_tokens=len(tokens),
        kept_share=kept / len(tokens),
        largest_logit=plain.abs().max().item(),
        largest_difference=(logits - plain).abs().max().item(),
    )


# ------------------------------------------------------------------------------------------------- wrong split


def split_difference(lm: KVPress, contexts: Sequence[Sequence[int]], press: str, removed: float) -> SplitDifference:
    """Which entries a press keeps with the right split and with the contiguous one, over all layers and heads."""
    num_kept = num_different = 0
    for context in contexts:
        full = full_cache(lm.model, context[:-1])
        evicted = []
        for split in (nullcontext(), contiguous_split()):
            with split:
                cache, _ = compress(under(lm, press, compression_ratio=removed), context)
            layers = zip(cache.layers, full.layers, strict=True)
            evicted.append([evicted_entries(layer, of_layer.keys[0], of_layer.values[0]) for layer, of_layer in layers])
        for right, wrong in zip(*evicted, strict=True):
            num_kept += int((~right).sum())
            num_different += int((~right & wrong).sum())
    return SplitDifference(press, len(contexts), num_kept, num_different)


# ------------------------------------------------------------------------------------------------- first token


@dataclass(frozen=True)
class Question:
    """A fact in the context, asked for at its end; answers of one token, of which one is right."""

    context: tuple[int, ...]
    answers: tuple[int, ...]
    right: int


def questions(lm: KVPress, count: int) -> list[Question]:
    """Facts some 400 tokens back. For a tokenizer that has no single token for an answer, its first token."""
    documents = [recall.recall_document(seed, distance=400, kind="word") for seed in range(count)]
    return [
        Question(
            tuple(lm.tok_encode(document.context + document.question)),
            tuple(lm.tok_encode(choice)[0] for choice in document.choices),
            document.answer,
        )
        for document in documents
    ]


def answer(
    lm: KVPress, asked: Sequence[Question], press: str, removed: float, held_back: int, *, split: str = "right"
) -> list[list[float]]:
    """Log-probabilities of the answers to each question."""
    pressed = under(lm, press, compression_ratio=removed, query_tokens=held_back)
    requests = [(("", ""), list(q.context), [token]) for q in asked for token in q.answers]
    with contiguous_split() if split == "contiguous" else nullcontext():
        scores = iter(pressed._loglikelihood_tokens(requests, disable_tqdm=True))
    return [[next(scores)[0] for _ in question.answers] for question in asked]


def first_token(
    asked: Sequence[Question],
    found: Sequence[Sequence[float]],
    plain: Sequence[Sequence[float]],
    **setting: Any,
) -> FirstToken:
    """How far the answers moved from those without a press, and how many are right."""
    pairs = zip(found, plain, strict=True)
    moves = [abs(a - b) for scores, others in pairs for a, b in zip(scores, others, strict=True)]
    best = [max(range(len(scores)), key=scores.__getitem__) for scores in found]
    right = sum(choice == question.right for choice, question in zip(best, asked, strict=True))
    accuracy = right / len(asked)
    return FirstToken(**setting, largest_move=max(moves), mean_move=math.fsum(moves) / len(moves), accuracy=accuracy)


def first_tokens(lm: KVPress, asked: Sequence[Question], presses: Sequence[str], removed: float) -> list[FirstToken]:
    """Every press with one token of the context held back, and with none."""
    rows = []
    for held_back in (1, 0):
        figures = {press: answer(lm, asked, press, removed, held_back) for press in presses}
        for press, found in figures.items():
            rows.append(first_token(asked, found, figures["none"], press=press, held_back=held_back, split="right"))
    return rows


def wrong_answers(lm: KVPress, asked: Sequence[Question], presses: Sequence[str], removed: float) -> list[FirstToken]:
    """The same questions, one token held back, with the contiguous split."""
    plain = answer(lm, asked, "none", removed, 1)
    return [
        first_token(asked, found, plain, press=press, held_back=1, split="contiguous")
        for press in presses
        for found in [answer(lm, asked, press, removed, 1, split="contiguous")]
    ]


# ------------------------------------------------------------------------------------------------------- speed


def speeds(lm: KVPress, presses: Sequence[str], removed: float, repeats: int) -> list[Speed]:
    """Prefill and decoding apart, at batch 1 and 4, for 1,800 tokens of prompt (or what the model has) and 30 new."""
    num_new = 30
    num_prompt = min(1800, lm.max_length - num_new)
    bench = Bench(lm, presses, removed)
    cases = [Case(press, batch_size, num_prompt, num_new) for press in presses for batch_size in (1, 4)]
    runs = run_cases(bench, cases, {case: prompts(lm, case, is_random=False) for case in cases}, repeats)
    return [Speed(case.press, case.batch_size, num_prompt, num_new, summarize(runs[case])) for case in cases]
