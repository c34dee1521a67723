"""Check what a press keeps: how many entries of each layer, which ones, and whether the record says so.

The references are the papers' formulas (`press_formulas`) on what the untouched copy attends with (`dense_reference`).

Letters in shape comments: G key-value heads, P prefilled tokens, T kept entries, D head_dim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from lm_eval_kvpress.cache.compressed import CachedLayer, CompressedCache
from lm_eval_kvpress.engine.prefill import prefill
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.harness.parity import worst
from lm_eval_kvpress.verify import dense_reference, press_formulas
from lm_eval_kvpress.verify.check import Check, Part
from lm_eval_kvpress.verify.subject import Subject, compress


def check_kept(subject: Subject) -> Check:
    """Check each press's kept entries, and that presses meet the layers in order."""
    parts: list[Part] = []
    context = subject.tokens(subject.max_length // 2)
    seen = context[:-1]
    reference = dense_reference.attended(subject.untouched, seen)
    full = full_cache(subject.lm.model, seen)
    for press in subject.presses():
        lm = subject.under(press)
        cache, _ = compress(lm, context)
        parts.append(_count_part(lm, cache, len(seen)))
        parts += _choice_parts(subject, lm, cache, full, reference)
        parts.append(_record_part(lm, cache, len(seen)))
    parts += _fallback_parts(subject, context)
    parts.append(Part("layers that a press meets out of order", float(_layers_out_of_order(subject)), 0))
    return Check("kept", "each press keeps what its paper says, in every layer, and the record says so", tuple(parts))


def _count_part(lm: KVPress, cache: CompressedCache, num_tokens: int) -> Part:
    press = lm.session.settings.press
    expected = press_formulas.kept_counts(press.name, press.arguments, num_tokens, len(cache.layers))
    (kept,) = cache.kept()
    wrong = worst([abs(a - b) for a, b in zip(kept, expected, strict=True)])
    budgets = "-".join(str(count) for count in dict.fromkeys(expected))
    return Part(f"{press.name}: entries per layer more or fewer than {budgets} of {num_tokens}", wrong, 0)


def _record_part(lm: KVPress, cache: CompressedCache, num_tokens: int) -> Part:
    (kept,) = cache.kept()
    recorded = lm.describe()["tasks"]["verify"]["contexts_pressed"]
    errors = [abs(a - b) for a, b in zip(kept, recorded["kept_tokens_per_layer"], strict=True)]
    errors.append(abs(sum(kept) / len(kept) / num_tokens - recorded["kept_share"]))
    return Part(f"{lm.session.settings.press.name}: kept entries misreported", worst(errors), 1e-3)


def _fallback_parts(subject: Subject, context: Sequence[int]) -> list[Part]:
    """PyramidKV, its smallest budget below its window: kvpress runs SnapKV then, and the record must say so."""
    lm = subject.under("pyramidkv", compression_ratio=0.9)
    cache, _ = compress(lm, context)
    named = any("fell back to snapkv" in note for note in lm.describe()["tasks"]["verify"]["notes"])
    return [
        _count_part(lm, cache, len(context) - 1),
        Part("pyramidkv: fall-backs to snapkv that the record does not name", float(not named), 0),
    ]


def _choice_parts(
    subject: Subject,
    lm: KVPress,
    cache: CompressedCache,
    full: DynamicCache,
    reference: Sequence[dense_reference.Attended],
) -> list[Part]:
    press = lm.session.settings.press
    regrets = []
    for layer, entries, inside in zip(cache.layers, full.layers, reference, strict=True):
        scores = press_formulas.scores(press.name, press.arguments, inside.weights, inside.keys)
        if scores is None:
            return []
        regrets.append(press_formulas.regret(scores, evicted_entries(layer, entries.keys[0], entries.values[0])))
    return [Part(f"{press.name}: best evicted entry above worst kept one, nats", worst(regrets), subject.tolerance)]


def _layers_out_of_order(subject: Subject) -> int:
    """Count the layers that a press meets under another index, or as another module, than the model has there."""
    met: list[tuple[Any, torch.nn.Module]] = []

    @contextlib.contextmanager
    def probe(model: PreTrainedModel) -> Iterator[None]:
        def meet(module: torch.nn.Module, args: object, kwargs: dict[str, object], output: object) -> None:
            met.append((module.layer_idx, module))

        hooks = [layer.self_attn.register_forward_hook(meet, with_kwargs=True) for layer in model.model.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    prefill(subject.lm.press_model, torch.tensor([subject.tokens(8)]), probe)
    attentions = subject.lm.press_model.attentions
    expected = list(enumerate(attentions))
    return sum(a != b for a, b in zip(met, expected, strict=False)) + abs(len(met) - len(expected))


@torch.inference_mode()
def full_cache(model: PreTrainedModel, tokens: Sequence[int]) -> DynamicCache:
    """All entries of a context, by a plain forward of transformers."""
    cache = DynamicCache()
    model(torch.tensor([list(tokens)], device=model.device), past_key_values=cache, use_cache=True)
    return cache


def evicted_entries(layer: CachedLayer, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Which entries of the full cache are not in a compressed layer of one row, ``(G, P)``.

    A kept entry is recognised by its key and value: it is the closest one of the full cache.

    Args:
        keys, values: of the full cache, ``(G, P, D)``.
    """
    entries = torch.cat([keys, values], dim=-1).float()
    kept = torch.cat([layer.keys[0], layer.values[0]], dim=-1).float()
    distances = torch.cdist(kept, entries, compute_mode="donot_use_mm_for_euclid_dist")  # large keys would cancel
    places = distances.argmin(dim=-1)  # (G, T)
    if layer.hidden is not None:  # a masking press keeps the entries and hides them, per head
        evicted = layer.hidden[0].expand(len(keys), -1)
        return torch.ones_like(evicted).scatter(1, places, evicted)
    return torch.ones(entries.shape[:2], dtype=torch.bool, device=keys.device).scatter(1, places, False)
