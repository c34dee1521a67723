"""Speed and memory of decoding through compressed caches: presses x batch sizes x prompt lengths x new tokens.

Every setting is warmed up once; then all settings are repeated, in an order that is shuffled anew each time, so that a
machine that slows down slows all of them down. Figures are medians over the repeats with 95 % bootstrap intervals.
Exactly NEW tokens are decoded, greedily; an end-of-text token does not end a row here.

    python -m scripts.benchmarks.presses                         the built-in checkpoint, about a minute
    python -m scripts.benchmarks.presses --shape pythia-410m     random weights: speed and memory, no perplexity
    python -m scripts.benchmarks.presses --pretrained EleutherAI/pythia-2.8b --dtype float16

The last line of stdout is one JSON document; it and a Markdown table are written to --output as well.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import platform
import random
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.tasks import TaskManager
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PretrainedConfig, PreTrainedModel

from lm_eval_kvpress.engine.compression import Compressor
from lm_eval_kvpress.engine.cuda_graph import GraphRecorder
from lm_eval_kvpress.engine.outcomes import GenerationSettings, Prompt
from lm_eval_kvpress.engine.runner import Runner
from lm_eval_kvpress.harness.arguments import resolve_pretrained
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.presses.parse import parse_press
from lm_eval_kvpress.records.clock import Clock
from lm_eval_kvpress.records.meter import Meter, RequestId
from lm_eval_kvpress.records.timings import BatchRecord, RequestRecord

PRESSES = "none,snapkv,streaming_llm,pyramidkv"
TASKS = Path(__file__).resolve().parents[2] / "tasks"
STORIES = TASKS / "demo" / "stories"
NUM_RESAMPLES = 2_000
QUERY_TOKENS = 1

# Pythia's configurations: layers, hidden size, heads, vocabulary. Its feed-forward is always four times as wide.
SHAPES = {
    "pythia-14m": (6, 128, 4, 50_304),
    "pythia-70m": (6, 512, 8, 50_304),
    "pythia-160m": (12, 768, 12, 50_304),
    "pythia-410m": (24, 1024, 16, 50_304),
    "pythia-1b": (16, 2048, 8, 50_304),
    "pythia-1.4b": (24, 2048, 16, 50_304),
    "pythia-2.8b": (32, 2560, 32, 50_304),
    "pythia-6.9b": (32, 4096, 32, 50_432),
    "pythia-12b": (36, 5120, 40, 50_688),
}

# Of Llama architecture, several query heads to a key-value head: layers, hidden size, heads, key-value heads, width of
# the feed-forward, vocabulary, whether the head has the embeddings' weights.
GROUPED_SHAPES = {
    "smollm2-135m": (30, 576, 9, 3, 1_536, 49_152, True),
    "llama-3.2-1b": (16, 2048, 32, 8, 8_192, 128_256, True),
    "llama-3.1-8b": (32, 4096, 32, 8, 14_336, 128_256, False),
}


@dataclass(frozen=True)
class Case:
    """One setting."""

    press: str
    batch_size: int
    num_prompt_tokens: int
    num_new_tokens: int


@dataclass(frozen=True)
class Measurement:
    """One run of a case. Prefill counts the press's time, as a user waits for both; `press_sec` is what it took.
    `tpot_sec` has all that decoding took after the first token, `itl_sec` is the median time between two tokens."""

    prefill_tokens_per_sec: float
    press_sec: float
    decode_tokens_per_sec: float
    ttft_sec: float
    tpot_sec: float | None
    itl_sec: float | None
    kept_share: float
    kv_bytes_before: int
    kv_bytes_allocated: int
    kv_bytes_effective: int
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class Estimate:
    """A median over the repeats with its 95 % bootstrap interval."""

    median: float
    low: float
    high: float


class Bench:
    """One model under several presses.

    Args:
        lm: the loaded model, under no press.
        presses: names for ``press=``.
        ratio: the fraction that each of them removes.
    """

    def __init__(self, lm: KVPress, presses: Sequence[str], ratio: float) -> None:
        self._model = lm.press_model
        self._clock, self._graphs = Clock(lm.device), GraphRecorder(lm.press_model)
        arguments = {press: {} if press == "none" else {"compression_ratio": ratio} for press in presses}
        specs = {press: parse_press(press, arguments[press]) for press in presses}
        for press, spec in specs.items():
            if spec.attn_implementation not in (None, lm.model.config._attn_implementation):
                raise ValueError(
                    f"press={press} needs {spec.attn_implementation} attention, which no other one here has"
                )
            spec.check_layers(lm.model.config.num_hidden_layers)
        self._compressors = {
            press: Compressor(
                self._model,
                spec,
                query_tokens=QUERY_TOKENS,
                short_context="error",
                clock=self._clock,
            )
            for press, spec in specs.items()
        }

    def check(self, case: Case) -> None:
        """Refuses, before any work, a prompt that is too long for the model or too short for the press."""
        positions = self._model.model.config.max_position_embeddings
        if case.num_prompt_tokens + case.num_new_tokens > positions:
            asked = f"--prompt-tokens {case.num_prompt_tokens} and --new-tokens {case.num_new_tokens}"
            raise ValueError(f"{asked} exceed the {positions} positions that the model was trained on")
        self._compressors[case.press].check_lengths([range(case.num_prompt_tokens)])

    def notes(self, case: Case) -> list[str]:
        """What the press reported about itself in this case, such as that it did the same as another press."""
        press = self._compressors[case.press].press
        return sorted(press.notes(case.num_prompt_tokens - QUERY_TOKENS, len(self._model.attentions)))

    def measure(self, case: Case, prompts: Sequence[tuple[int, ...]]) -> Measurement:
        """Prefills, compresses and decodes one batch."""
        records: list[BatchRecord | RequestRecord] = []
        meter = Meter(self._clock, dict.fromkeys(("device", "dtype", "press", "protocol"), ""), [_Collector(records)])
        compressor = self._compressors[case.press]
        runner = Runner(self._model, compressor, self._clock, meter, nullcontext, graphs=self._graphs)
        jobs = [Prompt(prompt, seed=0, id=RequestId("", None, row)) for row, prompt in enumerate(prompts)]
        runner.generate(jobs, GenerationSettings({}, case.num_new_tokens, frozenset(), lambda new: [False] * len(new)))
        meter.finish("generate_until")
        return _measurement(records)


@dataclass(frozen=True)
class _Collector:
    records: list[BatchRecord | RequestRecord]

    def add(self, record: BatchRecord | RequestRecord) -> None:
        self.records.append(record)


def _measurement(records: Sequence[BatchRecord | RequestRecord]) -> Measurement:
    (batch,) = (record for record in records if isinstance(record, BatchRecord))
    requests = [record for record in records if isinstance(record, RequestRecord)]
    before, allocated, effective = (
        sum(getattr(request, f"kv_bytes_{state}") for request in requests)
        for state in ("before", "allocated", "effective")
    )
    peaks = (batch.prefill_peak_memory_bytes, batch.decode_peak_memory_bytes)
    first = requests[0]
    assert first.ttft_sec is not None, "every row decodes at least one token"
    return Measurement(
        prefill_tokens_per_sec=batch.num_prefill_tokens / (batch.prefill_sec + batch.press_sec),
        press_sec=batch.press_sec,
        decode_tokens_per_sec=batch.num_output_tokens / batch.decode_sec,
        ttft_sec=first.ttft_sec,
        tpot_sec=first.tpot_sec,
        itl_sec=first.itl_p50_sec,
        kept_share=effective / before,
        kv_bytes_before=before,
        kv_bytes_allocated=allocated,
        kv_bytes_effective=effective,
        peak_memory_bytes=max(filter(None, peaks), default=None),
    )


def estimate(values: Sequence[float], seed: int = 0) -> Estimate:
    """The median and the percentile bootstrap's interval of it."""
    resampled = np.random.default_rng(seed).choice(np.asarray(values), size=(NUM_RESAMPLES, len(values)))
    low, high = np.percentile(np.median(resampled, axis=1), (2.5, 97.5))
    return Estimate(float(np.median(values)), float(low), float(high))


def summarize(runs: Sequence[Measurement]) -> dict[str, Any]:
    """One `Estimate` per figure, as a dict; None where the machine or the case has no such figure."""
    columns: dict[str, Any] = {}
    for name in Measurement.__dataclass_fields__:
        values = [getattr(run, name) for run in runs]
        columns[name] = None if None in values else asdict(estimate(values))
    return columns


def random_model(shape: str, dtype: str) -> PreTrainedModel:
    """Random weights in the shape of a model: as fast and as large as the trained one."""
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        config = config_of(shape)
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()


def config_of(shape: str) -> PretrainedConfig:
    if shape in SHAPES:
        layers, hidden, heads, vocabulary = SHAPES[shape]
        return GPTNeoXConfig(
            num_hidden_layers=layers,
            hidden_size=hidden,
            num_attention_heads=heads,
            intermediate_size=4 * hidden,
            vocab_size=vocabulary,
            rotary_pct=0.25,
            max_position_embeddings=2048,
        )
    layers, hidden, heads, key_value_heads, width, vocabulary, is_tied = GROUPED_SHAPES[shape]
    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        intermediate_size=width,
        vocab_size=vocabulary,
        tie_word_embeddings=is_tied,
        max_position_embeddings=8192,
    )


def load(arguments: argparse.Namespace) -> KVPress:
    if arguments.shape is None:
        return KVPress(pretrained=arguments.pretrained, dtype=arguments.dtype)
    model = random_model(arguments.shape, arguments.dtype)
    return KVPress(pretrained=model, tokenizer=resolve_pretrained("builtin"))  # a tokenizer that no prompt needs


def prompts(lm: KVPress, case: Case, *, is_random: bool) -> list[tuple[int, ...]]:
    """The same for every press: pieces of the stories, or random tokens for random weights."""
    length = case.num_prompt_tokens
    if is_random:
        generator = torch.Generator().manual_seed(0)
        shape = (case.batch_size, length)
        return [tuple(row) for row in torch.randint(lm.model.config.vocab_size, shape, generator=generator).tolist()]
    ids = lm.tok_encode("\n\n".join(path.read_text(encoding="utf-8") for path in sorted(STORIES.glob("*.txt"))))
    ids = list(itertools.islice(itertools.cycle(ids), len(ids) + length))
    step = (len(ids) - length) // case.batch_size
    return [tuple(ids[row * step : row * step + length]) for row in range(case.batch_size)]


def run_cases(bench: Bench, cases: Sequence[Case], of_case: Mapping[Case, Any], repeats: int) -> dict[Case, list[Any]]:
    """Warm-up, then the repeats in shuffled order."""
    for case in cases:
        bench.check(case)
    for case in cases:
        bench.measure(case, of_case[case])
    runs: dict[Case, list[Any]] = {case: [] for case in cases}
    order = random.Random(0)
    for _ in range(repeats):
        for case in order.sample(list(cases), len(cases)):
            runs[case].append(bench.measure(case, of_case[case]))
    return runs


def perplexities(lm: KVPress, press: str, ratio: float, tasks: Sequence[str]) -> dict[str, float]:
    """Token perplexity, per task, of what is scored over the compressed cache: the same tokens for every press."""
    of_press = {} if press == "none" else {"compression_ratio": ratio}
    under_press = KVPress(pretrained=lm.model, tokenizer=lm.tokenizer, press=press, batch_size=8, **of_press)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    lm_eval.simple_evaluate(model=under_press, tasks=list(tasks), task_manager=manager, bootstrap_iters=0)
    facts = under_press.describe()["tasks"]
    return {task: facts[task]["token_perplexity_under_press"] for task in tasks}


def headings(tasks: Sequence[str]) -> list[str]:
    speeds = ["prefill tok/s", "press ms", "TTFT ms", "TPOT ms", "decode tok/s"]
    return [
        "press",
        "batch",
        "prompt",
        "new",
        "kept",
        *speeds,
        "KV MiB",
        "peak MiB",
        *(f"{task} ppl" for task in tasks),
    ]


def cells(row: Mapping[str, Any], tasks: Sequence[str]) -> list[str]:
    """One line of the table: medians, and half the interval's width where it is not fixed by the setting."""

    def shown(name: str, scale: float = 1, digits: int = 0) -> str:
        if row[name] is None:
            return "-"
        median, half = row[name]["median"] * scale, (row[name]["high"] - row[name]["low"]) / 2 * scale
        return f"{median:,.{digits}f} ±{half:,.{digits}f}"

    def mib(name: str) -> str:
        return "-" if row[name] is None else f"{row[name]['median'] / 2**20:,.1f}"

    return [
        row["press"],
        *(str(row[name]) for name in ("batch_size", "num_prompt_tokens", "num_new_tokens")),
        f"{100 * row['kept_share']['median']:.1f} %",
        shown("prefill_tokens_per_sec"),
        shown("press_sec", 1000),
        shown("ttft_sec", 1000),
        shown("tpot_sec", 1000, 1),
        shown("decode_tokens_per_sec"),
        mib("kv_bytes_allocated"),
        mib("peak_memory_bytes"),
        *(f"{row['token_perplexity'][task]:.2f}" for task in tasks),
    ]


def markdown(report: Mapping[str, Any]) -> str:
    tasks, names = report["tasks"], headings(report["tasks"])
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    lines += [f"| {' | '.join(cells(row, tasks))} |" for row in report["rows"]]
    return "\n".join([*lines, "", legend(report), ""])


def legend(report: Mapping[str, Any]) -> str:
    shared = (
        f"{report['model']} in {report['dtype']} on {report['device']} with {report['num_threads']} threads; "
        f"compression_ratio {report['compression_ratio']} (removed); medians of {report['repeats']} repeats in "
        "shuffled order, ± half of the 95 % bootstrap interval. Prefill tok/s count the time in the press, which "
        "stands apart as press ms; TTFT includes both; KV is that of the whole batch after the press."
    )
    cpu = ["Peak memory is measured on CUDA devices only."] if report["device"] == "cpu" else []
    notes = dict.fromkeys(f"{row['press']}: {note}." for row in report["rows"] for note in row["notes"])
    return " ".join([shared, *cpu, *notes])


def show(report: Mapping[str, Any]) -> None:
    table = Table(title=f"{report['model']}, {report['dtype']}, {report['device']}")
    for heading in headings(report["tasks"]):
        table.add_column(heading, justify="left" if heading == "press" else "right", no_wrap=True)
    for row in report["rows"]:
        table.add_row(*cells(row, report["tasks"]))
    Console(width=max(180, Console().width)).print(table)
    print(legend(report))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    started = time.monotonic()
    lm = load(arguments)
    presses = arguments.presses.split(",")
    tasks = [] if arguments.shape else [task for task in arguments.tasks.split(",") if task]
    grid = itertools.product(presses, arguments.batch_sizes, arguments.prompt_tokens, arguments.new_tokens)
    cases = [Case(*values) for values in grid]
    of_case = {case: prompts(lm, case, is_random=arguments.shape is not None) for case in cases}
    bench = Bench(lm, presses, arguments.ratio)
    runs = run_cases(bench, cases, of_case, arguments.repeats)
    scores = {press: perplexities(lm, press, arguments.ratio, tasks) if tasks else {} for press in presses}
    return {
        "benchmark": "kv_cache_compression",
        "model": arguments.shape or arguments.pretrained,
        "random_weights": arguments.shape is not None,
        "device": torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else lm.device.type,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "num_threads": torch.get_num_threads(),
        "compression_ratio": arguments.ratio,
        "repeats": arguments.repeats,
        "tasks": tasks,
        "rows": [
            {**asdict(case), **summarize(measured), "token_perplexity": scores[case.press], "notes": bench.notes(case)}
            for case, measured in runs.items()
        ],
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "kvpress", "lm_eval")},
        },
        "seconds": round(time.monotonic() - started, 1),
    }


def counts(text: str) -> list[int]:
    """Comma-separated numbers, each at least 1."""
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text}: each must be at least 1")
    return values


def count(text: str) -> int:
    (value,) = counts(text)
    return value


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--pretrained", default="builtin", help="folder, hub name or builtin (default: builtin)")
    model.add_argument("--shape", choices=[*SHAPES, *GROUPED_SHAPES], help="random weights of a shape")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--presses", default=PRESSES, help="comma-separated (default: %(default)s)")
    parser.add_argument("--ratio", type=float, default=0.5, help="fraction of the cache that is removed (default: 0.5)")
    parser.add_argument("--batch-sizes", type=counts, default=[1, 4], help="comma-separated (default: 1,4)")
    parser.add_argument("--prompt-tokens", type=counts, default=[1800], help="comma-separated (default: 1800)")
    parser.add_argument("--new-tokens", type=counts, default=[30], help="comma-separated (default: 30)")
    parser.add_argument("--repeats", type=count, default=5, help="default: 5")
    parser.add_argument("--tasks", default="kvpress_story", help="for the perplexity columns; '' for none")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder of the two files")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        report = run(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(report)
    arguments.output.mkdir(parents=True, exist_ok=True)
    document = json.dumps(report)
    (arguments.output / "presses.json").write_text(document + "\n", encoding="utf-8")
    (arguments.output / "presses.md").write_text(markdown(report), encoding="utf-8")
    print(document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
