"""Made-up results files, laid out as lm-eval 0.4.13 writes them, for `tests/report`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lm_eval_kvpress.records.loss_files import LossFiles
from lm_eval_kvpress.report.contents import Report

NUM_DOCUMENTS = 20
STREAMED = ([3.0] * 20 + [2.0] * 30, [1.0] * 40)  # losses of two documents
EVIL = "<script>alert(1)</script>|{{ x }}"


def results_file(
    press: str,
    ratio: float,
    *,
    acc: Any = 0.5,
    kept: float | None = None,
    stock: bool = False,
    checkpoint: str = "tiny",
    query_tokens: int = 1,
    notes: dict[str, int] | None = None,
    version: str = "0.5.5",
    num_documents: int = NUM_DOCUMENTS,
    date: float = 1.0,
) -> dict[str, Any]:
    """The content of one file: the task `recall` with `acc` and two distances; samples hold one of the two."""
    figures = {
        "alias": "recall",
        "acc,none": acc,
        "acc_stderr,none": "N/A",
        "acc_at_100,none": acc,
        "acc_at_800,none": acc,
    }
    content: dict[str, Any] = {
        "results": {"recall": figures},
        "higher_is_better": {"recall": {"acc": True, "acc_at_100": True, "acc_at_800": True}},
        "n-samples": {"recall": {"original": NUM_DOCUMENTS, "effective": num_documents}},
        "versions": {"recall": 1.0},
        "n-shot": {"recall": 0},
        "config": {"model": "hf", "model_args": {"pretrained": checkpoint}, "batch_size": "1", "device": "cpu"},
        "date": date,
    }
    content["config"]["limit"] = None if num_documents == NUM_DOCUMENTS else num_documents
    if not stock:
        content["config"] |= {"model": "kvpress", "model_dtype": "torch.float32"}
        content["config"]["kvpress"] = _facts(press, ratio, kept, checkpoint, query_tokens, notes or {}, version)
    return content


def _facts(
    press: str,
    ratio: float,
    kept: float | None,
    checkpoint: str,
    query_tokens: int,
    notes: dict[str, int],
    version: str,
) -> dict[str, Any]:
    share = None if press == "none" else (1 - ratio if kept is None else kept)
    full, left = (0, 4096) if share is None else (4096, 0)
    return {
        "pretrained": checkpoint,
        "press": {
            "name": press,
            "arguments": {"compression_ratio": ratio, "window_size": 64},
            "compression_ratio": ratio,
        },
        "protocol": {"query_tokens": query_tokens, "rolling": "prefix", "press_acts_on_rolling": press != "none"},
        "attn_implementation": "sdpa",
        "device": "cpu",
        "dtype": "float32",
        "batch_size": 1,
        "parity": None,
        "tasks": {
            "recall": {
                "contexts_pressed": _contexts(full, share),
                "contexts_unpressed": _contexts(left, None),
                "num_short_contexts": 0,
                "tokens_scored_under_press": 10,
                "notes": notes,
            }
        },
        "throughput": {
            "prefill": timed(1000.0),
            "decode": timed(20.0),
            "ttft_sec": {"num_values": 20, "p50": 0.25, "p50_low": 0.2, "p50_high": 0.3},
            "tpot_sec": None,
            "peak_memory_bytes": None,
        },
        "machine": {"cpu": "AMD EPYC", "num_threads": 2, "memory_bytes": 2**33, "gpu": None},
        "versions": {"kvpress": version},
    }


def timed(rate: float, *, num_batches: int = 20, num_tokens: int = 4000) -> dict[str, Any]:
    """A phase of the throughput."""
    bounds = {"tokens_per_sec_low": 0.9 * rate, "tokens_per_sec_high": 1.1 * rate}
    return {"num_batches": num_batches, "num_tokens": num_tokens, "tokens_per_sec": rate, **bounds}


def _contexts(size: int, share: float | None) -> dict[str, Any]:
    return {
        "num_contexts": 4 if size else 0,
        "num_tokens": size,
        "kept_share": share,
        "kept_share_min_layer": share,
        "kept_share_max_layer": share,
        "kv_bytes_before": size * 8,
        "kv_bytes_allocated": round(size * 8 * (1.0 if share is None else share)),
        "kv_bytes_effective": round(size * 8 * (1.0 if share is None else share)),
    }


def write_results(
    folder: Path, press: str, ratio: float, *, scores: Sequence[float] | None = None, name: str = "", **facts: Any
) -> Path:
    """Write a file, and with `scores` the samples beside it; `acc` is then their mean."""
    if scores is not None:
        facts |= {"acc": sum(scores) / len(scores), "num_documents": len(scores)}
    place = folder / (name or f"{press}-{ratio}")
    place.mkdir(parents=True, exist_ok=True)
    file = place / "results_2026.json"
    file.write_text(json.dumps(results_file(press, ratio, **facts)))
    if scores is not None:
        lines = [sample_line(index, score) for index, score in enumerate(scores)]
        (place / "samples_recall_2026.jsonl").write_text("\n".join(lines) + "\n")
    return file


def amend(file: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change a file that was written."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return file


def with_fidelity(file: Path, kl: float) -> None:
    """Add to a file that was written what it would say of fidelity, with an interval around KL."""
    facts: dict[str, Any] = {
        **{"num_tokens": 10, "kl_mean": kl, "kl_mean_low": kl / 2, "kl_mean_high": 2 * kl, "kl_max": 3 * kl},
        **{"top1_agreement": 1 - kl, "top1_agreement_low": None, "top1_agreement_high": None},
        "by_position": [{"first": 1, "last": 1, "num_tokens": 10, "kl_mean": kl, "top1_agreement": 1 - kl}],
    }
    amend(file, lambda content: content["config"]["kvpress"]["tasks"]["recall"].update(fidelity=facts))


def predict_only(folder: Path, press: str, **facts: Any) -> Path:
    """Write a run of `--predict_only`, where a placeholder stands for all metrics."""

    def change(content: dict[str, Any]) -> None:
        content["results"]["recall"] = {"alias": "recall", "bypass,none": 999, "bypass_stderr,none": "N/A"}
        content["higher_is_better"]["recall"] = {"bypass": True}

    return amend(write_results(folder, press, 0.5, **facts), change)


def unmeasured(folder: Path, press: str, *, name: str = "", **facts: Any) -> Path:
    """Write a run whose answers all came from a cache, as our models record it."""

    def change(content: dict[str, Any]) -> None:
        content["config"]["kvpress"] |= {"tasks": {}, "throughput": {"num_batches": 0, "ttft_sec": None}}

    return amend(write_results(folder, press, 0.5, name=name, **facts), change)


def without_prefill_press(
    folder: Path,
    press: str,
    *,
    num_compressions: int = 0,
    num_short: int = 0,
    num_texts: int = 0,
    num_texts_compressed: int = 0,
    acc: float = 0.4,
    rolling: str = "prefix",
) -> Path:
    """Write a run whose press saw no context of the prefill."""

    def change(content: dict[str, Any]) -> None:
        facts = content["config"]["kvpress"]
        task = facts["tasks"]["recall"]
        facts["protocol"] |= {"rolling": rolling, "press_acts_on_rolling": False}
        task |= {"num_decode_compressions": num_compressions, "num_short_contexts": num_short}
        task |= {"texts_generated": num_texts, "texts_compressed_while_decoding": num_texts_compressed}
        task["contexts_unpressed"], task["contexts_pressed"] = task["contexts_pressed"], task["contexts_unpressed"]

    return amend(write_results(folder, press, 0.0, acc=acc), change)


def write_leaderboard(folder: Path) -> None:
    """Write runs that show every kind of cell, mark and notice: four tables, with names that try to be markup."""
    half, most = [1, 0] * (NUM_DOCUMENTS // 2), [1, 1, 1, 0] * (NUM_DOCUMENTS // 4)
    write_results(folder, "none", 0.0, scores=[1] * NUM_DOCUMENTS)
    write_results(folder, "snapkv", 0.5, scores=half)
    write_results(folder, "snapkv", 0.25, scores=most, version="0.5.4")
    write_results(folder, EVIL, 0.5, scores=most, name="evil", notes={"it fell back_to $snapkv": 4})
    write_results(folder, "tova", 0.5, acc=float("nan"))
    write_results(folder, "knorm", 0.5, acc=None, date=2.0)
    write_results(folder, "knorm", 0.5, acc=0.3, name="older")
    write_results(folder, "keydiff", 0.5, acc=1.0, kept=1.0)
    without_prefill_press(folder, "decoding:knorm", num_compressions=23, num_texts=8, num_texts_compressed=2)
    unmeasured(folder, "lagkv", acc=0.4)
    write_results(folder, "snapkv", 0.5, name="few", acc=0.4, num_documents=3)
    write_results(folder, "none", 0.0, name="other", acc=12345.678, checkpoint=f"org/{EVIL} ~^\\", query_tokens=0)
    write_results(folder, "none", 0.0, name="stock", stock=True)
    write_stream(folder / "stream", "streaming_llm")


def portable(text: str, report: Report, folder: Path) -> str:
    """A written report without what differs from one day and machine to the next."""
    return text.replace(str(folder), "RESULTS").replace(report.date, "DATE").replace(report.version, "VERSION")


def sample_line(index: int, score: float) -> str:
    """A sample in lm-eval's order of keys; its text tries to look like the keys behind it."""
    sample = {
        "doc_id": index,
        "doc": {"prompt": '", "resps": [], "acc": 7'},
        "resps": [[[str(-score), "False"]]],
        "filter": "none",
        "metrics": ["acc", "acc_at_100"],
        "doc_hash": f"hash{index}",
        "acc": score,
        "acc_at_100": [score, index % 2 == 0],
    }
    return json.dumps(sample)


def write_stream(cell: Path, press: str, losses: Sequence[list[float]] = STREAMED, **changed: Any) -> Path:
    """Write a run of a stream as a sweep does: `results/MODEL/results_*.json`, with `stream` beside `results`."""
    file = write_results(cell, press, 0.0, name="results/tiny", num_documents=len(STREAMED))
    content = json.loads(file.read_text())
    facts = content["config"]["kvpress"]
    facts["protocol"] |= {"rolling": "stream", "stream_budget": 8, "stream_chunk": 4}
    facts["press"]["arguments"] = {"kv_budget": 8}
    file.write_text(json.dumps(content))
    keys = ("pretrained", "press", "protocol", "attn_implementation", "dtype", "versions")
    settings = {key: facts[key] for key in keys} | {"revision": "main", "weights": "1234abcd"} | changed
    store = LossFiles(cell / "stream", settings)
    for index, document in enumerate(losses):
        store.save("recall", list(range(len(document))), str(index), document, {})
    return file
