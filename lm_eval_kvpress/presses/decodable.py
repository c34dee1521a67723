"""Which presses can compress a cache that grows, again and again, and what they need for it.

While text is generated a press sees the keys and values that are left, and the hidden states of the newest tokens. That
is enough for presses that score entries by these; kvpress's ``DecodingPress`` takes presses that score, and AdaKV over
one. Knows press names. Does not know models or text.
"""

from __future__ import annotations

import types
from collections.abc import Mapping

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.presses.catalog import Reads
from lm_eval_kvpress.presses.spec import PressSpec

DECODING_PRESSES = (
    *("knorm", "keydiff", "tova", "streaming_llm", "snapkv", "expected_attention", "expected_attention_stats"),
    *("qfilter", "lagkv", "cap", "cur", "rkv", "observed_attention", "random"),
)
"""Presses that can compress one cache again and again; some of them under a wrapper, too (`WRAPPERS`)."""

WRAPPERS = ("adakv", "criticalkv")

ALL_HEADS = types.MappingProxyType(
    {
        "tova": "it scores a token alike in all heads, of which none could keep more than another",
        "streaming_llm": "it keeps the same tokens in all heads, of which none could keep more than another",
        "lagkv": "it falls back to the newest entries in heads that keep few",
        "observed_attention": "it needs eager attention, with which adakv does not run",
        "criticalkv": "the paper's combination of the two, critical_adakv, is none that kvpress decodes with",
    }
)
"""Presses that cannot score a head which keeps other entries than its neighbours, and why."""

AVERAGES_HEADS = ("tova",)
"""Presses that average attention over heads, place by place of the cache: heads must keep the same tokens."""

KEEP_ALIKE = ("tova", "streaming_llm", "simlayerkv", "think", "composed", "key_rerotation")
"""Presses of a prefill under which all heads keep the same tokens, also where they wrap each other."""

MEASURED = "docs/experiments/decoding_presses.md"
"""What kvpress's hook does with presses that are refused here, and what those that run do to a text."""

_PREFILL = "it needs the hidden states of every cached token, and those of the newest alone are known"
WHY_NOT: Mapping[str, str] = types.MappingProxyType(
    {
        **dict.fromkeys(("leverage", "noncausal", "compactor", "kvzap"), _PREFILL),
        "pyramidkv": "its layers take shares of one length, and while text is generated each has a length of its own",
        "finch": "it reads the question behind a context",
    }
)
"""Presses that score and cannot run here, and why."""

PROTECTING = ("window_size", "n_sink", "num_sinks")
"""Arguments that count entries which always stay."""

DEFAULT_HIDDEN = 257
"""Hidden states of the newest tokens, at most, of which kvpress's ``DecodingPress`` keeps 256 and the newest one."""


def check_decodable(spec: PressSpec) -> None:
    """Refuse a press that cannot compress one cache again and again.

    Raises:
        UsageError: one line that says why and what to use.
    """
    names = [row.name for row in spec.rows]
    if spec.is_none:
        raise UsageError(f"press=decoding:none evicts nothing: use press=none, or one of {', '.join(DECODING_PRESSES)}")
    for name in names:
        if name not in (*DECODING_PRESSES, *WRAPPERS):
            why = WHY_NOT.get(name, "kvpress decodes with presses that score tokens, and with adakv over one of them")
            raise UsageError(
                f"press=decoding:{spec.name} cannot compress one cache again and again: {why} ({MEASURED}); use one "
                f"of {', '.join(DECODING_PRESSES)}"
            )
        if names[0] == "adakv" and name in ALL_HEADS:
            raise UsageError(f"press=decoding:{spec.name}: {ALL_HEADS[name]}; use decoding:{name}, or adakv:snapkv")
    if names[0] == "criticalkv" and averages_heads(spec):
        raise UsageError(
            f"press=decoding:{spec.name}: {names[-1]} averages attention over heads place by place, and under "
            f"criticalkv they keep different tokens; use decoding:{names[-1]}, or criticalkv:snapkv"
        )
    if spec.arguments.get("seed") is not None:
        raise UsageError(
            f"decoding.seed={spec.arguments['seed']} would evict the same places of the cache again and again: leave "
            "it out, and lm-eval's own seed decides"
        )


def scores_single_heads(spec: PressSpec) -> bool:
    """Whether a head's scores depend on that head alone, so that heads may keep different entries."""
    return not any(row.name in ALL_HEADS for row in spec.rows if row.name != "criticalkv")


def averages_heads(spec: PressSpec) -> bool:
    """Whether it averages over heads, so that entries at one place must be of one token."""
    return any(row.name in AVERAGES_HEADS for row in spec.rows)


def keeps_alike(prefill: PressSpec) -> bool:
    """Whether all heads keep the same tokens of a prefill."""
    return all(row.name in KEEP_ALIKE for row in prefill.rows)


def reads_attention(spec: PressSpec) -> bool:
    """Whether it reads the attention weights that entries received."""
    return any(row.reads == Reads.ATTENTIONS for row in spec.rows if row.wraps is None)


def expects_positions(spec: PressSpec) -> bool:
    """Whether it expects queries at positions to come (`presses.positions`)."""
    return _has(spec, "expected_attention", "expected_attention_stats", "cap")


def num_protected(spec: PressSpec) -> int:
    """Entries that always stay."""
    return sum(spec.arguments.get(name, 0) for name in PROTECTING)


def num_hidden(spec: PressSpec, interval: int) -> int:
    """Hidden states of the newest tokens that the press looks at."""
    return min(interval, max(DEFAULT_HIDDEN, spec.arguments.get("window_size", 0) + 1))


def check_sizes(spec: PressSpec, target_size: int | None, interval: int) -> None:
    """Refuse a budget that leaves nothing to choose, and an interval with fewer tokens than the press looks at.

    Raises:
        UsageError: one line that says what is wrong and what to do.
    """
    window, sinks = spec.arguments.get("window_size", 0), spec.arguments.get("n_sink", 0)
    if interval <= window:
        raise UsageError(
            f"compression_interval={interval} must exceed the window_size={window} of decoding:{spec.name}: raise it, "
            f"or pass decoding.window_size={max(1, interval - 1)}"
        )
    if interval <= sinks and _has(spec, "expected_attention", "cap"):
        raise UsageError(
            f"compression_interval={interval} must exceed the n_sink={sinks} of decoding:{spec.name}, which leaves out "
            "as many of the newest queries: raise it, or pass decoding.n_sink=0"
        )
    if target_size is not None and target_size <= num_protected(spec):
        raise UsageError(
            f"target_size={target_size} is all that decoding:{spec.name} always keeps ({num_protected(spec)}): raise it"
        )
    if _has(spec, "lagkv"):
        if target_size is None:
            raise UsageError("decoding with lagkv needs target_size=N: of a short text it would keep the newest tokens")
        check_lags(spec, "target_size", target_size, "decoding.lag_size")


def _has(spec: PressSpec, *names: str) -> bool:
    return any(row.name in names for row in spec.rows)


def check_lags(spec: PressSpec, size: str, num_kept: int, lag_size: str) -> None:
    """Refuse a budget below two partitions of LagKV, which then keeps sinks and the newest entries: another press.

    A budget of two partitions also exceeds the sinks and the newest entries that it keeps whatever they score.

    Args:
        size, lag_size: arguments as typed, of the budget and of the partitions' size.
        num_kept: the budget.

    Raises:
        UsageError: one line that says what is wrong and what to do.
    """
    least = spec.arguments["n_sink"] + 2 * spec.arguments["lag_size"]
    if num_kept < least:
        raise UsageError(
            f"{size}={num_kept} is below the {least} entries from which on lagkv compares partitions, and it would "
            f"keep the newest ones: raise it, or lower {lag_size}"
        )
