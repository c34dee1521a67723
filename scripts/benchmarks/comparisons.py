"""What `evaluation` measures against what: one row per workload, press and other side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch

from scripts.benchmarks.products import products
from scripts.benchmarks.sides import Models, Side, ours, pipeline, plain_generate, stock


@dataclass(frozen=True)
class Comparison:
    """Our side of a workload against another one.

    Attributes:
        press: of our side and of kvpress's loops; stock has none.
        rolling: our protocol of rolling perplexity; stock's is one_pass.
        against: ``stock``, ``pipeline``, ``pipeline-shared``, ``generate``, or ``products``, our arithmetic alone.
        agrees: whether both sides must give the same numbers.
        target: model to the least ratio that this project set itself.
        memory: whether the peak memory of both sides is measured.
    """

    workload: str
    press: str
    against: str
    rolling: str = "one_pass"
    agrees: bool = False
    target: Mapping[str, float] = field(default_factory=dict)
    memory: bool = False

    @property
    def name(self) -> str:
        return f"{self.task}/{self.press}/{self.against}"

    @property
    def task(self) -> str:
        """The workload, and the protocol where there are several."""
        return f"{self.workload}-{self.rolling}" if self.workload.endswith("rolling") else self.workload

    def ours(self, models: Models, batch_size: int) -> Side:
        return ours(models, self.press, batch_size, self.rolling)

    def theirs(self, models: Models, batch_size: int) -> Side:
        if self.against == "stock":
            return stock(models, batch_size)
        if self.against == "products":
            return products(models, self.press, batch_size, self.rolling)
        if self.against == "generate":
            return plain_generate(models, self.press)
        return pipeline(models, self.press, shares_contexts=self.against == "pipeline-shared")


def _both(target: float) -> dict[str, float]:
    return dict.fromkeys(("builtin", "pythia-70m"), target)


COMPARISONS = (
    Comparison("choice-200", "none", "stock", agrees=True),
    Comparison("choice-800", "none", "stock", agrees=True, target={"pythia-70m": 9, "builtin": 4}, memory=True),
    Comparison("choice-1600", "none", "stock", agrees=True),
    *(Comparison(workload, "none", "products", agrees=True) for workload in ("choice-800", "rolling")),
    Comparison("choice-200", "snapkv", "stock"),
    Comparison("choice-800", "snapkv", "stock", target={"pythia-70m": 7.5, "builtin": 3.2}),
    Comparison("choice-1600", "snapkv", "stock"),
    Comparison("qa-short", "snapkv", "stock", agrees=True, target={"pythia-70m": 3}),
    Comparison("rolling", "none", "stock", agrees=True, target={"pythia-70m": 1.3}, memory=True),
    Comparison("rolling", "snapkv", "stock", rolling="prefix", target={"pythia-70m": 1 / 1.7, "builtin": 1 / 2.1}),
    Comparison("choice-800", "none", "pipeline", agrees=True),
    Comparison("choice-800", "snapkv", "pipeline", agrees=True, target=_both(8)),
    Comparison("choice-800", "snapkv", "pipeline-shared", agrees=True),
    Comparison("generate-64x16", "snapkv", "stock"),
    *(Comparison(f"generate-64x{size}", "snapkv", "pipeline") for size in (1, 4, 8, 16)),
    Comparison("generate-128x16", "snapkv", "pipeline", target=_both(4)),
    *(Comparison(f"generate-64x{size}", "snapkv", "generate") for size in (1, 16)),
    Comparison("tiny-choice", "none", "stock", agrees=True),
    Comparison("tiny-choice", "none", "products", agrees=True),
    Comparison("tiny-choice", "none", "pipeline", agrees=True),
    Comparison("tiny-choice", "none", "pipeline-shared", agrees=True),
    Comparison("tiny-rolling", "none", "stock", agrees=True, memory=True),
    Comparison("tiny-rolling", "snapkv", "stock", rolling="prefix"),
    Comparison("tiny-generate", "none", "stock"),
    Comparison("tiny-generate", "snapkv", "pipeline"),
    Comparison("tiny-generate", "snapkv", "generate"),
)
"""In the order of the table. ``tiny-*`` are for ``--quick``."""


def chosen(patterns: Sequence[str], *, quick: bool) -> list[Comparison]:
    """Those whose names match one of the patterns.

    Raises:
        ValueError: if there are none.
    """
    known = [one for one in COMPARISONS if one.workload.startswith("tiny-") == quick]
    found = [one for one in known if any(fnmatch(one.name, pattern) for pattern in patterns)]
    if not found:
        raise ValueError(f"no row matches {','.join(patterns)}; there are {', '.join(one.name for one in known)}")
    return found
