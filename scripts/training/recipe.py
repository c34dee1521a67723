"""The recipe of the built-in checkpoint: sizes, and the stages as a function of tokens.

Context use appears in a sudden transition or not at all, and the order of the stages decides
(docs/experiments/builtin_training.md):
short rows with many repeats at a constant rate until copying appears, then dense recall documents until a value
is bound to its subject, then longer rows, then mostly text.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Mixture:
    """Shares of the rows; recall takes what the other two leave, and `dense` is the dense share of it."""

    text: float
    repeats: float
    dense: float = 0.0


INDUCTION = Mixture(text=0.25, repeats=0.50)
ROWS_256 = Mixture(text=0.45, repeats=0.25)
BINDING = Mixture(text=0.15, repeats=0.15, dense=0.8)
LENGTHS = Mixture(text=0.45, repeats=0.20, dense=0.5)
TEXT = Mixture(text=0.70, repeats=0.08, dense=0.5)
LONG = Mixture(text=0.76, repeats=0.04, dense=0.5)


@dataclass(frozen=True)
class Stage:
    """A stretch of training; `tokens` None means what --tokens leaves to the stages before and after."""

    name: str
    contexts: tuple[int, ...]  # one is drawn per step
    tokens: int | None
    rate_from: float
    rate_to: float  # reached by cosine
    mixture: Mixture


@dataclass(frozen=True)
class Recipe:
    """All that decides the curve but the seed and --tokens."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    tokens_per_step: int
    warmup_steps: int
    corpus_characters: int
    default_tokens: int
    probe_every: int  # steps
    stages: tuple[Stage, ...]


RECIPES = {
    "builtin": Recipe(
        vocab_size=4096,
        hidden_size=256,
        num_layers=4,
        num_heads=4,
        tokens_per_step=4096,
        warmup_steps=200,
        corpus_characters=90_000_000,
        default_tokens=27_000_000,
        probe_every=200,
        stages=(
            Stage("induction", (128,), 7_000_000, 2e-3, 2e-3, INDUCTION),
            Stage("256", (256,), 1_500_000, 1.5e-3, 1.45e-3, ROWS_256),
            Stage("binding", (256,), 1_500_000, 1.45e-3, 1.4e-3, BINDING),
            Stage("512", (512,), 1_500_000, 1.4e-3, 1.35e-3, LENGTHS),
            Stage("1024", (1024,), 2_000_000, 1.35e-3, 1.2e-3, LENGTHS),
            Stage("2048", (2048,), 2_500_000, 1.2e-3, 1e-3, LENGTHS),
            Stage("text", (256, 512, 1024, 2048, 2048), None, 1e-3, 1e-3, TEXT),
            Stage("cool-down", (256, 512, 1024, 2048, 2048), 7_000_000, 1e-3, 2e-5, TEXT),
            Stage("long", (2048,), 3_000_000, 6e-4, 2e-5, LONG),
        ),
    ),
    "tiny": Recipe(  # for the tests: seconds, learns nothing
        vocab_size=600,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        tokens_per_step=256,
        warmup_steps=4,
        corpus_characters=100_000,
        default_tokens=256 * 60,
        probe_every=25,
        stages=(
            Stage("induction", (128,), 256 * 20, 2e-3, 2e-3, INDUCTION),
            Stage("text", (128, 256), None, 1e-3, 1e-3, TEXT),
            Stage("cool-down", (256,), 256 * 10, 1e-3, 1e-4, TEXT),
        ),
    ),
}


def stage_at(recipe: Recipe, step: int, total_tokens: int) -> tuple[Stage, float]:
    """The stage of a step and its learning rate."""
    fixed = sum(stage.tokens or 0 for stage in recipe.stages)
    start = 0.0
    position = step * recipe.tokens_per_step
    for stage in recipe.stages:
        length = stage.tokens if stage.tokens is not None else max(total_tokens - fixed, 0)
        if position < start + length or stage is recipe.stages[-1]:
            done = min((position - start) / max(length, 1), 1.0)
            rate = stage.rate_to + (stage.rate_from - stage.rate_to) * (1 + math.cos(math.pi * done)) / 2
            return stage, rate * min(1.0, (step + 1) / recipe.warmup_steps)
        start += length
    raise AssertionError("a recipe has at least one stage")


def check_schedule(recipe: Recipe, step: int, old_tokens: int, new_tokens: int) -> None:
    """Refuse another --tokens under which a step that is done would have had another rate.

    The last step done stands for all: the rate depends on --tokens in the last stage alone.
    """
    if step and stage_at(recipe, step - 1, old_tokens) != stage_at(recipe, step - 1, new_tokens):
        raise ValueError(f"the run has begun its last stages for --tokens {old_tokens}; continue it with that")
