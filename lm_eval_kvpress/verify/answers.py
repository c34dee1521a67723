"""Check what lm-eval gets: parity with stock, batches, the record's figures, and errors where there must be some.

Every check goes through the request types, as tasks do.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness import checkpoint, parity
from lm_eval_kvpress.harness.arguments import parse_arguments
from lm_eval_kvpress.harness.checkpoint import BUILTIN, resolve_pretrained
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.harness.parity import worst
from lm_eval_kvpress.harness.plugin import tasks_path
from lm_eval_kvpress.harness.text_gap import text_gap
from lm_eval_kvpress.verify.check import Check, Part
from lm_eval_kvpress.verify.subject import Subject, score_pairs

GENERATED = {"until": list[str](), "max_gen_toks": 8}
"""How the batches check generates."""

NUM_ASKED = 8
"""New tokens of the text whose length is checked, at most."""

WEIGHTS = "model.safetensors"

# ---------------------------------------------------------------------------------------------------------- parity


def check_parity(subject: Subject) -> Check:
    """Compare ratio 0 with stock `HFLM` on the untouched copy, for the three request types."""
    length = parity.certificate_length(subject.lm)
    shared = parity.shared_arguments(subject.lm, length)
    with parity.quiet_loader():
        stock = parity.answers(parity.StockHFLM(pretrained=subject.untouched, batch_size=2, **shared))
    parts = []
    for press, ratio in (("none", {}), ("snapkv", {"compression_ratio": 0})):
        lm = subject.under(press, rolling="one_pass", batch_size=3, max_length=length, **ratio)
        certificate = parity.compare(stock, lm, press)
        for request_type in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            difference = getattr(certificate, request_type)
            parts.append(Part(f"{press}: {request_type}, nats per token", difference, certificate.tolerance))
        if certificate.dtype == "float32":
            parts.append(Part(f"{press}: is_greedy differs", certificate.greedy_disagreements, 0))
    return Check("parity", "ratio 0 gives stock HFLM's answers, for all three request types", tuple(parts))


# --------------------------------------------------------------------------------------------------------- batches


def check_batches(subject: Subject) -> Check:
    """Compare batches of 3 and 8, the requests in another order, with batches of 1.

    Contexts have many lengths, and some are too short for the press. Their tokens differ as far as the vocabulary goes:
    the keys of a repeated one have one norm in the first layer, and rounding says which of them knorm keeps. In 16 bits
    the mean difference counts, not the largest one: another batch rounds differently, and where two entries score alike
    in so few bits, the press then keeps the other one.
    """
    exact = subject.lm.model.dtype == torch.float32
    parts = []
    for press in subject.presses():
        reference = _answer(subject, press, batch_size=1, backwards=False)
        for batch_size in (3, 8):
            found = _answer(subject, press, batch_size=batch_size, backwards=True)
            differences = [abs(a - b) for a, b in zip(found.per_token, reference.per_token, strict=True)]
            texts = zip(reference.prompts, reference.texts, found.texts, strict=True)
            differences += [text_gap(subject.lm, *pair, GENERATED) for pair in texts]
            figure = worst(differences) if exact else sum(differences) / len(differences)
            what = f"{press}: batch {batch_size} against 1, {'largest' if exact else 'mean'}, nats per token"
            parts.append(Part(what, figure, subject.tolerance))
    return Check("batches", "results depend neither on the batch size nor on the order of requests", tuple(parts))


@dataclass(frozen=True)
class _Answers:
    per_token: list[float]
    prompts: list[str]
    texts: list[str]


def _answer(subject: Subject, press: str, *, batch_size: int, backwards: bool) -> _Answers:
    """Answer requests of each type and of many lengths; answers come in the order of the requests."""
    length = subject.max_length
    lm = subject.under(
        press, batch_size=batch_size, rolling_context=length // 4, rolling_score=length // 8, short_context="shrink"
    )
    turn = slice(None, None, -1 if backwards else 1)
    sizes = (length // 2, 12, length // 3, length // 3 + 1, length // 3, 40)
    contexts = [subject.different_tokens(n, seed=place) for place, n in enumerate(sizes)]
    pairs = [(context, subject.tokens(n, seed=n)) for context in contexts for n in (1, 5)]
    scores = score_pairs(lm, pairs[turn])[turn]
    documents = [subject.lm.tok_decode(subject.different_tokens(n, seed=n)) for n in (length, length // 3, length // 2)]
    rolled = lm.loglikelihood_rolling(_requests("loglikelihood_rolling", documents)[turn], disable_tqdm=True)[turn]
    prompts = [subject.lm.tok_decode(subject.different_tokens(n, seed=n)) for n in (length // 3, 20, length // 4, 60)]
    texts = lm.generate_until(_requests("generate_until", prompts, GENERATED)[turn], disable_tqdm=True)[turn]
    per_token = [score / len(tokens) for score, (_, tokens) in zip(scores, pairs, strict=True)]
    per_token += [score / len(lm.tok_encode(document)) for score, document in zip(rolled, documents, strict=True)]
    return _Answers(per_token, prompts, texts)


def _until(num_tokens: int, *stops: str) -> dict[str, Any]:
    return {"until": list(stops), "max_gen_toks": num_tokens}


def _requests(request_type: str, texts: list[str], *arguments: Any) -> list[Instance]:
    return [Instance(request_type, {}, (text, *arguments), 0, ("verify", index, 1)) for index, text in enumerate(texts)]


# --------------------------------------------------------------------------------------------------------- records


def check_records(subject: Subject) -> Check:
    """Compare perplexity, counts and times of the record with the dense reference and with what was asked for."""
    length = subject.max_length
    context, block = length // 4, length // 8
    documents = [subject.text(n, seed=n) for n in (length // 2 + 3, length // 3)]
    tokens = [subject.lm.tok_encode(document) for document in documents]
    logprobs = torch.cat([_prefix_protocol(subject, ids, context, block) for ids in tokens])
    records = {}
    for press in ("none", "random"):
        lm = subject.under(press, rolling_context=context, rolling_score=block, batch_size=2)
        began = time.perf_counter()
        lm.loglikelihood_rolling(_requests("loglikelihood_rolling", documents), disable_tqdm=True)
        elapsed = time.perf_counter() - began
        records[press] = lm.describe()
    totals = {press: record["tasks"]["verify"] for press, record in records.items()}
    error = math.log(totals["none"]["token_perplexity"]) + logprobs.mean().item()
    num_pressed = sum(max(0, len(ids) - context) for ids in tokens)
    miscounted = [abs(total["tokens_scored"] - len(logprobs)) for total in totals.values()]
    uneven = [abs(total["tokens_scored_under_press"] - num_pressed) for total in totals.values()]
    throughput = records["random"]["throughput"]
    lumped = {"prefill", "press", "score"} - throughput.keys()
    counts = _produced(subject)
    parts = (
        Part("token perplexity without a press, log, nats", abs(error), subject.tolerance),
        Part("tokens scored, more or fewer than there are", max(miscounted), 0),
        Part("tokens scored under none and random, other than protocol", max(uneven), 0),
        Part("tokens generated, other than produced", abs(counts[0] - counts[1]), 0)
        if counts
        else Part("tokens generated: not compared, since every text comes to a tie", 0, 0),
        Part("phases without seconds of their own, of prefill, press and score", len(lumped), 0),
        Part("seconds of all phases over end-to-end seconds", throughput["seconds_total"] / elapsed, 1),
    )
    return Check("records", "perplexities, counts and times in the record are those of what was done", parts)


def _prefix_protocol(subject: Subject, tokens: list[int], context: int, block: int) -> torch.Tensor:
    """The reference's log-probabilities of a document's tokens, ``(n,)``, as ``rolling=prefix`` scores them."""
    found = [subject.log_probabilities([subject.lm.prefix_token_id], tokens[:context])]
    for start in range(context, len(tokens), block):
        found.append(subject.log_probabilities(tokens[start - context : start], tokens[start : start + block]))
    return torch.cat(found)


def _produced(subject: Subject) -> tuple[int, int] | None:
    """Tokens that the record says were generated, and how many the untouched model needs to reach the same end.

    The end is a stop string from within its text, so that fewer tokens are produced than asked for, or what ends every
    text. None where rounding chooses the text.
    """
    prompts = [subject.text(24, seed=seed) for seed in range(4)]
    candidates = [
        (prompt, new, *_stop_within(subject, new)) for prompt in prompts if (new := _sure_tokens(subject, prompt))
    ]
    if not candidates:
        return None  # the first token of every prompt is a tie
    prompt, new, stop, expected = max(candidates, key=lambda candidate: (bool(candidate[2]), len(candidate[1])))
    has_ended = new[-1] in _end_ids(subject)
    if not (stop or has_ended or len(new) == _num_asked(subject)) and _num_asked(subject) != NUM_ASKED:
        return None  # the text goes on after a tie, as long as the checkpoint says
    lm = subject.under("none")
    until = _until(NUM_ASKED if stop or has_ended else len(new), stop)
    lm.generate_until(_requests("generate_until", [prompt], until), disable_tqdm=True)
    return lm.describe()["tasks"]["verify"]["tokens_generated"], expected


def _stop_within(subject: Subject, new: list[int]) -> tuple[str, int]:
    """A stop string that ends a text before its last sure token, and the tokens up to its end; else "" and all."""
    texts = [subject.lm.tok_decode(new[:n]) for n in range(1, len(new) + 1)]
    for start in range(2, len(new)):
        stop = subject.lm.tok_decode(new[start : start + 2])
        if not stop or "\ufffd" in stop:  # part of a character, which other tokens may complete
            continue
        num_tokens = next((n for n, text in enumerate(texts, start=1) if stop in text), len(new))
        if num_tokens < len(new):
            return stop, num_tokens
    return "", len(new)


def _sure_tokens(subject: Subject, prompt: str) -> list[int]:
    """Greedy tokens by transformers' ``generate``: up to one that ends a text, or before one that ties with another.

    It follows the checkpoint's generation_config.json, as stock ``HFLM`` does: penalties, bans, a number of tokens.
    """
    ids = torch.tensor([subject.lm.tok_encode(prompt)], device=subject.untouched.device)
    generated = subject.untouched.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=_num_asked(subject),
        do_sample=False,
        eos_token_id=sorted(_end_ids(subject)),
        output_scores=True,
        return_dict_in_generate=True,
    )
    new = list[int]()
    for token, scores in zip(generated.sequences[0, ids.shape[1] :].tolist(), generated.scores, strict=True):
        best, second = scores[0].float().topk(2).values.tolist()
        if best - second <= subject.tolerance:
            break
        new.append(token)
    return new


def _num_asked(subject: Subject) -> int:
    """New tokens at most: transformers puts the checkpoint's own number before an argument's."""
    of_checkpoint: int | None = subject.untouched.generation_config.max_new_tokens
    return NUM_ASKED if of_checkpoint is None else of_checkpoint


def _end_ids(subject: Subject) -> set[int]:
    ends = subject.untouched.generation_config.eos_token_id
    return {subject.lm.eot_token_id, *(ends if isinstance(ends, list) else [ends])}


# -------------------------------------------------------------------------------------------------------- refusals


def check_refusals(subject: Subject) -> Check:
    """Check that what cannot be done as asked is an error, and that nothing else is done instead."""
    with tempfile.TemporaryDirectory() as folder:
        wrong: dict[str, Callable[[], Any]] = {
            "a folder that is not there": lambda: resolve_pretrained(f"{folder}/nothing"),
            "a checkpoint without weights": lambda: KVPress(pretrained=_builtin_without(f"{folder}/none", None)),
            "a checkpoint without one of its weights": lambda: KVPress(pretrained=_builtin_without(f"{folder}/one", 1)),
            "an unknown press": lambda: parse_arguments({"press": "snapvk"}),
            "a misspelt argument": lambda: parse_arguments({"press": "snapkv", "compresion_ratio": 0.5}),
            "a ratio of 1": lambda: parse_arguments({"press": "snapkv", "compression_ratio": 1}),
            "positions beyond the trained ones": lambda: subject.under("none", max_length=_too_long(subject)),
            "attention without a mask per layer": lambda: parse_arguments({"attn_implementation": "flash_attention_2"}),
            "WikiText files that are not there": lambda: _load_task("wikitext_kvpress", folder),
            "PG-19 files that are not there": lambda: _load_task("pg19_kvpress", folder),
        }
        accepted = [what for what, call in wrong.items() if _accepts(call)]
    what = f"accepted: {', '.join(accepted)}" if accepted else f"accepted, of {len(wrong)} impossible requests"
    return Check(
        "refusals", "no silent fall-back for data, weights, presses or arguments", (Part(what, len(accepted), 0),)
    )


def _builtin_without(folder: str, num_weights: int | None) -> str:
    """A copy of the built-in checkpoint without so many of its weights, or without any; its folder."""
    whole = Path(checkpoint.resolve_pretrained(BUILTIN))
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns(WEIGHTS))
    if num_weights is not None:
        weights = sorted(safetensors.torch.load_file(whole / WEIGHTS).items())
        safetensors.torch.save_file(dict(weights[num_weights:]), Path(folder) / WEIGHTS, {"format": "pt"})
    return folder


def _too_long(subject: Subject) -> int:
    positions: int = subject.lm.model.config.max_position_embeddings
    return positions + 1


def _load_task(name: str, folder: str) -> Any:
    manager = TaskManager(
        include_path=str(tasks_path()), include_defaults=False, metadata={"data_dir": str(Path(folder))}
    )
    return manager.load([name])


def _accepts(call: Callable[[], Any]) -> bool:
    try:
        call()
    except UsageError:
        return False
    return True
