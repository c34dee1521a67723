"""A press name and flat arguments to a fresh press, described for the record.

A name is a press, a wrapper and what it wraps (``adakv:snapkv``, ``key_rerotation:criticalkv:knorm``), or presses one
after the other (``composed:snapkv+think``); the grammar has neither ``,`` nor ``=``, at which lm-eval splits. Does not
know models or text. `press_catalog` holds the table of presses.

``compression_ratio`` is, as in kvpress, the fraction of tokens **removed**.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from kvpress import BasePress

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.presses.arguments import BOUNDS, arguments_of, parse_number
from lm_eval_kvpress.presses.catalog import (
    DEFAULT_INTERVAL,
    REQUIRED,
    ROWS,
    STANDING,
    UNSUPPORTED,
    PerLayerPress,
    Row,
    check_number_of_ratios,
)
from lm_eval_kvpress.presses.names import NONE, Part, parse_name, resolve, why_not_wrapped
from lm_eval_kvpress.presses.suggest import near

RATIO, BUDGET, RATIOS = "compression_ratio", "kv_budget", "compression_ratios"
DEFAULT_RATIO = 0.5


@dataclass(frozen=True)
class PressSpec:
    """A press with all its arguments, from which any number of fresh presses can be built.

    ``parse_press(spec.name, spec.arguments)`` is the spec again.

    Attributes:
        name: in full, aliases resolved, such as ``adakv:snapkv``.
        arguments: every argument with its value, defaults included, ``compression_ratio`` or ``kv_budget`` first; JSON
            can hold it.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def compression_ratio(self) -> float | None:
        """The fraction of tokens removed, over all layers; None with a budget, or where the text decides."""
        ratios = self.arguments.get(RATIOS)
        if ratios is not None:
            return sum(ratios) / len(ratios)
        if self.is_none or not any(row.removes_tokens for row in self._rows):
            return 0.0
        return self.arguments.get(RATIO)

    @property
    def kv_budget(self) -> int | None:
        """Tokens kept of each context, in each layer (PyramidKV: on the average of the layers); None with a ratio."""
        return self.arguments.get(BUDGET)

    @property
    def _rows(self) -> tuple[Row, ...]:
        return () if self.is_none else parse_name(self.name).rows

    @property
    def is_none(self) -> bool:
        """Whether there is no press at all; a press at ratio 0 is built and run like any other."""
        return self.name == NONE

    @property
    def attn_implementation(self) -> str | None:
        """The attention implementation that the press needs, or None if any will do."""
        return next((row.attention for row in self._rows if row.attention), None)

    @property
    def masks(self) -> bool:
        """Whether the press hides entries head by head instead of shrinking the cache; its bytes do not fall then."""
        return any(row.masks for row in self._rows)

    @property
    def rerotates(self) -> bool:
        """Whether kept keys move to positions ``0..kept-1``, so that queries go on at the kept length."""
        return any(row.rerotates for row in self._rows)

    @property
    def batches(self) -> bool:
        """Whether contexts of equal length may share a prefill: what is kept of one does not depend on the others."""
        return all(row.batches and not self.arguments.get(row.batches_unless) for row in self._rows)

    @property
    def shares_prefill(self) -> bool:
        """Whether the press is nothing but a hook after each layer's attention, so that one forward serves many."""
        is_hook = all(row.factory.__call__ is BasePress.__call__ for row in self._rows)
        return is_hook and self.attn_implementation != "eager"

    @property
    def reads_outputs(self) -> bool:
        """Whether the press may look at what an attention returns, weights aside if it does not need them. kvpress's
        own hook hands on the cache, what went in, and the weights of eager attention."""
        has_that_hook = all(row.factory.forward_hook is BasePress.forward_hook for row in self._rows)
        return not (self.shares_prefill and has_that_hook)

    def min_context(self) -> int:
        """The least tokens of context on which the press runs and can remove something. The same at every ratio, so
        that a baseline at ratio 0 counts the same contexts."""
        return max((_min_context(row, self._arguments_of(row)) for row in self._rows), default=1)

    def check_layers(self, num_layers: int) -> None:
        """Refuses a press that is made for another number of layers.

        Raises:
            UsageError: one line; also raised when such a press is first run.
        """
        if RATIOS in self.arguments:
            check_number_of_ratios(self.arguments[RATIOS], num_layers)

    def ratio_for(self, context_tokens: int) -> float | None:
        """The ratio for a context of that length: the one asked for, or the one that leaves ``kv_budget`` tokens."""
        if self.kv_budget is None:
            return self.compression_ratio
        return ratio_that_keeps(self.kv_budget, context_tokens)

    def build(self, context_tokens: int, *, shrink: bool = False) -> BasePress | None:
        """A fresh press for a context of that length, or None for ``none``.

        Args:
            context_tokens: tokens prefilled under the press.
            shrink: on contexts shorter than `min_context`, window and sink sizes shrink in proportion until they
                take at most a quarter of the context, so that the press runs. None is returned for a context of one
                token, of which nothing can be removed. ``simlayerkv`` and ``dms`` need not shrink: by their own rule
                they keep all of a short context.

        Raises:
            UsageError: if the context is too short and ``shrink`` is false.
        """
        if self.is_none:
            return None
        is_short = context_tokens < self.min_context()
        if is_short and not shrink:
            raise UsageError(
                f"press={self.name} needs a context of at least {self.min_context()} tokens, not {context_tokens}"
            )
        if is_short and context_tokens < 2:
            return None
        return self._construct(self.ratio_for(context_tokens), context_tokens)

    def describe(self) -> dict[str, Any]:
        """What was asked for, for the record; JSON can hold it. What was kept must be measured."""
        ratio = self.compression_ratio
        return {
            "name": self.name,
            "arguments": dict(self.arguments),
            RATIO: ratio,
            "kept_share_asked": None if ratio is None else 1 - ratio,
            BUDGET: self.kv_budget,
            "classes": [row.factory.__name__ for row in self._rows],
            "papers": [row.paper for row in self._rows if row.paper],
            "masks": self.masks,
            "rerotates": self.rerotates,
            "min_context": self.min_context(),
        }

    def notes(self, context_tokens: int, num_layers: int) -> list[str]:
        """What a reader of the figures must know about the press at this length, such as a fall-back that kvpress
        does not report. The wording does not depend on the length."""
        if self.is_none:
            return []
        ratio = self.ratio_for(context_tokens) or 0.0
        largest = max(self.arguments.get(RATIOS, [ratio]))  # per_layer: of the layer that loses most
        num_kept = max(1, int(context_tokens * (1 - largest)))
        counting = [row for row in parse_name(self.name).counting_rows if row.factory is not PerLayerPress]
        is_counted = not any(row.no_ratio or row.no_budget for row in counting)
        notes = []
        if self.kv_budget is not None and self.kv_budget >= context_tokens:
            notes.append(f"kv_budget={self.kv_budget} covers the whole context: nothing is removed")
        for row in self._rows:
            arguments = {**self._arguments_of(row), **self._sizes(row, context_tokens)}
            if row.notes is not None:
                notes += row.notes(arguments, ratio, context_tokens, num_layers)
            num_protected = sum(arguments[name] for name in row.protects)
            if is_counted and largest > 0 and num_kept < num_protected:
                sizes = " + ".join(row.protects)
                notes.append(f"{row.name} keeps fewer tokens than {sizes}: which of these is arbitrary")
            elif is_counted and 0 < num_kept == num_protected < context_tokens:
                sizes = " + ".join(row.protects)
                notes.append(f"{row.name} keeps its {sizes} and no other token: none was chosen by its score")
        return notes

    def _arguments_of(self, row: Row) -> dict[str, Any]:
        names = parse_name(self.name).names
        return {key: self.arguments[names[row.name, key]] for key in arguments_of(row)}

    def _sizes(self, row: Row, context_tokens: int) -> dict[str, int]:
        """The row's window and sink sizes for a context of that length, shrunk if it is too short for them."""
        arguments = self._arguments_of(row)
        sizes = {name: arguments[name] for name in row.protects}
        room, total = context_tokens // 4, sum(sizes.values())
        if row.no_ratio or context_tokens >= _min_context(row, arguments) or not total:
            return sizes
        return {name: max(int(BOUNDS[name][0]), size * room // total) for name, size in sizes.items()}

    def _construct(self, ratio: float | None, context_tokens: int | None = None) -> BasePress:
        """A fresh press, its sizes shrunk for a context too short for them if a length is given."""

        def construct(part: Part) -> BasePress:
            arguments = self._arguments_of(part.row)
            if context_tokens is not None:
                arguments |= self._sizes(part.row, context_tokens)
            if part.row.name == "composed":
                arguments["presses"] = [construct(inner) for inner in part.inner]
            elif part.inner:
                arguments["press"] = construct(part.inner[0])
            elif part.row.takes_ratio and ratio is not None:
                arguments[RATIO] = ratio
            return part.row.factory(**arguments)

        with _without_flash_attention_warning():
            return construct(parse_name(self.name))


@dataclass(frozen=True)
class PressInfo:
    """One line of the list of presses.

    Attributes:
        name: as typed; ``PRESS`` stands for what a wrapper wraps.
        arguments: name to default, ``required`` where it has none.
        needs: what it needs or cannot do; for an unsupported press, why it is not supported.
        paper: where the method is described.
        supported: whether `parse_press` takes it.
    """

    name: str
    arguments: Mapping[str, Any]
    needs: str
    paper: str
    supported: bool


def parse_press(name: str | None = NONE, arguments: Mapping[str, Any] | None = None) -> PressSpec:
    """Checks a press and its arguments.

    Args:
        name: see the module's docstring. None is ``none``: lm-eval turns the word into it.
        arguments: as lm-eval parsed them. An argument that two presses of a name share is written with the press
            before it, ``think.window_size=32``.

    Raises:
        UsageError: one line that says what is wrong and what to do.
    """
    given = dict(arguments or {})
    name, defaults = resolve(name)
    if name == NONE:
        _check_none(given)
        return PressSpec(NONE)
    part = parse_name(name)
    size = _parse_size(part, {key: given.pop(key) for key in (RATIO, BUDGET) if key in given})
    spec = PressSpec(part.name, {**size, **_parse_arguments(part, given, defaults)})
    _check_as_a_whole(spec)
    return spec


def press_argument_names(name: str | None = NONE) -> frozenset[str]:
    """The arguments about which `parse_press` has something to say, so that a caller can split them off the others.

    Raises:
        UsageError: if there is no such press.
    """
    name, _ = resolve(name)
    if name == NONE:
        return frozenset({RATIO, BUDGET})
    part = parse_name(name)
    fields = {key for row in part.rows for key in arguments_of(row)}
    qualified = {f"{row.name}.{key}" for row in part.rows for key in arguments_of(row)}
    return frozenset(fields | qualified | {RATIO, BUDGET})


def list_presses() -> list[PressInfo]:
    """Every press of kvpress: those that run here, then those that do not, with the reason."""
    none = PressInfo(NONE, {}, "", "", True)
    supported = [_info(row) for row in ROWS.values()]
    budget = {"target_size": REQUIRED, "compression_interval": DEFAULT_INTERVAL}
    needs = f"acts while text is generated; PRESS is one of {', '.join(STANDING)}"
    decoding = [
        PressInfo(name, budget, needs, "", True) for name in ("decoding:PRESS", "prefill_decoding:PREFILL+PRESS")
    ]
    here = {press.name.partition(":")[0] for press in decoding}
    unsupported = [
        PressInfo(name, {}, row.reason, row.paper, False) for name, row in UNSUPPORTED.items() if name not in here
    ]
    return [none, *supported, *decoding, *unsupported]


def ratio_that_keeps(num_tokens: int, context_tokens: int) -> float:
    """The ratio at which kvpress's ``int(context_tokens * (1 - ratio))`` is ``num_tokens``; 0 if there are no more.

    The plain ``1 - num_tokens / context_tokens`` loses a token to rounding at one length in ten or so. The slack of a
    thousandth of a token is far above rounding errors and far below a token.
    """
    if num_tokens >= context_tokens:
        return 0.0
    return 1 - (num_tokens + 1e-3) / context_tokens


# ---------------------------------------------------------------------------------------------------------- arguments


def _check_none(given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        if key not in (RATIO, BUDGET):
            raise UsageError(f"unknown argument '{key}': press=none takes none")
        if value not in (0, None):
            raise UsageError(f"{key}={value}: press=none removes nothing; name a press, such as press=snapkv")


def _parse_size(part: Part, given: Mapping[str, Any]) -> dict[str, Any]:
    """``compression_ratio`` or ``kv_budget``, checked; nothing for a press that takes neither."""
    if len(given) == 2:
        raise UsageError(f"{RATIO} and {BUDGET} both say how much is kept: give one of them")
    rows = part.counting_rows
    without_ratio = [row for row in rows if row.no_ratio]
    for key in given:
        for row in without_ratio or [row for row in rows if row.no_budget and key == BUDGET]:
            raise UsageError(f"press={row.name} takes no {key}: {row.no_ratio or row.no_budget}")
    if without_ratio:
        return {}
    if BUDGET in given:
        return {BUDGET: parse_number(BUDGET, int, given[BUDGET])}
    return {RATIO: parse_number(RATIO, float, given.get(RATIO, DEFAULT_RATIO))}


def _parse_arguments(part: Part, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Every argument under its canonical name, checked, in the order of the name's presses."""
    named = _by_canonical_name(part, given)
    parsed: dict[str, Any] = {}
    for row in part.rows:
        for key, argument in arguments_of(row).items():
            canonical = part.names[row.name, key]
            if canonical in named:
                parsed[canonical] = argument.parse(named[canonical])
                continue
            presets = {**part.defaults, **defaults}
            parsed[canonical] = presets.get(key, argument.default)
            if parsed[canonical] is REQUIRED:
                raise UsageError(f"press={row.name} needs {canonical}=...: without it nothing would be removed")
    return parsed


def _by_canonical_name(part: Part, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given arguments, each under the name that the record uses.

    Raises:
        UsageError: for a name that no press, or more than one, of this name has; or one given twice.
    """
    canonical = {f"{row}.{own}": name for (row, own), name in part.names.items()}
    canonical |= {name: name for name in part.names.values()}
    named: dict[str, Any] = {}
    for key, value in given.items():
        if key not in canonical:
            raise UsageError(_unknown_argument(part, key))
        if canonical[key] in named:
            raise UsageError(f"{canonical[key]} is given twice")
        named[canonical[key]] = value
    return named


def _unknown_argument(part: Part, key: str) -> str:
    shared = [name for (_, own), name in part.names.items() if own == key]
    if shared:
        return f"'{key}' is an argument of several presses here: write {' or '.join(shared)}"
    names = [RATIO, BUDGET, *part.names.values()]
    return f"unknown argument '{key}': {near(key, names)}press={part.name} takes {', '.join(names)}"


def _check_as_a_whole(spec: PressSpec) -> None:
    """What cannot be seen argument by argument: kvpress asserts most of it at construction."""
    for row in spec._rows:
        problem = row.check(spec._arguments_of(row)) if row.check else ""
        if problem:
            raise UsageError(f"press={spec.name}: {problem}")
    try:
        spec._construct(DEFAULT_RATIO)
    except (AssertionError, ValueError) as error:
        raise UsageError(f"press={spec.name}: {error}") from error


def _min_context(row: Row, arguments: Mapping[str, Any]) -> int:
    return max(row.min_context, 1 + sum(arguments[name] for name in row.protects))


@contextmanager
def _without_flash_attention_warning() -> Iterator[None]:
    """``per_layer`` warns at every construction, that is at every prefill, that it wants flash attention: kvpress's
    own decoding makes one mask for all layers. Here each layer has its own."""
    logger = logging.getLogger("kvpress.presses.per_layer_compression_press")

    def reject(record: logging.LogRecord) -> bool:
        return False

    logger.addFilter(reject)
    try:
        yield
    finally:
        logger.removeFilter(reject)


# -------------------------------------------------------------------------------------------------------------- list


def _info(row: Row) -> PressInfo:
    name = {"composed": "composed:PRESS+think"}.get(row.name, row.name if row.wraps is None else f"{row.name}:PRESS")
    sizes: dict[str, Any] = {RATIO: DEFAULT_RATIO, BUDGET: None} if row.takes_ratio else {}
    defaults = {key: argument.default for key, argument in arguments_of(row).items()}
    needs = [f"{row.attention} attention"] if row.attention else []
    if row.wraps is not None:
        needs.append(f"wraps {_wrapped(row)}")
    if row.name == "composed":
        needs.append("a press that removes tokens, and think")
    return PressInfo(name, {**sizes, **defaults}, "; ".join(needs), row.paper, True)


def _wrapped(row: Row) -> str:
    """What a wrapper wraps: by name, or all but some, whichever is shorter."""
    scoring = [other for other in ROWS.values() if other.scores]
    wrapped = [other.name for other in scoring if not why_not_wrapped(row, Part(other))]
    others = [other.name for other in scoring if other.name not in wrapped]
    if len(wrapped) <= len(others):
        return ", ".join(wrapped)
    return f"any press that scores tokens{' but ' if others else ''}{', '.join(others)}"
