"""Result files of lm-eval -> frozen values: what ran, what came out, what was kept and how fast.

Reads `results_*.json` as lm-eval 0.4 writes them, with or without the facts that our models add under
``config.kvpress``. Knows no models and no tables, and invents nothing: what a file does not say is None.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lm_eval_kvpress.errors import UsageError

PATTERN = "results_*.json"
# Arguments of HFLM that change what a model answers: runs that differ in one of them are not compared.
MODEL_ARGUMENTS = (
    *("revision", "subfolder", "peft", "delta", "load_in_8bit", "load_in_4bit", "gguf_file", "tokenizer"),
    *("add_bos_token", "prefix_token_id", "softmax_dtype", "mixed_precision_dtype", "enable_thinking"),
    *("think_end_token", "chat_template_args"),
)
# What of our protocol makes figures incomparable. A stream's budget is its compression, not its protocol.
PROTOCOL = (
    *("query_tokens", "rolling", "rolling_context", "rolling_score", "short_context"),
    *("stream_chunk", "stream_positions", "max_length"),
)
# What a folder of losses (stream_output) and a results file both say of what ran.
IDENTITY = ("pretrained", "press", "protocol", "attn_implementation", "dtype", "versions")
Identity = tuple[str, ...]
# In the order of lm-eval's --seed. What draws (a random press, sampled answers) draws otherwise under another of them.
SEEDS = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
PLACEHOLDER = "bypass"  # lm-eval's, for all metrics of a task under --predict_only; its 999 is no figure
ROLLING = "loglikelihood_rolling"
STOCK_PROTOCOL = (("rolling", "stock lm-eval: one forward"),)


class ResultsError(UsageError):
    """A file that cannot be read as results: one line that names it and says what to do."""


@dataclass(frozen=True)
class Press:
    """What compressed the cache.

    Attributes:
        name: as in ``press=``; ``none`` for the uncompressed cache and for stock lm-eval.
        arguments: sorted pairs, defaults included; for streams with ``stream_budget``.
        removed_asked: the fraction that ``compression_ratio`` asks to remove; None under a budget, and for a press that
            leaves the prefill alone.
    """

    name: str
    arguments: tuple[tuple[str, str], ...] = ()
    removed_asked: float | None = None

    @property
    def is_none(self) -> bool:
        return self.name == "none"

    @property
    def acts_on_prefill(self) -> bool:
        return not self.is_none and not self.name.startswith("decoding:")

    @property
    def acts_on_decoding(self) -> bool:
        return self.name.startswith(("decoding:", "prefill_decoding:"))


@dataclass(frozen=True)
class Metric:
    """One figure of one task; ``higher_is_better`` is None for counts."""

    name: str
    filter: str
    value: float | None
    stderr: float | None
    higher_is_better: bool | None


@dataclass(frozen=True)
class Kept:
    """What a press left of a task's contexts. Sums over contexts; shares are fractions of the prefilled tokens.

    Of texts, how many a decoding press acted on is known where ``num_texts`` is not 0, as in files of older versions.
    """

    num_contexts_pressed: int
    num_contexts_unpressed: int
    num_short_contexts: int
    num_tokens: int
    num_tokens_scored_pressed: int
    num_texts: int
    num_texts_compressed: int
    num_decode_compressions: int
    share: float | None
    share_min_layer: float | None
    share_max_layer: float | None
    bytes_before: int
    bytes_allocated: int
    bytes_effective: int
    max_stream_bytes: int


@dataclass(frozen=True)
class Task:
    """One task of one run.

    Attributes:
        metrics: none where answers were logged and not scored (``--predict_only``).
        is_rolling: whether whole texts are scored (lm-eval's ``loglikelihood_rolling``).
        fingerprint: lm-eval's hash of its documents and prompts; None where no samples were logged.
        loaded: what a task of texts says that it loaded (``metadata.loaded``); None where it says nothing.
    """

    name: str
    metrics: tuple[Metric, ...]
    is_rolling: bool
    num_documents: int | None
    num_documents_available: int | None
    version: str
    num_fewshot: str
    fingerprint: str | None
    loaded: str | None
    kept: Kept | None
    notes: tuple[tuple[str, int], ...]
    samples: Path | None


@dataclass(frozen=True)
class Speed:
    """Rates in tokens per second, medians in seconds, without warm-up batches but for those of ``includes_warmup``."""

    prefill_tokens_per_sec: float | None = None
    score_tokens_per_sec: float | None = None
    decode_tokens_per_sec: float | None = None
    ttft_sec: float | None = None
    tpot_sec: float | None = None
    peak_memory_bytes: float | None = None
    includes_warmup: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One results file. ``parity`` is None where the certificate was not asked for, ``identity`` for stock lm-eval.

    ``seeds`` are empty in files that say none, and hold "None" for a seed that was left alone. ``num_batches`` counts
    what was timed, and is None for stock lm-eval.
    """

    file: Path
    date: float
    model: str
    checkpoint: str
    dtype: str
    device: str
    attention: str
    batch_size: str
    model_settings: tuple[tuple[str, str], ...]
    protocol: tuple[tuple[str, str], ...]
    press: Press
    seeds: tuple[tuple[str, str], ...]
    tasks: tuple[Task, ...]
    speed: Speed
    num_batches: int | None
    parity: bool | None
    versions: tuple[tuple[str, str], ...]
    identity: Identity | None = None

    @property
    def is_stock(self) -> bool:
        return self.protocol == STOCK_PROTOCOL

    @property
    def rolling(self) -> str | None:
        return dict(self.protocol).get("rolling")

    @property
    def is_stream(self) -> bool:
        return self.rolling == "stream"

    @property
    def unmeasured_tasks(self) -> tuple[str, ...]:
        """Tasks whose answers came from lm-eval's cache or an earlier run, so that no model computed them here."""
        if self.num_batches is None:
            return ()
        tasks = (task for task in self.tasks if task.num_documents)
        return tuple(task.name for task in tasks if task.kept is None or self.num_batches == 0)

    def task(self, name: str) -> Task | None:
        return next((task for task in self.tasks if task.name == name), None)


def read_results(places: Sequence[Path]) -> list[Cell]:
    """All results below the folders, or in the files, named; in order of their paths.

    Raises:
        ResultsError: if there are none, or one of them cannot be read.
    """
    files: set[Path] = set()
    for place in places:
        if not place.exists():
            raise ResultsError(f"{place} does not exist")
        found = {place} if place.is_file() else set(place.rglob(PATTERN))
        if not found and place in unfinished_cells([place]):
            raise ResultsError(f"no cell of the sweep in {place} is finished: its command goes on where it stopped")
        if not found:
            raise ResultsError(f"no {PATTERN} below {place}: pass the --output_path of lm_eval or of a sweep")
        files |= found
    return [read_cell(file) for file in sorted(files)]


def unfinished_cells(places: Sequence[Path]) -> dict[Path, list[str]]:
    """Folders of sweeps among the places and below them, and the names of cells that have no results yet."""
    folders = sorted({file.parent for place in places if place.is_dir() for file in place.rglob("sweep.json")})
    cells = {
        folder: sorted(cell.name for cell in folder.glob("cells/*") if not (cell / "results").is_dir())
        for folder in folders
    }
    return {folder: names for folder, names in cells.items() if names}


def read_cell(file: Path) -> Cell:
    """One results file."""
    try:
        with file.open(encoding="utf-8") as stream:
            content = json.load(stream)
    except json.JSONDecodeError as error:
        raise ResultsError(
            f"{file} is not whole JSON (line {error.lineno}, column {error.colno}): run that evaluation again, or "
            "delete the file"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ResultsError(f"{file} cannot be read: {error}") from error
    try:
        return _cell(file, content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ResultsError(
            f"{file} is not what lm-eval writes ({type(error).__name__}: {error}): delete it or move it away"
        ) from error


def _cell(file: Path, content: Mapping[str, Any]) -> Cell:
    config = content["config"]
    facts = config.get("kvpress") or {}
    arguments = _model_arguments(config.get("model_args"))
    protocol = facts.get("protocol")
    throughput = facts.get("throughput") or {}
    parity = facts.get("parity")
    checkpoint = facts.get("pretrained") or arguments.get("pretrained") or content.get("model_name")
    return Cell(
        file=file,
        date=float(content.get("date") or 0.0),
        model=str(config.get("model") or "unknown"),
        checkpoint=str(checkpoint or "unknown"),
        dtype=str(facts.get("dtype") or config.get("model_dtype") or "unknown").removeprefix("torch."),
        device=_device(facts, config),
        attention=str(facts.get("attn_implementation") or "unknown"),
        batch_size=str(facts.get("batch_size") or config.get("batch_size")),
        model_settings=_model_settings(content, arguments),
        protocol=STOCK_PROTOCOL if protocol is None else _pairs({key: protocol.get(key) for key in PROTOCOL}),
        press=_press(facts.get("press"), protocol or {}),
        seeds=tuple((name, str(config[name])) for name in SEEDS if name in config),
        tasks=tuple(_tasks(file, content, facts.get("tasks") or {})),
        speed=_speed(throughput),
        num_batches=throughput.get("num_batches"),
        parity=None if parity is None else bool(parity["passed"]),
        versions=_pairs(facts.get("versions") or _stock_versions(content)),
        identity=identity(facts, arguments.get("revision")) if facts else None,
    )


def _device(facts: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """As recorded; of several ranks the first one's, with their number, for speeds are per device."""
    device, num_ranks = str(facts.get("device") or config.get("device") or "unknown"), facts.get("num_ranks") or 1
    return device if num_ranks == 1 else f"{device} (one of {num_ranks})"


def identity(facts: Mapping[str, Any], revision: str | None) -> Identity:
    """What ran, for comparison. The revision is not in the facts of a results file but in its arguments."""
    recorded = (json.dumps(facts.get(key), sort_keys=True) for key in IDENTITY)
    return (*recorded, str(revision or "main"))


def _press(press: Mapping[str, Any] | None, protocol: Mapping[str, Any]) -> Press:
    if press is None:
        return Press("none")
    budget = {key: value for key, value in protocol.items() if key == "stream_budget"}
    told_apart = {"compression_ratio"} | ({"kv_budget"} if budget else set())  # of a stream it repeats stream_budget
    arguments = {key: value for key, value in press["arguments"].items() if key not in told_apart}
    if press.get("kv_budget") is not None and not budget:
        arguments["kv_budget"] = press["kv_budget"]
    found = Press(press["name"], _pairs(arguments | budget), _number(press.get("compression_ratio")))
    has_ratio = not budget and (found.acts_on_prefill or found.is_none)
    return found if has_ratio else replace(found, removed_asked=None)


def _tasks(file: Path, content: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[Task]:
    counts, configs = content.get("n-samples") or {}, content.get("configs") or {}
    for name, figures in content["results"].items():
        better = (content.get("higher_is_better") or {}).get(name) or {}
        metrics = tuple(_metrics(figures, better))
        if not metrics:  # a group without an aggregate
            continue
        count, config, fact = (one.get(name) or {} for one in (counts, configs, facts))
        samples = file.with_name(f"samples_{name}_{file.stem.removeprefix('results_')}.jsonl")
        yield Task(
            name=name,
            metrics=tuple(metric for metric in metrics if metric.name != PLACEHOLDER),
            is_rolling=config.get("output_type") == ROLLING,
            num_documents=count.get("effective"),
            num_documents_available=count.get("original"),
            version=str((content.get("versions") or {}).get(name)),
            num_fewshot=str((content.get("n-shot") or {}).get(name)),
            fingerprint=(content.get("task_hashes") or {}).get(name),
            loaded=_loaded(config.get("metadata")),
            kept=_kept(fact) if fact else None,
            notes=tuple(sorted((fact.get("notes") or {}).items())),
            samples=samples if samples.is_file() else None,
        )


def _loaded(metadata: Any) -> str | None:
    """The texts, and where they were cut, which stands beside them.

    Not the folder or hub that they came from, and nothing else of the metadata, into which lm-eval mixes the model's
    arguments: the same texts lie in many places and are asked under many presses.
    """
    loaded = metadata.get("loaded") if isinstance(metadata, Mapping) else None
    if not loaded:
        return None
    texts = {key: value for key, value in loaded.items() if key != "source"} if isinstance(loaded, Mapping) else loaded
    return json.dumps([texts, metadata.get("max_tokens")], sort_keys=True)


def _metrics(figures: Mapping[str, Any], better: Mapping[str, bool | None]) -> Iterator[Metric]:
    """Metrics are the keys `name,filter`; one that is null is missing, and is listed all the same."""
    for key, value in figures.items():
        name, comma, filter = key.partition(",")
        if comma and not name.endswith("_stderr"):
            stderr = _number(figures.get(f"{name}_stderr,{filter}"))
            yield Metric(name, filter, _number(value), stderr, better.get(name))


def _kept(fact: Mapping[str, Any]) -> Kept:
    pressed, unpressed = fact["contexts_pressed"], fact["contexts_unpressed"]
    return Kept(
        num_contexts_pressed=pressed["num_contexts"],
        num_contexts_unpressed=unpressed["num_contexts"],
        num_short_contexts=fact["num_short_contexts"],
        num_tokens=pressed["num_tokens"],
        num_tokens_scored_pressed=fact["tokens_scored_under_press"],
        num_texts=fact.get("texts_generated", 0),
        num_texts_compressed=fact.get("texts_compressed_while_decoding", 0),
        num_decode_compressions=fact.get("num_decode_compressions", 0),
        share=pressed["kept_share"],
        share_min_layer=pressed["kept_share_min_layer"],
        share_max_layer=pressed["kept_share_max_layer"],
        bytes_before=pressed["kv_bytes_before"] + unpressed["kv_bytes_before"],
        bytes_allocated=pressed["kv_bytes_allocated"] + unpressed["kv_bytes_allocated"],
        bytes_effective=(pressed["kv_bytes_effective"] or 0) + (unpressed["kv_bytes_effective"] or 0),
        max_stream_bytes=fact.get("max_stream_bytes", 0),
    )


def _speed(throughput: Mapping[str, Any]) -> Speed:
    def rate(phase: str) -> float | None:
        return _number((throughput.get(phase) or {}).get("tokens_per_sec"))

    def median(latency: str) -> float | None:
        return _number((throughput.get(latency) or {}).get("p50"))

    return Speed(
        rate("prefill"),
        rate("score"),
        rate("decode"),
        median("ttft_sec"),
        median("tpot_sec"),
        _number(throughput.get("peak_memory_bytes")),
        tuple(throughput.get("includes_warmup") or ()),
    )


def _model_arguments(arguments: Any) -> Mapping[str, Any]:
    """Older files hold the string that was typed."""
    if isinstance(arguments, str):
        return dict(pair.partition("=")[::2] for pair in arguments.split(",") if pair)
    return arguments or {}


def _model_settings(content: Mapping[str, Any], arguments: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    settings = {key: arguments[key] for key in MODEL_ARGUMENTS if arguments.get(key) is not None}
    settings["sha"] = content["config"].get("model_sha") or None
    settings["chat_template"] = content.get("chat_template_sha")
    settings["system_instruction"] = content.get("system_instruction_sha")
    settings["gen_kwargs"] = content["config"].get("gen_kwargs") or None
    return _pairs(settings)


def _stock_versions(content: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"transformers": content.get("transformers_version"), "lm_eval": content.get("lm_eval_version")}


def _pairs(mapping: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Sorted and hashable; what is None is left out."""
    return tuple(sorted((str(key), str(value)) for key, value in mapping.items() if value is not None))


def _number(value: Any) -> float | None:
    """A float, NaN and infinities included; None for null, text such as "N/A", and booleans."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
