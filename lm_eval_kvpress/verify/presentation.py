"""Check how a model is presented to kvpress: its basis, its projections, its rotation.

The references are transformers' own forwards of the untouched copy, and tensors caught inside the real layers.

Letters in shape comments: T tokens, H heads, D head_dim, E hidden size.
"""

from __future__ import annotations

from typing import Any

import torch

from lm_eval_kvpress.harness.parity import rounding, worst
from lm_eval_kvpress.models.architectures import present
from lm_eval_kvpress.verify import dense_reference
from lm_eval_kvpress.verify.check import Check, Part
from lm_eval_kvpress.verify.subject import Subject, load_untouched


def check_basis(subject: Subject) -> Check:
    """Compare logits before and after the change of basis: in the dtype of the run, in float32, and in 16 bits."""
    tokens = subject.tokens(subject.max_length // 2)
    before, after = dense_reference.logits(subject.untouched, tokens), dense_reference.logits(subject.lm.model, tokens)
    parts = [_basis_part(before, after, subject.lm.model.dtype)]
    own = subject.lm.config.dtype
    half = own if own in (torch.float16, torch.bfloat16) else torch.bfloat16
    for dtype in sorted({torch.float32, half} - {subject.lm.model.dtype}, key=str):
        model = load_untouched(subject.loading, dtype)  # a third copy, gone when the loop goes on
        before = dense_reference.logits(model, tokens)
        if not before.isfinite().all():
            continue  # the checkpoint overflows in this dtype, in either basis
        present(model)  # changes the basis, where the architecture needs it
        parts.append(_basis_part(before, dense_reference.logits(model, tokens), dtype))
    return Check("basis", "the change of basis leaves the logits alone", tuple(parts))


def _basis_part(before: torch.Tensor, after: torch.Tensor, dtype: torch.dtype) -> Part:
    return Part(f"{_name(dtype)} logits, relative", relative(after, before), rounding(dtype))


@torch.inference_mode()
def check_projections(subject: Subject) -> Check:
    """Compare q, k and v of the projections that presses call with those inside the layer, before and after RoPE.

    Before it means at position 0, where no dim is turned. YaRN scales cos and sin there too, so both sides are rotated.
    """
    tokens = subject.tokens(subject.max_length // 4)
    model, positions = subject.lm.model, list(range(len(tokens)))
    differences: dict[str, list[float]] = {}
    with subject.lm.press_model.presented():
        for when, places in (("before", [0] * len(tokens)), ("after", positions)):
            layers = dense_reference.attended(model, tokens, places)
            for attention, inside in zip(subject.lm.press_model.attentions, layers, strict=True):
                queries, keys, values = project(attention, inside.hidden)
                queries, keys = rotate(model, inside.hidden, places, queries, keys)
                if when == "after":
                    differences.setdefault("v", []).append(relative(values, inside.values))
                differences.setdefault(f"q {when} RoPE", []).append(relative(queries, inside.queries))
                differences.setdefault(f"k {when} RoPE", []).append(relative(keys, inside.keys))
    parts = tuple(
        Part(f"{what} of {len(found)} layers, relative", worst(found), subject.rounding)
        for what, found in differences.items()
    )
    return Check("projections", "projection views give the layer's own q, k and v", parts)


@torch.inference_mode()
def check_rotation(subject: Subject) -> Check:
    """Rotate whole heads with the model's frequencies, as presses do, and compare q·k with the untouched layer's own.

    Both sides get the untouched layer's input, at the first positions and at the last ones of the model. q·k is the
    same in either basis, and the reference went through transformers' `apply_rotary_pos_emb` inside the layer.
    """
    tokens = subject.tokens(subject.max_length // 4)
    last = max(subject.lm.max_length, len(tokens))
    claim = "rotating whole heads is the model's own (partial) RoPE"
    differences: dict[str, list[float]] = {}
    model, attentions = subject.lm.model, subject.lm.press_model.attentions
    with subject.lm.press_model.presented():
        head_dim: Any = attentions[0].head_dim
        num_left_out = head_dim - 2 * model.base_model.rotary_emb.inv_freq.numel()
        if num_left_out:
            return Check("rotation", claim, (Part("dims of a head that no frequency is there for", num_left_out, 0),))
        for end in dict.fromkeys((len(tokens), last)):
            positions = list(range(end - len(tokens), end))
            layers = dense_reference.attended(subject.untouched, tokens, positions)
            for attention, inside in zip(attentions, layers, strict=True):
                queries, keys, _ = project(attention, inside.hidden)
                queries, keys = rotate(model, inside.hidden, positions, queries, keys)
                groups = queries.shape[0] // keys.shape[0]
                scores = queries.float() @ keys.float().repeat_interleave(groups, dim=0).mT  # (H, T, T)
                found = differences.setdefault(f"positions {positions[0]} to {positions[-1]}", [])
                found.append(relative(scores, inside.scores()))
    parts = tuple(
        Part(f"q.k at {where}, relative", worst(found), subject.rounding) for where, found in differences.items()
    )
    return Check("rotation", claim, parts)


def project(attention: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values, each ``(H, T, D)``, by the modules that presses call, before RoPE.

    Args:
        hidden: the attention's input, ``(T, E)``.
    """
    if not hasattr(attention, "q_proj"):  # Phi-3: kvpress cuts the rows of the fused projection as the model does
        rows = attention.qkv_proj(hidden)
        groups = attention.num_key_value_groups
        width = rows.shape[-1] // (groups + 2)
        projected = rows.split([groups * width, width, width], dim=-1)
    else:
        projected = tuple(getattr(attention, f"{part}_proj")(hidden) for part in "qkv")
    heads = [rows.view(len(hidden), -1, attention.head_dim) for rows in projected]  # (T, H, D)
    for index, norm in enumerate(("q_norm", "k_norm")):
        if hasattr(attention, norm):  # Qwen3
            heads[index] = getattr(attention, norm)(heads[index])
    queries, keys, values = (by_head.transpose(0, 1) for by_head in heads)
    return queries, keys, values


def rotate(model: Any, like: torch.Tensor, positions: list[int], *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """States ``(H, T, D)`` rotated over their whole width by the model's frequencies, as presses rotate them."""
    cos, sin = model.base_model.rotary_emb(like, torch.tensor([positions], device=like.device))  # (1, T, D)
    turned = []
    for state in states:
        first, second = state.chunk(2, dim=-1)
        turned.append(state * cos + torch.cat([-second, first], dim=-1) * sin)
    return tuple(turned)


def relative(found: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest difference over the largest number of the reference; the difference itself where all are zero."""
    difference, largest = ((found.float() - reference.float()).abs().max().item(), reference.float().abs().max().item())
    return difference / largest if largest else difference


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
