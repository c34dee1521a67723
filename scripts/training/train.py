"""Train the built-in checkpoint: a small GPTNeoX that really uses its context, and its tokenizer.

    python -m scripts.training.train --corpus books.txt.xz --output RUN [--tokens N] [--minutes M] [--seed S]

Run the same command again and it continues: the checkpoint holds model, optimizer, step and used time, and
the data of a step is a function of (seed, step), so the loss curve is that of a run that was never killed.
The schedule (`recipe`) is a function of tokens; minutes are only a stop.

RUN/export ships as `lm_eval_kvpress/builtin`: weights in bfloat16, tokenizer, config, model card. Beside it
are loss.csv, loss.png and probes.csv (copying and recall while it trains: what to watch).

On glibc, MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=8589934592 in the environment spares page
faults: 8.7 -> 10.3 thousand tokens/s at 2,048 tokens, 7 to 10 -> 12.7 at 128 (two cores).
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from lm_eval_kvpress.recall import KINDS, recall_document
from scripts.training.data import TrainingData, copy_rows
from scripts.training.evaluate import read_texts, windows
from scripts.training.export import Facts, export, hardware
from scripts.training.recipe import RECIPES, Recipe, check_schedule, stage_at
from scripts.training.run import Run

LOSS_COLUMNS = ("step", "tokens", "context", "rate", "loss")
PROBE_COLUMNS = ("step", "tokens", "distance", "copied", "recalled")


def new_model(recipe: Recipe, seed: int) -> GPTNeoXForCausalLM:
    """Pythia's architecture: fused QKV with bias, parallel residual, rotary on 1/4 of a head, untied."""
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        intermediate_size=4 * recipe.hidden_size,
        rotary_pct=0.25,
        max_position_embeddings=2048,
        use_parallel_residual=True,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return GPTNeoXForCausalLM(config)


def new_optimizer(model: GPTNeoXForCausalLM) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def next_token_loss(model: GPTNeoXForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each token of `ids` (B, T) given those before it."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits  # (B, T - 1, V)
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def probe(model: GPTNeoXForCausalLM, data: TrainingData, device: str, distance: int) -> tuple[float, float]:
    """Shares of a repeated random segment's tokens predicted and of recall answers given by greedy decoding."""
    copies = torch.from_numpy(copy_rows(data, 16, 64)).to(device)
    logits = model(input_ids=copies, use_cache=False).logits
    copied = (logits[:, 36:-1].argmax(-1) == copies[:, 37:]).float().mean().item()
    exact = []
    for index in range(24):
        document = recall_document(10**9 + index, distance=distance, kind=KINDS[index % len(KINDS)])
        prompt = data.tokenizer.encode(document.context + document.question).ids
        answer = data.tokenizer.encode(document.choices[document.answer]).ids
        ids = torch.tensor([prompt + answer], device=device)
        predicted = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].argmax(-1)
        exact.append(predicted.tolist() == answer)
    return copied, sum(exact) / len(exact)


class Trained(NamedTuple):
    model: GPTNeoXForCausalLM
    tokens: int
    hours: float


def train(run: Run, *, total_tokens: int, minutes: float | None, device: str, save_every_sec: float) -> Trained:
    """Train to the budget, from the last checkpoint on. Curves go to loss.csv and probes.csv."""
    recipe = run.recipe
    model = new_model(recipe, run.seed).to(device)
    optimizer = new_optimizer(model)
    step, used_sec = restore(run, model, optimizer, total_tokens, device)
    began = saved = time.monotonic()

    def save() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        run.save({**state, "used_sec": used_sec + time.monotonic() - began, "total_tokens": total_tokens})

    with (
        tqdm(total=total_tokens, initial=step * recipe.tokens_per_step, unit="tok", unit_scale=True) as progress,
        (run.folder / "loss.csv").open("a") as losses,
        (run.folder / "probes.csv").open("a") as probes,
    ):
        while step < total_tokens // recipe.tokens_per_step:
            stage, rate = stage_at(recipe, step, total_tokens)
            context = random.Random(f"{run.seed} {step} context").choice(stage.contexts)
            rows = run.data.batch(step, recipe.tokens_per_step // context, context, stage.mixture)
            loss = train_one_step(model, optimizer, torch.from_numpy(rows).to(device), rate)
            step += 1
            tokens = step * recipe.tokens_per_step
            print(f"{step},{tokens},{context},{rate:.4g},{loss:.6f}", file=losses, flush=True)
            progress.set_postfix_str(f"{stage.name} loss {loss:.3f}", refresh=False)
            progress.update(recipe.tokens_per_step)
            if step % recipe.probe_every == 0:
                distance = max(48, min(max(stage.contexts) - 80, 1500))
                copied, recalled = probe(model, run.data, device, distance)
                print(f"{step},{tokens},{distance},{copied:.3f},{recalled:.3f}", file=probes, flush=True)
            if time.monotonic() - saved >= save_every_sec:
                save()
                saved = time.monotonic()
            if minutes is not None and used_sec + time.monotonic() - began >= 60 * minutes:
                break
    save()
    return Trained(model, step * recipe.tokens_per_step, (used_sec + time.monotonic() - began) / 3600)


def restore(
    run: Run, model: GPTNeoXForCausalLM, optimizer: torch.optim.AdamW, total_tokens: int, device: str
) -> tuple[int, float]:
    """Load the last checkpoint, if there is one; the steps done and the seconds used."""
    step, used_sec = 0, 0.0
    state = run.load(device)
    if state is not None:
        check_schedule(run.recipe, state["step"], state["total_tokens"], total_tokens)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, used_sec = state["step"], state["used_sec"]
    run.truncate("loss.csv", LOSS_COLUMNS, step)
    run.truncate("probes.csv", PROBE_COLUMNS, step)
    return step, used_sec


def train_one_step(model: GPTNeoXForCausalLM, optimizer: torch.optim.AdamW, ids: torch.Tensor, rate: float) -> float:
    """One update on rows (B, T); the loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = next_token_loss(model, ids)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def pick_device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no usable GPU; use --device auto")
    return "cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu")


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        train_and_export(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def train_and_export(args: argparse.Namespace) -> None:
    """The whole command.

    Raises:
        ValueError: for bad input, before any training where that can be known.
    """
    device = pick_device(args.device)
    held_out = args.held_out or args.output / "held_out.txt"
    if args.held_out and not args.held_out.exists():
        raise ValueError(f"--held-out {args.held_out} does not exist")
    recipe = RECIPES[args.recipe]
    total_tokens = recipe.default_tokens if args.tokens is None else args.tokens
    if total_tokens < recipe.tokens_per_step:
        raise ValueError(f"--tokens {total_tokens} is less than one step, {recipe.tokens_per_step}")
    run = Run(args.output, args.corpus, args.recipe, args.seed)
    windows(read_texts(held_out), run.data.tokenizer, per_text=1)  # fails now rather than after hours
    limits = {"minutes": args.minutes, "save_every_sec": args.save_every_sec}
    trained = train(run, total_tokens=total_tokens, device=device, **limits)
    facts = Facts(trained.tokens, trained.hours, hardware(device), args.seed)
    cells = args.documents_per_cell
    export(run.folder, trained.model, held_out, facts=facts, documents_per_cell=cells, device=device)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="train the built-in checkpoint; run again to continue")
    parser.add_argument("--corpus", type=Path, required=True, help="text or .xz, <|endoftext|> between books")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run")
    parser.add_argument("--tokens", type=int, help="length of the whole schedule (default: the recipe's)")
    parser.add_argument("--minutes", type=float, help="stop after so much training, all stretches counted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="builtin")
    parser.add_argument("--held-out", type=Path, help="text of the card's perplexity (default: last books)")
    parser.add_argument("--documents-per-cell", type=int, default=25, help="of the card's recall figures")
    parser.add_argument("--save-every-sec", type=float, default=60.0)
    return parser


if __name__ == "__main__":
    sys.exit(main())
