"""Turn the checkpoint of a run into what ships: bfloat16 weights, tokenizer, config, curve, model card."""

import csv
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.figure import Figure
from transformers import GPTNeoXForCausalLM

from scripts.machine import machine
from scripts.training.evaluate import LONG_CONTEXT, Figures, measure, perplexity_table, read_texts, recall_table

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
language: en
license: apache-2.0
---
# The built-in checkpoint of lm-eval-kvpress

A GPTNeoX of {num_parameters:,} parameters: {num_layers} layers, hidden size {hidden_size}, {num_heads} heads
of {head_size} (a quarter of each rotated), untied head, 2,048 positions, and its own byte-level BPE tokenizer
of {vocab_size:,} entries. It was trained so that presses can be compared on a machine with no network and no
GPU: it uses what stands far back in its context, and finds facts there that it is asked for. It is an
instrument for measuring cache compression, and no use as a language model.

- Trained on {tokens:,} tokens in {hours:.2f} hours on {hardware}, seed {seed}: public-domain books
  (Project Gutenberg, before 1919), segments that repeat, and generated recall documents
  (`lm_eval_kvpress/recall.py`).
- Made by `scripts/training/train.py`; what was tried, with figures, is in `docs/experiments/builtin_training.md`.
- Weights are bfloat16 in safetensors. The config asks for float32, which holds them exactly and is quick on every
  CPU; the figures below were measured in it, with no press.

## Perplexity by context

{num_scored_tokens:,} tokens of {held_out}, never trained on.
The same tokens are predicted with each length
of context: with {long_context} tokens perplexity is {gain:.1f} % lower than with 64.

{perplexity_table}

## Recall by distance

{num_documents} documents for each distance and filler, of a seed never trained on; distance is the number of
tokens between the fact and the question. *Accuracy*: among four choices (chance 0.25). *Exact*: greedy
decoding gives the answer. The facts stand amid generated sentences or amid the held-out text.

{recall_table}
"""


@dataclass(frozen=True)
class Facts:
    """What a card says about the training."""

    tokens: int
    hours: float
    hardware: str
    seed: int


def hardware(device: str) -> str:
    facts = machine()
    return str(facts["gpu"]) if device == "cuda" else f"{facts['num_threads']} threads of {facts['cpu']}"


def export(
    folder: Path,
    model: GPTNeoXForCausalLM,
    held_out: Path,
    *,
    facts: Facts,
    documents_per_cell: int,
    device: str,
) -> None:
    """Write folder/export, folder/figures.json and folder/loss.png; `model` holds the trained weights."""
    target = folder / "export"
    model.bfloat16().save_pretrained(target)
    _ask_for_float32(target / "config.json")
    shutil.copy(folder / "tokenizer" / "tokenizer.json", target)
    config = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 4 knows no other name for it
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    draw_losses(folder / "loss.csv", folder / "loss.png")
    figures = measure(target, read_texts(held_out), per_text=2, per_cell=documents_per_cell, device=device)
    (folder / "figures.json").write_text(json.dumps(asdict(figures), indent=1) + "\n", encoding="utf-8")
    (target / "README.md").write_text(card(model, figures, facts, held_out), encoding="utf-8")


def _ask_for_float32(file: Path) -> None:
    """Set the dtype that loaders take from the config: a CPU without bfloat16 instructions is slow in it."""
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n", encoding="utf-8")


def card(model: GPTNeoXForCausalLM, figures: Figures, facts: Facts, held_out: Path) -> str:
    config = model.config
    known = {
        "test.jsonl": "the 17 books of the PG-19 test split",
        "held_out.txt": "the last books of the corpus",
    }
    return CARD.format(
        num_parameters=model.num_parameters(),
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        head_size=config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        num_scored_tokens=figures.num_scored_tokens,
        held_out=known.get(held_out.name, held_out.name),
        long_context=LONG_CONTEXT,
        gain=100 * figures.gain,
        perplexity_table=perplexity_table(figures),
        num_documents=figures.num_documents,
        recall_table=recall_table(figures),
        **asdict(facts),
    )


def draw_losses(losses: Path, picture: Path) -> None:
    """The loss over tokens, one dot per step and a running mean; stages show as jumps, since rows differ."""
    with losses.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    tokens = [int(row["tokens"]) / 1e6 for row in rows]
    values = [float(row["loss"]) for row in rows]
    width = max(1, len(values) // 100)
    means = [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="million tokens", ylabel="training loss (nats per token)")
    axes.plot(tokens, values, ".", markersize=1, color="0.75", label="step")
    axes.plot(tokens, means, color="C0", label=f"mean of {width} steps")
    axes.legend()
    figure.savefig(picture, dpi=120)
