"""Perplexities, one forward, and speed: each takes a loaded model and returns frozen rows of measured figures.

Knows nothing of how they are reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from transformers import DynamicCache

from lm_eval_kvpress.harness import plugin
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.presses.parse import parse_press
from scripts.benchmarks.generation import Bench, Case
from scripts.benchmarks.presses import measured, summary
from scripts.studies.findings.pressed import under
from scripts.studies.findings.rows import OneForward, Perplexity, Speed
from scripts.studies.findings.wrong_split import contiguous_split

PRESSES = ("none", "snapkv", "streaming_llm", "pyramidkv")
RATIOS = (0.01, 0.25, 0.5, 0.75, 0.9, 0.99)
DATASETS = {"wikitext_kvpress": "WikiText-2", "pg19_kvpress": "PG19"}

Documents = Mapping[str, Sequence[str]]


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


@torch.inference_mode()
def one_forward(lm: KVPress, tokens: Sequence[int], press: str, removed: float) -> OneForward:
    """Do what the origin's protocol did: a forward inside ``with press(model)``, its logits against one without."""
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


def speeds(lm: KVPress, presses: Sequence[str], removed: float, repeats: int) -> list[Speed]:
    """Time prefill and decoding apart, at batch 1 and 4: 1,800 tokens of prompt, or what the model has, and 30 new."""
    num_new = 30
    num_prompt = min(1800, lm.max_length - num_new)
    bench = Bench(lm, presses, removed)
    cases = [Case(press, batch_size, num_prompt, num_new) for press in presses for batch_size in (1, 4)]
    runs = measured(bench, lm, cases, repeats)
    return [Speed(case.press, case.batch_size, num_prompt, num_new, summary(runs[case])) for case in cases]
