"""Presses by name: a name and flat arguments to a fresh kvpress press, and what a record must say about it.

Knows the grammar of names and the rules by which presses nest. Does not know models or text; the facts about each
press stand in `press_catalog`.

A name is ``snapkv``, a wrapper and what it wraps, ``adakv:snapkv``, or several presses in a row,
``composed:snapkv+think``. Nothing in it is a comma or an equals sign, at which lm-eval splits model arguments. An
argument is a field of one of the presses, ``window_size``; where two of them have it, ``snapkv.window_size``.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Union, get_args, get_origin

from kvpress import BasePress, ScorerPress

from lm_eval_kvpress.press_catalog import (
    ALIASES,
    CATALOG,
    KEEPS_ALL_SHORT,
    PRESSES,
    UNSUPPORTED,
    WINDOW_IS_CUT,
    PressEntry,
    n_kept,
)

RATIO, BUDGET, RATIOS = "compression_ratio", "kv_budget", "compression_ratios"
DEFAULT_RATIO = 0.5

_REQUIRED = inspect.Parameter.empty

# Least value of an argument; every other number is at least 0.
_AT_LEAST = {
    **dict.fromkeys(("window_size", "kernel_size", "beta", "lag_size", "chunk_size", "sketch_dimension"), 1),
    **dict.fromkeys(("n_future_positions", "local_window_size", "chunk_length", "block_size", "n_last"), 1),
    **dict.fromkeys(("n_recent", "low_entropy_chunk_length"), 1),
}
_AT_MOST = dict.fromkeys(
    ("lazy_threshold", "alpha_safeguard", "first_stage_ratio", "similarity_threshold", "merge_fraction"), 1
)


@dataclass(frozen=True)
class PressNode:
    """A press and the presses that it wraps."""

    entry: PressEntry
    parts: tuple[PressNode, ...] = ()

    @property
    def name(self) -> str:
        inner = "+".join(part.name for part in self.parts)
        return f"{self.entry.name}:{inner}" if inner else self.entry.name

    def walk(self) -> Iterator[PressNode]:
        """This press and all that it wraps, outermost first."""
        yield self
        for part in self.parts:
            yield from part.walk()


@dataclass(frozen=True)
class PressArgument:
    """One argument of one press of a name, under the name that a user types."""

    name: str
    press: str
    field: str
    default: Any
    annotation: Any


@dataclass(frozen=True)
class PressSpec:
    """A press with all its arguments: what is run, and what the record says of it.

    Attributes:
        name: in the grammar above.
        arguments: every argument with its value, defaults included.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_none(self) -> bool:
        """Whether there is no press at all. A press of ratio 0 is one: it is built and run."""
        return self.name == "none"

    @property
    def compression_ratio(self) -> float | None:
        """The fraction of tokens removed, over all layers; None for a budget and where no ratio applies."""
        ratios = self.arguments.get(RATIOS)
        if ratios is not None:
            return sum(ratios) / len(ratios)
        parts = [value for name, value in self.arguments.items() if name.rpartition(".")[2] == RATIO]
        return 1 - math.prod(1 - ratio for ratio in parts) if len(parts) > 1 else next(iter(parts), None)

    @property
    def kv_budget(self) -> int | None:
        """The tokens kept, whatever the length of the context; None if a ratio says it."""
        return self.arguments.get(BUDGET)

    @property
    def attn_implementation(self) -> str | None:
        """The attention implementation that some part of it needs; None if any will do."""
        return next((node.entry.attention for node in self._nodes() if node.entry.attention), None)

    @property
    def masks(self) -> bool:
        """Whether it evicts by masking, per head, and leaves the cache its size."""
        return any(node.entry.masks for node in self._nodes())

    @property
    def rerotates(self) -> bool:
        """Whether the kept keys move to positions ``0..kept-1``, so that queries go on at the kept length."""
        return any(node.entry.rerotates for node in self._nodes())

    @property
    def batches(self) -> bool:
        """Whether the rows of a batch of equal lengths are compressed as each would be alone."""
        return all(
            node.entry.batches(self._own(node)) if callable(node.entry.batches) else node.entry.batches
            for node in self._nodes()
        )

    def min_context(self) -> int:
        """The fewest prefilled tokens on which it runs.

        The same at every ratio (kvpress leaves windows alone at ratio 0), so that a sweep compares like with like.
        """
        return max((self._least(node) for node in self._nodes()), default=0)

    def build(self, context_tokens: int, *, shrink: bool = False) -> BasePress | None:
        """A fresh press for a context of that length, or None for ``none``.

        Args:
            context_tokens: the prefilled tokens, at least 1.
            shrink: whether windows and sinks give way where the context is too short for them.
        """
        if self.is_none:
            return None
        values = dict(self.arguments)
        if shrink and context_tokens < self.min_context():
            values = self._shrunk(values, context_tokens)
        if self.kv_budget is not None:
            values[RATIO] = ratio_for_budget(context_tokens, min(values.pop(BUDGET), context_tokens))
        return _build(_parse_name(self.name), _arguments(self.name), values)

    def describe(self) -> dict[str, Any]:
        """What a record says: plain values that JSON takes."""
        removed = self.compression_ratio
        return {
            "name": self.name,
            "arguments": dict(self.arguments),
            "compression_ratio": removed,
            "kept_share_asked": None if removed is None else 1 - removed,
            "kv_budget": self.kv_budget,
            "classes": [node.entry.factory.__name__ for node in self._nodes()],
            "paper": " ".join(dict.fromkeys(node.entry.paper for node in self._nodes() if node.entry.paper)),
        }

    def notes(self, context_tokens: int, num_layers: int) -> list[str]:
        """What a reader must know about a context of that length; constant sentences, since they are counted."""
        if self.is_none:
            return []
        found: list[str] = []
        removed = self._removed(context_tokens)
        for node in self._nodes():
            own = self._own(node)
            found += node.entry.notes(own, removed, context_tokens, num_layers)
            protected = self._least(node) - 1
            if removed and node.entry.exact and 0 < n_kept(context_tokens, removed) < protected:
                found.append(WINDOW_IS_CUT)
        if self.kv_budget is not None and self.kv_budget >= context_tokens:
            found.append(KEEPS_ALL_SHORT)
        return list(dict.fromkeys(found))

    def _nodes(self) -> list[PressNode]:
        return [] if self.is_none else list(_parse_name(self.name).walk())

    def _own(self, node: PressNode) -> dict[str, Any]:
        """The arguments of one of its presses, under the names of the fields."""
        own = [argument for argument in _arguments(self.name) if argument.press == node.entry.name]
        return {argument.field: self.arguments[argument.name] for argument in own if argument.name in self.arguments}

    def _least(self, node: PressNode) -> int:
        own = self._own(node)
        return max(node.entry.least, 1 + sum(own[window] for window in node.entry.windows))

    def _removed(self, context_tokens: int) -> float:
        if self.kv_budget is not None:
            return ratio_for_budget(context_tokens, min(self.kv_budget, context_tokens))
        return self.compression_ratio or 0.0

    def _shrunk(self, values: dict[str, Any], context_tokens: int) -> dict[str, Any]:
        """Windows of at most a quarter of the context. Of a single token nothing can be removed, by any press."""
        if context_tokens < max(node.entry.least for node in self._nodes()) or context_tokens == 1:
            for name, value in values.items():
                if name.rpartition(".")[2] in (RATIO, RATIOS):
                    values[name] = [0.0] * len(value) if name == RATIOS else 0.0
            return values
        windows = {(node.entry.name, window) for node in self._nodes() for window in node.entry.windows}
        for argument in _arguments(self.name):
            if (argument.press, argument.field) in windows:
                least = _AT_LEAST.get(argument.field, 0)
                values[argument.name] = max(least, min(values[argument.name], context_tokens // 4))
        return values


@dataclass(frozen=True)
class PressInfo:
    """A row of the list of presses.

    Attributes:
        name: what stands before the arguments, for a wrapper with what it takes: ``adakv:PRESS``.
        arguments: name to default.
        needs: what it cannot run without, or why it cannot run.
        paper: where the method is described.
        supported: whether ``press=`` takes it.
    """

    name: str
    arguments: Mapping[str, Any]
    needs: str
    paper: str
    supported: bool


def parse_press(name: str = "none", arguments: Mapping[str, Any] | None = None) -> PressSpec:
    """Checks a name and its arguments, as lm-eval parsed them, and fills in the defaults.

    Raises:
        ValueError: one line that says what is wrong and what to do.
    """
    given = dict(arguments or {})
    if name in ALIASES:
        name, presets = ALIASES[name]
        given = {**presets, **given}
    if name == "none":
        _check_none(given)
        return PressSpec("none")
    known = _arguments(name)
    names = press_argument_names(name)
    for key in given:
        if key not in names:
            raise ValueError(_unknown("argument", key, names, f"press={name}"))
    values = {a.name: _checked(a, given.get(a.name, a.default)) for a in known}
    if BUDGET in given:
        if RATIO in given:
            raise ValueError(f"{RATIO} and {BUDGET} both say how much is kept: give one of them")
        values.pop(RATIO)
        values[BUDGET] = _checked_budget(given[BUDGET])
    _check_values(name, values)
    return PressSpec(name, values)


def press_argument_names(name: str) -> frozenset[str]:
    """The arguments that a press takes.

    Raises:
        ValueError: as `parse_press`, if there is no such press.
    """
    name = ALIASES.get(name, (name,))[0]
    if name == "none":
        return frozenset({RATIO, BUDGET})
    names = frozenset(argument.name for argument in _arguments(name))
    return names | {BUDGET} if RATIO in names else names


def list_presses() -> list[PressInfo]:
    """Every press of kvpress: first those that run here, then the wrappers, then those that do not run."""
    rows = [PressInfo("none", {}, "", "", True)]
    for entry in PRESSES:
        shape = {0: entry.name, 1: f"{entry.name}:PRESS", 2: f"{entry.name}:PRESS+PRESS"}[entry.wraps]
        own = {key: value.default for key, value in _fields(entry).items()}
        own = {key: "(required)" if default is _REQUIRED else default for key, default in own.items()}
        if RATIO in own:
            own[RATIO] = DEFAULT_RATIO
        own |= {key: value for key, value in entry.defaults.items() if key in own}
        needs = f"{entry.attention} attention" if entry.attention else ""
        rows.append(PressInfo(shape, own, needs, entry.paper, True))
    return rows + [PressInfo(name, {}, why, paper, False) for name, (why, paper) in UNSUPPORTED.items()]


def ratio_for_budget(context_tokens: int, budget: int) -> float:
    """The ratio closest to ``1 - budget / context_tokens`` at which kvpress keeps ``budget`` tokens exactly.

    kvpress rounds ``int(context_tokens * (1 - ratio))`` down, and floating point often ends just below the budget.
    """
    assert 1 <= budget <= context_tokens, (budget, context_tokens)
    ratio = 1 - budget / context_tokens
    while int(context_tokens * (1 - ratio)) < budget:
        ratio = math.nextafter(ratio, 0.0)
    return ratio


@functools.cache
def _parse_name(name: str) -> PressNode:
    head, colon, rest = name.partition(":")
    if head in UNSUPPORTED:
        raise ValueError(f"press '{head}' is not supported: it {UNSUPPORTED[head][0]}")
    if head not in CATALOG:
        raise ValueError(_unknown("press", head, {*CATALOG, *ALIASES, "none"}, "press"))
    entry = CATALOG[head]
    if bool(entry.wraps) != bool(colon):
        example = f"{head}:snapkv+think" if entry.wraps == 2 else f"{head}:snapkv"
        hint = f"wraps a press: write press={example}" if entry.wraps else f"wraps no press: write press={head}"
        raise ValueError(f"press '{head}' {hint}")
    parts = (rest.split("+") if entry.wraps == 2 else [rest]) if entry.wraps else []
    node = PressNode(entry, tuple(_parse_name(part) for part in parts))
    _check_nesting(node)
    return node


def _check_nesting(node: PressNode) -> None:
    """Refuses what kvpress would refuse with an assertion later, and what it would run and get wrong."""
    twice = [name for name, count in Counter(part.entry.name for part in node.walk()).items() if count > 1]
    if twice:
        raise ValueError(f"press '{node.name}' names {twice[0]} twice: once is enough")
    if node.entry.wraps == 2:
        _check_composed(node)
    elif node.entry.wraps == 1:
        _check_wrapped(node.entry, node.parts[0])
    attentions = {part.entry.attention for part in node.walk()} - {None}
    if len(attentions) > 1:
        raise ValueError(f"press '{node.name}' needs {' and '.join(sorted(map(str, attentions)))} attention at once")


def _check_wrapped(wrapper: PressEntry, part: PressNode) -> None:
    inner, name = part.entry, f"{wrapper.name}:{part.name}"
    if not issubclass(inner.factory, ScorerPress):
        raise ValueError(f"press '{name}': {wrapper.name} ranks tokens by a score, and {inner.name} has none")
    if inner.name == "pyramidkv":
        raise ValueError(
            f"press '{name}': {wrapper.name} takes over the scores only, and pyramidkv differs from snapkv by its "
            f"budgets per layer alone: write {wrapper.name}:snapkv"
        )
    if wrapper.name == "per_layer" and inner.wraps:
        raise ValueError(f"press '{name}': per_layer sets the ratio of a plain press, not of a wrapper")
    if wrapper.name == "criticalkv" and inner.signed:
        raise ValueError(
            f"press '{name}': criticalkv multiplies scores by a weight, which needs scores of one sign; {inner.name} "
            "has none such: use snapkv, tova, expected_attention or observed_attention"
        )
    if wrapper.name == "block" and not inner.keys_alone:
        raise ValueError(
            f"press '{name}': block scores entries that are no longer in order, which is sound for "
            f"{_keys_alone(scorers_only=True)} alone"
        )
    if wrapper.name == "chunk" and (inner.windows or inner.least > 1 or inner.name == "non_causal_attention"):
        raise ValueError(
            f"press '{name}': chunk scores pieces of any length with the positions of the context's end, which "
            f"{inner.name} cannot take: use {_keys_alone(scorers_only=True)}, lagkv, cur or leverage"
        )


def _check_composed(node: PressNode) -> None:
    if len(node.parts) < 2:
        raise ValueError(f"press '{node.name}' composes a single press: write press={node.parts[0].name}")
    for part in node.parts:
        if part.entry.masks or part.entry.wraps == 2:
            raise ValueError(f"press '{node.name}': composed cannot hold {part.entry.name}")
    thinned = False
    for part in node.parts:
        if thinned and not part.entry.keys_alone:
            raise ValueError(
                f"press '{node.name}': {part.name} scores by order, positions or queries, which no longer fit a cache "
                f"that another press has thinned out: put it first; behind it go {_keys_alone(scorers_only=False)}"
            )
        thinned = thinned or part.entry.name != "think"


def _keys_alone(*, scorers_only: bool) -> str:
    names = [e.name for e in PRESSES if e.keys_alone and (issubclass(e.factory, ScorerPress) or not scorers_only)]
    return ", ".join(names)


def _fields(entry: PressEntry) -> dict[str, inspect.Parameter]:
    """The arguments of a class, less the wrapped presses and what is private."""
    parameters = inspect.signature(entry.factory).parameters.values()
    return {p.name: p for p in parameters if p.name not in ("press", "presses") and not p.name.startswith("_")}


@functools.cache
def _arguments(name: str) -> tuple[PressArgument, ...]:
    """Every argument of a press and of what it wraps, innermost ratio included."""
    root = _parse_name(name)
    presets: dict[str, Any] = {}
    found: list[PressArgument] = []
    per_layer = any(node.entry.name == "per_layer" for node in root.walk())
    for node in root.walk():
        presets = {**node.entry.defaults, **presets}
        for key, parameter in _fields(node.entry).items():
            if key == RATIO and per_layer:
                continue
            default = DEFAULT_RATIO if key == RATIO else presets.get(key, parameter.default)
            found.append(PressArgument(key, node.entry.name, key, default, parameter.annotation))
    counts = Counter(argument.field for argument in found)
    return tuple(
        PressArgument(f"{a.press}.{a.field}", a.press, a.field, a.default, a.annotation) if counts[a.field] > 1 else a
        for a in found
    )


def _build(node: PressNode, known: tuple[PressArgument, ...], values: Mapping[str, Any]) -> BasePress:
    own = {a.field: values[a.name] for a in known if a.press == node.entry.name and a.name in values}
    parts = [_build(part, known, values) for part in node.parts]
    if node.entry.wraps == 1:
        own["press"] = parts[0]
    elif node.entry.wraps == 2:
        own["presses"] = parts
    with _without_warning_of("kvpress.presses.per_layer_compression_press"):
        return node.entry.factory(**own)


@contextlib.contextmanager
def _without_warning_of(logger_name: str) -> Iterator[None]:
    """kvpress warns that ratios per layer need flash attention; one mask per layer, as the engine has, serves too."""
    logger = logging.getLogger(logger_name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _unknown(kind: str, name: str, valid: Any, owner: str) -> str:
    near = difflib.get_close_matches(name, sorted(valid), n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"unknown {kind} '{name}': {hint}{owner} takes {', '.join(sorted(valid)) or 'no arguments'}"


def _check_none(given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        if key not in (RATIO, BUDGET):
            raise ValueError(f"unknown argument '{key}': press=none takes no arguments")
        if key == BUDGET or _number(key, value) != 0:
            raise ValueError(f"press=none keeps everything, so {key}={value} does nothing: add press=snapkv or another")


def _checked(argument: PressArgument, value: Any) -> Any:
    """The value in the type of the field; lm-eval hands over numbers, booleans and strings."""
    name, key = argument.name, argument.field
    if value is _REQUIRED:
        raise ValueError(f"press={argument.press} needs {name}, for example {name}=0.1+0.5+0.9 (one ratio per layer)")
    if key == RATIOS:
        return [_checked_ratio(name, part) for part in str(value).split("+")]
    if key == RATIO or key == "key_channel_compression_ratio":
        return _checked_ratio(name, value)
    kinds = get_args(argument.annotation) if get_origin(argument.annotation) is Union else (argument.annotation,)
    if type(None) in kinds and (value is None or value == "None"):
        return None
    if get_origin(kinds[0]) is Literal:
        if value not in get_args(kinds[0]):
            raise ValueError(f"{name}={value} is not known: choose one of {', '.join(get_args(kinds[0]))}")
        return value
    if kinds[0] is bool:
        if str(value).lower() not in ("true", "false"):
            raise ValueError(f"{name}={value} must be true or false")
        return str(value).lower() == "true"
    return _in_range(name, key, _whole(name, value) if kinds[0] is int else _number(name, value))


def _in_range(name: str, key: str, number: float) -> float:
    least = _AT_LEAST.get(key, 0)
    if number < least:
        raise ValueError(f"{name}={number} must be at least {least}")
    if key in _AT_MOST and number > _AT_MOST[key]:
        raise ValueError(f"{name}={number} must be at most {_AT_MOST[key]}")
    return number


def _number(name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name}={value} must be a number")
    return number


def _whole(name: str, value: Any) -> int:
    number = _number(name, value)
    if number != int(number):
        raise ValueError(f"{name}={value} must be a whole number")
    return int(number)


def _checked_ratio(name: str, value: Any) -> float:
    ratio = _number(name, value)
    if not 0 <= ratio < 1:
        raise ValueError(f"{name}={value} must be at least 0 and below 1: it is the fraction removed, not kept")
    return ratio


def _checked_budget(value: Any) -> int:
    budget = _whole(BUDGET, value)
    if budget < 1:
        raise ValueError(f"{BUDGET}={value} must be at least 1: it counts the tokens kept")
    return budget


def _check_values(name: str, values: Mapping[str, Any]) -> None:
    """Rules between arguments, which kvpress meets with an assertion, a crash in a layer, or not at all."""
    if values.get("kernel_size", 1) % 2 == 0:
        raise ValueError(f"kernel_size={values['kernel_size']} must be odd: the pooled scores must stay aligned")
    if values.get("merge_fraction", 1) == 0:
        raise ValueError("merge_fraction=0 merges nothing: it must be above 0; without merging, leave the wrapper out")
    if "low_entropy_chunk_length" in values and values["low_entropy_chunk_length"] >= values["chunk_length"]:
        raise ValueError("low_entropy_chunk_length must be below chunk_length")
    if "n_recent" in values and values["n_recent"] <= values["n_last"]:
        raise ValueError("n_recent must be above n_last: kvpress keeps the last n_recent - n_last tokens")
