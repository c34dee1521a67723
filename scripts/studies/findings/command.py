"""The origin's benchmark again, as an experiment with conclusions: why was its perplexity the same for every press?

    python -m scripts.studies.findings --data_dir FOLDER                             the built-in checkpoint
    python -m scripts.studies.findings --pretrained EleutherAI/pythia-2.8b --dtype float16 --output runs/findings

Writes OUTPUT/findings.md with its figures beside it, and findings.json with the numbers. WikiText and PG19 come from
--data_dir (wikitext2/ and pg19/ below it) or else from the Hugging Face hub; a data set that cannot be had is skipped,
and the report says so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from lm_eval_kvpress.errors import UsageError
from lm_eval_kvpress.harness.checkpoint import resolve_pretrained
from lm_eval_kvpress.harness.model import KVPress
from scripts.machine import described, machine
from scripts.studies.findings.experiments import (
    DATASETS,
    PRESSES,
    RATIOS,
    Documents,
    load_documents,
    one_forward,
    perplexities,
    speeds,
)
from scripts.studies.findings.figures import draw
from scripts.studies.findings.first_token import first_tokens, questions, wrong_answers
from scripts.studies.findings.report import markdown
from scripts.studies.findings.rows import Findings, Perplexity
from scripts.studies.findings.wrong_split import split_difference

SPLIT_PRESSES = ("snapkv", "pyramidkv")  # they look at queries; StreamingLLM does not
NUM_CONTEXTS = 4

Say = Callable[[str], None]


def main() -> None:
    arguments = parser().parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    torch.manual_seed(0)
    started = time.perf_counter()

    def say(what: str) -> None:
        print(f"{time.perf_counter() - started:5.0f} s  {what}", flush=True)

    findings = measure(arguments, say)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "findings.json").write_text(json.dumps(asdict(findings), indent=1), encoding="utf-8")
    report = arguments.output / "findings.md"
    report.write_text(markdown(findings, draw(findings, arguments.output)), encoding="utf-8")
    say(f"wrote {report}")


def measure(arguments: argparse.Namespace, say: Say) -> Findings:
    """Run the experiments one after the other."""
    lm = KVPress(pretrained=arguments.pretrained, dtype=arguments.dtype)
    documents, skipped = load(arguments, lm, say)
    removed = arguments.ratio
    protocols, wrong, ratios = perplexity_rows(lm, documents, removed, say) if documents else ([], [], [])
    contexts = [lm.tok_encode(text)[: lm.max_length // 2] for texts in documents.values() for text in texts]
    contexts = sorted(contexts, key=len, reverse=True)[:NUM_CONTEXTS]
    say("one forward under each press; kept entries with either split")
    forwards = [one_forward(lm, contexts[0], press, removed) for press in PRESSES[1:]] if contexts else []
    differences = [split_difference(lm, contexts, press, removed) for press in PRESSES[1:]] if contexts else []
    say("questions with answers of one token")
    asked = questions(lm, arguments.questions)
    answered = first_tokens(lm, asked, (*PRESSES, "random"), removed)
    answered_wrong = wrong_answers(lm, asked, SPLIT_PRESSES, removed)
    say("speed")
    return Findings(
        setting=setting(arguments, lm),
        removed=removed,
        skipped=skipped,
        protocols=protocols,
        forwards=forwards,
        wrong=wrong,
        differences=differences,
        wrong_answers=answered_wrong,
        ratios=ratios,
        first_tokens=answered,
        speeds=speeds(lm, PRESSES, removed, arguments.repeats),
    )


def perplexity_rows(
    lm: KVPress, documents: Documents, removed: float, say: Say
) -> tuple[list[Perplexity], list[Perplexity], list[Perplexity]]:
    """Perplexities by protocol, with the wrong split beside the right one, and by ratio."""

    def rows(press: str, protocol: str, ratio: float, split: str = "right") -> list[Perplexity]:
        say(f"perplexity, {press}, {protocol}, {ratio:g} removed, {split} split")
        return perplexities(lm, documents, press, ratio, protocol, split=split)

    protocols = [
        row for press in PRESSES for protocol in ("one_pass", "prefix") for row in rows(press, protocol, removed)
    ]
    wrong = [row for row in protocols if row.press in SPLIT_PRESSES]
    for press in SPLIT_PRESSES:
        for protocol in ("one_pass", "prefix"):
            wrong += rows(press, protocol, removed, "contiguous")
    ratios = [row for row in protocols if row.protocol == "prefix"]
    for press in PRESSES[1:]:
        for ratio in RATIOS:
            if ratio != removed:
                ratios += rows(press, "prefix", ratio)
    return protocols, wrong, ratios


def load(arguments: argparse.Namespace, lm: KVPress, say: Say) -> tuple[Documents, list[str]]:
    """The documents that can be had, and why the others cannot."""
    documents, skipped = {}, []
    for dataset, title in DATASETS.items():
        limit, num_tokens = (arguments.pages, 6000) if dataset == "wikitext_kvpress" else (arguments.books, 4000)
        try:
            documents[dataset] = load_documents(dataset, lm, arguments.data_dir, limit, num_tokens)
        except UsageError as error:
            skipped.append(f"{title}: {error}")
            say(f"skipped {skipped[-1]}")
    return documents, skipped


def setting(arguments: argparse.Namespace, lm: KVPress) -> list[str]:
    """What the figures were measured on."""
    protocol = lm.describe()["protocol"]
    weights = Path(resolve_pretrained(arguments.pretrained)) / "model.safetensors"
    digest = f" (SHA-256 {hashlib.sha256(weights.read_bytes()).hexdigest()[:16]})" if weights.is_file() else ""
    return [
        f"`{arguments.pretrained}`{digest}, {lm.model.num_parameters() / 1e6:.1f} M parameters, "
        f"{str(lm.model.dtype).removeprefix('torch.')}, {lm.model.config._attn_implementation}; "
        f"{described(machine())}",
        f"{arguments.pages} pages of WikiText-2 of at most 6,000 tokens and the first 4,000 tokens of "
        f"{arguments.books} books of PG-19; `prefix`: {protocol['rolling_context']} tokens of context, then "
        f"{protocol['rolling_score']} scored",
        f"{arguments.ratio:g} of the entries removed where nothing else is said",
        "made by `python -m scripts.studies.findings`; every sentence with a figure is chosen by the figure",
    ]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", default="builtin", help="folder, hub name or builtin (default: builtin)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--data_dir", help="folder with wikitext2/ and pg19/ (default: the Hugging Face hub)")
    parser.add_argument("--ratio", type=float, default=0.5, help="fraction removed (default: 0.5)")
    parser.add_argument("--pages", type=int, default=6, help="pages of WikiText-2 (default: 6)")
    parser.add_argument("--books", type=int, default=5, help="books of PG-19 (default: 5)")
    parser.add_argument("--questions", type=int, default=60, help="default: 60")
    parser.add_argument("--repeats", type=int, default=7, help="of the speed measurement (default: 7)")
    parser.add_argument("--output", type=Path, default=Path("runs/findings"), help="folder (default: runs/findings)")
    return parser
