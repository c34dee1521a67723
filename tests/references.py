"""What the engine is compared with, written apart from it.

Three independent routes to the same numbers:

- `NeoxReference`, `LlamaReference`: the architecture from the checkpoint's weights in float64, partial RoPE as it is
  (no change of basis), one dense pass over prefilled and new tokens. A boolean per layer, head and entry hides the
  evicted ones from the new tokens, and only from them. No cache, no hooks, no transformers forward.
- `one_by_one_logprobs`: kvpress's own way, one new token per forward through a `DynamicCache`; presses that mask
  hide their entries by kvpress's fake keys.
- `kept_by_press`: which entries a press keeps, from runs outside the engine, found by matching cached tensors exactly.

Letters in shape comments: L layers, H heads, K key-value heads, S tokens (prefilled and new), D head_dim, R rotated
dims.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import kvpress
import torch
from statistics_files import LLAMA, NEOX, statistics_file
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from lm_eval_kvpress.models.pressable import PressableModel
from lm_eval_kvpress.presses.calibrated import CalibratedQFilterPress


class QFilterOfAnyModel(CalibratedQFilterPress):
    """Random filters of the shape that the model asks for."""

    def __init__(self, compression_ratio: float) -> None:
        super().__init__(compression_ratio, statistics=statistics_file("qfilter", NEOX))

    def post_init_from_model(self, model: Any) -> None:
        is_llama = model.config.num_key_value_heads < model.config.num_attention_heads
        self.statistics = statistics_file("qfilter", LLAMA if is_llama else NEOX)
        super().post_init_from_model(model)


PRESSES: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "snapkv": lambda: kvpress.SnapKVPress(0.5, window_size=8),
    "streaming_llm": lambda: kvpress.StreamingLLMPress(0.5),
    "pyramidkv": lambda: kvpress.PyramidKVPress(0.6, window_size=4, beta=4),
    "knorm": lambda: kvpress.KnormPress(0.5),
    "random": lambda: kvpress.RandomPress(0.5, seed=1),
    "tova": lambda: kvpress.TOVAPress(0.5),
    "expected_attention": lambda: kvpress.ExpectedAttentionPress(0.5),
    "qfilter": lambda: QFilterOfAnyModel(0.5),
    "adakv:snapkv": lambda: kvpress.AdaKVPress(kvpress.SnapKVPress(0.5, window_size=8)),
    "key_rerotation:streaming_llm": lambda: kvpress.KeyRerotationPress(kvpress.StreamingLLMPress(0.5)),
}
"""A fresh press per call; every one fits contexts of 16 tokens and more (PyramidKV makes a pyramid from 24 on)."""

REROTATES = {"key_rerotation:streaming_llm"}
MASKS = {"adakv:snapkv"}


def distinct_tokens(count: int, vocab_size: int, seed: int) -> list[int]:
    """No token twice: values of layer 0 depend on the token alone, and entries are told apart by their tensors."""
    return torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))[:count].tolist()


def largest_difference(found: Sequence[float], expected: Sequence[float]) -> float:
    assert len(found) == len(expected), (len(found), len(expected))
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))


# ------------------------------------------------------------------------------------------------- dense reference


@dataclass(frozen=True)
class Evicted:
    """What new tokens must not see, and where the keys that they do see stand.

    Attributes:
        hidden: ``(L, K, P)`` over the P prefilled tokens.
        key_positions: ``(L, K, P)``: positions of prefilled keys for new queries, after a press that rotates them
            anew; None for their own.
        next_position: position of the first new token.
    """

    hidden: Tensor
    next_position: int
    key_positions: Tensor | None = None


class DenseReference:
    """A causal language model in float64, from weights and config alone. Subclasses know one architecture."""

    num_heads: int
    num_kv_heads: int
    rotated: int

    def __init__(self, model: PreTrainedModel) -> None:
        self.config = model.config
        self.weights = {name: tensor.detach().double().clone() for name, tensor in model.state_dict().items()}
        self.num_heads = model.config.num_attention_heads
        self.head_dim = model.config.hidden_size // self.num_heads

    def logprobs(self, context: Sequence[int], new: Sequence[int], evicted: Evicted | None, prefilled: int) -> Tensor:
        """Log-probabilities ``(len(new), V)`` of what comes at the place of each token of ``new``."""
        tokens = torch.tensor([*context, *new])
        logits = self.logits(tokens, evicted, prefilled)
        return logits.log_softmax(dim=-1)[len(context) - 1 : len(tokens) - 1]

    def token_logprobs(
        self, context: Sequence[int], new: Sequence[int], evicted: Evicted | None, prefilled: int
    ) -> list[float]:
        table = self.logprobs(context, new, evicted, prefilled)
        return [table[place, token].item() for place, token in enumerate(new)]

    def greedy(self, context: Sequence[int], count: int, evicted: Evicted | None, prefilled: int) -> list[int]:
        """Greedy tokens, the whole sequence anew for each."""
        ids = list(context)
        for _ in range(count):
            ids.append(int(self.logits(torch.tensor(ids), evicted, prefilled)[-1].argmax()))
        return ids[len(context) :]

    def logits(self, tokens: Tensor, evicted: Evicted | None, prefilled: int) -> Tensor:
        raise NotImplementedError

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, evicted: Evicted | None, prefilled: int) -> Tensor:
        """Unrotated q ``(H, S, D)``, k and v ``(K, S, D)`` to attention outputs ``(S, H * D)``."""
        size = q.shape[1]
        repeats = self.num_heads // k.shape[0]
        places = torch.arange(size)
        seen = places[:, None] >= places[None, :]  # (S, S)
        seen = seen.expand(self.num_heads, size, size).clone()
        k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
        own = places.double().expand(self.num_heads, size)
        scores = self.rotate(q, own) @ self.rotate(k, own).transpose(1, 2)
        if evicted is not None:
            hidden = evicted.hidden[layer].repeat_interleave(repeats, 0)  # (H, P)
            seen[:, prefilled:, :prefilled] &= ~hidden[:, None, :]
            later = evicted.next_position + places - prefilled
            query_places = later.double().expand(self.num_heads, size)
            key_places = query_places.clone()
            given = evicted.key_positions
            old = own[:, :prefilled] if given is None else given[layer].repeat_interleave(repeats, 0)
            key_places[:, :prefilled] = old
            after = self.rotate(q, query_places) @ self.rotate(k, key_places).transpose(1, 2)
            scores[:, prefilled:] = after[:, prefilled:]
        scores = (scores / self.head_dim**0.5).masked_fill(~seen, float("-inf"))
        return (scores.softmax(dim=-1) @ v).transpose(0, 1).reshape(size, -1)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """RoPE as complex numbers, each made of dims ``i`` and ``i + R / 2`` of the first R. ``positions (H, S)``."""
        half = self.rotated // 2
        theta = self.config.rope_parameters["rope_theta"] if hasattr(self.config, "rope_parameters") else 10000.0
        frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
        turns = torch.polar(torch.ones(()).double(), positions[..., None] * frequencies)
        turned = torch.complex(x[..., :half], x[..., half : self.rotated]) * turns
        return torch.cat([turned.real, turned.imag, x[..., self.rotated :]], dim=-1)


class NeoxReference(DenseReference):
    """GPTNeoX, from an untouched model."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.rotated = 2 * model.gpt_neox.rotary_emb.inv_freq.numel()

    def linear(self, x: Tensor, name: str) -> Tensor:
        return nn.functional.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return nn.functional.layer_norm(x, x.shape[-1:], weight, bias, self.config.layer_norm_eps)

    def logits(self, tokens: Tensor, evicted: Evicted | None, prefilled: int) -> Tensor:
        x = self.weights["gpt_neox.embed_in.weight"][tokens]
        for layer in range(self.config.num_hidden_layers):
            prefix = f"gpt_neox.layers.{layer}"
            fused = self.linear(self.norm(x, f"{prefix}.input_layernorm"), f"{prefix}.attention.query_key_value")
            heads = fused.view(len(tokens), self.num_heads, 3, self.head_dim)  # head-major
            q, k, v = heads.permute(2, 1, 0, 3)  # (H, S, D) each
            attended = self.linear(self.attend(layer, q, k, v, evicted, prefilled), f"{prefix}.attention.dense")
            inner = x if self.config.use_parallel_residual else x + attended
            hidden = self.linear(self.norm(inner, f"{prefix}.post_attention_layernorm"), f"{prefix}.mlp.dense_h_to_4h")
            x = x + attended + self.linear(nn.functional.gelu(hidden), f"{prefix}.mlp.dense_4h_to_h")
        return self.linear(self.norm(x, "gpt_neox.final_layer_norm"), "embed_out")


class LlamaReference(DenseReference):
    """Llama with grouped-query attention."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.rotated = self.head_dim

    def linear(self, x: Tensor, name: str) -> Tensor:
        return nn.functional.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        scale = (x.square().mean(dim=-1, keepdim=True) + self.config.rms_norm_eps).rsqrt()
        return x * scale * self.weights[f"{name}.weight"]

    def logits(self, tokens: Tensor, evicted: Evicted | None, prefilled: int) -> Tensor:
        x = self.weights["model.embed_tokens.weight"][tokens]
        for layer in range(self.config.num_hidden_layers):
            prefix = f"model.layers.{layer}"
            normed = self.norm(x, f"{prefix}.input_layernorm")
            q, k, v = (
                self.linear(normed, f"{prefix}.self_attn.{part}_proj").view(len(tokens), -1, self.head_dim)
                for part in "qkv"
            )
            q, k, v = (part.transpose(0, 1) for part in (q, k, v))
            x = x + self.linear(self.attend(layer, q, k, v, evicted, prefilled), f"{prefix}.self_attn.o_proj")
            normed = self.norm(x, f"{prefix}.post_attention_layernorm")
            gate = nn.functional.silu(self.linear(normed, f"{prefix}.mlp.gate_proj"))
            x = x + self.linear(gate * self.linear(normed, f"{prefix}.mlp.up_proj"), f"{prefix}.mlp.down_proj")
        return self.linear(self.norm(x, "model.norm"), "lm_head")


# ------------------------------------------------------------------------------------------- what a press keeps


def press_run(model: PressableModel, tokens: Sequence[int], press: Any) -> DynamicCache:
    """Prefill in kvpress's own way. What a masking press wrote on the attention modules stays there."""
    cache = DynamicCache()
    with torch.no_grad():
        if press is None:
            model.model(torch.tensor([list(tokens)]), past_key_values=cache)
        else:
            with model.presented(), press(model.model):
                model.model(torch.tensor([list(tokens)]), past_key_values=cache)
    return cache


def clear_masks(model: PressableModel) -> None:
    for attention in model.attentions:
        attention.__dict__.pop("masked_key_indices", None)


def kept_by_press(model: PressableModel, tokens: Sequence[int], name: str) -> Evicted:
    """Which prefilled entries are evicted, by matching the compressed cache with the full one, exactly."""
    full, pressed = press_run(model, tokens, None), press_run(model, tokens, PRESSES[name]())
    hidden, positions = [], []
    for attention, whole, left in zip(model.attentions, full.layers, pressed.layers, strict=True):
        indices = getattr(attention, "masked_key_indices", None)
        if indices is not None:
            layer_hidden = torch.zeros(whole.keys.shape[:3], dtype=torch.bool)
            layer_hidden[indices] = True
            hidden.append(layer_hidden[0])
            continue
        equal = same_entries(whole.values, left.values)  # (K, P, kept)
        if name not in REROTATES:
            equal &= same_entries(whole.keys, left.keys)
        assert (equal.sum(1) == 1).all(), "every kept entry must be one entry of the full cache"
        hidden.append(~equal.any(2))
        positions.append(equal.double() @ torch.arange(left.keys.shape[2]).double())  # place in the compressed cache
    clear_masks(model)
    if name not in REROTATES:
        return Evicted(torch.stack(hidden), len(tokens))
    return Evicted(torch.stack(hidden), pressed.layers[0].keys.shape[2], torch.stack(positions))


def same_entries(whole: Tensor, left: Tensor) -> Tensor:
    """``(K, P, kept)``, from ``(1, K, P, D)`` and ``(1, K, kept, D)``: bitwise equality of vectors."""
    return (whole[0][:, :, None] == left[0][:, None]).all(dim=-1)


# ------------------------------------------------------------------------------------------------- one by one


@torch.no_grad()
def one_by_one_logprobs(
    model: PressableModel, tokens: Sequence[int], prefilled: int, name: str, num_scored: int
) -> list[float]:
    """Log-probabilities of the last tokens: prefill, then one token per forward with explicit positions."""
    cache = press_run(model, tokens[:prefilled], PRESSES[name]())
    first = cache.layers[0].keys.shape[2] if name in REROTATES else prefilled
    found = []
    for place in range(prefilled, len(tokens) - 1):
        logits = step_logits(model, cache, tokens[place], first + place - prefilled)
        found.append(logits.log_softmax(dim=-1)[tokens[place + 1]].item())
    clear_masks(model)
    return found[-num_scored:]


@torch.no_grad()
def one_by_one_greedy(model: PressableModel, context: Sequence[int], held: int, name: str, count: int) -> list[int]:
    """Greedy decoding, one token per forward, the held-back ones included."""
    prefilled, ids = len(context) - held, list(context)
    if held == 0:  # the first token comes from the full cache, as without this project
        ids.append(int(model.model(torch.tensor([ids])).logits[0, -1].argmax()))
    cache = press_run(model, context[:prefilled], PRESSES[name]())
    place, position = prefilled, cache.layers[0].keys.shape[2] if name in REROTATES else prefilled
    while len(ids) < len(context) + count:
        logits = step_logits(model, cache, ids[place], position)
        place, position = place + 1, position + 1
        if place == len(ids):
            ids.append(int(logits.argmax()))
    clear_masks(model)
    return ids[len(context) :]


def step_logits(model: PressableModel, cache: DynamicCache, token: int, position: int) -> Tensor:
    """One token over whatever the cache holds. PyTorch's attention needs no mask; for the eager one a zero that hides
    nothing keeps transformers from building its own."""
    is_eager = model.model.config._attn_implementation == "eager"
    out = model.model(
        torch.tensor([[token]]),
        past_key_values=cache,
        position_ids=torch.tensor([[position]]),
        attention_mask=torch.zeros(1, 1, 1, 1, dtype=model.model.dtype) if is_eager else None,
    )
    return out.logits[0, -1].float()


def probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> list[float]:
    """What sampling should follow, by sorting and adding up in plain Python."""
    weights = [math.exp(value / temperature) for value in logits.double().tolist()]
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    if top_k is not None:
        order = order[:top_k]
    if top_p is not None:
        total, reached, short = sum(weights[token] for token in order), 0.0, []
        for token in order:
            short.append(token)
            reached += weights[token] / total
            if reached >= top_p:
                break
        order = short
    total = sum(weights[token] for token in order)
    return [weights[token] / total if token in order else 0.0 for token in range(len(weights))]
