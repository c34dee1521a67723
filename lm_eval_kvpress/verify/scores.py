"""Check what is scored over a compressed cache: the kept entries are read, in their order, and nothing else.

The references are whole forwards of the untouched copy in which a mask hides what was evicted (`dense_reference`), and
transformers' own forwards of one token at a time.

Letters in shape comments: G key-value heads, P prefilled tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from lm_eval_kvpress.cache.compressed import CompressedCache, LayerKV
from lm_eval_kvpress.engine.cuda_graph import GraphRecorder
from lm_eval_kvpress.engine.decode_budget import BudgetKeeper
from lm_eval_kvpress.engine.decoding import decode
from lm_eval_kvpress.engine.sampling import Sampler
from lm_eval_kvpress.engine.scoring import Pack
from lm_eval_kvpress.engine.scoring import score as score_packs
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.harness.parity import worst
from lm_eval_kvpress.verify.check import Check, Part
from lm_eval_kvpress.verify.kept import evicted_entries, full_cache
from lm_eval_kvpress.verify.subject import Subject, compress, score

NUM_CONTINUED = 12

LEAST_EFFECT = 1e-2
"""Nats by which a press that acts moves an answer. Presses that do nothing all give the same number to the last digit,
also in 16 bits."""


# --------------------------------------------------------------------------------------------------------- scoring


def check_scoring(subject: Subject) -> Check:
    """Compare log-likelihoods through the compressed cache with whole forwards that mask the evicted entries."""
    parts = []
    for press in subject.presses(none=True):
        lm = subject.under(press)
        differences = []
        for seed, length in enumerate((subject.max_length // 2, subject.max_length // 5)):
            context = subject.tokens(length, seed=seed)
            continuations = [subject.tokens(n, seed=4 + n) for n in (1, NUM_CONTINUED)]
            evicted = evicted_by(lm, context)
            for found, continuation in zip(score(lm, context, continuations), continuations, strict=True):
                expected = subject.log_probabilities(context, continuation, evicted).sum().item()
                differences.append(abs(found - expected) / len(continuation))
        parts.append(Part(f"{press}: nats per token", worst(differences), subject.tolerance))
    return Check("scoring", "a score through the cache is the dense one with evicted entries masked", tuple(parts))


def evicted_by(lm: KVPress, context: Sequence[int]) -> list[torch.Tensor]:
    """What the lm's press evicts of a context without its held-back end: ``(G, P)`` per layer."""
    cache, _ = compress(lm, context)
    full = full_cache(lm.model, context[: len(context) - lm.session.settings.query_tokens])
    return [
        evicted_entries(layer, entries.keys[0], entries.values[0])
        for layer, entries in zip(cache.layers, full.layers, strict=True)
    ]


# ------------------------------------------------------------------------------------------------------- causality


def check_causality(subject: Subject) -> Check:
    """Compare many tokens at once, and decoded ones, with one token at a time; change a future token.

    A press that masks keeps no entries of its own that could be fed one by one: what predicts its decoded tokens is
    compared with the dense reference, as for all presses.
    """
    context = subject.tokens(subject.max_length // 2)
    continuation = subject.tokens(NUM_CONTINUED, seed=5)
    differences: dict[str, list[float]] = {"at once": [], "future": [], "decoded": [], "dense": []}
    for press in subject.presses(none=True, masking=False):
        lm = subject.under(press)
        cache, query = compress(lm, context)
        at_once = branch_logprobs(lm, cache, query, continuation)
        singly = step_logprobs(lm.model, cache, [*query, *continuation])
        expected = singly[len(query) - 1 :].gather(1, torch.tensor(continuation)[:, None])[:, 0]
        differences["at once"].append((at_once - expected).abs().max().item())
        changed = branch_logprobs(lm, cache, query, [*continuation[:-4], *reversed(continuation[-4:])])
        differences["future"].append((at_once - changed)[:-4].abs().max().item())
        differences["decoded"].append(_decoding_gap(lm, cache, context, query))
    for press in subject.presses(none=True):
        lm = subject.under(press)
        cache, query = compress(lm, context)
        new, logprobs = generated(lm, cache, context, query)
        masked = subject.log_probabilities(context, new, evicted_by(lm, context))
        differences["dense"].append((logprobs - masked).abs().max().item())
    what = {
        "at once": "many tokens at once against one by one",
        "future": "earlier tokens when a later one changes",
        "decoded": "likelihood below the best token's, of decoded tokens",
        "dense": "log-probabilities of decoded tokens against dense forwards with evicted entries masked",
    }
    parts = tuple(Part(f"{what[key]}, nats", worst(found), subject.tolerance) for key, found in differences.items())
    return Check("causality", "many tokens at once equal one by one, and see no future", parts)


def branch_logprobs(
    lm: KVPress, cache: CompressedCache, query: Sequence[int], continuation: Sequence[int]
) -> torch.Tensor:
    """Log-probabilities of a continuation, ``(n,)``, by our scoring, beside another branch that must not be seen."""
    other = tuple(reversed(continuation))
    packs = [Pack(tuple(query), (other, tuple(continuation)))]
    return torch.tensor(score_packs(lm.press_model, cache, packs)[0][1].logprobs)


@torch.inference_mode()
def step_logprobs(model: PreTrainedModel, cache: CompressedCache, tokens: Sequence[int]) -> torch.Tensor:
    """Log-probabilities after each token, ``(n, V)``, fed one at a time by transformers over its own cache class.

    A single token needs no mask, so no code of ours takes part; the entries are copied. PyTorch's attention is given
    none (on a GPU it refuses a mask of one column). transformers' eager attention is given a zero for all entries,
    since the mask that it would make has the first layer's length.
    """
    steps = DynamicCache()
    for index, layer in enumerate(cache.layers):
        assert layer.hidden is None, "a single step without a mask would see hidden entries"
        steps.update(layer.keys.clone(), layer.values.clone(), index)
    is_eager = model.config._attn_implementation == "eager"
    no_mask = torch.zeros(1, 1, 1, 1, device=model.device, dtype=model.dtype) if is_eager else None
    found = []
    for place, token in enumerate(tokens, start=cache.num_seen[0]):
        positions = torch.tensor([[place]], device=model.device)
        output = model(
            torch.tensor([[token]], device=model.device),
            position_ids=positions,
            past_key_values=steps,
            attention_mask=no_mask,
        )
        found.append(output.logits[0, -1].float().log_softmax(dim=-1).cpu())
    return torch.stack(found)


class _Predicted(LogitsProcessor):  # type: ignore[misc]
    """Leaves logits as they are, and keeps what they predict for the one row, ``(V,)`` per step."""

    def __init__(self) -> None:
        self.logprobs = list[torch.Tensor]()

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        self.logprobs.append(logits[0].float().log_softmax(dim=-1).cpu())
        return logits


def generated(
    lm: KVPress,
    cache: CompressedCache,
    context: Sequence[int],
    query: Sequence[int],
    num_tokens: int = NUM_CONTINUED,
    keeper: BudgetKeeper | None = None,
) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens by our decoding over a cache of one row, and their log-probabilities, ``(n,)``.

    Args:
        keeper: compresses the cache meanwhile.
    """
    predicted = _Predicted()
    tokens = _decoded(lm, cache, context, query, num_tokens, LogitsProcessorList([predicted]), keeper=keeper)
    return tokens, torch.stack(predicted.logprobs).gather(1, torch.tensor(tokens)[:, None])[:, 0]


def _decoded(
    lm: KVPress,
    cache: CompressedCache,
    context: Sequence[int],
    query: Sequence[int],
    num_tokens: int,
    processors: LogitsProcessorList,
    **options: Any,
) -> list[int]:
    """So many greedy tokens by our decoding over a cache of one row, which nothing stops; ``options`` as `decode`'s."""
    (tokens,) = decode(
        lm.press_model,
        cache,
        [list(context)],
        num_held_back=[len(query)],
        max_new_tokens=num_tokens,
        sampler=Sampler(processors),
        stop_ids=frozenset(),
        stopped=lambda tokens: [False] * len(tokens),
        **options,
    )
    return tokens


def _decoding_gap(lm: KVPress, cache: CompressedCache, context: Sequence[int], query: Sequence[int]) -> float:
    """How far our greedy tokens fall short of the most likely ones when they are fed one by one, in nats."""
    record = GraphRecorder(lm.press_model).for_steps(NUM_CONTINUED - 1)
    decoded = _decoded(lm, cache, context, query, NUM_CONTINUED, LogitsProcessorList(), record=record)
    after = step_logprobs(lm.model, cache, [*query, *decoded[:-1]])[len(query) - 1 :]
    chosen = after.gather(1, torch.tensor(decoded)[:, None])[:, 0]
    return (after.amax(dim=-1) - chosen).max().item()


# ---------------------------------------------------------------------------------------------------------- action


def check_action(subject: Subject) -> Check:
    """Check that presses act: answers and documents move, presses differ, the cache is read, less is kept."""
    context = subject.tokens(subject.max_length // 2)
    answers = [[token] for token in subject.tokens(24, seed=7)]
    models = {press: subject.under(press, **_strong(press)) for press in subject.presses(none=True)}
    figures = {press: score(lm, context, answers) for press, lm in models.items()}
    pressed = [lm.describe()["tasks"][""]["contexts_pressed"] for press, lm in models.items() if press != "none"]
    pairs = [(a, b) for index, a in enumerate(figures) for b in list(figures)[:index]]
    between = {f"{b} and {a}": _distance(figures[a], figures[b]) for a, b in pairs}
    closest = min(between, key=lambda pair: between[pair])
    rolled = {press: _rolled(subject, press) for press in ("none", "random")}
    limit = max(subject.tolerance / 10, LEAST_EFFECT)
    effects = {
        "random against none, one-token answers": _distance(figures["random"], figures["none"]),
        f"closest presses ({closest}), one-token answers": between[closest],
        "snapkv's cache emptied of its values": _emptied(models["snapkv"], context, answers),
    }
    parts = (
        *(Part(f"{what}, nats", effect, limit, at_least=True) for what, effect in effects.items()),
        # The rounding errors of hundreds of tokens average out.
        Part("random against none, rolling, nats per token", _distance(*rolled.values()), limit / 10, at_least=True),
        Part("largest share kept", worst([context["kept_share"] for context in pressed]), 0.75),
    )
    return Check("action", "presses act, differ, and the pruned cache is what is read", parts)


def _strong(press: str) -> dict[str, float]:
    """A ratio at which every press must show. PyramidKV keeps its own, since it would fall back to SnapKV."""
    return {} if press in ("none", "pyramidkv") else {"compression_ratio": 0.9}


def _distance(figures: Sequence[float], others: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(figures, others, strict=True))


def _rolled(subject: Subject, press: str) -> list[float]:
    """Nats per token of several documents, whose second halves are scored over the cache."""
    half = subject.max_length // 2
    texts = [subject.text(2 * half, seed=seed) for seed in (3, 8, 13)]
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0, ("verify", i, 1)) for i, text in enumerate(texts)]
    lm = subject.under(press, rolling_context=half, rolling_score=half // 2)
    scores = lm.loglikelihood_rolling(requests, disable_tqdm=True)
    return [score / len(lm.tok_encode(text)) for score, text in zip(scores, texts, strict=True)]


def _emptied(lm: KVPress, context: Sequence[int], answers: Sequence[Sequence[int]]) -> float:
    """How far scores move when the values of the compressed cache are set to zero."""
    cache, query = compress(lm, context)
    layers = (LayerKV(layer.keys, torch.zeros_like(layer.values), layer.hidden) for layer in cache.layers)
    packs = [Pack(query, tuple(tuple(answer) for answer in answers))]
    found = []
    for version in (cache, dataclasses.replace(cache, layers=tuple(layers))):
        branches = score_packs(lm.press_model, version, packs)[0]
        found.append([sum(branch.logprobs) for branch in branches])
    return _distance(*found)
