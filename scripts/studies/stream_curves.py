"""Perplexity over position of books streamed under a fixed cache, far past the trained positions: figure and table.

Every setting scores the same tokens at the same budget and chunk: full sliding recomputation (each chunk after a plain
forward over the `budget` tokens before it), the window alone, sinks and window, the same with original positions, and
tova. Losses are kept per book and setting, so a killed run goes on where it ended. The last line is one JSON document.

    KVPRESS_DATA_DIR=FOLDER python -m scripts.studies.stream_curves     # FOLDER/pg19/test.jsonl
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from lm_eval_kvpress.bootstrap import interval
from lm_eval_kvpress.harness.model import KVPress
from lm_eval_kvpress.records.loss_files import LossFiles
from lm_eval_kvpress.tables import markdown_table
from scripts.benchmarks.streams import CHUNK, SETTINGS, Setting, first_books, steps_of

INSIDE, FAR = slice(1024, 2048), slice(10_000, 20_000)
"""Positions inside the trained window with a full cache at every budget here, and far beyond it."""


STYLES = {
    "recomputation_512": ("#000000", "o"),
    "window_512": ("#56B4E9", "s"),
    "sinks_512": ("#0072B2", "^"),
    "sinks64_512": ("#D55E00", "v"),
    "tova_512": ("#009E73", "D"),
    "sinks_1024": ("#CC79A7", "X"),
}
"""Colours of Okabe and Ito, which the colour-blind can tell apart; original positions are the same, dashed."""

BASE = "recomputation_512"
"""What the others are compared with, on the same tokens."""


def losses(lm: KVPress, setting: Setting, texts: Sequence[list[int]]) -> list[list[float]]:
    """Losses in nats by position, of texts side by side."""
    if setting.press is None:
        return recomputed(lm, texts, setting.budget)
    out: list[list[float]] = [[] for _ in texts]
    for step in steps_of(lm, setting, texts):
        for index, row in zip(step.documents, step.losses, strict=True):
            out[index] += row
    return out


@torch.inference_mode()
def recomputed(lm: KVPress, texts: Sequence[list[int]], budget: int) -> list[list[float]]:
    """Losses without any cache: every chunk after a forward over the `budget` tokens before it, from position 0."""
    targets = torch.tensor(texts)
    inputs = torch.cat([torch.full((len(texts), 1), lm.prefix_token_id), targets[:, :-1]], dim=1)
    out = []
    with lm.press_model.presented():
        for start in range(0, inputs.shape[1], CHUNK):
            stop = min(start + CHUNK, inputs.shape[1])
            logits = lm.model(inputs[:, max(0, start - budget) : stop], use_cache=False, logits_to_keep=stop - start)[0]
            out.append(torch.nn.functional.cross_entropy(logits.mT, targets[:, start:stop], reduction="none"))
    return torch.cat(out, dim=1).tolist()  # type: ignore[no-any-return]


def file_name(title: str) -> str:
    return f"{zlib.crc32(title.encode())}"


def measured(arguments: argparse.Namespace) -> dict[str, np.ndarray]:
    """Losses in nats of every setting, ``(books, tokens)``; what an earlier run finished is read."""
    lm = KVPress(pretrained=arguments.pretrained, device="cpu", dtype="float32")
    weights = 0
    for parameter in lm.model.parameters():
        weights = zlib.crc32(parameter.detach().numpy().tobytes(), weights)
    store = LossFiles(arguments.losses, {"chunk": CHUNK, "dtype": "float32", "weights": f"{weights:08x}"})
    texts = first_books(lm, arguments.books, arguments.tokens)
    out: dict[str, np.ndarray] = {}
    for setting in (SETTINGS[name] for name in arguments.settings.split(",")):
        stored = {title: store.load(setting.name, tokens, file_name(title)) for title, tokens in texts.items()}
        found = {title: None if one is None else list(one.losses) for title, one in stored.items()}
        todo = [title for title, values in found.items() if values is None]
        for titles in (todo[first : first + arguments.rows] for first in range(0, len(todo), arguments.rows)):
            begun = time.perf_counter()
            for title, values in zip(titles, losses(lm, setting, [texts[title] for title in titles]), strict=True):
                store.save(setting.name, texts[title], file_name(title), values, {})
                found[title] = values
            print(f"{setting.name}: {len(titles)} books, {time.perf_counter() - begun:.0f} s", flush=True)
        out[setting.name] = np.array(list(found.values()))
    return out


def with_interval(differences: np.ndarray) -> dict[str, Any]:
    """``exp`` of the mean over books, and the bootstrap's 95 % interval over books."""
    low, high = map(math.exp, interval(differences, np.mean, num_resamples=10_000))
    return {"ratio": round(math.exp(differences.mean()), 4), "interval_95": [round(low, 4), round(high, 4)]}


def summary(by_setting: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """One row per setting. Recomputation of the same tokens tells a drift of the text from one of the cache."""
    rows = []
    for name, values in by_setting.items():
        setting, inside, far = SETTINGS[name], values[:, INSIDE].mean(axis=1), values[:, FAR].mean(axis=1)
        row = {
            "setting": name,
            "label": setting.label,
            "budget": setting.budget,
            "inside": round(math.exp(inside.mean()), 3),
            "far": round(math.exp(far.mean()), 3),
            "far_over_inside": with_interval(far - inside),
        }
        if BASE in by_setting and name != BASE:
            row["over_recomputation"] = with_interval(far - by_setting[BASE][:, FAR].mean(axis=1))
            blocks = (values - by_setting[BASE])[:, FAR].mean(axis=0).reshape(-1, 500).mean(axis=1)
            row["worst_500_over_recomputation"] = round(math.exp(blocks.max()), 3)
        rows.append(row)
    return rows


def markdown(rows: Sequence[dict[str, Any]], num_books: int, num_tokens: int) -> str:
    def cell(figure: dict[str, Any] | None) -> str:
        return "" if figure is None else "{:.3f} [{:.3f}, {:.3f}]".format(figure["ratio"], *figure["interval_95"])

    text = [
        f"{num_books} PG-19 books, the first {num_tokens:,} tokens of each, chunk {CHUNK}, fp32. Perplexity of tokens",
        f"{INSIDE.start:,} to {INSIDE.stop:,} (inside the trained window) and {FAR.start:,} to {FAR.stop:,} (far).",
        "Brackets: 95 % bootstrap over books.",
    ]
    ratios = ["far / inside", "far, over recomputation at 512", "worst 500 tokens of it"]
    cells = [
        [
            *(row["label"], f"{row['budget']:,}", f"{row['inside']:.2f}", f"{row['far']:.2f}"),
            *(cell(row["far_over_inside"]), cell(row.get("over_recomputation"))),
            str(row.get("worst_500_over_recomputation", "")),
        ]
        for row in rows
    ]
    return "\n".join([*text, "", markdown_table(["cache", "budget", "inside", "far", *ratios], cells)]) + "\n"


def draw(by_setting: dict[str, np.ndarray], trained: int, file: Path) -> None:
    """Draw perplexity in bins of position, and below it its ratio to that of recomputation."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    num_tokens = next(iter(by_setting.values())).shape[1]
    edges = [256]
    while edges[-1] < num_tokens:  # a fifth wide, but fine enough for what comes and goes with the distance
        edges.append(min(edges[-1] + min(edges[-1] // 5, 500), num_tokens))
    middles = [math.sqrt(left * right) for left, right in itertools.pairwise(edges)]
    bins = [slice(*pair) for pair in itertools.pairwise(edges)]
    binned = {name: np.array([values[:, bin].mean() for bin in bins]) for name, values in by_setting.items()}
    chart, (above, below) = plt.subplots(2, 1, figsize=(8.5, 8.5), sharex=True, constrained_layout=True)
    for name, values in binned.items():
        setting = SETTINGS[name]
        colour, marker = STYLES[name.replace("_original", "")]
        line = {"color": colour, "marker": marker, "markersize": 3, "linestyle": "-" if setting.rotate else "--"}
        above.plot(middles, np.exp(values), label=f"{setting.label}, {setting.budget:,}", **line)
        if BASE in binned:
            below.plot(middles, np.exp(values - binned[BASE]), **line)
    below.set_xscale("log")
    for axis, ticks in ((above, (40, 60, 80, 120)), (below, (1, 1.1, 1.25, 1.5, 2, 2.75))):
        axis.set_yscale("log")
        axis.set_yticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.axvline(trained, color="grey", linestyle=":")
        axis.grid(alpha=0.3)
    above.annotate(f"{trained:,} trained positions", (trained, 0.97), xycoords=("data", "axes fraction"), fontsize=8)
    above.set(ylabel="perplexity", title=f"{len(next(iter(by_setting.values())))} PG-19 books, streamed")
    below.legend(*above.get_legend_handles_labels(), fontsize=7.5, loc="upper left")  # where all curves are one
    below.set(ylabel="over sliding recomputation, 512", xlabel="position of the token")
    file.parent.mkdir(parents=True, exist_ok=True)
    chart.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", default="builtin")
    parser.add_argument("--books", type=int, default=14)
    parser.add_argument("--tokens", type=int, default=20_032, help="of each book (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=7, help="books side by side (default: %(default)s)")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--losses", type=Path, default=Path("build/stream_curves"), help="folder to keep them in")
    parser.add_argument("--output", type=Path, default=Path("docs/figures"), help="folder of the PNG and the table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    by_setting = measured(arguments)
    rows = summary(by_setting)
    draw(by_setting, 2048, arguments.output / "stream_curves.png")
    (arguments.output / "stream_curves.md").write_text(markdown(rows, arguments.books, arguments.tokens))
    print(json.dumps({"books": arguments.books, "tokens": arguments.tokens, "chunk": CHUNK, "rows": rows}))


if __name__ == "__main__":
    main()
