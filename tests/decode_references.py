"""What a decoding press is compared with, token by token at batch 1.

- `by_kvpress`: kvpress's own hook on the model. `Mended` is that hook with the differences that `decode_budget` names:
  entries stay in order, the newest of equal scores stay, and queries are taken at their positions.
- `DenseDecoder`: the whole cache, from which nothing is ever evicted, under a mask for each layer, head and entry. Its
  scores are formulas written from the papers, in loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import kvpress
import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor

from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.parse import parse_press


class Distinct(LogitsProcessor):
    """No token comes twice. Keys of one token have one norm, up to rounding: which of them a press evicts is chance."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        return scores.scatter(1, input_ids, -torch.inf)


def base_press(model: PressableModel, name: str, arguments: dict[str, Any]) -> Any:
    """kvpress's press, ready to score, of which nothing is removed."""
    press: Any = parse_press(name, {**arguments, "compression_ratio": 0.0}).build(400)
    with model.presented():
        press.post_init_from_model(model.model)
    return press


def best(scores: Tensor, num_kept: int) -> list[int]:
    """Places of the highest of ``(n,)`` scores, ascending; of equal ones the newest."""
    order = sorted(range(len(scores)), key=lambda place: (float(scores[place]), place))
    return sorted(order[len(order) - num_kept :])


class Mended(kvpress.DecodingPress):
    """kvpress's hook, with entries in order and queries at their positions."""

    next_position = 0

    def compress(
        self, module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        target = self._resolve_target_size(kwargs)
        if keys.shape[2] <= target:
            return keys, values
        positions = torch.arange(self.next_position - hidden_states.shape[1], self.next_position)[None]
        kwargs = {**kwargs, "position_embeddings": module.rotary_emb(hidden_states, positions)}
        self.base_press.compression_ratio = self._find_target_compression_ratio(keys.shape[2], target)
        self._expect()
        scores = self.base_press.score(module, hidden_states, keys, values, None, kwargs)
        places = torch.tensor([[best(of_head, target) for of_head in scores[0]]])[..., None]
        return tuple(part.gather(2, places.expand(-1, -1, -1, part.shape[3])) for part in (keys, values))

    def _expect(self) -> None:
        """Queries to come are those after the newest token."""
        press, position = getattr(self.base_press, "press", self.base_press), self.next_position
        average = getattr(type(press), "apply_avg_rope", None)
        if average is not None:
            press.apply_avg_rope = lambda module, mu, cov, q_len: average(press, module, mu, cov, position)
        rotation = getattr(type(press), "_avg_rope_matrix", None)
        if rotation is not None:
            press._avg_rope_matrix = lambda module, q_len, device, dtype: rotation(
                press, module, position, device, dtype
            )


class Ratio(kvpress.CompressionRatioDecodingPress):
    """kvpress's hook, told what was seen, since GPTNeoX does not tell attention its positions."""

    next_position = 0

    def _resolve_total_tokens_seen(self, kwargs: Any) -> int:
        return self.next_position


class MendedRatio(Ratio, Mended):
    """`Mended`, for a share of what was seen."""


@torch.inference_mode()
def by_kvpress(
    model: PressableModel,
    press: Any,
    context: Sequence[int],
    held: int,
    num_new: int,
    prefilled: Callable[[DynamicCache], None] = lambda cache: None,
) -> tuple[list[int], list[Tensor]]:
    """The new tokens under kvpress's own hook, and the keys of each layer in the end, ``(H, T, D)``.

    Args:
        prefilled: changes what the prefill cached.
    """
    cache, ids = DynamicCache(), list(context)

    def append(logits: Tensor) -> None:
        ids.append(int(Distinct()(torch.tensor([ids]), logits[:, -1]).argmax()))

    is_eager = model.model.config._attn_implementation == "eager"
    with model.presented(), press(model.model):
        out = model.model(torch.tensor([ids[: len(ids) - held]]), past_key_values=cache)
        prefilled(cache)
        place = len(ids) - held
        if held == 0:
            append(out.logits)
        while len(ids) < len(context) + num_new:
            press.next_position = place + 1
            out = model.model(
                torch.tensor([[ids[place]]]),
                past_key_values=cache,
                position_ids=torch.tensor([[place]]),
                cache_position=torch.tensor([place]),
                attention_mask=torch.zeros(1, 1, 1, 1) if is_eager else None,  # a single token sees all
            )
            place += 1
            append(out.logits)
    return ids[len(context) :], [layer.keys[0] for layer in cache.layers]


# ------------------------------------------------------------------------------------------------- dense reference


@dataclass
class Layer:
    """One layer of the dense reference.

    Attributes:
        seen: ``(H, T)``, the entries that each head has.
        received: ``(H, T)``, the attention added up over the queries fed since the prefill; ``num_queries``, ``(T,)``.
        hidden: hidden states that entered the attention since the last compression.
    """

    seen: Tensor
    received: Tensor
    num_queries: Tensor
    hidden: list[Tensor] = field(default_factory=list)


Choose = Callable[["DenseDecoder", int], list[list[int]]]


class DenseDecoder:
    """Greedy decoding over the whole cache under a mask; ``choose`` names the entries that each head keeps.

    Args:
        model: with eager attention.
        choose: given this and the index of a layer, the places of each head's entries that stay, in the text.
        interval: forwards between two compressions.
    """

    def __init__(self, model: PressableModel, choose: Choose, interval: int) -> None:
        assert model.model.config._attn_implementation == "eager"
        self.model, self.choose, self.interval = model, choose, interval
        self.cache, self.layers, self.num_fed = DynamicCache(), list[Layer](), 0
        self.num_groups = model.num_query_heads // model.num_key_value_heads

    @torch.inference_mode()
    def decode(self, context: Sequence[int], held: int, num_new: int) -> list[int]:
        """The new tokens."""
        ids = list(context)
        self.prefill(ids[: len(ids) - held])
        place = len(ids) - held
        if held == 0:
            ids.append(int(Distinct()(torch.tensor([ids]), self.logits).argmax()))
        while len(ids) < len(context) + num_new:
            self.compress_if_due()
            self.feed(ids[place])
            place += 1
            ids.append(int(Distinct()(torch.tensor([ids]), self.logits).argmax()))
        return ids[len(context) :]

    @torch.inference_mode()
    def logprobs(self, context: Sequence[int], held: int, continuation: Sequence[int]) -> list[float]:
        """Log-probabilities of a continuation, as if its tokens were generated."""
        tokens = [*context, *continuation]
        self.prefill(tokens[: len(context) - held])
        found = []
        for place in range(len(context) - held, len(tokens)):
            if place >= len(context):
                found.append(float(self.logits[0].double().log_softmax(-1)[tokens[place]]))
            if place < len(tokens) - 1:
                self.compress_if_due()
                self.feed(tokens[place])
        return found

    def prefill(self, tokens: Sequence[int]) -> None:
        self.logits = self.model.model(torch.tensor([list(tokens)]), past_key_values=self.cache).logits[:, -1]
        heads, num = self.model.num_key_value_heads, len(tokens)
        self.position = num
        self.layers = [
            Layer(torch.ones(heads, num, dtype=torch.bool), torch.zeros(heads, num), torch.zeros(num))
            for _ in self.model.attentions
        ]

    def compress_if_due(self) -> None:
        if self.num_fed and self.num_fed % self.interval == 0:
            for index, layer in enumerate(self.layers):
                kept = self.choose(self, index)
                for head, places in enumerate(kept):
                    assert layer.seen[head, places].all()
                    layer.seen[head] = False
                    layer.seen[head, places] = True
                layer.hidden.clear()

    def feed(self, token: int) -> None:
        for layer in self.layers:
            one = torch.ones(len(layer.seen), 1, dtype=torch.bool)
            layer.seen = torch.cat([layer.seen, one], dim=1)
            layer.received = torch.cat([layer.received, torch.zeros(len(one), 1)], dim=1)
            layer.num_queries = torch.cat([layer.num_queries, torch.zeros(1)]) + 1
        with self._hooks():
            out = self.model.model(
                torch.tensor([[token]]),
                past_key_values=self.cache,
                position_ids=torch.tensor([[self.position]]),
                attention_mask=torch.zeros(1, 1, 1, 1),
            )
        self.logits, self.position, self.num_fed = out.logits[:, -1], self.position + 1, self.num_fed + 1

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        def before_of(layer: Layer) -> Any:
            def before(_: Any, args: Any, kwargs: Any) -> Any:
                layer.hidden.append((args[0] if args else kwargs["hidden_states"])[0, -1])
                bias = torch.zeros(layer.seen.shape).masked_fill(~layer.seen, torch.finfo(torch.float32).min)
                return args, {**kwargs, "attention_mask": bias.repeat_interleave(self.num_groups, dim=0)[None, :, None]}

            return before

        def after_of(layer: Layer) -> Any:
            def after(_: Any, args: Any, output: Any) -> None:
                layer.received += output[1][0, :, 0].view(len(layer.seen), self.num_groups, -1).mean(1)

            return after

        with ExitStack() as hooks:
            for attention, layer in zip(self.model.attentions, self.layers, strict=True):
                hooks.callback(attention.register_forward_pre_hook(before_of(layer), with_kwargs=True).remove)
                hooks.callback(attention.register_forward_hook(after_of(layer)).remove)
            yield

    # ------------------------------------------------------------------------------------ what scores are made of

    def places(self, index: int, head: int) -> list[int]:
        """Of the entries that a head has."""
        return self.layers[index].seen[head].nonzero()[:, 0].tolist()

    def keys(self, index: int, head: int) -> Tensor:
        """``(n, D)``, of the entries that a head has."""
        return self.cache.layers[index].keys[0, head, self.places(index, head)].double()

    def values(self, index: int, head: int) -> Tensor:
        return self.cache.layers[index].values[0, head, self.places(index, head)].double()

    def queries(self, index: int, head: int, num: int, *, rotated: bool) -> Tensor:
        """``(heads of the group, num, D)``, of the newest tokens."""
        hidden, attention = torch.stack(self.layers[index].hidden[-num:]), self.model.attentions[index]
        with self.model.presented():
            queries = attention.q_proj(hidden).view(len(hidden), -1, self.model.head_dim)  # type: ignore[operator]
        queries = queries[:, head * self.num_groups : (head + 1) * self.num_groups].transpose(0, 1).double()
        return self.rotate(queries, self.position - len(hidden)) if rotated else queries

    def rotate(self, vectors: Tensor, first: int) -> Tensor:
        """Rotate ``(..., n, D)`` to positions ``first`` and further, as complex numbers."""
        half = vectors.shape[-1] // 2
        frequencies = self.model.model.base_model.rotary_emb.inv_freq.double()
        places = first + torch.arange(vectors.shape[-2])
        turns = torch.polar(torch.ones(()).double(), places[:, None] * frequencies)
        turned = torch.complex(vectors[..., :half], vectors[..., half:]) * turns
        return torch.cat([turned.real, turned.imag], dim=-1)


# ------------------------------------------------------------------------------------------------- scores of a head

OfHead = Callable[[DenseDecoder, int, int], Tensor]


def knorm(dense: DenseDecoder, index: int, head: int) -> Tensor:
    return -dense.keys(index, head).norm(dim=-1)


def observed(dense: DenseDecoder, index: int, head: int) -> Tensor:
    """The attention that an entry received on the average of the queries that saw it (H2O, arXiv 2306.14048)."""
    layer, places = dense.layers[index], dense.places(index, head)
    return layer.received[head, places] / layer.num_queries[places]


def snapkv(window: int, kernel: int) -> OfHead:
    """Attention of the newest tokens, averaged over neighbours (arXiv 2404.14469)."""

    def scores(dense: DenseDecoder, index: int, head: int) -> Tensor:
        keys, found = dense.keys(index, head), []
        for of_head in dense.queries(index, head, window, rotated=True):
            weights = torch.zeros(len(keys) - window).double()
            for back, query in enumerate(reversed(of_head)):
                seen = keys[: len(keys) - back]
                weights += (seen @ query / math.sqrt(len(query))).softmax(0)[: len(keys) - window] / window
            half = kernel // 2
            padded = torch.nn.functional.pad(weights, (half, half))
            found.append(torch.stack([padded[i : i + kernel].mean() for i in range(len(weights))]))
        return torch.cat([torch.stack(found).mean(0), torch.full((window,), 9.0).double()])

    return scores


def expected_attention(num_future: int, num_sinks: int) -> OfHead:
    """Attention of queries with the mean and covariance of the newest ones, at positions to come (2510.00636)."""

    def scores(dense: DenseDecoder, index: int, head: int) -> Tensor:
        keys, values, found = dense.keys(index, head)[num_sinks:], dense.values(index, head)[num_sinks:], []
        num = len(dense.layers[index].hidden)
        for of_head in dense.queries(index, head, num, rotated=False):
            queries = of_head[num_sinks:]  # kvpress leaves out as many
            dim = queries.shape[1]
            turns = [
                dense.rotate(torch.eye(dim).double()[:, None], dense.position + i)[:, 0].T for i in range(num_future)
            ]
            turn = torch.stack(turns).mean(0)
            mean = turn @ queries.mean(0)
            centered = queries - queries.mean(0)
            cov = turn @ (centered.T @ centered / len(queries)) @ turn.T
            logits = [float(key @ mean) / math.sqrt(dim) + float(key @ cov @ key) / dim / 2 for key in keys]
            found.append(torch.tensor(logits).double().softmax(0))
        scores = torch.stack(found).mean(0) * values.norm(dim=-1)
        return torch.cat([torch.full((num_sinks,), float(scores.max()) + 1).double(), scores])

    return scores


def rkv(window: int, kernel: int, mix: float, threshold: float) -> OfHead:
    """Importance less redundancy (arXiv 2505.24133), in loops."""

    def scores(dense: DenseDecoder, index: int, head: int) -> Tensor:
        keys, queries = dense.keys(index, head), dense.queries(index, head, window, rotated=True)
        return rkv_scores(keys, queries, window, kernel, mix, threshold)

    return scores


def rkv_scores(keys: Tensor, queries: Tensor, window: int, kernel: int, mix: float, threshold: float) -> Tensor:
    """``(n,)`` from keys ``(n, D)`` of one head and queries ``(heads of its group, W, D)``, in loops."""
    num_old, important = len(keys) - window, torch.zeros(len(keys) - window).double()
    for step in range(window):
        logits = [max(float(key @ of_head[step]) for of_head in queries) for key in keys[:num_old]]
        important += (torch.tensor(logits).double() / math.sqrt(keys.shape[1])).softmax(0) / window
    pooled = [max(important[max(0, i - kernel // 2) : i + kernel // 2 + 1].tolist()) for i in range(num_old)]
    alike = torch.zeros(len(keys), len(keys)).double()
    for i, one in enumerate(keys):
        for j, other in enumerate(keys):
            if i != j:
                alike[i, j] = float(one @ other) / float(one.norm() * other.norm())
        above = [j for j in range(len(keys)) if alike[i, j] > threshold]
        if above:
            alike[i, above[-1]] = 0.0  # of those that are like this one, the newest is not redundant
    redundant = alike.mean(0).softmax(0)
    scores = mix * torch.tensor(pooled).double() - (1 - mix) * redundant[:num_old]
    return torch.cat([scores, torch.full((window,), 9.0).double()])


def critical(scores: OfHead, target: int, epsilon: float = 1e-4, first_share: float = 0.5) -> OfHead:
    """Half of what stays by the scores alone, the rest by what a value adds to the output, too (2502.03805)."""

    def weighted(dense: DenseDecoder, index: int, head: int) -> Tensor:
        attention, values, own = dense.model.attentions[index], dense.values(index, head), scores(dense, index, head)
        with dense.model.presented():
            output = attention.o_proj.weight.double()  # type: ignore[union-attr]
        dim = values.shape[1]
        columns = [head * dense.num_groups + i for i in range(dense.num_groups)]
        norms = [(values @ output[:, i * dim : (i + 1) * dim].T).abs().sum(dim=1) for i in columns]
        found = (own + epsilon) * torch.stack(norms).mean(dim=0)
        found[best(own, int(target * first_share))] = torch.inf
        return found

    return weighted


def each_head(scores: OfHead, target: int) -> Choose:
    """Every head keeps its best entries."""

    def choose(dense: DenseDecoder, index: int) -> list[list[int]]:
        kept = []
        for head in range(dense.model.num_key_value_heads):
            places = dense.places(index, head)
            found = best(scores(dense, index, head), min(target, len(places))) if len(places) > target else None
            kept.append(places if found is None else [places[i] for i in found])
        return kept

    return choose


def all_heads(scores: OfHead, target: int, alpha: float) -> Choose:
    """Heads share what is kept, and each has a part for itself (AdaKV, arXiv 2407.11550)."""

    def choose(dense: DenseDecoder, index: int) -> list[list[int]]:
        heads = range(dense.model.num_key_value_heads)
        places = [dense.places(index, head) for head in heads]
        if sum(map(len, places)) <= target * len(heads):
            return places
        found = [scores(dense, index, head) for head in heads]
        num_safe = max(1, int(target * alpha))
        kept = {(head, i) for head in heads for i in best(found[head], min(num_safe, len(places[head])))}
        rest = [(float(found[head][i]), places[head][i], head, i) for head in heads for i in range(len(places[head]))]
        for _, _, head, i in sorted(rest, reverse=True):
            if len(kept) < target * len(heads):
                kept.add((head, i))
        return [[places[head][i] for i in range(len(places[head])) if (head, i) in kept] for head in heads]

    return choose
