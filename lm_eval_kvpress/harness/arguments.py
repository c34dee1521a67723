"""Model arguments to checked settings: every mistake is found here, in one line, before any weight is read.

Knows the names that lm-eval's ``HFLM`` and transformers' ``from_pretrained`` take. Does not know engines or tasks.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.models.huggingface import HFLM

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.presses.decoding import DecodingSpec, parse_decoding, split_arguments, split_name
from lm_eval_kvpress.presses.parse import parse_press, press_argument_names
from lm_eval_kvpress.presses.spec import PressSpec
from lm_eval_kvpress.presses.streaming import for_stream
from lm_eval_kvpress.presses.suggest import near

ROLLING = ("prefix", "one_pass", "stream")
STREAM_POSITIONS = ("cache", "original")
SHORT_CONTEXT = ("keep", "shrink", "error")
BUILTIN = "builtin"

DTYPES = ("auto", "float32", "float16", "bfloat16", "float64", "float", "half", "double")
DEVICES = re.compile(r"cpu|mps(:0)?|(cuda|xpu|npu|hpu)(:\d+)?")
BATCH_SIZES = re.compile(r"auto(:\d+(\.\d+)?)?|[1-9]\d*")

LOADING_ARGUMENTS = frozenset(
    {
        *("attn_implementation", "cache_dir", "code_revision", "device_map", "force_download", "local_files_only"),
        *("low_cpu_mem_usage", "max_memory", "offload_state_dict", "token", "use_safetensors", "variant"),
    }
)
"""What ``from_pretrained`` takes beyond the named arguments of ``HFLM``."""


@dataclass(frozen=True)
class Settings:
    """How to compress and how to score.

    Attributes:
        press: what compresses the cache, with all its arguments.
        query_tokens: last tokens of a context that are held back and fed after compression. 0 predicts the first
            continuation token from the full cache, as most scripts do.
        rolling: protocol of ``loglikelihood_rolling``, one of `ROLLING`.
        rolling_context, rolling_score: tokens prefilled and scored per window of ``prefix``; None is half of
            ``max_length``, or what the other one leaves if that is less.
        short_context: what happens to contexts shorter than the press needs, one of `SHORT_CONTEXT`.
        allow_extrapolation: whether positions may exceed those that the model was trained on.
        parity: whether the record gets the parity certificate (`parity`): our answers at ratio 0 against stock
            ``HFLM``'s, on the same weights.
        stream_budget: entries that every layer keeps under ``rolling=stream``.
        stream_chunk: tokens scored per step of a stream; 1 is the strict protocol of the papers.
        stream_positions: ``cache`` rotates kept keys by their place in the cache, ``original`` by their place in the
            document.
        stream_output: folder for the losses by token position; a run that was killed continues from it.
        throughput_log: ``FILE.jsonl`` for a record per batch and request, or ``FILE.csv`` for requests only.
        target_size, compression_interval: with ``press=decoding:PRESS`` or ``prefill_decoding:PREFILL+PRESS``, entries
            that every layer keeps while text is generated, and tokens produced between two compressions.
        decoding: these three, checked.
        metrics_port: port on 127.0.0.1 that serves the figures to Prometheus while the run lasts.
    """

    press: PressSpec
    query_tokens: int = 1
    rolling: str = "prefix"
    rolling_context: int | None = None
    rolling_score: int | None = None
    short_context: str = "keep"
    allow_extrapolation: bool = False
    parity: bool = False
    stream_budget: int | None = None
    stream_chunk: int = 64
    stream_positions: str = "cache"
    stream_output: str | None = None
    throughput_log: str | None = None
    metrics_port: int | None = None
    target_size: int | None = None
    compression_interval: int | None = None
    decoding: DecodingSpec | None = None

    @property
    def press_name(self) -> str:
        """As the user would type it, the press that acts while decoding included."""
        if self.decoding is None:
            return self.press.name
        if self.press.is_none:
            return f"decoding:{self.decoding.press.name}"
        return f"prefill_decoding:{self.press.name}+{self.decoding.press.name}"

    def describe_press(self) -> dict[str, Any]:
        """For the record: all that was asked for; JSON can hold it."""
        facts = self.press.describe()
        if self.decoding is None:
            return facts
        of_decoding = {f"decoding.{key}": value for key, value in self.decoding.describe().items()}
        return {**facts, "name": self.press_name, "arguments": {**facts["arguments"], **of_decoding}}

    def rolling_window(self, max_length: int) -> tuple[int, int]:
        """``(context, score)`` tokens of the ``prefix`` protocol.

        Raises:
            UsageError: if they do not fit into ``max_length``.
        """
        half = max_length // 2
        context = self.rolling_context or min(half, max_length - (self.rolling_score or half))
        score = self.rolling_score or min(half, max_length - context)
        if context < 1 or score < 1 or context + score > max_length:
            raise UsageError(
                f"rolling_context={context} + rolling_score={score} exceed max_length={max_length}: "
                "make one of them smaller, or raise max_length if the model has the positions"
            )
        if context <= self.query_tokens:
            raise UsageError(
                f"rolling_context={context} leaves nothing to compress after query_tokens={self.query_tokens} are "
                "held back: raise rolling_context or lower query_tokens"
            )
        return context, score

    def check_stream(self, positions: int) -> None:
        """Refuses a stream that would score with positions the model was not trained on.

        Args:
            positions: the model's trained positions.

        Raises:
            UsageError: naming what to change.
        """
        if self.rolling != "stream" or self.allow_extrapolation:
            return
        assert self.stream_budget is not None
        if self.stream_positions == "original":
            raise UsageError(
                f"stream_positions=original leaves the {positions} trained positions behind in a longer document: use "
                "stream_positions=cache, or pass allow_extrapolation=true to measure what happens"
            )
        if self.stream_budget + self.stream_chunk > positions:
            raise UsageError(
                f"stream_budget={self.stream_budget} + stream_chunk={self.stream_chunk} exceed the {positions} "
                "positions that the model was trained on: make one of them smaller"
            )


ARGUMENTS = tuple(field for field in Settings.__dataclass_fields__ if field != "decoding")
"""The fields of `Settings` that are typed as such."""


def parse_arguments(arguments: Mapping[str, Any]) -> tuple[Settings, dict[str, Any]]:
    """Splits model arguments into `Settings` and what goes on to ``HFLM``.

    Raises:
        UsageError: for an unknown name (a near one is suggested) or a wrong value.
    """
    rest = dict(arguments)
    press_name = rest.pop("press", None)  # lm-eval reads "none" as None
    if press_name == "":
        raise UsageError("press= is empty: name a press, or press=none")
    name, decoding = split_name("none" if press_name is None else str(press_name))
    of_decoding: dict[str, Any] = {}
    if decoding is not None:
        rest, of_decoding = split_arguments(rest)
        _refuse_sizes_of_nothing(name, decoding, rest)
    of_press = {key: rest.pop(key) for key in sorted(press_argument_names(name) & rest.keys())}
    press = parse_press(name, of_press)
    own = {field: rest.pop(field) for field in ARGUMENTS if field != "press" and field in rest}
    settings = Settings(press, **{key: _checked(key, value) for key, value in own.items()})
    if decoding is not None and settings.rolling == "stream":
        raise UsageError("rolling=stream compresses as it goes: name the press itself, without decoding")
    settings = _with_stream(settings, of_press)
    settings = _with_decoding(settings, decoding, of_decoding)
    _refuse_unknown(rest, press_argument_names(name), name)
    _check_of_hflm(rest)
    _settle_attention(settings.press, rest)
    return settings, rest


def _refuse_sizes_of_nothing(prefill: str, decoding: str, arguments: Mapping[str, Any]) -> None:
    sizes = sorted({"compression_ratio", "kv_budget"} & arguments.keys())
    if prefill == "none" and sizes:
        raise UsageError(f"press=decoding:{decoding} keeps target_size entries: leave {' and '.join(sizes)} out")


def _checked(key: str, value: Any) -> Any:
    if key == "throughput_log" and Path(str(value)).suffix not in (".jsonl", ".csv"):
        raise UsageError(f"throughput_log={value}: the name must end in .jsonl or .csv")
    if key in ("stream_output", "throughput_log"):
        return str(value)
    choices = {"rolling": ROLLING, "short_context": SHORT_CONTEXT, "stream_positions": STREAM_POSITIONS}.get(key)
    if choices is not None:
        if value not in choices:
            raise UsageError(f"{key}={value} is not known: choose one of {', '.join(choices)}")
        return value
    if key in ("allow_extrapolation", "parity"):
        if not isinstance(value, bool):
            raise UsageError(f"{key}={value} must be true or false")
        return value
    lowest = 0 if key == "query_tokens" else 1
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value != int(value):
        raise UsageError(f"{key}={value!r} must be a whole number")
    if value < lowest:
        raise UsageError(f"{key}={value} must be at least {lowest}")
    if key == "metrics_port" and value > 65_535:
        raise UsageError(f"{key}={value} is no port: at most 65535")
    return int(value)


def _with_stream(settings: Settings, of_press: Mapping[str, Any]) -> Settings:
    """Turns the press into one that keeps ``stream_budget`` entries of a standing cache, for ``rolling=stream``."""
    if settings.rolling != "stream":
        for name in ("stream_budget", "stream_output"):
            if getattr(settings, name) is not None:
                raise UsageError(f"{name} belongs to rolling=stream, not to rolling={settings.rolling}")
        return settings
    if settings.stream_budget is None:
        raise UsageError("rolling=stream needs stream_budget=N, the entries that every layer keeps")
    given = {"compression_ratio", "kv_budget"} & of_press.keys()
    if given:
        raise UsageError(f"rolling=stream keeps stream_budget entries: leave {' and '.join(sorted(given))} out")
    if of_press.get("window_size") not in (None, settings.stream_chunk):
        raise UsageError(
            f"window_size={of_press['window_size']}: in a stream the press's window is the newest chunk; leave it out, "
            "or set stream_chunk"
        )
    press = for_stream(settings.press, settings.stream_budget, settings.stream_chunk)
    return dataclasses.replace(settings, press=press)


def _with_decoding(settings: Settings, name: str | None, of_decoding: Mapping[str, Any]) -> Settings:
    size, interval = settings.target_size, settings.compression_interval
    if name is None:
        for key, value in (("target_size", size), ("compression_interval", interval)):
            if value is not None:
                raise UsageError(f"{key} belongs to press=decoding:PRESS or prefill_decoding:PREFILL+PRESS")
        return settings
    decoding = parse_decoding(settings.press, name, of_decoding, size, interval)
    return dataclasses.replace(settings, decoding=decoding)


def _hflm_arguments() -> set[str]:
    return {name for name in inspect.signature(HFLM.__init__).parameters if name not in ("self", "kwargs")}


def _refuse_unknown(rest: Mapping[str, Any], of_press: frozenset[str], press: str) -> None:
    own = set(ARGUMENTS)
    known = own | of_press | _hflm_arguments() | LOADING_ARGUMENTS
    for key in rest:
        if key in known:
            continue
        raise UsageError(
            f"unknown argument '{key}': {near(key, known)}"
            f"press={press} takes {', '.join(sorted(of_press)) or 'none'}; "
            f"the model takes {', '.join(sorted(own))} and what lm-eval's hf model takes"
        )
    if rest.get("softmax_dtype") not in (None, "float32"):
        raise UsageError("softmax_dtype: log-probabilities are always computed in float32 here; leave it out")


def _check_of_hflm(rest: Mapping[str, Any]) -> None:
    """What ``HFLM`` would take for another value, or fail at only once weights are read."""
    for key in ("max_length", "max_batch_size"):
        if rest.get(key) is not None:
            _checked(key, rest[key])
    for key, known, says in (
        ("batch_size", BATCH_SIZES, "must be auto or a whole number from 1 on"),
        ("device", DEVICES, "is not known: cpu, cuda, cuda:N, mps"),
    ):
        if rest.get(key) is not None and not known.fullmatch(str(rest[key])):
            raise UsageError(f"{key}={rest[key]} {says}")
    dtype = rest.get("dtype")
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise UsageError(f"dtype={dtype} is not known: choose one of {', '.join(DTYPES)}")


def _settle_attention(press: PressSpec, rest: dict[str, Any]) -> None:
    """Sets the attention implementation that the press needs; refuses one that it, or the engine, cannot serve."""
    asked, needed = rest.get("attn_implementation"), press.attn_implementation
    if asked not in (None, "sdpa", "eager"):
        raise UsageError(
            f"attn_implementation={asked} takes no mask per layer, which compressed caches of different lengths need: "
            "use sdpa or eager"
        )
    if needed and asked and asked != needed:
        raise UsageError(f"press={press.name} needs attn_implementation={needed}, not {asked}: leave the argument out")
    rest["attn_implementation"] = asked or needed or "sdpa"


def resolve_pretrained(pretrained: str) -> str:
    """The folder or hub name to load: ``builtin`` is the checkpoint that ships with this package.

    Raises:
        UsageError: if a path does not exist.
    """
    if pretrained == BUILTIN:
        folder = Path(__file__).resolve().parents[1] / "builtin"
        if not (folder / "config.json").is_file():
            raise UsageError(f"this installation has no built-in checkpoint in {folder}: reinstall lm-eval-kvpress")
        return str(folder)
    looks_like_path = pretrained.startswith((".", "/", "~")) or pretrained.count("/") > 1
    if looks_like_path and not Path(pretrained).expanduser().is_dir():
        raise UsageError(f"pretrained={pretrained}: there is no such folder")
    return str(Path(pretrained).expanduser()) if looks_like_path else pretrained
