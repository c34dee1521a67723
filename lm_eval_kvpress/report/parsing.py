"""The content of a results file -> a `Cell`.

Reads what lm-eval 0.4 writes, with or without the facts that our models add under ``config.kvpress``. Types were
checked before (`results_schema`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lm_eval_kvpress.report.averages import group_members, groups
from lm_eval_kvpress.report.cell import STOCK_PROTOCOL, Cell, Identity, Kept, Metric, Pairs, Press, Task
from lm_eval_kvpress.report.fidelity import Fidelity, Figure, Place
from lm_eval_kvpress.report.metric_values import PREDICT_ONLY, number, task_metrics
from lm_eval_kvpress.report.speeds import parse_speed

# Arguments of HFLM that change what a model answers: runs that differ in one of them are not compared.
MODEL_ARGUMENTS = (
    *("revision", "subfolder", "peft", "delta", "load_in_8bit", "load_in_4bit", "gguf_file", "tokenizer"),
    *("add_bos_token", "prefix_token_id", "softmax_dtype", "mixed_precision_dtype", "enable_thinking"),
    *("think_end_token", "chat_template_args"),
)
# Parts of our protocol that make figures incomparable. A stream's budget is its compression, not its protocol.
PROTOCOL = (
    *("query_tokens", "rolling", "rolling_context", "rolling_score", "short_context"),
    *("stream_chunk", "stream_positions", "max_length", "query_aware", "question_pattern", "question_field"),
)
# How entries are packed where nobody said otherwise; a row names what differs.
PACKING_DEFAULTS = {"kv_group": 64, "kv_residual": 0, "kv_layout": "kivi", "kv_scales": "compact"}
# What ran, as a results file and a folder of losses (stream_output) both record it.
IDENTITY = ("pretrained", "press", "protocol", "attn_implementation", "dtype", "versions")
# In the order of lm-eval's --seed. Under another seed, random presses and sampled answers come out differently.
SEEDS = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
ROLLING = "loglikelihood_rolling"
HF = ("hf", "hf-auto", "huggingface")  # names of one model of lm-eval


def parse_cell(file: Path, content: Mapping[str, Any]) -> Cell:
    """The cell of one results file.

    Args:
        file: where the content stands; samples are looked for beside it.
        content: the JSON object, as `results_schema.read_content` returns it.
    """
    config = content["config"]
    facts = config.get("kvpress") or {}
    arguments = _model_arguments(config.get("model_args"))
    protocol = facts.get("protocol")
    throughput = facts.get("throughput") or {}
    parity = facts.get("parity")
    tasks = tuple(_tasks(file, content, facts.get("tasks") or {}))
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
        model_settings=_model_settings(content, arguments, is_stock=protocol is None),
        protocol=STOCK_PROTOCOL if protocol is None else _protocol(protocol),
        press=_press(facts.get("press"), protocol or {}, facts.get("quantization") or {}),
        seeds=tuple((name, str(config[name])) for name in SEEDS if name in config),
        tasks=tasks,
        speed=parse_speed(throughput, facts.get("machine")),
        num_batches=_num_batches(facts),
        parity=None if parity is None else bool(parity["passed"]),
        versions=_pairs(facts.get("versions") or _stock_versions(content)),
        identity=identity(facts, arguments.get("revision")) if facts else None,
        groups=tuple(groups(content, tasks)),
        num_parameters=number(config.get("model_num_parameters")),
    )


def identity(facts: Mapping[str, Any], revision: str | None) -> Identity:
    """What ran, comparable between a results file and a folder of losses.

    Args:
        facts: ``config.kvpress`` of a results file, or the settings of a folder of losses.
        revision: of the checkpoint, which a results file records among its arguments.
    """
    recorded = (json.dumps(facts.get(key), sort_keys=True) for key in IDENTITY)
    return (*recorded, str(revision or "main"))


def _num_batches(facts: Mapping[str, Any]) -> int | None:
    """Those whose times are in the record, and those of other machines."""
    num_timed: int | None = (facts.get("throughput") or {}).get("num_batches")
    elsewhere: int = (facts.get("answered_before") or {}).get("batches_on_other_machines", 0)
    return None if num_timed is None else num_timed + elsewhere


def _device(facts: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The device of the first rank, with the number of ranks if there are several: speeds are per device."""
    device, num_ranks = str(facts.get("device") or config.get("device") or "unknown"), facts.get("num_ranks") or 1
    return device if num_ranks == 1 else f"{device} (one of {num_ranks})"


def _press(press: Mapping[str, Any] | None, protocol: Mapping[str, Any], packing: Mapping[str, Any]) -> Press:
    if press is None:
        return Press("none")
    budget = {key: value for key, value in protocol.items() if key == "stream_budget"}
    left_out = {"compression_ratio"} | ({"kv_budget"} if budget else set())  # a stream's kv_budget is its stream_budget
    arguments = {key: value for key, value in press["arguments"].items() if key not in left_out}
    if press.get("kv_budget") is not None and not budget:
        arguments["kv_budget"] = press["kv_budget"]
    changes = str(press.get("changes_entries") or "")
    packed = {name: value for name, value in packing.items() if PACKING_DEFAULTS.get(name) != value}
    pairs = _pairs(arguments | budget | packed)
    packed_as = str(packing.get("kv_quant") or "")
    parsed = Press(press["name"], pairs, number(press.get("compression_ratio")), changes, packed_as)
    has_ratio = not budget and (parsed.acts_on_prefill or not parsed.evicts)
    return parsed if has_ratio else replace(parsed, removed_asked=None)


def _tasks(file: Path, content: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[Task]:
    counts, configs = content.get("n-samples") or {}, content.get("configs") or {}
    members = group_members(content)
    for name, figures in content["results"].items():
        if name in members or not any("," in key for key in figures):  # also a group without an average
            continue
        metrics = task_metrics(figures, (content.get("higher_is_better") or {}).get(name) or {})
        count, config, fact = (part.get(name) or {} for part in (counts, configs, facts))
        samples = file.with_name(f"samples_{name}_{file.stem.removeprefix('results_')}.jsonl")
        yield Task(
            name=name,
            metrics=tuple(metric for metric in metrics if metric.name != PREDICT_ONLY),
            is_rolling=config.get("output_type") == ROLLING,
            num_documents=count.get("effective"),
            num_documents_available=count.get("original"),
            is_chosen=content["config"].get("limit") is None and count.get("effective") != count.get("original"),
            version=str((content.get("versions") or {}).get(name)),
            num_fewshot=str((content.get("n-shot") or {}).get(name)),
            fingerprint=(content.get("task_hashes") or {}).get(name),
            loaded=_loaded(config.get("metadata") or {}, metrics),
            kept=_kept(fact) if fact else None,
            fidelity=_fidelity(fact.get("fidelity")),
            held_back=_held_back(fact.get("tokens_held_back")),
            notes=tuple(sorted((fact.get("notes") or {}).items())),
            num_cut=fact.get("num_cut_contexts", 0),
            num_without_question=fact.get("num_prompts_without_question", 0),
            num_without_context=fact.get("num_prompts_without_context", 0),
            samples=samples if samples.is_file() else None,
            few_shots=_few_shots(content, name),
            generation=_generation(config),
        )


def _few_shots(content: Mapping[str, Any], task: str) -> str | None:
    """The seed that draws a task's examples, and whether a chat template has them as turns; None without examples."""
    seed = content["config"].get("fewshot_seed")
    if not (content.get("n-shot") or {}).get(task) or seed is None:
        return None
    return json.dumps([seed, content.get("chat_template_sha") and bool(content.get("fewshot_as_multiturn"))])


def _generation(config: Mapping[str, Any]) -> str | None:
    arguments = config.get("generation_kwargs")
    return None if arguments is None else json.dumps(arguments, sort_keys=True)


def _loaded(metadata: Any, metrics: Sequence[Metric]) -> str | None:
    """The texts that a task loaded, with ``max_tokens``, and the lengths of those that it made; None without either.

    Without the folder or hub that they came from: the same texts lie in many places. Without the rest of the metadata:
    lm-eval mixes the model's arguments into it.
    """
    metadata = metadata if isinstance(metadata, Mapping) else {}
    loaded, lengths = metadata.get("loaded"), metadata.get("max_seq_lengths")
    made = lengths if isinstance(lengths, list) else [lengths] if lengths else [m.name for m in metrics if m.is_length]
    if not loaded and not made:
        return None
    texts = {key: value for key, value in loaded.items() if key != "source"} if isinstance(loaded, Mapping) else loaded
    return json.dumps([texts, metadata.get("max_tokens"), sorted(map(str, made))], sort_keys=True)


def _protocol(protocol: Mapping[str, Any]) -> Pairs:
    """What makes figures incomparable; ``query_aware=true`` is left out, which files of older versions do not name."""
    facts = {key: protocol.get(key) for key in PROTOCOL}
    return _pairs({**facts, "query_aware": None if facts["query_aware"] in (True, None) else "false"})


def _held_back(spread: Mapping[str, float] | None) -> tuple[float, float, float] | None:
    return None if spread is None else (spread["least"], spread["median"], spread["most"])


def _fidelity(fact: Mapping[str, Any] | None) -> Fidelity | None:
    if fact is None:
        return None
    places = (Place(one["last"], one["num_tokens"], one["kl_mean"]) for one in fact.get("by_position") or ())
    return Fidelity(
        fact["num_tokens"],
        _figure(fact, "kl_mean"),
        fact["kl_max"],
        _figure(fact, "top1_agreement"),
        tuple(places),
    )


def _figure(fact: Mapping[str, Any], name: str) -> Figure:
    low, high = fact.get(f"{name}_low"), fact.get(f"{name}_high")
    return Figure(fact[name], None if low is None or high is None else (low, high))


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
        bytes_unpacked=_sum_of(pressed.get("kv_bytes_unpacked"), unpressed.get("kv_bytes_unpacked")),
        num_tokens_generated=fact.get("tokens_generated") if "texts_at_limit" in fact else None,
        num_texts_at_limit=fact.get("texts_at_limit"),
    )


def _sum_of(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other


def _model_arguments(arguments: Any) -> Mapping[str, Any]:
    """``--model_args`` as a mapping; older files hold the string that was typed."""
    if isinstance(arguments, str):
        return dict(pair.partition("=")[::2] for pair in arguments.split(",") if pair)
    return arguments or {}


def _model_settings(content: Mapping[str, Any], arguments: Mapping[str, Any], *, is_stock: bool) -> Pairs:
    """What tells models of one checkpoint apart; our protocol names the longest input, lm-eval beside it."""
    settings = {key: arguments[key] for key in MODEL_ARGUMENTS if arguments.get(key) is not None}
    if is_stock:
        settings["max_length"] = content.get("max_length")
        settings["model"] = None if content["config"].get("model") in HF else content["config"].get("model")
    settings["sha"] = content["config"].get("model_sha") or None
    settings["chat_template"] = content.get("chat_template_sha")
    settings["system_instruction"] = content.get("system_instruction_sha")
    settings["gen_kwargs"] = content["config"].get("gen_kwargs") or None
    return _pairs(settings)


def _stock_versions(content: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"transformers": content.get("transformers_version"), "lm_eval": content.get("lm_eval_version")}


def _pairs(mapping: Mapping[str, Any]) -> Pairs:
    """The items as text, sorted and hashable, without those that are None."""
    return tuple(sorted((str(key), str(value)) for key, value in mapping.items() if value is not None))
