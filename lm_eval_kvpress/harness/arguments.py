"""Model arguments to settings: every mistake is found here, in one line, before any weight is read.

Knows the names that lm-eval's ``HFLM`` and transformers' ``from_pretrained`` take. Does not know models or tasks.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from lm_eval.models.huggingface import HFLM

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.argument_names import LOADING_ARGUMENTS
from lm_eval_kvpress.harness.packing import check_packing
from lm_eval_kvpress.harness.settings import POSITIVE, Settings
from lm_eval_kvpress.presses.arguments import BUDGET, RATIO
from lm_eval_kvpress.presses.decoding import DecodingSizes, parse_decoding, split_arguments, split_name
from lm_eval_kvpress.presses.names import NONE, listed_names, resolve_alias
from lm_eval_kvpress.presses.parse import parse_press, press_argument_names
from lm_eval_kvpress.presses.streaming import for_stream
from lm_eval_kvpress.presses.suggest import near
from lm_eval_kvpress.presses.values import ANY_NUMBER, Range, parse_number, parse_value

ARGUMENTS = tuple(item.name for item in fields(Settings) if item.name != "decoding")
"""The fields of `Settings` that a user types by their names."""

BOOLEANS = frozenset(
    {
        *(
            name
            for name, parameter in inspect.signature(HFLM.__init__).parameters.items()
            if "bool" in str(parameter.annotation) and "str" not in str(parameter.annotation)
        ),
        *("force_download", "local_files_only", "low_cpu_mem_usage", "offload_state_dict", "use_safetensors"),
    }
)
"""Arguments that are true or false. Any other word would be true: ``trust_remote_code=no`` ran a checkpoint's code."""

DTYPES = ("auto", "float32", "float16", "bfloat16", "float64", "float", "half", "double")
DEVICES = re.compile(r"cpu|mps(:0)?|(cuda|xpu|npu|hpu)(:\d+)?")
BATCH_SIZES = re.compile(r"auto(:\d+(\.\d+)?)?|[1-9]\d*")


def parse_arguments(arguments: Mapping[str, Any]) -> tuple[Settings, dict[str, Any]]:
    """Split model arguments into `Settings` and what goes on to ``HFLM``, ``attn_implementation`` included.

    Raises:
        UsageError: for an unknown name (a near one is suggested) or a wrong value.
    """
    rest = dict(arguments)
    prefill, decoding = _press_names(rest.pop("press", None))
    decoding_arguments: dict[str, Any] = {}
    if decoding is not None:
        rest, decoding_arguments = split_arguments(rest)
        _refuse_sizes_of_no_press(prefill, decoding, rest)
    press_arguments = {name: rest.pop(name) for name in sorted(press_argument_names(prefill) & rest.keys())}
    press = parse_press(prefill, press_arguments)
    own = {name: parse_setting(name, rest.pop(name)) for name in ARGUMENTS if name in rest}
    settings = _with_stream(Settings(press, **own), press_arguments, decoding)
    settings = _with_decoding(settings, decoding, decoding_arguments)
    settings.check_decode_scoring()
    settings.check_question()
    check_packing(settings)
    _refuse_unused_sizes(settings, own)
    if settings.is_question_known and not settings.question_needed_by and "query_aware" not in own:
        raise UsageError(
            "question_pattern and question_field belong to query_aware=false and to press=finch: neither is asked for"
        )
    _refuse_unknown(rest, press_argument_names(prefill), prefill)
    _check_hflm_arguments(rest)
    rest["attn_implementation"] = _attn_implementation(settings, rest.get("attn_implementation"))
    return settings, rest


def _refuse_unused_sizes(settings: Settings, own: Mapping[str, Any]) -> None:
    """Refuse how to pack where nothing is packed."""
    unused = sorted(name for name in own if name.startswith("kv_") and name != "kv_quant")
    if settings.quantization is None and unused and "kv_quant" not in own:
        raise UsageError(
            f"{unused[0]} belongs to kv_quant, which is not asked for: add kv_quant=int8, int4, int2 or fp8"
        )


def ignored_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes that came with ``press=none``, as in a loop over presses with one ratio: it removes nothing."""
    prefill, decoding = _press_names(arguments.get("press"))
    if decoding is not None or resolve_alias(prefill)[0] != NONE:
        return {}
    return {name: arguments[name] for name in (RATIO, BUDGET) if arguments.get(name)}


def _press_names(press: Any) -> tuple[str, str | None]:
    """The press of the prefill, and the one that acts while text is generated. lm-eval reads "none" as None."""
    if is_dataclass(press):
        fields_of = ", ".join(f"{item.name}={getattr(press, item.name, None)!r}" for item in fields(press))
        name = type(press).__name__
        raise UsageError(
            f"press={name}({fields_of}) is an object: pass a press by name and its fields as arguments, of which every "
            f"batch gets a fresh one; {near(name, listed_names())}`lm-eval-kvpress presses` lists names"
        )
    if press == "":
        raise UsageError("press= is empty: name a press, or press=none")
    return split_name("none" if press is None else str(press))


def _refuse_sizes_of_no_press(prefill: str, decoding: str, arguments: Mapping[str, Any]) -> None:
    sizes = sorted({RATIO, BUDGET} & arguments.keys())
    if prefill == "none" and sizes:
        raise UsageError(f"press=decoding:{decoding} keeps target_size entries: leave {' and '.join(sizes)} out")


def parse_setting(name: str, value: Any) -> Any:
    """Convert and check the value of a field of `Settings`, by the field's type and metadata.

    Raises:
        UsageError: one line, starting with ``name=value``.
    """
    kind, metadata = get_type_hints(Settings)[name], Settings.__dataclass_fields__[name].metadata
    if name == "kv_quant" and value is None:  # as lm-eval reads "none"
        value = "none"
    if value is not None and str in get_args(kind):
        value = str(value)  # lm-eval reads a folder named 2024 as a number
    parsed = parse_value(name, kind, value, metadata.get("range", ANY_NUMBER))
    if parsed == "":  # as of a shell variable that is not set: a path would be the current folder
        raise UsageError(f"{name}= is empty: name a place, or leave it out")
    endings = metadata.get("endings")
    if endings and parsed is not None and Path(parsed).suffix not in endings:
        raise UsageError(f"{name}={value}: the name must end in {' or '.join(endings)}")
    return parsed


def _with_stream(settings: Settings, press_arguments: Mapping[str, Any], decoding: str | None) -> Settings:
    """Under ``rolling=stream``, the press keeps ``stream_budget`` entries of a standing cache."""
    if settings.rolling != "stream":
        for name in ("stream_budget", "stream_output"):
            if getattr(settings, name) is not None:
                raise UsageError(f"{name} belongs to rolling=stream, not to rolling={settings.rolling}")
        return settings
    if decoding is not None:
        raise UsageError("rolling=stream compresses as it goes: name the press itself, without decoding")
    if settings.stream_budget is None:
        raise UsageError("rolling=stream needs stream_budget=N, the entries that every layer keeps")
    sizes = sorted({RATIO, BUDGET} & press_arguments.keys())
    if sizes:
        raise UsageError(f"rolling=stream keeps stream_budget entries: leave {' and '.join(sizes)} out")
    if press_arguments.get("window_size") not in (None, settings.stream_chunk):
        raise UsageError(
            f"window_size={press_arguments['window_size']}: in a stream the press's window is the newest chunk; leave "
            "it out, or set stream_chunk"
        )
    return replace(settings, press=for_stream(settings.press, settings.stream_budget, settings.stream_chunk))


def _with_decoding(settings: Settings, name: str | None, arguments: Mapping[str, Any]) -> Settings:
    """Adds the press that acts while text is generated, if one is named."""
    if name is None:
        for key in ("target_size", "compression_interval", "target_compression_ratio", "merge_budget"):
            if getattr(settings, key) is not None:
                raise UsageError(f"{key} belongs to press=decoding:PRESS or prefill_decoding:PREFILL+PRESS")
        return settings
    sizes = DecodingSizes(
        settings.target_size,
        settings.compression_interval,
        settings.target_compression_ratio,
        settings.merge_budget,
    )
    return replace(settings, decoding=parse_decoding(settings.press, name, arguments, sizes))


# ------------------------------------------------------------------------------------------- what HFLM will be given


def _refuse_unknown(rest: Mapping[str, Any], press_arguments: frozenset[str], press: str) -> None:
    hflm = {name for name in inspect.signature(HFLM.__init__).parameters if name not in ("self", "kwargs")}
    known = {*ARGUMENTS, *press_arguments, *hflm, *LOADING_ARGUMENTS}
    for name in rest:
        if name not in known:
            raise UsageError(
                f"unknown argument '{name}': {near(name, known)}"
                f"press={press} takes {', '.join(sorted(press_arguments)) or 'none'}; "
                f"the model takes {', '.join(sorted(ARGUMENTS))} and what lm-eval's hf model takes"
            )


def _check_hflm_arguments(rest: dict[str, Any]) -> None:
    """Refuse what ``HFLM`` would take for another value, or fail at only once weights are read; convert numbers."""
    for name in sorted(BOOLEANS & rest.keys()):
        rest[name] = parse_value(name, bool | None, rest[name])
    if rest.get("enable_thinking") and rest.get("think_end_token") is None:
        raise UsageError("enable_thinking=true needs think_end_token=..., where an answer begins")
    if rest.get("prefix_token_id") is not None:
        rest["prefix_token_id"] = parse_number("prefix_token_id", int, rest["prefix_token_id"], Range(low=0))
    for name in ("max_length", "max_batch_size"):
        if rest.get(name) is not None:
            rest[name] = parse_number(name, int, rest[name], POSITIVE["range"])
    for name, pattern, problem in (
        ("batch_size", BATCH_SIZES, "must be auto or a whole number from 1 on"),
        ("device", DEVICES, "is not known: cpu, cuda, cuda:N, mps"),
    ):
        if rest.get(name) is not None and not pattern.fullmatch(str(rest[name])):
            raise UsageError(f"{name}={rest[name]} {problem}")
    dtype = rest.get("dtype")
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise UsageError(f"dtype={dtype} is not known: choose one of {', '.join(DTYPES)}")
    if rest.get("softmax_dtype") not in (None, "float32"):
        raise UsageError("softmax_dtype: log-probabilities are always computed in float32 here; leave it out")


def _attn_implementation(settings: Settings, asked: str | None) -> str:
    """The attention implementation that the presses need, or the one asked for if it can be served."""
    needed = settings.attn_implementation
    if asked not in (None, "sdpa", "eager"):
        raise UsageError(
            f"attn_implementation={asked} takes no mask per layer, which compressed caches of different lengths need: "
            "use sdpa or eager"
        )
    if needed and asked and asked != needed:
        raise UsageError(
            f"press={settings.press_name} needs attn_implementation={needed}, not {asked}: leave the argument out"
        )
    return asked or needed or "sdpa"
