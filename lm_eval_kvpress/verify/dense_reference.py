"""The reference of the checks: whole sequences, no cache, attention and its mask written out in full.

Imports nothing of ours on purpose: what is compared with it must not share a line with it. A model as transformers
loaded it runs one forward over a whole sequence. Its attention is replaced by scores, mask, softmax and values spelt
out, so that each layer can hide entries from later tokens and can say what it attended with.

Letters in shape comments: T tokens, P prefilled tokens, H query heads, G key-value heads, D head_dim, E hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

IMPLEMENTATION = "lm_eval_kvpress_dense"


@dataclass(frozen=True, eq=False)
class Attended:
    """What one layer attended with, after RoPE.

    Attributes:
        hidden: ``(T, E)``, what went into the attention module.
        queries: ``(H, T, D)``.
        keys, values: ``(G, T, D)``.
        weights: ``(H, T, T)``, attention weights.
    """

    hidden: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    weights: torch.Tensor

    def scores(self) -> torch.Tensor:
        """``(H, T, T)``, q·k: the same in every basis of the head that changes q and k alike."""
        groups = self.queries.shape[0] // self.keys.shape[0]
        return self.queries.float() @ self.keys.float().repeat_interleave(groups, dim=0).mT


@dataclass
class _Probe:
    """What the attention function of one forward is given and what it records, by layer."""

    evicted: Sequence[torch.Tensor] | None = None
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    attended: dict[int, Attended] = field(default_factory=dict)
    records: bool = False

    def take_hidden(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.hidden[module.layer_idx] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


@torch.inference_mode()
def log_probabilities(
    model: PreTrainedModel, tokens: Sequence[int], evicted: Sequence[torch.Tensor] | None = None
) -> torch.Tensor:
    """Log-probabilities of all tokens after the first, ``(T - 1,)``, in nats.

    Args:
        evicted: ``(G, P)`` per layer, True for the entries of the first P tokens that later tokens must not see. The
            first P tokens see each other in full, since a press evicts after the prefill.
    """
    targets = torch.tensor(list(tokens[1:]))
    return distributions(model, tokens, evicted).gather(1, targets[:, None])[:, 0]


@torch.inference_mode()
def distributions(
    model: PreTrainedModel, tokens: Sequence[int], evicted: Sequence[torch.Tensor] | None = None
) -> torch.Tensor:
    """Log-probabilities of what follows each token but the last, ``(T - 1, V)``, in nats.

    Args:
        evicted: as for `log_probabilities`.
    """
    with _written_out(model, _Probe(evicted)):
        logits = model(_batch(model, tokens), use_cache=False).logits[0, :-1]
    return logits.float().log_softmax(dim=-1).cpu()


@torch.inference_mode()
def attended(model: PreTrainedModel, tokens: Sequence[int], positions: Sequence[int] | None = None) -> list[Attended]:
    """What every layer attends with in a causal forward.

    Args:
        positions: of the tokens; by default their places. With all positions zero RoPE turns nothing; what scales
            cos and sin (YaRN) still scales.
    """
    probe = _Probe(records=True)
    where = list(range(len(tokens))) if positions is None else list(positions)
    with _written_out(model, probe):
        model(_batch(model, tokens), position_ids=_batch(model, where), use_cache=False)
    return [probe.attended[layer] for layer in sorted(probe.attended)]


@torch.inference_mode()
def logits(model: PreTrainedModel, tokens: Sequence[int]) -> torch.Tensor:
    """Logits of a plain forward with the model's own attention, ``(T, V)`` in float32."""
    return model(_batch(model, tokens), use_cache=False).logits[0].float().cpu()


def _batch(model: PreTrainedModel, numbers: Sequence[int]) -> torch.Tensor:
    return torch.tensor([list(numbers)], device=model.get_input_embeddings().weight.device)


@contextmanager
def _written_out(model: PreTrainedModel, probe: _Probe) -> Iterator[None]:
    """Replace the model's attention by `_attention`; its own implementation comes back on exit."""
    modules = [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "scaling")]
    before = model.config._attn_implementation
    hooks = [module.register_forward_pre_hook(probe.take_hidden, with_kwargs=True) for module in modules]
    for module in modules:
        module.__dict__["dense_probe"] = probe
    try:
        model.set_attn_implementation(IMPLEMENTATION)
        yield
    finally:
        model.set_attn_implementation(before)
        for module, hook in zip(modules, hooks, strict=True):
            hook.remove()
            del module.__dict__["dense_probe"]


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,  # by position: kvpress wraps every attention function that is there when it is imported
    *,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal softmax attention over one whole sequence; transformers' mask is ignored."""
    probe: _Probe = module.__dict__["dense_probe"]
    num_tokens, groups = query.shape[2], query.shape[1] // key.shape[1]
    assert query.shape[0] == 1 and key.shape[2] == num_tokens, (query.shape, key.shape)
    visible = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=query.device).tril()[None]  # (1, T, T)
    if probe.evicted is not None:
        evicted = probe.evicted[module.layer_idx].to(query.device).repeat_interleave(groups, dim=0)  # (H, P)
        visible = visible.repeat(query.shape[1], 1, 1)  # (H, T, T)
        visible[:, evicted.shape[1] :, : evicted.shape[1]] &= ~evicted[:, None]
    by_head = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ by_head[0].mT * scaling).float().masked_fill(~visible, -torch.inf)
    weights = scores.softmax(dim=-1).to(query.dtype)
    if probe.records:
        hidden = probe.hidden[module.layer_idx][0]
        probe.attended[module.layer_idx] = Attended(hidden, query[0], key[0], value[0], weights[0])
    return (weights @ by_head[1]).transpose(1, 2).contiguous(), weights


AttentionInterface.register(IMPLEMENTATION, _attention)
