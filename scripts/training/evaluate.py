"""Measure a checkpoint's use of context: perplexity by context length and recall by distance, with no press.

    python -m scripts.training.evaluate --model lm_eval_kvpress/builtin --held-out pg19/test.jsonl

Perplexity: the *same* tokens are predicted with each length of context, so the lengths differ in nothing
else. They are the second half of windows of 2,048 tokens. With 64 tokens each is predicted on its own from
exactly those; with 128 to 512 in groups, for speed, so that a token sees up to an eighth more (as labelled).
Recall: documents of a seed that training never used; accuracy among four choices (chance 0.25) and the share
of answers that greedy decoding gets exactly.
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import GPTNeoXForCausalLM

from lm_eval_kvpress.recall import KINDS, RecallDocument, recall_document
from lm_eval_kvpress.tables import markdown_table

WINDOW = 2048
GROUPS = {64: 1, 128: 16, 256: 32, 512: 64}  # tokens of context -> tokens predicted at once
LONG_CONTEXT = f"{WINDOW // 2}-{WINDOW - 1}"
DISTANCES = (64, 128, 256, 512, 1024, 1500, 1800)
HELD_OUT_SEED = 20_000_000  # training and probes draw from other generators and seeds


@dataclass(frozen=True)
class RecallCell:
    """Recall without a press at one distance, kind and filler ("generated" or "prose": book text)."""

    distance: int
    kind: str
    filler: str
    num_documents: int
    accuracy: float
    exact: float


@dataclass(frozen=True)
class Figures:
    """What a model card states."""

    num_scored_tokens: int
    perplexity: dict[str, float]  # by tokens of context
    recall: tuple[RecallCell, ...]

    @property
    def num_documents(self) -> int:
        """Documents for each distance and filler, all kinds together."""
        return sum(c.num_documents for c in self.recall if (c.distance, c.filler) == (64, "prose"))

    @property
    def gain(self) -> float:
        """Share by which a long context lowers the perplexity of a context of 64 tokens."""
        return 1 - self.perplexity[LONG_CONTEXT] / self.perplexity["64"]

    def recall_at(self, distance: int, filler: str) -> tuple[float, float]:
        """Accuracy and exact share at a distance, the means over the kinds."""
        cells = [cell for cell in self.recall if cell.distance == distance and cell.filler == filler]
        return sum(c.accuracy for c in cells) / len(cells), sum(c.exact for c in cells) / len(cells)


def read_texts(file: Path) -> list[str]:
    """Books of a .jsonl with "text", or one plain text."""
    try:
        content = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            return [json.loads(line)["text"] for line in content.split("\n") if line]
        return [content]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"cannot read held-out text from {file}: {error}") from error


def windows(texts: Sequence[str], tokenizer: Tokenizer, per_text: int) -> list[torch.Tensor]:
    """Evenly spaced windows (2048,) of each text."""
    found = []
    for text in texts:
        ids = tokenizer.encode(text).ids
        spare = len(ids) - WINDOW
        if spare < 0:
            continue
        starts = sorted({spare * (2 * index + 1) // (2 * per_text) for index in range(per_text)})
        found += [torch.tensor(ids[start : start + WINDOW]) for start in starts]
    if not found:
        raise ValueError(f"held-out text is too short: one of {WINDOW} tokens is needed")
    return found


@torch.no_grad()
def summed_loss(model: GPTNeoXForCausalLM, ids: torch.Tensor, num_scored: int) -> float:
    """Negative log-likelihood in nats of the last `num_scored` tokens of each row of `ids` (B, T)."""
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=num_scored + 1).logits[:, :-1]  # (B, S, V)
    targets = ids[:, -num_scored:]
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum").item()


def perplexities(model: GPTNeoXForCausalLM, rows: Sequence[torch.Tensor]) -> dict[str, float]:
    """Perplexity per token of the second half of each window, by length of context."""
    half = WINDOW // 2
    labels = {context: f"{context}-{context + group - 1}" for context, group in GROUPS.items()} | {64: "64"}
    losses = dict.fromkeys([*labels.values(), LONG_CONTEXT], 0.0)
    for row in tqdm(rows, desc="perplexity"):
        for context, group in GROUPS.items():
            pieces = row[half - context :].unfold(0, context + group, group)  # (half / group, c + group)
            for piece in pieces.split(max(1, 4096 // (context + group))):
                losses[labels[context]] += summed_loss(model, piece.to(model.device), group)
        losses[LONG_CONTEXT] += summed_loss(model, row[None].to(model.device), half)
    return {context: math.exp(loss / (len(rows) * half)) for context, loss in losses.items()}


@torch.no_grad()
def answer(model: GPTNeoXForCausalLM, tokenizer: Tokenizer, document: RecallDocument) -> tuple[bool, bool]:
    """Whether the right choice has the highest log-likelihood, and whether greedy decoding gives it."""
    encode = tokenizer.encode
    prompt = encode(document.context + document.question).ids
    choices = [encode(choice).ids for choice in document.choices]
    longest = max(map(len, choices))
    rows = [prompt[-1:] + choice + [0] * (longest - len(choice)) for choice in choices]  # no token sees a right pad
    device = model.device
    cache = model(
        input_ids=torch.tensor([prompt[:-1]], device=device), use_cache=True, logits_to_keep=1
    ).past_key_values
    cache.batch_repeat_interleave(len(choices))
    logits = model(input_ids=torch.tensor(rows, device=device), past_key_values=cache).logits[:, :-1]  # (4, longest, V)
    scores, greedy = [], []
    for row, choice in zip(logits.float().log_softmax(-1), choices, strict=True):
        picked = row[range(len(choice)), choice]
        scores.append(picked.sum().item())
        greedy.append(row[: len(choice)].argmax(-1).tolist() == choice)
    return scores.index(max(scores)) == document.answer, greedy[document.answer]


def recall_cells(
    model: GPTNeoXForCausalLM, tokenizer: Tokenizer, prose: Sequence[str], per_cell: int
) -> tuple[RecallCell, ...]:
    """Recall by distance, kind and filler."""

    def count(text: str) -> int:
        return len(tokenizer.encode(text).ids)

    def book(rng: random.Random, num_tokens: int) -> str:
        text = rng.choice(prose)
        start = rng.randrange(max(len(text) - 5 * num_tokens, 1))
        ids = tokenizer.encode(text[start : start + 5 * num_tokens]).ids[:num_tokens]
        return str(tokenizer.decode(ids)).replace("\ufffd", "")

    cells = []
    grid = [(d, k, f) for d in DISTANCES for k in KINDS for f in (("generated", None), ("prose", book))]
    for distance, kind, (name, filler) in tqdm(grid, desc="recall"):
        hits = []
        for index in range(per_cell):
            seed = HELD_OUT_SEED + index
            document = recall_document(seed, distance=distance, kind=kind, filler=filler, count_tokens=count)
            hits.append(answer(model, tokenizer, document))
        accuracy, exact = (sum(column) / per_cell for column in zip(*hits, strict=True))
        cells.append(RecallCell(distance, kind, name, per_cell, accuracy, exact))
    return tuple(cells)


def measure(model_folder: Path, held_out: Sequence[str], per_text: int, per_cell: int, device: str) -> Figures:
    """All figures of a checkpoint, computed in float32."""
    tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    model = GPTNeoXForCausalLM.from_pretrained(model_folder, dtype=torch.float32).to(device).eval()
    rows = windows(held_out, tokenizer, per_text)
    return Figures(
        num_scored_tokens=len(rows) * WINDOW // 2,
        perplexity=perplexities(model, rows),
        recall=recall_cells(model, tokenizer, held_out, per_cell),
    )


def perplexity_table(figures: Figures) -> str:
    rows = [[context, f"{value:.2f}"] for context, value in figures.perplexity.items()]
    return markdown_table(["tokens of context", "perplexity"], rows)


def recall_table(figures: Figures) -> str:
    headings = ["distance in tokens", "generated filler: accuracy", "exact", "book filler: accuracy", "exact"]
    rows = []
    for distance in sorted({cell.distance for cell in figures.recall}):
        values = [*figures.recall_at(distance, "generated"), *figures.recall_at(distance, "prose")]
        rows.append([str(distance), *(f"{value:.3f}" for value in values)])
    return markdown_table(headings, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="perplexity by context length and recall by distance")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True, help="a .jsonl with `text`, or plain text")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--windows-per-text", type=int, default=2)
    parser.add_argument("--documents-per-cell", type=int, default=25)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(arguments)
    try:
        if not (args.model / "config.json").exists():
            raise ValueError(f"{args.model} holds no checkpoint (no config.json)")
        texts = read_texts(args.held_out)
        figures = measure(args.model, texts, args.windows_per_text, args.documents_per_cell, args.device)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(perplexity_table(figures), recall_table(figures), sep="\n\n")
    print(f"a long context lowers perplexity by {100 * figures.gain:.1f} %")
    if args.output:
        args.output.write_text(json.dumps(asdict(figures), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
