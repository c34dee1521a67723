"""A press name and flat arguments, as the user types them, to a checked `PressSpec`.

Every mistake is a `UsageError` of one line that says what is wrong and what to do. Does not know models or text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.presses.arguments import BUDGET, DEFAULT_RATIO, RANGES, RATIO, arguments_of
from lm_eval_kvpress.presses.build import build_press
from lm_eval_kvpress.presses.catalog import REQUIRED, Row
from lm_eval_kvpress.presses.names import NONE, ParsedName, parse_name, resolve_alias
from lm_eval_kvpress.presses.spec import PressSpec
from lm_eval_kvpress.presses.statistics import STATISTICS
from lm_eval_kvpress.presses.suggest import near
from lm_eval_kvpress.presses.values import Range, parse_number


def parse_press(name: str | None = NONE, arguments: Mapping[str, Any] | None = None) -> PressSpec:
    """Check a press and its arguments.

    Args:
        name: a press, a wrapper and what it wraps, or presses composed (`names`). None is ``none``: lm-eval turns the
            word into it.
        arguments: as lm-eval parsed them. An argument that two presses of a name share is written with the press
            before it, ``think.window_size=32``.

    Raises:
        UsageError: one line that says what is wrong and what to do.
    """
    given = dict(arguments or {})
    full, defaults = resolve_alias(name)
    if full == NONE:
        _check_none(given)
        return PressSpec(NONE)
    parsed = parse_name(full)
    size = _parse_size(parsed, {key: given.pop(key) for key in (RATIO, BUDGET) if key in given})
    spec = PressSpec(parsed.full, {**size, **_parse_arguments(parsed, given, defaults)})
    _check_together(spec)
    return spec


def press_argument_names(name: str | None = NONE) -> frozenset[str]:
    """Return the arguments that `parse_press` takes or explains, so that a caller can split them off the others.

    Raises:
        UsageError: if there is no such press.
    """
    full, _ = resolve_alias(name)
    if full == NONE:
        return frozenset({RATIO, BUDGET})
    rows = parse_name(full).rows
    plain = {key for row in rows for key in arguments_of(row)}
    qualified = {f"{row.name}.{key}" for row in rows for key in arguments_of(row)}
    return frozenset(plain | qualified | {RATIO, BUDGET})


def _check_none(given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        if key not in (RATIO, BUDGET):
            raise UsageError(f"unknown argument '{key}': press=none takes none")
        if value is not None:  # a loop over presses gives all of them one ratio; 0 of a budget is none, too
            parse_number(key, float, value, RANGES[RATIO] if key == RATIO else Range(low=0))


def _parse_size(parsed: ParsedName, given: Mapping[str, Any]) -> dict[str, Any]:
    """Check ``compression_ratio`` or ``kv_budget``; empty for a press that takes neither."""
    if len(given) == 2:
        raise UsageError(f"{RATIO} and {BUDGET} both say how much is kept: give one of them")
    rows = parsed.sizing_rows
    without_ratio = [row for row in rows if row.no_ratio]
    for key in given:
        for row in without_ratio or [row for row in rows if row.no_budget and key == BUDGET]:
            raise UsageError(f"press={row.name} takes no {key}: {row.no_ratio or row.no_budget}")
    if without_ratio:
        return {}
    if BUDGET in given:
        return {BUDGET: parse_number(BUDGET, int, given[BUDGET], RANGES[BUDGET])}
    return {RATIO: parse_number(RATIO, float, given.get(RATIO, DEFAULT_RATIO), RANGES[RATIO])}


def _parse_arguments(parsed: ParsedName, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Check every argument; the result has them as they are recorded, in the order of the name's presses."""
    named = _as_recorded(parsed, given)
    presets = {**parsed.defaults, **defaults}
    values: dict[str, Any] = {}
    for row in parsed.rows:
        for key, argument in arguments_of(row).items():
            recorded = parsed.argument_names[row.name, key]
            if recorded in named:
                values[recorded] = argument.parse(named[recorded])
                continue
            values[recorded] = presets.get(key, argument.default)
            if values[recorded] is REQUIRED:
                raise UsageError(f"press={row.name} needs {recorded}={_why_needed(parsed.full, row, key)}")
    return values


def _why_needed(name: str, row: Row, argument: str) -> str:
    if argument == STATISTICS:
        return f"FILE.safetensors: lm-eval-kvpress calibrate {row.name if row.wraps is None else name} writes it"
    return "...: without it nothing would be removed"


def _as_recorded(parsed: ParsedName, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given arguments, each under the name that is recorded: qualified by a press only where it must be.

    Raises:
        UsageError: for a name that no press, or more than one, of this name has; or one given twice.
    """
    recorded = {f"{press}.{key}": name for (press, key), name in parsed.argument_names.items()}
    recorded |= {name: name for name in parsed.argument_names.values()}
    named: dict[str, Any] = {}
    for key, value in given.items():
        if key not in recorded:
            raise UsageError(_unknown_argument(parsed, key))
        if recorded[key] in named:
            raise UsageError(f"{recorded[key]} is given twice")
        named[recorded[key]] = value
    return named


def _unknown_argument(parsed: ParsedName, key: str) -> str:
    shared = [name for (_, argument), name in parsed.argument_names.items() if argument == key]
    if shared:
        return f"'{key}' is an argument of several presses here: write {' or '.join(shared)}"
    names = [RATIO, BUDGET, *parsed.argument_names.values()]
    return f"unknown argument '{key}': {near(key, names)}press={parsed.full} takes {', '.join(names)}"


def _check_together(spec: PressSpec) -> None:
    """Find what is wrong with the arguments as a whole: kvpress asserts most of it at construction."""
    own = spec.own_arguments()
    for row in spec.rows:
        problem = row.check(own[row.name]) if row.check else ""
        if problem:
            raise UsageError(f"press={spec.name}: {problem}")
    try:
        build_press(parse_name(spec.name), own, DEFAULT_RATIO)
    except (AssertionError, ValueError) as error:
        raise UsageError(f"press={spec.name}: {error}") from error
