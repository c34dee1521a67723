"""Check what ``kv_quant`` stores: every entry within half a step, as few bytes as promised, and read as it was stored.

Steps are reckoned here from the full-precision entries. What is scored and generated is compared with transformers' own
forwards of one token at a time over the same unpacked entries.

Letters in shape comments: G key-value heads, T kept entries, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lm_eval_kvpress.cache.compressed import CachedLayer, CompressedCache
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.harness.parity import worst
from lm_eval_kvpress.verify.check import Check, Part
from lm_eval_kvpress.verify.scores import LEAST_EFFECT, NUM_CONTINUED, branch_logprobs, generated, step_logprobs
from lm_eval_kvpress.verify.subject import Subject, compress

GROUP = 64
COARSER = 2 ** (1 / 8)
"""Compact scales are rounded up to the next eighth of an octave."""

BITS = {"int8": 8, "int4": 4, "int2": 2}
MOST_BITS = {"int8": 8.4, "int4": 4.4, "int2": 2.3, "fp8": 8.0}
"""Per stored number: its code, and 24 bits per group for scale and zero, 16 beside int2."""


def check_packing(subject: Subject) -> Check:
    """Pack the cache of a context under a press and without one."""
    context, continuation = subject.tokens(subject.max_length // 2), subject.tokens(NUM_CONTINUED, seed=6)
    parts, moved = [], []
    for press in ("none", "snapkv"):
        lm = subject.under(press)
        full, _ = compress(lm, context)
        for name in MOST_BITS:
            packing = subject.under(press, kv_quant=name, kv_group=GROUP)
            cache, query = compress(packing, context)
            pairs = list(zip(full.layers, cache.layers, strict=True))
            errors = [_error_in_steps(one, other, name, subject.rounding) for one, other in pairs]
            parts.append(Part(f"{press}, {name}: largest error in steps", worst(errors), 0.51))
            bits = worst([_bits_per_number(layer, name) for layer in cache.layers])
            parts.append(Part(f"{press}, {name}: bits per number", bits, MOST_BITS[name]))
            found = branch_logprobs(packing, cache, query, continuation)
            new, of_new = generated(packing, cache, context, query)
            differences = [
                (logprobs - _stepwise(lm, cache, query, tokens)).abs().max().item()
                for tokens, logprobs in ((continuation, found), (new, of_new))
            ]
            what = "nats from its own entries, scored and generated"
            parts.append(Part(f"{press}, {name}: {what}", worst(differences), subject.tolerance))
            moved.append((found - branch_logprobs(lm, full, query, continuation)).abs().max().item())
    parts.append(Part("nats by which packing moves a score, at most", max(moved), LEAST_EFFECT, at_least=True))
    return Check("packing", "kv_quant stores entries within half a step, in few bits, and these are read", tuple(parts))


def _stepwise(lm: KVPress, cache: CompressedCache, query: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
    """Log-probabilities of tokens behind the query, ``(n,)``, fed one at a time over the unpacked entries."""
    steps = step_logprobs(lm.model, cache, [*query, *tokens])[len(query) - 1 :]
    return steps[: len(tokens)].gather(1, torch.tensor(tokens)[:, None])[:, 0]


def _bits_per_number(layer: CachedLayer, name: str) -> float:
    """Over all places of whole blocks."""
    num_places = -(-layer.num_entries // GROUP) * GROUP if name in BITS else layer.num_entries
    return 8 * layer.num_bytes / (num_places * layer.entry_bytes / layer.dtype.itemsize)


def _error_in_steps(full: CachedLayer, packed: CachedLayer, name: str, rounding: float) -> float:
    """How far an entry is from what it was, in steps of its group, beyond what reading it in its dtype rounds."""
    largest = []
    for one, other, by_channel in ((full.keys, packed.keys, True), (full.values, packed.values, False)):
        before, after = one[0].double(), other[0].double()  # (G, T, D)
        if name in BITS:
            steps = _steps(before, BITS[name], by_channel=by_channel)
        else:
            before = before.clamp(-448, 448)  # the farthest that it stores
            steps = _steps_of_floats(before)
        largest.append(((after - before).abs() - rounding * before.abs()).div(steps).max().item())
    return worst(largest)


def _steps_of_floats(entries: torch.Tensor) -> torch.Tensor:
    """Between neighbours in E4M3, which has three bits after the point and exponents from -6 on."""
    return 2 ** (entries.abs().clamp(min=2**-6).log2().floor() - 3)


def _steps(entries: torch.Tensor, bits: int, *, by_channel: bool) -> torch.Tensor:
    """The widest step that the group of each number may have, ``(G, T, D)``; groups are counted from the end."""
    heads, num_entries, dim = entries.shape
    steps = torch.empty_like(entries)
    farthest = 32_767 if bits == 8 else 127
    for end in range(num_entries, 0, -GROUP):
        block = slice(max(0, end - GROUP), end)
        numbers = entries[:, block] if by_channel else entries[:, block].reshape(heads, -1, 1)
        for last in range(numbers.shape[1], 0, -GROUP):
            group = slice(max(0, last - GROUP), last)
            low, high = numbers[:, group].amin(dim=1), numbers[:, group].amax(dim=1)  # (G, D or 1)
            step = COARSER * torch.maximum((high - low) / (2**bits - 1), low.abs() / farthest).clamp(min=2**-18)
            if by_channel:
                steps[:, block] = step[:, None]
            else:
                steps[:, block].view(heads, -1)[:, group] = step
    return steps
