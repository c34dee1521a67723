"""What kvpress's ``DecodingPress`` keeps of a story, token by token, and what this package keeps of it.

python -m scripts.studies.press_table calibrate
python -m scripts.studies.decoding_agreement

Both sides have one text, float32 and the built-in checkpoint. For presses that run here, the share of kvpress's entries
that are kept here, too; for those that are refused, what kvpress's hook does with them. Writes the second table of
docs/experiments/decoding_presses.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import kvpress
import torch
from transformers import DynamicCache

from lm_eval_kvpress.cache.compressed import CompressedCache
from lm_eval_kvpress.engine.decode_budget import BudgetKeeper
from lm_eval_kvpress.engine.decode_scoring import predict_while_compressing
from lm_eval_kvpress.engine.prefill import prefill_padded
from lm_eval_kvpress.engine.scoring import Pack
from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.presses.decoding import DecodingSizes, DecodingSpec, parse_decoding
from lm_eval_kvpress.presses.parse import parse_press
from lm_eval_kvpress.tables import markdown_table
from scripts.machine import ROOT
from scripts.studies import press_table
from scripts.studies.decoding_presses import PAGE
from scripts.studies.press_pages import replaced

STORY = ROOT / "tasks" / "demo" / "stories" / "short_chain.txt"
TARGET, INTERVAL, NUM_COMPRESSIONS = 128, 32, 6
CASES: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(("knorm", "keydiff", "tova", "streaming_llm", "expected_attention", "cur", "cap"), {}),
    **{name: press_table.statistics_of(name) for name in ("qfilter", "expected_attention_stats", "kvzap")},
    **dict.fromkeys(("snapkv", "rkv", "criticalkv:snapkv", "pyramidkv"), {"window_size": 16}),
    "lagkv": {"lag_size": 48},
    **dict.fromkeys(("criticalkv:cap", "criticalkv:tova", "leverage", "noncausal", "compactor", "finch"), {}),
}
KVPRESS_ENDS_WITH = (AssertionError, RuntimeError, IndexError, ValueError, TypeError)

Entries = list[torch.Tensor]
"""Keys of each layer, ``(H, n, D)``."""


def main() -> None:
    lm = KVPress(pretrained="builtin", dtype="float32", device="cpu")
    tokens = lm.tok_encode(STORY.read_text(encoding="utf-8"))[: TARGET + NUM_COMPRESSIONS * INTERVAL + 1]
    rows = [(f"`{name}`", *compared(lm, name, arguments, tokens)) for name, arguments in CASES.items()]
    found = markdown_table(("press", "after 1", f"after {NUM_COMPRESSIONS}", "kvpress's hook", "here"), rows)
    PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), "agreement", found), encoding="utf-8")


def compared(lm: KVPress, name: str, arguments: Mapping[str, Any], tokens: Sequence[int]) -> tuple[str, ...]:
    """Shares of kvpress's entries that are kept here, what its hook did, and whether the press runs here."""
    base: Any = parse_press(name, {**arguments, "compression_ratio": 0.0}).for_question(16).build(400)
    with lm.press_model.in_use(), torch.inference_mode():
        try:
            theirs = kept_by_kvpress(lm, base, tokens)
        except KVPRESS_ENDS_WITH as error:
            return "-", "-", f"{type(error).__name__}: {str(error).strip().splitlines()[0]}", _refusal(name, arguments)
        if refusal := _refusal(name, arguments):
            return "-", "-", f"keeps {_sizes(theirs[-1])} entries", refusal
        ours = kept_here(lm, spec_of(name, arguments), tokens)
    shares = [share(*sides) for sides in zip(theirs, ours, strict=True)]
    return f"{100 * shares[0]:.0f} %", f"{100 * shares[-1]:.0f} %", f"keeps {_sizes(theirs[-1])} entries", "runs"


def spec_of(name: str, arguments: Mapping[str, Any]) -> DecodingSpec:
    return parse_decoding(parse_press("none"), name, arguments, DecodingSizes(TARGET, INTERVAL))


def _refusal(name: str, arguments: Mapping[str, Any]) -> str:
    """Empty where the press runs here."""
    try:
        spec_of(name, arguments)
    except UsageError:
        return "refused"
    return ""


def _sizes(layers: Entries) -> str:
    """Entries of the smallest and the largest layer."""
    sizes = [of_layer.shape[1] for of_layer in layers]
    return str(sizes[0]) if len(set(sizes)) == 1 else f"{min(sizes)} to {max(sizes)}"


def share(theirs: Entries, ours: Entries) -> float:
    """Of kvpress's entries, those that are kept here, too."""
    common = sum(_num_common(*pair) for pair in zip(theirs, ours, strict=True))
    return common / sum(of_layer.shape[0] * of_layer.shape[1] for of_layer in theirs)


def _num_common(one: torch.Tensor, other: torch.Tensor) -> int:
    """Entries ``(H, n, D)`` of one layer that stand in both."""
    return int((torch.cdist(one.double(), other.double()).min(dim=-1).values < 1e-3).sum())


def kept_by_kvpress(lm: KVPress, base: Any, tokens: Sequence[int]) -> list[Entries]:
    """What kvpress's hook leaves, after each compression."""
    press, model, cache, kept = kvpress.DecodingPress(base, INTERVAL, TARGET), lm.press_model, DynamicCache(), []
    with model.presented(), press(model.model):
        model.model(torch.tensor([tokens[:TARGET]]), past_key_values=cache)
        for place in range(TARGET, len(tokens) - 1):
            model.model(
                torch.tensor([[tokens[place]]]),
                past_key_values=cache,
                position_ids=torch.tensor([[place]]),
                cache_position=torch.tensor([place]),
            )
            if (place + 1 - TARGET) % INTERVAL == 0:
                kept.append([layer.keys[0].clone() for layer in cache.layers])
    return kept


def kept_here(lm: KVPress, spec: DecodingSpec, tokens: Sequence[int]) -> list[Entries]:
    """What this package keeps, after each compression."""
    kept, model = list[Entries](), lm.press_model
    keeper = _Noting(model, spec, [0])
    keeper.kept = kept
    cache = prefill_padded(model, [tokens[:TARGET]])
    predict_while_compressing(model, cache, [Pack((tokens[TARGET],), ((*tokens[TARGET + 1 :], 0, 0),))], keeper)
    return kept


class _Noting(BudgetKeeper):
    """Notes what each compression leaves."""

    kept: list[Entries]

    def compress(self, cache: CompressedCache) -> CompressedCache:
        compressed = super().compress(cache)
        self.kept.append([layer.keys[0].clone() for layer in compressed.layers])
        return compressed


if __name__ == "__main__":
    main()
