"""Presses that act while text is generated: names, arguments, and what they keep.

``decoding:PRESS`` holds a budget, ``compression_ratio_decoding:PRESS`` a share of what was seen, ``cam:PRESS`` a budget
into which it merges what it evicts; ``prefill_decoding:PREFILL+...`` begins with a compressed prompt. Knows press names
and arguments. Does not know models or text. The engine's `decode_budget` does what is specified here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.presses import decodable
from lm_eval_kvpress.presses.arguments import BUDGET, RATIO
from lm_eval_kvpress.presses.cam import DEFAULT_MERGE_BUDGET
from lm_eval_kvpress.presses.names import CAM, DECODING, NONE, PREFILL_DECODING, RATIO_DECODING
from lm_eval_kvpress.presses.parse import parse_press
from lm_eval_kvpress.presses.spec import PressSpec

DEFAULT_INTERVAL = 128
"""Tokens produced between two compressions."""

DEFAULT_DECODING_RATIO = 0.5
"""kvpress's own: the share of all tokens seen that is evicted."""


@dataclass(frozen=True)
class DecodingSizes:
    """How much is kept, as the user typed it; None where nothing was typed.

    Attributes:
        target_size: entries that every layer keeps.
        compression_interval: tokens produced between two compressions.
        target_compression_ratio: the share of all tokens seen that is evicted.
        merge_budget: kept entries among which an evicted value is shared out.
    """

    target_size: int | None = None
    compression_interval: int | None = None
    target_compression_ratio: float | None = None
    merge_budget: int | None = None


@dataclass(frozen=True)
class DecodingSpec:
    """A press that holds a budget while tokens are produced.

    Attributes:
        press: what scores the entries.
        interval: tokens produced between two compressions.
        target_size: entries that every layer of every row keeps; None where ``share_evicted`` says it.
        share_evicted: the share of all tokens seen that is evicted, instead.
        merge_budget: kept entries among which CaM shares out an evicted value; None without CaM.
    """

    press: PressSpec
    interval: int
    target_size: int | None = None
    share_evicted: float | None = None
    merge_budget: int | None = None

    @property
    def name(self) -> str:
        """As typed behind ``decoding:``."""
        wrapper = CAM if self.merge_budget is not None else RATIO_DECODING if self.share_evicted is not None else ""
        return f"{wrapper}:{self.press.name}" if wrapper else self.press.name

    @property
    def full_name(self) -> str:
        """As typed, where the prefill has no press."""
        return self.name if self.name != self.press.name else f"{DECODING}:{self.name}"

    @property
    def alpha_safeguard(self) -> float | None:
        """Where heads share what is kept, the share of it that each head has for itself; None where none do."""
        return self.press.arguments["alpha_safeguard"] if self.press.rows[0].name == "adakv" else None

    @property
    def num_hidden(self) -> int:
        """Hidden states of the newest tokens that the press looks at."""
        return decodable.num_hidden(self.press, self.interval)

    @property
    def num_protected(self) -> int:
        """Entries that always stay."""
        return decodable.num_protected(self.press)

    @property
    def reads_attention(self) -> bool:
        """Whether entries are scored by the attention weights that they received."""
        return decodable.reads_attention(self.press)

    @property
    def adds_up_attention(self) -> bool:
        """Whether attention weights are added up while text is generated, which only eager attention returns."""
        return self.reads_attention or self.merge_budget is not None

    @property
    def attn_implementation(self) -> str | None:
        """The attention implementation that it needs, or None if any will do."""
        return "eager" if self.adds_up_attention else None

    @property
    def draws(self) -> bool:
        """Whether it draws random numbers, so that rows are compressed one by one, each from its own seed."""
        return self.merge_budget is not None or not self.press.batches

    @property
    def reads_position(self) -> bool:
        """Whether the position of the next token matters beyond the queries of the newest ones."""
        return decodable.expects_positions(self.press)

    def num_kept(self, num_seen: int) -> int:
        """Entries that stay of a text of so many tokens."""
        if self.share_evicted is None:
            assert self.target_size is not None
            return self.target_size
        num_kept = max(1, int(num_seen * (1 - self.share_evicted)))
        return num_kept if num_kept > self.num_protected else num_seen  # left alone while all would be protected

    def build(self, num_entries: int, num_kept: int) -> Any:
        """A fresh press that scores a cache of so many entries, of which so many stay; of adakv, what it wraps."""
        arguments = {name: value for name, value in self.press.arguments.items() if name not in (RATIO, BUDGET)}
        press: Any = PressSpec(self.press.name, {BUDGET: num_kept, **arguments}).build(num_entries)
        return press if self.alpha_safeguard is None else press.press

    def describe(self) -> dict[str, Any]:
        """Return its arguments, for the record; JSON can hold it."""
        arguments = {name: value for name, value in self.press.arguments.items() if name not in (RATIO, BUDGET)}
        sizes = {
            "target_size": self.target_size,
            "compression_interval": self.interval,
            "target_compression_ratio": self.share_evicted,
            "merge_budget": self.merge_budget,
        }
        return arguments | {name: size for name, size in sizes.items() if size is not None}


def split_name(name: str) -> tuple[str, str | None]:
    """Split a name into the press of the prefill and what acts while decoding, if anything does.

    Raises:
        UsageError: one line, for half a name.
    """
    first, _, rest = name.partition(":")
    if first in (DECODING, CAM, RATIO_DECODING):
        if not rest:
            raise UsageError(f"press={first} wraps another press, as in {first}:knorm")
        return NONE, rest if first == DECODING else name
    if first != PREFILL_DECODING:
        return name, None
    prefill, plus, decoding = rest.rpartition("+")
    if not (prefill and plus and decoding):
        raise UsageError(f"press={name}: give two presses, as in prefill_decoding:snapkv+knorm")
    return prefill, decoding


def split_arguments(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split arguments into those of the prefill's press and of the decoding one, written ``decoding.n_sink=8``."""
    prefix = f"{DECODING}."
    decoding = {key.removeprefix(prefix): value for key, value in arguments.items() if key.startswith(prefix)}
    return {key: value for key, value in arguments.items() if not key.startswith(prefix)}, decoding


def parse_decoding(prefill: PressSpec, name: str, arguments: Mapping[str, Any], sizes: DecodingSizes) -> DecodingSpec:
    """Check a decoding press.

    Args:
        prefill: the press of the prefill.
        name, arguments: the decoding press, as `split_name` and `split_arguments` give it.
        sizes: how much is kept.

    Raises:
        UsageError: one line that says what is wrong and what to do.
    """
    first, _, rest = name.partition(":")
    kind, press = (first, rest) if first in (CAM, RATIO_DECODING) else (DECODING, name)
    if not press:
        raise UsageError(f"press={first} wraps another press, as in {first}:knorm")
    ratio = _ratio(kind, press, sizes)
    if {RATIO, BUDGET} & arguments.keys():
        raise UsageError("a decoding press keeps target_size entries: leave decoding.compression_ratio out")
    interval = sizes.compression_interval or DEFAULT_INTERVAL
    size = {RATIO: ratio} if sizes.target_size is None else {BUDGET: sizes.target_size}
    spec = parse_press(press, {**arguments, **size})
    decodable.check_decodable(spec)
    decodable.check_sizes(spec, sizes.target_size, interval)
    found = DecodingSpec(spec, interval, sizes.target_size, ratio, _merge_budget(kind, spec, sizes))
    _check_prefill(prefill, found)
    return found


def _ratio(kind: str, press: str, sizes: DecodingSizes) -> float | None:
    if kind == RATIO_DECODING:
        if sizes.target_size is not None:
            raise UsageError(f"press={kind}:{press} keeps a share of what was seen: leave target_size out")
        return DEFAULT_DECODING_RATIO if sizes.target_compression_ratio is None else sizes.target_compression_ratio
    if sizes.target_compression_ratio is not None:
        raise UsageError(f"target_compression_ratio belongs to press={RATIO_DECODING}:PRESS, not to {kind}:{press}")
    if sizes.target_size is None:
        raise UsageError(f"press={kind}:{press} needs target_size=N, the entries that every layer keeps")
    return None


def _merge_budget(kind: str, spec: PressSpec, sizes: DecodingSizes) -> int | None:
    if kind != CAM:
        if sizes.merge_budget is not None:
            raise UsageError(f"merge_budget belongs to press={CAM}:PRESS")
        return None
    if spec.rows[0].name == "adakv" or decodable.reads_attention(spec):
        raise UsageError(
            f"press={CAM}:{spec.name}: kvpress merges into what all heads keep, and gives the press no attention "
            f"weights; use {CAM}:knorm, or another press that scores tokens"
        )
    if spec.rows[0].name == "criticalkv":
        raise UsageError(
            f"press={CAM}:{spec.name}: cam averages scores over heads, and criticalkv's first stage sets them to the "
            f"largest number, so that their sums are infinite; use {CAM}:{spec.rows[-1].name}, or decoding:{spec.name}"
        )
    return sizes.merge_budget or DEFAULT_MERGE_BUDGET


def _check_prefill(prefill: PressSpec, decoding: DecodingSpec) -> None:
    """Refuse two presses that cannot follow each other."""
    single = decodable.scores_single_heads(decoding.press) and decoding.merge_budget is None
    if prefill.masks and not single:
        raise UsageError(
            f"press={prefill.name} hides entries head by head, and {decoding.name} scores all heads alike: use "
            "another one, such as knorm or snapkv, while text is generated"
        )
    if not decodable.keeps_alike(prefill) and (decodable.averages_heads(decoding.press) or decoding.merge_budget):
        raise UsageError(
            f"press={prefill.name} lets heads keep different tokens, and {decoding.name} averages over heads place by "
            "place: use another one, such as knorm or snapkv, while text is generated, or prefill under streaming_llm"
        )
    needed = {spec.attn_implementation for spec in (prefill, decoding)} - {None}
    if len(needed) > 1:
        raise UsageError(
            f"press={prefill.name} needs {prefill.attn_implementation} attention and {decoding.name} needs "
            f"{decoding.attn_implementation}: use another one of them"
        )
