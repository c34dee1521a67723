"""What a results file must hold for a report to read it: lm-eval's parts, and the facts that our models add.

Anybody may have written the file, so types are checked before anything is read. What a report does not read is free.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lm_eval_kvpress.errors import UsageError

T = TypeVar("T")
Count = Annotated[int, Field(ge=0)]
Maybe = Annotated[T | None, Field(default=None)]
# No text of a name: a page's script and its markup would read them differently, and no encoding has surrogates.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
MAX_DIGITS = 300  # of a whole number that a float can hold
OLD_KEYS = {"sample_len"}


class Part(BaseModel):
    """A JSON object; nothing is converted, and other keys may stand beside."""

    model_config = ConfigDict(strict=True, extra="ignore")


class NumDocuments(Part):
    original: Maybe[Count]
    effective: Maybe[Count]


class ContextFacts(Part):
    num_contexts: Count
    num_tokens: Count
    kept_share: float | None
    kept_share_min_layer: float | None
    kept_share_max_layer: float | None
    kv_bytes_before: Count
    kv_bytes_allocated: Count
    kv_bytes_effective: Count | None
    kv_bytes_unpacked: Maybe[Count]


class PositionFacts(Part):
    last: Count
    num_tokens: Annotated[int, Field(gt=0)]
    kl_mean: float


class FidelityFacts(Part):
    num_tokens: Count
    kl_mean: float
    kl_mean_low: Maybe[float]
    kl_mean_high: Maybe[float]
    kl_max: float
    top1_agreement: float
    top1_agreement_low: Maybe[float]
    top1_agreement_high: Maybe[float]
    by_position: Maybe[list[PositionFacts]]


class Spread(Part):
    least: float
    median: float
    most: float


class TaskFacts(Part):
    contexts_pressed: ContextFacts
    contexts_unpressed: ContextFacts
    num_short_contexts: Count
    num_cut_contexts: Count = 0
    num_prompts_without_question: Count = 0
    num_prompts_without_context: Count = 0
    tokens_scored_under_press: Count
    tokens_held_back: Maybe[Spread]
    tokens_generated: Maybe[Count]
    texts_generated: Count = 0
    texts_at_limit: Maybe[Count]
    texts_compressed_while_decoding: Count = 0
    num_decode_compressions: Count = 0
    max_stream_bytes: Count = 0
    notes: Maybe[dict[str, int]]
    fidelity: Maybe[FidelityFacts]


class PressFacts(Part):
    name: str
    arguments: dict[str, Any]
    compression_ratio: Maybe[float]
    changes_entries: Maybe[str]


class QuantizationFacts(Part):
    kv_quant: str


class Parity(Part):
    passed: bool


class AnsweredBefore(Part):
    batches_on_other_machines: Count = 0


class Throughput(Part):
    num_batches: Maybe[Count]
    prefill: Maybe[dict[str, Any]]
    score: Maybe[dict[str, Any]]
    decode: Maybe[dict[str, Any]]
    ttft_sec: Maybe[dict[str, Any]]
    tpot_sec: Maybe[dict[str, Any]]
    includes_warmup: Maybe[list[str]]


class Facts(Part):
    """``config.kvpress``."""

    press: Maybe[PressFacts]
    quantization: Maybe[QuantizationFacts]
    protocol: Maybe[dict[str, Any]]
    tasks: Maybe[dict[str, TaskFacts]]
    throughput: Maybe[Throughput]
    answered_before: Maybe[AnsweredBefore]
    parity: Maybe[Parity]
    versions: Maybe[dict[str, Any]]
    machine: Maybe[dict[str, Any]]


class Config(Part):
    model_args: Maybe[dict[str, Any] | str]
    kvpress: Maybe[Facts]


class Results(Part):
    config: Config
    results: dict[str, dict[str, Any]]
    date: Maybe[float]
    higher_is_better: Maybe[dict[str, dict[str, Any] | None]]
    num_documents: dict[str, NumDocuments] | None = Field(None, alias="n-samples")
    num_fewshot: dict[str, Any] | None = Field(None, alias="n-shot")
    versions: Maybe[dict[str, Any]]
    configs: Maybe[dict[str, dict[str, Any]]]
    task_hashes: Maybe[dict[str, str]]
    group_subtasks: Maybe[dict[str, list[str]]]
    groups: Maybe[dict[str, Any]]


def read_content(file: Path) -> dict[str, Any]:
    """The content of a results file, of the right types and with printable texts.

    Raises:
        UsageError: in one line, if the file is not what lm-eval 0.4 writes.
    """
    content = _plain(_read_json(file))
    try:
        Results.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise UsageError(
            f"{file} is not what lm-eval writes ({place}: {first['msg']}): delete it or move it away"
        ) from error
    assert isinstance(content, dict), "the schema is an object's"
    if _is_old(content["results"]):
        raise UsageError(f"{file} is of lm-eval 0.3, whose metrics name no filter: run that evaluation with 0.4 again")
    return content


def _read_json(file: Path) -> Any:
    try:
        with file.open(encoding="utf-8") as stream:
            return json.load(stream, parse_int=lambda text: int(text) if len(text) < MAX_DIGITS else float(text))
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{file} is not whole JSON (line {error.lineno}, column {error.colno}): run that evaluation again, or "
            "delete the file"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error


def _plain(value: Any) -> Any:
    """The value with every unprintable character of its texts replaced."""
    if isinstance(value, str):
        return UNPRINTABLE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    return value


def _is_old(results: dict[str, dict[str, Any]]) -> bool:
    keys = {key for figures in results.values() for key, value in figures.items() if isinstance(value, (int, float))}
    return bool(keys - OLD_KEYS) and not any("," in key for figures in results.values() for key in figures)
